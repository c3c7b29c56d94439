"""Finding what a language model is made of by structure and by asking it, not by attribute names."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gratis.contract.errors import SubjectError

Function = TypeVar("Function", bound=Callable[..., Any])
PROBE_TOKENS = 4
asking: ContextVar[bool] = ContextVar("asking", default=False)
"""Whether a model is being asked what it is made of: what is attached to it keeps out of the way."""
PROBE_SHIFT = 5
PIECE_BYTES = 1 << 19
"""Keys that are turned at a time on a processor."""


def uncompiled(function: Function) -> Function:
    """`function`, which torch.compile calls as it is."""
    kept: Function = torch.compiler.disable(function)
    return kept


def language_model(subject: Any, method: str) -> Any:
    """`subject`, if it is a decoder-only language model of transformers in evaluation mode. Raises SubjectError."""
    from transformers import PreTrainedModel

    if not isinstance(subject, PreTrainedModel):
        raise SubjectError(
            f"{method} acts on a decoder-only language model of transformers, not on a {type(subject).__name__}."
        )
    if subject.config.is_encoder_decoder:
        raise SubjectError(f"{method} acts on decoder-only language models; {type(subject).__name__} has an encoder.")
    if not subject.can_generate():
        raise SubjectError(
            f"{method} needs a model that generates; {type(subject).__name__} has no language-model head."
        )
    if subject.training:
        raise SubjectError(f"{method} acts on a model in evaluation mode: call model.eval() first.")
    return subject


def text_config(model: Any) -> Any:
    """The configuration of the model's text decoder."""
    return model.config.get_text_config(decoder=True)


def window_of(model: Any) -> int | None:
    """Length in tokens that the model was trained for, None where its configuration does not say."""
    length = getattr(text_config(model), "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def input_device(model: Any) -> torch.device:
    """Where a model expects its tokens, also where its weights wait on disk until they are needed."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    place = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return torch.device(place if place is not None else "cpu")


Angles = tuple[Tensor, Tensor, Tensor]
"""Cosines, sines and negative sines, (pairs,) or one row per key."""


@dataclass(frozen=True)
class Rotation:
    """How one layer's cached keys carry their position: rotary angles, pairing and place in the head dimension.

    Rotary position embedding turns pairs of key dimensions by `position * frequency`
    (J. Su et al., "RoFormer", 2021, eq. 34). `frequencies` is empty for a layer without positions.
    """

    frequencies: Tensor
    """(pairs,) float32, radians per position."""
    interleaved: bool
    """Pairs are neighbours (0, 1), (2, 3) …; otherwise the first half is paired with the second."""
    start: int
    """First rotated dimension of the head."""
    in_values: bool = False
    """The rotated part of the keys is what the cache keeps as values: latent attention keeps the rest as keys."""

    @property
    def none(self) -> bool:
        """Whether the layer's keys carry no position."""
        return self.frequencies.numel() == 0

    def turn_(self, keys: Tensor, shift: Tensor | float) -> Tensor:
        """Turn keys `(…, length, head_dim)` in place by `shift` positions (a number, or one per key); return them."""
        if self.none:
            return keys
        angles = self.angles(shift, keys)
        if isinstance(shift, Tensor) or keys.dim() < 3 or keys.device.type != "cpu":
            return self.turn_by_(keys, angles)
        # Piece by piece, so that the passes find what they read in the processor's cache.
        size = math.prod(keys.shape[1:]) * keys.dtype.itemsize
        for piece in keys.split(max(1, PIECE_BYTES // max(1, size))):
            self.turn_by_(piece, angles)
        return keys

    def angles(self, shift: Tensor | float, like: Tensor) -> Angles:
        """What turns keys by `shift`, in the dtype and on the device of `like`."""
        # In float64: a shift of thousands of positions has too few digits left in float32.
        frequencies = self.frequencies.double()
        angle = shift.cpu().double()[..., None] * frequencies if isinstance(shift, Tensor) else shift * frequencies
        cos, sin = angle.cos().to(like), angle.sin().to(like)
        return cos, sin, -sin

    def turn_by_(self, keys: Tensor, angles: Angles) -> Tensor:
        """Turn keys `(…, length, head_dim)` in place by angles; return them."""
        cos, sin, negative = angles
        pairs = self.frequencies.numel()
        if self.interleaved:
            first = keys[..., self.start : self.start + 2 * pairs : 2]
            second = keys[..., self.start + 1 : self.start + 2 * pairs : 2]
        else:
            first = keys[..., self.start : self.start + pairs]
            second = keys[..., self.start + pairs : self.start + 2 * pairs]
        turned = torch.mul(second, negative)
        second.mul_(cos).addcmul_(first, sin)
        torch.addcmul(turned, first, cos, out=first)
        return keys


@dataclass(frozen=True)
class CachedLayer:
    """What one layer puts into the cache per token and row of the batch, and where."""

    rotation: Rotation
    heads: int
    key_dim: int
    value_dim: int
    device: torch.device

    @property
    def numbers(self) -> int:
        """Numbers per token and row."""
        return self.heads * (self.key_dim + self.value_dim)


def rotations(model: Any, method: str) -> list[Rotation]:
    """One Rotation per cache layer; see `cached_layers`."""
    return [layer.rotation for layer in cached_layers(model, method)]


def cached_layers(model: Any, method: str) -> list[CachedLayer]:
    """The cache's layers, found by running single tokens at two positions and comparing the cached keys.

    Raises SubjectError with the reason where the cached keys cannot be moved to other positions: positions that are
    learned, added as a bias (ALiBi) or whose frequencies depend on the length, and layers that keep something else
    than all keys and values (sliding windows, recurrent states).
    """
    _refuse_length_dependent(model, method)
    here, there = _cached(model, method, 0), _cached(model, method, PROBE_SHIFT)
    candidates = {size: _candidates(model, size) for size in {part.shape[-1] for pair in here for part in pair}}
    found: list[Rotation] = []
    shared: dict[tuple[int, bool, int, bool], Rotation] = {}
    for layer, (before, after) in enumerate(zip(here, there, strict=True)):
        rotation = _fit(before[0], after[0], candidates[before[0].shape[-1]])
        if rotation is not None and rotation.none:
            values = _fit(before[1], after[1], candidates[before[1].shape[-1]])
            rotation = replace(values, in_values=True) if values is not None and not values.none else rotation
        if rotation is None:
            raise SubjectError(
                f"{method} needs rotary positions in the cached keys; layer {layer} of this {type(model).__name__} "
                "carries its positions in another way (learned, or mixed into the hidden states)."
            )
        frequencies = id(rotation.frequencies) if not rotation.none else 0
        key = (frequencies, rotation.interleaved, rotation.start, rotation.in_values)
        found.append(shared.setdefault(key, rotation))
    if all(rotation.none for rotation in found):
        raise SubjectError(
            f"{method} needs cached keys that turn with position_ids; those of this {type(model).__name__} do not (it "
            "counts positions by itself, adds them to the attention, or has none)."
        )
    return [
        CachedLayer(rotation, keys.shape[1], keys.shape[-1], values.shape[-1], keys.device)
        for rotation, (keys, values) in zip(found, here, strict=True)
    ]


def _refuse_length_dependent(model: Any, method: str) -> None:
    config = text_config(model)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = (
        [p for p in (parameters, *parameters.values()) if isinstance(p, dict)] if isinstance(parameters, dict) else []
    )
    for kind in (p.get("rope_type", p.get("type")) for p in nested):
        if kind in {"dynamic", "longrope"}:
            raise SubjectError(
                f"{method} moves cached keys to other positions, which needs rotary frequencies that do not depend on "
                f"the length; this model uses {kind!r} scaling."
            )
    scaled = [p for p in nested if any("scaling_beta" in str(key) for key in p)]
    if scaled or getattr(config, "attn_temperature_tuning", False):
        raise SubjectError(
            f"{method} counts positions from the cache; this model scales its queries by absolute position."
        )


@torch.no_grad()
def _cached(model: Any, method: str, position: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer for single tokens at `position`."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = text_config(model)
    cache = DynamicCache(config=config)
    # Texts of one token: attention then has nothing to mix, so keys of all layers differ by their position only.
    tokens = torch.arange(1, PROBE_TOKENS + 1, device=input_device(model)).remainder(max(int(config.vocab_size), 2))[
        :, None
    ]
    places = torch.full_like(tokens, position)
    token = asking.set(True)
    try:
        out = model(input_ids=tokens, position_ids=places, past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
        raise SubjectError(
            f"{method} needs a model that takes position_ids and a cache; {type(model).__name__} does not: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')}."
        ) from error
    finally:
        asking.reset(token)
    used = getattr(out, "past_key_values", None)
    if used is not cache or not cache.layers:
        raise SubjectError(f"{method} needs a model that uses the cache it is given; {type(model).__name__} does not.")
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            raise SubjectError(
                f"{method} needs layers that keep all keys and values; {type(model).__name__} has a "
                f"{_in_words(type(layer).__name__)} among them."
            )
        if not layer.is_initialized or layer.keys is None or layer.keys.dim() != 4 or layer.keys.shape[-2] != 1:
            raise SubjectError(
                f"{method} needs one key per token in every layer; {type(model).__name__} keeps its cache otherwise."
            )
    return [(layer.keys.float(), layer.values.float()) for layer in cache.layers]


def _in_words(layer: str) -> str:
    return {
        "DynamicSlidingWindowLayer": "sliding-window layer",
        "LinearAttentionLayer": "recurrent layer",
        "DynamicIndexedLayer": "sparse-index layer",
        "DummyLayer": "layer without a cache of its own",
        "LinearAttentionAndFullAttentionLayer": "layer that is recurrent besides",
        "LinearAttentionAndSlidingWindowAttentionLayer": "layer that is recurrent besides",
    }.get(layer, f"layer of its own kind ({layer})")


def _candidates(model: nn.Module, head_dim: int) -> list[Tensor]:
    """Frequency vectors that the model's rotary modules hold, then the plain ones of its configuration."""
    found = [
        buffer.detach().float().flatten().cpu()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]
    for name, value in ((n, v) for m in model.modules() for n, v in vars(m).items() if n.endswith("inv_freq")):
        if isinstance(value, Tensor) and not name.endswith("original_inv_freq"):
            found.append(value.detach().float().flatten().cpu())
    config = text_config(model)
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = getattr(config, "rope_theta", None) or parameters.get("rope_theta") or 10000.0
    declared = getattr(config, "rotary_dim", None) or head_dim
    for dim in {int(declared), head_dim, head_dim // 2, head_dim // 4}:
        if dim >= 2:
            found.append(float(theta) ** (-torch.arange(0, dim, 2).float() / dim))
    unique: list[Tensor] = []
    for frequencies in found:
        if 0 < 2 * frequencies.numel() <= head_dim and not any(
            u.shape == frequencies.shape and torch.allclose(u, frequencies) for u in unique
        ):
            unique.append(frequencies)
    return unique


def _fit(before: Tensor, after: Tensor, candidates: list[Tensor]) -> Rotation | None:
    size = before.abs().amax().item()
    if not math.isfinite(size) or size == 0:
        return None
    still = Rotation(torch.empty(0), False, 0)
    # Half-precision models round their keys after turning them.
    best, least = None, 2e-2 * size
    if (after - before).abs().amax().item() <= 1e-5 * size:
        return still
    for frequencies in candidates:
        for start in {0, before.shape[-1] - 2 * frequencies.numel()}:
            for interleaved in (False, True):
                rotation = Rotation(frequencies, interleaved, start)
                error = (rotation.turn_(before.clone(), PROBE_SHIFT) - after).abs().amax().item()
                if error < least:
                    best, least = rotation, error
    return best
