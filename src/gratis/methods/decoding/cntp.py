"""Try several ways on where the model is unsure, up to the next punctuation mark, and keep the likeliest.

Y. Wang et al., "Cautious next token prediction", Findings of ACL 2025 (arXiv 2507.03038), algorithm 1.
"""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.branching import Text, check_continues
from gratis.subjects.generate_door import Choice, check_generates, install_choice, put
from gratis.subjects.opening import tokenizer_of
from gratis.subjects.sampling_loop import Samples, perturbed, refuse_internals, single_response


class CNTP(Decoding):
    """Sample as usual where the next token is clear; where it is not, sample several continuations and keep one.

    At a step whose distribution (after temperature, top-p and every other processor) has a high entropy, up to
    `max_trials` continuations are drawn, each to its first punctuation mark, and the one of lowest perplexity is kept.
    A call with `do_sample=False` takes the likeliest token at clear steps and still samples its trials. A streamer sees
    only what was kept.
    """

    card = Card(
        title="Cautious next token prediction",
        authors="Y. Wang et al.",
        year=2025,
        seed=58,
        paper="arXiv 2507.03038",
        acts_on="language model",
        free_of=("training", "labels", "a reward model", "a second model"),
        summary="several short continuations where the model is unsure, the likeliest kept",
        unchanged_when={"max_trials": 1},
        examples={
            "max_trials": 3, "temperature": 1.0, "top_p": 1.0, "stop_tokens": (3, 5, 7, 11, 13, 17, 19, 23),
            "max_trial_tokens": 4,
        },
        holds=("generate",),
        differs=(
            "Trials are decoded side by side on one cache instead of one after the other on copies, and the first "
            "distribution, which is known, is not computed again. Draws have a generator per trial, so that they do "
            "not depend on how trials are grouped."
        ),
        limits=(
            "Selection lowers diversity. Very small models find their repetitions least surprising. The marks are "
            "those of English text unless others are given."
        ),
        claims=(
            Claim(
                name="answers small sums about as well as plain sampling at that temperature: at most 0.1 worse",
                task="reasoning",
                metric="accuracy",
                compare="difference",
                at_least=-0.1,
                against="sampling",
                against_parameters={"temperature": 0.8},
                parameters={"temperature": 0.8},
            ),
        ),
    )  # fmt: skip

    min_entropy: float = param(0.01, at_least=0, unit="nats", help="entropy up to which one token is drawn as usual")
    max_entropy: float = param(1.5, above=0, unit="nats", help="entropy at which there are most trials")
    max_trials: int = param(10, at_least=1, help="most continuations tried at one step", search=(5, 10, 20))
    temperature: float = param(0.6, above=0, help="of the draws, where the call does not say; entropies see it")
    top_p: float = param(0.9, above=0, at_most=1, help="probability mass drawn from, where the call does not say")
    top_k: int = param(0, at_least=0, unit="tokens", help="tokens drawn from, 0 for all, where the call does not say")
    trial_rule: Literal["release", "paper"] = param(
        "release", help="trials by entropy: 1 + (most - 1) of the way, as in the authors' code, or most times the way"
    )
    punctuation: tuple[str, ...] = param(
        (".", ",", "\n", "?", "!", ":", ";", ")", "]", "}"), help="marks at which a trial ends"
    )
    match: Literal["token", "text"] = param(
        "token", help="a trial ends at a mark's own token, as in the authors' code, or at any token that ends with it"
    )
    stop_tokens: tuple[int, ...] | None = param(
        None, help="token ids at which a trial ends, in the place of marks; needs no tokenizer"
    )
    max_trial_tokens: int | None = param(None, above=0, unit="tokens", help="longest trial; None: no limit")
    together: int | None = param(
        None, above=0, help="trials decoded at once where they need copies of the cache; None: all"
    )

    def check_parameters(self) -> None:
        if not self.max_entropy > self.min_entropy:
            raise ParameterError(f"CNTP: max_entropy {self.max_entropy} must be above min_entropy {self.min_entropy}.")
        if self.stop_tokens is None and not any(self.punctuation):
            raise ParameterError("CNTP: punctuation is empty: name at least one mark, or set stop_tokens.")
        if self.stop_tokens is not None and (not self.stop_tokens or min(self.stop_tokens) < 0):
            raise ParameterError("CNTP: stop_tokens must be one or more token ids, 0 or above.")

    def check(self, subject: Any) -> None:
        check_generates(subject, "CNTP")
        check_continues(subject, "CNTP")
        if self.stop_tokens is None:
            self._marks(tokenizer_of(subject))

    def install(self, subject: Any, scope: Scope) -> Any:
        if self.max_trials == 1:
            return lambda: {"cautious_steps": 0}
        marks = self.stop_tokens if self.stop_tokens is not None else self._marks(tokenizer_of(subject))
        stops = torch.tensor(sorted(set(marks)), device=subject.device)
        return install_choice(
            subject,
            "CNTP",
            scope,
            samples=1,
            sampling={"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k},
            loop=lambda seeds, greedy: CautiousLoop(self, stops, seeds[0], greedy),
            choose=lambda samples: Choice([0], samples.details),
        )

    def trials(self, entropy: float) -> int:
        """How many continuations to draw at a step of this entropy (nats)."""
        share = (entropy - self.min_entropy) / (self.max_entropy - self.min_entropy)
        if self.trial_rule == "paper":
            return max(1, min(self.max_trials, math.floor(self.max_trials * max(share, 0.0))))
        return math.floor(1 + (self.max_trials - 1) * min(max(share, 0.0), 1.0))

    def _marks(self, tokenizer: Any) -> list[int]:
        """Token ids at which a trial ends. Raises SubjectError where the tokenizer has none of the marks."""
        if self.match == "text":
            texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
            found = [token for token, text in enumerate(texts) if text.endswith(tuple(filter(None, self.punctuation)))]
        else:
            encoded = [tokenizer.encode(mark, add_special_tokens=False) for mark in self.punctuation if mark]
            unknown = getattr(tokenizer, "unk_token_id", None)
            found = [tokens[0] for tokens in encoded if tokens and tokens[0] != unknown]
        if not found:
            raise SubjectError(
                "CNTP ends trials at punctuation, and this tokenizer has none of the marks: name others, or set "
                "stop_tokens."
            )
        return found


class CautiousLoop:
    """A `custom_generate` for one prompt: single tokens where the model is sure, the best of several trials elsewhere.

    Single tokens are drawn from `seed` as Sampling draws them; trial i of the cautious step j has a seed of its own.
    """

    def __init__(self, method: CNTP, stops: Tensor, seed: int, greedy: bool) -> None:
        self.method, self.stops, self.seed, self.greedy = method, stops, seed, greedy
        self.steps: list[dict[str, Any]] = []
        """What happened at each cautious step."""
        self.committed: Tensor | None = None
        """Prompt and response so far."""
        self._discarded = 0

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
        refuse_internals(generation_config, "CNTP")
        start = input_ids.shape[1]
        text = Text(model, input_ids, generation_config, model_kwargs)
        processors = _Processors(logits_processor)
        kept = _Kept(bool(generation_config.output_scores), bool(generation_config.output_logits))
        single = torch.Generator(device=input_ids.device).manual_seed(self.seed)
        while True:
            logits = text.read().to(input_ids.device)
            scores = processors(text.ids, logits)
            logs = scores.log_softmax(-1)
            entropy = _entropy(logs)
            if math.isnan(entropy):
                raise InputError(_NOT_FINITE)
            trials = self.method.trials(entropy)
            before = text.ids.shape[1]
            if trials == 1:
                drawn = scores.argmax(-1) if self.greedy else perturbed(scores, [single]).argmax(-1)
                _checked(logs, drawn)
                kept.add(scores, logits)
                text.append(drawn)
            else:
                processors = self._cautious(text, trials, entropy, logits, scores, processors, stopping_criteria, kept)
            self.committed = text.ids
            if streamer is not None:
                put(streamer, text.ids[0, before:].cpu(), "" if trials == 1 else f"{trials} trials")
            if bool(stopping_criteria(text.ids, None).all()):
                break
        if streamer is not None:
            streamer.end()
        return self._samples(model, text, start, stopping_criteria, generation_config, kept)

    def _cautious(
        self, text: Text, trials: int, entropy: float, logits: Tensor, scores: Tensor, processors: _Processors,
        stopping_criteria: Any, kept: _Kept,
    ) -> _Processors:  # fmt: skip
        """Draw the trials, keep the one of lowest perplexity, and return the processors as they were at its end."""
        generators = [
            torch.Generator(device=scores.device).manual_seed(_seed(self.seed, len(self.steps), trial))
            for trial in range(trials)
        ]
        first = perturbed(scores.expand(trials, -1), generators).argmax(-1)
        logs: list[list[float]] = [
            [value] for value in _checked(scores.log_softmax(-1).expand(trials, -1), first).tolist()
        ]
        copies = processors.copies(trials)
        seen = [kept.branch() for _ in range(trials)]
        for one in seen:
            one.add(scores, logits)
        limit = self.method.max_trial_tokens
        start = text.ids.shape[1]

        def draw(branches: list[int], ids: Tensor, logits: Tensor) -> Tensor:
            scores = processors.each([copies[branch] for branch in branches], ids, logits)
            tokens = perturbed(scores, [generators[branch] for branch in branches]).argmax(-1)
            values = _checked(scores.log_softmax(-1), tokens).tolist()
            for row, (branch, value) in enumerate(zip(branches, values, strict=True)):
                logs[branch].append(value)
                seen[branch].add(scores[row : row + 1], logits[row : row + 1])
            return tokens

        def done(ids: Tensor) -> Tensor:
            ended = torch.isin(ids[:, -1], self.stops.to(ids.device)) | stopping_criteria(ids, None)
            return ended if limit is None or ids.shape[1] - start < limit else torch.ones_like(ended)

        def mean(branch: int) -> float:
            return math.fsum(logs[branch]) / len(logs[branch])

        chosen, tokens = text.branch(first, draw, done, mean, self.method.together)
        kept.extend(seen[chosen])
        lengths = [len(one) for one in tokens]
        self._discarded += sum(lengths) - lengths[chosen]
        self.steps.append(
            {
                "at": start,
                "entropy": entropy,
                "trials": trials,
                "chosen": chosen,
                "perplexities": [math.exp(-mean(branch)) for branch in range(trials)],
                "lengths": lengths,
            }
        )
        return processors if copies[chosen] is None else copies[chosen]

    def _samples(
        self, model: Any, text: Text, start: int, stopping_criteria: Any, generation_config: Any, kept: _Kept
    ) -> Samples:
        if generation_config.return_dict_in_generate:
            text.catch_up()
        lengths = [step["lengths"][step["chosen"]] for step in self.steps]
        places = [
            [step["at"] - start, step["at"] - start + length, f"{step['trials']} trials"]
            for step, length in zip(self.steps, lengths, strict=True)
        ]
        return single_response(
            model,
            text.ids,
            start,
            stopping_criteria,
            generation_config,
            passes=text.passes,
            discarded=self._discarded,
            details={
                "cautious_steps": len(self.steps),
                "cautious_tokens": sum(lengths),
                "forward_tokens": text.read_tokens,
                "steps": self.steps,
                "places": places,
            },
            scores=kept.scores,
            logits=kept.logits,
            past_key_values=text.cache,
        )


_NOT_FINITE = (
    "The model's logits are not finite, or every token was ruled out: load it in float32 or bfloat16, and look at the "
    "logits processors."
)


class _Processors:
    """The logits processors of a call; those that keep a state are copied for each trial."""

    def __init__(self, processors: Any) -> None:
        for one in processors:
            if any(isinstance(value, torch.nn.Module) for value in vars(one).values()):
                raise InputError(
                    f"CNTP copies logits processors for its trials, and {type(one).__name__} holds a model: leave out "
                    "guidance_scale or that processor."
                )
        self.list = processors
        self.keeps_state = any(
            not type(one).__module__.startswith("transformers.") or hasattr(one, "state") for one in processors
        )

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        scores: Tensor = self.list(ids, logits)
        return scores

    def copies(self, count: int) -> list[Any]:
        """One set per trial where a processor may keep a state, else None for each."""
        return [_Processors(copy.deepcopy(self.list)) if self.keeps_state else None for _ in range(count)]

    def each(self, copies: list[Any], ids: Tensor, logits: Tensor) -> Tensor:
        """Scores (trials, vocabulary) of each trial by its own copies."""
        if not self.keeps_state:
            return self(ids, logits)
        return torch.cat([own(ids[row : row + 1], logits[row : row + 1]) for row, own in enumerate(copies)])


class _Kept:
    """Scores and logits of every token of the response, where the call asked for them."""

    def __init__(self, scores: bool, logits: bool) -> None:
        self.scores: tuple[Tensor, ...] | None = () if scores else None
        self.logits: tuple[Tensor, ...] | None = () if logits else None

    def add(self, scores: Tensor, logits: Tensor) -> None:
        """Remember (1, vocabulary) each."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def branch(self) -> _Kept:
        """An empty one that remembers the same things."""
        return _Kept(self.scores is not None, self.logits is not None)

    def extend(self, other: _Kept) -> None:
        """Add what another remembered."""
        for scores in other.scores or ():
            self.scores = (*(self.scores or ()), scores)
        for logits in other.logits or ():
            self.logits = (*(self.logits or ()), logits)


def _entropy(logs: Tensor) -> float:
    """Entropy in nats of log-probabilities (1, vocabulary), tokens that were cut off counting nothing."""
    p = logs.exp()
    return -float((p * (p + 1e-10).log()).sum())


def _checked(logs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (rows,) of drawn tokens. Raises InputError where one could not have been drawn."""
    values = logs.gather(-1, tokens[:, None])[:, 0]
    if not bool(values.isfinite().all()):
        raise InputError(_NOT_FINITE)
    return values


def _seed(seed: int, step: int, trial: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {trial}".encode()).digest()[:8]) % 2**63
