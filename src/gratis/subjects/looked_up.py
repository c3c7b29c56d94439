"""The first tokens of a text and the blocks of its past that were looked up, as one piece of keys and values."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.subjects.block_store import BlockStore, HotBlocks

FEW = 6
"""Blocks that are quicker copied one by one than gathered and put in their places."""


class LookedUp:
    """Keys and values (rows, heads, sinks + slots * block, head_dim) near the model; blocks come and go, sinks stay.

    Every group of slots has blocks of its own: a row of the batch, or with `heads` each of a row's query heads.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: int, block: int, heads: int | None = None) -> None:
        """Keys and values (rows, key heads, sinks, head_dim) are those of the first tokens."""
        rows, own, self.sinks, _ = keys.shape
        self._block, self._per_head = block, heads is not None
        heads = own if heads is None else heads
        self._parts: list[Tensor] = []
        for tensor in (keys, values):
            memory = tensor.new_empty(rows, heads, self.sinks + slots * block, tensor.shape[3])
            memory[:, :, : self.sinks] = tensor.repeat_interleave(heads // own, 1)
            self._parts.append(memory)
        self.chosen = np.full((rows * (heads if self._per_head else 1), slots), -1, dtype=np.int64)
        """(groups, slots) numbers of the blocks that are here; -1 where none is."""

    def attended(self, known: int) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, heads, length, head_dim) of what is here, of a store of `known` blocks."""
        length = self.sinks + self._block * min(self.chosen.shape[1], known)
        return self._parts[0][:, :, :length], self._parts[1][:, :, :length]

    def fetch(self, wanted: NDArray[np.int64], store: BlockStore, hot: HotBlocks | None) -> None:
        """Bring `wanted` (groups, n) in, in the place of what is not wanted any more."""
        same = wanted[:, :, None] == self.chosen[:, None, :]
        missing = ~same.any(2)
        if not missing.any():
            return
        # Where there are fewer blocks than slots the first slots are used, so that what is attended to is one piece.
        free = ~same.any(1)
        free[:, wanted.shape[1] :] = False
        group, place = np.nonzero(free)
        blocks = wanted[missing]
        rows = self._rows(group)
        current = wanted.ravel(), self._rows(np.repeat(np.arange(len(wanted)), wanted.shape[1]))
        if len(blocks) <= FEW and not self._per_head:
            each = store.each(blocks, rows) if hot is None else hot.each(store, blocks, rows, current)
            for block, row, slot in zip(each, rows.tolist(), place.tolist(), strict=True):
                self._copy(block, row, slot)
        else:
            found = store.read(blocks, rows) if hot is None else hot.read(store, blocks, rows, current)
            self._put(found, group, rows, place)
        self.chosen[group, place] = blocks

    def _copy(self, block: tuple[Tensor, Tensor], row: int, slot: int) -> None:
        """Write one block's keys and values (key heads, block, head_dim) into a slot of a row."""
        start = self.sinks + slot * self._block
        for memory, piece in zip(self._parts, block, strict=True):
            memory[row, :, start : start + self._block].copy_(piece, non_blocking=True)

    def _put(
        self,
        found: tuple[Tensor, Tensor],
        group: NDArray[np.int64],
        rows: NDArray[np.int64],
        place: NDArray[np.int64],
    ) -> None:
        """Write blocks (n, key heads, block, head_dim) into slots of groups."""
        device = self._parts[0].device
        at_row, at_place = torch.from_numpy(rows).to(device), torch.from_numpy(place).to(device)
        for memory, piece in zip(self._parts, found, strict=True):
            held = memory[:, :, self.sinks :].unflatten(2, (-1, self._block))
            if self._per_head:
                heads = memory.shape[1]
                head = torch.from_numpy(group % heads).to(device)
                own = torch.arange(len(piece), device=device)
                held[at_row, head, at_place] = piece[own, head // (heads // piece.shape[1])]
            else:
                held[at_row, :, at_place] = piece

    def note_attention(self, weights: Tensor, known: int, hot: HotBlocks) -> None:
        """Tell the hot blocks what those here received: weights (rows, heads, queries, length from the sinks on)."""
        used = min(self.chosen.shape[1], known)
        part = weights[..., self.sinks : self.sinks + used * self._block]
        mass = part.unflatten(-1, (used, self._block)).sum((2, 4)).cpu().numpy()
        mass = mass.reshape(len(self.chosen), -1, used).sum(1)
        blocks = self.chosen[:, :used]
        rows = np.repeat(self._rows(np.arange(len(blocks))), used)
        kept = blocks.ravel() >= 0
        hot.attended(blocks.ravel()[kept], rows[kept], mass.ravel()[kept])

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, each as often as it is named."""
        each = len(self.chosen) // len(self._parts[0])
        groups = (rows[:, None] * each + torch.arange(each)).flatten().numpy()
        self.chosen = self.chosen[groups].copy()
        self._parts = [memory[rows.to(memory.device)] for memory in self._parts]

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(int(memory.nbytes) for memory in self._parts)

    def _rows(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the batch that groups of slots belong to."""
        return groups // (len(self.chosen) // len(self._parts[0]))
