"""A key-value cache that stays within a budget, behind the door that transformers keeps for caches.

A method says which entries to keep; this file keeps them. Memory is one block per group of equal layers, written in
place. Evicting moves a handful of entries and turns either those before or those after the gap, whichever are fewer:
attention does not see the order of keys in memory, and rotary attention sees only differences of positions.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from gratis.contract.attach import Scope
from gratis.contract.errors import InputError, ParameterError
from gratis.subjects.language import CachedLayer, Rotation, asking, cached_layers, language_model, uncompiled, window_of
from gratis.subjects.memory_need import Footprint
from gratis.subjects.reading_door import NO_GRADIENTS, Reading, install_reading


@dataclass(frozen=True)
class Selection:
    """Which of `length` slots are kept: the first `prefix`, then `middle`, then the last `suffix`, in this order."""

    length: int
    prefix: int
    middle: Tensor
    """(layers, count) slots, ascending per layer; one row where all layers keep the same."""
    suffix: int

    @property
    def kept(self) -> int:
        """Slots that remain."""
        return self.prefix + self.middle.shape[1] + self.suffix

    def indices(self, layers: int) -> Tensor:
        """(layers, kept) slots, in the order in which they are kept."""
        first = torch.arange(self.prefix).expand(layers, -1)
        last = torch.arange(self.length - self.suffix, self.length).expand(layers, -1)
        return torch.cat([first, self.middle.expand(layers, -1), last], dim=1)


class Eviction(Protocol):
    """The state of one cache's eviction rule."""

    def select(self, length: int) -> list[Selection]:
        """What to keep when every layer holds `length` entries: selections applied one after the other, or none."""
        ...


@dataclass
class CacheReport:
    """What happened to a cache, readable after it is gone."""

    compactions: int = 0
    seen: int = 0
    stored: int = 0
    peak_bytes: int = 0
    tokens: NDArray[np.int32] | None = None
    """(layers, capacity) positions in the text of what is stored."""

    def values(self) -> dict[str, Any]:
        """Plain values for a report."""
        held = self.tokens[:, : self.stored] if self.tokens is not None else np.empty(0)
        return {
            "tokens_seen": self.seen,
            "entries_per_layer": self.stored,
            "distinct_tokens": len(np.unique(held)),
            "compactions": self.compactions,
            "peak_cache_bytes": self.peak_bytes,
        }


@dataclass
class _Block:
    """Keys and values of layers that have the same shape: (layers, batch, heads, capacity, head_dim)."""

    keys: Tensor
    values: Tensor
    precise: Tensor | None
    """float32 keys where `keys` have fewer digits: they are turned again and again."""
    rotations: list[Rotation]
    layers: list[int]
    groups: list[tuple[Rotation, slice]] = field(default_factory=list)

    def __post_init__(self) -> None:
        start = 0
        for i in range(1, len(self.rotations) + 1):
            if i == len(self.rotations) or self.rotations[i] is not self.rotations[start]:
                self.groups.append((self.rotations[start], slice(start, i)))
                start = i

    def turn(self, columns: slice, shift: int) -> None:
        """Turn the keys of these entries by `shift` positions, in all layers."""
        if columns.stop <= columns.start:
            return
        keys = self.precise if self.precise is not None else self.keys
        for rotation, rows in self.groups:
            rotation.turn_(keys[rows, :, :, columns], shift)
        if self.precise is not None:
            self.keys[:, :, :, columns] = self.precise[:, :, :, columns].to(self.keys.dtype)

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether a layer with these new entries can live here."""
        return (
            self.keys.shape[1:3] == keys.shape[:2]
            and self.keys.shape[4] == keys.shape[3]
            and self.values.shape[4] == values.shape[3]
            and self.keys.dtype == keys.dtype
            and self.keys.device == keys.device
        )

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(t.nbytes for t in (self.keys, self.values, self.precise) if t is not None)


class BoundedLayer(CacheLayerMixin):
    """One layer's window on the cache's memory."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: BoundedCache, index: int) -> None:
        self._cache = weakref.ref(cache)
        self._index = index
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """(batch, heads, stored, head_dim) as they are in memory, which is not their order; None before the first."""
        return self._held()[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        assert value is None, "the cache keeps the keys"

    @property
    def values(self) -> Tensor | None:
        """(batch, heads, stored, head_dim), as `keys`."""
        return self._held()[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        assert value is None, "the cache keeps the values"

    def _held(self) -> tuple[Tensor | None, Tensor | None]:
        cache = self._cache()
        found = cache.held(self._index) if cache is not None else None
        if cache is None or found is None:
            return None, None
        return found[::-1] if cache.turns[self._index].in_values else found

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # What keeps the text is the same for a compiled model, and nothing for a compiler to look into.
    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(batch, heads, new, head_dim)` and return all keys and values of the layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache()
        assert cache is not None
        if cache.turns[self._index].in_values:
            return cache.append(self._index, value_states, key_states)[::-1]
        return cache.append(self._index, key_states, value_states)

    @uncompiled
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        cache = self._cache()
        assert cache is not None
        return cache.stored + query_length, cache.seen - cache.stored

    @uncompiled
    def get_seq_length(self) -> int:
        cache = self._cache()
        return cache.seen if cache is not None else 0

    def get_max_length(self) -> int:
        return -1


class BoundedCache(Cache):
    """A cache of `layers` equal lengths that evicts by a rule after every forward pass.

    `get_seq_length()` is the number of tokens seen; `stored` is how many each layer holds. Pass it back to the model
    to go on with the same text.
    """

    def __init__(self, eviction: Eviction, layers: list[CachedLayer], window: int | None, method: str) -> None:
        super().__init__(layers=[])
        self.layers: list[Any] = [BoundedLayer(self, index) for index in range(len(layers))]
        self.method = method
        self.stored = 0
        self.seen = 0
        self.padded = False
        """Whether rows were padded to unequal lengths."""
        self.report = CacheReport()
        self.turns = [layer.rotation for layer in layers]
        self._alike = _alike(layers)
        self._eviction, self._window = eviction, window
        self._torn = False
        self._base = 0
        self._pending = 0
        self._blocks: list[_Block] = []
        self._place: dict[int, tuple[_Block, int]] = {}
        self._order = np.empty(0, dtype=np.int64)

    @property
    def evicted(self) -> bool:
        """Whether slots differ from positions in the text."""
        return self.seen != self.stored

    def positions(self, count: int) -> Tensor:
        """(count,) rotary positions of the next tokens."""
        return torch.arange(self._base + self.stored, self._base + self.stored + count)

    def begin(self, count: int) -> None:
        """Announce a forward pass of `count` tokens, so that no position passes the trained window.

        Raises InputError where that needs shorter pieces of text, or where evicting was interrupted.
        """
        if self._torn:
            raise InputError(
                f"{self.method} was interrupted while it evicted from this cache: start the text again, without it."
            )
        if self._window is not None and self.seen and self.stored + count > self._window:
            raise InputError(
                f"{self.method} holds {self.stored} entries of a window of {self._window} and cannot read {count} "
                f"tokens more at once: pass pieces of at most {max(self._window - self.stored, 1)} tokens."
            )
        self._pending = count
        if self._base and self._window is not None and self._base + self.stored + count > self._window:
            self._torn = True
            for block in self._blocks:
                block.turn(slice(0, self.stored), -self._base)
            self._base, self._torn = 0, False

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new entries and return views of all of them."""
        if keys.requires_grad:
            raise InputError(NO_GRADIENTS.format(method=self.method))
        end = self.stored + keys.shape[-2]
        if layer not in self._place or not self._place[layer][0].fits(keys, values):
            self._add_block(layer, keys, values, end)
        block, row = self._place[layer]
        if block.keys.shape[-2] < end:
            self._resize(block, end + end // 4 + 64)
        block.keys[row, :, :, self.stored : end] = keys
        block.values[row, :, :, self.stored : end] = values
        if block.precise is not None:
            block.precise[row, :, :, self.stored : end] = keys
        return block.keys[row, :, :, :end], block.values[row, :, :, :end]

    def held(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Views of what a layer holds, None before its first entries."""
        if layer not in self._place:
            return None
        block, row = self._place[layer]
        return block.keys[row, :, :, : self.stored], block.values[row, :, :, : self.stored]

    def finish(self, count: int) -> None:
        """Count the forward pass that just ended and evict what the rule evicts."""
        self._order = np.concatenate([self._order, np.arange(self.stored, self.stored + count)])
        self._note_tokens(count)
        self.stored += count
        self.seen += count
        self.report.peak_bytes = max(self.report.peak_bytes, sum(block.bytes for block in self._blocks))
        chosen = self._eviction.select(self.stored)
        self._torn = bool(chosen)
        for selection in chosen:
            self._apply(selection)
            self.report.compactions += 1
        self._torn = False
        self.report.seen, self.report.stored = self.seen, self.stored
        self._shrink()

    def _note_tokens(self, count: int) -> None:
        tokens, end = self.report.tokens, self.stored + count
        if tokens is None or tokens.shape[1] < end:
            grown = np.zeros((len(self.layers), end + end // 4 + 64), dtype=np.int32)
            if tokens is not None:
                grown[:, : self.stored] = tokens[:, : self.stored]
            self.report.tokens = tokens = grown
        tokens[:, self.stored : end] = np.arange(self.seen, self.seen + count, dtype=np.int32)

    def _add_block(self, layer: int, keys: Tensor, values: Tensor, end: int) -> None:
        """Memory for this layer and, where it is the first of its kind, for all that are alike, on their device."""
        alike = next(group for group in self._alike if layer in group)
        rows = alike if layer == alike[0] else [layer]
        room = end + 64

        def memory(like: Tensor, dtype: torch.dtype) -> Tensor:
            batch, heads, _, dim = like.shape
            return torch.empty(len(rows), batch, heads, room, dim, dtype=dtype, device=like.device)

        exact = keys.dtype in (torch.float32, torch.float64)
        block = _Block(
            memory(keys, keys.dtype),
            memory(values, values.dtype),
            None if exact else memory(keys, torch.float32),
            [self.turns[row] for row in rows],
            rows,
        )
        self._blocks.append(block)
        for row, other in enumerate(rows):
            self._place[other] = (block, row)

    def _resize(self, block: _Block, room: int) -> None:
        def resized(old: Tensor) -> Tensor:
            new = torch.empty(*old.shape[:3], room, old.shape[4], dtype=old.dtype, device=old.device)
            new[..., : self.stored, :] = old[..., : self.stored, :]
            return new

        keys, values = resized(block.keys), resized(block.values)
        precise = None if block.precise is None else resized(block.precise)
        block.keys, block.values, block.precise = keys, values, precise

    def _shrink(self) -> None:
        needed = self.stored + max(self._pending, 64) + 64
        for block in self._blocks:
            if self.evicted and block.keys.shape[-2] > needed + needed // 2:
                self._resize(block, needed)

    def _apply(self, chosen: Selection) -> None:
        """Keep `chosen`: a few moves in memory, then one turn of the smaller side of the gap."""
        count, kept = chosen.middle.shape[1], chosen.kept
        head, removed = chosen.prefix + count, chosen.length - kept
        if not removed:
            return
        assert bool((self._order[: chosen.prefix] == np.arange(chosen.prefix)).all()), "a prefix is kept in order"
        suffix = self._order[chosen.length - chosen.suffix :]
        inside = (suffix >= head) & (suffix < kept)
        free = np.ones(kept - head, dtype=bool)
        free[suffix[inside] - head] = False
        moves = _Moves(suffix[~inside], np.flatnonzero(free) + head)
        source = self._order[chosen.middle.numpy()]
        shift = np.arange(chosen.prefix, head) - chosen.middle.numpy()
        turn_head = head <= chosen.suffix
        tokens = self.report.tokens
        assert tokens is not None
        for block in self._blocks:
            rows = source[block.layers] if len(source) > 1 else source
            shifts = shift[block.layers] if len(shift) > 1 else shift
            _move(block, rows, shifts, slice(chosen.prefix, head), moves)
            if turn_head:
                block.turn(slice(0, head), removed)
            else:
                block.turn(slice(head, kept), -removed)
        middle = np.take_along_axis(tokens, np.broadcast_to(source, (len(tokens), count)), 1) if count else None
        tokens[:, moves.free] = tokens[:, moves.movers]
        if middle is not None:
            tokens[:, chosen.prefix : head] = middle
        moved = suffix.copy()
        moved[~inside] = moves.free
        self._order = np.concatenate([np.arange(head), moved])
        self.stored = kept
        if turn_head:
            self._base += removed

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each_row(lambda tensor: tensor.index_select(1, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda tensor: tensor.repeat_interleave(repeats, dim=1))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_row(lambda tensor: tensor[:, indices])

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        for block in self._blocks:
            block.keys, block.values = change(block.keys), change(block.values)
            if block.precise is not None:
                block.precise = change(block.precise)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: evicted entries cannot come back. Raises InputError unless there is nothing to remove."""
        if tokens_to_remove:
            raise InputError(
                f"{self.method} cannot take tokens back from its cache, which assisted generation needs: "
                "generate without an assistant."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedCache:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            setattr(new, name, [] if name == "layers" else copy.deepcopy(value, memo))
        for layer in self.layers:
            twin = BoundedLayer(new, layer._index)
            if layer.is_initialized:
                twin.dtype, twin.device, twin.is_initialized = layer.dtype, layer.device, True
            new.layers.append(twin)
        return new

    def reset(self) -> None:
        self.stored = self.seen = self._base = 0
        self._blocks, self._place, self._order = [], {}, self._order[:0]
        for layer in self.layers:
            layer.is_initialized = False


@dataclass(frozen=True)
class _Moves:
    """Entries that move to the places of evicted ones."""

    movers: NDArray[np.int64]
    free: NDArray[np.int64]

    def apply(self, tensor: Tensor) -> None:
        """Copy (…, movers, head_dim) to (…, free, head_dim)."""
        if len(self.movers) == 1:
            tensor[:, :, :, self.free[0]] = tensor[:, :, :, self.movers[0]]
        elif len(self.movers):
            movers, free = (torch.from_numpy(places).to(tensor.device) for places in (self.movers, self.free))
            tensor[:, :, :, free] = tensor[:, :, :, movers]


def _move(block: _Block, rows: NDArray[np.int64], shifts: NDArray[np.int64], head: slice, moves: _Moves) -> None:
    """Move entries to free places, and what each layer keeps of the middle to `head`, turned to its new slots."""
    layers = block.keys.shape[0]
    turned = block.precise if block.precise is not None else block.keys
    middle = values = None
    if head.stop > head.start:
        index = torch.from_numpy(rows).to(turned.device).expand(layers, -1)[:, None, None, :, None]
        index = index.expand(layers, *turned.shape[1:3], index.shape[3], 1)
        middle = turned.gather(3, index.expand(*index.shape[:4], turned.shape[4]))
        values = block.values.gather(3, index.expand(*index.shape[:4], block.values.shape[4]))
        turns = torch.from_numpy(shifts).expand(layers, -1)[:, None, None, :]
        for rotation, group in block.groups:
            rotation.turn_(middle[group], turns[group])
    for tensor in (block.keys, block.values, block.precise):
        if tensor is not None:
            moves.apply(tensor)
    if middle is not None and values is not None:
        block.values[:, :, :, head] = values
        block.keys[:, :, :, head] = middle.to(block.keys.dtype)
        if block.precise is not None:
            block.precise[:, :, :, head] = middle


def check_bounded_cache(subject: Any, method: str, budget: int) -> int:
    """Number of layers of the cache, if it can be bounded to `budget` entries.

    Raises SubjectError with the reason if it cannot, ParameterError if the budget is longer than the trained window.
    """
    model = language_model(subject, method)
    window = window_of(model)
    if window is not None and budget > window:
        raise ParameterError(f"{method}: budget {budget} is longer than the model's window of {window} tokens.")
    return len(cached_layers(model, method))


def bounded_footprint(model: Any, method: str, budget: int, piece: int | None, rows: int, tokens: int) -> Footprint:
    """What `rows` texts of `tokens` tokens take at most under a budget, read `piece` tokens at a time or at once."""
    return _footprint(cached_layers(model, method), model.dtype, budget, piece, rows, tokens)


def _footprint(
    layers: list[CachedLayer], dtype: torch.dtype, budget: int, piece: int | None, rows: int, tokens: int
) -> Footprint:
    entries = tokens if piece is None else min(tokens, budget + piece)
    # Memory grows by a quarter at a time; keys with few digits are kept in float32 besides.
    room = entries + min(entries, budget) // 4 + 64
    exact = dtype in (torch.float32, torch.float64)
    each = sum(
        dtype.itemsize * layer.numbers
        + (0 if exact else 4 * layer.heads * (layer.value_dim if layer.rotation.in_values else layer.key_dim))
        for layer in layers
    )
    return Footprint(device=rows * room * each)


def _alike(layers: list[CachedLayer]) -> list[list[int]]:
    """Layers that can share memory: of one shape and on one device."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        kind = (layer.heads, layer.key_dim, layer.value_dim, layer.rotation.in_values, str(layer.device))
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def install_bounded_cache(
    model: Any,
    method: str,
    budget: int,
    chunk: int | None,
    begin: Callable[[int, int], Eviction],
    scope: Scope,
) -> Callable[[], dict[str, Any]]:
    """Make every text that `model` reads use a bounded cache, and return a function that reports on the last one.

    `begin(layers, length)` starts the eviction rule of one cache; `length` is that of the prompt given to generate, or
    of the first piece of a text. Caches are made at the first forward pass of a text (an empty or absent
    `past_key_values`); a cache that the model returned goes on where it was. `generate` reads prompts `chunk` tokens at
    a time, and those longer than the trained window in pieces in any case.
    """
    layers, window, dtype = cached_layers(model, method), window_of(model), model.dtype
    signature = inspect.signature(model.forward)
    here = threading.local()
    last: list[CacheReport] = []

    @uncompiled
    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if asking.get():
            return args, kwargs
        if args:
            kwargs = {**signature.bind_partial(*args).arguments, **kwargs}
        cache = kwargs.get("past_key_values")
        uses = kwargs.get("use_cache")
        if cache is None and not (uses if uses is not None else getattr(model.config, "use_cache", True)):
            return (), kwargs
        given = kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        assert given is not None
        count = int(given.shape[1])
        if not isinstance(cache, BoundedCache):
            _refuse_foreign(cache, method)
            length = getattr(here, "prompt_end", None) or count
            cache = BoundedCache(begin(len(layers), length), layers, window, method)
            last[:] = [cache.report]
            kwargs["past_key_values"] = cache
            kwargs["use_cache"] = True
        elif cache.method != method:
            raise InputError(f"This cache was filled under {cache.method}: start the text again under {method}.")
        cache.begin(count)
        mask = kwargs.get("attention_mask")
        if count > 1 and mask is not None:
            cache.padded = mask.dim() == 2 and not bool(mask.all())
        if cache.evicted:
            if cache.padded:
                raise InputError(_UNEQUAL.format(method=method))
            kwargs["attention_mask"] = None
            places = cache.positions(count).to(given.device)
            old = kwargs.get("position_ids")
            kwargs["position_ids"] = places.expand(*(old.shape[:-1] if old is not None else (1,)), -1)
        return (), kwargs

    @uncompiled
    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, BoundedCache) and not asking.get():
            cache.finish(cache._pending)
            if cache.evicted and cache.padded:
                raise InputError(_UNEQUAL.format(method=method))

    def footprint(rows: int, tokens: int) -> Footprint:
        piece = chunk if chunk is not None or window is None or tokens <= window else window
        return _footprint(layers, dtype, budget, piece, rows, tokens)

    spare = None if window is None else max(window - budget - len(layers), 1)
    advice = "lower budget, or read in pieces with chunk" if chunk is None else "lower budget or chunk"
    install_reading(
        model, Reading(method, budget, chunk, True, footprint, advice, spare=spare), here, scope
    )  # fmt: skip
    scope.hook(model.register_forward_pre_hook(before, with_kwargs=True))
    scope.hook(model.register_forward_hook(after, with_kwargs=True))
    return lambda: last[0].values() if last else CacheReport().values()


_UNEQUAL = (
    "{method} evicts the same slots in every row, so rows padded to unequal lengths cannot be evicted from: "
    "pass prompts of one length, or one at a time."
)


def _refuse_foreign(cache: Any, method: str) -> None:
    plain = type(cache) is DynamicCache and not cache.offloading
    plain = plain and all(type(layer) is DynamicLayer for layer in cache.layers)
    if cache is None or (plain and cache.get_seq_length() == 0):
        return
    if plain:
        raise InputError(
            f"{method} must see a text from its start: pass an empty cache, or the one that an earlier call under "
            f"{method} returned."
        )
    raise InputError(
        f"{method} keeps its own cache and cannot use a {type(cache).__name__}: leave out past_key_values and "
        "cache_implementation."
    )
