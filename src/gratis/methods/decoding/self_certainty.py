"""Draw N responses and return the one whose token distributions are furthest from uniform.

Z. Kang, X. Zhao and D. Song, "Scalable best-of-N selection for large language models via self-certainty", 2025
(arXiv 2502.18581). The score of a response of n tokens is the mean over its tokens of KL(U ‖ p), eq. 8, taken from the
raw logits while the response is generated; answers are voted on with votes weighted by rank, eq. 12.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.answers import AnswerName, borda, extract, ranking, response_answers
from gratis.subjects.chat import Answer, Chat, ChatError, Format, Reply, read_answer, zero_shot
from gratis.subjects.chat.formats import format_of
from gratis.subjects.generate_door import Choice, check_generates, install_choice
from gratis.subjects.opening import tokenizer_of
from gratis.subjects.sampling_loop import Recorder, Samples, can_repeat
from gratis.subjects.token_statistics import repeated_share, self_certainty, self_certainty_bound

UNANSWERED = -1e9
"""Score of a response without an answer, where answers are looked for."""


class SelfCertainty(Decoding):
    """Return the best of N sampled responses by the model's own certainty, or the answer that a weighted vote picks.

    Scores rank responses of one model to one prompt; they are no probabilities, and no measure across prompts or
    models. `select="borda"` needs an `answer` to vote on. A response with an empty vote keeps its rank.

    On a `gratis.Chat` over an endpoint that tells the largest log-probabilities, the score is a lower bound of the
    published one: what the unseen tokens share is taken as shared equally. The bound needs the size of the model's
    vocabulary, and it is the looser, the fewer log-probabilities are told.
    """

    card = Card(
        title="Scalable best-of-N selection for large language models via self-certainty",
        authors="Z. Kang, X. Zhao and D. Song",
        year=2025,
        seed=80,
        paper="arXiv 2502.18581",
        acts_on="language model",
        free_of=("training", "labels", "a reward model", "a second model"),
        summary="the response, of several drawn, that the model itself is most certain of",
        unchanged_when={"samples": 1},
        examples={"samples": 3, "temperature": 1.0},
        holds=("generate", "answers"),
        differs=(
            "Scores are taken during generation instead of by a second pass, and so at the paper's positions (the "
            "distribution that drew each token); `score(…, positions='release')` gives those of the authors' code, one "
            "token later. Answers are compared as normalised strings; algebraic equivalence is not decided."
        ),
        limits=(
            "Confidently wrong or looping text scores high (`max_repetition` ranks loops last). It costs N times the "
            "generated tokens. Below a model's ability the highest score is no better than a random pick, and prefers "
            "longer responses; a vote still helps there, weighted or not."
        ),
        claims=(
            Claim(
                name="votes weighted by rank beat a random pick of the same eight responses to small sums (mean score)",
                task="sample-choice",
                metric="gain",
                at_least=0.05,
                parameters={"samples": 8, "select": "borda", "answer": "number"},
                task_parameters={"size": 12},
            ),
            Claim(
                name="that vote is about as good as a plain majority of as many responses: at most 0.1 worse",
                task="sample-choice",
                metric="first_accuracy",
                compare="difference",
                at_least=-0.1,
                against="majority-vote",
                against_parameters={"samples": 8},
                parameters={"samples": 8, "select": "borda", "answer": "number"},
                task_parameters={"size": 12},
            ),
            Claim(
                name="the highest score alone picks about as a random pick does there: at most 0.15 worse",
                task="sample-choice",
                metric="gain",
                at_least=-0.15,
                parameters={"samples": 8, "answer": "number"},
                task_parameters={"size": 12},
            ),
            Claim(
                name="it prefers longer responses there, but moderately (rank correlation of place with length)",
                task="sample-choice",
                metric="length_correlation",
                at_most=0.6,
                parameters={"samples": 8, "answer": "number"},
                task_parameters={"size": 12},
            ),
            Claim(
                name="scores taken while generating are those of a second, teacher-forced pass (largest difference)",
                task="sample-choice",
                metric="rescored_difference",
                at_most=0.001,
                parameters={"samples": 8, "answer": "number"},
                task_parameters={"size": 12},
            ),
        ),
    )

    samples: int = param(4, at_least=1, help="responses drawn per prompt", search=(4, 8, 16))
    select: Literal["best", "borda"] = param(
        "best", help="take the response with the highest score, or vote on answers with votes weighted by rank"
    )
    power: float = param(
        0.5,
        at_least=0,
        help="exponent of a rank's votes: 0 is majority, large best score",
        search=(0.3, 0.5, 1.2),
    )
    answer: AnswerName = param("none", help="where a response's answer is; one without an answer is never preferred")
    temperature: float = param(0.6, above=0, help="of the draws, where the call does not say; scores ignore it")
    top_p: float = param(0.9, above=0, at_most=1, help="probability mass drawn from, where the call does not say")
    top_k: int = param(0, at_least=0, unit="tokens", help="tokens drawn from, 0 for all, where the call does not say")
    vocabulary: Literal["logits", "tokenizer"] = param(
        "logits", help="average over all logits, as the authors do, or leave out rows beyond the tokenizer's tokens"
    )
    max_repetition: float | None = param(
        None, above=0, at_most=1, help="rank last what has a larger share of repeated runs of four tokens; None: do not"
    )

    top_logprobs: int = param(20, at_least=1, help="largest log-probabilities that an endpoint is asked for, per token")
    endpoint_vocabulary: int | None = param(
        None, above=1, unit="tokens", help="size of an endpoint's vocabulary, which the bound on its score needs"
    )

    def check_parameters(self) -> None:
        if not math.isfinite(self.power):
            raise ParameterError(f"SelfCertainty: power must be finite, not {self.power}.")
        if self.select == "borda" and self.answer == "none":
            raise ParameterError(
                "SelfCertainty: a vote needs an answer to vote on: set answer to 'number', 'choice' or another."
            )

    def check(self, subject: Any) -> None:
        if isinstance(subject, Chat):
            self._check_chat(subject)
            return
        check_generates(subject, "SelfCertainty")
        if self.answer not in {"none", "response"} or self.vocabulary == "tokenizer":
            tokenizer_of(subject)

    def _check_chat(self, chat: Chat) -> None:
        if not getattr(chat.backend, "tells_log_probabilities", False):
            raise SubjectError(
                "SelfCertainty needs an endpoint that tells log-probabilities of what it writes; this chat does not: "
                "attach it to the model itself, where it is exact."
            )
        if self.endpoint_vocabulary is None or self.endpoint_vocabulary < self.top_logprobs:
            raise SubjectError(
                "SelfCertainty bounds the score of an endpoint by the size of its vocabulary: set endpoint_vocabulary, "
                "at least top_logprobs."
            )

    def install(self, subject: Any, scope: Scope) -> Any:
        if self.samples == 1:
            return lambda: {"samples": 0}
        if isinstance(subject, Chat):
            run = _Answers(self, subject)
            scope.set_attribute(subject, "answer_many", run.answer_many)
            return run.report
        width = len(tokenizer_of(subject)) if self.vocabulary == "tokenizer" else None
        return install_choice(
            subject,
            "SelfCertainty",
            scope,
            samples=self.samples,
            sampling={"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k},
            recorder=lambda: Recorder(lambda logits: self_certainty(logits[:, :width])),
            choose=lambda samples: self._choose(subject, samples),
        )

    def _choose(self, model: Any, samples: Samples) -> Choice:
        responses = samples.responses
        scores = samples.means()
        answers = response_answers(model, responses, self.answer)
        return self._decide(scores, answers, responses)

    def _decide(self, scores: list[float], answers: list[str | None], responses: list[list[Any]]) -> Choice:
        """The order of responses by their scores and answers. responses: their tokens, for the check on loops."""
        ranked = list(scores)
        if self.max_repetition is not None:
            for index, response in enumerate(responses):
                if repeated_share(response) > self.max_repetition:
                    ranked[index] += UNANSWERED
        details: dict[str, Any] = {"self_certainty": scores}
        if self.answer != "none":
            details["answers"] = answers
        if self.select == "borda":
            vote = borda(ranked, answers, self.power)
            return Choice(vote.ranking, {**details, "votes": list(vote.totals)})
        if self.answer not in {"none", "code"}:
            ranked = [UNANSWERED if answer is None else score for score, answer in zip(ranked, answers, strict=True)]
        return Choice(ranking(ranked), details)


def bound(reply: Reply, vocabulary: int) -> tuple[float, float]:
    """A lower bound on the self-certainty of a reply, and the share of its tokens at which the bound says nothing.

    Those are tokens whose told probabilities sum to one, so that the rest was set to a floor. Raises ChatError where the
    endpoint told no log-probabilities.
    """
    told = [entry.get("top_logprobs") for entry in reply.logprobs or ()]
    if not told or not all(told):
        raise ChatError(
            "The endpoint told no log-probabilities of its tokens, which SelfCertainty ranks by: use a server that does, "
            "or MajorityVote's plain vote by power=0 elsewhere."
        )
    totals, floored = 0.0, 0
    for entries in told:
        top = torch.tensor([float(entry["logprob"]) for entry in entries], dtype=torch.float64)
        # A token that was drawn from beyond the largest may be told as well; minus infinity says nothing.
        value, flag = self_certainty_bound(top[top.isfinite() & (top > -9000)], vocabulary)
        totals += float(value)
        floored += bool(flag)
    return totals / len(told), floored / len(told)


class _Answers:
    """Questions put to an endpoint several times each."""

    def __init__(self, method: SelfCertainty, chat: Chat) -> None:
        self._method, self._chat = method, chat
        self._totals = {"questions": 0, "samples": 0, "failed": 0, "generated_tokens": 0}
        self._last: dict[str, list[Any]] = {}

    def report(self) -> dict[str, Any]:
        return {**self._totals, **self._last}

    def answer_many(
        self, questions: Sequence[Any], kind: str | Format = "text", *, max_tokens: int = 800
    ) -> list[Answer]:
        """The answer of the reply that is chosen, for each question. Raises ChatError where none can be chosen."""
        method, form = self._method, format_of(kind)
        items = [form.item(question) for question in questions]
        requests = [
            replace(
                zero_shot(form, item, max_tokens, self._chat.seed), sample_index=sample + 1, choices=(),
                temperature=method.temperature, top_p=method.top_p, logprobs=method.top_logprobs,
                tags={"method": "self-certainty", "role": "answer"},
            )
            for item in items
            for sample in range(method.samples)
        ]  # fmt: skip
        replies = self._chat(requests)
        details: dict[str, list[Any]] = {}
        answers = []
        for place, item in enumerate(items):
            own = replies[place * method.samples : (place + 1) * method.samples]
            kept = [reply for reply in own if reply.error is None]
            self._totals["questions"] += 1
            self._totals["samples"] += len(kept)
            self._totals["failed"] += len(own) - len(kept)
            self._totals["generated_tokens"] += sum(reply.usage.output for reply in kept)
            if not kept:
                raise ChatError(f"The chat did not answer: {(own[0].error or '').rstrip('.')}.")
            assert method.endpoint_vocabulary is not None
            bounds = [bound(reply, method.endpoint_vocabulary) for reply in kept]
            found = [self._found(reply.text) for reply in kept]
            tokens = [[entry.get("token") for entry in reply.logprobs or ()] for reply in kept]
            choice = method._decide([value for value, _ in bounds], found, tokens)
            seen = {"bound": [value for value, _ in bounds], "floored": [share for _, share in bounds],
                    "ranking": list(choice.ranking), "truncated": [r.finish_reason == "length" for r in kept],
                    **{name: value for name, value in choice.details.items() if name != "self_certainty"}}  # fmt: skip
            for name, value in seen.items():
                details.setdefault(name, []).append(value)
            answer = read_answer(form, item, kept[choice.ranking[0]])
            answer.attempts = len(own)
            answers.append(answer)
        self._last = details
        return answers

    def _found(self, text: str) -> str | None:
        name = self._method.answer
        return None if name == "none" else text if name == "response" else extract(name, text)


def score(
    model: Any,
    prompt: Sequence[int] | Tensor,
    responses: Sequence[Sequence[int] | Tensor],
    *,
    positions: Literal["paper", "release"] = "paper",
    vocabulary: int | None = None,
    generator: Any = None,
    cross_model: bool = False,
    batch: int = 8,
    chunk: int = 256,
) -> list[float]:
    """Self-certainty of recorded responses, by one teacher-forced pass over each.

    prompt: token ids exactly as the model read them, chat template included; responses: token ids, the end-of-sequence
    token included where it was generated. `positions="paper"` takes the distribution that each token was drawn from,
    `"release"` the one after it, as the authors' code does. `vocabulary` leaves out logits beyond that many tokens.
    `generator` is the model that wrote the responses; another than `model` is refused unless `cross_model`. `batch`
    responses are read at a time, `chunk` positions of logits are held at a time.

    An empty response scores minus infinity, with a warning. Raises InputError for an empty prompt, for logits that are
    not finite, and for a foreign generator.
    """
    if generator is not None and generator is not model and not cross_model:
        raise InputError(
            "These responses were written by another model, whose certainty is what the score measures: score them "
            "with that model, or pass cross_model=True."
        )
    if positions not in ("paper", "release"):
        raise ParameterError(f"positions must be 'paper' or 'release', not {positions!r}.")
    context = torch.as_tensor(prompt, device=model.device).reshape(1, -1)
    if context.shape[1] == 0:
        raise InputError("The prompt is empty: give at least the token that generation began with.")
    texts = [torch.as_tensor(response, device=model.device).reshape(-1) for response in responses]
    scores = [-math.inf] * len(texts)
    filled = [index for index, text in enumerate(texts) if len(text)]
    if len(filled) < len(texts):
        warnings.warn("An empty response has no self-certainty; it scores minus infinity.", stacklevel=2)
    begin = _encode(model, context, positions)
    if not begin.repeats:
        batch = 1
    filled.sort(key=lambda index: len(texts[index]))
    for start in range(0, len(filled), batch):
        group = filled[start : start + batch]
        values = _forced(model, begin, [texts[index] for index in group], vocabulary, chunk)
        for index, value in zip(group, values, strict=True):
            scores[index] = value
    if any(not math.isfinite(scores[index]) for index in filled):
        raise InputError(
            "The model's logits are not finite for a response: load the model in float32 or bfloat16, or pass the "
            "tokenizer's size as vocabulary."
        )
    return scores


class _Begin:
    """A prompt that was read once: the cache of what comes before the scored positions, and what is fed first."""

    def __init__(self, cache: Any, start: Tensor, extra: dict[str, Any], again: Callable[[], Any]) -> None:
        self.start, self.extra, self._cache, self._again = start, extra, cache, again
        self.repeats = can_repeat(cache) if cache is not None else True

    def cache(self, rows: int) -> Any:
        """A cache for `rows` responses, of its own."""
        if self._cache is None:
            return None
        if not self.repeats:
            return self._again()
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache


@torch.no_grad()
def _encode(model: Any, context: Tensor, positions: str) -> _Begin:
    extra: dict[str, Any] = {}
    if model.config.is_encoder_decoder:
        extra["encoder_outputs"] = model.get_encoder()(input_ids=context)
        context = context.new_tensor([[model.generation_config.decoder_start_token_id]])
    head, start = (context[:, :-1], context[:, -1:]) if positions == "paper" else (context, context[:, :0])

    def read() -> Any:
        if head.shape[1] == 0:
            return None
        return _forward(model, head, None, extra, last=True).past_key_values

    return _Begin(read(), start, extra, read)


@torch.no_grad()
def _forced(model: Any, begin: _Begin, texts: list[Tensor], vocabulary: int | None, chunk: int) -> list[float]:
    """Mean self-certainty of each text after the same prompt; padding comes last, where no text sees it."""
    longest = max(len(text) for text in texts)
    fed = torch.stack([_filled(torch.cat([begin.start[0], text])[:longest], longest) for text in texts])
    extra = {
        name: type(value)(last_hidden_state=value.last_hidden_state.repeat_interleave(len(texts), 0))
        for name, value in begin.extra.items()
    }
    cache = begin.cache(len(texts))
    totals = torch.zeros(len(texts), dtype=torch.float64)
    lengths = torch.tensor([len(text) for text in texts])
    for at in range(0, longest, chunk):
        out = _forward(model, fed[:, at : at + chunk], cache, extra)
        cache = out.past_key_values
        values = self_certainty(out.logits[..., :vocabulary]).double().cpu()
        inside = torch.arange(at, at + values.shape[1])[None, :] < lengths[:, None]
        totals += values.where(inside, 0.0).sum(1)
    return (totals / lengths).tolist()


def _filled(tokens: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, length - len(tokens)))


def _forward(model: Any, tokens: Tensor, cache: Any, extra: dict[str, Any], last: bool = False) -> Any:
    name = "decoder_input_ids" if extra else "input_ids"
    if last and model._supports_logits_to_keep():
        extra = {**extra, "logits_to_keep": 1}
    return model(**{name: tokens}, past_key_values=cache, use_cache=True, return_dict=True, **extra)
