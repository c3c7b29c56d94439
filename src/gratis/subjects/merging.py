"""Merging checkpoints from disk to disk: any safetensors files, by key, in bounded memory.

Tensors are views on their files, worked on in stretches that fit the processor's cache by a few threads, and written
at their place in an output that was laid out in advance. The output appears under its name only when it is complete.
"""

from __future__ import annotations

import copy
import filecmp
import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import FileError, GratisWarning, InputError, ParameterError
from gratis.contract.method import Cutoff, Merge, MergePart
from gratis.subjects.checkpoints import (
    DTYPES,
    Checkpoint,
    TensorPlace,
    TensorSource,
    Writer,
    fingerprint,
    restore_replaced,
)
from gratis.subjects.merged_folder import carry, describe, recipe_of, write_card, write_record
from gratis.subjects.opening_checkpoints import drop_tied, open_checkpoint
from gratis.subjects.selection import Stretch, largest, last_tie
from gratis.subjects.vocabularies import POLICIES, Vocabulary, reconcile

STRETCH = 131072
"""Elements worked on at a time; a multiple of 65,536, where random streams begin anew."""
BLOCK = 65536
JOURNAL_SECONDS = 5.0
"""How often what is done is written down, for going on after a kill."""

MergeProgress = Callable[[float, str], None]


@dataclass(frozen=True)
class Rule:
    """How some tensors are merged. Of several rules the first that names a tensor holds for it."""

    tensors: tuple[str, ...]
    """Names, with `*` and `?` as wildcards."""
    method: Merge
    weights: tuple[float, ...] | None = None
    """One per expert of the rule; None: those of the whole merge."""
    experts: tuple[int, ...] | None = None
    """Places of the experts that are used, in their order; None: all."""
    each: tuple[Merge, ...] = ()
    """The method with the parameters of each expert, where these differ (densities)."""


@dataclass(frozen=True)
class Portion:
    """Tensors of a merge that are combined in one way."""

    method: Merge
    names: tuple[str, ...]
    weights: tuple[float, ...]
    experts: tuple[int, ...]
    each: tuple[Merge, ...] = ()


def portions(
    method: Merge, rules: Sequence[Rule], names: Iterable[str], weights: tuple[float, ...]
) -> tuple[Portion, ...]:
    """Which tensors are merged in which way: rules first, `method` for the rest. A rule without tensors warns."""
    exact: dict[str, int] = {}
    wild: list[tuple[int, re.Pattern[str]]] = []
    for number, rule in enumerate(rules):
        for name in rule.tensors:
            if any(sign in name for sign in "*?["):
                wild.append((number, re.compile(fnmatch.translate(name))))
            else:
                exact.setdefault(name, number)
    found: dict[int, list[str]] = {}
    for name in names:
        first = min(exact.get(name, len(rules)), next((n for n, pattern in wild if pattern.match(name)), len(rules)))
        found.setdefault(first, []).append(name)
    for number, rule in enumerate(rules):
        if number not in found:
            warnings.warn(f"No tensor is called {', '.join(rule.tensors[:3])}: that rule does nothing.", GratisWarning)
    every = tuple(range(len(weights)))
    made = []
    for number, tensors in sorted(found.items()):
        rule = rules[number] if number < len(rules) else Rule((), method)
        chosen = every if rule.experts is None else rule.experts
        if not chosen or not all(0 <= place < len(weights) for place in chosen) or len(set(chosen)) != len(chosen):
            raise InputError(f"A rule names experts {list(chosen)}; there are {len(weights)}, from 0 on.")
        own = tuple(weights[place] for place in chosen) if rule.weights is None else rule.weights
        rule.method.check_experts(len(chosen))
        if rule.each and len(rule.each) != len(chosen):
            raise InputError(f"A rule has {len(chosen)} experts but parameters for {len(rule.each)}.")
        made.append(Portion(rule.method, tuple(tensors), _weights(own, len(chosen)), chosen, rule.each))
    return tuple(made)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out: Path
    tensors: int
    merged: int
    """Tensors that were combined; the others (integers, buffers) are the base's."""
    bytes_read: int
    bytes_written: int
    seconds: float
    resumed: bool = False
    """Whether it went on with what a killed merge of the same inputs had done."""


def merge(
    method: Merge,
    *,
    experts: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    weights: Sequence[float] | None = None,
    rules: Sequence[Rule] = (),
    dtype: str | None = None,
    tokenizer: str = "error",
    threads: int | None = None,
    stretch: int = STRETCH,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: MergeProgress | None = None,
) -> MergeReport:
    """Merge the checkpoints `experts` (folders or safetensors files) into the new folder `out`.

    `base` is the common ancestor, for methods that need one; configuration and tokenizer are its, or the first
    expert's. `weights` is one number per expert, 1 by default. `rules` merge some tensors otherwise.
    `dtype` is the result's ("float32", "bfloat16",
    "float16"), the base's by default; the arithmetic is float32. The result is the same for any `threads` and `stretch`.

    `tokenizer` says what becomes of different vocabularies: "error" refuses them, "base" keeps the base's tokens, "union"
    takes every model's, "intersect" those that all have; rows of embedding and head are put in order.

    A checkpoint is a safetensors file, a folder with one or several, a diffusers pipeline, a GGUF file, or a PEFT adapter
    of the base (`MODEL+ADAPTER` for one of another model). A merge that was killed or interrupted leaves `OUT.partial`;
    the same merge goes on from there, to the same bytes. `merge.json` in `out` records the recipe and checksums.

    Raises FileError for damaged files, a full disk or an output that exists, InputError for checkpoints that do not fit
    together or hold values that are not finite, before or without leaving anything under `out`.
    """
    began = time.perf_counter()
    target = Path(out).expanduser()
    inputs = _Inputs.open(method, base, experts, weights, tokenizer)
    restore_replaced(target)
    _check_output(target, inputs, overwrite)
    result_dtype = _dtype(dtype)
    reference = inputs.reference
    places = {
        name: (result_dtype if result_dtype is not None and p.dtype.is_floating_point else p.dtype, p.shape)
        for name, p in reference.places.items()
    }
    size = sum(math.prod(shape) * d.itemsize for d, shape in places.values())
    left = target.with_name(f"{target.name}.partial")
    held = sum(file.stat().st_blocks * 512 for file in left.rglob("*") if file.is_file())
    free = shutil.disk_usage(_existing(target.parent)).free + held
    if free < size:
        raise FileError(f"The disk of {target} has {free:,} bytes free; the merge needs {size:,}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    homes = {name: (p.component, p.stem) for name, p in reference.places.items() if isinstance(p, TensorPlace)}
    writer = Writer(target, places, shard_bytes, homes, _plan(inputs, method, rules, dtype, _whole_blocks(stretch)))
    resumed = bool(writer.left)
    try:
        with _one_thread_per_operation():
            _run(inputs, method, rules, places, writer, stretch, threads or min(os.cpu_count() or 1, 4), progress)
        _describe_folder(inputs, writer, method, dtype, rules, tokenizer)
        writer.finish()
    except Exception:
        writer.abandon()
        raise
    except BaseException:
        # Interrupted: the same merge goes on from here the next time.
        writer.keep()
        raise
    floating = sum(p.dtype.is_floating_point for p in reference.places.values())
    read = sum(c.bytes for c in inputs.all)
    return MergeReport(target, len(places), floating, read, size, time.perf_counter() - began, resumed)


def open_inputs(
    method: Merge,
    experts: Sequence[Any],
    base: Any = None,
    weights: Sequence[float] | None = None,
    tokenizer: str = "error",
) -> tuple[Any, list[Any]]:
    """Base and experts as `merge` sees them: opened, checked against each other, rows of tokens in one order.

    Raises what `merge` raises for checkpoints that cannot be read or do not fit together.
    """
    inputs = _Inputs.open(method, base, experts, weights, tokenizer)
    return inputs.base, inputs.experts


def merge_state_dicts(
    method: Merge,
    experts: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | None = None,
    stretch: int = STRETCH,
    rules: Sequence[Rule] = (),
) -> dict[str, Tensor]:
    """The same merge of state dicts in memory; inputs are left as they are, tensors of integers are the base's."""
    inputs = _Inputs(method, base, list(experts), _weights(weights, len(experts)))
    inputs.check(method)
    merged: dict[str, Tensor] = {}
    for name, place in inputs.reference.places.items():
        merged[name] = inputs.reference.tensor(name).clone() if not place.dtype.is_floating_point else torch.empty(
            place.shape, dtype=place.dtype
        )  # fmt: skip

    class Memory:
        def write(self, name: str, values: Tensor, start: int = 0) -> None:
            merged[name].view(-1)[start : start + len(values)] = values

    with _one_thread_per_operation():
        places = {name: (t.dtype, tuple(t.shape)) for name, t in merged.items()}
        _run(inputs, method, rules, places, Memory(), stretch, 1, None)
    return merged


def merge_into(
    weights: Mapping[str, Tensor],
    method: Merge,
    experts: Sequence[Any],
    base: Any = None,
    expert_weights: Sequence[float] | None = None,
    rules: Sequence[Rule] = (),
    tokenizer: str = "error",
) -> list[str]:
    """Merge checkpoints or state dicts into tensors that exist, those of a live model. Buffers are left as they are.

    Returns the merged tensors that `weights` has no place for; where there are any, nothing was written.
    """
    inputs = _Inputs.open(method, base, experts, expert_weights, tokenizer)
    places = {name: (place.dtype, place.shape) for name, place in inputs.reference.places.items()}
    floating = [name for name, (dtype, _) in places.items() if dtype.is_floating_point]
    missing = [name for name in floating if name not in weights or tuple(weights[name].shape) != places[name][1]]
    if missing:
        return missing

    class Live:
        def write(self, name: str, values: Tensor, start: int = 0) -> None:
            weights[name].view(-1)[start : start + len(values)] = values.to(weights[name].device)

    with _one_thread_per_operation():
        _run(inputs, method, rules, places, Live(), STRETCH, 1, None)
    return []


def _run(
    inputs: _Inputs,
    method: Merge,
    rules: Sequence[Rule],
    places: Mapping[str, Any],
    writer: Any,
    stretch: int,
    threads: int,
    progress: MergeProgress | None,
) -> None:
    """Stream every portion of the merge into `writer`."""
    tell = progress or (lambda fraction, words: None)
    floating = [name for name, place in inputs.reference.places.items() if place.dtype.is_floating_point]
    found = portions(method, rules, floating, inputs.weights)
    for portion in found:
        if portion.method.needs_base and inputs.base is None:
            raise InputError(f"{portion.method.name} needs the base that the experts were fine-tuned from: name it.")
    _Engine(inputs, _whole_blocks(stretch), threads).copy_the_rest(writer)
    sizes = [sum(inputs.reference.places[name].elements for name in portion.names) for portion in found]
    done, total = 0, sum(sizes) or 1
    for number, (portion, size) in enumerate(zip(found, sizes, strict=True)):
        engine = _Engine(inputs.of(portion), _whole_blocks(stretch), threads, portion.each)
        begun, part = done / total, size / total
        notes = _Notes(writer, str(number))

        def told(fraction: float, words: str, begun: float = begun, part: float = part) -> None:
            tell(begun + part * fraction, words)

        engine.run(portion.method, portion.names, places, writer, notes, told)
        done += size


class _Notes:
    """What of a portion is done, written down beside an output on disk and read again after a kill."""

    def __init__(self, writer: Any, portion: str) -> None:
        self._writer = writer if isinstance(writer, Writer) else None
        self._done, self._cutoffs = f"done {portion}", f"cutoffs {portion}"
        self._old: dict[str, Any] = self._writer.left if self._writer is not None else {}

    @property
    def complete(self) -> bool:
        return bool(self._old.get(self._done) == "all")

    @property
    def cutoffs(self) -> dict[tuple[str, int], Cutoff]:
        return {(name, number): Cutoff(at, last) for name, number, at, last in self._old.get(self._cutoffs, ())}

    def found(self, cutoffs: Mapping[tuple[str, int], Cutoff]) -> None:
        if self._writer is not None:
            rows = [[name, number, cutoff.magnitude, cutoff.last] for (name, number), cutoff in cutoffs.items()]
            self._note({self._cutoffs: rows})

    def left(self) -> tuple[int, dict[str, float], list[int]]:
        """Parts that are done, sums over them, and those that are to be revised."""
        count, totals, marked = self._old.get(self._done, (0, {}, []))
        return count, dict(totals), list(marked)

    def done(self, count: int, totals: Mapping[str, float], marked: Sequence[int]) -> None:
        if self._writer is not None and time.monotonic() - self._writer.noted >= JOURNAL_SECONDS:
            self._writer.note({self._done: (count, dict(totals), list(marked))})

    def finished(self) -> None:
        self._note({self._done: "all"})

    def _note(self, notes: dict[str, Any]) -> None:
        if self._writer is None:
            return
        self._writer.remember(notes)
        if time.monotonic() - self._writer.noted >= JOURNAL_SECONDS:
            self._writer.note({})


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


class _Inputs:
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
    ) -> _Inputs:
        if tokenizer not in POLICIES:
            raise ParameterError(f"tokenizer must be one of {', '.join(POLICIES)}, not {tokenizer!r}.")
        inputs = cls(method, base, experts, _weights(weights, len(experts)))
        if tokenizer != "error":
            drop_tied(inputs.all)
            made, inputs.vocabulary = reconcile(inputs.all, tokenizer)
            if inputs.base is not None:
                inputs.base, *inputs.experts = made
            else:
                inputs.experts = made
        inputs.check(method)
        return inputs

    def of(self, portion: Portion) -> _Inputs:
        """The same checkpoints as a portion sees them."""
        inputs = copy.copy(self)
        inputs.experts = [self.experts[number] for number in portion.experts]
        inputs.weights = portion.weights
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


class _Engine:
    """Streams the inputs through a method."""

    def __init__(self, inputs: _Inputs, stretch: int, threads: int, each: Sequence[Merge] = ()) -> None:
        self._inputs, self._stretch, self._threads, self._each_own = inputs, stretch, threads, each
        self._scratch = threading.local()
        self._known: Any = None

    def copy_the_rest(self, writer: Any) -> None:
        """Write what is not merged (integers, buffers): it is the base's."""
        for name, place in self._inputs.reference.places.items():
            if not place.dtype.is_floating_point and isinstance(writer, Writer):
                writer.write(name, self._inputs.reference.view(name))

    def run(
        self,
        method: Merge,
        names: Sequence[str],
        places: Mapping[str, Any],
        writer: Any,
        notes: _Notes,
        progress: MergeProgress,
    ) -> None:
        if notes.complete:
            return
        stretches = [part for name in names for part in self._stretches(name)]
        total = sum(part.count for part in stretches) or 1
        parts = [part for name in names for part in self._units(method, name)]
        kept = next((k for own in (method, *self._each_own) if (k := own.kept_share()) is not None), None)
        share = 0.5 if kept else 0.0
        cutoffs = notes.cutoffs
        if kept and not cutoffs:
            cutoffs = self._cutoffs(method, names, kept, lambda f: progress(share * f, "selecting"))
            notes.found(cutoffs)
        measured = self._measured(method, stretches, method.measure) if method.measures else {}
        self._known = method.survey(_Survey(self, method, names))
        begin, totals, marked = notes.left()
        done = sum(part.count for part in parts[:begin])
        results = self._each(lambda p: self._combine(method, p, cutoffs, measured, places, writer), parts[begin:])
        for number, result in enumerate(results, begin):
            for key, value in result.totals.items():
                totals[key] = totals.get(key, 0.0) + value
            if result.revise:
                marked.append(number)
            done += parts[number].count
            notes.done(number + 1, totals, marked)
            progress(share + (1 - share) * done / total, f"merging {parts[number].tensor}")
        again = [parts[number] for number in marked]
        revised = method.revised(totals) if again else None
        if revised is not None:
            for _ in self._each(lambda p: self._combine(revised, p, cutoffs, measured, places, writer), again):
                pass
        notes.finished()

    def _own(self, method: Merge, number: int) -> Merge:
        """The method with the parameters that expert `number` has to itself."""
        return self._each_own[number] if self._each_own else method

    def _stretches(self, name: str) -> list[Stretch]:
        elements = self._inputs.reference.places[name].elements
        return [Stretch(name, at, min(self._stretch, elements - at)) for at in range(0, elements, self._stretch)]

    def _units(self, method: Merge, name: str) -> list[Stretch]:
        """The tensor as the method asks for it: in stretches, in stretches of whole rows, or whole."""
        place = self._inputs.reference.places[name]
        unit = method.unit(name, place.shape)
        if unit == "stretch" or not place.elements:
            return self._stretches(name)
        row = place.elements // place.shape[0] if place.shape else 1
        count = place.elements if unit == "tensor" else max(self._stretch // row, 1) * row
        return [Stretch(name, at, min(count, place.elements - at)) for at in range(0, place.elements, count)]

    def _each(self, work: Callable[[Stretch], Any], parts: Sequence[Stretch]) -> Iterator[Any]:
        """Results of `work` in the order of `parts`, with no more parts in flight than needed."""
        ahead = 32 * self._threads
        if self._threads == 1:
            for begin in range(0, len(parts), ahead):
                self._prefetch(parts[begin + ahead : begin + 2 * ahead])
                yield from map(work, parts[begin : begin + ahead])
            return
        with ThreadPoolExecutor(self._threads) as pool:
            for begin in range(0, len(parts), ahead):
                self._prefetch(parts[begin + ahead : begin + 2 * ahead])
                yield from pool.map(work, parts[begin : begin + ahead])

    def _prefetch(self, parts: Sequence[Stretch]) -> None:
        """Have the system read what is worked on next while this is worked on."""
        for part in parts:
            for source in self._inputs.all:
                if hasattr(source, "prefetch"):
                    source.prefetch(part.tensor, part.start, part.count)

    def _buffers(self, count: int) -> list[Tensor]:
        """One scratch stretch per checkpoint, reused by the thread."""
        if count > self._stretch:
            return [torch.empty(count) for _ in range(len(self._inputs.experts) + 1)]
        if not hasattr(self._scratch, "tensors"):
            self._scratch.tensors = [torch.empty(self._stretch) for _ in range(len(self._inputs.experts) + 1)]
        return [tensor[:count] for tensor in self._scratch.tensors]

    def _expert(self, method: Merge, number: int, part: Stretch, into: Tensor, base: Tensor | None) -> Tensor:
        view = self._inputs.experts[number].view(part.tensor, part.start, part.count)
        if base is not None and view.dtype == torch.float32:
            torch.sub(view, base, out=into)
        else:
            into.copy_(view)
            if base is not None:
                into.sub_(base)
        return into

    def _base(self, method: Merge, part: Stretch, into: Tensor) -> Tensor | None:
        if not method.needs_base:
            return None
        assert self._inputs.base is not None
        view = self._inputs.base.view(part.tensor, part.start, part.count)
        return view if view.dtype == torch.float32 else into.copy_(view)

    def _combine(
        self,
        method: Merge,
        part: Stretch,
        cutoffs: Mapping[tuple[str, int], Cutoff],
        measured: Mapping[str, tuple[float, ...]],
        places: Mapping[str, Any],
        writer: Any,
    ) -> MergePart:
        known = tuple(cutoffs[part.tensor, n] for n in range(len(self._inputs.experts))) if cutoffs else ()
        info = self._info(part)
        info.cutoffs, info.measured = known, measured.get(part.tensor, ())
        buffers, base = self._prepared(method, part, info)
        merged = method.combine(buffers, info)
        if base is not None and method.differences:
            merged = merged.add_(base)
        dtype = places[part.tensor][0]
        writer.write(part.tensor, merged if dtype == torch.float32 else merged.to(dtype), part.start)
        return info

    def _prepared(self, method: Merge, part: Stretch, info: MergePart) -> tuple[list[Tensor], Tensor | None]:
        """The experts' stretches as the method works on them, and the base's. Raises InputError."""
        *buffers, spare = self._buffers(part.count)
        base = self._base(method, part, spare)
        info.base = base if not method.differences else None
        if info.base is not None and not bool(info.base.isfinite().all()):
            self._refuse(part, 0)
        for number, buffer in enumerate(buffers):
            self._expert(method, number, part, buffer, base if method.differences else None)
            if not math.isfinite(buffer.sum().item()) and not bool(buffer.isfinite().all()):
                self._refuse(part, number)
            self._own(method, number).prepare(buffer, number, info)
        return buffers, base

    def _info(self, part: Stretch) -> MergePart:
        shape = self._inputs.reference.places[part.tensor].shape
        return MergePart(part.tensor, part.start, self._inputs.weights, shape=shape, known=self._known)

    def _measured(
        self, method: Merge, parts: Sequence[Stretch], measure: Callable[[list[Tensor], MergePart], Tensor]
    ) -> dict[str, tuple[float, ...]]:
        """Sums over each tensor, the same for any stretch and threads: taken block by block and added in order."""

        def of_part(part: Stretch) -> list[Tensor]:
            info = self._info(part)
            buffers, base = self._prepared(method, part, info)
            found = []
            for at in range(0, part.count, BLOCK):
                info.start = part.start + at
                info.base = base[at : at + BLOCK] if base is not None and not method.differences else None
                found.append(measure([buffer[at : at + BLOCK] for buffer in buffers], info))
            return found

        sums: dict[str, Tensor] = {}
        for part, found in zip(parts, self._each(of_part, parts), strict=True):
            for block in found:
                sums[part.tensor] = sums[part.tensor] + block if part.tensor in sums else block
        return {name: tuple(total.tolist()) for name, total in sums.items()}

    def _refuse(self, part: Stretch, number: int) -> None:
        for checkpoint in (self._inputs.experts[number], self._inputs.base):
            if checkpoint is not None and not bool(
                checkpoint.view(part.tensor, part.start, part.count).isfinite().all()
            ):
                raise InputError(f"Tensor {part.tensor!r} of {checkpoint.path} holds values that are not finite.")
        raise InputError(f"Tensor {part.tensor!r} of {self._inputs.experts[number].path} is too large to subtract.")

    def _magnitudes(self, method: Merge, number: int) -> Callable[[Stretch], Tensor]:
        def of(part: Stretch) -> Tensor:
            buffer, spare = self._buffers(part.count)[:2]
            values = self._expert(method, number, part, buffer, self._base(method, part, spare))
            # A method's choice must fall as it does when stretches are combined, so whole blocks are prepared.
            self._own(method, number).prepare(values, number, self._info(part))
            return values.abs_()

        return of

    def _values(
        self, method: Merge, values: Callable[[list[Tensor], MergePart], Tensor]
    ) -> Callable[[Stretch], Tensor]:
        def of(part: Stretch) -> Tensor:
            info = self._info(part)
            return values(self._prepared(method, part, info)[0], info)

        return of

    def _cutoffs(
        self, method: Merge, names: Sequence[str], kept: tuple[float, str], progress: Callable[[float], None]
    ) -> dict[tuple[str, int], Cutoff]:
        scope = kept[1]
        groups = [list(names)] if scope == "global" else [[name] for name in names]
        found: dict[tuple[str, int], Cutoff] = {}
        jobs = [(group, number) for group in groups for number in range(len(self._inputs.experts))]
        for done, (group, number) in enumerate(jobs, 1):
            own = self._own(method, number).kept_share()
            if own is None:
                cutoffs = {name: Cutoff(0.0, self._inputs.reference.places[name].elements - 1) for name in group}
            else:
                cutoffs = self._group_cutoffs(group, self._magnitudes(method, number), own[0])
            found |= {(name, number): cutoff for name, cutoff in cutoffs.items()}
            progress(done / len(jobs))
        return found

    def _group_cutoffs(
        self, group: Sequence[str], magnitudes: Callable[[Stretch], Tensor], share: float
    ) -> dict[str, Cutoff]:
        parts = [part for name in group for part in self._stretches(name)]
        total = sum(part.count for part in parts)
        if not total:
            return {name: Cutoff(0.0, -1) for name in group}
        result = largest(parts, max(math.floor(share * total), 1), magnitudes, self._run)
        ends = {name: self._inputs.reference.places[name].elements - 1 for name in group}
        if not result.all_ties and result.magnitude > 0:
            boundary, index = last_tie(parts, result, magnitudes)
            name = parts[boundary].tensor
            later = list(group)[list(group).index(name) + 1 :]
            ends |= {name: index, **dict.fromkeys(later, -1)}
        return {name: Cutoff(result.magnitude, ends[name]) for name in group}

    def _run(self, work: Callable[[Stretch], Any], parts: Sequence[Stretch]) -> Iterable[Any]:
        return self._each(work, parts)


class _Survey:
    """Answers a method's questions about whole tensors."""

    def __init__(self, engine: _Engine, method: Merge, names: Sequence[str]) -> None:
        self._engine, self._method, self._names = engine, method, names
        self.tensors = {name: engine._inputs.reference.places[name].shape for name in names}
        self.experts = len(engine._inputs.experts)

    def sums(self, measure: Callable[[list[Tensor], MergePart], Tensor]) -> dict[str, tuple[float, ...]]:
        parts = [part for name in self._names for part in self._engine._stretches(name)]
        return self._engine._measured(self._method, parts, measure)

    def cutoffs(
        self, values: Callable[[list[Tensor], MergePart], Tensor], share: float, scope: str = "tensor"
    ) -> dict[str, Cutoff]:
        groups = [list(self._names)] if scope == "global" else [[name] for name in self._names]
        found: dict[str, Cutoff] = {}
        for group in groups:
            found |= self._engine._group_cutoffs(group, self._engine._values(self._method, values), share)
        return found


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def _weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise InputError(f"There are {count} experts but {len(weights)} weights.")
    if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
        raise InputError(f"Weights must be finite numbers, not {list(weights)}.")
    return tuple(float(w) for w in weights)


def _whole_blocks(stretch: int) -> int:
    if stretch < 1:
        raise ParameterError(f"stretch must be at least 1 element, not {stretch}.")
    return max(stretch // 65536, 1) * 65536


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values() or not dtype.is_floating_point:
        raise ParameterError(f"dtype must be float32, bfloat16, float16 or float64, not {name!r}.")
    return dtype


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _check_output(out: Path, inputs: _Inputs, overwrite: bool) -> None:
    resolved = Path(os.path.realpath(out))
    for checkpoint in inputs.all:
        source = checkpoint.path.resolve()
        if resolved == source or resolved in source.parents or source in resolved.parents:
            raise FileError(f"The output {out} would overwrite the input {checkpoint.path}: choose another folder.")
    if out.is_symlink():
        raise FileError(f"The merge would write through the link {out}: name the folder itself.")
    if out.exists() and not overwrite:
        raise FileError(f"{out} exists already: choose another folder, or say overwrite.")


def _describe_folder(
    inputs: _Inputs, writer: Writer, method: Merge, dtype: str | None, rules: Sequence[Rule], tokenizer: str
) -> None:
    folder = writer.folder
    carry(inputs.reference, folder)
    if inputs.vocabulary is not None:
        inputs.vocabulary.write(folder)
    if (folder / "config.json").is_file() and not isinstance(inputs.reference, TensorSource):
        (folder / "config.json").write_text(json.dumps(inputs.reference.config(), indent=2) + "\n", encoding="utf-8")
    if method.describes is not None:
        describe(inputs.experts[method.describes], folder)
    recipe = recipe_of(method, inputs.base, inputs.experts, inputs.weights, dtype, rules)
    if tokenizer != "error":
        recipe["tokenizer"] = tokenizer
    write_card(folder, method, recipe)
    write_record(folder, recipe, writer.checksums())


def _plan(
    inputs: _Inputs,
    method: Merge,
    rules: Sequence[Rule],
    dtype: str | None,
    stretch: int,
) -> str:
    """What tells this merge from any other: method, parameters, layout, and the files it reads."""
    files = [[str(file) for file in source.files] for source in inputs.all]
    parts = [
        version("gratis"), torch.__version__, repr(method), repr(list(rules)), repr(inputs.weights), str(dtype),
        str(stretch), repr(inputs.vocabulary), repr(files), fingerprint([file for source in inputs.all for file in source.files]),
    ]  # fmt: skip
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=16).hexdigest()


def merge_recipe(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    models: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    threads: int | None = None,
    progress: MergeProgress | None = None,
) -> MergeReport:
    """Run a merge recipe, in gratis's form or mergekit's: see `gratis.subjects.merge_recipe`.

    Paths are relative to the recipe, or to one of the folders `models`. Raises FileError for a recipe that cannot be
    read, has unknown keys, or names what lies outside those folders.
    """
    from gratis.subjects.merge_recipe import load_recipe

    read = load_recipe(recipe, models)
    return read.run(out, overwrite=overwrite, threads=threads, progress=progress)
