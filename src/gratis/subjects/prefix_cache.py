"""Running one model with weights that change from trial to trial, from the first layer on that changed.

A search over merges scores the same samples again and again with weights that often differ in later layers only. What
enters those layers is then known: it is kept, by what entered the stack and by the weights of the layers before.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gratis.contract.errors import InputError, SubjectError


class PrefixCache:
    """Within `with PrefixCache(model) as cache:` the model's layers before the first changed one are not run again.

    Weights change through `cache.load(state)` alone. Results are those of the model without it, bit for bit, where samples
    come in the same batches. Layers are the stack (`ModuleList`) with most parameters; what they pass on is kept after
    every `every` layers, at most `most_bytes` in all, the longest unused dropped first. Raises SubjectError for a model
    without such a stack, or whose layers pass on more than one tensor.
    """

    def __init__(self, model: nn.Module, *, every: int = 1, most_bytes: int = 1 << 28) -> None:
        if every < 1 or most_bytes < 1:
            raise InputError("PrefixCache: every and most_bytes must be at least 1.")
        stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        if not stacks:
            raise SubjectError(f"{type(model).__name__} has no stack of layers.")
        self.name, self._layers = max(stacks, key=lambda one: sum(p.numel() for p in one[1].parameters()))
        self.model, self.every, self.most_bytes = model, every, most_bytes
        self.layers_run = self.layers_skipped = 0
        self._kept: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._bytes = 0
        self._digests: dict[int, tuple[weakref.ref[Tensor], bytes]] = {}
        self._versions: list[bytes] = []
        self._entered: Any = None
        self._resume = 0
        self._own: list[Any] = []

    def __enter__(self) -> PrefixCache:
        self.load(self.model.state_dict())
        self._own = [vars(layer).get("forward") for layer in self._layers]
        for number, layer in enumerate(self._layers):
            layer.forward = self._cached(number, layer.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own
        self._kept.clear()
        self._bytes = 0

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put weights into the model, as `load_state_dict` does."""
        self.model.load_state_dict(state)
        self._digests = {key: kept for key, kept in self._digests.items() if kept[0]() is not None}
        versions = []
        for number in range(len(self._layers)):
            start = f"{self.name}.{number}."
            own = hashlib.blake2b(digest_size=16)
            for name, tensor in state.items():
                if name.startswith(start):
                    own.update(name.encode())
                    own.update(self._digest(tensor))
            versions.append(own.digest())
        self._versions = versions

    def _digest(self, tensor: Tensor) -> bytes:
        # By identity where it was seen before: merges hand on the tensors that they did not merge anew.
        known = self._digests.get(id(tensor))
        if known is not None and known[0]() is tensor and not tensor.requires_grad:
            return known[1]
        digest = _digest(tensor)
        self._digests[id(tensor)] = weakref.ref(tensor), digest
        return digest

    def _cached(self, number: int, forward: Any) -> Any:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if number == 0:
                self._enter(hidden, args, kwargs)
            if number < self._resume:
                self.layers_skipped += 1
                return hidden
            if number == self._resume and number:
                hidden = self._kept[self._key(number)]
            out = forward(hidden, *args, **kwargs)
            self.layers_run += 1
            if not isinstance(out, Tensor):
                raise SubjectError(f"{type(self._layers[number]).__name__} passes on more than one tensor.")
            if (number + 1) % self.every == 0 and number + 1 < len(self._layers):
                self._keep(self._key(number + 1), out)
            return out

        return run

    def _enter(self, hidden: Tensor, args: Any, kwargs: Any) -> None:
        """What comes into the stack, and from which layer on it has to be run."""
        if torch.is_grad_enabled():
            raise InputError("PrefixCache is for scoring: run the model under torch.no_grad().")
        tensors = [
            hidden,
            *(a for a in args if isinstance(a, Tensor)),
            *(v for v in kwargs.values() if isinstance(v, Tensor)),
        ]
        self._entered = b"".join(_digest(tensor) for tensor in tensors)
        depths = (depth for depth in range(len(self._layers) - 1, 0, -1) if self._key(depth) in self._kept)
        self._resume = next(depths, 0)
        if self._resume:
            self._kept.move_to_end(self._key(self._resume))

    def _key(self, depth: int) -> tuple[Any, ...]:
        return (self._entered, *self._versions[:depth])

    def _keep(self, key: tuple[Any, ...], hidden: Tensor) -> None:
        if key in self._kept or hidden.nbytes > self.most_bytes:
            return
        self._kept[key] = hidden
        self._bytes += hidden.nbytes
        while self._bytes > self.most_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes


def _digest(tensor: Tensor) -> bytes:
    plain = tensor.detach().contiguous().cpu()
    numbers = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return hashlib.blake2b(numbers, key=f"{tensor.dtype}{tuple(tensor.shape)}".encode()[:64], digest_size=16).digest()
