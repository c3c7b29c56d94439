"""A bar for work inside a library call: on a terminal, when it takes long, and when nobody else shows one."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

PATIENCE = 2.0
"""Seconds after which a bar appears."""
_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextlib.contextmanager
def shown_elsewhere() -> Iterator[None]:
    """Keep bars away: the caller shows progress itself."""
    token = _shown.set(True)
    try:
        yield
    finally:
        _shown.reset(token)


class PatientBar:
    """A bar over `total` units that appears on a terminal's error stream once the work has taken `PATIENCE` seconds."""

    def __init__(self, total: int, words: str) -> None:
        self._total, self._words = total, words
        self._done = 0
        self._began = time.monotonic()
        self._bar: Any = None
        self._line: Any = None
        self._allowed = not _shown.get() and sys.stderr.isatty()

    def advance(self, count: int) -> None:
        """So much more is done. The bar goes away when all is."""
        self._done += count
        if self._done >= self._total:
            self.close()
        elif self._bar is not None:
            self._bar.update(self._line, completed=self._done)
        elif self._allowed and time.monotonic() - self._began >= PATIENCE:
            self._open()

    def close(self) -> None:
        """Take the bar away; nothing is shown from here on."""
        self._allowed = False
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open(self) -> None:
        from rich.console import Console
        from rich.errors import LiveError
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
        bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        try:
            bar.start()
        except LiveError:
            self._allowed = False
            return
        self._bar, self._line = bar, bar.add_task(self._words, total=self._total, completed=self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
