from __future__ import annotations

import pytest
import torch

import gratis
from gratis.contract.errors import ParameterError, SubjectError
from gratis.tasks.length_extrapolation import losses, texts
from tests import tiny_language as tiny


def test_the_lead_over_itself_is_zero_and_items_are_pieces():
    model, seen = gratis.open("zoo:help-softmax"), []
    task = gratis.task_catalogue["length-extrapolation"](length=256)
    task.check(model)
    with torch.no_grad():
        found = task.measure(model, seed=0, progress=lambda done, words: seen.append(done))
    assert found.metrics["lead"] == 0.0
    assert found.items["loss"] == losses(model, texts()[1], 256)
    assert found.metrics["growth"] > 0.3
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_other_models_are_refused():
    with pytest.raises(SubjectError, match="97 tokens"):
        gratis.task_catalogue["length-extrapolation"]().check(tiny.tiny_language_model())
    with pytest.raises(ParameterError, match="models of bytes"):
        gratis.task_catalogue["length-extrapolation"](beside="smollm2")
