"""A weight change that was computed once: save it, send it, attach it, take it off."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gratis.contract.errors import FileError, InputError, SubjectError
from gratis.contract.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from gratis.contract.attach import Scope

FORMAT = "gratis-delta-1"


class Delta:
    """Differences of named weights, each full, low-rank or sparse. Attaches to a model like a method.

    Tensors are added to the weights in float32 and cast to their dtype; detaching puts the original tensors back.
    """

    holds: tuple[str, ...] = ()

    def __init__(
        self, tensors: Mapping[str, Mapping[str, Tensor]], *, label: str = "delta", strength: float = 1.0
    ) -> None:
        """`tensors` maps a weight's name to {"full": …}, {"left": …, "right": …} or {"indices", "values", "shape"}."""
        self._tensors = {name: dict(parts) for name, parts in tensors.items()}
        self.label = label
        self.strength = strength

    @classmethod
    def between(cls, base: Any, tuned: Any, *, label: str = "delta") -> Self:
        """The change from `base` to `tuned`: models, state dicts or checkpoint folders. Raises InputError, FileError."""
        a, b = _tensors(base), _tensors(tuned)
        missing = sorted(a.keys() ^ b.keys())
        if missing:
            raise InputError(f"The two models have different weights: {missing[0]!r} is in one of them only.")
        changed = {}
        for name, before in a.items():
            after = b[name]
            if before.shape != after.shape:
                raise InputError(
                    f"Weight {name!r} has shape {list(before.shape)} in one and {list(after.shape)} in the other."
                )
            if before.is_floating_point():
                difference = after.float() - before.float()
                if not bool(difference.isfinite().all()):
                    raise InputError(f"Weight {name!r} holds values that are not finite.")
                if bool(difference.any()):
                    changed[name] = {"full": difference}
        return cls(changed, label=label)

    @property
    def name(self) -> str:
        """What reports and refusals call it."""
        return self.label

    @property
    def names(self) -> list[str]:
        """Weights that it changes."""
        return list(self._tensors)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(t.nbytes for parts in self._tensors.values() for t in parts.values())

    def scaled(self, strength: float) -> Delta:
        """The same change, `strength` times as strong; 0 changes nothing."""
        return Delta(self._tensors, label=self.label, strength=self.strength * strength)

    def at(self, strength: float) -> Delta:
        """The same change at this strength, whatever it was before."""
        return Delta(self._tensors, label=self.label, strength=strength)

    def low_rank(self, rank: int) -> Delta:
        """The best approximation of every matrix by one of `rank`; other tensors stay as they are."""
        import torch

        if rank < 1:
            raise InputError(f"rank must be at least 1, not {rank}.")
        parts: dict[str, dict[str, Tensor]] = {}
        for name in self._tensors:
            dense = self._dense(name)
            if dense.dim() != 2 or rank * sum(dense.shape) >= dense.numel():
                parts[name] = {"full": dense}
                continue
            u, s, v = torch.linalg.svd(dense, full_matrices=False)
            parts[name] = {"left": (u[:, :rank] * s[:rank]).contiguous(), "right": v[:rank].contiguous()}
        return Delta(parts, label=self.label, strength=self.strength)

    def sparse(self, density: float) -> Delta:
        """Only the largest `density` of each tensor's entries."""
        import torch

        if not 0 < density <= 1:
            raise InputError(f"density must be > 0 and <= 1, not {density}.")
        parts: dict[str, dict[str, Tensor]] = {}
        for name in self._tensors:
            dense = self._dense(name)
            flat = dense.reshape(-1)
            keep = flat.abs().topk(max(int(density * len(flat)), 1)).indices.sort().values
            parts[name] = {"indices": keep, "values": flat[keep].clone(), "shape": torch.tensor(dense.shape)}
        return Delta(parts, label=self.label, strength=self.strength)

    def dense(self, name: str) -> Tensor:
        """The change of weight `name` as one float tensor, strength included."""
        return self._dense(name) * self.strength

    def _dense(self, name: str) -> Tensor:
        import torch

        parts = self._tensors[name]
        if "full" in parts:
            return parts["full"]
        if "left" in parts:
            return parts["left"] @ parts["right"]
        dense = torch.zeros(tuple(parts["shape"].tolist()), dtype=parts["values"].dtype)
        dense.view(-1)[parts["indices"]] = parts["values"]
        return dense

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; a kill leaves the old file or none."""
        from safetensors.torch import save_file

        flat = {f"{part}:{name}": t.contiguous() for name, parts in self._tensors.items() for part, t in parts.items()}
        about = {"format": FORMAT, "label": self.label, "strength": json.dumps(self.strength)}
        with replacing(Path(path)) as temporary:
            save_file(flat, temporary, metadata=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Raises FileError for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise FileError(f"{path} cannot be read as a delta: {' '.join(str(error).split())}") from error
        if about.get("format") != FORMAT:
            raise FileError(f"{path} is no delta of a format that this version reads.")
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in flat.items():
            part, _, name = key.partition(":")
            tensors.setdefault(name, {})[part] = tensor
        for name, parts in tensors.items():
            if set(parts) not in ({"full"}, {"left", "right"}, {"indices", "values", "shape"}):
                raise FileError(f"{path}: the change of {name!r} is incomplete.")
        return cls(tensors, label=about.get("label", "delta"), strength=float(json.loads(about.get("strength", "1.0"))))

    def check(self, subject: Any) -> None:
        """Raise SubjectError where names or shapes do not fit, before anything changed."""
        if not hasattr(subject, "named_parameters"):
            raise SubjectError(f"{self.name} changes the weights of a torch module, not of a {type(subject).__name__}.")
        weights = _weights(subject)
        for name in self._tensors:
            if name not in weights:
                raise SubjectError(f"{self.name} changes {name!r}, which this {type(subject).__name__} does not have.")
            if tuple(self._shape(name)) != tuple(weights[name].shape):
                raise SubjectError(
                    f"{self.name} changes {name!r} of shape {list(self._shape(name))}; here it is "
                    f"{list(weights[name].shape)}."
                )

    def install(self, subject: Any, scope: Scope) -> Callable[[], dict[str, Any]]:
        """Swap the data of the changed weights; the originals are kept and put back when it comes off."""
        import torch

        weights = _weights(subject)
        done: set[int] = set()
        changed = 0
        with torch.no_grad():
            for name in self._tensors if self.strength else ():
                weight = weights[name]
                if id(weight) in done:
                    continue
                done.add(id(weight))
                original = weight.data
                change = self.dense(name).to(weight.device, torch.float32)
                scope.defer(functools.partial(setattr, weight, "data", original))
                weight.data = (original.float() + change).to(original.dtype)
                changed += weight.numel()
        return lambda: {"weights_changed": len(done), "numbers_changed": changed, "bytes": self.bytes}

    def _shape(self, name: str) -> tuple[int, ...]:
        parts = self._tensors[name]
        if "full" in parts:
            return tuple(parts["full"].shape)
        if "left" in parts:
            return parts["left"].shape[0], parts["right"].shape[1]
        return tuple(parts["shape"].tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Delta) or (self.label, self.strength) != (other.label, other.strength):
            return False
        mine, theirs = self._tensors, other._tensors
        if {n: set(parts) for n, parts in mine.items()} != {n: set(parts) for n, parts in theirs.items()}:
            return False
        return all(bool((tensor == theirs[n][p]).all()) for n, parts in mine.items() for p, tensor in parts.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Delta({self.label!r}, {len(self._tensors)} weights, {self.bytes:,} bytes, strength={self.strength:g})"


def _weights(subject: Any) -> dict[str, Any]:
    return dict(subject.named_parameters(remove_duplicate=False)) | dict(subject.named_buffers(remove_duplicate=False))


def _tensors(source: Any) -> dict[str, Tensor]:
    if hasattr(source, "named_parameters"):
        return {name: weight.detach() for name, weight in source.named_parameters()}
    if isinstance(source, Mapping):
        return {name: tensor.detach() for name, tensor in source.items()}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileError(f"{path} holds no .safetensors file.")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
