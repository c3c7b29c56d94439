"""Merging models whose tokenizers differ: every token's row is that of the token."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import gratis
from gratis.contract.errors import InputError, ParameterError
from gratis.subjects.merging import merge

WIDTH = 5
BASE = ["a", "b", "c", "ab", "bc", "<s>", "</s>"]
OTHER = ["c", "b", "a", "d", "cd", "ab", "</s>", "<s>", "<new>"]
MERGES = {"a": [["a", "b"], ["b", "c"]], "b": [["c", "d"], ["a", "b"]]}


def row(token, shift):
    generator = torch.Generator().manual_seed(sum(map(ord, token)) * 31 + len(token))
    return torch.randn(WIDTH, generator=generator) + shift


def model(folder, tokens, merges, shift, padding=0, tied=False):
    folder.mkdir()
    special = [t for t in tokens if t.startswith("<")]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "decoder": None,
        "added_tokens": [
            {"id": tokens.index(t), "content": t, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for t in special
        ],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [tokens.index("<s>")], "tokens": ["<s>"]}},
        },
        "model": {"type": "BPE", "vocab": {t: n for n, t in enumerate(tokens) if t not in special}, "merges": merges},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    size = len(tokens) + padding
    settings = {"vocab_size": size, "bos_token_id": tokens.index("<s>"), "eos_token_id": [tokens.index("</s>")]}
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": tied}))
    rows = torch.stack([row(t, shift) for t in tokens] + [torch.full((WIDTH,), 7.0 + shift)] * padding)
    tensors = {"model.embed_tokens.weight": rows, "model.norm.weight": torch.full((WIDTH,), float(shift))}
    if not tied:
        tensors |= {"lm_head.weight": rows * 2, "lm_head.bias": rows[:, 0].contiguous()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def two(tmp_path):
    return model(tmp_path / "a", BASE, MERGES["a"], 0, padding=3), model(tmp_path / "b", OTHER, MERGES["b"], 1)


def tokens_of(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


@pytest.mark.parametrize("policy", ["base", "union", "intersect"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_row_is_its_tokens(tmp_path, policy, tied):
    a = model(tmp_path / "a", BASE, MERGES["a"], 0, padding=0 if tied else 3, tied=tied)
    b = model(tmp_path / "b", OTHER, MERGES["b"], 1, tied=tied)
    out = tmp_path / "out"
    merge(gratis.Average(), experts=[a, b], out=out, tokenizer=policy)
    got, tokens = load_file(out / "model.safetensors"), tokens_of(out)
    wanted = {"base": set(BASE), "union": set(BASE) | set(OTHER), "intersect": set(BASE) & set(OTHER)}[policy]
    assert set(tokens) == wanted
    for token, number in tokens.items():
        owned = [row(token, shift) for shift, known in ((0, BASE), (1, OTHER)) if token in known]
        # A token that one lacks has the other's row in both.
        expected = torch.stack(owned).mean(0)
        np.testing.assert_allclose(got["model.embed_tokens.weight"][number], expected, atol=1e-6)
        if not tied:
            np.testing.assert_allclose(got["lm_head.weight"][number], 2 * expected, atol=1e-6)
            assert abs(float(got["lm_head.bias"][number] - expected[0])) < 1e-6
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(got["model.embed_tokens.weight"])
    assert config["bos_token_id"] == tokens["<s>"]
    assert config["eos_token_id"] == [tokens["</s>"]]
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("ab").ids == [tokens["<s>"], tokens["ab"]]
    if policy == "base" and not tied:
        assert torch.equal(got["model.embed_tokens.weight"][len(BASE) :], torch.full((3, WIDTH), 7.0))
    if policy == "union":
        assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("cd").tokens == ["<s>", "cd"]


def test_task_vectors_leave_tokens_alone_that_only_the_base_has(two, tmp_path):
    a, b = two
    merge(gratis.TaskArithmetic(scale=1.0), base=a, experts=[b], out=tmp_path / "out", tokenizer="union")
    got, tokens = (
        load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"],
        tokens_of(tmp_path / "out"),
    )
    assert torch.equal(got[tokens["bc"]], row("bc", 0))
    for token in ("a", "<s>", "cd", "<new>"):
        np.testing.assert_allclose(got[tokens[token]], row(token, 1), atol=1e-6)


def test_policies_that_are_refused(two, tmp_path):
    a, b = two
    with pytest.raises(InputError, match="different models: vocab_size|different tokenizers"):
        merge(gratis.Average(), experts=[a, b], out=tmp_path / "out")
    with pytest.raises(ParameterError, match="tokenizer must be one of error, base, union, intersect"):
        merge(gratis.Average(), experts=[a, b], out=tmp_path / "out", tokenizer="mine")
    (b / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json"):
        merge(gratis.Average(), experts=[a, b], out=tmp_path / "out", tokenizer="union")
    c = model(tmp_path / "c", OTHER, MERGES["b"], 1)
    config = json.loads((c / "config.json").read_text())
    (c / "config.json").write_text(json.dumps({**config, "vocab_size": 3}))
    with pytest.raises(InputError, match="a token numbered 8, but only 3 rows"):
        merge(gratis.Average(), experts=[a, c], out=tmp_path / "out", tokenizer="union")
    assert not (tmp_path / "out").exists()


def test_rows_are_read_in_any_stretch(two):
    from gratis.subjects.checkpoints import Checkpoint
    from gratis.subjects.vocabularies import reconcile

    made, _ = reconcile([Checkpoint(path) for path in two], "union")
    for source in made:
        whole = source.view("model.embed_tokens.weight")
        for start in range(0, len(whole), 3):
            for count in (0, 1, 4, 11):
                count = min(count, len(whole) - start)
                assert torch.equal(source.view("model.embed_tokens.weight", start, count), whole[start : start + count])
