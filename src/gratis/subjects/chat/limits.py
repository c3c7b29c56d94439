"""How fast and how often an endpoint is asked: bounded in everything."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Answer = TypeVar("Answer")
MOST_SAME_FAILURES = 3
BREAKER_WINDOW = 20


class Gate:
    """At most `limit` requests at a time; halved when the server is overrun, raised by one after 20 clean replies."""

    def __init__(self, limit: int) -> None:
        self._most = self._limit = limit
        self._running = self._clean = 0
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """Requests allowed at a time now."""
        return self._limit

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._running < self._limit)
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def overrun(self) -> None:
        """The server said that there were too many."""
        with self._changed:
            self._limit, self._clean = max(self._limit // 2, 1), 0

    def clean(self) -> None:
        """A request was answered."""
        with self._changed:
            self._clean += 1
            if self._clean >= 20 and self._limit < self._most:
                self._limit, self._clean = self._limit + 1, 0
                self._changed.notify_all()


class Pace:
    """At most so many requests and tokens a minute."""

    def __init__(
        self, requests: int | None, tokens: int | None, sleep: Callable[[float], None], clock: Callable[[], float]
    ) -> None:
        self._requests, self._tokens, self._sleep, self._clock = requests, tokens, sleep, clock
        self._sent: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def wait(self, tokens: int) -> None:
        """Wait until one more request of about `tokens` tokens may be sent."""
        if self._requests is None and self._tokens is None:
            return
        with self._lock:
            while True:
                now = self._clock()
                while self._sent and self._sent[0][0] <= now - 60:
                    self._sent.popleft()
                too_many = self._requests is not None and len(self._sent) >= self._requests
                too_long = (
                    self._tokens is not None and self._sent and sum(t for _, t in self._sent) + tokens > self._tokens
                )
                if not too_many and not too_long:
                    self._sent.append((now, tokens))
                    return
                self._sleep(max(self._sent[0][0] + 60 - now, 0.01))


class Breaker:
    """Opens when more than half of the last 20 requests failed; then nothing more is sent."""

    def __init__(self) -> None:
        self._last: deque[bool] = deque(maxlen=BREAKER_WINDOW)
        self._lock = threading.Lock()

    def note(self, failed: bool) -> None:
        """Record how a request ended."""
        with self._lock:
            self._last.append(failed)

    @property
    def open(self) -> bool:
        """Whether too many requests failed."""
        with self._lock:
            return len(self._last) == BREAKER_WINDOW and sum(self._last) > BREAKER_WINDOW // 2


@dataclass
class Failure(Exception):
    """One failed try of a request."""

    reason: str
    again: bool
    """Whether another try may succeed."""
    wait: float | None = None
    """Seconds that the server asked to wait."""
    status: int | None = None


def persistently(
    send: Callable[[], Answer],
    *,
    attempts: int,
    budget_s: float,
    sleep: Callable[[float], None],
    on_failure: Callable[[Failure], None],
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """`send()`, tried again with growing, jittered waits where that can help. Raises the last Failure.

    Bounded by `attempts`, by `budget_s` seconds, and by three equal server errors in a row.
    """
    began, same = clock(), 0
    last: Failure | None = None
    for number in range(attempts):
        try:
            return send()
        except Failure as failure:
            on_failure(failure)
            server = failure.status is not None and failure.status >= 500
            same = same + 1 if server and last is not None and last.reason == failure.reason else int(server)
            last = failure
            wait = failure.wait if failure.wait is not None else min(60.0, 2.0**number) * random.uniform(0.5, 1.0)
            over = not clock() - began + wait <= budget_s
            if not failure.again or number + 1 == attempts or same >= MOST_SAME_FAILURES or over:
                raise
            sleep(wait)
    raise AssertionError("attempts is at least 1")
