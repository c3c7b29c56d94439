"""Sharpen or flatten attention by rescaling what the first token receives, head by head.

F. Han et al., "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training", 2025
(arXiv 2505.11739). For a row of attention probabilities a, `a'_0 = scale a_0 / Z`, `a'_j = a_j / Z` with
`Z = 1 + (scale - 1) a_0`. Three forms of the same reach any fused kernel: `z_0 + ln scale` before the softmax, as a bias;
a further dimension of queries and keys, `q' = [q, ln(scale) / s]`, `k'_j = [k_j, 1 if j is the first token else 0]`; and a
correction of the output by the kernel's log-sum-exp.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Scope, attach
from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, SubjectError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.attention_door import (
    Reached,
    add_to_first_token,
    check_attention,
    implementation_below,
    install_attention,
    takes_masks,
)
from gratis.subjects.first_token import FirstToken, layer_of
from gratis.subjects.language import text_config
from gratis.subjects.prompted_answers import Answers, AnswerScores, Prompts, answer_scores, token_rows

LEAST_LOG = -60.0
"""Logit change that stands for a scale of 0; finite, so that the first row keeps the only token it has."""
ALIGNMENT = 8
SCALES = (0.1, 0.3, 0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0)
FEW_SCALES = (0.3, 1.0, 2.0, 4.0)
"""What is tried at level 0."""
FEW_PROMPTS = 20
Objective = Literal["accuracy", "parsed accuracy", "entropy", "answer entropy"]


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
            "models with learned sinks. Local layers do not see the first token and are left as they are. On the embedded "
            "model labels found gains, and the entropy of unlabelled prompts did not: measure both on texts of yours."
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
            Claim(
                name="heads and scale that 100 labelled reviews chose get at least 5 points more of other reviews right",
                task="prompted-classification",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                parameters={"scale": 6.0, "heads": (0, 6)},
                task_parameters={"size": 80},
            ),
            Claim(
                name="heads and scale of least entropy on 100 unlabelled reviews lower it on others by at least 0.2 nats",
                task="prompted-classification",
                metric="entropy",
                compare="difference",
                at_most=-0.2,
                parameters={"scale": 0.1, "heads": (6, 7)},
                task_parameters={"size": 80},
            ),
            Claim(
                name="but on this model that gains no accuracy, and costs at most 8 points of it",
                task="prompted-classification",
                metric="accuracy",
                compare="difference",
                at_least=-0.08,
                parameters={"scale": 0.1, "heads": (6, 7)},
                task_parameters={"size": 80},
            ),
        ),
    )

    scale: float = param(
        1.5, at_least=0, at_most=1000, help="factor of the first token's attention; 0 removes it", search=(0.1, 6.0)
    )
    heads: tuple[int, ...] | None = param(
        None, at_least=0, help="query heads (in mode key: key heads) that are changed; None: all"
    )
    layers: tuple[int, ...] | None = param(None, at_least=0, help="layers that are changed; None: all that see token 0")
    mode: Literal["logit", "key"] = param(
        "logit", help="add to the first token's logit, or multiply its key (another operator: it depends on the sign)"
    )

    @property
    def holds(self) -> tuple[str, ...]:
        """In mode key also the first token's key, as the cache keeps it."""
        return (*self.card.holds, "key of the first token") if self.mode == "key" else self.card.holds

    def check(self, subject: Any) -> None:
        modules = sink_modules(subject, type(self).__name__)
        heads, layers = self._heads(modules), {layer_of(one.module, at) for at, one in enumerate(modules)}
        if self.mode == "logit" and not takes_masks(subject) and any("softcap" in one.arguments for one in modules):
            raise SubjectError(
                f"ZeroTuning comes after the soft cap of this {type(subject).__name__}'s logits: load it with attention "
                "'eager', or pass mode='key'."
            )
        if self.heads is not None and (not self.heads or max(self.heads) >= heads):
            kind = "key heads" if self.mode == "key" else "heads"
            raise SubjectError(
                f"ZeroTuning: heads must be below {heads}, the number of {kind} of this {type(subject).__name__}."
            )
        if self.layers is None:
            return
        if not self.layers or not layers.issuperset(self.layers):
            raise SubjectError(
                f"ZeroTuning: layers must be among those of this {type(subject).__name__} that attend: "
                f"{_in_words(layers)}."
            )
        if not self._changed(modules):
            raise SubjectError("ZeroTuning: none of these layers sees the first token; they are local.")

    def install(self, subject: Any, scope: Scope) -> Any:
        modules = sink_modules(subject, type(self).__name__)
        changed = self._changed(modules)
        if self.scale != 1:
            install_attention(subject, self.name, self._attend(subject, changed, self._heads(modules)), scope)
            if self.mode == "logit":
                # Methods that attend to keys of their own add it there.
                logs = self._of_heads(log_scale(self.scale), 0.0, self._heads(modules))
                for module in (one.module for one in modules if id(one.module) in changed):
                    add_to_first_token(module, logs, scope)
        skipped = [one for order, one in enumerate(modules) if one.local and self._selects(one, order)]
        report = {"layers_changed": len(changed), "local_layers_skipped": len(skipped)}
        others = int(getattr(text_config(subject), "num_hidden_layers", len(modules))) - len(modules)
        if others > 0:
            report["layers_without_attention"] = others
        return lambda: dict(report)

    def _heads(self, modules: list[Reached]) -> int:
        """Heads of a layer, the most that any has: query heads, or key heads where keys are changed."""
        return max(one.key_heads if self.mode == "key" else one.heads for one in modules)

    def _of_heads(self, changed: float, others: float, heads: int) -> Tensor:
        """(heads,) one value for the chosen heads, another for the rest."""
        values = torch.full((heads,), others)
        values[slice(None) if self.heads is None else list(self.heads)] = changed
        return values

    def _changed(self, modules: list[Reached]) -> set[int]:
        return {id(one.module) for order, one in enumerate(modules) if not one.local and self._selects(one, order)}

    def _selects(self, one: Reached, order: int) -> bool:
        return self.layers is None or layer_of(one.module, order) in self.layers

    def _attend(self, subject: Any, changed: set[int], heads: int) -> Callable[..., Any]:
        logs, factors = self._of_heads(log_scale(self.scale), 0.0, heads), self._of_heads(self.scale, 1.0, heads)
        masks, first = takes_masks(subject), FirstToken()

        def attend(inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            if id(module) not in changed:
                return inner(module, query, key, value, mask, **kwargs)
            at = first.columns(mask, len(query))
            if self.mode == "key":
                scaled = with_scaled_key(key, factors[: key.shape[1]], at)
                return inner(module, query, scaled, value, mask, **kwargs)
            own = logs[: query.shape[1]].to(query.device)
            if masks and (query.shape[2] == 1 or kwargs.get("softcap") is not None):
                return inner(module, query, key, value, biased(mask, query, key, own, at), **kwargs)
            scaling = kwargs.pop("scaling", None) or query.shape[-1] ** -0.5
            if returns_log_sum_exp(subject, query):
                output, sums = inner(module, query, key, value, mask, scaling=scaling, **kwargs)
                return corrected(output, sums, query, key, value, own, at, scaling), sums
            longer = extended(query, key, value, own, at, scaling)
            output, weights = inner(module, *longer, mask, scaling=scaling, **kwargs)
            return output[..., : value.shape[-1]].contiguous(), weights

        return attend

    def tune(
        self,
        model: Any,
        prompts: Prompts,
        *,
        labels: Sequence[int] | None = None,
        answers: Answers | None = None,
        parse: Callable[[str], int | None] | None = None,
        new_tokens: int = 8,
        objective: Objective | None = None,
        level: Literal[0, 1, 2] = 2,
        scales: Sequence[float] | None = None,
        probes: Sequence[float] = (2.0, 0.5),
        fraction: float = 0.5,
        batch: int = 16,
        progress: Callable[[float, str], None] = lambda share, words: None,
    ) -> Tuning:
        """Find heads and scale on calibration prompts, for this mode and among these heads and layers.

        prompts: texts or token ids, each ending where the answer begins. answers: per class the token that names it, or
        several; labels: the class of each prompt. What is sought, unless `objective` says otherwise: with labels the best
        accuracy of the likeliest answer, without them the least mean entropy of the next token over the whole vocabulary;
        "answer entropy" is that over the answers only, "parsed accuracy" that of what the model writes, its likeliest token
        or, with `parse`, `new_tokens` of text.

        level 0 tries a few scales for all heads; level 1 searches among `scales` for all heads; level 2 first changes one
        head index at a time, in all layers together, by the `probes` (one above 1, one below, or either), keeps the
        direction that helps more heads and of these the `fraction` with the greatest effect. Ties go to the scale closest
        to 1. What was attached before stays attached.

        Raises InputError for no prompts, labels without a way to tell answers, and values out of range.
        """
        rows = token_rows(model, prompts)
        objective = objective or (
            "entropy" if labels is None else "accuracy" if answers is not None else "parsed accuracy"
        )
        _check_calibration(rows, labels, answers, parse, objective, probes, fraction, level, scales)
        sign = -1.0 if "entropy" in objective else 1.0
        scales = scales if scales is not None else FEW_SCALES if level == 0 else SCALES
        candidates = self.heads or tuple(range(self._heads(sink_modules(model, type(self).__name__))))
        total = 1 + sum(scale != 1 for scale in scales) + (len(probes) * len(candidates) if level == 2 else 0)
        done = 0

        def scores(scale: float, heads: tuple[int, ...] | None) -> AnswerScores:
            nonlocal done
            with nullcontext() if scale == 1 else attach(model, self._with(scale, heads)):
                found = answer_scores(
                    model, rows, answers=answers, labels=labels, parse=parse, new_tokens=new_tokens, batch=batch
                )
            done += 1
            progress(done / total, f"{done} of {total} settings")
            return found

        def value(found: AnswerScores) -> float:
            return statistics.fmean(getattr(found, objective.replace(" ", "_")))

        plain = scores(1.0, None)
        profile: dict[float, list[float]] = {}
        groups: dict[str, tuple[int, ...]] = {}
        kept = self.heads
        if level == 2:
            for probe in probes:
                profile[probe] = [value(scores(probe, (head,))) for head in candidates]
            groups = head_groups(profile, value(plain), sign, candidates)
            kept = dominant(groups, fraction) or self.heads
        found = {scale: plain if scale == 1 else scores(scale, kept) for scale in scales}
        curve = {scale: value(each) for scale, each in found.items()}
        best = max(curve, key=lambda scale: (sign * curve[scale], -abs(math.log(scale)) if scale > 0 else -math.inf))
        means = {scale: each.means() for scale, each in found.items()}
        return Tuning(self._with(best, kept), objective, value(plain), profile, groups, curve, means, plain.means())

    def _with(self, scale: float, heads: tuple[int, ...] | None) -> ZeroTuning:
        return ZeroTuning(scale=scale, heads=heads, layers=self.layers, mode=self.mode)


def log_scale(scale: float) -> float:
    """What is added to the first token's logit."""
    return max(math.log(scale), LEAST_LOG) if scale > 0 else LEAST_LOG


def biased(mask: Tensor | None, query: Tensor, key: Tensor, logs: Tensor, at: Tensor | None) -> Tensor:
    """The mask of some queries with `logs` (heads,) added at the first token: (batch, heads, length or 1, all).

    mask: (batch or 1, 1, length, all) of floats or booleans, None for causal attention. The result has query's dtype.
    """
    bias = query.new_zeros(len(query), len(logs), 1, key.shape[2])
    if at is None:
        bias[..., 0] = logs.to(query.dtype)[:, None]
    else:
        bias[torch.arange(len(query), device=query.device), :, 0, at.to(query.device)] = logs.to(query.dtype)
    if mask is None and query.shape[2] > 1:
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])
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


def corrected(
    output: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logs: Tensor,
    at: Tensor | None,
    scaling: float,
) -> Tensor:
    """The output of plain attention, moved towards or away from the first token's value: (batch, length, heads, dim).

    `a_0 = exp(s q k_0 - sums)` with the kernel's log-sum-exp `sums` (batch, heads, length), then
    `o + w (v_0 - o)` for `w = (scale - 1) a_0 / (1 + (scale - 1) a_0)`. Other shapes as in `extended`.
    """
    rows = torch.arange(len(key), device=key.device)
    places = torch.zeros_like(rows) if at is None else at.to(key.device)
    groups = query.shape[1] // key.shape[1]
    first_key, first_value = (part[rows, :, places].repeat_interleave(groups, 1).float() for part in (key, value))
    share = (torch.einsum("bhld,bhd->bhl", query.float(), first_key) * scaling - sums.float()).exp()
    # Rows before the first token are padding: they do not see it, and what they hold is not read.
    grown = torch.expm1(logs.float())[:, None] * share.clamp_max(1.0)
    weight = (grown / (1 + grown).clamp_min(torch.finfo(torch.float32).tiny)).transpose(1, 2)[..., None]
    plain = output.float()
    return (plain + weight * (first_value[:, None] - plain)).to(output.dtype)


def returns_log_sum_exp(model: Any, query: Tensor) -> bool:
    """Whether the kernel below returns its log-sum-exp, in digits that are worth using."""
    flexible = implementation_below(model) == "flex_attention"
    return flexible and query.device.type != "cpu" and query.dtype != torch.bfloat16


def with_scaled_key(key: Tensor, factors: Tensor, at: Tensor | None) -> Tensor:
    """A copy of key (batch, key heads, all, head_dim) with the first token's multiplied by `factors` (key heads,)."""
    key, factors = key.clone(), factors.to(key)[:, None]
    if at is None:
        key[:, :, 0] *= factors
    else:
        key[torch.arange(len(key), device=key.device), :, at.to(key.device)] *= factors
    return key


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


def _in_words(numbers: Iterable[int]) -> str:
    every = sorted(numbers)
    if every == list(range(every[0], every[-1] + 1)):
        return f"{every[0]} to {every[-1]}"
    return ", ".join(map(str, every))


@dataclass(frozen=True)
class Tuning:
    """What `tune` found."""

    method: ZeroTuning
    objective: Objective
    baseline: float
    """The objective without the method: accuracy, or mean entropy in nats."""
    profile: dict[float, list[float]]
    """Probe scale to the objective with each head alone changed."""
    groups: dict[str, tuple[int, ...]]
    """Heads that are better "up", with a scale above 1, or "down", those with the greatest effect first."""
    curve: dict[float, float]
    """Scale to the objective with the selected heads changed."""
    scores: dict[float, dict[str, float]]
    """Scale to all that was measured: accuracies, the share of valid answers, entropies."""
    baseline_scores: dict[str, float]
    """The same without the method."""


def head_groups(
    profile: dict[float, list[float]], baseline: float, sign: float, heads: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Heads by the direction in which each helps, those with the greatest effect first.

    A head is up-effective if the objective is better with a scale above 1, down-effective if it is worse; what the probe
    above 1 leaves open the one below decides. The effect is how much better the objective is with the probe in the head's
    direction than with the other, and a head without one is in neither group.
    """
    none = [baseline] * len(heads)
    above = next((values for probe, values in profile.items() if probe > 1), none)
    below = next((values for probe, values in profile.items() if probe < 1), none)
    up: list[tuple[float, int]] = []
    down: list[tuple[float, int]] = []
    for head, with_more, with_less in zip(heads, above, below, strict=True):
        effect = sign * (with_more - with_less)
        if effect > 0 and sign * (with_more - baseline) >= 0:
            up.append((-effect, head))
        elif effect < 0:
            down.append((effect, head))
    return {"up": tuple(head for _, head in sorted(up)), "down": tuple(head for _, head in sorted(down))}


def dominant(groups: dict[str, tuple[int, ...]], fraction: float) -> tuple[int, ...]:
    """The `fraction` with the greatest effect, at least one, of the group with more heads; none where both are empty."""
    larger = max(groups.values(), key=len)
    return tuple(sorted(larger[: max(1, round(fraction * len(larger)))]))


def _check_calibration(
    rows: Sequence[Tensor],
    labels: Sequence[int] | None,
    answers: Answers | None,
    parse: Any,
    objective: str,
    probes: Sequence[float],
    fraction: float,
    level: int,
    scales: Sequence[float] | None,
) -> None:
    if labels is not None and len(labels) != len(rows):
        raise InputError(f"Give one label per prompt: there are {len(labels)} for {len(rows)}.")
    if labels is not None and answers is None and parse is None:
        raise InputError("Labels say nothing without answers: give the tokens that name each class, or parse.")
    if answers is not None and labels is not None and not all(0 <= label < len(answers) for label in labels):
        raise InputError(f"Labels are places among the {len(answers)} answers: between 0 and {len(answers) - 1}.")
    if answers is not None and (len(answers) < 1 or any(not isinstance(a, int) and not len(a) for a in answers)):
        raise InputError("Every answer needs a token that names it.")
    needs: Mapping[str, Mapping[str, Any]] = {
        "accuracy": {"labels": labels, "answers": answers}, "parsed accuracy": {"labels": labels},
        "entropy": {}, "answer entropy": {"answers": answers},
    }  # fmt: skip
    if objective not in needs:
        raise InputError(f"objective must be one of {', '.join(map(repr, needs))}, not {objective!r}.")
    missing = [name for name, given in needs[objective].items() if given is None]
    if missing:
        raise InputError(f"The objective {objective!r} needs {' and '.join(missing)}.")
    if level not in (0, 1, 2):
        raise InputError(f"level must be 0, 1 or 2, not {level}.")
    if scales is not None and not len(scales):
        raise InputError("scales must hold at least one scale.")
    sides = [probe > 1 for probe in probes]
    if level == 2 and (
        not probes or len(set(sides)) < len(sides) or not all(0 < p < math.inf and p != 1 for p in probes)
    ):
        raise InputError("probes must be one scale above 1, one between 0 and 1, or both.")
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be above 0 and at most 1, not {fraction}.")
    if "entropy" in objective and len(rows) < FEW_PROMPTS:
        warnings.warn(f"The entropy of {len(rows)} prompts says little: use {FEW_PROMPTS} or more.", stacklevel=3)
