"""Cache layers that append in place: transformers' dynamic layers copy all keys and values for every new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from gratis.contract.attach import Scope


class GrowingLayer(DynamicLayer):
    """A dynamic layer with room ahead: what it holds is the beginning of a larger tensor.

    Wherever something else replaced its keys or values (repeated rows, another device), it takes new room.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, key heads, length, head_dim) with the new ones at their end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._appended("_key_room", self.keys, key_states)
        self.values = self._appended("_value_room", self.values, value_states)
        return self.keys, self.values

    def become_plain(self) -> None:
        """Be a dynamic layer again, one that copies what it holds when it grows."""
        self.__class__ = DynamicLayer  # type: ignore[assignment]
        for name in ("_key_room", "_value_room"):
            vars(self).pop(name, None)

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (held.requires_grad or new.requires_grad):
            return torch.cat([held, new], dim=-2)
        if held.numel() == 0:
            held = new[..., :0, :]
        length = held.shape[-2] + new.shape[-2]
        room: Tensor | None = getattr(self, name, None)
        if room is None or not _begins(room, held) or room.shape[-2] < length or room.dtype != new.dtype:
            room = new.new_empty(*new.shape[:2], length + max(length // 8, 64), new.shape[-1])
            room[..., : held.shape[-2], :] = held
            setattr(self, name, room)
        room[..., held.shape[-2] : length, :] = new
        return room[..., :length, :]


def _begins(room: Tensor, held: Tensor) -> bool:
    return (
        held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:2] == room.shape[:2]
        and held.device == room.device
        and held.dtype == room.dtype
    )


def grow_in_place(model: Any, scope: Scope) -> None:
    """Make the plain dynamic caches that `model` is called with append in place while `scope` is open."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            return
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = GrowingLayer
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = GrowingLayer

    scope.hook(model.register_forward_pre_hook(before, with_kwargs=True))
