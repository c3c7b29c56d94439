"""Sample several tokens per forward pass from a model's own drafts, with the model's own distribution.

Y. Teng et al., "Accelerating auto-regressive text-to-image generation with training-free speculative Jacobi decoding",
ICLR 2025 (arXiv 2410.01699).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation import logits_process

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, ParameterError
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.branching import check_continues
from gratis.subjects.draft_reading import DraftReader, Reader, check_drops, take_guidance
from gratis.subjects.generate_door import Choice, check_generates, install_choice
from gratis.subjects.image_door import install_image_generation
from gratis.subjects.sampling_loop import Samples, refuse_internals, single_response, stops


class SJD(Decoding):
    """Draft a window of tokens, read it in one pass, keep the drafts that a test accepts, and draft anew from that pass.

    A draft x that was drawn from q is accepted with probability min(1, p(x) / q(x)); at the first one that is not, a
    token is drawn from max(0, p - q) instead. What is returned has the distribution of plain sampling under the same
    temperature, top-k, guidance and other processors; a call with `do_sample=False` returns the greedy response. Worth
    it where neighbours resemble each other, as image tokens do, and where a wide pass costs hardly more than a narrow
    one. Each prompt of a batch is decoded by itself, so that none waits for another's rejections.
    """

    card = Card(
        title="Accelerating auto-regressive text-to-image generation with training-free speculative Jacobi decoding",
        authors="Y. Teng et al.",
        year=2024,
        seed=21,
        paper="arXiv 2410.01699",
        acts_on="language model",
        free_of=("training", "a draft model", "calibration"),
        summary="fewer forward passes per sampled token, same distribution",
        unchanged_when={"window": 1},
        examples={"window": 6},
        holds=("generate", "kv cache"),
        why={"kv cache": "takes rejected tokens back out of the cache"},
        differs=(
            "Prompts of a batch are decoded one after another: committing the shortest run of a batch and testing the "
            "rest again, as the authors' code does, changes the distribution. The residual is not warped a second "
            "time. Random drafts may be tested against the uniform law that they were drawn from (random_law), which "
            "is exact as well and accepts more of them. Guidance acts on all tokens, as in transformers, unless "
            "`guided` says otherwise."
        ),
        limits=(
            "Passes get wider as they get fewer: where the processor is the limit, as on CPUs, seconds may not fall. "
            "Text gains little. Caches that cannot be cut back (preallocated, bounded, recurrent) are refused."
        ),
        claims=(
            Claim(
                name="tokens have the distribution of plain sampling (smallest p-value over places and pairs, corrected)",
                task="sampled-tokens",
                metric="p_value",
                at_least=0.01,
                parameters={"random_law": "uniform", "window": 4},
            ),
            Claim(
                name="on text too it takes fewer forward passes than tokens, though hardly: at most 0.95 per token",
                task="sampled-tokens",
                metric="passes_per_token",
                at_most=0.95,
                parameters={"random_law": "uniform", "window": 4},
            ),
            Claim(
                name="pictures written as tokens, with guidance, take at most three quarters of the passes",
                task="sampled-pictures",
                metric="passes_per_token",
                at_most=0.75,
                parameters={"random_law": "uniform"},
                task_parameters={"pictures": 60},
            ),
            Claim(
                name="their tokens have the distribution of plain guided sampling (smallest p-value, corrected)",
                task="sampled-pictures",
                metric="p_value",
                at_least=0.01,
                parameters={"random_law": "uniform"},
                task_parameters={"pictures": 60},
            ),
        ),
    )

    window: int = param(16, at_least=1, at_most=256, unit="tokens", help="tokens read per pass", search=(4, 8, 16, 32))
    first: int = param(1, at_least=1, unit="tokens", help="tokens of the response before windows begin")
    last: int | None = param(
        None, above=0, unit="tokens", help="tokens of the response where windows end; None: its end"
    )
    initial: Literal["random", "repeat_horizon", "sample_horizon", "repeat_vertical", "sample_vertical"] = param(
        "random", help="drafts of places not seen before: random, or the left or upper neighbour or its likeliest token"
    )
    random_law: Literal["one-hot", "uniform"] = param(
        "one-hot", help="the law that random drafts are tested against; both are exact, one-hot is the authors'"
    )
    image_tokens: tuple[int, ...] | None = param(
        None, help="ids that random drafts are drawn from; None: those that the last place allowed"
    )
    width: int | None = param(None, above=0, unit="tokens", help="of the image's rows, for neighbours")
    origin: int = param(0, at_least=0, unit="tokens", help="tokens of the response before the image's first one")
    accept: Literal["ratio", "match"] = param(
        "ratio", help="accept a draft by the ratio of probabilities, or where it equals a fresh sample (plain Jacobi)"
    )
    guided: Literal["all", "window"] = param(
        "all", help="tokens that the call's guidance_scale acts on: all, or from `first` to `last`"
    )
    text_top_k: int = param(
        0, at_least=0, unit="tokens", help="tokens drawn from outside of `first` to `last`, 0 for all"
    )
    temperature: float = param(1.0, above=0, help="of the draws, where the call does not say")
    top_p: float = param(1.0, above=0, at_most=1, help="probability mass drawn from, where the call does not say")
    top_k: int = param(0, at_least=0, unit="tokens", help="tokens drawn from, 0 for all, where the call does not say")

    def check_parameters(self) -> None:
        if self.initial != "random" and self.width is None:
            raise ParameterError(f"SJD: initial={self.initial!r} needs the length of the image's rows: set width.")
        if self.last is not None and self.last <= self.first:
            raise ParameterError(f"SJD: last {self.last} must be above first {self.first}.")
        if self.image_tokens is not None and (not self.image_tokens or min(self.image_tokens) < 0):
            raise ParameterError("SJD: image_tokens must be one or more token ids, 0 or above.")

    def check(self, subject: Any) -> None:
        check_generates(subject, "SJD")
        check_continues(subject, "SJD")
        check_drops(subject, "SJD")

    def install(self, subject: Any, scope: Scope) -> Any:
        if self.window == 1:
            return lambda: {"drafts_accepted": 0}
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        report = install_choice(
            subject,
            "SJD",
            scope,
            samples=1,
            sampling=sampling,
            loop=lambda seeds, greedy: JacobiLoop(self, seeds[0], greedy),
            choose=lambda samples: Choice([0], samples.details),
        )
        return install_image_generation(subject, "SJD", scope, sampling, partial(JacobiLoop, self), report)


@dataclass
class Drafts:
    """Tokens that may come next, and the law that each was drawn from."""

    tokens: Tensor
    """(count,)"""
    laws: Tensor
    """(count, vocabulary) probabilities, float32."""
    likeliest: Tensor
    """(count,) the likeliest token of the pass that each comes from."""

    def __getitem__(self, part: slice) -> Drafts:
        return Drafts(self.tokens[part], self.laws[part], self.likeliest[part])


def accepted(drafts: Tensor, laws: Tensor, probabilities: Tensor, uniforms: Tensor) -> int:
    """How many drafts (count,), from the first on, pass the test u < p(x) / q(x).

    laws q and probabilities p: (count, vocabulary); row i of p is the distribution given the drafts before i.
    """
    there = drafts[:, None]
    q = laws.gather(1, there)[:, 0]
    assert bool((q > 0).all()), "a draft has no probability under its own law"
    ratio = probabilities.gather(1, there)[:, 0] / q
    return int((uniforms < ratio).long().cumprod(0).sum())


def residual(probabilities: Tensor, law: Tensor) -> Tensor:
    """max(0, p - q) of one place, (vocabulary,): what a rejected draft is replaced from, not normalised."""
    return (probabilities - law).clamp_min(0)


@dataclass
class JacobiLoop:
    """A `custom_generate` for one prompt: windows of drafts, each read in one pass.

    With windows of one token it draws what Sampling draws under the same seed.
    """

    method: SJD
    seed: int
    greedy: bool
    runs: Counter[int] = field(default_factory=Counter)
    """How often a window committed so many tokens."""
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Samples:
        """Decode one response. The arguments are those that transformers hands to a decoding loop."""
        refuse_internals(generation_config, "SJD")
        guidance, others = take_guidance(logits_processor)
        reader = DraftReader(model, input_ids, generation_config, model_kwargs, guidance)
        start = input_ids.shape[1]
        kept = bool(generation_config.output_scores), bool(generation_config.output_logits)
        ids = self.decode(
            reader, input_ids, Warping(others), stopping_criteria, generation_config.max_length - start, streamer, kept
        )
        if streamer is not None:
            streamer.end()
        scores, logits = (tuple(rows) or None for rows in (self.scores, self.logits))
        return single_response(
            model,
            ids,
            start,
            stopping_criteria,
            generation_config,
            passes=reader.passes,
            details=self.details(reader),
            scores=scores,
            logits=logits,
            past_key_values=reader.cache,
        )

    def picture(self, reader: Reader, ids: Tensor, processors: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
        """The tokens (1, tokens) of a picture for models that draw it in a loop of their own."""
        whole = self.decode(reader, ids, Warping(processors), StoppingCriteriaList(), tokens)
        details = {"generated_tokens": tokens, "forward_passes": reader.passes, **self.details(reader)}
        return whole[:, ids.shape[1] :], details

    def details(self, reader: Reader) -> dict[str, Any]:
        """What happened, in plain values."""
        return {
            "drafts_accepted": sum((length - 1) * times for length, times in self.runs.items()),
            "tokens_per_pass": {length: self.runs[length] for length in sorted(self.runs)},
            "forward_tokens": reader.read_tokens,
        }

    @torch.no_grad()
    def decode(
        self, reader: Reader, ids: Tensor, warping: Warping, stopping_criteria: Any, room: int,
        streamer: Any = None, keep: tuple[bool, bool] = (False, False),
    ) -> Tensor:  # fmt: skip
        """Prompt and response (1, length). ids: (1, length) the prompt; `room`: the most tokens of a response."""
        method, start = self.method, ids.shape[1]
        generator = torch.Generator(device=ids.device).manual_seed(self.seed)
        drafts: Drafts | None = None
        peaks, last_law = ids.new_empty(0), torch.empty(0)
        while True:
            done = ids.shape[1] - start
            inside = method.first <= done and (method.last is None or done < method.last)
            guided = 1 if inside or method.guided == "all" else 0
            if drafts is None:
                logits = reader.prefill(guided).to(ids.device)
                drafts = Drafts(ids.new_empty(0), logits[:0].float(), ids.new_empty(0))
            else:
                width = min(method.window if inside else 1, room - done)
                if method.last is not None:
                    width = min(width, max(method.last - done, 1))
                drafts = self._filled(drafts[: width - 1], width - 1, ids[0, start:], peaks, last_law, generator)
                whole = torch.cat([ids, drafts.tokens[None]], dim=1)
                logits = reader.read(whole, width, guided * width).to(ids.device)
            scores = warping(ids, drafts.tokens, logits)
            if not inside and method.text_top_k:
                scores = logits_process.TopKLogitsWarper(method.text_top_k)(ids, scores)
            fresh, committed, probabilities = self._verified(drafts, scores, generator)
            self.runs[committed] += 1
            kept = _until_stop(ids, fresh[:committed], stopping_criteria)
            before = ids.shape[1]
            ids = torch.cat([ids, fresh[None, :kept]], dim=1)
            reader.drop(len(fresh) - kept)
            for wanted, rows, source in zip(keep, (self.scores, self.logits), (scores, logits), strict=True):
                if wanted:
                    rows += list(source[:kept].split(1))
            if streamer is not None:
                streamer.put(ids[0, before:].cpu())
            if kept < committed or stops(stopping_criteria, ids) or ids.shape[1] - start >= room:
                return ids
            likeliest = scores.argmax(-1)
            peaks = torch.cat([peaks, likeliest[:committed]])
            last_law = probabilities[-1]
            drafts = Drafts(fresh[committed:], probabilities[committed:], likeliest[committed:])

    def _verified(self, drafts: Drafts, scores: Tensor, generator: torch.Generator) -> tuple[Tensor, int, Tensor]:
        """Tokens (count + 1,) that the pass gives, how many of them are final, and its distributions.

        scores: (count + 1, vocabulary), row i what follows draft i - 1.
        """
        probabilities = scores.float().softmax(-1)
        if not bool(probabilities.isfinite().all()):
            raise InputError(
                "The model's logits are not finite, or every token was ruled out: load it in float32 or bfloat16, and "
                "look at the logits processors."
            )
        if self.greedy:
            fresh = scores.argmax(-1)
            return fresh, 1 + _matching(drafts.tokens, fresh), probabilities
        fresh = drawn(scores, generator)
        count = len(drafts.tokens)
        if self.method.accept == "match" or not count:
            return fresh, 1 + _matching(drafts.tokens, fresh), probabilities
        uniforms = torch.rand(count, generator=generator, device=scores.device)
        passed = accepted(drafts.tokens, drafts.laws, probabilities[:-1], uniforms)
        fresh[:passed] = drafts.tokens[:passed]
        if passed < count:
            rest = residual(probabilities[passed], drafts.laws[passed])
            # Where p and q are the same numbers nothing is left to draw from, and the draft stands.
            fresh[passed] = drawn(rest.log(), generator) if bool(rest.sum() > 0) else drafts.tokens[passed]
        return fresh, passed + 1, probabilities

    def _filled(
        self, drafts: Drafts, count: int, response: Tensor, peaks: Tensor, last_law: Tensor, generator: torch.Generator
    ) -> Drafts:
        """`count` drafts: those that there are, then initial ones. response: (done,) committed tokens."""
        missing = count - len(drafts.tokens)
        if missing <= 0:
            return drafts
        method, device = self.method, response.device
        vocabulary = drafts.laws.shape[-1]
        if method.image_tokens is not None:
            choices = torch.tensor(method.image_tokens, device=device)
        else:
            choices = last_law.nonzero()[:, 0]
        if int(choices.max()) >= vocabulary:
            raise InputError(f"SJD: image_tokens has the id {int(choices.max())}; this model has {vocabulary} tokens.")
        tokens = choices[torch.randint(len(choices), (missing,), generator=generator, device=device)]
        if method.random_law == "uniform":
            one = torch.zeros(vocabulary, device=device)
            one[choices] = 1.0 / len(choices)
            laws = one.repeat(missing, 1)
        else:
            laws = F.one_hot(tokens, vocabulary).float()
        if method.initial != "random":
            known = torch.cat(
                [response, drafts.tokens] if method.initial.startswith("repeat") else [peaks, drafts.likeliest]
            )
            copied, source = self._neighbours(len(known), missing, device)
            tokens = torch.where(copied, known[source], tokens)
            # A copy is no draw: whatever the law of random drafts, its own is the token alone.
            laws = torch.where(copied[:, None], F.one_hot(tokens, vocabulary).float(), laws)
        return Drafts(
            torch.cat([drafts.tokens, tokens]),
            torch.cat([drafts.laws, laws]),
            torch.cat([drafts.likeliest, tokens]),
        )

    def _neighbours(self, known: int, missing: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each of the `missing` places after `known` ones: whether it has a neighbour in the image, and where.

        A neighbour that is not known yet is replaced by the last place that is.
        """
        assert self.method.width is not None
        place = torch.arange(known, known + missing, device=device)
        inside = place - self.method.origin
        if self.method.initial.endswith("horizon"):
            there, source = (inside >= 0) & (inside % self.method.width != 0), place - 1
        else:
            there, source = inside >= self.method.width, place - self.method.width
        return there, source.clamp(0, known - 1)


class Warping:
    """The logits processors of a call, on all places of a window: those that look at the text see each place's own."""

    def __init__(self, processors: Any) -> None:
        for one in processors:
            if hasattr(one, "state") or any(isinstance(value, torch.nn.Module) for value in vars(one).values()):
                raise InputError(
                    f"SJD reads a window of tokens at once, and {type(one).__name__} keeps a state from token to token: "
                    "leave it out."
                )
        self._processors = list(processors)

    def __call__(self, ids: Tensor, drafts: Tensor, logits: Tensor) -> Tensor:
        """Scores (count + 1, vocabulary). ids: (1, length) what is final; drafts: (count,) read after it."""
        scores = logits
        for one in self._processors:
            if type(one) in _SAME_EVERYWHERE:
                scores = one(ids.expand(len(scores), -1), scores)
                continue
            whole = torch.cat([ids[0], drafts])
            rows = [one(whole[None, : ids.shape[1] + place], scores[place : place + 1]) for place in range(len(scores))]
            scores = torch.cat(rows)
        return scores


_SAME_EVERYWHERE = {
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.LogitNormalization,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
}
"""Processors that do not look at the text."""


def drawn(scores: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of softmax(scores) for each row (…, vocabulary), by the largest of scores and Gumbel noise."""
    noise = torch.empty_like(scores).exponential_(generator=generator)
    return (scores - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()).argmax(-1)


def _matching(drafts: Tensor, fresh: Tensor) -> int:
    return int((drafts == fresh[: len(drafts)]).long().cumprod(0).sum())


def _until_stop(ids: Tensor, committed: Tensor, stopping_criteria: Any) -> int:
    """How many of the committed tokens (count,) stand: up to the first at which the text ends."""
    for count in range(1, len(committed)):
        if stops(stopping_criteria, torch.cat([ids, committed[None, :count]], dim=1)):
            return count
    return len(committed)
