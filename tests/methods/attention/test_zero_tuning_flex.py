"""ZeroTuning below flex attention, which compiles its kernels; on a CUDA device these return their log-sum-exp."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gratis
from tests import tiny_language as tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(torch.float32, 1e-3), (torch.bfloat16, 0.1)] if DEVICE == "cuda" else [(torch.float32, 1e-3)]


@pytest.mark.evidence
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@torch.no_grad()
def test_flex_attention_gives_what_fused_attention_gives_also_in_padded_rows(dtype, tolerance):
    ids = tiny.prompt(2).to(DEVICE)
    padded = torch.cat([ids[:1], torch.nn.functional.pad(ids[1:, -25:], (15, 0))])
    mask = torch.ones_like(padded)
    mask[1, :15] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    logits = {}
    for implementation in ("sdpa", "flex_attention"):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=tiny.VOCABULARY, initializer_range=0.2, head_dim=16,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval().to(DEVICE, dtype)
        model.set_attn_implementation(implementation)
        plain = model(padded, **given).logits
        with gratis.attach(model, gratis.ZeroTuning(scale=4.0, heads=(0, 3))):
            logits[implementation] = model(padded, **given).logits
        assert not torch.allclose(logits[implementation], plain, atol=1e-2)
    for row, start in ((0, 0), (1, 15)):
        one, other = (found[row, start:].float() for found in logits.values())
        torch.testing.assert_close(other, one, atol=tolerance, rtol=tolerance)
