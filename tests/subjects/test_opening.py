from __future__ import annotations

import json
import os

import pytest
import torch

import gratis
from gratis.contract.errors import FileError, SubjectError, UnknownNameError
from gratis.subjects import embedded, tokenizer_of
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language as tiny


def test_a_folder_opens_as_the_model_that_was_saved(tmp_path):
    model = tiny.tiny_language_model()
    model.save_pretrained(tmp_path / "model")
    opened = gratis.open(tmp_path / "model")
    assert type(opened) is type(model)
    assert not opened.training
    torch.testing.assert_close(opened(tiny.prompt()).logits, model(tiny.prompt()).logits, rtol=0, atol=0)
    assert gratis.open(str(tmp_path / "model"), dtype="bfloat16").dtype == torch.bfloat16


def test_a_folder_opens_as_the_class_that_it_names():
    from gratis.zoo import folder_of

    assert type(gratis.open(folder_of("arithmetic-masked"))).__name__ == "ModernBertForMaskedLM"
    assert type(gratis.open(folder_of("sprites-captioner"))).__name__ == "VisionEncoderDecoderModel"


@pytest.mark.parametrize("named", [None, [], ["logging"], ["AutoTokenizer"], ["NoSuchModel"], {"0": "x"}])
def test_a_class_that_is_no_model_class_is_not_looked_for(tmp_path, named):
    tiny.tiny_language_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": named}))
    assert type(gratis.open(tmp_path)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("smolm2", UnknownNameError, "did you mean 'smollm2'"),
        ("./nowhere", FileError, "There is no model folder"),
        ("/nowhere/at/all", FileError, "There is no model folder"),
        ("nowhere.gguf", FileError, "There is no file"),
        ("", UnknownNameError, "There is no model ''"),
    ],
)
def test_what_is_not_there(name, error, message):
    with pytest.raises(error, match=message) as caught:
        gratis.open(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileError, match="holds no model"):
        gratis.open(tmp_path)
    (tmp_path / "f.txt").write_text("x")
    with pytest.raises(FileError, match="is a file"):
        gratis.open(tmp_path / "f.txt")


@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{", b"garbage" * 100])
def test_damaged_weights(tmp_path, content):
    tiny.tiny_language_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FileError) as caught:
        gratis.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_gguf_file(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(FileError, match="cannot be read as a GGUF"):
        gratis.open(path)


def test_a_dtype_that_is_none(tmp_path):
    tiny.tiny_language_model().save_pretrained(tmp_path)
    with pytest.raises(SubjectError, match="not a dtype"):
        gratis.open(tmp_path, dtype="float33")


def test_tokenizer_of_a_model_made_in_memory():
    model = tiny.tiny_language_model()
    with pytest.raises(SubjectError, match="set_tokenizer"):
        tokenizer_of(model)
    marker = object()
    set_tokenizer(model, marker)
    assert tokenizer_of(model) is marker


def test_the_embedded_model_is_checked_and_a_killed_conversion_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    assert not embedded._is_complete(folder)
    (folder / "weights").write_bytes(b"abc")
    (folder / embedded.COMPLETE).write_text(json.dumps({"sizes": {"weights": 3}}))
    assert embedded._is_complete(folder)
    (folder / "weights").write_bytes(b"ab")
    assert not embedded._is_complete(folder)
    left = tmp_path / "model.999999999.partial"
    left.mkdir()
    mine = tmp_path / f"model.{os.getpid()}.partial"
    mine.mkdir()
    embedded._remove_left_behind(folder)
    assert not left.exists()
    assert mine.exists()


def test_the_embedded_model_answers():
    model = gratis.open("smollm2")
    tokenizer = tokenizer_of(model)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert not hasattr(model.config, "quantization_config")
