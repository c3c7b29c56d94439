"""Language methods keep their promises on every architecture, or refuse it. A handful here; all of
them by `python -m tests.architectures.matrix`."""

from __future__ import annotations

import pytest
import torch

import gratis
from tests.architectures.building import build
from tests.architectures.matrix import DOOR, FAILS, REFUSES, examine, language_methods

SOME = (
    "llama", "mistral", "qwen3_moe", "gemma3_text", "phi", "gpt_neox", "cohere", "deepseek_v3", "smollm3", "stablelm",
    "bamba", "gpt2", "bloom",
)  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_works_or_refuses(name):
    cells = examine(name, language_methods())
    assert cells is not None
    assert not {method: cell.reason for method, cell in cells.items() if cell.outcome == FAILS}
    assert all(cell.reason.endswith(".") and "\n" not in cell.reason for cell in cells.values() if cell.reason)


def test_what_has_no_door_is_told_so():
    cells = examine("bloom", [])
    assert cells is not None
    assert cells[DOOR].outcome == REFUSES
    assert "attention interface" in cells[DOOR].reason


@pytest.mark.parametrize("name", ["llama", "phi", "gptj", "cohere", "gpt_neox", "deepseek_v3", "longcat_flash", "glm4"])
def test_evicted_layers_hold_what_a_fresh_cache_of_the_kept_tokens_holds(name):
    """In the first layer keys depend on token and position only: whatever was evicted, turned and moved before."""
    model = build(name)
    tokens = torch.randint(3, 90, (2, 90), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), gratis.attach(model, gratis.SlidingWindow(budget=24, sinks=4)):
        cache = model(input_ids=tokens[:, :30], use_cache=True).past_key_values
        for at in range(30, 90):
            cache = model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True).past_key_values
        kept = torch.cat([tokens[:, :4], tokens[:, -20:]], dim=1)
        start = int(cache.positions(1)) - 24
        held = [layer[:, :, cache._order] for layer in (cache.layers[0].keys, cache.layers[0].values)]
    with torch.no_grad():
        places = torch.arange(start, start + 24)[None].expand(2, -1)
        fresh = model(input_ids=kept, position_ids=places, use_cache=True).past_key_values.layers[0]
    torch.testing.assert_close(held[0], fresh.keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(held[1], fresh.values, atol=1e-5, rtol=1e-4)
