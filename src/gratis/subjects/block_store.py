"""Blocks of keys and values that are not needed now: on the device, in main memory or in a file, with the hot ones near.

A store grows with the text. Blocks that are used again and again are kept in a few slots on the model's device, and
those used least recently, or attended to least, make room for others.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.contract.errors import InputError, MemoryShortError

Place = Literal["device", "memory", "file"]
Current = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Numbers and rows of all blocks that are wanted now: those are not evicted for one another."""
KEPT_FREE = 1 << 28
"""Bytes of main memory that a store leaves to others."""


class BlockStore:
    """Keys and values of blocks: (blocks, rows, heads, block, head_dim), appended to and read by number."""

    def __init__(self, place: Place, method: str) -> None:
        self._place, self._method = place, method
        self.count = 0
        self.parts: list[StorePart] = []
        """Keys and values."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add blocks (blocks, rows, heads, block, head_dim). Raises MemoryShortError where there is no room for them."""
        if not self.parts:
            self.parts = [StorePart(self._place, tensor, self._method) for tensor in (keys, values)]
        for part, tensor in zip(self.parts, (keys, values), strict=True):
            part.append(tensor, self.count)
        self.count += len(keys)

    def read(self, blocks: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Keys and values (n, heads, block, head_dim) of `blocks` of `rows`, where they are."""
        keys, values = (part.read(blocks, rows) for part in self.parts)
        return keys, values

    def each(self, blocks: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values (heads, block, head_dim) of each of a few `blocks` of `rows`, as views on where they are."""
        keys, values = self.parts
        for number, row in zip(blocks.tolist(), rows.tolist(), strict=True):
            yield keys.memory[number, row], values.memory[number, row]

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows, each as often as it is named."""
        for part in self.parts:
            part.select_rows(rows, self.count)

    @property
    def near(self) -> bool:
        """Whether reading is as quick as from the model's device."""
        return not self.parts or self.parts[0].near

    @property
    def bytes(self) -> int:
        """Bytes held outside files."""
        return 0 if self._place == "file" else sum(part.memory.nbytes for part in self.parts)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all blocks, wherever they are."""
        return sum(part.memory[: self.count].nbytes for part in self.parts)


class StorePart:
    """The keys, or the values, of a store."""

    def __init__(self, place: Place, like: Tensor, method: str) -> None:
        self._place, self._method = place, method
        self._device = like.device if place == "device" else torch.device("cpu")
        self._pinned = place == "memory" and like.device.type == "cuda"
        self.near = place != "file" and self._device.type == like.device.type
        self._file: _File | None = None
        self.memory = self._room(16, like.shape[1:], like.dtype)

    def append(self, new: Tensor, count: int) -> None:
        if count + len(new) > len(self.memory):
            self._grow(max(count + len(new), len(self.memory) + len(self.memory) // 2), count)
        self.memory[count : count + len(new)] = new

    def read(self, blocks: NDArray[np.int64], rows: NDArray[np.int64]) -> Tensor:
        places = torch.from_numpy(blocks * self.memory.shape[1] + rows).to(self._device)
        return self.memory.flatten(0, 1).index_select(0, places)

    def select_rows(self, rows: Tensor, count: int) -> None:
        chosen = self.memory[:count, rows.to(self._device)]
        self.memory = self._room(max(count, 16), chosen.shape[1:], chosen.dtype)
        self.memory[:count] = chosen

    def __deepcopy__(self, memo: dict[int, Any]) -> StorePart:
        new = copy.copy(self)
        memo[id(self)] = new
        new.memory = new._room(len(self.memory), self.memory.shape[1:], self.memory.dtype)
        new.memory.copy_(self.memory)
        return new

    def _grow(self, blocks: int, count: int) -> None:
        old = self.memory
        if self._file is not None:
            self.memory = self._file.mapped((blocks, *old.shape[1:]), old.dtype)
            return
        self.memory = self._room(blocks, old.shape[1:], old.dtype)
        self.memory[:count] = old[:count]

    def _room(self, blocks: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = blocks * int(np.prod(shape)) * dtype.itemsize
        if self._place == "file":
            self._file = _File(self._method)
            return self._file.mapped((blocks, *shape), dtype)
        if self._device.type == "cpu":
            check_room(size, self._method)
        return torch.empty((blocks, *shape), dtype=dtype, device=self._device, pin_memory=self._pinned)


class _File:
    """A file without a name: the system removes it when it is closed, and after a kill."""

    def __init__(self, method: str) -> None:
        self._method = method
        handle, name = tempfile.mkstemp(prefix="gratis-blocks-")
        self._handle = os.fdopen(handle, "r+b")
        Path(name).unlink()

    def mapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = int(np.prod(shape)) * dtype.itemsize
        try:
            os.posix_fallocate(self._handle.fileno(), 0, size)
        except OSError as error:
            raise InputError(
                f"{self._method} cannot keep {gib(size)} of the text in a file of {tempfile.gettempdir()}: "
                f"{error.strerror}; point TMPDIR at a larger disk."
            ) from error
        content = np.memmap(self._handle, dtype=np.uint8, mode="r+", shape=(size,))
        return torch.from_numpy(content).view(dtype).view(shape)


class HotBlocks:
    """A few blocks on the model's device: reading them again costs no copy from where they are stored."""

    def __init__(self, slots: int, strategy: Literal["lru", "lru-s"], decay: float, device: torch.device) -> None:
        self._strategy, self._decay, self._device = strategy, decay, device
        self._clock = 0
        self._memory: list[Tensor]
        self.empty(slots)
        self.counts: Counter[str] = Counter(hot_hits=0, hot_misses=0)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(tensor.nbytes for tensor in self._memory)

    @property
    def held(self) -> list[tuple[int, int]]:
        """(block, row) of what is in the slots."""
        return [(int(b), int(r)) for b, r in zip(self._blocks, self._rows, strict=True) if b >= 0]

    def each(
        self, store: BlockStore, blocks: NDArray[np.int64], rows: NDArray[np.int64], current: Current
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values (heads, block, head_dim) of each of a few `blocks` of `rows`, all different."""
        slots, free = self._find(blocks, rows, current)
        room, stored = iter(free.tolist()), store.each(blocks, rows)
        for number, row, slot, block in zip(blocks.tolist(), rows.tolist(), slots.tolist(), stored, strict=True):
            held = slot
            if held < 0 and (held := next(room, -1)) >= 0:
                self._take(held, number, row, block)
                for memory, tensor in zip(self._memory, block, strict=True):
                    memory[held].copy_(tensor, non_blocking=True)
            yield (self._memory[0][held], self._memory[1][held]) if held >= 0 else block

    def read(
        self, store: BlockStore, blocks: NDArray[np.int64], rows: NDArray[np.int64], current: Current
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (n, heads, block, head_dim) of `blocks` of `rows`."""
        unique, back = np.unique(np.stack([blocks, rows]), axis=1, return_inverse=True)
        if unique.shape[1] < len(blocks):
            keys, values = self.read(store, unique[0], unique[1], current)
            order = torch.from_numpy(back.ravel()).to(self._device)
            return keys[order], values[order]
        slots, free = self._find(blocks, rows, current)
        known, fetched = slots >= 0, []
        if not known.all():
            fetched = [tensor.to(self._device) for tensor in store.read(blocks[~known], rows[~known])]
            taken = free[: len(fetched[0])]
            new = np.flatnonzero(~known)[: len(taken)]
            self._take(taken, blocks[new], rows[new], (fetched[0][0], fetched[1][0]))
            places = torch.from_numpy(taken).to(self._device)
            for memory, tensor in zip(self._memory, fetched, strict=True):
                memory[places] = tensor[: len(taken)]
        if not known.any():
            return fetched[0], fetched[1]
        near = torch.from_numpy(slots[known]).to(self._device)
        if known.all():
            return self._memory[0][near], self._memory[1][near]
        out = [tensor.new_empty(len(blocks), *tensor.shape[1:]) for tensor in self._memory]
        for one, memory, tensor in zip(out, self._memory, fetched, strict=True):
            one[torch.from_numpy(np.flatnonzero(known)).to(self._device)] = memory[near]
            one[torch.from_numpy(np.flatnonzero(~known)).to(self._device)] = tensor
        return out[0], out[1]

    def _find(
        self, blocks: NDArray[np.int64], rows: NDArray[np.int64], current: Current
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Slots of `blocks` of `rows`, -1 for those that are not here, and slots for those, the first to make room first.

        Nothing makes room for a block that is current as well.
        """
        self._clock += 1
        same = (self._blocks[:, None] == blocks) & (self._rows[:, None] == rows)
        slots = np.where(same.any(0), same.argmax(0), -1)
        misses = int((slots < 0).sum())
        self.counts["hot_hits"] += len(slots) - misses
        self.counts["hot_misses"] += misses
        in_use = ((self._blocks[:, None] == current[0]) & (self._rows[:, None] == current[1])).any(1)
        self._stamps[in_use] = self._now
        if not misses:
            return slots, slots[:0]
        free = np.flatnonzero(~in_use)
        return slots, free[np.argsort(np.where(self._blocks[free] < 0, -np.inf, self._stamps[free]), kind="stable")]

    def _take(self, slots: Any, blocks: Any, rows: Any, like: tuple[Tensor, Tensor]) -> None:
        """Give slots to blocks of rows; `like` are keys and values of one block."""
        if not self._memory:
            self._memory = [
                torch.empty((len(self._blocks), *one.shape), dtype=one.dtype, device=self._device) for one in like
            ]
        self._blocks[slots], self._rows[slots], self._stamps[slots] = blocks, rows, self._now

    @property
    def _now(self) -> float:
        return 0.0 if self._strategy == "lru-s" else self._clock

    def attended(self, blocks: NDArray[np.int64], rows: NDArray[np.int64], mass: NDArray[np.float64]) -> None:
        """Note how much attention blocks received, which decides who stays under "lru-s"."""
        self._stamps *= self._decay
        same = (self._blocks[:, None] == blocks) & (self._rows[:, None] == rows)
        self._stamps += (same * mass).sum(1)

    def empty(self, slots: int) -> None:
        """Forget everything, and have this many slots from now on."""
        self._blocks, self._rows, self._stamps = np.full(slots, -1), np.full(slots, -1), np.zeros(slots)
        self._memory = []


def check_room(size: int, method: str) -> None:
    """Raise MemoryShortError if main memory has no room for `size` bytes more."""
    free = psutil.virtual_memory().available
    if size > max(free - KEPT_FREE, 0):
        raise MemoryShortError(
            f"{method} needs {gib(size)} of main memory more to keep the text, and {gib(free)} are free: use "
            "store='file', or a shorter text."
        )


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"
