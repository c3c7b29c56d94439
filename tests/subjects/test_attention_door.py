"""The attention door: what passes through it, what comes off, and who is refused."""

from __future__ import annotations

import pytest
import torch

from gratis.contract.attach import Scope
from gratis.contract.errors import SubjectError
from gratis.subjects.attention_door import check_attention, install_attention, pass_through
from tests import tiny_language as tiny
from tests.architectures.building import build


def test_every_attending_module_is_found_in_order():
    model = tiny.tiny_language_model()
    found = check_attention(model, "Method")
    assert [one.module for one in found] == [layer.self_attn for layer in model.model.layers]
    assert {one.heads for one in found} == {4}
    assert not any(one.local for one in found)
    assert [one.local for one in check_attention(build("gemma2"), "Method")] == [True, False]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_passing_on_changes_nothing_and_leaves_nothing(implementation):
    model = tiny.tiny_language_model()
    model.set_attn_implementation(implementation)
    expected, before = tiny.run(model), tiny.snapshot(model)
    scope = Scope()
    install_attention(model, "pass-through", pass_through, scope)
    assert torch.equal(tiny.run(model), expected)
    scope.close()
    assert tiny.snapshot(model) == before
    assert torch.equal(tiny.run(model), expected)


def test_a_function_sees_shapes_and_changes_the_result():
    model = tiny.tiny_language_model()
    expected = tiny.run(model)
    shapes = []

    def halved(inner, module, query, key, value, attention_mask, **kwargs):
        shapes.append((query.shape, key.shape))
        out, weights = inner(module, query, key, value, attention_mask, **kwargs)
        return out / 2, weights

    scope = Scope()
    install_attention(model, "halved", halved, scope)
    changed = tiny.run(model)
    scope.close()
    assert shapes[0] == ((1, 4, tiny.PROMPT, 8), (1, 2, tiny.PROMPT, 8))
    assert not torch.equal(changed, expected)
    assert torch.equal(tiny.run(model), expected)


def test_functions_stack_the_later_around_the_earlier():
    model = tiny.tiny_language_model()
    order = []

    def noting(name):
        def function(inner, module, *args, **kwargs):
            order.append(name)
            return inner(module, *args, **kwargs)

        return function

    scope = Scope()
    install_attention(model, "first", noting("first"), scope)
    install_attention(model, "second", noting("second"), scope)
    tiny.run(model)
    scope.close()
    assert order[:4] == ["second", "first", "second", "first"]


def test_models_that_attend_by_themselves_are_refused_untouched():
    model = build("bloom")
    before = tiny.snapshot(model)
    with pytest.raises(SubjectError, match="attention interface"):
        check_attention(model, "Method")
    assert tiny.snapshot(model) == before


def test_two_models_do_not_mix():
    one, two = tiny.tiny_language_model(), tiny.tiny_language_model()
    expected = tiny.run(two)
    scope = Scope()
    install_attention(
        one, "nothing", lambda inner, module, query, *args, **kwargs: (query.transpose(1, 2) * 0, None), scope
    )
    assert torch.equal(tiny.run(two), expected)
    scope.close()
