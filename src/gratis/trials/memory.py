"""Peak memory of a run, as the operating system or the device reports it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Anonymous memory of this process in bytes (on Linux; elsewhere all resident memory)."""
    try:
        for line in STATUS.read_bytes().splitlines():
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Measures the peak of a block above the level at its start.

    A thread samples the process every `interval` seconds; what was freed before the block is handed back to the
    system first, so that runs that follow one another start from the same level. A peak shorter than the interval
    can be missed. With a CUDA device in use, its allocator's own peak is read as well.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.start = 0
        self.peak = 0
        self._device_start = 0
        self._device_peak: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def megabytes(self) -> float:
        """Peak above the start, in MB (1e6 bytes)."""
        return max(0, self.peak - self.start) / 1e6

    @property
    def device_megabytes(self) -> float | None:
        """Peak of the CUDA allocator above the start, in MB; None where no CUDA device is in use."""
        return None if self._device_peak is None else max(0, self._device_peak - self._device_start) / 1e6

    def __enter__(self) -> Self:
        release_freed()
        if (cuda := _cuda()) is not None:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
            self._device_start = cuda.memory_allocated()
        self.start = self.peak = resident_bytes()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peak = max(self.peak, resident_bytes())
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if (cuda := _cuda()) is not None:
            cuda.synchronize()
            self._device_peak = cuda.max_memory_allocated()

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, resident_bytes())


def release_freed() -> None:
    """Collect garbage and hand freed memory back to the system."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def synchronize() -> None:
    """Wait for the work that a CUDA device still has, so that a clock read afterwards includes it."""
    if (cuda := _cuda()) is not None:
        cuda.synchronize()


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
