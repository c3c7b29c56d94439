"""Several language models of one vocabulary answer as one: the mean of their logits, token by token.

A. Bochkov, "Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate", 2025 (arXiv
2507.07129): z = sum_k w_k z_k with w on the simplex, so that the next token is drawn from the normalised geometric mean
of the experts' distributions. Its loss is never above the weighted mean of theirs.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Attachment, Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.cache_followers import follow, followers
from gratis.subjects.call_arguments import by_name
from gratis.subjects.language import language_model, window_of
from gratis.subjects.opening import open as open_subject
from gratis.subjects.opening import tokenizer_of
from gratis.subjects.same_tokens import differences


class LogitMixture(Attachable):
    """The subject and further experts as one model, for scoring and for `generate` in all its ways.

    `model(...)` returns the mixture's logits (B, S, V) in float32, and its loss where labels are given; each expert keeps
    a cache of its own, which follows the subject's when beams are reordered or drafts are cut. Everything else in the
    output (hidden states, attentions) is the subject's. Any models that share a tokenizer can be mixed; an expert given
    by name uses the subject's table of embeddings where its own is the same.

    `fitted` finds the weights from a short text. With `early`, experts are asked in the order of their weights, and those
    that can no longer matter are left out; they read what they missed when they are asked again.
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
        differs=(
            "Logits are averaged in float32 whatever the models' dtype. Mean probabilities, temperatures, weights from a "
            "text and early exit are this project's additions."
        ),
        limits=(
            "One forward pass and one cache per expert. Where one expert is better everywhere, the mean dilutes it: "
            "what is guaranteed is a loss that is not above the weighted mean of the experts'."
        ),
        claims=(
            Claim(
                name="a specialist of code and one of prose read both better together than the better one alone",
                task="two-texts",
                metric="both",
                compare="difference",
                parameters={"experts": ("zoo:glyphs-prose",)},
                against="logit-mixture",
                against_parameters={"experts": ("zoo:glyphs-prose",), "weights": (0.0, 1.0)},
                at_most=-0.15,
            ),
            Claim(
                name="on code the mixture stays close to the specialist of code",
                task="two-texts",
                metric="code",
                compare="difference",
                parameters={"experts": ("zoo:glyphs-prose",)},
                at_most=0.3,
            ),
            Claim(
                name="on prose the mixture stays close to the specialist of prose",
                task="two-texts",
                metric="prose",
                compare="difference",
                parameters={"experts": ("zoo:glyphs-prose",)},
                against="logit-mixture",
                against_parameters={"experts": ("zoo:glyphs-prose",), "weights": (0.0, 1.0)},
                at_most=0.3,
            ),
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
    early: Literal["never", "close", "decided"] = param(
        "never",
        help="when further experts are left out: where they move less probability than `tolerance`, or where they cannot "
        "change the likeliest token",
    )
    tolerance: float = param(0.01, at_least=0, at_most=1, help="most probability that experts left out may move")
    veto: float | None = param(
        None,
        above=0,
        unit="nats",
        help="an expert's logits are cut off so far below its largest; leaving out experts of a mean of logits needs it",
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
        if self.early != "never" and self.mode == "logit" and self.veto is None:
            raise ParameterError(
                "LogitMixture: one expert can rule out any token in a mean of logits, so that none may be left out: set "
                "veto, the nats by which an expert may do so, or mode='prob'."
            )

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
        experts, shared = self._opened(subject)
        inner = subject.forward
        mixture = _Mixture(self, subject, inner, experts)

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return mixture(*args, **kwargs)

        scope.set_attribute(subject, "forward", forward)
        return lambda: {
            "experts": len(experts) + 1,
            "forward_passes": mixture.passes,
            "left_out": mixture.left_out,
            "largest_error": mixture.error,
            "shared_bytes": shared,
        }

    def _opened(self, subject: Any) -> tuple[list[Any], int]:
        """The other experts, and the bytes that those opened here do not hold because the subject does."""
        experts, shared = [], 0
        for given in self.experts:
            expert = given.subject if isinstance(given, Attachment) else given
            if isinstance(expert, str):
                expert = open_subject(expert)
                LogitMixture(experts=(expert,)).check(subject)
                own, theirs = subject.get_input_embeddings(), expert.get_input_embeddings()
                if own.weight.dtype == theirs.weight.dtype and torch.equal(
                    own.weight, theirs.weight.to(own.weight.device)
                ):
                    expert.to(own.weight.device)
                    theirs.weight = own.weight
                    shared += own.weight.numel() * own.weight.element_size()
            experts.append(expert)
        return experts, shared

    def shares(self) -> list[float]:
        """The weights, which sum to 1."""
        given = self.weights or (1.0,) * (len(self.experts) + 1)
        return [w / sum(given) for w in given]

    def part(self, number: int, logits: Tensor) -> Tensor:
        """What expert `number` adds to the mixture: w z, or log(w p), of (B, S, V) logits; float32."""
        z = logits.to(torch.float32)
        if self.temperatures is not None:
            z = z / self.temperatures[number]
        if self.veto is not None:
            z = torch.maximum(z, z.amax(-1, keepdim=True) - self.veto)
        share = self.shares()[number]
        return z.log_softmax(-1) + math.log(share) if self.mode == "prob" else z * share

    def joined(self, total: Tensor, part: Tensor) -> Tensor:
        """The mixture of the experts in `total` and one more; `total` is overwritten."""
        return torch.logaddexp(total, part) if self.mode == "prob" else total.add_(part)

    def error(self, total: Tensor, rest: float) -> float:
        """How far the mixture can be from `total` (B, S, V) where experts of weight `rest` are still to be asked.

        Most probability that they can move (total variation) at any place; for `early="decided"` 0 where they cannot
        change any place's likeliest token, else 1.

        Mean probabilities move by `rest` at most. In a mean of logits the ratio of two tokens changes by
        D = rest * veto nats at most, so that they move tanh(D / 4), and not more than what the likeliest token a leaves
        to others: S / (1 + S), S = exp(D) sum_{v != a} exp(z_v - z_a).
        """
        reach = rest if self.mode == "prob" else rest * (self.veto or math.inf)
        if self.early == "decided":
            first, second = (total.exp() if self.mode == "prob" else total).topk(2, dim=-1).values.unbind(-1)
            return 0.0 if bool((first - second > reach).all()) else 1.0
        if self.mode == "prob":
            return rest
        others = (total.logsumexp(-1) - total.amax(-1)).expm1() * math.exp(reach)
        return min(math.tanh(reach / 4), float((others / (1 + others)).amax()))

    def fitted(self, subject: Any, text: str | Tensor) -> LogitMixture:
        """The same mixture with the weights that read `text` (or token ids (tokens,)) best: its least mean loss.

        The loss is convex in the weights in both modes. Weights of mean probabilities are found by expectation
        maximisation, w_k <- mean_t w_k p_k(x_t) / sum_j w_j p_j(x_t); those of mean logits by multiplicative steps along
        the gradient E_p[z_k] - z_k(x_t). Both end when no change of weights can gain 1e-5 nats per token, which holds
        the logits of all experts over the text in memory for mean logits. Raises InputError for fewer than 2 tokens.
        """
        self.check(subject)
        if not self.experts:
            return self
        ids = (
            torch.as_tensor(tokenizer_of(subject)(text, verbose=False).input_ids)
            if isinstance(text, str)
            else text.flatten()
        )
        if len(ids) < 2:
            raise InputError("Weights are found from a text of at least 2 tokens.")
        models = [subject, *self._opened(subject)[0]]
        windows = [window for model in models if (window := window_of(model)) is not None]
        pieces = ids.split(min(windows)) if windows else (ids,)
        pieces = tuple(piece for piece in pieces if len(piece) > 1)
        even = self.replace(weights=None)
        scores = torch.stack([even._read(number, model, pieces) for number, model in enumerate(models)])
        targets = torch.cat([piece[1:] for piece in pieces]).to(scores.device)
        own = scores.gather(-1, targets.expand(len(models), -1)[..., None])[..., 0]
        weights = best_of_probabilities(own) if self.mode == "prob" else best_of_logits(scores, own)
        return self.replace(weights=tuple(weights.tolist()))

    @torch.no_grad()
    def _read(self, number: int, model: Any, pieces: Sequence[Tensor]) -> Tensor:
        """An expert's logits, or log-probabilities in mode `prob`, for every token of the pieces: (tokens, V)."""
        share = self.shares()[number]
        rows = [
            self.part(number, model(input_ids=piece[None].to(model.device), use_cache=False).logits[0, :-1])
            for piece in pieces
        ]
        found = torch.cat(rows).cpu()
        return found - math.log(share) if self.mode == "prob" else found / share


CERTAIN = 1e-5
"""Nats per token that another choice of weights could gain at most, when the search for them ends."""


def best_of_probabilities(own: Tensor, rounds: int = 2000) -> Tensor:
    """Weights (experts,) by expectation maximisation. own: (experts, tokens) log-probabilities of what came."""
    own = own.double()
    weights = torch.full((len(own),), 1 / len(own), dtype=torch.float64)
    for _ in range(rounds):
        joint = own + weights.log()[:, None]
        ratios = (own - joint.logsumexp(0)).exp().mean(1)
        # The largest ratio tells what is left to gain: the loss is convex, and this is its gradient.
        if float(ratios.max()) - 1 <= CERTAIN:
            break
        weights = weights * ratios
    return weights / weights.sum()


def best_of_logits(scores: Tensor, own: Tensor, rounds: int = 500) -> Tensor:
    """Weights (experts,) by exponentiated gradient steps. scores: (experts, tokens, V); own: (experts, tokens)."""
    weights, step = torch.full((len(scores),), 1 / len(scores), dtype=torch.float64), 1.0

    def at(w: Tensor) -> tuple[float, Tensor]:
        mean = torch.einsum("k,ktv->tv", w.float(), scores)
        loss = (mean.logsumexp(-1) - torch.einsum("k,kt->t", w.float(), own)).double().mean()
        expected = torch.einsum("tv,ktv->kt", mean.softmax(-1), scores)
        return float(loss), (expected - own).double().mean(1)

    loss, gradient = at(weights)
    for _ in range(rounds):
        if float(weights @ gradient - gradient.min()) <= CERTAIN:
            break
        while True:
            moved = weights * (-step * (gradient - gradient.min())).exp()
            moved = moved / moved.sum()
            there, slope = at(moved)
            if there <= loss or step < 1e-6:
                break
            step /= 2
        weights, loss, gradient, step = moved, there, slope, step * 1.5
    return weights


class _Mixture:
    """Calls the experts, each with a cache that goes along with the subject's."""

    def __init__(self, method: LogitMixture, subject: Any, inner: Any, experts: list[Any]) -> None:
        self._method, self._subject, self._inner = method, subject, inner
        self._experts = [inner if expert is subject else expert for expert in experts]
        self._signature = inspect.signature(inner)
        shares = method.shares()
        asked = [number for number in range(1, len(shares)) if shares[number] > 0]
        self._order = sorted(asked, key=lambda number: -shares[number])
        self.passes = 0
        self.left_out = 0
        self.error = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = by_name(self._signature, args, kwargs)
        if bound.get("input_ids") is None:
            raise InputError("LogitMixture reads tokens, which every expert embeds for itself: pass input_ids.")
        mask = bound.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise InputError(
                "LogitMixture passes on a padding mask of (batch, tokens) only: leave out cache_implementation and "
                "masks of other shapes."
            )
        if isinstance(bound.get("logits_to_keep"), Tensor):
            raise InputError("LogitMixture keeps the last logits or all: pass logits_to_keep as a number.")
        labels, as_tuple = bound.pop("labels", None), bound.pop("return_dict", None) is False
        scale = {k: bound.pop(k) for k in ("num_items_in_batch",) if k in bound}
        readers = self._readers(bound.get("past_key_values"))
        own = self._inner(**bound, return_dict=True)
        self.passes += 1
        own["logits"] = own.logits = self._mixed(own.logits, readers, bound)
        if own.get("past_key_values") is not None:
            follow(own.past_key_values, readers)
        if labels is not None:
            size = own.logits.shape[-1]
            own["loss"] = self._subject.loss_function(logits=own.logits, labels=labels, vocab_size=size, **scale)
        return own.to_tuple() if as_tuple else own

    def _mixed(self, logits: Tensor, readers: list[_Reader], bound: Mapping[str, Any]) -> Tensor:
        """The mixture's logits, from the subject's and those of the experts that are asked, largest weights first."""
        method, shares, device = self._method, self._method.shares(), logits.device
        rest = 1 - shares[0]
        total = method.part(0, logits) if shares[0] > 0 else None
        for place, number in enumerate(self._order):
            if total is not None and method.early != "never":
                error = method.error(total, rest)
                if error <= (method.tolerance if method.early == "close" else 0):
                    self.error = max(self.error, error)
                    self.left_out += len(self._order) - place
                    for missing in self._order[place:]:
                        readers[missing - 1].put_off(bound)
                    return total - math.log(1 - rest) if method.mode == "prob" else total
            part = method.part(number, readers[number - 1].read(self._experts[number - 1], bound, device))
            self.passes += 1
            rest -= shares[number]
            total = part if total is None else method.joined(total, part)
        assert total is not None
        return total

    def _readers(self, cache: Any) -> list[_Reader]:
        """What the experts have read of the text in the subject's cache."""
        if cache is None or cache.get_seq_length() == 0:
            return [_Reader() for _ in self._experts]
        readers: list[_Reader] = followers(cache)
        if len(readers) != len(self._experts):
            raise InputError("This cache was not filled by the mixture: leave out past_key_values.")
        return readers


@dataclass
class _Reader:
    """An expert's cache, and the tokens that it has still to read because it was left out."""

    cache: Any = None
    unread: Tensor | None = None
    """(B, tokens)"""
    positions: Tensor | None = None
    """(B, tokens) of those, where the caller said them."""

    def read(self, expert: Any, bound: Mapping[str, Any], device: Any) -> Tensor:
        """The expert's logits for the tokens of a call, after what it has still to read; on `device`."""
        named = ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep")
        given = {name: bound[name] for name in named if bound.get(name) is not None}
        length = given["input_ids"].shape[1]
        if self.unread is not None:
            waiting = self.unread.shape[1]
            given["input_ids"] = torch.cat([self.unread, given["input_ids"]], dim=1)
            before, now = self.positions, given.get("position_ids")
            if now is not None:
                if before is None:
                    before = now[:, :1] + torch.arange(-waiting, 0, device=now.device)
                given["position_ids"] = torch.cat([before, now.expand(len(before), -1)], dim=1)
        place = getattr(expert, "device", device)
        given = {name: value.to(place) if isinstance(value, Tensor) else value for name, value in given.items()}
        out = expert(**given, past_key_values=self.cache, return_dict=True)
        self.cache, self.unread, self.positions = out.get("past_key_values"), None, None
        return out.logits[:, -length:].to(device)  # type: ignore[no-any-return]

    def put_off(self, bound: Mapping[str, Any]) -> None:
        """Remember the tokens of a call, to be read later."""
        ids, now = bound["input_ids"], bound.get("position_ids")
        if self.unread is None:
            self.positions = None if now is None else now.expand(len(ids), -1)
        elif self.positions is not None:
            # Without positions of their own, tokens are taken to follow one another.
            self.positions = None if now is None else torch.cat([self.positions, now.expand(len(ids), -1)], dim=1)
        self.unread = ids if self.unread is None else torch.cat([self.unread, ids], dim=1)

    def crop(self, count: int) -> None:
        """As transformers' caches: the last -`count` tokens go, or the first `count` stay where it is positive."""
        read = self.cache.get_seq_length() if self.cache is not None else 0
        waiting = self.unread.shape[1] if self.unread is not None else 0
        kept = count if count > 0 else read + waiting + count
        if self.cache is not None:
            self.cache.crop(min(kept - read, 0))
        self._each(lambda rows: rows[:, : max(kept - read, 0)] if kept > read else None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of beams."""
        if self.cache is not None:
            self.cache.reorder_cache(beam_idx)
        self._each(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.cache is not None:
            self.cache.batch_repeat_interleave(repeats)
        self._each(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows only."""
        if self.cache is not None:
            self.cache.batch_select_indices(indices)
        self._each(lambda rows: rows[indices])

    def reset(self) -> None:
        """Nothing is read."""
        self.cache = self.unread = self.positions = None

    def _each(self, change: Callable[[Tensor], Tensor | None]) -> None:
        self.unread, self.positions = (None if rows is None else change(rows) for rows in (self.unread, self.positions))


def check_same_tokens(one: Any, other: Any) -> None:
    """Raise SubjectError where two models' tokenizers, or the widths of their logits, differ."""
    widths = [model.get_output_embeddings().weight.shape[0] for model in (one, other)]
    if widths[0] != widths[1]:
        raise SubjectError(f"LogitMixture needs logits of one width; the models have {widths[0]:,} and {widths[1]:,}.")
    if tokenizer_of(one) is tokenizer_of(other):
        return
    found = differences(*(tokenizer_of(model).get_vocab() for model in (one, other)))
    if found:
        raise SubjectError(f"LogitMixture needs models of one vocabulary, but {found}.")
