"""The strength of an attached delta is turned while the model is live, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch

import gratis
from gratis.contract.errors import AttachmentError


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def vector(seed, label):
    base, tuned = network(), network()
    with torch.no_grad():
        tuned.weight.add_(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))
    return gratis.Delta.between(base, tuned, label=label)


def test_turning_gives_the_weights_of_that_strength_and_detaching_the_originals():
    model, before = network(), network().weight.detach()
    change = vector(1, "instruction")
    handle = gratis.attach(model, change)
    for strength in (0.5, -1.0, 0.0, 1.0):
        handle.turn(strength)
        assert torch.equal(model.weight, before + strength * change.dense("weight"))
    handle.detach()
    assert torch.equal(model.weight, before)
    with pytest.raises(AttachmentError, match="taken off"):
        handle.turn(1.0)


def test_turning_below_another_attachment_keeps_that_one_on():
    model, before = network(), network().weight.detach()
    one, two = vector(1, "one"), vector(2, "two")
    lower, upper = gratis.attach(model, one), gratis.attach(model, two)
    lower.turn(0.25)
    expected = (before + 0.25 * one.dense("weight")) + two.dense("weight")
    assert torch.equal(model.weight, expected)
    upper.detach()
    lower.detach()
    assert torch.equal(model.weight, before)


def test_what_cannot_be_turned_is_said():
    model = network()
    with gratis.attach(model, vector(1, "one")) as handle:
        with pytest.raises(AttachmentError, match="there is one"):
            handle.turn(0.5, "two")
        with pytest.raises(AttachmentError, match="finite"):
            handle.turn(float("nan"))
