"""The checkpoints of a merge, checked against one another: tensors, kinds of model, tokenizers."""

from __future__ import annotations

import copy
import filecmp
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import FileError, InputError, ParameterError
from gratis.contract.method import Merge
from gratis.subjects.checkpoints import Checkpoint, TensorSource
from gratis.subjects.opening_checkpoints import drop_tied, open_checkpoint
from gratis.subjects.vocabularies import POLICIES, Vocabulary, reconcile


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class _StateDict:
    """A state dict read as a checkpoint is."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        self.places = {name: _Place(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}
        self.path = Path("state dict")
        self.bytes = sum(t.nbytes for t in self._tensors.values())

    def view(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        flat = self._tensors[name].reshape(-1)
        return flat[start : start + count] if count is not None else flat[start:]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def config(self) -> dict[str, Any]:
        return {}


class Inputs:
    """The checkpoints of a merge, checked against one another."""

    def __init__(self, method: Merge, base: Any, experts: Sequence[Any], weights: tuple[float, ...]) -> None:
        def opened(source: Any) -> Any:
            if hasattr(source, "places"):
                return source
            return _StateDict(source) if isinstance(source, Mapping) else open_checkpoint(source, self.base)

        if not experts:
            raise InputError(f"{method.name} needs at least one expert.")
        if method.needs_base and base is None:
            raise InputError(f"{method.name} needs the base that the experts were fine-tuned from: name it.")
        self.base: Any = None
        self.base = opened(base) if base is not None else None
        self.experts = [opened(expert) for expert in experts]
        self.weights = weights
        self.laid_out_by: Any = None
        self.vocabulary: Vocabulary | None = None

    @classmethod
    def open(
        cls, method: Merge, base: Any, experts: Sequence[Any], weights: Sequence[float] | None, tokenizer: str = "error"
    ) -> Inputs:
        if tokenizer not in POLICIES:
            raise ParameterError(f"tokenizer must be one of {', '.join(POLICIES)}, not {tokenizer!r}.")
        inputs = cls(method, base, experts, checked_weights(weights, len(experts)))
        if tokenizer != "error":
            drop_tied(inputs.all)
            made, inputs.vocabulary = reconcile(inputs.all, tokenizer)
            if inputs.base is not None:
                inputs.base, *inputs.experts = made
            else:
                inputs.experts = made
        inputs.check(method)
        return inputs

    def of(self, experts: Sequence[int], weights: tuple[float, ...]) -> Inputs:
        """The same checkpoints for tensors that only these experts, by their places, are merged into."""
        inputs = copy.copy(self)
        inputs.experts = [self.experts[number] for number in experts]
        inputs.weights = weights
        # What the whole is laid out by stays so where a portion leaves out the first expert.
        inputs.laid_out_by = self.reference
        return inputs

    @property
    def reference(self) -> Any:
        """The checkpoint whose tensors, configuration and tokenizer the result has."""
        if self.laid_out_by is not None:
            return self.laid_out_by
        return self.base if self.base is not None else self.experts[0]

    @property
    def all(self) -> list[Any]:
        """Base and experts."""
        return ([self.base] if self.base is not None else []) + self.experts

    def check(self, method: Merge) -> None:
        method.check_experts(len(self.experts))
        drop_tied(self.all)
        reference = self.reference
        for other in self.all:
            if other is reference:
                continue
            _check_same_kind(reference, other)
            missing = [name for name in reference.places if name not in other.places]
            extra = [name for name in other.places if name not in reference.places]
            if missing or extra:
                what, names = ("lacks", missing) if missing else ("has beyond the others", extra)
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise InputError(f"{other.path} {what} {shown}: only checkpoints with the same tensors can be merged.")
            for name, place in reference.places.items():
                if other.places[name].shape != place.shape:
                    raise InputError(
                        f"Tensor {name!r} has shape {list(place.shape)} in {reference.path} but "
                        f"{list(other.places[name].shape)} in {other.path}."
                    )
                if other.places[name].dtype.is_floating_point != place.dtype.is_floating_point:
                    raise InputError(
                        f"Tensor {name!r} holds {place.dtype} in {reference.path} but {other.places[name].dtype} in "
                        f"{other.path}."
                    )


def _check_same_kind(one: Any, other: Any) -> None:
    for key in ("architectures", "model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        a, b = one.config().get(key), other.config().get(key)
        if a is not None and b is not None and a != b:
            raise InputError(f"{one.path} and {other.path} are different models: {key} is {a} and {b}.")
    if isinstance(one, TensorSource) and isinstance(other, TensorSource) and not _same_tokenizer_file(one, other):
        a, b = _vocabulary(one), _vocabulary(other)
        if a is not None and b is not None and a != b:
            differing = sum(1 for token in a.keys() | b.keys() if a.get(token) != b.get(token))
            raise InputError(
                f"{one.path} and {other.path} have different tokenizers ({differing:,} tokens differ), so rows of "
                "their embeddings do not mean the same: say tokenizer='base', 'union' or 'intersect'."
            )


def _same_tokenizer_file(one: TensorSource, other: TensorSource) -> bool:
    first, second = one.folder / "tokenizer.json", other.folder / "tokenizer.json"
    plain = isinstance(one, Checkpoint) and isinstance(other, Checkpoint)
    return plain and first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)


def _vocabulary(source: TensorSource) -> dict[str, int] | None:
    tokenizer = source.tokenizer()
    if tokenizer is None:
        return None
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FileError(f"The tokenizer.json of {source.path} is damaged: {error}.") from error
    return {**vocabulary, **added}


def checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite weight per expert, 1 where none are given. Raises InputError."""
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise InputError(f"There are {count} experts but {len(weights)} weights.")
    if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
        raise InputError(f"Weights must be finite numbers, not {list(weights)}.")
    return tuple(float(w) for w in weights)
