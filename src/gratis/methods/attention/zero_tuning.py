"""Sharpen or flatten attention by rescaling what the first token receives, head by head.

F. Han et al., "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training", 2025
(arXiv 2505.11739). For a row of attention probabilities a, `a'_0 = scale a_0 / Z`, `a'_j = a_j / Z` with
`Z = 1 + (scale - 1) a_0`. The same is `z_0 + ln scale` before the softmax, which a further dimension of queries and keys
carries through any fused kernel: `q' = [q, ln(scale) / s]`, `k'_j = [k_j, 1 if j is the first token else 0]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import SubjectError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.attention_door import Reached, check_attention, install_attention, takes_masks

LEAST_LOG = -60.0
"""Logit change that stands for a scale of 0; finite, so that the first row keeps the only token it has."""
ALIGNMENT = 8


class ZeroTuning(Attachable):
    """Change how much attention selected heads pay to the first token; all other tokens keep their proportions.

    A scale below 1 sharpens attention over the rest of the text, one above 1 flattens it. The best scale belongs to a
    task and its prompt format: `tune` finds one on a handful of prompts, with labels or without.
    """

    card = Card(
        title="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
        authors="Han et al.",
        year=2025,
        seed=79,
        paper="arXiv 2505.11739",
        acts_on="language model",
        free_of=("training", "gradients", "extra tokens", "labels (entropy objective)"),
        summary="attention sharpened or flattened per head by rescaling what the first token receives",
        holds=("attention to the first token",),
        unchanged_when={"scale": 1.0},
        examples={"scale": 3.0},
        differs=(
            "Column 0 is the first real token of each row, also in left-padded batches, where the released code takes a "
            "padding column; rows are renormalised by the kernel itself instead of after it."
        ),
        limits=(
            "Gains belong to one task format and come largely from answers that keep to it; refit per task. Not for "
            "models with learned sinks. Local layers do not see the first token and are left as they are."
        ),
        claims=(
            Claim(
                name="the language model itself barely moves: mean loss on plain text with the sink doubled",
                task="streaming-perplexity",
                metric="loss",
                compare="difference",
                at_most=0.05,
                parameters={"scale": 2.0},
                task_parameters={"tokens": 1536, "chunk": 256},
            ),
        ),
    )

    scale: float = param(
        1.5, at_least=0, at_most=1000, help="factor of the first token's attention; 0 removes it", search=(0.1, 6.0)
    )
    heads: tuple[int, ...] | None = param(None, at_least=0, help="query heads that are changed; None: all")
    layers: tuple[int, ...] | None = param(None, at_least=0, help="layers that are changed; None: all that see token 0")
    mode: Literal["logit", "key"] = param(
        "logit", help="add to the first token's logit, or multiply its key (another operator: it depends on the sign)"
    )

    def check(self, subject: Any) -> None:
        modules = sink_modules(subject, type(self).__name__)
        layers, heads = len(modules), _heads(modules)
        for name, given, count in (("layers", self.layers, layers), ("heads", self.heads, heads)):
            if given is not None and (not given or max(given) >= count):
                raise SubjectError(
                    f"ZeroTuning: {name} must be below {count}, the number of {name} of this {type(subject).__name__}."
                )
        if self.layers is not None and all(modules[layer].local for layer in self.layers):
            raise SubjectError("ZeroTuning: none of these layers sees the first token; they are local.")

    def install(self, subject: Any, scope: Scope) -> Any:
        modules = sink_modules(subject, type(self).__name__)
        chosen = range(len(modules)) if self.layers is None else self.layers
        changed = {id(modules[layer].module) for layer in chosen if not modules[layer].local}
        skipped = sum(modules[layer].local for layer in chosen)
        if self.scale != 1:
            install_attention(subject, self.name, self._attend(changed, _heads(modules), takes_masks(subject)), scope)
        return lambda: {"layers_changed": len(changed), "local_layers_skipped": skipped}

    def _attend(self, changed: set[int], heads: int, masks: bool) -> Callable[..., Any]:
        logs = torch.zeros(heads)
        logs[slice(None) if self.heads is None else list(self.heads)] = log_scale(self.scale)
        first = FirstToken()

        def attend(inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            if id(module) not in changed:
                return inner(module, query, key, value, mask, **kwargs)
            at = first.columns(mask, len(query))
            if self.mode == "key":
                return inner(module, query, self._scaled_keys(key, at), value, mask, **kwargs)
            own = logs[: query.shape[1]].to(query.device)
            if masks and query.shape[2] == 1:
                return inner(module, query, key, value, biased(mask, query, key, own, at), **kwargs)
            scaling = kwargs.pop("scaling", None) or query.shape[-1] ** -0.5
            longer = extended(query, key, value, own, at, scaling)
            output, weights = inner(module, *longer, mask, scaling=scaling, **kwargs)
            return output[..., : value.shape[-1]].contiguous(), weights

        return attend

    def _scaled_keys(self, key: Tensor, at: Tensor | None) -> Tensor:
        key = key.clone()
        if at is None:
            key[:, :, 0] *= self.scale
        else:
            key[torch.arange(len(key), device=key.device), :, at.to(key.device)] *= self.scale
        return key


def log_scale(scale: float) -> float:
    """What is added to the first token's logit."""
    return max(math.log(scale), LEAST_LOG) if scale > 0 else LEAST_LOG


def biased(mask: Tensor | None, query: Tensor, key: Tensor, logs: Tensor, at: Tensor | None) -> Tensor:
    """The mask of one query with `logs` (heads,) added at the first token: (batch, heads, 1, all), in query's dtype."""
    bias = query.new_zeros(len(query), len(logs), 1, key.shape[2])
    if at is None:
        bias[..., 0] = logs.to(query.dtype)[:, None]
    else:
        bias[torch.arange(len(query), device=query.device), :, 0, at.to(query.device)] = logs.to(query.dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(query.dtype).min)
    return bias + mask


def extended(
    query: Tensor, key: Tensor, value: Tensor, logs: Tensor, at: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with the further dimension, padded with zeros to one width, a multiple of eight.

    query: (batch, heads, length, head_dim); key and value: (batch, key heads, all, head_dim); logs: (heads,) added to
    the logit of the first token; at: (batch,) its column, None for column 0. Fused kernels want one width for all.
    """
    dim = query.shape[-1]
    width = -(-max(dim + 1, value.shape[-1]) // ALIGNMENT) * ALIGNMENT
    longer_query, longer_key, longer_value = (
        torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (query, key, value)
    )
    longer_query[..., dim] = (logs / scaling).to(query.dtype)[:, None]
    if at is None:
        longer_key[:, :, 0, dim] = 1
    else:
        longer_key[torch.arange(len(key), device=key.device), :, at.to(key.device), dim] = 1
    return longer_query, longer_key, longer_value


class FirstToken:
    """The column of the first real token in each row of a mask, found once per mask: all layers share one."""

    def __init__(self) -> None:
        self._mask: Any = None
        self._columns: Tensor | None = None

    def columns(self, mask: Any, batch: int) -> Tensor | None:
        """(batch,) columns, None where it is column 0 in all rows. mask: (batch or 1, 1, length, all) or None."""
        if mask is None or not isinstance(mask, Tensor):
            return None
        if mask is not self._mask:
            seen = mask[:, 0, -1] if mask.dim() == 4 else mask
            seen = seen if seen.dtype == torch.bool else (seen >= 0 if mask.dim() == 4 else seen > 0)
            found = seen.long().argmax(-1).expand(batch)
            self._mask, self._columns = mask, found if bool(found.any()) else None
        return self._columns


def sink_modules(subject: Any, method: str) -> list[Reached]:
    """What attends, in order. Raises SubjectError where no layer attends to the first token of a long text as a sink."""
    modules = check_attention(subject, method)
    if any(getattr(one.module, "sinks", None) is not None for one in modules):
        raise SubjectError(
            f"{method} rescales attention on the first token; this {type(subject).__name__} has learned sinks instead."
        )
    if any(getattr(one.module, "is_causal", True) is False for one in modules):
        raise SubjectError(
            f"{method} needs causal attention; this {type(subject).__name__} attends in both directions."
        )
    if all(one.local for one in modules):
        raise SubjectError(
            f"{method} needs layers that see the first token; all layers of this {type(subject).__name__} are local."
        )
    return modules


def _heads(modules: list[Reached]) -> int:
    """Query heads of a layer, the most that any has."""
    return max(one.heads for one in modules)


@dataclass(frozen=True)
class Tuning:
    """What `tune` found."""

    method: ZeroTuning
    baseline: float
    """The objective without the method: accuracy, or mean entropy in nats."""
    profile: dict[float, list[float]]
    """Probe scale to the objective with each head alone changed."""
    curve: dict[float, float]
    """Scale to the objective with the selected heads changed."""


def tune(
    model: Any,
    prompts: Tensor | Sequence[Sequence[int]],
    *,
    labels: Sequence[int] | None = None,
    answers: Sequence[int] | None = None,
    scales: Sequence[float] = (0.1, 0.3, 0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0),
    level: Literal[1, 2] = 2,
    probes: tuple[float, float] = (2.0, 0.5),
    fraction: float = 0.5,
    layers: tuple[int, ...] | None = None,
    batch: int = 16,
    progress: Callable[[float], None] = lambda share: None,
) -> Tuning:
    """Find heads and scale on calibration prompts.

    prompts: token ids, each ending where the answer begins. With `labels` (the index of the right one among `answers`,
    token ids) the accuracy of the likeliest answer is maximised; without, the mean entropy of the next token over the
    whole vocabulary is minimised. `level` 1 searches the scale for all heads; 2 first changes one head index at a time
    in all layers at the `probes`, keeps the direction (up or down) that helps more heads, and of these the `fraction`
    that helps most. Ties go to the scale closest to 1.

    Raises InputError for no prompts, labels without answers, or lists of unequal length.
    """
    from gratis.contract.errors import InputError

    rows = [torch.as_tensor(prompt, dtype=torch.long).reshape(-1) for prompt in prompts]
    if not rows or not all(len(row) for row in rows):
        raise InputError("Tuning needs at least one prompt, and none may be empty.")
    if (labels is None) != (answers is None) or (labels is not None and len(labels) != len(rows)):
        raise InputError("Give one label per prompt together with the answers' token ids, or neither.")
    if labels is None and len(rows) < 20:
        import warnings

        warnings.warn(f"The entropy of {len(rows)} prompts says little: use 20 or more.", stacklevel=2)
    sign = 1.0 if labels is not None else -1.0
    heads = _heads(sink_modules(model, "ZeroTuning"))
    total = 1 + len(scales) + (len(probes) * heads if level == 2 else 0)
    done = 0

    def objective(method: ZeroTuning | None) -> float:
        nonlocal done
        value = _objective(model, rows, labels, answers, method, batch)
        done += 1
        progress(done / total)
        return value

    baseline = objective(None)
    profile: dict[float, list[float]] = {}
    selected: tuple[int, ...] | None = None
    if level == 2:
        for probe in probes:
            profile[probe] = [objective(ZeroTuning(scale=probe, heads=(h,), layers=layers)) for h in range(heads)]
        selected = _dominant(profile, baseline, sign, fraction)
    curve = {}
    for scale in scales:
        curve[scale] = baseline if scale == 1 else objective(ZeroTuning(scale=scale, heads=selected, layers=layers))
    best = max(curve, key=lambda scale: (sign * curve[scale], -abs(math.log(scale)) if scale > 0 else -math.inf))
    return Tuning(ZeroTuning(scale=best, heads=selected, layers=layers), baseline, profile, curve)


def _dominant(profile: dict[float, list[float]], baseline: float, sign: float, fraction: float) -> tuple[int, ...]:
    """The heads of the direction that helps more of them, those that it helps most first; all where none is helped."""
    groups = []
    for values in profile.values():
        gains = [sign * (value - baseline) for value in values]
        helped = sorted((head for head, gain in enumerate(gains) if gain > 0), key=lambda head: -gains[head])
        groups.append((len(helped), sum(gains[head] for head in helped), helped))
    count, _, helped = max(groups, key=lambda group: group[:2])
    keep = max(1, round(fraction * count))
    return tuple(sorted(helped[:keep])) if count else tuple(range(len(next(iter(profile.values())))))


@torch.no_grad()
def _objective(
    model: Any,
    rows: list[Tensor],
    labels: Sequence[int] | None,
    answers: Sequence[int] | None,
    method: ZeroTuning | None,
    batch: int,
) -> float:
    from gratis.contract.attach import attach
    from gratis.subjects.token_statistics import entropy

    handle = attach(model, method) if method is not None else None
    values: list[float] = []
    try:
        for begin in range(0, len(rows), batch):
            group = rows[begin : begin + batch]
            longest = max(map(len, group))
            ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in group])
            mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in group]).long()
            out = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0).to(model.device), use_cache=False, logits_to_keep=1,
            )  # fmt: skip
            logits = out.logits[:, -1].float()
            if labels is None or answers is None:
                values += entropy(logits).tolist()
            else:
                picked = logits[:, list(answers)].argmax(-1).tolist()
                values += [float(a == b) for a, b in zip(picked, labels[begin : begin + batch], strict=True)]
    finally:
        if handle is not None:
            handle.detach()
    return sum(values) / len(values)
