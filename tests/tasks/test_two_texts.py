"""Bits per character of a reader whose answer is known, and of both specialists' homes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import gratis
from gratis.contract.errors import SubjectError
from gratis.subjects.opening import set_tokenizer
from gratis.tasks.two_texts import LENGTH, TwoTexts, bits_per_character, held_out_pieces
from gratis.zoo.train.growing import tokenizer


class Even(torch.nn.Module):
    """Gives every one of its tokens the same probability."""

    device = torch.device("cpu")

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 128))


def test_a_reader_that_knows_nothing_pays_the_logarithm_of_its_tokens():
    model = Even()
    set_tokenizer(model, tokenizer())
    found, tokens, calls = bits_per_character(model, ["abcdef", "xyz", "uvwxyz"], batch=2)
    assert found == pytest.approx([math.log2(128)] * 3, abs=1e-5)
    assert (tokens, calls) == (15, 2)


def test_pieces_are_apart_and_move_with_the_seed():
    pieces = held_out_pieces("prose", 20)
    assert {len(piece) for piece in pieces} == {LENGTH}
    assert len(set(pieces)) == 20
    assert held_out_pieces("prose", 20, seed=1) != pieces
    assert len(held_out_pieces("prose", 20, seed=1)) == 20


def test_each_specialist_is_the_better_one_at_home():
    task = TwoTexts(pieces=8)
    code, prose = (task.measure(gratis.open(f"zoo:glyphs-{kind}"), seed=0).metrics for kind in ("code", "prose"))
    assert code["code"] < prose["code"] - 0.3
    assert prose["prose"] < code["prose"] - 0.3
    assert code["both"] == pytest.approx((code["code"] + code["prose"]) / 2)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(SubjectError, match="has no head"):
        TwoTexts().check(gratis.open("zoo:glyphs-code").model)
