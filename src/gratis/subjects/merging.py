"""Merging checkpoints from disk to disk: any safetensors files, by key, in bounded memory.

Tensors are views on their files, worked on in stretches that fit the processor's cache by a few threads, and written
at their place in an output that was laid out in advance. The output appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import FileError, ParameterError
from gratis.contract.method import Merge
from gratis.contract.release import VERSION
from gratis.subjects.checkpoint_writer import Writer, fingerprint, restore_replaced
from gratis.subjects.checkpoints import DTYPES, TensorPlace, TensorSource
from gratis.subjects.merge_engine import MergeProgress, Power, stream
from gratis.subjects.merge_inputs import Inputs, checked_weights
from gratis.subjects.merge_rules import Rule
from gratis.subjects.merge_workers import WorkerLostError, Workers
from gratis.subjects.merged_folder import carry, copy_within, describe, recipe_of, write_card, write_record


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
    device: str | Sequence[str] = "cpu",
    workers: int | None = None,
    stretch: int | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: MergeProgress | None = None,
) -> MergeReport:
    """Merge the checkpoints `experts` (folders or safetensors files) into the new folder `out`.

    `base` is the common ancestor, for methods that need one; configuration and tokenizer are its, or the first
    expert's. `weights` is one number per expert, 1 by default. `rules` merge some tensors otherwise.
    `dtype` is the result's ("float32", "bfloat16",
    "float16"), the base's by default; the arithmetic is float32. The result is the same for any `threads` and `stretch`
    (elements worked on at a time). `device` is where it is computed: "cpu", "cuda", or several, which share the bytes.
    `workers` shares the merge out over that many processes of a ray cluster (extra `scale`): the one that is connected or
    that RAY_ADDRESS names, else one on this machine. Workers on other machines need the same paths.

    `tokenizer` says what becomes of different vocabularies: "error" refuses them, "base" keeps the base's tokens, "union"
    takes every model's, "intersect" those that all have; rows of embedding and head are put in order.

    A checkpoint is a safetensors file, a folder with one or several, a diffusers pipeline, a GGUF file, or a PEFT adapter
    of the base (`MODEL+ADAPTER` for one of another model). A merge that was killed or interrupted leaves `OUT.partial`;
    the same merge goes on from there, to the same bytes. `merge.json` in `out` records the recipe and checksums.

    Raises FileError for damaged files, a full disk or an output that exists, InputError for checkpoints that do not fit
    together or hold values that are not finite, before or without leaving anything under `out`.
    """
    began = time.perf_counter()
    named = {device} if isinstance(device, str) else set(device)
    if workers is not None and named - {"cpu"}:
        raise ParameterError("Workers compute on their processors: leave out device or workers.")
    power = Power.of(threads, device, stretch)
    target = Path(out).expanduser()
    inputs = Inputs.open(method, base, experts, weights, tokenizer)
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
    writer = Writer(target, places, shard_bytes, homes, _plan(inputs, method, rules, dtype, power.stretch))
    resumed = bool(writer.left)
    try:
        with ExitStack() as ending:
            if workers is not None:
                team = Workers(workers)
                ending.callback(team.close)
                power = replace(power, workers=team)
            stream(inputs, method, rules, places, writer, power, progress)
        _describe_folder(inputs, writer, method, dtype, rules, tokenizer)
        writer.finish()
    except BaseException as error:
        # A merge that was interrupted or lost a worker goes on from here the next time.
        if isinstance(error, Exception) and not isinstance(error, WorkerLostError):
            writer.abandon()
        else:
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
    inputs = Inputs.open(method, base, experts, weights, tokenizer)
    return inputs.base, inputs.experts


def merge_state_dicts(
    method: Merge,
    experts: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | None = None,
    stretch: int | None = None,
    rules: Sequence[Rule] = (),
    device: str | Sequence[str] = "cpu",
) -> dict[str, Tensor]:
    """The same merge of state dicts in memory; inputs are left as they are, tensors of integers are the base's."""
    inputs = Inputs(method, base, list(experts), checked_weights(weights, len(experts)))
    inputs.check(method)
    merged: dict[str, Tensor] = {}
    for name, place in inputs.reference.places.items():
        merged[name] = inputs.reference.tensor(name).clone() if not place.dtype.is_floating_point else torch.empty(
            place.shape, dtype=place.dtype
        )  # fmt: skip

    class Memory:
        def write(self, name: str, values: Tensor, start: int = 0) -> None:
            merged[name].view(-1)[start : start + len(values)] = values

    places = {name: (t.dtype, tuple(t.shape)) for name, t in merged.items()}
    stream(inputs, method, rules, places, Memory(), Power.of(1, device, stretch))
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
    inputs = Inputs.open(method, base, experts, expert_weights, tokenizer)
    places = {name: (place.dtype, place.shape) for name, place in inputs.reference.places.items()}
    floating = [name for name, (dtype, _) in places.items() if dtype.is_floating_point]
    missing = [name for name in floating if name not in weights or tuple(weights[name].shape) != places[name][1]]
    if missing:
        return missing

    class Live:
        def write(self, name: str, values: Tensor, start: int = 0) -> None:
            weights[name].view(-1)[start : start + len(values)] = values.to(weights[name].device)

    stream(inputs, method, rules, places, Live(), Power.of(1))
    return []


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


def _check_output(out: Path, inputs: Inputs, overwrite: bool) -> None:
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
    inputs: Inputs, writer: Writer, method: Merge, dtype: str | None, rules: Sequence[Rule], tokenizer: str
) -> None:
    folder = writer.folder
    carry(inputs.reference, folder)
    if (folder / "config.json").is_file() and not isinstance(inputs.reference, TensorSource):
        (folder / "config.json").write_text(json.dumps(inputs.reference.config(), indent=2) + "\n", encoding="utf-8")
    if method.configures is not None:
        copy_within(inputs.experts[method.configures].folder, "config.json", folder)
    described = 0
    if method.describes is not None:
        expert = inputs.experts[method.describes]
        describe(expert, folder)
        described = next(number for number, source in enumerate(inputs.all) if source is expert)
    if inputs.vocabulary is not None:
        inputs.vocabulary.write(folder, described)
    recipe = recipe_of(method, inputs.base, inputs.experts, inputs.weights, dtype, rules)
    if tokenizer != "error":
        recipe["tokenizer"] = tokenizer
    write_card(folder, method, recipe)
    write_record(folder, recipe, writer.checksums())


def _plan(
    inputs: Inputs,
    method: Merge,
    rules: Sequence[Rule],
    dtype: str | None,
    stretch: int,
) -> str:
    """What tells this merge from any other: method, parameters, layout, and the files it reads."""
    files = [[str(file) for file in source.files] for source in inputs.all]
    parts = [
        VERSION, torch.__version__, repr(method), repr(list(rules)), repr(inputs.weights), str(dtype),
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
    device: str | Sequence[str] = "cpu",
    workers: int | None = None,
    progress: MergeProgress | None = None,
) -> MergeReport:
    """Run a merge recipe, in gratis's form or mergekit's: see `gratis.subjects.merge_recipe`.

    Paths are relative to the recipe, or to one of the folders `models`. Raises FileError for a recipe that cannot be
    read, has unknown keys, or names what lies outside those folders.
    """
    from gratis.subjects.merge_recipe import load_recipe

    read = load_recipe(recipe, models)
    return read.run(out, overwrite=overwrite, threads=threads, device=device, workers=workers, progress=progress)
