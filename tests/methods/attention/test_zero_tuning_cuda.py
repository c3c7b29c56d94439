"""ZeroTuning below flex attention on a CUDA device, whose kernel returns its log-sum-exp."""

from __future__ import annotations

import pytest
import torch

import gratis
from tests import tiny_language as tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
@torch.no_grad()
def test_flex_attention_gives_what_fused_attention_gives_also_in_padded_rows(dtype, tolerance):
    ids = tiny.prompt(2).cuda()
    padded = torch.cat([ids[:1], torch.nn.functional.pad(ids[1:, -25:], (15, 0))])
    mask = torch.ones_like(padded)
    mask[1, :15] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    logits = {}
    for implementation in ("sdpa", "flex_attention"):
        model = tiny.tiny_language_model(dtype=dtype).cuda()
        model.set_attn_implementation(implementation)
        plain = model(padded, **given).logits
        with gratis.attach(model, gratis.ZeroTuning(scale=4.0, heads=(0, 3))):
            logits[implementation] = model(padded, **given).logits
        assert not torch.allclose(logits[implementation], plain, atol=1e-2)
    for row, start in ((0, 0), (1, 15)):
        one, other = (found[row, start:].float() for found in logits.values())
        torch.testing.assert_close(other, one, atol=tolerance, rtol=tolerance)
