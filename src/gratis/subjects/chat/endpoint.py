"""An OpenAI-compatible endpoint, asked within limits."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gratis.contract.errors import MissingExtraError
from gratis.subjects.chat.limits import Breaker, Failure, Gate, Pace, persistently
from gratis.subjects.chat.messages import ChatError, Reply, Request, Usage
from gratis.subjects.chat.structured import choice_schema

RETRIED = {408, 409, 429}
AROUND = 16
"""Tokens that JSON takes around a choice."""
NAME_ONE = "name one, as gratis.Chat(address, model) or address#model"


class Endpoint:
    """Chat completions over HTTP. The key comes from the argument or `OPENAI_API_KEY`, and is never written down."""

    def __init__(
        self,
        base_url: str | None,
        model: str | None,
        *,
        key: str | None,
        concurrency: int,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        timeout_s: float,
        attempts: int,
        retry_budget_s: float,
        sleep: Callable[[float], None],
        clock: Callable[[], float],
        continues: str | None = None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise MissingExtraError.of("openai", "programs") from None
        self._openai = openai
        # The client's own pool would cap the concurrency.
        pool = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=concurrency, max_keepalive_connections=concurrency
        )
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=key or os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=0,
            timeout=openai.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            http_client=openai.DefaultHttpxClient(limits=pool),
        )
        self._model, self._host = model, str(self._client.base_url)
        self._gate, self._breaker = Gate(concurrency), Breaker()
        self._pace = Pace(requests_per_minute, tokens_per_minute, sleep, clock)
        self._concurrency, self._attempts, self._budget = concurrency, attempts, retry_budget_s
        self._sleep, self._clock = sleep, clock
        self.continues = continues
        self.tells_log_probabilities = continues != "completions"
        """Whether it can be asked for the log-probabilities of what it writes."""

    @property
    def model(self) -> str:
        """The server's address and the model's name: what answers are kept under."""
        return f"{self._host} {self._name()}"

    def _name(self) -> str:
        """The model's name; asked of the server where none was given and it serves one."""
        if self._model is None:
            try:
                served = [m.id for m in self._client.models.list().data]
            except self._openai.OpenAIError as error:
                said = _words(error)
                raise ChatError(f"The endpoint does not say which models it serves ({said}): {NAME_ONE}.") from None
            if len(served) != 1:
                shown = ", ".join(served[:5]) or "none"
                raise ChatError(
                    f"The endpoint serves {shown}: name one, as gratis.Chat(address, model) or address#model."
                )
            self._model = served[0]
        return self._model

    def generate(self, requests: list[Request]) -> Iterator[Reply]:
        """Replies in the order of the requests, as they come; one that failed says why."""
        model = self._name()
        if len(requests) == 1:
            yield self._reply(requests[0], model)
            return
        with ThreadPoolExecutor(self._concurrency) as pool:
            yield from pool.map(lambda request: self._reply(request, model), requests)

    def _reply(self, request: Request, model: str) -> Reply:
        log: list[str] = []

        def note(failure: Failure) -> None:
            log.append(failure.reason)
            if failure.status == 429:
                self._gate.overrun()

        if self._breaker.open:
            return Reply.failed("not sent: more than half of the last 20 requests failed", model=model)
        try:
            with self._gate:
                reply = persistently(
                    lambda: self._send(request, model),
                    attempts=self._attempts,
                    budget_s=self._budget,
                    sleep=self._sleep,
                    on_failure=note,
                    clock=self._clock,
                )
        except Failure as failure:
            self._breaker.note(True)
            return Reply.failed(failure.reason, log, model)
        self._breaker.note(False)
        self._gate.clean()
        reply.attempts = log
        return reply

    def _asked(self, request: Request, model: str) -> Any:
        """What the server answers. Raises Failure for a beginning that it was not said to go on from."""
        begun = request.messages[-1]["role"] == "assistant"
        if self.continues == "completions":
            return self._client.completions.create(**_completion(request, model))
        if begun and self.continues is None:
            raise Failure("it is not known how the endpoint goes on from a beginning: set continues of the Chat", False)
        more: dict[str, Any] = (
            {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}} if begun else {}
        )
        return self._client.chat.completions.create(**_arguments(request, model), **more)

    def _send(self, request: Request, model: str) -> Reply:
        self._pace.wait(sum(len(m["content"]) for m in request.messages) // 4 + request.max_tokens)
        began = time.perf_counter()
        try:
            answer = self._asked(request, model)
        except self._openai.APIStatusError as error:
            status = error.status_code
            again = status in RETRIED or status >= 500
            raise Failure(f"HTTP {status}: {_words(error)}", again, _retry_after(error), status) from None
        except self._openai.APITimeoutError:
            raise Failure("the endpoint did not answer in time", True) from None
        except self._openai.APIConnectionError as error:
            raise Failure(f"no connection: {_words(error)}", True) from None
        except (self._openai.APIResponseValidationError, ValueError) as error:
            raise Failure(f"the answer is not what the protocol says: {_words(error)}", True) from None
        return _read(answer, request, model, time.perf_counter() - began)


def _completion(request: Request, model: str) -> dict[str, Any]:
    """Arguments of a text completion that goes on from the messages' texts."""
    arguments: dict[str, Any] = {
        "model": model,
        "prompt": "".join(message["content"] for message in request.messages),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "seed": request.seed + request.sample_index,
    }
    return arguments | ({"stop": list(request.stop)} if request.stop else {})


def _arguments(request: Request, model: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": model,
        "messages": [dict(message) for message in request.messages],
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "seed": request.seed + request.sample_index,
    }
    if request.stop:
        arguments["stop"] = list(request.stop)
    if request.logprobs is not None:
        arguments |= {"logprobs": True, "top_logprobs": request.logprobs}
    schema = request.response_schema
    if request.choices:
        schema = choice_schema(request.choices)
        # Room for the braces and the key around the choice.
        arguments["max_tokens"] = max(request.max_tokens, AROUND + max(map(len, request.choices)))
    if schema is not None:
        arguments["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": dict(schema), "strict": True},
        }
    return arguments


def _read(answer: Any, request: Request, model: str, seconds: float) -> Reply:
    """The reply in a completion. Raises Failure for one that is not what the protocol says."""
    try:
        choice = answer.choices[0]
        if hasattr(choice, "message"):
            text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
        else:
            text, refusal = choice.text, None
    except (AttributeError, IndexError, KeyError, TypeError):
        raise Failure("the answer is not what the protocol says: it has no choices", True) from None
    if text is None and refusal is None:
        raise Failure("the answer is empty", True)
    said = text if text is not None else refusal
    if not isinstance(said, str):
        raise Failure(f"the answer is not what the protocol says: its text is a {type(said).__name__}", True)
    finish = "refusal" if text is None else "length" if choice.finish_reason == "length" else "stop"
    tokens = getattr(getattr(choice, "logprobs", None), "content", None)
    named = getattr(answer, "model", None)
    return Reply(
        text=said,
        finish_reason=finish,
        stopped_by=_stopped_by(choice, request),
        usage=_usage(getattr(answer, "usage", None), request, said),
        logprobs=[entry.model_dump() for entry in tokens if hasattr(entry, "model_dump")] if tokens else None,
        model=named if isinstance(named, str) and named else model,
        latency_s=seconds,
    )


def _stopped_by(choice: Any, request: Request) -> str | None:
    """The stop string that ended a choice, "" for the model's own end; None where the server does not say."""
    if choice.finish_reason != "stop":
        return None
    if not request.stop:
        return ""
    said = {
        name: value for name in ("stop_reason", "matched_stop") if (value := getattr(choice, name, _UNSAID)) != _UNSAID
    }
    if not said:
        return None
    named = next(iter(said.values()))
    return named if isinstance(named, str) and named in request.stop else ""


_UNSAID = object()


def _usage(counted: Any, request: Request, text: str) -> Usage:
    """The server's count of tokens, or an estimate where it gives none that can be read."""

    def count(owner: Any, name: str) -> int:
        value = getattr(owner, name, None)
        return value if isinstance(value, int) and value > 0 else 0

    if not isinstance(getattr(counted, "prompt_tokens", None), int):
        read = sum(len(message["content"]) for message in request.messages) // 4
        return Usage(input=read, output=len(text) // 4, estimated=True)
    return Usage(
        input=count(counted, "prompt_tokens"),
        cached_input=count(getattr(counted, "prompt_tokens_details", None), "cached_tokens"),
        output=count(counted, "completion_tokens"),
        reasoning=count(getattr(counted, "completion_tokens_details", None), "reasoning_tokens"),
    )


def _retry_after(error: Any) -> float | None:
    value = error.response.headers.get("retry-after")
    try:
        seconds = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
