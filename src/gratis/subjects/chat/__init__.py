"""One object for every text-in, text-out method: an endpoint, a local model or a function that chats.

Requests are answered in order, with bounded concurrency and retries, never paid for twice, counted, and can be
replayed offline. A request that fails gives a reply that says why.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from gratis.contract.errors import ParameterError, SubjectError
from gratis.subjects.chat.formats import FORMATS, Format, format_of
from gratis.subjects.chat.messages import BudgetError, ChatError, Reply, Request, Usage, as_request, block
from gratis.subjects.chat.store import Replay, ResponseCache, Transcript
from gratis.subjects.chat.structured import chosen, mismatch, parse_json

__all__ = [
    "FORMATS",
    "Answer",
    "Budget",
    "BudgetError",
    "Chat",
    "ChatError",
    "Format",
    "Prices",
    "Reply",
    "Request",
    "Usage",
    "block",
]  # fmt: skip

CacheMode = Literal["on", "read", "write", "refresh", "off"]
Continues = Literal["prefill", "completions"]
"""How an endpoint goes on from the beginning of an answer: see `Chat`."""


@dataclass(frozen=True)
class Budget:
    """What a chat may spend in all; checked before a request is sent, with max_tokens as the worst case."""

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value >= 0:
                raise ParameterError(f"Budget: {name} must be at least 0, not {value}.")


@dataclass(frozen=True)
class Prices:
    """Price per million tokens."""

    input: float
    output: float
    cached_input: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value >= 0:
                raise ParameterError(f"Prices: {name} must be at least 0, not {value}.")

    def of(self, usage: Usage) -> float:
        """Price of one reply."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = usage.input - usage.cached_input
        return (fresh * self.input + usage.cached_input * cached + usage.output * self.output) / 1e6


@dataclass
class Answer:
    """What `Chat.answer` returns: the answer read from the response, and what it took."""

    answer: str | None
    response: str
    demos: list[dict[str, Any]] = field(default_factory=list)
    attempts: int = 0
    valid: bool = True
    fallback: str | None = None
    usage: Usage = field(default_factory=Usage)


class Callback:
    """A function as a chat: `function(messages, **parameters) -> str`. For scripted models and tests."""

    model = "function"

    def __init__(self, function: Callable[..., str]) -> None:
        self._function = function

    def generate(self, requests: list[Request]) -> list[Reply]:
        """The function's replies; what it raises becomes the reply's error."""
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        messages = [dict(message) for message in request.messages]
        parameters = {"temperature": request.temperature, "max_tokens": request.max_tokens, "seed": request.seed}
        try:
            text = self._function(messages, **parameters, sample_index=request.sample_index)
        except ChatError as error:
            return Reply.failed(str(error), model=self.model)
        if not isinstance(text, str):
            return Reply.failed(f"the function returned a {type(text).__name__}, not text", model=self.model)
        sizes = sum(len(message["content"]) for message in messages) // 4, len(text) // 4
        return Reply(text=text, model=self.model, usage=Usage(input=sizes[0], output=sizes[1], estimated=True))


class Chat:
    """A chat that methods attach to.

    `source` is an endpoint (`"http://…/v1"`; its key is read from OPENAI_API_KEY), `"openai:MODEL"`,
    `"local:NAME"` for anything `gratis.open` knows, a live transformers model, or a function.

    A request whose last message is the assistant's is an answer that has begun, and the reply goes on from there. Local
    models can do that; of an endpoint say how: `continues="prefill"` (servers that take `continue_final_message`, as
    vLLM and SGLang do), or `"completions"` for the text completions of a base model, which reads the messages' texts
    one after the other, without a template.

    >>> chat = Chat(lambda messages, **parameters: "Paris")
    >>> chat.ask("What is the capital of France?")
    'Paris'
    """

    def __init__(
        self,
        source: Any,
        model: str | None = None,
        *,
        key: str | None = None,
        concurrency: int = 8,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        timeout_s: float = 120.0,
        attempts: int = 6,
        retry_budget_s: float = 300.0,
        cache: str | os.PathLike[str] | None = None,
        cache_mode: CacheMode = "on",
        transcript: str | os.PathLike[str] | None = None,
        continues: Continues | None = None,
        batch_tokens: int | None = None,
        prefix_cache_mb: float = 512.0,
        seed: int = 0,
        budget: Budget | None = None,
        prices: Prices | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        positive = {
            "concurrency": concurrency, "timeout_s": timeout_s, "attempts": attempts, "retry_budget_s": retry_budget_s,
            "requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute,
            "batch_tokens": batch_tokens, "prefix_cache_mb": prefix_cache_mb,
        }  # fmt: skip
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ParameterError(f"Chat: {name} must be above 0, not {value}.")
        if cache_mode not in get_args(CacheMode):
            raise ParameterError(f"Chat: cache_mode is one of {', '.join(get_args(CacheMode))}, not {cache_mode!r}.")
        if continues is not None and continues not in get_args(Continues):
            raise ParameterError(
                f"Chat: continues is one of {', '.join(get_args(Continues))} or None, not {continues!r}."
            )
        self._limits: dict[str, Any] = {
            "key": key, "concurrency": concurrency, "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute, "timeout_s": timeout_s, "attempts": attempts,
            "retry_budget_s": retry_budget_s, "sleep": sleep, "clock": clock, "continues": continues,
        }  # fmt: skip
        self._batch_tokens, self._prefix_bytes = batch_tokens, int(prefix_cache_mb * 2**20)
        self.seed = seed
        self.backend: Any = self._backend(source, model)
        self._cache = ResponseCache(Path(cache)) if cache is not None and cache_mode != "off" else None
        self._cache_mode = cache_mode
        self._transcript = Transcript(Path(transcript)) if transcript is not None else None
        self._budget, self._prices = budget or Budget(), prices
        self._spent: dict[str, float] = {"calls": 0, "tokens": 0, "cost": 0.0}
        self._counts: dict[tuple[str, str], dict[str, float]] = {}

    @classmethod
    def replay(cls, path: str | os.PathLike[str], **options: Any) -> Chat:
        """A chat that answers from a transcript; a request that is not in it raises ChatError."""
        return cls(Replay(Path(path)), **options)

    def _backend(self, source: Any, model: str | None) -> Any:
        if hasattr(source, "generate") and hasattr(source, "named_parameters"):
            from gratis.subjects.chat.local import LocalModel

            on_cpu = source.device.type == "cpu"
            return LocalModel(source, self._batch_tokens or (4096 if on_cpu else 65536), self._prefix_bytes)
        if isinstance(source, str):
            if source.startswith("local:"):
                from gratis.subjects.opening import open as open_subject

                return self._backend(open_subject(source.removeprefix("local:")), model)
            if source.startswith(("http://", "https://", "openai:")):
                from gratis.subjects.chat.endpoint import Endpoint

                named = source.removeprefix("openai:") if source.startswith("openai:") else model
                url = None if source.startswith("openai:") else source
                return Endpoint(url, named, **self._limits)
            raise SubjectError(f"A chat is http://…, openai:MODEL, local:NAME, a model or a function, not {source!r}.")
        if hasattr(source, "generate") and hasattr(source, "model"):
            return source
        if callable(source):
            return Callback(source)
        raise SubjectError(f"A chat cannot be made of a {type(source).__name__}.")

    def __call__(self, requests: Any) -> list[Reply]:
        """Replies in the order of `requests` (questions, lists of messages or Requests). Raises BudgetError."""
        if isinstance(requests, (str, Request)) or (
            isinstance(requests, (list, tuple)) and requests and isinstance(requests[0], Mapping)
        ):
            requests = [requests]
        wanted = [as_request(request, seed=self.seed) for request in requests]
        replies: list[Reply | None] = [None] * len(wanted)
        model = self.backend.model
        keys = [request.key(model) for request in wanted]
        for number, (request, key) in enumerate(zip(wanted, keys, strict=True)):
            if self._cache is not None and self._cache_mode in {"on", "read"} and self._cacheable(request):
                replies[number] = self._cache.get(key)
        fresh = [n for n, reply in enumerate(replies) if reply is None]
        # The same request twice in one batch is sent once.
        first = {keys[n]: n for n in reversed(fresh)}
        sent = [n for n in fresh if first[keys[n]] == n]
        self._check_budget([wanted[n] for n in sent], [r for r in replies if r is not None])
        for number, fresh_reply in zip(sent, self._generate([wanted[n] for n in sent]), strict=True):
            replies[number] = fresh_reply
            if self._cache is not None and self._cache_mode != "read" and self._cacheable(wanted[number]):
                self._cache.put(keys[number], fresh_reply)
        done: list[Reply] = []
        for number, reply in enumerate(replies):
            answered = reply if reply is not None else replace(replies[first[keys[number]]], cached=True)  # type: ignore[type-var]
            assert answered is not None
            self._note(wanted[number], answered)
            if self._transcript is not None:
                self._transcript.add(keys[number], wanted[number], answered)
            done.append(answered)
        return done

    async def agenerate(self, requests: Any) -> list[Reply]:
        """The same, without blocking the event loop."""
        return await asyncio.to_thread(self, requests)

    def ask(self, question: Any, **options: Any) -> str:
        """The answer's text to one question; what is attached answers it. Raises ChatError."""
        return self.answer(question, **options).response

    def answer(self, question: Any, kind: str | Format = "text", *, max_tokens: int = 800) -> Answer:
        """Answer one question of a kind (text, number, choice, latex, code, or a Format), reading the answer out of it.

        This is where programs attach. Raises ChatError where there is no answer, InputError for an unusable question.
        """
        return self.answer_many([question], kind, max_tokens=max_tokens)[0]

    def answer_many(
        self, questions: Sequence[Any], kind: str | Format = "text", *, max_tokens: int = 800
    ) -> list[Answer]:
        """`answer` for many questions in one batch."""
        form = format_of(kind)
        items = [form.item(question) for question in questions]
        replies = self([zero_shot(form, item, max_tokens, self.seed) for item in items])
        return [read_answer(form, item, reply) for item, reply in zip(items, replies, strict=True)]

    @property
    def continues(self) -> bool:
        """Whether an answer that has begun can be gone on with."""
        return bool(getattr(self.backend, "continues", False))

    def score(self, prompt: Any, continuations: Sequence[str]) -> list[float]:
        """Log-probability of each continuation after the prompt. Raises ChatError where the back end cannot tell."""
        if not hasattr(self.backend, "score"):
            raise ChatError("This chat does not give log-probabilities of given text: use a local model.")
        scores: list[float] = self.backend.score(as_request(prompt, seed=self.seed), list(continuations))
        return scores

    def stats(self) -> dict[str, Any]:
        """Calls, cache hits, tokens, seconds and cost so far, in all and by (method, role). Unknown cost is None."""
        by = {"/".join(part for part in key if part) or "direct": dict(counts) for key, counts in self._counts.items()}
        names = ("calls", "cached", "errors", "input", "cached_input", "output", "seconds")
        total: dict[str, Any] = {name: sum(counts.get(name, 0) for counts in by.values()) for name in names}
        total["cost"] = self._spent["cost"] if self._prices is not None else None
        return {**total, "by": by}

    def _generate(self, requests: list[Request]) -> Iterator[Reply]:
        """Replies in the order of the requests, each as soon as it and those before it are there."""
        if not requests:
            return
        for request, reply in zip(requests, self.backend.generate(requests), strict=True):
            if request.response_schema is not None and reply.error is None:
                yield self._structured(request, reply, requests)
                continue
            if request.choices and reply.error is None and reply.parsed is None:
                reply.parsed = chosen(reply.text, request.choices)
            yield reply

    def _structured(self, request: Request, reply: Reply, sent: list[Request]) -> Reply:
        """Parse and validate; one repair request that shows the error, unless the reply was cut off."""
        assert request.response_schema is not None
        problem = _fit(reply, request.response_schema)
        if problem is None or reply.finish_reason == "length":
            return reply
        repair = f"That is not valid: {problem}. Answer again with only JSON that fits the schema."
        turns = (*request.messages, {"role": "assistant", "content": reply.text}, {"role": "user", "content": repair})
        asked = replace(request, messages=turns)
        try:
            self._check_budget([*sent, asked], [])
        except BudgetError as error:
            reply.attempts.append(f"not repaired: {error}")
            return reply
        again: Reply = next(iter(self.backend.generate([asked])))
        again.usage = _sum([reply.usage, again.usage])
        again.attempts = [*reply.attempts, f"repaired: {problem}", *again.attempts]
        self._spent["calls"] += 1
        if again.error is None:
            _fit(again, request.response_schema)
        return again

    def _cacheable(self, request: Request) -> bool:
        return request.temperature == 0 or request.sample_index > 0

    def _check_budget(self, requests: Iterable[Request], done: list[Reply]) -> None:
        budget = self._budget
        requests = list(requests)
        worst = [sum(len(m["content"]) for m in r.messages) // 3 + r.max_tokens for r in requests]
        calls, tokens = self._spent["calls"] + len(requests), self._spent["tokens"] + sum(worst)
        if budget.calls is not None and calls > budget.calls:
            raise BudgetError(f"The budget of {budget.calls} calls would be exceeded ({calls}).", done)
        if budget.tokens is not None and tokens > budget.tokens:
            raise BudgetError(f"The budget of {budget.tokens:,} tokens could be exceeded ({tokens:,.0f}).", done)
        if budget.cost is not None and self._prices is not None:
            most = self._spent["cost"] + sum(worst) * max(self._prices.input, self._prices.output) / 1e6
            if most > budget.cost:
                raise BudgetError(f"The budget of {budget.cost:g} could be exceeded ({most:.4g}).", done)

    def _note(self, request: Request, reply: Reply) -> None:
        key = str(request.tags.get("method", "")), str(request.tags.get("role", ""))
        counts = self._counts.setdefault(key, {})
        seen: dict[str, float] = {"calls": 1, "cached": reply.cached, "errors": reply.error is not None}
        if not reply.cached:
            usage = asdict(reply.usage)
            seen |= {name: usage[name] for name in ("input", "cached_input", "output")}
            seen["seconds"] = reply.latency_s
            self._spent["calls"] += 1
            self._spent["tokens"] += reply.usage.input + reply.usage.output
            self._spent["cost"] += self._prices.of(reply.usage) if self._prices is not None else 0.0
        for name, value in seen.items():
            counts[name] = counts.get(name, 0) + value


def zero_shot(form: Format, item: Mapping[str, Any], max_tokens: int, seed: int) -> Request:
    """The request that puts a question without examples."""
    return solving(form, [], item, max_tokens, seed)


def solving(
    form: Format, turns: Sequence[tuple[str, str]], item: Mapping[str, Any], max_tokens: int, seed: int
) -> Request:
    """The request that puts a question after example turns (question, answer)."""
    messages = [{"role": "system", "content": form.system}] if form.system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": form.render(item)})
    return Request(
        messages=tuple(messages),
        max_tokens=max_tokens,
        seed=seed,
        choices=form.choices(item),
        tags={"role": "answer"},
    )


def read_answer(form: Format, item: Mapping[str, Any], reply: Reply) -> Answer:
    """The answer in a reply. Raises ChatError where the reply is an error."""
    if reply.error is not None:
        raise ChatError(f"The chat did not answer: {reply.error.rstrip('.')}.")
    said = reply.parsed if form.choices(item) and isinstance(reply.parsed, str) else reply.text
    return Answer(answer=form.extract(said, item), response=said, usage=reply.usage)


def _fit(reply: Reply, schema: Mapping[str, Any]) -> str | None:
    try:
        value = parse_json(reply.text)
    except ValueError as error:
        return str(error)
    problem = mismatch(value, schema)
    if problem is None:
        reply.parsed = value
    return problem


def _sum(usages: Sequence[Usage]) -> Usage:
    total = {name: sum(asdict(u)[name] for u in usages) for name in ("input", "cached_input", "output", "reasoning")}
    return Usage(**total, estimated=any(u.estimated for u in usages))
