from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gratis
from gratis.contract.errors import InputError, SubjectError
from gratis.methods.attention.softplus import softplus_attention
from tests import tiny_language as tiny
from tests.architectures.building import build


def drawn(queries=9, keys=9, heads=4, groups=2, dim=8, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads, length):
        return torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)

    return tensor(heads, queries), tensor(groups, keys), tensor(groups, keys)


def by_rows(query, key, value, power, offset, free_rows):
    """The equations, row by row and key by key."""
    q, k, v = (t.double().numpy() for t in (query, key, value))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    rows, keys, dim = q.shape[2], k.shape[2], q.shape[3]
    for b in range(len(q)):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            for i in range(rows):
                n = keys - rows + i + 1
                unit = q[b, h, i] / np.linalg.norm(q[b, h, i])
                scores = [
                    unit @ k[b, g, j] / np.linalg.norm(k[b, g, j]) * math.log(dim) * math.log(n) for j in range(n)
                ]
                a = np.array([math.log1p(math.exp(s)) for s in scores])
                a /= a.sum()
                if power is not None:
                    z = np.maximum(n * a - (offset if n > free_rows else 0), 0)
                    if z.max() > 0:
                        a = (z / z.max()) ** power
                        a /= a.sum()
                out[b, h, i] = a @ v[b, g, :n]
    return out


@pytest.mark.parametrize(("power", "offset", "free"), [(None, 1.0, 3), (15.0, 1.0, 3), (3.0, 1.0, 3), (2.0, 0.5, 0)])
@pytest.mark.parametrize("block", [None, 4])
def test_against_the_equations_row_by_row(power, offset, free, block):
    q, k, v = drawn()
    out = softplus_attention(q, k, v, power=power, offset=offset, free_rows=free, block=block)
    np.testing.assert_allclose(out.numpy(), by_rows(q, k, v, power, offset, free), atol=1e-6)


def test_blocks_steps_and_all_at_once_are_the_same():
    q, k, v = drawn(queries=40, keys=40)
    whole = softplus_attention(q, k, v)
    blocks = softplus_attention(q, k, v, block=7)
    torch.testing.assert_close(blocks, whole, atol=1e-9, rtol=0)
    for i in (0, 1, 2, 3, 17, 39):
        step = q[:, :, i : i + 1]
        one = softplus_attention(step, k[:, :, : i + 1], v[:, :, : i + 1])
        torch.testing.assert_close(one, whole[:, :, i : i + 1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("block", [1, 7, 16, 40, 100])
def test_masks_of_every_kind_are_read_block_by_block(block):
    q, k, v = drawn(queries=24, keys=40)
    seen = torch.ones(24, 40).tril(16).bool()[None, None].repeat(2, 1, 1, 1)
    seen[1, :, :, :5] = False
    seen &= ~torch.ones(24, 40).tril(-14).bool()
    whole = softplus_attention(q, k, v, seen)
    hidden = torch.zeros(2, 1, 24, 40).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, hidden):
        torch.testing.assert_close(softplus_attention(q, k, v, mask, block=block), whole, atol=1e-10, rtol=0)
    for row in (0, 11, 23):
        kept = seen[1, 0, row].nonzero()[:, 0]
        alone = softplus_attention(q[1:, :, row : row + 1], k[1:, :, kept], v[1:, :, kept])
        torch.testing.assert_close(alone, whole[1:, :, row : row + 1], atol=1e-10, rtol=0)


def test_no_tensor_grows_with_the_square_of_the_length():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            for one in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(one, torch.Tensor):
                    self.numbers = max(self.numbers, one.numel())
            return found

    sizes = {}
    for length in (256, 512):
        q, k, v = drawn(queries=length, keys=length, batch=1)
        with Largest() as seen:
            softplus_attention(q, k, v, block=32)
        sizes[length] = seen.numbers
        assert seen.numbers <= max(4 * 32 * 32, 4 * length * 8)
        with Largest() as seen:
            softplus_attention(q, k, v)
        assert seen.numbers >= 4 * length * length
    assert sizes[512] <= 2 * sizes[256]


def test_weights_sum_to_one():
    q, k, _ = drawn()
    ones = torch.ones(2, 2, 9, 1, dtype=torch.float64)
    for power in (None, 1.0, 15.0):
        out = softplus_attention(q, k, ones, power=power)
        torch.testing.assert_close(out, torch.ones_like(out), atol=1e-6, rtol=0)


def test_power_one_without_offset_is_plain():
    q, k, v = drawn()
    plain = softplus_attention(q, k, v, power=None)
    torch.testing.assert_close(softplus_attention(q, k, v, power=1.0, offset=0.0), plain, atol=1e-6, rtol=0)


def test_a_great_power_takes_the_nearest_key():
    q, k, v = drawn(queries=1, keys=9)
    out = softplus_attention(q, k, v, torch.ones(1, 1, 1, 9).bool(), power=1e4)
    cosine = torch.nn.functional.cosine_similarity(q, k.repeat_interleave(2, 1), dim=-1)
    nearest = v.repeat_interleave(2, 1).gather(2, cosine.argmax(-1)[..., None, None].expand(-1, -1, 1, 8))
    torch.testing.assert_close(out, nearest, atol=1e-3, rtol=0)


def test_keys_may_come_in_any_order():
    q, k, v = drawn(queries=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    seen = torch.ones(1, 1, 1, 9).bool()
    torch.testing.assert_close(
        softplus_attention(q, k[:, :, order], v[:, :, order], seen), softplus_attention(q, k, v, seen)
    )


def test_a_peaked_row_does_not_overflow():
    """N·a reaches hundreds there, and its 15th power passes float32."""
    keys = 1024
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1.0
    k = -q.repeat(1, 1, keys, 1)
    k[:, :, 5] = q[:, :, 0]
    v = torch.arange(keys).float()[None, None, :, None].repeat(1, 1, 1, 8)
    out = softplus_attention(q, k, v, torch.ones(1, 1, 1, keys).bool(), scale=3.0)
    torch.testing.assert_close(out, torch.full_like(out, 5.0), atol=1e-3, rtol=0)


def test_the_first_rows_are_not_empty():
    q, k, v = drawn(queries=3, keys=3)
    out = softplus_attention(q, k, v)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0].repeat_interleave(2, 1), atol=1e-6, rtol=0)


def test_an_even_row_keeps_its_plain_weights():
    q, k, v = drawn(queries=1, keys=6)
    k = k[:, :, :1].expand(-1, -1, 6, -1)
    out = softplus_attention(q, k, v, torch.ones(1, 1, 1, 6).bool(), offset=1.0001)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).repeat_interleave(2, 1), atol=1e-6, rtol=0)


def test_a_text_does_not_change_when_it_goes_on():
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    with gratis.attach(model, gratis.SoftplusAttention(trained=True)), torch.no_grad():
        short, long = model(ids[:, :20]).logits, model(ids).logits
    torch.testing.assert_close(long[:, :20], short, atol=1e-4, rtol=0)


def test_padding_does_not_count():
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with gratis.attach(model, gratis.SoftplusAttention(trained=True)), torch.no_grad():
        alone = model(ids).logits
        beside = model(padded, attention_mask=mask, position_ids=places).logits[:, 4:]
    torch.testing.assert_close(beside, alone, atol=1e-3, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decoding_with_a_cache_is_reading_at_once(implementation):
    model = tiny.tiny_language_model()
    model.set_attn_implementation(implementation)
    ids = tiny.prompt()
    with gratis.attach(model, gratis.SoftplusAttention(trained=True)), torch.no_grad():
        whole = model(ids).logits
        cache, steps = None, []
        for at in range(ids.shape[1]):
            out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-3, rtol=0)


def test_it_can_be_trained_with():
    model = tiny.tiny_language_model()
    ids = tiny.prompt(2)
    with gratis.attach(model, gratis.SoftplusAttention(trained=True, block=None)):
        model.train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss = model(input_ids=ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
            optimiser.step()
            losses.append(loss.item())
        model.eval()
    assert losses[-1] < losses[0] - 0.5


def test_gradients_are_those_of_finite_differences():
    q, k, v = drawn(queries=5, keys=5, heads=2, groups=2, dim=4, batch=1)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    for block in (None, 2):
        assert torch.autograd.gradcheck(
            lambda q, k, v, b=block: softplus_attention(q, k, v, power=3.0, block=b), inputs
        )


def test_a_model_trained_with_softmax_is_refused():
    model = tiny.tiny_language_model()
    with pytest.raises(SubjectError, match="destroys models that were trained with softmax"):
        gratis.attach(model, gratis.SoftplusAttention())
    model.config.trained_attention = "softplus"
    gratis.attach(model, gratis.SoftplusAttention()).detach()


def test_biases_in_a_mask_are_refused():
    q, k, v = drawn()
    with pytest.raises(InputError, match="biases"):
        softplus_attention(q, k, v, torch.full((1, 1, 9, 9), -0.5), block=4)


@pytest.mark.parametrize(("architecture", "reason"), [("gpt_oss", "s_aux"), ("gemma2", "softcap"), ("doge", "biases")])
def test_models_that_change_their_logits_are_refused_before_they_run(architecture, reason):
    model = build(architecture)
    before = model.config._attn_implementation
    with pytest.raises(SubjectError, match=reason):
        gratis.attach(model, gratis.SoftplusAttention(trained=True))
    assert model.config._attn_implementation == before
