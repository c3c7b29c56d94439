"""Attaching a memory of one's own to every layer: it gets queries and keys without their rotation, and attends.

Every token is given position 0, where rotary embedding turns nothing, so that the model itself hands over what it
would turn; a memory then turns by the model's own frequencies to the distances that it wants. While a text fits the
window of the memory, nothing of this happens: the model attends as it does by itself, bit for bit.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from gratis.contract.attach import Scope
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.subjects.attention_door import added_to_first_token, check_attention, install_attention
from gratis.subjects.language import (
    Angles,
    Rotation,
    asking,
    input_device,
    language_model,
    rotations,
    text_config,
    uncompiled,
    window_of,
)
from gratis.subjects.reading_door import NO_GRADIENTS, Reading, install_reading

PROBE_LENGTH = 24
_CHANGES_LOGITS = ("s_aux", "softcap", "position_bias", "sliding_window", "window_size")


class LayerMemory(Protocol):
    """What one layer remembers of one text."""

    @property
    def keys(self) -> Tensor | None:
        """(batch, key heads, length, head_dim) of the latest entries."""
        ...

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        ...

    @property
    def bytes(self) -> int:
        """Memory held, files not counted."""
        ...

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep rotated entries of a text that fits the window; return all of them."""
        ...

    def watch(self, query: Tensor, scaling: float, first: Tensor | None = None) -> None:
        """See the rotated queries (batch, heads, length, head_dim) of what was just appended; `first` as in `read`."""
        ...

    def leave_window(self) -> None:
        """The text grows longer than the window: from now on `read` is called, and entries come without rotation."""
        ...

    def read(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, first: Tensor | None = None) -> Tensor:
        """The attention output (batch, heads, length, head_dim) of new tokens, which are remembered.

        first: (heads,) what is added to the logit of the text's first token.
        """
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, each as often as it is named."""
        ...

    def report(self) -> dict[str, Any]:
        """Plain values."""
        ...


class Text:
    """What the memories of one text's layers share: its length, the pass that is going on, the angles of positions."""

    def __init__(self) -> None:
        self.seen = 0
        self.prompt_end: int | None = None
        """Length at which a prompt of `generate` ends, None outside."""
        self._angles: dict[tuple[Any, ...], Angles] = {}
        self._masks: dict[tuple[int, int, int, int, bool, str], Tensor] = {}

    def angles(self, rotation: Rotation, start: int, stop: int, like: Tensor, scale: float = 1.0) -> Angles:
        """What turns entries to positions `start` to `stop`, made once for all layers."""
        key = (id(rotation), start, stop, like.dtype, like.device)
        return self._known(key, rotation, lambda: torch.arange(start, stop, dtype=torch.float64) * scale, like)

    def angles_of_heads(
        self, rotation: Rotation, stands: tuple[tuple[int, int], ...], like: Tensor, scale: float = 1.0
    ) -> Angles:
        """What turns the heads (rows, heads, 1, head_dim) of a single token, of which so many stand at each position.

        stands: (position, heads), in the order of the heads.
        """

        def shifts() -> Tensor:
            parts = [torch.full((heads, 1), position * scale, dtype=torch.float64) for position, heads in stands]
            return torch.cat(parts)

        return self._known((id(rotation), stands, like.dtype, like.device), rotation, shifts, like)

    def _known(self, key: tuple[Any, ...], rotation: Rotation, shifts: Callable[[], Tensor], like: Tensor) -> Angles:
        if key not in self._angles:
            if len(self._angles) > 64:
                self._angles.clear()
            self._angles[key] = rotation.angles(shifts(), like)
        return self._angles[key]

    def mask(
        self, queries: int, keys: int, offset: int, window: int, device: torch.device, *, outside: bool = False
    ) -> Tensor:
        """(queries, keys) 0 for keys inside the window of a query, or `outside` of it, -inf for the others.

        Query i is `offset + i - j` tokens behind key j; inside are those at 0 to `window - 1`.
        """
        key = (queries, keys, offset, window, outside, str(device))
        if key not in self._masks:
            if len(self._masks) >= 8:
                self._masks.clear()
            distance = offset + torch.arange(queries)[:, None] - torch.arange(keys)
            away = distance < window if outside else (distance < 0) | (distance >= window)
            self._masks[key] = torch.zeros(distance.shape).masked_fill_(away, -torch.inf).to(device)
        return self._masks[key]


class MemoryLayer(CacheLayerMixin):
    """One layer's memory where the model looks for its cache."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: MemoryCache, memory: LayerMemory) -> None:
        self._cache = weakref.ref(cache)
        self.memory = memory
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """(batch, key heads, length, head_dim) of the latest entries; None before the first."""
        return self.memory.keys

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        assert value is None, "the memory keeps the keys"

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self.memory.values

    @values.setter
    def values(self, value: Tensor | None) -> None:
        assert value is None, "the memory keeps the values"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # What keeps the text is the same for a compiled model, and nothing for a compiler to look into.
    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand new entries (batch, key heads, new, head_dim) on to whoever attends next."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache()
        assert cache is not None
        cache.asked = self.memory
        if cache.outgrown:
            return key_states, value_states
        return self.memory.append(key_states, value_states)

    @uncompiled
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        cache = self._cache()
        assert cache is not None
        return (query_length, 0) if cache.outgrown else (cache.text.seen + query_length, 0)

    @uncompiled
    def get_seq_length(self) -> int:
        cache = self._cache()
        return cache.text.seen if cache is not None else 0

    def get_max_length(self) -> int:
        return -1


class MemoryCache(Cache):
    """The memories of all layers, in the place of a cache. Pass it back to the model to go on with the same text."""

    def __init__(self, memories: list[LayerMemory], text: Text, method: str, window: int) -> None:
        super().__init__(layers=[])
        self.layers: list[Any] = [MemoryLayer(self, memory) for memory in memories]
        self.text, self.method, self.window = text, method, window
        self.outgrown = False
        """Whether the text is longer than the window."""
        self.padded = False
        self.asked: LayerMemory | None = None
        """The memory of the layer that is about to attend."""
        self.torn = False
        """Whether a pass over the text has begun and not ended."""

    @property
    def memories(self) -> list[LayerMemory]:
        """One per layer."""
        return [layer.memory for layer in self.layers]

    @property
    def bytes(self) -> int:
        """Memory held, files not counted."""
        return sum(memory.bytes for memory in self.memories)

    def outgrow(self) -> None:
        """Hand everything over to the memories."""
        for memory in self.memories:
            memory.leave_window()
        self.outgrown = True

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryCache:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            setattr(new, name, [] if name == "layers" else copy.deepcopy(value, memo))
        for layer in self.layers:
            twin = MemoryLayer(new, copy.deepcopy(layer.memory, memo))
            if layer.is_initialized:
                twin.dtype, twin.device, twin.is_initialized = layer.dtype, layer.device, True
            new.layers.append(twin)
        return new

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self._rows).repeat_interleave(repeats)
        for memory in self.memories:
            memory.select_rows(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(self._rows)[indices.cpu()]
        for memory in self.memories:
            memory.select_rows(rows)

    @property
    def _rows(self) -> int:
        keys = self.memories[0].keys
        return len(keys) if keys is not None else 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beams while the text fits the window; later it would copy all that is remembered. Raises InputError."""
        if self.outgrown:
            raise InputError(
                f"{self.method} keeps one memory per text and cannot follow beams: generate with num_beams=1."
            )
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused. Raises InputError unless there is nothing to remove."""
        if tokens_to_remove:
            raise InputError(
                f"{self.method} cannot take tokens back from its memory, which assisted generation needs: generate "
                "without an assistant."
            )

    def reset(self) -> None:
        """Refused: start a text with no cache instead. Raises InputError."""
        raise InputError(f"{self.method} starts a text with no cache: leave out past_key_values.")


MakeMemories = Callable[[list[Rotation], Text], list[LayerMemory]]


def check_memory(subject: Any, method: str, window: int, make: MakeMemories) -> None:
    """Raise SubjectError with the reason if layers of `subject` cannot be given memories, ParameterError for a window
    longer than the trained one.
    """
    model = language_model(subject, method)
    trained = window_of(model)
    if trained is not None and window > trained:
        raise ParameterError(f"{method}: window {window} is longer than the model's window of {trained} tokens.")
    turns = rotations(model, method)
    name = type(model).__name__
    if any(turn.in_values for turn in turns):
        raise SubjectError(f"{method} needs keys per head; the cache of this {name} keeps latents.")
    reached = check_attention(model, method)
    if any(one.local for one in reached):
        raise SubjectError(f"{method} needs layers that attend to the whole text; {name} has layers with a window.")
    if any(getattr(one.module, "is_causal", True) is False for one in reached):
        raise SubjectError(f"{method} needs causal attention; {name} attends in both directions.")
    if len(reached) != len(turns):
        raise SubjectError(f"{method} needs one attention per cache layer; {name} shares its layers' caches.")
    _compare(model, method, window, make)


@torch.no_grad()
def _compare(model: Any, method: str, window: int, make: MakeMemories) -> None:
    """Raise SubjectError unless memories that hold a short text whole compute what the model does by itself."""
    size = max(int(text_config(model).vocab_size), 2)
    length = min(PROBE_LENGTH, window)
    # Spread over the vocabulary: the first tokens are control tokens, on which half precision loses most digits.
    tokens = (torch.arange(1, length + 1, device=input_device(model)) * size // (length + 1))[None]
    plain = model(input_ids=tokens, use_cache=True).logits.float()
    scope = Scope()
    try:
        install_memory(model, method, 0, make, scope)
        through = model(input_ids=tokens, use_cache=True).logits.float()
    finally:
        scope.close()
    allowed = 1e-3 * plain.abs().max()
    if model.dtype in (torch.float16, torch.bfloat16):
        allowed = max(100 * allowed, 4 * (_shaken(model, tokens) - plain).abs().max())
    if not (through - plain).abs().max() <= allowed:
        raise SubjectError(
            f"{method} needs attention that depends on rotary distances alone; {type(model).__name__} computes "
            "something else when its keys are turned elsewhere."
        )


def _shaken(model: Any, tokens: Tensor) -> Tensor:
    """Logits after the embeddings were rounded otherwise: what few digits alone change, which can be anything."""
    embedded = model.get_input_embeddings()(tokens)
    signs = torch.arange(embedded.numel(), device=embedded.device).reshape(embedded.shape) % 2 * 2 - 1
    shaken = (embedded.double() * (1 + signs * torch.finfo(embedded.dtype).eps)).to(embedded.dtype)
    logits: Tensor = model(inputs_embeds=shaken, use_cache=True).logits.float()
    return logits


def install_memory(
    model: Any,
    method: str,
    window: int,
    make: MakeMemories,
    scope: Scope,
    reading: Reading | None = None,
) -> Callable[[], dict[str, Any]]:
    """Give every layer of `model` a memory for each text that it reads; return what reports on the last text.

    `make(rotations, text)` makes the memories of a text's layers. As long as the text is at most `window` tokens, the
    model attends as it does by itself. `reading` says how `generate` reads prompts.
    """
    passes = _Passes(model, method, window, make)
    if reading is not None:
        install_reading(model, reading, passes.here, scope)
    install_attention(model, method.lower(), uncompiled(passes.attend), scope, outermost=True)
    scope.hook(model.register_forward_pre_hook(uncompiled(passes.before), with_kwargs=True))
    scope.hook(model.register_forward_hook(uncompiled(passes.after), with_kwargs=True))
    return lambda: _report(passes.last) if passes.last is not None else {}


class _Passes:
    """What happens around and inside a model's forward passes: texts get their memories, layers attend to them."""

    def __init__(self, model: Any, method: str, window: int, make: MakeMemories) -> None:
        self._model, self._method, self._window, self._make = model, method, window, make
        self._turns = rotations(model, method)
        self._signature = inspect.signature(model.forward)
        self.here = threading.local()
        """Of this thread: `cache` and `count` of the pass that is going on, `prompt_end` of the call of generate."""
        self.last: MemoryCache | None = None
        """The memories of the text that was begun last."""

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a pass: find or make the text's memories, and give tokens position 0 once it outgrew the window."""
        here = self.here
        here.cache = None
        if asking.get():
            return args, kwargs
        if args:
            kwargs = {**self._signature.bind_partial(*args).arguments, **kwargs}
        if kwargs.get("output_attentions"):
            raise InputError(
                f"{self._method} has no weights over the whole text to return: leave out output_attentions."
            )
        uses = kwargs.get("use_cache")
        uses = uses if uses is not None else getattr(self._model.config, "use_cache", True)
        if kwargs.get("past_key_values") is None and not uses:
            return (), kwargs
        cache = self._memories(kwargs)
        given = kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        assert given is not None
        count = int(given.shape[1])
        self._outgrow(cache, count, kwargs.get("attention_mask"))
        if cache.outgrown:
            kwargs["attention_mask"] = None
            old = kwargs.get("position_ids")
            shape = (*old.shape[:-1], count) if old is not None else (1, count)
            kwargs["position_ids"] = torch.zeros(shape, dtype=torch.long, device=given.device)
        cache.text.prompt_end = getattr(here, "prompt_end", None)
        here.cache, here.count = cache, count
        cache.torn = True
        return (), kwargs

    def _memories(self, kwargs: dict[str, Any]) -> MemoryCache:
        """The memories that a call passes back, or new ones, put into its arguments. Raises InputError."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, MemoryCache):
            _refuse_foreign(cache, self._method)
            text = Text()
            cache = MemoryCache(self._make(self._turns, text), text, self._method, self._window)
            self.last = cache
            kwargs["past_key_values"], kwargs["use_cache"] = cache, True
        elif cache.method != self._method:
            raise InputError(f"This cache was filled under {cache.method}: start the text again under {self._method}.")
        if cache.torn:
            raise InputError(
                f"{self._method} was interrupted while it read into this memory, which holds a part of the last piece: "
                "start the text again, without it."
            )
        return cache

    def _outgrow(self, cache: MemoryCache, count: int, mask: Any) -> None:
        """Hand over to the memories where `count` tokens more exceed the window. Raises InputError for padded rows."""
        if count > 1 and mask is not None:
            cache.padded = mask.dim() == 2 and not bool(mask.all())
        if cache.outgrown or cache.text.seen + count <= self._window:
            return
        if cache.padded:
            raise InputError(
                f"{self._method} counts distances in tokens, so rows padded to unequal lengths cannot outgrow its window "
                f"of {self._window}: pass prompts of one length, or one at a time."
            )
        cache.outgrow()

    def attend(
        self, inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        """Inside a layer: attend by its memory, or watch the model attend while the text fits the window."""
        cache = getattr(self.here, "cache", None)
        if cache is None:
            return inner(module, query, key, value, mask, **kwargs)
        if key.requires_grad:
            raise InputError(NO_GRADIENTS.format(method=self._method))
        memory, cache.asked = cache.asked, None
        changed = next((name for name in _CHANGES_LOGITS if kwargs.get(name) is not None), None)
        if memory is None or changed is not None:
            raise SubjectError(
                f"{self._method} needs plain attention over each layer's cache; {type(self._model).__name__} "
                + (f"attends with {changed}." if changed is not None else "attends to something else.")
            )
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        first = added_to_first_token(module)
        first = None if first is None else first[: query.shape[1]].to(query.device)
        if cache.outgrown:
            return memory.read(query, key, value, scaling, first).transpose(1, 2).contiguous(), None
        output = inner(module, query, key, value, mask, **kwargs)
        memory.watch(query, scaling, first)
        return output

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a pass: its tokens are part of the text."""
        cache = getattr(self.here, "cache", None)
        if cache is not None:
            cache.text.seen += self.here.count
            self.here.cache, cache.torn = None, False


def _report(cache: MemoryCache) -> dict[str, Any]:
    layers = [memory.report() for memory in cache.memories]
    summed = {name: sum(layer[name] for layer in layers) for name in layers[0] if not isinstance(layers[0][name], list)}
    listed = {name: [layer[name] for layer in layers] for name in layers[0] if isinstance(layers[0][name], list)}
    return {"tokens_seen": cache.text.seen, "outgrown": cache.outgrown, **summed, **listed}


def _refuse_foreign(cache: Any, method: str) -> None:
    plain = type(cache) is DynamicCache and not cache.offloading
    plain = plain and all(type(layer) is DynamicLayer for layer in cache.layers)
    if cache is None or (plain and cache.get_seq_length() == 0):
        return
    if plain:
        raise InputError(
            f"{method} must see a text from its start: pass no cache, or the one that an earlier call under {method} "
            "returned."
        )
    raise InputError(
        f"{method} keeps its own memory and cannot use a {type(cache).__name__}: leave out past_key_values and "
        "cache_implementation."
    )
