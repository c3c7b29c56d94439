from __future__ import annotations

import pytest
import torch

import gratis
from gratis.contract.errors import ParameterError, StackingError
from tests import tiny_language as tiny
from tests.methods.memory.test_lacache import feed


def test_first_and_last_are_kept():
    [chosen] = gratis.SlidingWindow(budget=6, sinks=2).select(10)
    assert chosen.indices(3).tolist() == [[0, 1, 6, 7, 8, 9]] * 3
    assert gratis.SlidingWindow(budget=10, sinks=2).select(10) == []


def test_sinks_must_leave_room():
    with pytest.raises(ParameterError, match="sinks 8 must be below budget 8"):
        gratis.SlidingWindow(budget=8, sinks=8)


@torch.no_grad()
def test_one_layer_sees_exactly_sinks_and_window():
    """With one layer, the window's output is that of the kept tokens read alone: nothing else can leak through."""
    from transformers import LlamaForCausalLM

    config = tiny.tiny_language_model().config
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(2, tiny.VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(3))
    with gratis.attach(model, gratis.SlidingWindow(budget=12, sinks=3)):
        _, logits = feed(model, ids, [1] * 70)
    kept = torch.cat([ids[:, :3], ids[:, 69 - 9 :]], dim=1)
    torch.testing.assert_close(logits[:, -1], model(kept).logits[:, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_positions_stay_within_the_trained_window():
    model = tiny.tiny_language_model()
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(int(k["position_ids"].max())) if k.get("position_ids") is not None else None,
        with_kwargs=True,
    )
    ids = torch.randint(2, tiny.VOCABULARY, (1, 700), generator=torch.Generator().manual_seed(3))
    with gratis.attach(model, gratis.SlidingWindow(budget=40)):
        _, by_one = feed(model, ids, [1] * 700)
    handle.remove()
    assert max(seen) < 256
    assert by_one.isfinite().all()


def test_two_cache_methods_do_not_stack():
    model = tiny.tiny_language_model()
    with (
        gratis.attach(model, gratis.SlidingWindow(budget=24)),
        pytest.raises(StackingError, match="sliding-window and lacache .* evicts from the cache"),
    ):
        gratis.attach(model, gratis.LaCache(budget=24, span=1))
