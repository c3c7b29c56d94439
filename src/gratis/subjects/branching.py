"""One text that goes on in several ways: branches read the same prefix, and one of them is kept.

Where the model allows it, all branches are one row: a branch's token attends to the prefix and to its own branch, said
by the attention mask that transformers accepts, so the prefix is held once and read once per step. Elsewhere branches
are rows of a copied cache, or, where rows of a cache cannot be repeated, follow each other with a copy each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils.generic import ModelOutput

from gratis.contract.attach import Scope
from gratis.contract.errors import InputError, SubjectError
from gratis.subjects.attention_door import implementation_below, install_attention
from gratis.subjects.growing_cache import GrowingLayer
from gratis.subjects.language import text_config
from gratis.subjects.sampling_loop import can_repeat

Draw = Callable[[list[int], Tensor, Tensor], Tensor]
"""`draw(branches, ids, logits)`: the next token (count,) of each of the branches that are still open.

ids: (count, length) their texts; logits: (count, vocabulary) raw, float32.
"""
Done = Callable[[Tensor], Tensor]
"""`done(ids)`: which of the texts (count, length) end with their last token; (count,) bool."""
Worth = Callable[[int], float]
"""`worth(branch)` of a branch that is complete: the highest is kept, the first of equal ones."""


@torch.no_grad()
def check_continues(model: Any, method: str) -> None:
    """Raise SubjectError where a model cannot read several tokens at once after what its cache holds."""
    if model.config.is_encoder_decoder:
        return
    tokens = torch.ones(1, 3, dtype=torch.long, device=model.device)
    read = model(input_ids=tokens[:, :1])
    cache = next((held for name in ALL_CACHE_NAMES if (held := getattr(read, name, None)) is not None), None)
    if not isinstance(cache, Cache):
        return
    try:
        model(input_ids=tokens[:, 1:], past_key_values=cache, use_cache=True)
    except (AssertionError, ValueError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SubjectError(
            f"{method} reads several tokens at once after a cache; {type(model).__name__} cannot: {first}."
        ) from error


class Text:
    """A text of one row while it is generated: its tokens, and what the model needs to go on with it."""

    def __init__(self, model: Any, ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        self.model, self.ids = model, ids
        self.passes = 0
        """Forward passes so far."""
        self.read_tokens = 0
        """Tokens that went through the model, those of dropped branches included."""
        self._config, self._kwargs = generation_config, model_kwargs
        embeddings = model_kwargs.get("inputs_embeds")
        self._pending = ids.shape[1] if embeddings is None else embeddings.shape[1]
        self._started = False
        self._heeds: bool | None = None

    @property
    def cache(self) -> Any:
        """What the model remembers of the text, None where it keeps nothing."""
        return next((self._kwargs[name] for name in ALL_CACHE_NAMES if self._kwargs.get(name) is not None), None)

    @torch.no_grad()
    def read(self) -> Tensor:
        """Read the tokens that the model has not seen; returns the logits (1, vocabulary) of the next, in float32."""
        cached = self.cache is not None
        if not self._started:
            outputs = self.model._prefill(self.ids, self._config, self._kwargs)
            self._started = True
        else:
            inputs = self.model.prepare_inputs_for_generation(
                self.ids, next_sequence_length=self._pending if cached else None, **self._kwargs
            )
            outputs = self.model(**inputs, return_dict=True)
        self.passes += 1
        self.read_tokens += self._pending if cached else self.ids.shape[1]
        self._kwargs.update(_memory(outputs))
        self._pending = 0
        logits: Tensor = outputs.logits[:, -1].to(torch.float32, copy=True)
        return logits

    def append(self, tokens: Tensor, read: int = 0) -> None:
        """Put tokens (count,) at the end; the model has read the first `read` of them."""
        self.ids = torch.cat([self.ids, tokens[None].to(self.ids)], dim=1)
        self._pending = self._pending + len(tokens) - read
        for _ in range(len(tokens)):
            self._kwargs = self._updated(self._kwargs)

    def catch_up(self) -> None:
        """Read all but the last token, as after ordinary decoding; for a cache that is handed out."""
        for layer in getattr(self.cache, "layers", ()):
            if type(layer) is GrowingLayer:
                layer.become_plain()
        if self._pending < 2 or self.cache is None:
            return
        last, self.ids = self.ids[0, -1:], self.ids[:, :-1]
        prefix = "decoder_" if self.model.config.is_encoder_decoder else ""
        for name in ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"):
            if isinstance(value := self._kwargs.get(prefix + name), Tensor):
                self._kwargs[prefix + name] = value[..., :-1]
        self._pending -= 1
        self.read()
        self.append(last)

    @torch.no_grad()
    def branch(
        self, first: Tensor, draw: Draw, done: Done, worth: Worth, together: int | None = None
    ) -> tuple[int, list[Tensor]]:
        """Go on from each of the tokens `first` (branches,) until `done`, and keep the branch that is worth most.

        At most `together` branches (None: all) are decoded at once where they are copies. Returns the index of the
        branch that was kept and the tokens of each. Raises InputError for a cache that cannot be copied.
        """
        cache = self.cache
        if isinstance(cache, StaticCache):
            raise InputError(
                f"Branches copy the cache, and a {type(cache).__name__} is preallocated: leave out cache_implementation."
            )
        if self._shares(cache):
            return self._shared(first, draw, done, worth)
        repeats = cache is None or can_repeat(cache) or _repeats_both(cache)
        if not repeats or len(first) == 1:
            return self._one_by_one(first, draw, done, worth)
        texts: list[Tensor] = []
        for start in range(0, len(first), together or len(first)):
            rows = list(range(start, min(start + (together or len(first)), len(first))))
            texts += self._copied(rows, first[rows], draw, done, copy.deepcopy(cache))[0]
        kept = _best(worth, len(first))
        self.append(texts[kept])
        return kept, texts

    def _copied(
        self, rows: list[int], first: Tensor, draw: Draw, done: Done, cache: Any
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """The tokens of the branches `rows`, decoded as a batch on `cache`, and the model's memory of them."""
        model, count, start = self.model, len(rows), self.ids.shape[1]
        names = [name for name in ALL_CACHE_NAMES if self._kwargs.get(name) is not None]
        ids, kwargs = model._expand_inputs_for_generation(
            input_ids=self.ids,
            expand_size=count,
            is_encoder_decoder=model.config.is_encoder_decoder,
            **{name: value for name, value in self._kwargs.items() if name not in names},
        )
        if cache is not None:
            if count > 1:
                cache.batch_repeat_interleave(count)
            kwargs.update(dict.fromkeys(names, cache))
        ids = torch.cat([ids, first[:, None].to(ids)], dim=1)
        lengths = torch.where(done(ids), 1, 0)
        while not bool(lengths.all()):
            kwargs = self._updated(kwargs)
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=None if cache is None else 1, **kwargs
            )
            outputs = model(**inputs, return_dict=True)
            kwargs.update(_memory(outputs))
            self.passes += 1
            self.read_tokens += count * (ids.shape[1] if cache is None else 1)
            active = (lengths == 0).nonzero()[:, 0]
            logits = outputs.logits[active.to(outputs.logits.device), -1].float().to(ids.device)
            tokens = ids[:, -1].clone()
            tokens[active] = draw([rows[row] for row in active.tolist()], ids[active], logits).to(ids)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            ended = active[done(ids[active])]
            lengths[ended] = ids.shape[1] - start
        return [row[start : start + length] for row, length in zip(ids, lengths.tolist(), strict=True)], kwargs

    def _one_by_one(self, first: Tensor, draw: Draw, done: Done, worth: Worth) -> tuple[int, list[Tensor]]:
        """Branches after each other, each with its own copy of the cache, of which the best so far is held."""
        texts: list[Tensor] = []
        kept, memory = 0, self._kwargs
        for row in range(len(first)):
            found, after = self._copied([row], first[row : row + 1], draw, done, copy.deepcopy(self.cache))
            texts += found
            if row == 0 or worth(row) > worth(kept):
                kept, memory = row, after
        for name in ALL_CACHE_NAMES:
            if memory.get(name) is not None:
                self._kwargs[name] = memory[name]
        self.append(texts[kept], read=len(texts[kept]) - 1)
        return kept, texts

    def _shared(self, first: Tensor, draw: Draw, done: Done, worth: Worth) -> tuple[int, list[Tensor]]:
        """Branches as one row on the text's own cache, which is cut back to the branch that is kept."""
        cache, start = self.cache, self.ids.shape[1]
        place = int(self._position()) + 1
        ids = torch.cat([self.ids.expand(len(first), -1), first[:, None].to(self.ids)], dim=1)
        branches = torch.arange(len(first), device=ids.device)
        owners = branches[:0]
        texts: dict[int, Tensor] = {}
        for layer in cache.layers:
            layer.__class__ = GrowingLayer
        scope = Scope()
        try:
            _share_keys(self.model, scope)
            while True:
                ended = done(ids)
                for row in ended.nonzero()[:, 0].tolist():
                    texts[int(branches[row])] = ids[row, start:]
                ids, branches = ids[~ended], branches[~ended]
                if not len(branches):
                    break
                owners = torch.cat([owners, branches])
                logits = _side_by_side(self.model, ids[:, -1], place, self._seen(start), owners, branches, cache)
                self.passes += 1
                self.read_tokens += len(branches)
                place += 1
                ids = torch.cat([ids, draw(branches.tolist(), ids, logits.to(ids.device))[:, None].to(ids)], dim=1)
        finally:
            scope.close()
        kept = _best(worth, len(first))
        slots = (owners == kept).nonzero()[:, 0]
        for layer in cache.layers:
            for states in (layer.keys, layer.values):
                states[..., start : start + len(slots), :] = states[..., start + slots.to(states.device), :]
        cache.crop(len(slots) - len(owners))
        self.append(texts[kept], read=len(slots))
        return kept, [texts[branch] for branch in range(len(first))]

    def _shares(self, cache: Any) -> bool:
        """Whether branches can be one row: plain cache layers, a plain text, and a model that heeds such a mask."""
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            return False
        others = {
            name
            for name, value in self._kwargs.items()
            if value is not None and not isinstance(value, (bool, int)) and name != "past_key_values"
        }
        positions = self._kwargs.get("position_ids")
        length = self.ids.shape[1]
        if (
            others - {"attention_mask", "position_ids"}
            or (positions is not None and positions.dim() != 2)
            or not all(_is_plain(layer, length) for layer in cache.layers)
        ):
            return False
        if self._heeds is None:
            self._heeds = heeds_branches(self.model)
        return self._heeds

    def _position(self) -> Tensor:
        positions = self._kwargs.get("position_ids")
        return self.ids.new_tensor(self.ids.shape[1] - 1) if positions is None else positions[0, -1]

    def _seen(self, length: int) -> Tensor:
        """(length,) which tokens of the prefix may be attended to."""
        mask = self._kwargs.get("attention_mask")
        if mask is None:
            return torch.ones(length, dtype=torch.bool, device=self.ids.device)
        seen: Tensor = mask[0].bool().to(self.ids.device)
        return seen

    def _updated(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Mask and positions for one token more."""
        known = {name: kwargs[name] for name in ALL_CACHE_NAMES if kwargs.get(name) is not None}
        updated: dict[str, Any] = self.model._update_model_kwargs_for_generation(
            ModelOutput(**known), dict(kwargs), is_encoder_decoder=self.model.config.is_encoder_decoder
        )
        return updated


def _memory(outputs: Any) -> dict[str, Any]:
    """The caches that a forward pass returned."""
    return {name: outputs[name] for name in ALL_CACHE_NAMES if name in outputs and outputs[name] is not None}


def _is_plain(layer: Any, length: int) -> bool:
    """Whether a cache layer holds the keys and values of all `length` tokens, and nothing else."""
    return type(layer) in {DynamicLayer, GrowingLayer} and bool(layer.get_seq_length() == length)


def _best(worth: Worth, count: int) -> int:
    return max(range(count), key=lambda branch: (worth(branch), -branch))


def _repeats_both(cache: Any) -> bool:
    return (
        isinstance(cache, EncoderDecoderCache)
        and can_repeat(cache.self_attention_cache)
        and can_repeat(cache.cross_attention_cache)
    )


@torch.no_grad()
def _side_by_side(
    model: Any, tokens: Tensor, place: int, seen: Tensor, owners: Tensor, branches: Tensor, cache: Any
) -> Tensor:
    """Logits (count, vocabulary) after one more token of each branch, all at position `place` of their own text.

    tokens: (count,); seen: (prefix,) bool; owners: (slots,) the branch of every token after the prefix, these
    included; branches: (count,) those of `tokens`.
    """
    visible = torch.cat([seen.expand(len(branches), -1), owners[None, :] == branches[:, None]], dim=1)
    least = torch.finfo(model.dtype).min
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=tokens.device).masked_fill_(~visible, least)
    outputs = model(
        input_ids=tokens[None],
        attention_mask=mask[None, None],
        position_ids=torch.full_like(tokens, place)[None],
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )
    found: Tensor = outputs.logits[0].float()
    return found


def _share_keys(model: Any, scope: Scope) -> None:
    """Let all branches read the prefix's keys and values where they are, while `scope` is open.

    With a mask and more than one query, transformers first repeats keys and values for each query head that shares
    them. Here the query heads of one key head are rows of one product instead, and nothing is copied.
    """
    if implementation_below(model) == "sdpa" and hasattr(text_config(model), "_attn_implementation_internal"):
        install_attention(model, "branches", _attend_shared, scope)


_WITHOUT_EFFECT = {
    "scaling",
    "dropout",
    "is_causal",
    "position_ids",
    "use_cache",
    "output_attentions",
    "cache_position",
}
"""What a model may pass to its attention, and the product with a mask heeds or need not know."""


def _attend_shared(
    inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention (see attention_door) of several query heads to one key head, as one product for each key head."""
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    others = {name for name, given in kwargs.items() if given is not None} - _WITHOUT_EFFECT
    plain = isinstance(mask, Tensor) and mask.shape[1] == 1 and length > 1 and groups > 1
    if not plain or others or kwargs.get("dropout") or kwargs.get("output_attentions"):
        result: tuple[Tensor, Tensor | None] = inner(module, query, key, value, mask, **kwargs)
        return result
    packed = query.reshape(batch, key.shape[1], groups * length, size)
    found = F.scaled_dot_product_attention(
        packed, key, value, attn_mask=mask.repeat(1, 1, groups, 1), scale=kwargs.get("scaling")
    )
    return found.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


_PROBE_TOLERANCE = 1e-3
"""Largest difference, relative to the largest logit, between branches side by side and one after the other."""


def heeds_branches(model: Any) -> bool:
    """Whether `model` gives branches side by side the logits that each has alone: tried on a few tokens.

    Models that build their own mask or positions do not; what was found is remembered with the model's kind. A window
    that a model lays over the mask by itself shows only in long texts: a configuration that names one is enough.
    """
    config = text_config(model)
    if any(isinstance(getattr(config, name, None), int) for name in _WINDOWS):
        return False
    key = (type(model), getattr(model.config, "_attn_implementation", None), repr(model.config.to_dict()), model.dtype)
    if key not in _heeds:
        try:
            _heeds[key] = _probe(model)
        except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
            # Not taking the mask at all is one of the answers that the trial is made for.
            _heeds[key] = False
    return _heeds[key]


_WINDOWS = ("sliding_window", "window_size", "attention_window", "attention_chunk_size", "local_attention_window")
"""Settings by which some layers see only the end of a text."""
_heeds: dict[tuple[Any, ...], bool] = {}


@torch.no_grad()
def _probe(model: Any) -> bool:
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(9, device=model.device) * 7 % vocabulary
    prefix, branches = tokens[:3], tokens[3:].reshape(2, 3)
    cache = model(input_ids=prefix[None], past_key_values=DynamicCache(config=model.config)).past_key_values
    seen = torch.ones(3, dtype=torch.bool, device=model.device)
    rows = torch.arange(2, device=model.device)
    owners = rows[:0]
    found: list[Tensor] = []
    for step in range(3):
        owners = torch.cat([owners, rows])
        found.append(_side_by_side(model, branches[:, step], 3 + step, seen, owners, rows, cache))
    texts = torch.cat([prefix.expand(2, -1), branches], dim=1)
    alone = model(input_ids=texts).logits[:, 3:].float()
    rounding = _PROBE_TOLERANCE if model.dtype == torch.float32 else 3e-2
    return bool((torch.stack(found, dim=1) - alone).abs().max() <= rounding * alone.abs().max())
