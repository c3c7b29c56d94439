"""GGUF files read block by block: the numbers that transformers reads, and no byte beyond the file."""

from __future__ import annotations

import random

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gratis
from gratis.contract.errors import FileError
from gratis.subjects.gguf_checkpoint import GGUFCheckpoint, read_table, stored_rows
from gratis.subjects.merging import merge

HIDDEN, HEADS, KV_HEADS, INNER, TOKENS = 64, 4, 2, 96, 40


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    random_numbers = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("gpt2")
    tokens = [chr(97 + i) if i < 26 else f"<{i}>" for i in range(TOKENS)]
    writer.add_token_list(tokens)
    writer.add_token_types([1 if i < 26 else 3 for i in range(TOKENS)])
    writer.add_token_merges(["x y"])
    writer.add_bos_token_id(26)
    writer.add_eos_token_id(27)
    shapes = {
        "token_embd": (TOKENS, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,), "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "F16", "Q4_1", "F32")]
    for number, (name, shape) in enumerate(shapes.items()):
        values = random_numbers.standard_normal(shape).astype(np.float32)
        kind = kinds[number % 5] if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def opened(file):
    return GGUFCheckpoint(file)


def test_the_numbers_are_those_that_transformers_reads(file, opened):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    assert expected.keys() == opened.places.keys()
    for name, tensor in expected.items():
        assert torch.equal(opened.tensor(name), tensor), name


def test_any_stretch_is_a_piece_of_the_whole(opened):
    chance = random.Random(0)
    for name, place in opened.places.items():
        whole = opened.view(name)
        for _ in range(8):
            start = chance.randrange(place.elements)
            count = chance.randrange(place.elements - start + 1)
            assert torch.equal(opened.view(name, start, count), whole[start : start + count])
        with pytest.raises(IndexError):
            opened.view(name, place.elements, 1)


def test_rows_of_a_head_are_interleaved_in_the_file():
    assert stored_rows(np.arange(8), 8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_file_is_merged_with_a_folder(opened, file, tmp_path):
    (tmp_path / "other").mkdir()
    other = {n: opened.tensor(n) + 1 for n in opened.places}
    save_file(other, tmp_path / "other" / "model.safetensors")
    merge(gratis.Average(), experts=[tmp_path / "other", file], out=tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == other.keys()
    for name in other:
        np.testing.assert_allclose(got[name], opened.tensor(name) + 0.5, atol=1e-6)


def test_damaged_files_are_refused_and_never_read_beyond_their_end(file, tmp_path):
    whole = file.read_bytes()
    sizes, kinds = gguf.GGML_QUANT_SIZES, gguf.GGMLQuantizationType
    path = tmp_path / "damaged.gguf"
    for cut in (0, 3, 23, 24, 200, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileError):
            read_table(path, sizes, kinds)
    chance = random.Random(0)
    head = whole.index(b"blk.0.ffn_down.weight") + 80
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(head)] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            _, places = read_table(path, sizes, kinds)
        except FileError:
            continue
        for place in places.values():
            assert 0 <= place.offset <= place.offset + place.bytes <= len(whole)
