"""The latest keys and values of one layer, side by side in memory that grows with them and is used again."""

from __future__ import annotations

import torch
from torch import Tensor


class RecentEntries:
    """Keys as they are attended to (turned to their positions), keys as they came, values, and a score per query head.

    Entries are named by their positions in the text: those from `first` to `end` are held. Keys as they came are kept
    once `keep_plain` was called; until then the text is read from its start and nothing is forgotten.
    """

    def __init__(self, window: int, block: int) -> None:
        self.first = self.end = 0
        self._spare = window + 2 * block
        """Entries of room beyond what is held, once older ones are forgotten."""
        self._window = window
        self._origin = 0
        """Position of the entry at the start of the memory."""
        self._turned: Tensor | None = None
        self._plain: Tensor | None = None
        self._values: Tensor | None = None
        self._scores: Tensor | None = None
        self.keeps_plain = False

    @property
    def empty(self) -> bool:
        """Whether nothing came yet."""
        return self._turned is None

    def turned(self, begin: int, stop: int) -> Tensor:
        """(rows, key heads, stop - begin, head_dim) keys turned to their positions."""
        assert self._turned is not None
        return self._turned[:, :, begin - self._origin : stop - self._origin]

    def plain(self, begin: int, stop: int) -> Tensor:
        """(rows, key heads, stop - begin, head_dim) keys at position 0."""
        assert self._plain is not None
        return self._plain[:, :, begin - self._origin : stop - self._origin]

    def values(self, begin: int, stop: int) -> Tensor:
        """(rows, key heads, stop - begin, head_dim)."""
        assert self._values is not None
        return self._values[:, :, begin - self._origin : stop - self._origin]

    def scores(self, begin: int, stop: int) -> Tensor:
        """(rows, query heads, stop - begin) float32."""
        assert self._scores is not None
        return self._scores[:, :, begin - self._origin : stop - self._origin]

    def append(self, turned: Tensor, values: Tensor, plain: Tensor | None = None) -> None:
        """Add entries (rows, key heads, new, head_dim) at the end; `plain` where such keys are kept."""
        self._make_room(turned, values)
        begin, self.end = self.end, self.end + turned.shape[2]
        self.turned(begin, self.end).copy_(turned)
        self.values(begin, self.end).copy_(values)
        if plain is not None:
            self.plain(begin, self.end).copy_(plain)

    def score(self, received: Tensor, begin: int, stop: int) -> None:
        """Add to the scores of entries (rows, query heads, stop - begin)."""
        if self._scores is None:
            assert self._turned is not None
            shape = (*received.shape[:2], self._turned.shape[2])
            self._scores = torch.zeros(shape, dtype=torch.float32, device=received.device)
        self.scores(begin, stop).add_(received)

    def keep_plain(self) -> None:
        """Keep keys as they came besides, from now on; those that are held are to be filled in."""
        self.keeps_plain = True
        if self._turned is not None:
            self._plain = torch.empty_like(self._turned)

    def forget(self, stop: int) -> None:
        """Let go of entries before `stop`."""
        self.first = stop

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, each as often as it is named."""
        for name in ("_turned", "_plain", "_values", "_scores"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[rows.to(held.device)])

    @property
    def bytes(self) -> int:
        """Memory held."""
        held = (self._turned, self._plain, self._values, self._scores)
        return sum(int(tensor.nbytes) for tensor in held if tensor is not None)

    def _make_room(self, keys: Tensor, values: Tensor) -> None:
        """Memory for these entries behind those held, which move to the front when its end is reached."""
        new = keys.shape[2]
        needed = self.end - self.first + new
        if self._turned is None or self._values is None:
            room = needed + (self._spare if self.keeps_plain else 64)
            self._turned = keys.new_empty(*keys.shape[:2], room, keys.shape[3])
            self._values = values.new_empty(*values.shape[:2], room, values.shape[3])
            self._plain = torch.empty_like(self._turned) if self.keeps_plain else None
        if self.end - self._origin + new <= self._turned.shape[2]:
            return
        room = self._turned.shape[2]
        if self.keeps_plain:
            # After a long piece less is needed than it took.
            room = min(room, 2 * needed + self._spare)
        if needed + self._window // 2 > room:
            room = needed + max(needed // 4, self._window if self.keeps_plain else 64)
        held, old = self.end - self.first, slice(self.first - self._origin, self.end - self._origin)
        for name in ("_turned", "_plain", "_values", "_scores"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            fresh = tensor.new_zeros if name == "_scores" else tensor.new_empty
            moved = fresh((*tensor.shape[:2], room, *tensor.shape[3:]))
            moved[:, :, :held] = tensor[:, :, old]
            setattr(self, name, moved)
        self._origin = self.first
