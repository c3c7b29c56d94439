"""A LoRA adapter of PEFT read as a whole checkpoint: the model it belongs to, with the adapter merged into it.

E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022: weight + scaling * B A, where scaling is
alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (D. Kalajdzievski, 2023). DoRA (S. Liu et al., ICML 2024) scales
each row of that to a learned length. Nothing is written: stretches are computed as they are read, in float32.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import FileError, InputError
from gratis.subjects.checkpoints import Checkpoint, TensorSource, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROWS = 64
"""Rows of a weight that are computed together; always the same ones, so that a stretch does not change a bit."""
FACTORS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "embedding A", "lora_embedding_B": "embedding B",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude", "lora_B.bias": "bias",
}  # fmt: skip


def is_adapter(path: Path) -> bool:
    """Whether `path` is a folder with a PEFT adapter."""
    return (path / CONFIG).is_file()


@dataclass(frozen=True)
class LowRank:
    """A change of a weight read as (rows, columns): row r changes by `left[r] @ right`, the scaling included."""

    left: Tensor
    """(rows, r), float32."""
    right: Tensor
    """(r, columns), float32."""
    lengths: Tensor | None = None
    """(rows,): what DoRA scales each row to."""

    def rows(self, weight: Tensor, first: int) -> Tensor:
        """Rows of the changed weight; `weight` (n, columns) holds its rows from `first` on, in float32."""
        changed = torch.addmm(weight, self.left[first : first + len(weight)], self.right)
        if self.lengths is not None:
            norms = changed.norm(dim=1, keepdim=True)
            changed *= self.lengths[first : first + len(weight), None] / norms
        return changed


class AdaptedCheckpoint(TensorSource):
    """A checkpoint with a LoRA adapter merged in.

    Raises FileError for an adapter that is damaged, of another kind, or of another model.
    """

    def __init__(self, base: TensorSource, adapter: str | os.PathLike[str]) -> None:
        self.path = Path(adapter).expanduser()
        self._base = base
        self._config = read_json(self.path / CONFIG)
        file = self.path / WEIGHTS
        if not file.is_file():
            other = "adapter_model.bin" if (self.path / "adapter_model.bin").is_file() else "nothing"
            raise FileError(f"{self.path} lacks {WEIGHTS} (it has {other}): save the adapter again with safetensors.")
        self._adapter = Checkpoint(file)
        self._changes: dict[str, LowRank] = {}
        self._replaced: dict[str, str] = {}
        self._shifts: dict[str, Tensor] = {}
        self._check_kind()
        self._read()
        self.places = dict(base.places)
        for name, own in self._replaced.items():
            place = self._adapter.places[own]
            if place.shape != base.places[name].shape:
                raise FileError(
                    f"{self.path}: {own!r} has shape {list(place.shape)}, but {name!r} has "
                    f"{list(base.places[name].shape)} in {base.path}."
                )

    @property
    def folder(self) -> Path:
        return self._base.folder

    @property
    def files(self) -> list[Path]:
        return [*self._base.files, *self._adapter.files, self.path / CONFIG]

    def config(self) -> dict[str, Any]:
        return self._base.config()

    def tokenizer(self) -> dict[str, Any] | None:
        """The adapter's own, where it brought one."""
        return read_json(self.path / "tokenizer.json") or self._base.tokenizer()

    def prefetch(self, name: str, start: int, count: int) -> None:
        if name not in self._replaced:
            self._base.prefetch(name, start, count)

    def view(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """(count,) elements from flat index `start` on: float32 where the adapter changes the tensor."""
        if name in self._shifts:
            count = self.places[name].elements - start if count is None else count
            return self._beneath(name, start, count).float() + self._shifts[name][start : start + count]
        if name not in self._changes:
            return self._beneath(name, start, count)
        change = self._changes[name]
        elements = self.places[name].elements
        end = elements if count is None else start + count
        if end <= start:
            return torch.empty(0)
        columns = change.right.shape[1]
        group = ROWS * columns
        pieces = []
        for begin in range(start - start % group, end, group):
            stop = min(begin + group, elements)
            weight = self._beneath(name, begin, stop - begin).float().view(-1, columns)
            pieces.append(change.rows(weight, begin // columns).view(-1))
        first = start - start % group
        return torch.cat(pieces)[start - first : end - first]

    def _beneath(self, name: str, start: int, count: int | None) -> Tensor:
        """What low-rank changes are added to: the base's, or what the adapter has in its place."""
        own = self._replaced.get(name)
        return self._base.view(name, start, count) if own is None else self._adapter.view(own, start, count)

    def _check_kind(self) -> None:
        kind = self._config.get("peft_type")
        if kind != "LORA":
            raise FileError(f"{self.path} is an adapter of kind {kind!r}; only LORA can be merged into its model.")
        for key in ("alora_invocation_tokens", "megatron_config", "layer_replication", "target_parameters"):
            if self._config.get(key):
                raise FileError(f"{self.path} uses {key} of PEFT, which cannot be merged into the weights here.")

    def _read(self) -> None:
        factors: dict[str, dict[str, Tensor]] = {}
        for own in self._adapter.places:
            name = re.sub(r"^base_model\.model\.", "", own)
            suffix = next((s for s in FACTORS if name.endswith(f".{s}")), None)
            if suffix is not None:
                module = name.removesuffix(f".{suffix}")
                factors.setdefault(module, {})[FACTORS[suffix]] = self._adapter.tensor(own).float()
                continue
            # Embeddings and heads are saved beside their changes, modules to save in their place.
            target = self._target(re.sub(r"\.(modules_to_save\.default|original_module|base_layer)(?=\.)", "", name))
            if target is None:
                raise FileError(f"{self.path}: {own!r} belongs to no tensor of {self._base.path}.")
            self._replaced[target] = own
        for module, found in factors.items():
            self._add(module, found)

    def _target(self, name: str) -> str | None:
        """The base's name of a tensor: its own, or with a prefix that one of the two lacks."""
        names = self._base.places
        if name in names:
            return name
        if f"model.{name}" in names:
            return f"model.{name}"
        short = name.removeprefix("model.")
        return short if short in names else None

    def _add(self, module: str, found: dict[str, Tensor]) -> None:
        target = self._target(f"{module}.weight")
        if target is None:
            raise FileError(f"{self.path}: {module!r} is no module of {self._base.path}.")
        embedding = "embedding A" in found
        a, b = (found.get(f"embedding {x}" if embedding else x) for x in "AB")
        if a is None or b is None:
            raise FileError(f"{self.path}: {module!r} has only one of its two factors.")
        rank = a.shape[0]
        shape = self._base.places[target].shape
        columns = math.prod(shape[1:])
        a, b = a.reshape(rank, -1), b.reshape(b.shape[0], -1)
        scaling = self._scaling(module, rank)
        transposed = embedding or bool(self._config.get("fan_in_fan_out"))
        left, right = (a.T, b.T) if transposed else (b, a)
        if left.shape != (shape[0] if shape else 1, rank) or right.shape != (rank, columns):
            raise FileError(
                f"{self.path}: the factors of {module!r} make {left.shape[0]} x {right.shape[-1]} by rank {rank}, "
                f"but {target!r} has shape {list(shape)} in {self._base.path}."
            )
        for factor in (a, b):
            if not bool(factor.isfinite().all()):
                raise InputError(f"{self.path}: {module!r} holds values that are not finite.")
        lengths = found.get("magnitude")
        if self._config.get("use_dora") and lengths is None:
            raise FileError(f"{self.path}: {module!r} lacks the lengths of DoRA.")
        if lengths is not None:
            if transposed:
                raise FileError(f"{self.path}: DoRA on {module!r} scales columns, which is not supported here.")
            lengths = lengths.reshape(-1)
            if len(lengths) != shape[0]:
                raise FileError(f"{self.path}: the lengths of {module!r} do not fit its {shape[0]} rows.")
        self._changes[target] = LowRank((left * scaling).contiguous(), right.contiguous(), lengths)
        if "bias" in found:
            bias = target.removesuffix("weight") + "bias"
            if bias not in self._base.places or self._base.places[bias].shape != tuple(found["bias"].shape):
                raise FileError(f"{self.path}: {module!r} has a bias in its adapter, but the model has none that fits.")
            self._shifts[bias] = found["bias"] * scaling

    def _scaling(self, module: str, rank: int) -> float:
        r = _pattern(self._config.get("rank_pattern"), module, self._config.get("r"))
        if not isinstance(r, int) or r != rank:
            raise FileError(f"{self.path}: {module!r} has rank {rank}, but {CONFIG} says {r!r}.")
        alpha = _pattern(self._config.get("alpha_pattern"), module, self._config.get("lora_alpha", 8))
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise FileError(f"{self.path}: lora_alpha must be a number, not {alpha!r}.")
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that is the end of the module's name, as PEFT matches them."""
    if not isinstance(patterns, dict):
        return default
    for pattern, value in patterns.items():
        plain = str(pattern).lstrip("^")
        if str(pattern).startswith("^"):
            if re.fullmatch(re.escape(plain).replace(r"\.\*", ".*").replace(r"\$", ""), module):
                return value
        elif module == plain or module.endswith(f".{plain}"):
            return value
    return default
