"""How much memory a text takes while it is read, and whether that much is free."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch

from gratis.contract.errors import MemoryShortError
from gratis.subjects.block_store import KEPT_FREE, gib
from gratis.subjects.language import CachedLayer

LONGEST = 1 << 40


@dataclass(frozen=True)
class Footprint:
    """Bytes that a text takes at most while it is read and continued, activations not counted."""

    device: int = 0
    """Where the model is."""
    main: int = 0
    """Main memory, where that is not the model's device."""
    file: int = 0


class Free(NamedTuple):
    """Bytes that are free."""

    main: int
    device: int
    """Where the model is; on a processor, `main` again."""
    file: int


FootprintOf = Callable[[int, int], Footprint]
"""`(rows, tokens)` of a batch of texts."""


def full_footprint(layers: Iterable[CachedLayer], dtype: torch.dtype, rows: int, tokens: int) -> Footprint:
    """All keys and values of `tokens` tokens."""
    return Footprint(device=rows * tokens * dtype.itemsize * sum(layer.numbers for layer in layers))


def check_fits(method: str, where: torch.device, need: Footprint, of: Callable[[int], Footprint], advice: str) -> None:
    """Raise MemoryShortError where `need` exceeds what is free now, naming the length `of` which would fit."""
    free = free_bytes(where)
    if fits(need, where, free):
        return
    tokens = longest(where, of)
    fitting = f"about {tokens:,} tokens fit" if tokens else "not even one token fits"
    wanted, there, place = _shortage(need, where, free)
    raise MemoryShortError(
        f"{method} needs {gib(wanted)} of {place} for this text, and {gib(there)} are free: {fitting}; {advice}."
    )


def _shortage(need: Footprint, where: torch.device, free: Free) -> tuple[int, int, str]:
    """What is needed and what is free where it does not suffice, and the name of that place."""
    if need.file > free.file:
        return need.file, free.file, "disk for temporary files"
    if where.type != "cuda":
        return need.device + need.main, free.main, "main memory"
    if need.main > free.main:
        return need.main, free.main, "main memory"
    return need.device, free.device, f"the memory of {where}"


def longest(where: torch.device, of: Callable[[int], Footprint]) -> int:
    """Tokens of the longest text that fits what is free now."""
    free = free_bytes(where)
    if fits(of(LONGEST), where, free):
        return LONGEST
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(of(middle), where, free) else (low, middle)
    return low


def free_bytes(where: torch.device) -> Free:
    """Bytes free in main memory, a reserve left out, on the device `where`, and for temporary files."""
    main = max(psutil.virtual_memory().available - KEPT_FREE, 0)
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    if where.type != "cuda":
        return Free(main, main, disk)
    cached = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return Free(main, torch.cuda.mem_get_info(where)[0] + cached, disk)


def fits(need: Footprint, where: torch.device, free: Free) -> bool:
    """Whether `need` is within what `free_bytes` returned for `where`."""
    if where.type != "cuda":
        return need.device + need.main <= free.main and need.file <= free.file
    return need.main <= free.main and need.device <= free.device and need.file <= free.file


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the system has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text)
