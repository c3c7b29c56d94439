"""What a merge does to every tensor, before and after: the plan, the statistics, and a page with maps of conflicts.

Statistics are taken from stretches of each tensor, at most 65,536 elements, so that their cost does not grow with the
model; small tensors are read whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import FileError
from gratis.contract.files import write_text
from gratis.contract.method import MergePart
from gratis.subjects.checkpoints import Checkpoint
from gratis.subjects.merge_engine import STRETCH, Power
from gratis.subjects.merge_recipe import MergeRecipe
from gratis.subjects.merge_rules import Portion, portions
from gratis.subjects.merging import merge_state_dicts, open_inputs
from gratis.trials.page import filled
from gratis.trials.words import number

TEMPLATE = Path(__file__).parent / "merge.html.jinja"
PIECES, PIECE, BLOCK = 4, 16384, 65536
MATRICES, LARGEST_MATRIX = 4, 2_000_000
"""How many matrices are decomposed once more for an account of them, and elements of the largest."""
PROBE = 64_000_000
"""Bytes that are read and written to see how fast the disk is."""


@dataclass(frozen=True)
class MergePlan:
    """What a merge will take, before it begins."""

    tensors: int
    experts: int
    bytes_read: int
    passes: int
    """How often the inputs are read: once more where thresholds or norms of whole tensors are needed."""
    bytes_written: int
    disk_free: int
    memory: int
    """Bytes of scratch beside the mapped files."""
    read_speed: float
    """Bytes per second of a quick read of the first checkpoint, which the system may hold in memory."""
    write_speed: float
    """Bytes per second of a quick write beside the output."""
    compute_speed: float
    """Elements per second and thread of the merge itself, on a sample."""
    threads: int
    seconds: float
    """Estimate: reading, computing and writing one after the other."""
    device: str = "cpu"


def plan_merge(
    recipe: MergeRecipe,
    out: Path,
    threads: int | None = None,
    device: str | Sequence[str] = "cpu",
    workers: int | None = None,
) -> MergePlan:
    """Measure and estimate. Raises FileError where the disk is too small, InputError for inputs that do not fit."""
    power = Power.of(threads, device)
    base, experts = open_inputs(recipe.method, recipe.experts, recipe.base, recipe.weights, recipe.tokenizer)
    reference = base or experts[0]
    everything = [*([base] if base is not None else []), *experts]
    wide = getattr(torch, recipe.dtype).itemsize if recipe.dtype else None
    written = sum(
        p.elements * (wide if wide and p.dtype.is_floating_point else p.dtype.itemsize)
        for p in reference.places.values()
    )
    folder = out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < written:
        raise FileError(
            f"The disk of {out} has {number(free, 'bytes')} free; the merge needs {number(written, 'bytes')}."
        )
    found = _portions(recipe, reference, experts)
    passes = 1 + any(p.method.kept_share() is not None or p.method.measures for p in found)
    beside = workers or max(power.threads, len(power.devices))
    elements = sum(p.elements for p in reference.places.values() if p.dtype.is_floating_point)
    read_speed, write_speed = _read_speed(everything), _write_speed(folder)
    compute_speed = _compute_speed(recipe, base, experts, found, power)
    read = sum(source.bytes for source in everything)
    seconds = passes * read / read_speed + written / write_speed + elements / (compute_speed * beside)
    memory = beside * (len(experts) + 2) * power.stretch * 4
    return MergePlan(
        len(reference.places), len(experts), read, passes, written, free, memory, read_speed, write_speed,
        compute_speed, beside, seconds, " and ".join(map(str, power.devices)),
    )  # fmt: skip


def _portions(recipe: MergeRecipe, reference: Any, experts: Sequence[Any]) -> tuple[Portion, ...]:
    names = [name for name, place in reference.places.items() if place.dtype.is_floating_point]
    return portions(recipe.method, recipe.rules, names, recipe.weights)


def _read_speed(sources: Sequence[Any]) -> float:
    done, began = 0, time.perf_counter()
    for file in dict.fromkeys(file for source in sources for file in source.files):
        with open(file, "rb", buffering=0) as handle:
            while done < PROBE and (data := handle.read(8_000_000)):
                done += len(data)
        if done >= PROBE:
            break
    return max(done, 1) / max(time.perf_counter() - began, 1e-6)


def _write_speed(folder: Path) -> float:
    data = os.urandom(PROBE // 8)
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:
            began = time.perf_counter()
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise FileError(f"Nothing can be written into {folder}: {error.strerror}.") from error
    return len(data) / max(time.perf_counter() - began, 1e-6)


def _compute_speed(
    recipe: MergeRecipe, base: Any, experts: Sequence[Any], found: Sequence[Portion], power: Power
) -> float:
    """Elements per second of the largest portion's method on up to one stretch of its largest tensor."""
    reference = base or experts[0]
    portion = max(found, key=lambda p: sum(reference.places[name].elements for name in p.names))
    name = max(portion.names, key=lambda n: reference.places[n].elements)
    shape = reference.places[name].shape
    row = math.prod(shape[1:]) if len(shape) > 1 else 1
    rows = max(min(shape[0] if shape else 1, STRETCH // max(row, 1)), 1)

    def piece(source: Any) -> dict[str, Tensor]:
        return {name: source.view(name, 0, rows * row).reshape(rows, *shape[1:]) if shape else source.tensor(name)}

    chosen = [piece(experts[place]) for place in portion.experts]
    under = piece(base) if base is not None else None
    best = math.inf
    for _ in range(2):
        began = time.perf_counter()
        merge_state_dicts(portion.method, chosen, under, portion.weights, device=str(power.devices[0]))
        best = min(best, time.perf_counter() - began)
    return max(rows * row, 1) / max(best, 1e-9)


@dataclass(frozen=True)
class TensorStatistics:
    """What happened to one tensor. Shares are of the sampled entries that an expert changed."""

    name: str
    shape: tuple[int, ...]
    elements: int
    sampled: int
    method: str
    experts: tuple[int, ...]
    """Places of the experts that were combined; what follows is in their order."""
    sizes: tuple[float, ...]
    """Root mean square of each expert's change."""
    size: float
    """The same of the result's."""
    sign_disagreement: float | None
    """Of entries that two experts changed, the share that they moved in opposite ways; mean over pairs."""
    cosine: float | None
    """Between the changes of two experts; mean over pairs."""
    trimmed: tuple[float, ...]
    """Per expert, the share of its changes that the method dropped before combining (small or at random)."""
    kept: tuple[float, ...]
    """Per expert, the share of its changes that the result moves in the same direction."""
    overruled: tuple[float, ...]
    """Per expert, the share of its changes that the result moves in the opposite direction."""


@dataclass(frozen=True)
class MatrixAccount:
    """What a merge by singular vectors kept and undid of one matrix."""

    name: str
    ranks: tuple[int, ...]
    """Per expert, the singular vectors that were kept."""
    kept_energy: tuple[float, ...]
    """Per expert, the share of its squared change that they hold."""
    interference: float
    """Overlap of the experts' singular vectors, the sum of |(U'U - I) S (V'V - I)|, before they are made orthogonal."""
    interference_after: float


@dataclass(frozen=True)
class MergeStatistics:
    """The statistics of a merge, and what changes are measured from."""

    reference: str
    """"the base", or "the experts' mean" where there is no base."""
    experts: tuple[str, ...]
    tensors: tuple[TensorStatistics, ...]
    seconds: float
    """What taking them cost."""
    bytes_read: int
    matrices: tuple[MatrixAccount, ...] = ()
    """Of a few matrices, for methods that merge by singular vectors."""


def merge_statistics(
    recipe: MergeRecipe, out: str | os.PathLike[str], progress: Callable[[float, str], None] | None = None
) -> MergeStatistics:
    """Compare the merged checkpoint `out` with its inputs, tensor by tensor, on stretches of each."""
    began = time.perf_counter()
    tell = progress or (lambda fraction, words: None)
    base, experts = open_inputs(recipe.method, recipe.experts, recipe.base, recipe.weights, recipe.tokenizer)
    merged = Checkpoint(out)
    reference = base or experts[0]
    made, read = [], 0
    found = _portions(recipe, reference, experts)
    total = sum(len(portion.names) for portion in found) or 1
    for portion in found:
        pieces = {name: _pieces(reference.places[name].elements) for name in portion.names}
        global_cutoffs = _global_cutoffs(portion, pieces, base, experts)
        for name in portion.names:
            if name in merged.places and merged.places[name].elements == reference.places[name].elements:
                statistics, size = _of_tensor(portion, name, pieces[name], base, experts, merged, global_cutoffs)
                made.append(statistics)
                read += size
            tell(len(made) / total, f"statistics of {name}")
    matrices = [made for portion in found for made in _accounts(portion, base, experts)]
    order = {name: place for place, name in enumerate(reference.places)}
    made.sort(key=lambda t: order[t.name])
    return MergeStatistics(
        "the base" if base is not None else "the experts' mean",
        tuple(str(e.path.name) for e in experts),
        tuple(made),
        time.perf_counter() - began,
        read,
        tuple(matrices),
    )


def _accounts(portion: Portion, base: Any, experts: Sequence[Any]) -> Iterator[MatrixAccount]:
    """Accounts of a few matrices, from the first layer to the last, if the method gives any."""
    account = getattr(portion.method, "account", None)
    if account is None or base is None:
        return
    shapes = {name: base.places[name].shape for name in portion.names}
    whole = [
        name for name, shape in shapes.items()
        if len(shape) == 2 and math.prod(shape) <= LARGEST_MATRIX and portion.method.unit(name, shape) == "tensor"
    ]  # fmt: skip
    for name in sorted({whole[place * (len(whole) - 1) // max(MATRICES - 1, 1)] for place in range(MATRICES) if whole}):
        origin = base.tensor(name).float()
        changes = [
            (experts[place].tensor(name).float() - origin) * weight
            for place, weight in zip(portion.experts, portion.weights, strict=True)
        ]
        found = account(changes)
        yield MatrixAccount(name, found.ranks, found.kept_energy, found.interference, found.interference_after)


def _pieces(elements: int) -> list[tuple[int, int]]:
    """(start, count) of the stretches that are read: all of a small tensor, else a few that begin where blocks do."""
    if elements <= PIECES * PIECE:
        return [(0, elements)] if elements else []
    blocks = elements // BLOCK
    chosen = sorted({int(place * max(blocks - 1, 0) / max(PIECES - 1, 1)) for place in range(PIECES)})
    return [(block * BLOCK, min(PIECE, elements - block * BLOCK)) for block in chosen]


def _changes(
    portion: Portion, name: str, pieces: Sequence[tuple[int, int]], base: Any, experts: Sequence[Any]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Per piece the experts' changes and what they are measured from, in float32."""
    changes, origins = [], []
    for start, count in pieces:
        values = [experts[place].view(name, start, count).float() for place in portion.experts]
        origin = base.view(name, start, count).float() if base is not None else torch.stack(values).mean(0)
        changes.append([value - origin for value in values])
        origins.append(origin)
    return changes, origins


def _prepared(portion: Portion, name: str, shape: tuple[int, ...], start: int, change: Tensor, place: int) -> Tensor:
    own = portion.each[place] if portion.each else portion.method
    if not own.needs_base or own.unit(name, shape) != "stretch":
        return change
    values = change.clone()
    own.prepare(values, place, MergePart(name, start, portion.weights))
    return values


def _global_cutoffs(
    portion: Portion, pieces: Mapping[str, Sequence[tuple[int, int]]], base: Any, experts: Sequence[Any]
) -> tuple[float, ...]:
    """Estimated cutoffs of a share of the whole task vector, per expert; empty where the method has none."""
    kept = portion.method.kept_share()
    if kept is None or kept[1] != "global" or base is None:
        return ()
    sizes: list[list[Tensor]] = [[] for _ in portion.experts]
    weights = []
    for name in portion.names:
        changes, _ = _changes(portion, name, pieces[name][:1], base, experts)
        for piece in changes:
            stride = max(len(piece[0]) // 4096, 1)
            for place, change in enumerate(piece):
                sizes[place].append(change.abs()[::stride])
            count = len(piece[0][::stride])
            weights.append(torch.full((count,), base.places[name].elements / count, dtype=torch.float64))
    weight = torch.cat(weights)
    found = []
    for values in sizes:
        every = torch.cat(values)
        order = every.argsort(descending=True)
        reach = int(torch.searchsorted(weight[order].cumsum(0), kept[0] * weight.sum()))
        found.append(float(every[order[min(reach, len(order) - 1)]]))
    return tuple(found)


def _of_tensor(
    portion: Portion,
    name: str,
    pieces: Sequence[tuple[int, int]],
    base: Any,
    experts: Sequence[Any],
    merged: Checkpoint,
    global_cutoffs: tuple[float, ...],
) -> tuple[TensorStatistics, int]:
    place_of = merged.places[name]
    changes, origins = _changes(portion, name, pieces, base, experts)
    count = sum(length for _, length in pieces)
    n = len(portion.experts)
    each = [torch.cat([piece[i] for piece in changes]) if changes else torch.empty(0) for i in range(n)]
    ready = [
        torch.cat([
            _prepared(portion, name, place_of.shape, start, piece[i], i)
            for (start, _), piece in zip(pieces, changes, strict=True)
        ])
        if changes else torch.empty(0)
        for i in range(n)
    ]  # fmt: skip
    result = (
        torch.cat([merged.view(name, s, c).float() - o for (s, c), o in zip(pieces, origins, strict=True)])
        if pieces else torch.empty(0)
    )  # fmt: skip
    trimmed = []
    for i in range(n):
        own = (portion.each[i] if portion.each else portion.method).kept_share() if base is not None else None
        cutoff = 0.0
        if own is not None and len(ready[i]):
            limit = global_cutoffs[i] if own[1] == "global" and global_cutoffs else None
            keep = max(math.floor(own[0] * len(ready[i])), 1)
            cutoff = limit if limit is not None else float(ready[i].abs().kthvalue(len(ready[i]) - keep + 1).values)
        changed = each[i] != 0
        gone = changed & ((ready[i] == 0) | (ready[i].abs() < cutoff))
        trimmed.append(_share(gone, changed))
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    opposite, cosines = [], []
    for i, j in pairs:
        both = (each[i] != 0) & (each[j] != 0)
        if bool(both.any()):
            opposite.append(_share(both & (each[i].sign() != each[j].sign()), both))
        size = float(each[i].norm() * each[j].norm())
        if size > 0:
            cosines.append(float(each[i].double().dot(each[j].double())) / size)
    moved = result.sign()
    statistics = TensorStatistics(
        name, place_of.shape, place_of.elements, count, portion.method.name, portion.experts,
        tuple(_size(change) for change in each), _size(result),
        sum(opposite) / len(opposite) if opposite else None, sum(cosines) / len(cosines) if cosines else None,
        tuple(trimmed),
        tuple(_share((change != 0) & (moved == change.sign()), change != 0) for change in each),
        tuple(_share((change != 0) & (moved == -change.sign()), change != 0) for change in each),
    )  # fmt: skip
    item = place_of.dtype.itemsize
    return statistics, count * (n + 1 + (base is not None)) * item


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if len(values) else 0.0


def _share(part: Tensor, of: Tensor) -> float:
    whole = int(of.sum())
    return int(part.sum()) / whole if whole else 0.0


def save_report(
    recipe: MergeRecipe,
    statistics: MergeStatistics,
    out: Path,
    *,
    plan: MergePlan | None = None,
    seconds: float = 0.0,
    command: str = "",
) -> tuple[Path, Path]:
    """Write OUT.report.html and OUT.report.json beside the merged folder; a kill leaves old files or none."""
    page, data = out.with_name(f"{out.name}.report.html"), out.with_name(f"{out.name}.report.json")
    content = {
        "method": recipe.method.name, "parameters": recipe.method.parameters(), "weights": list(recipe.weights),
        "seconds": seconds, "plan": asdict(plan) if plan is not None else None, "statistics": asdict(statistics),
    }  # fmt: skip
    write_text(data, json.dumps(content, indent=1, default=str) + "\n")
    write_text(page, render(recipe, statistics, plan=plan, seconds=seconds, command=command, out=out))
    return page, data


def render(
    recipe: MergeRecipe,
    statistics: MergeStatistics,
    *,
    plan: MergePlan | None = None,
    seconds: float = 0.0,
    command: str = "",
    out: Path | None = None,
) -> str:
    """The report as one HTML file without network."""
    from markupsafe import Markup

    tensors = statistics.tensors
    elements = sum(t.elements for t in tensors) or 1

    def mean(value: Callable[[TensorStatistics], float | None]) -> float | None:
        known = [(v, t.elements) for t in tensors if (v := value(t)) is not None]
        weight = sum(w for _, w in known)
        return sum(v * w for v, w in known) / weight if weight else None

    def of_expert(place: int, shares: Callable[[TensorStatistics], tuple[float, ...]]) -> str:
        return _percent(mean(lambda t: shares(t)[t.experts.index(place)] if place in t.experts else None))

    per_expert = [
        (
            expert,
            of_expert(place, lambda t: t.trimmed),
            of_expert(place, lambda t: t.kept),
            of_expert(place, lambda t: t.overruled),
        )
        for place, expert in enumerate(statistics.experts)
    ]
    maps = [
        (
            "Sign disagreement",
            "Of the entries that two experts changed, the share that they moved in opposite ways. Half is chance.",
            Markup(heat_map(tensors, lambda t: t.sign_disagreement, 0.0, 0.5)),
        ),
        (
            "Cosine between the experts' changes",
            "1: the same direction; 0: unrelated; below 0: against each other (hatched).",
            Markup(heat_map(tensors, lambda t: t.cosine, 0.0, 1.0)),
        ),
        (
            "What the method trimmed",
            "Share of the experts' changes that were dropped before combining, mean over experts.",
            Markup(heat_map(tensors, lambda t: sum(t.trimmed) / max(len(t.trimmed), 1), 0.0, 1.0)),
        ),
    ]
    seen = statistics.matrices
    before, after = (sum(getattr(m, what) for m in seen) for what in ("interference", "interference_after"))
    interference = [("interference undone", f"{before:.3g} → {after:.3g}", f"in {len(seen)} matrices")] if seen else []
    tiles = [
        ("tensors combined", f"{len(tensors):,}", f"{elements:,} weights"),
        ("sign disagreement", _percent(mean(lambda t: t.sign_disagreement)), "of entries changed by two experts"),
        ("cosine of changes", _plain(mean(lambda t: t.cosine)), "mean over pairs, by weights"),
        *interference,
        ("merged in", number(seconds, "s"), f"statistics took {number(statistics.seconds, 's')}"),
    ]
    rows = [
        (
            t.name, "×".join(map(str, t.shape)), t.method, _plain(t.size), ", ".join(_plain(s) for s in t.sizes),
            _percent(t.sign_disagreement), _plain(t.cosine), ", ".join(map(_percent, t.trimmed)),
            ", ".join(map(_percent, t.kept)), ", ".join(map(_percent, t.overruled)),
        )
        for t in tensors
    ]  # fmt: skip
    parameters = ", ".join(f"{k}={v}" for k, v in recipe.method.parameters().items())
    facts = [
        ("method", f"{recipe.method.name} ({parameters})" if parameters else recipe.method.name),
        ("experts", ", ".join(f"{e} ({w:g})" for e, w in zip(statistics.experts, recipe.weights, strict=True))),
        ("changes from", statistics.reference),
        ("rules", str(len(recipe.rules))),
        ("sampled", f"{sum(t.sampled for t in tensors):,} of {elements:,} weights"),
    ]
    if plan is not None:
        planned = f"{number(plan.seconds, 's')} estimated, {number(plan.bytes_read, 'bytes')} read, "
        facts.append(("plan", planned + f"{number(plan.bytes_written, 'bytes')} written, {plan.threads} threads"))
    return filled(
        TEMPLATE, title=out.name if out is not None else "merge", method=recipe.method, facts=facts, tiles=tiles,
        per_expert=per_expert, maps=maps, rows=rows, command=command,
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def heat_map(
    tensors: Sequence[TensorStatistics], value: Callable[[TensorStatistics], float | None], low: float, high: float
) -> str:
    """Layers across, kinds of tensors down, each coloured by its value; a tensor outside the layers has its own row."""
    cells: dict[tuple[str, int], tuple[float, str]] = {}
    kinds: dict[str, None] = {}
    layers = 1
    for t in tensors:
        found = re.match(r"(.*?\.|)(\d+)\.(.*)", t.name)
        layer, kind = (int(found.group(2)), f"{found.group(1)}*.{found.group(3)}") if found else (0, t.name)
        figure = value(t)
        if figure is not None and layer < 512:
            kinds.setdefault(kind)
            cells[kind, layer] = figure, t.name
            layers = max(layers, layer + 1)
    shown = list(kinds)[:80]
    left, side, tall = 300, min(24.0, 700 / layers), 16
    width, height = left + side * layers + 8, tall * len(shown) + 26
    parts = [f'<svg viewBox="0 0 {width:.0f} {height}" role="img" style="max-width:{width:.0f}px">']
    parts.append(
        '<defs><pattern id="against" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="1.4" height="4" fill="var(--c2)"/></pattern></defs>'
    )
    for row, kind in enumerate(shown):
        label = kind if len(kind) <= 44 else "…" + kind[-43:]
        parts.append(f'<text x="{left - 8}" y="{tall * row + 12}" text-anchor="end">{escape(label)}</text>')
        for layer in range(layers):
            if (kind, layer) in cells:
                figure, name = cells[kind, layer]
                strength = min(max((figure - low) / (high - low), 0), 1)
                fill = 'fill="url(#against)"' if figure < low else f'fill="var(--c1)" fill-opacity="{strength:.3f}"'
                parts.append(
                    f'<rect x="{left + side * layer:.1f}" y="{tall * row}" width="{side - 1:.1f}" height="{tall - 1}" '
                    f'stroke="var(--grid)" stroke-width="0.5" {fill}><title>{escape(name)}: {figure:.3f}</title></rect>'
                )
    step = max(layers // 10, 1)
    parts += [
        f'<text x="{left + side * (layer + 0.5):.1f}" y="{height - 8}" text-anchor="middle">{layer}</text>'
        for layer in range(0, layers, step)
    ]
    return "".join(parts) + "</svg>"
