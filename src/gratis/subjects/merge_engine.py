"""Streaming checkpoints through a merge: which stretch is worked on where, thresholds first, then what is written.

A stretch's result does not depend on how tensors are cut, on the number of threads, on their order, or on the device.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import InputError, ParameterError
from gratis.contract.method import Cutoff, Merge, MergePart
from gratis.subjects.checkpoint_writer import Writer
from gratis.subjects.compiled import compiled_loops
from gratis.subjects.merge_inputs import Inputs
from gratis.subjects.merge_rules import Rule, portions
from gratis.subjects.merge_workers import Workers
from gratis.subjects.selection import Stretch, largest_of_each, last_tie

STRETCH = 131072
"""Elements worked on at a time by a processor; a multiple of 65,536, where random streams begin anew."""
DEVICE_STRETCH = 64 * 131072
"""Elements worked on at a time by an accelerator."""
BLOCK = 65536
CPU = torch.device("cpu")
JOURNAL_SECONDS = 5.0
"""How often what is done is written down, for going on after a kill."""

MergeProgress = Callable[[float, str], None]


@dataclass(frozen=True)
class Power:
    """What a merge is computed with."""

    threads: int
    devices: tuple[torch.device, ...] = (CPU,)
    stretch: int = STRETCH
    """Elements worked on at a time."""
    workers: Workers | None = None
    """Processes that do the work instead of this one."""

    @classmethod
    def of(cls, threads: int | None = None, device: str | Sequence[str] = "cpu", stretch: int | None = None) -> Power:
        """From what a user says. Raises ParameterError for devices that are not there and numbers that make no sense."""
        names = [device] if isinstance(device, str) else list(device)
        devices = tuple(dict.fromkeys(_device(name) for name in names))
        if not devices:
            raise ParameterError("device must name at least one device.")
        if threads is not None and threads < 1:
            raise ParameterError(f"threads must be at least 1, not {threads}.")
        usual = STRETCH if all(found.type == "cpu" for found in devices) else DEVICE_STRETCH
        return cls(threads or min(os.cpu_count() or 1, 4), devices, whole_blocks(usual if stretch is None else stretch))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ParameterError(f"device must be cpu, cuda or cuda:NUMBER, not {name!r}.") from None
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise ParameterError(f"device must be cpu, cuda or cuda:NUMBER, not {name!r}.")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ParameterError(f"There is no device {name}: torch finds {torch.cuda.device_count()} CUDA devices.")
    return torch.device("cuda", device.index or 0)


def stream(
    inputs: Inputs,
    method: Merge,
    rules: Sequence[Rule],
    places: Mapping[str, Any],
    writer: Any,
    power: Power,
    progress: MergeProgress | None = None,
) -> None:
    """Stream every portion of a merge into `writer`."""
    tell = progress or (lambda fraction, words: None)
    floating = [name for name, place in inputs.reference.places.items() if place.dtype.is_floating_point]
    found = portions(method, rules, floating, inputs.weights)
    for portion in found:
        if portion.method.needs_base and inputs.base is None:
            raise InputError(f"{portion.method.name} needs the base that the experts were fine-tuned from: name it.")
    sizes = [sum(inputs.reference.places[name].elements for name in portion.names) for portion in found]
    done, total = 0, sum(sizes) or 1
    with _one_thread_per_operation():
        Engine(inputs, power).copy_the_rest(writer)
        for number, (portion, size) in enumerate(zip(found, sizes, strict=True)):
            begun, part = done / total, size / total

            def told(fraction: float, words: str, begun: float = begun, part: float = part) -> None:
                tell(begun + part * fraction, words)

            engine = Engine(inputs.of(portion.experts, portion.weights), power, portion.each)
            engine.run(portion.method, portion.names, places, writer, Notes(writer, str(number)), told)
            done += size


class Notes:
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


class Engine:
    """Streams the inputs through a method."""

    def __init__(self, inputs: Inputs, power: Power, each: Sequence[Merge] = ()) -> None:
        self._inputs, self._stretch, self._each_own = inputs, power.stretch, each
        self._threads, self._devices = max(power.threads, len(power.devices)), power.devices
        self._workers = power.workers
        self._scratch = threading.local()
        self._known: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": None, "_scratch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_scratch": threading.local()}

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
        notes: Notes,
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
            cutoffs = self._cutoffs(method, names, kept[1], lambda f: progress(share * f, "selecting"))
            notes.found(cutoffs)
        measured = self._measured(method, stretches, method.measure) if method.measures else {}
        self._known = method.survey(_Survey(self, method, names))
        begin, totals, marked = notes.left()
        done = sum(part.count for part in parts[:begin])
        settle = getattr(writer, "settle", None)
        results = self._each(
            lambda p: self._combine(method, p, cutoffs, measured, places, writer), parts[begin:], settle
        )
        for number, (sums, revise) in enumerate(results, begin):
            for key, value in sums.items():
                totals[key] = totals.get(key, 0.0) + value
            if revise:
                marked.append(number)
            done += parts[number].count
            notes.done(number + 1, totals, marked)
            progress(share + (1 - share) * done / total, f"merging {parts[number].tensor}")
        again = [parts[number] for number in marked]
        revised = method.revised(totals) if again else None
        if revised is not None:
            for _ in self._each(lambda p: self._combine(revised, p, cutoffs, measured, places, writer), again, settle):
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

    def _each(
        self, work: Callable[[Stretch], Any], parts: Sequence[Stretch], settle: Callable[[], None] | None = None
    ) -> Iterator[Any]:
        """Results of `work` in the order of `parts`, with no more parts in flight than needed.

        Workers call `settle` when what they wrote must be on the disk.
        """
        if self._workers is not None and len(parts) > 1:
            yield from self._workers.each(work, parts, settle)
            return
        ahead = 32 * self._threads

        def there(part: Stretch, device: torch.device) -> Any:
            self._scratch.device = device
            return work(part)

        devices = placed(parts, self._devices)
        with ThreadPoolExecutor(self._threads) if self._threads > 1 else nullcontext() as pool:
            for begin in range(0, len(parts), ahead):
                self._prefetch(parts[begin + ahead : begin + 2 * ahead])
                window = slice(begin, begin + ahead)
                yield from (pool.map if pool else map)(there, parts[window], devices[window])

    def _prefetch(self, parts: Sequence[Stretch]) -> None:
        """Have the system read what is worked on next while this is worked on."""
        for part in parts:
            for source in self._inputs.all:
                if hasattr(source, "prefetch"):
                    source.prefetch(part.tensor, part.start, part.count)

    def _buffers(self, count: int) -> list[Tensor]:
        """One scratch stretch per checkpoint, reused by the thread."""
        device = getattr(self._scratch, "device", self._devices[0])
        number = len(self._inputs.experts) + 1
        if count > self._stretch:
            return [torch.empty(count, device=device) for _ in range(number)]
        held = self._scratch.__dict__.setdefault("tensors", {})
        if device not in held:
            held[device] = [torch.empty(self._stretch, device=device) for _ in range(number)]
        return [tensor[:count] for tensor in held[device]]

    def _expert(self, number: int, part: Stretch, into: Tensor, base: Tensor | None) -> Tensor:
        view = self._inputs.experts[number].view(part.tensor, part.start, part.count).to(into.device)
        loops = compiled_loops(into) if base is not None and view.dtype == torch.bfloat16 else None
        if loops is not None:
            loops.difference(view, base, into)
        elif base is not None and view.dtype == torch.float32:
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
        view: Tensor = self._inputs.base.view(part.tensor, part.start, part.count).to(into.device)
        if view.dtype == torch.float32:
            return view
        loops = compiled_loops(into) if view.dtype == torch.bfloat16 else None
        if loops is not None:
            loops.widen(view, into)
        else:
            into.copy_(view)
        return into

    def _combine(
        self,
        method: Merge,
        part: Stretch,
        cutoffs: Mapping[tuple[str, int], Cutoff],
        measured: Mapping[str, tuple[float, ...]],
        places: Mapping[str, Any],
        writer: Any,
    ) -> tuple[dict[str, float], bool]:
        """Write the merged stretch; what it adds to the totals, and whether it may have to be done again."""
        known = tuple(cutoffs[part.tensor, n] for n in range(len(self._inputs.experts))) if cutoffs else ()
        info = self._info(part)
        info.cutoffs, info.measured = known, measured.get(part.tensor, ())
        buffers, base = self._prepared(method, part, info)
        merged = method.combine(buffers, info)
        dtype = places[part.tensor][0]
        if base is not None and method.differences:
            loops = compiled_loops(merged) if dtype == torch.bfloat16 else None
            merged = merged.add_(base) if loops is None else loops.rounded_sum(merged, base)
        writer.write(part.tensor, merged if dtype == torch.float32 else merged.to(dtype), part.start)
        return info.totals, info.revise

    def _prepared(self, method: Merge, part: Stretch, info: MergePart) -> tuple[list[Tensor], Tensor | None]:
        """The experts' stretches as the method works on them, and the base's. Raises InputError."""
        *buffers, spare = self._buffers(part.count)
        base = self._base(method, part, spare)
        info.base = base if not method.differences else None
        if info.base is not None and not bool(info.base.isfinite().all()):
            self._refuse(part, 0)
        for number, buffer in enumerate(buffers):
            self._expert(number, part, buffer, base if method.differences else None)
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

    def _magnitudes(self, method: Merge, numbers: Sequence[int]) -> Callable[[Stretch], Iterator[Tensor]]:
        def of(part: Stretch) -> Iterator[Tensor]:
            *buffers, spare = self._buffers(part.count)
            base = self._base(method, part, spare)
            for number in numbers:
                values = self._expert(number, part, buffers[number], base)
                # A method's choice must fall as it does when stretches are combined, so whole blocks are prepared.
                self._own(method, number).prepare(values, number, self._info(part))
                yield values.abs_()

        return of

    def _values(
        self, method: Merge, values: Callable[[list[Tensor], MergePart], Tensor]
    ) -> Callable[[Stretch], list[Tensor]]:
        def of(part: Stretch) -> list[Tensor]:
            info = self._info(part)
            return [values(self._prepared(method, part, info)[0], info).abs_()]

        return of

    def _cutoffs(
        self, method: Merge, names: Sequence[str], scope: str, progress: Callable[[float], None]
    ) -> dict[tuple[str, int], Cutoff]:
        shares = {n: self._own(method, n).kept_share() for n in range(len(self._inputs.experts))}
        limited = {number: share[0] for number, share in shares.items() if share is not None}
        found = {
            (name, number): Cutoff(0.0, self._inputs.reference.places[name].elements - 1)
            for name in names
            for number in shares.keys() - limited.keys()
        }
        groups = [list(names)] if scope == "global" else [[name] for name in names]
        magnitudes = self._magnitudes(method, list(limited))
        for done, group in enumerate(groups, 1):
            cutoffs = self._group_cutoffs(group, magnitudes, list(limited.values()))
            for number, of_expert in zip(limited, cutoffs, strict=True):
                found |= {(name, number): cutoff for name, cutoff in of_expert.items()}
            progress(done / len(groups))
        return found

    def _group_cutoffs(
        self, group: Sequence[str], magnitudes: Callable[[Stretch], Iterable[Tensor]], shares: Sequence[float]
    ) -> list[dict[str, Cutoff]]:
        """By stream of magnitudes: the cutoff of each tensor where `shares` of the whole group are kept."""
        parts = [part for name in group for part in self._stretches(name)]
        total = sum(part.count for part in parts)
        if not total:
            return [{name: Cutoff(0.0, -1) for name in group} for _ in shares]
        keeps = [max(math.floor(share * total), 1) for share in shares]
        made = []
        for number, result in enumerate(largest_of_each(parts, keeps, magnitudes, self._each)):
            ends = {name: self._inputs.reference.places[name].elements - 1 for name in group}
            if not result.all_ties and result.magnitude > 0:

                def stream(part: Stretch, number: int = number) -> Tensor:
                    return next(itertools.islice(magnitudes(part), number, None))

                boundary, index = last_tie(parts, result, stream)
                name = parts[boundary].tensor
                later = list(group)[list(group).index(name) + 1 :]
                ends |= {name: index, **dict.fromkeys(later, -1)}
            made.append({name: Cutoff(result.magnitude, ends[name]) for name in group})
        return made


class _Survey:
    """Answers a method's questions about whole tensors."""

    def __init__(self, engine: Engine, method: Merge, names: Sequence[str]) -> None:
        self._engine, self._method, self._names = engine, method, names
        self.tensors = {name: engine._inputs.reference.places[name].shape for name in names}
        self.experts = len(engine._inputs.experts)
        self.each = [engine._own(method, number) for number in range(self.experts)]

    def sums(self, measure: Callable[[list[Tensor], MergePart], Tensor]) -> dict[str, tuple[float, ...]]:
        parts = [part for name in self._names for part in self._engine._stretches(name)]
        return self._engine._measured(self._method, parts, measure)

    def cutoffs(
        self, values: Callable[[list[Tensor], MergePart], Tensor], share: float, scope: str = "tensor"
    ) -> dict[str, Cutoff]:
        groups = [list(self._names)] if scope == "global" else [[name] for name in self._names]
        found: dict[str, Cutoff] = {}
        for group in groups:
            found |= self._engine._group_cutoffs(group, self._engine._values(self._method, values), [share])[0]
        return found


def placed(parts: Sequence[Stretch], devices: Sequence[torch.device]) -> list[torch.device]:
    """A device for each part, so that all have about the same number of elements to do."""
    if len(devices) == 1:
        return [devices[0]] * len(parts)
    given, found = [0] * len(devices), []
    for part in parts:
        least = min(range(len(devices)), key=given.__getitem__)
        given[least] += part.count
        found.append(devices[least])
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


def whole_blocks(stretch: int) -> int:
    """A stretch of whole blocks that is at most `stretch`, one block at least. Raises ParameterError."""
    if stretch < 1:
        raise ParameterError(f"stretch must be at least 1 element, not {stretch}.")
    return max(stretch // 65536, 1) * 65536
