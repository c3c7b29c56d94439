"""Several language models of one vocabulary answer as one: the mean of their logits, token by token.

A. Bochkov, "Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate", 2025 (arXiv
2507.07129): z = sum_k w_k z_k with w on the simplex, so that the next token is drawn from the normalised geometric mean
of the experts' distributions. Its loss is never above the weighted mean of theirs.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Attachment, Scope
from gratis.contract.card import Card
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.language import language_model
from gratis.subjects.opening import open as open_subject
from gratis.subjects.opening import tokenizer_of

CACHED = "_gratis_mixture"
FOLLOWED = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
"""What generate does to a cache, and does to the experts' as well."""


class LogitMixture(Attachable):
    """The subject and further experts as one model, for scoring and for `generate` in all its ways.

    `model(...)` returns the mixture's logits (B, S, V) in float32, and its loss where labels are given; each expert keeps
    a cache of its own, which follows the subject's when beams are reordered or drafts are cut. Everything else in the
    output (hidden states, attentions) is the subject's. Any models that share a tokenizer can be mixed.
    """

    card = Card(
        title="Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate",
        authors="Bochkov",
        year=2025,
        seed=39,
        paper="arXiv 2507.07129",
        acts_on="language model",
        free_of=("training", "data", "router"),
        summary="specialist models of one tokenizer answer as one, by the mean of their logits",
        unchanged_when={"experts": ()},
        examples={},
        holds=("logits",),
        limits=(
            "One forward pass and one cache per expert. Where one expert is better everywhere, the mean dilutes it: "
            "what is guaranteed is a loss that is not above the weighted mean of the experts'."
        ),
    )

    experts: tuple[Any, ...] = param((), help="the other experts: models, or names for gratis.open")
    weights: tuple[float, ...] | None = param(
        None, help="one number per expert, the subject's first; they are made to sum to 1. None: all the same"
    )
    mode: Literal["logit", "prob"] = param(
        "logit", help="mean of logits (paper), or the logarithm of mean probabilities"
    )
    temperatures: tuple[float, ...] | None = param(
        None, help="what each expert's logits are divided by, the subject's first. None: 1"
    )

    def check_parameters(self) -> None:
        count = len(self.experts) + 1
        for name in ("weights", "temperatures"):
            given = getattr(self, name)
            if given is not None and len(given) != count:
                raise ParameterError(
                    f"LogitMixture: {name} must be {count} numbers, the subject's first, not {len(given)}."
                )
        if self.weights is not None and not (
            all(math.isfinite(w) and w >= 0 for w in self.weights) and sum(self.weights) > 0
        ):
            raise ParameterError("LogitMixture: weights must not be negative, and one must be above 0.")
        if self.temperatures is not None and not all(math.isfinite(t) and t > 0 for t in self.temperatures):
            raise ParameterError("LogitMixture: temperatures must be above 0.")

    def check(self, subject: Any) -> None:
        language_model(subject, "LogitMixture")
        for given in self.experts:
            expert = given.subject if isinstance(given, Attachment) else given
            if isinstance(expert, str) or expert is subject:
                continue
            language_model(expert, "An expert of LogitMixture")
            check_same_tokens(subject, expert)

    def install(self, subject: Any, scope: Scope) -> Any:
        if not self.experts:
            return lambda: {"experts": 1, "forward_passes": 0}
        experts = []
        for given in self.experts:
            expert = given.subject if isinstance(given, Attachment) else given
            if isinstance(expert, str):
                expert = open_subject(expert)
                self.replace(experts=(expert,), weights=None, temperatures=None).check(subject)
            experts.append(expert)
        inner = subject.forward
        mixture = _Mixture(self, subject, inner, experts)

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return mixture(*args, **kwargs)

        scope.set_attribute(subject, "forward", forward)
        return lambda: {"experts": len(experts) + 1, "forward_passes": mixture.passes}

    def shares(self) -> list[float]:
        """The weights, which sum to 1."""
        given = self.weights or (1.0,) * (len(self.experts) + 1)
        return [w / sum(given) for w in given]

    def mix(self, logits: list[Tensor]) -> Tensor:
        """(B, S, V) float32 logits of the mixture, from those of each expert."""
        heat = self.temperatures or (1.0,) * len(logits)
        total: Tensor | None = None
        for z, w, t in zip(logits, self.shares(), heat, strict=True):
            if w == 0:
                continue
            z = z.to(logits[0].device, torch.float32) / t
            if self.mode == "prob":
                part = z.log_softmax(-1) + math.log(w)
                total = part if total is None else torch.logaddexp(total, part)
            else:
                total = z * w if total is None else total.add(z, alpha=w)
        assert total is not None
        return total


class _Mixture:
    """Calls the experts, each with a cache that goes along with the subject's."""

    def __init__(self, method: LogitMixture, subject: Any, inner: Any, experts: list[Any]) -> None:
        self._method, self._subject, self._inner = method, subject, inner
        self._experts = [inner if expert is subject else expert for expert in experts]
        self._signature = inspect.signature(inner)
        self.passes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        if bound.get("input_ids") is None:
            raise InputError("LogitMixture reads tokens, which every expert embeds for itself: pass input_ids.")
        mask = bound.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise InputError(
                "LogitMixture passes on a padding mask of (batch, tokens) only: leave out cache_implementation and "
                "masks of other shapes."
            )
        labels, as_tuple = bound.pop("labels", None), bound.pop("return_dict", None) is False
        scale = {k: bound.pop(k) for k in ("num_items_in_batch",) if k in bound}
        caches = self._caches(bound.get("past_key_values"))
        own = self._inner(**bound, return_dict=True)
        logits, kept = [own.logits], []
        for expert, cache in zip(self._experts, caches, strict=True):
            out = expert(**self._arguments(expert, bound), past_key_values=cache, return_dict=True)
            logits.append(out.logits)
            kept.append(out.get("past_key_values"))
        self.passes += len(logits)
        own["logits"] = own.logits = self._method.mix(logits)
        if own.get("past_key_values") is not None:
            follow(own.past_key_values, kept)
        if labels is not None:
            size = own.logits.shape[-1]
            own["loss"] = self._subject.loss_function(logits=own.logits, labels=labels, vocab_size=size, **scale)
        return own.to_tuple() if as_tuple else own

    def _caches(self, cache: Any) -> list[Any]:
        """The experts' caches that belong to the subject's; None for each where nothing was read yet."""
        if cache is None or cache.get_seq_length() == 0:
            return [None] * len(self._experts)
        caches: list[Any] = getattr(cache, CACHED, [])
        if len(caches) != len(self._experts):
            raise InputError("This cache was not filled by the mixture: leave out past_key_values.")
        return caches

    def _arguments(self, expert: Any, bound: Mapping[str, Any]) -> dict[str, Any]:
        device = getattr(expert, "device", self._subject.device)
        named = ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep")
        given = {name: bound[name] for name in named if bound.get(name) is not None}
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def follow(cache: Any, caches: list[Any]) -> None:
    """Make `caches` be reordered, cut, repeated and copied as `cache` is."""
    if not hasattr(cache, CACHED):
        kind: Any = type(cache)
        cache.__class__ = followed(kind)
    setattr(cache, CACHED, caches)


@functools.cache
def followed(kind: type) -> type:
    """The class of caches `kind` with others that follow."""

    def following(name: str) -> Any:
        own = getattr(kind, name)

        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for other in getattr(self, CACHED):
                getattr(other, name)(*args, **kwargs)
            return own(self, *args, **kwargs)

        return call

    return type(kind.__name__, (kind,), {name: following(name) for name in FOLLOWED if hasattr(kind, name)})


def check_same_tokens(one: Any, other: Any) -> None:
    """Raise SubjectError where two models' tokenizers, or the widths of their logits, differ."""
    widths = [model.get_output_embeddings().weight.shape[0] for model in (one, other)]
    if widths[0] != widths[1]:
        raise SubjectError(f"LogitMixture needs logits of one width; the models have {widths[0]:,} and {widths[1]:,}.")
    if tokenizer_of(one) is tokenizer_of(other):
        return
    a, b = (tokenizer_of(model).get_vocab() for model in (one, other))
    if a == b:
        return
    first = {number: token for token, number in a.items()}
    second = {number: token for token, number in b.items()}
    different = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
    shown = ", ".join(f"{n} is {first.get(n)!r} and {second.get(n)!r}" for n in different[:3])
    raise SubjectError(
        f"LogitMixture needs models of one vocabulary, but {len(different):,} token ids differ between them: {shown}."
    )
