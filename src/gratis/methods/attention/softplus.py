"""Attention without a softmax, whose loss stays flat far beyond the length that a model was trained with.

"Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models", 2025 (arXiv 2501.13428).
For a row that may attend to N keys, scores are cosines scaled by ln d · ln N; softplus makes them positive and a sum of
1 makes them weights (LSSA). Re-weighting then keeps what is above the average weight, `relu(N a - 1)`, sharpened by a
power (LSSAR).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, SubjectError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.attention_door import check_attention, holds_biases, install_attention, takes_masks
from gratis.subjects.language import text_config

MARK = "trained_attention"
"""Attribute of a configuration that names the attention its model was trained with."""
_CHANGES_LOGITS = ("s_aux", "softcap", "position_bias")


class SoftplusAttention(Attachable):
    """Attend by softplus and re-weighting, for models that were trained so: attach to train one, and to run it.

    A model trained with softmax is destroyed by it, so a model must say that it was trained this way: its configuration's
    `trained_attention` is "softplus", or `trained=True` says it for the configuration. For an ordinary model there is
    LogLengthScaling.
    """

    card = Card(
        title="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
        authors="Gao and Spratling",
        year=2025,
        seed=55,
        paper="arXiv 2501.13428",
        acts_on="language model",
        free_of=("fine-tuning for the longer length",),
        summary="a small model trained with it reads texts many times as long as those it was trained on",
        examples={"trained": True},
        holds=("attention", "attention to the first token", "scale of attention", "choice of keys"),
        differs=(
            "Powers are taken of weights relative to the largest of the row, as the plain power overflows float32 for "
            "peaked rows; a row without a weight above the average keeps its plain weights."
        ),
        limits=(
            "Not free of training: only for models trained with it from the start. No fused kernel: two to four times the "
            "time of softmax attention. Not for models with learned sinks or biases in the logits."
        ),
        claims=(
            Claim(
                name="reads 16 times its trained length with a loss at least 1.5 nats below that of the softmax model of its "
                "size",
                task="length-extrapolation",
                metric="lead",
                at_least=1.5,
                subject="zoo:help-softplus",
                task_parameters={"length": 2048},
            ),
            Claim(
                name="at 4 times its trained length the loss grows by at most 0.3 nats",
                task="length-extrapolation",
                metric="growth",
                at_most=0.3,
                subject="zoo:help-softplus",
                task_parameters={"length": 512},
            ),
            Claim(
                name="at its trained length it is no worse than the softmax model of its size (0.05 nats at most)",
                task="length-extrapolation",
                metric="lead",
                at_least=-0.05,
                subject="zoo:help-softplus",
                task_parameters={"length": 128},
            ),
        ),
    )

    reweight: bool = param(True, help="re-weight (LSSAR), or leave the normalised weights (LSSA)")
    power: float = param(15.0, at_least=1, at_most=32, help="how sharply what is above the average is kept")
    offset: float = param(1.0, at_least=0, at_most=2, help="what is subtracted, in average weights")
    free_rows: int = param(3, at_least=0, at_most=8, help="first rows without an offset")
    scale: float = param(1.0, at_least=0.1, at_most=10, help="factor of the logits' scale ln d · ln N")
    block: int | None = param(
        1024,
        at_least=1,
        unit="tokens",
        help="queries and keys at a time; None: all at once (memory grows with the square)",
    )
    trained: bool = param(False, help="say that this model was trained with softplus attention")

    def check(self, subject: Any) -> None:
        name = type(subject).__name__
        modules = check_attention(subject, type(self).__name__)
        if any(getattr(one.module, "is_causal", True) is False for one in modules):
            raise SubjectError(f"SoftplusAttention needs causal attention; this {name} attends in both directions.")
        changed = next((one for one in _CHANGES_LOGITS if any(one in each.arguments for each in modules)), None)
        if changed is not None:
            raise SubjectError(
                f"SoftplusAttention has no place for {changed}, which this {name} passes to its attention."
            )
        if any(one.biased for one in modules):
            raise SubjectError(
                f"SoftplusAttention takes cosines as scores, to which the biases in this {name}'s masks cannot be added."
            )
        if not takes_masks(subject):
            raise SubjectError("SoftplusAttention: load the model with attention 'sdpa' or 'eager'.")
        if not self.trained and getattr(text_config(subject), MARK, None) != "softplus":
            raise SubjectError(
                f"SoftplusAttention destroys models that were trained with softmax, and the configuration of this {name} "
                f"does not say otherwise ({MARK}): pass trained=True if it was trained with it."
            )

    def install(self, subject: Any, scope: Scope) -> Any:
        def attend(inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            changed = next((name for name in _CHANGES_LOGITS if kwargs.get(name) is not None), None)
            if changed is not None:
                raise InputError(f"SoftplusAttention has no place for {changed}, which {type(subject).__name__} uses.")
            output = softplus_attention(
                query, key, value, mask, power=self.power if self.reweight else None, offset=self.offset,
                free_rows=self.free_rows, scale=self.scale, block=self.block,
            )  # fmt: skip
            return output.transpose(1, 2).contiguous(), None

        install_attention(subject, self.name, attend, scope)


def softplus_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    power: float | None = 15.0,
    offset: float = 1.0,
    free_rows: int = 3,
    scale: float = 1.0,
    block: int | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """LSSAR attention, or LSSA where `power` is None: (batch, heads, queries, head_dim) in the dtype of `value`.

    query: (batch, heads, queries, head_dim) after rotary embedding; key, value: (batch, key heads, keys, head_dim);
    mask: (batch or 1, 1, queries, keys) of booleans, or floats that hide keys; None for causal attention whose last query
    is the last key's. Stages are computed in float32 (in float64 for float64). With `block`, so many queries are taken
    together, and for these so many keys, three times over: nothing of size queries times keys is kept, and what no query
    of a block attends to is not computed.

    Raises InputError for a mask that holds biases.
    """
    with torch.autocast(query.device.type, enabled=False):
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        queries, length = query.shape[2], key.shape[2]
        unit = torch.nn.functional.normalize(query.to(exact).unflatten(1, (key.shape[1], -1)), dim=-1)
        keys = torch.nn.functional.normalize(key.to(exact), dim=-1)[:, :, None]
        values = value.to(exact)[:, :, None]
        parts = []
        for begin in range(0, queries, block or queries):
            rows = slice(begin, min(begin + (block or queries), queries))
            last = length if mask is not None else length - queries + rows.stop
            seen = seen_keys(mask, rows, queries, length, query.device)[..., :last].to(exact)[:, :, None]
            # What a block of queries and keys takes in memory, fewer queries may spend on more keys.
            step = last if block is None else max(block, block * block // (rows.stop - begin))
            attended = seen.sum(-1, keepdim=True)
            scaled = unit[:, :, :, rows] * (scale * math.log(query.shape[-1]) * attended.clamp_min(1).log())
            offsets = torch.where(attended > free_rows, offset, 0.0).to(exact)
            parts.append(
                _of_rows(
                    scaled, keys[:, :, :, :last], values[:, :, :, :last], seen, attended, offsets, power, step, eps
                )
            )
        output = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
        return output.flatten(1, 2).to(value.dtype)


def seen_keys(mask: Tensor | None, rows: slice, queries: int, length: int, device: torch.device) -> Tensor:
    """(batch or 1, 1, rows, keys) which keys some of the queries may attend to. Raises InputError for biases in a mask."""
    if mask is None:
        places = torch.arange(length - queries + rows.start, length - queries + rows.stop, device=device)[:, None]
        return (places >= torch.arange(length, device=device))[None, None]
    mask = mask[:, :1, rows, :length]
    if mask.dtype == torch.bool:
        return mask
    if holds_biases(mask):
        raise InputError("Softplus attention takes cosines as scores, to which biases of a mask cannot be added.")
    return mask > torch.finfo(mask.dtype).min / 2


def _of_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    attended: Tensor,
    offsets: Tensor,
    power: float | None,
    step: int,
    eps: float,
) -> Tensor:
    """Both stages for some queries, `step` keys at a time.

    query: (batch, key heads, heads per key head, queries, head_dim) scaled; keys, values: (batch, key heads, 1, keys,
    head_dim); seen: (batch or 1, 1, 1, queries, keys) ones and zeros; attended, offsets: the same with one column.
    """

    def positive() -> Iterator[tuple[Tensor, slice]]:
        for at in range(0, keys.shape[3], step):
            here = slice(at, at + step)
            yield torch.nn.functional.softplus(query @ keys[:, :, :, here].transpose(3, 4)) * seen[..., here], here

    one = step >= keys.shape[3]
    first = _again(positive, one)
    total = _summed(first()) + eps
    weights = _again(lambda: ((part / total, here) for part, here in first()), one)
    if power is not None:
        weights = _again(_sharpened(weights, attended, offsets, seen, power), one)
    output: Tensor | None = None
    again: Tensor | None = None
    for weight, here in weights():
        found, share = weight @ values[:, :, :, here], weight.sum(-1, keepdim=True)
        output = found if output is None else output + found
        again = share if again is None else again + share
    assert output is not None
    assert again is not None
    return output if power is None else output / (again + eps)


Parts = Callable[[], Iterable[tuple[Tensor, slice]]]
"""Weights (batch, key heads, heads per key head, queries, some keys) and which keys, as often as asked for."""


def _again(parts: Parts, one: bool) -> Parts:
    """The same parts; where there is only one it is kept instead of computed again."""
    if not one:
        return parts
    kept = list(parts())
    return lambda: kept


def _summed(parts: Iterable[tuple[Tensor, slice]]) -> Tensor:
    return functools.reduce(torch.add, (part.sum(-1, keepdim=True) for part, _ in parts))


def _sharpened(weights: Parts, attended: Tensor, offsets: Tensor, seen: Tensor, power: float) -> Parts:
    """What of the weights is above the average, relative to the largest of the row, to a power."""
    largest = functools.reduce(
        torch.maximum,
        (
            (attended * part.detach() - offsets).masked_fill(seen[..., here] == 0, -torch.inf).amax(-1, keepdim=True)
            for part, here in weights()
        ),
    )
    flat = largest <= 0
    largest = largest.clamp_min(torch.finfo(largest.dtype).tiny)

    def parts() -> Iterator[tuple[Tensor, slice]]:
        for part, here in weights():
            above = torch.relu(attended * part - offsets) / largest
            yield torch.where(flat, part, above.pow(power)), here

    return parts
