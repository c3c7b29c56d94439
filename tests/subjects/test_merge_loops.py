"""Compiled loops against what torch and numpy do in the same places."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gratis
from gratis.contract.method import Cutoff, MergePart
from gratis.methods.merging import dare, ties
from gratis.subjects import compiled, selection
from gratis.subjects.compiled import compiled_loops
from gratis.subjects.merging import merge

pytest.importorskip("numba")
loops = compiled.merge_loops()
# Not whole pieces, and not whole words of eight.
SIZES = (1, 7, 2048, 2051, 70_003)


def same(a, b):
    """Equal to the bit: signs of zeros count."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def normal(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def without_loops(monkeypatch):
    monkeypatch.setattr(compiled, "merge_loops", lambda: None)


def test_every_bfloat16_is_widened_exactly():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    widened = torch.empty(65536)
    loops.widen(bits, widened)
    wanted = bits.float()
    # Of what is not a number the bits may differ.
    assert same(widened[~wanted.isnan()], wanted[~wanted.isnan()])
    assert bool(widened[wanted.isnan()].isnan().all())


@pytest.mark.parametrize("size", SIZES)
def test_differences(size):
    halves, base, into = normal(size).bfloat16(), normal(size, 1), torch.full((size,), torch.nan)
    loops.difference(halves, base, into)
    assert same(into, halves.float() - base)


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_rounded_as_torch_rounds_them(size):
    merged, base = normal(size), normal(size, 1)
    assert same(loops.rounded_sum(merged, base), (merged + base).bfloat16())


def test_rounding_at_ties_zeros_and_ends():
    halfway = torch.arange(0x3F80_0000, 0x3F80_0000 + (1 << 20), 1 << 12, dtype=torch.int32).view(torch.float32)
    ends = torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.3895314e38])
    # Of these the rounding would overflow into zeros.
    not_numbers = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    sums = torch.cat([halfway, -halfway, ends, not_numbers])
    rounded, wanted = loops.rounded_sum(sums, torch.full_like(sums, -0.0)), sums.bfloat16()
    assert same(rounded[~wanted.isnan()], wanted[~wanted.isnan()])
    assert bool(rounded[wanted.isnan()].isnan().all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ends", [(0.0, 0.5), (0.5, 0.5), (0.25, 0.75), (0.3, 3.0e38), (2.0, 5.0), (0.0, 0.0)])
def test_a_survey_counts_what_lies_below_at_and_between(size, ends):
    # Eighths below the middle of the stretch, so that some numbers equal the ends.
    magnitudes = normal(size).abs()
    magnitudes[: size // 2] = (magnitudes[: size // 2] * 8).floor() / 8
    low, high = (int(end) for end in np.array(ends, np.float32).view(np.uint32))
    below, at_low, at_high, between = loops.survey(magnitudes, low, high)
    numbers = magnitudes.numpy()
    lowest, highest = np.float32(ends[0]), np.float32(ends[1])
    assert (below, at_low, at_high) == (
        (numbers < lowest).sum(), (numbers == lowest).sum(), (numbers == highest).sum()
    )  # fmt: skip
    assert np.array_equal(between.view(np.float32), numbers[(numbers > lowest) & (numbers < highest)])


@pytest.mark.parametrize("first_dropped", [0, 1, 40_000, 69_999, 70_003])
def test_trimming(first_dropped, monkeypatch):
    # Quarters: many are equal to the cutoff, and some zeros are negative.
    values = (normal(70_003) * 4).round() / 4
    cutoff = Cutoff(0.75, first_dropped - 1)
    trimmed, reference = values.clone(), values.clone()
    ties.trim(trimmed, cutoff, 0)
    without_loops(monkeypatch)
    ties.trim(reference, cutoff, 0)
    assert torch.equal(trimmed, reference)
    kept = (values.abs() > 0.75) | ((values.abs() == 0.75) & (torch.arange(70_003) < first_dropped))
    assert torch.equal(trimmed, torch.where(kept, values, 0.0))


@pytest.mark.parametrize("density", [0.5, 0.13, 1e-3, 0.999])
def test_dropping(density, monkeypatch):
    values, part = normal(70_003), MergePart("t", 0, (1.0,))
    dropped, reference = values.clone(), values.clone()
    dare.drop(dropped, density, 0, 1, part)
    without_loops(monkeypatch)
    dare.drop(reference, density, 0, 1, part)
    assert same(dropped, reference)


@pytest.mark.parametrize("zero_sums", ["majority", "positive", "negative"])
@pytest.mark.parametrize("divisor", ["count", "weight", "none"])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (0.4, 0.3, 0.3), (0.5, -0.25, 0.0, 2.0)])
def test_electing(zero_sums, divisor, weights, monkeypatch):
    # Small whole numbers: many entries are 0, of either sign, and many cancel.
    deltas = [(normal(70_003, seed) * 2).round() for seed in range(len(weights))]
    parts = [MergePart("t", 0, weights) for _ in range(2)]
    merged = ties.elect_and_average([delta.clone() for delta in deltas], parts[0], divisor, zero_sums)
    without_loops(monkeypatch)
    reference = ties.elect_and_average([delta.clone() for delta in deltas], parts[1], divisor, zero_sums)
    assert torch.equal(merged, reference)
    # What is written is the base plus this, of which the sign of a zero shows only beside another zero.
    assert same(merged + 0.0, reference + 0.0)
    assert parts[0].totals == parts[1].totals
    assert parts[0].revise == parts[1].revise


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints with a tensor of several stretches, one below the smallest and an empty one, in three dtypes."""
    root = tmp_path_factory.mktemp("loops")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
        for number in range(4):
            folder = root / name / str(number)
            folder.mkdir(parents=True)
            base = {"large": (3, 100_003), "small": (1_000,), "empty": (0, 4)}
            tensors = {key: normal(shape, 7) for key, shape in base.items()}
            if number:
                tensors = {key: value + 0.1 * normal(value.shape, number) for key, value in tensors.items()}
            tensors["large"][0, :500] = -0.0
            save_file({key: value.to(dtype) for key, value in tensors.items()}, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return root


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    "method",
    [
        gratis.TIES(density=0.3), gratis.TIES(density=0.3, scope="tensor", divisor="none", scale=0.7),
        gratis.DARETIES(density=0.4, trim=0.5), gratis.DARE(density=0.4), gratis.TaskArithmetic(), gratis.DELLA(),
        gratis.Breadcrumbs(),
    ],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_merges_write_the_same_bytes_with_and_without_the_loops(folders, dtype, method, tmp_path, monkeypatch):
    experts = [folders / dtype / str(number) for number in (1, 2, 3)]

    def merged(name, threads):
        out = tmp_path / name
        merge(method, base=folders / dtype / "0", experts=experts, weights=(0.4, 0.3, 0.3), out=out, threads=threads)
        return load_file(out / "model.safetensors")

    used = []
    real = compiled.merge_loops
    monkeypatch.setattr(compiled, "merge_loops", lambda: used.append(1) or real())
    loop_one, loop_two = merged("one", 1), merged("two", 2)
    # Task arithmetic has no loops of its own: what is read and written in bfloat16 has.
    assert used or (type(method) is gratis.TaskArithmetic and dtype != "bfloat16")
    without_loops(monkeypatch)
    reference = merged("torch", 1)
    assert all(same(loop_one[key], reference[key]) and same(loop_two[key], reference[key]) for key in reference)


def test_loops_are_for_large_stretches_of_float32():
    large = torch.empty(compiled.SMALLEST)
    assert compiled_loops(large) is loops
    assert compiled_loops(large[:-1]) is None
    assert compiled_loops(large.double()) is None
    assert compiled_loops(torch.empty(2 * compiled.SMALLEST)[::2]) is None
    assert compiled_loops(torch.empty(compiled.SMALLEST, device="meta")) is None


@pytest.mark.parametrize("numba", ["absent", "broken"])
def test_without_numba_torch_does_the_work(folders, tmp_path, numba):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.2 or less')")
    script = f"""
import sys
if {numba == "broken"}:
    sys.path.insert(0, {str(tmp_path)!r})
else:
    sys.modules["numba"] = None
import gratis
from gratis.subjects.merging import merge
from gratis.subjects.compiled import merge_loops
assert merge_loops() is None
root, out = {str(folders / "bfloat16")!r}, {str(tmp_path / "out")!r}
merge(gratis.TIES(density=0.3), base=root + "/0", experts=[root + "/1", root + "/2"], out=out, threads=1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("numba does not work here (Numba needs NumPy 1.2 or less)" in done.stderr) == (numba == "broken")
    experts = [folders / "bfloat16" / number for number in ("1", "2")]
    merge(gratis.TIES(density=0.3), base=folders / "bfloat16" / "0", experts=experts, out=tmp_path / "here", threads=1)
    there, here = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "here"))
    assert all(same(there[key], here[key]) for key in here)


def test_where_nothing_can_be_kept_on_disk_the_loops_are_compiled_anew():
    script = """
import numba.core.caching as caching
for kept in (caching.CacheImpl, caching.CodeLibraryCacheImpl, caching.CompileResultCacheImpl):
    kept._locator_classes = []
import torch
from gratis.subjects import merge_loops
into = torch.empty(3)
merge_loops.widen(torch.tensor([1.0, -2.5, 0.0]).bfloat16(), into)
print(into.tolist(), merge_loops._trim.stats.cache_path)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split("] ") == ["[1.0, -2.5, 0.0", "None\n"], done.stderr


def test_a_selection_is_the_same_by_either_form(monkeypatch):
    values = (normal(400_000).abs() * 64).round() / 64
    stretches = [selection.Stretch("t", at, min(131_072, 400_000 - at)) for at in range(0, 400_000, 131_072)]

    def kept(keep):
        return selection.largest(stretches, keep, lambda part: values[part.start : part.start + part.count], map)

    found = [kept(keep) for keep in (1, 1_000, 200_000, 399_999, 400_000)]
    without_loops(monkeypatch)
    assert found == [kept(keep) for keep in (1, 1_000, 200_000, 399_999, 400_000)]
