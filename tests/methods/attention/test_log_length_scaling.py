from __future__ import annotations

import math

import pytest
import torch

import gratis
from gratis.contract.attach import Scope
from gratis.contract.errors import ParameterError, SubjectError
from gratis.methods.attention.log_length_scaling import length_factors
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language as tiny


def test_factors_are_logarithms_of_what_a_row_attends_to():
    factors = length_factors(None, 4, 10, 8, torch.device("cpu")).flatten()
    expected = [1.0, 1.0, math.log(9) / math.log(8), math.log(10) / math.log(8)]
    torch.testing.assert_close(factors, torch.tensor(expected, dtype=torch.float64))


def test_padding_does_not_count():
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    mask[0, ..., :4] = False
    factors = length_factors(mask, 1, 10, 8, torch.device("cpu")).flatten()
    torch.testing.assert_close(factors, torch.tensor([1.0, math.log(10) / math.log(8)], dtype=torch.float64))


def test_a_power_of_softmax_weights_is_a_softmax_of_larger_logits():
    model = tiny.tiny_language_model()
    model.set_attn_implementation("eager")
    ids = tiny.prompt()
    first = model.model.layers[0].self_attn
    with torch.no_grad():
        plain = model(ids, output_attentions=True).attentions[0]
    seen = {}

    def keep(module, args, kwargs, output):
        seen["weights"] = output[1]

    scope, hook = Scope(), first.register_forward_hook(keep, with_kwargs=True)
    gratis.LogLengthScaling(sharpen=1.2, length=1000, text="x").install(model, scope)
    with torch.no_grad():
        model(ids)
    scope.close()
    hook.remove()
    powered = plain**1.2
    torch.testing.assert_close(seen["weights"], powered / powered.sum(-1, keepdim=True), atol=1e-5, rtol=0)


def test_up_to_the_trained_length_nothing_changes_and_beyond_it_does():
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    with torch.no_grad():
        plain = model(ids).logits
        with gratis.attach(model, gratis.LogLengthScaling(length=20)) as handle:
            scaled = model(ids).logits
            assert handle.report()["log-length-scaling"]["largest_factor"] == pytest.approx(math.log(40) / math.log(20))
    torch.testing.assert_close(scaled[:, :20], plain[:, :20], atol=1e-5, rtol=0)
    assert (scaled[:, 30:] - plain[:, 30:]).abs().max() > 1e-3


def test_sharpening_needs_a_text_and_is_refused_where_it_harms():
    with pytest.raises(ParameterError, match="needs text"):
        gratis.LogLengthScaling(sharpen=1.1)
    model = tiny.tiny_language_model()
    losses = {}
    for seed in range(6):
        ids = tiny.prompt(seed=seed)
        set_tokenizer(model, lambda text, ids=ids, **options: type("Read", (), {"input_ids": ids}))
        with torch.no_grad():
            plain = model(input_ids=ids, labels=ids).loss
            scope = Scope()
            method = gratis.LogLengthScaling(sharpen=1.2, text="mine")
            method.install(model, scope)
            losses[seed] = bool(model(input_ids=ids, labels=ids).loss <= plain)
            scope.close()
        if losses[seed]:
            gratis.attach(model, method).detach()
        else:
            with pytest.raises(SubjectError, match="makes the loss on the given text worse"):
                gratis.attach(model, method)
    assert set(losses.values()) == {False, True}


def test_a_model_without_a_length_is_refused(monkeypatch):
    monkeypatch.setattr("gratis.methods.attention.log_length_scaling.window_of", lambda model: None)
    with pytest.raises(SubjectError, match="names no length"):
        gratis.attach(tiny.tiny_language_model(), gratis.LogLengthScaling())
