from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gratis
from gratis.contract.errors import FileError, InputError, ParameterError, UnknownNameError
from gratis.contract.method import MergePart
from gratis.methods.merging.dare import drop
from gratis.methods.merging.ties import Negative
from gratis.subjects import checkpoints, merge_engine
from gratis.subjects.checkpoints import Checkpoint, read_header
from gratis.subjects.merging import merge, merge_recipe, merge_state_dicts
from gratis.subjects.selection import Stretch, _by_bits, largest
from tests.methods.merging import reference

SHAPES = {
    "embed.weight": (400, 512),
    "norm.weight": (64,),
    "conv.weight": (8, 4, 3, 3),
    "scalar": (1,),
    "empty": (0, 5),
}


def models(dtype=torch.float32, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    base["steps"] = torch.tensor([3, 4])
    experts = []
    for _ in range(count):
        expert = {
            n: t + (0.1 * torch.randn(t.shape, generator=generator)).to(dtype) if t.is_floating_point() else t + 1
            for n, t in base.items()
        }
        experts.append(expert)
    return base, experts


def floats(tensors):
    return {n: t.double().numpy() for n, t in tensors.items() if t.is_floating_point()}


def assert_close(got, expected, tolerance=1e-6):
    for name, value in expected.items():
        np.testing.assert_allclose(got[name].double().numpy(), value, atol=tolerance, rtol=tolerance, err_msg=name)


WEIGHTS = [(1.0, 1.0, 1.0), (0.4, 0.3, 0.3), (1.0, -0.5, 2.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_against_the_definition(weights, scope, density):
    base, experts = models()
    for divisor in ("count", "weight"):
        got = merge_state_dicts(
            gratis.TIES(density=density, scope=scope, scale=0.7, divisor=divisor), experts, base, weights
        )
        expected = reference.ties(floats(base), [floats(e) for e in experts], density, 0.7, weights, scope, divisor)
        assert_close(got, expected)
        assert torch.equal(got["steps"], base["steps"])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_task_arithmetic_and_average_against_the_definition(weights):
    base, experts = models()
    doubles = [floats(e) for e in experts]
    assert_close(
        merge_state_dicts(gratis.TaskArithmetic(scale=0.4), experts, base, weights),
        reference.task_arithmetic(floats(base), doubles, 0.4, weights),
    )
    assert_close(merge_state_dicts(gratis.Average(), experts, None, weights), reference.average(doubles, weights))


def test_exactly_the_share_is_kept_with_ties_in_their_order():
    base = {"w": torch.zeros(300_000)}
    expert = {"w": torch.ones(300_000).index_fill_(0, torch.arange(0, 300_000, 2), -1.0)}
    for scope in ("tensor", "global"):
        merged = merge_state_dicts(gratis.TIES(density=0.4, scope=scope), [expert], base)
        assert torch.equal(merged["w"].nonzero()[:, 0], torch.arange(120_000))
    tiny = merge_state_dicts(gratis.TIES(density=0.01), [{"w": torch.tensor([1.0, 3.0, 2.0])}], {"w": torch.zeros(3)})
    assert tiny["w"].tolist() == [0.0, 3.0, 0.0]


def test_cancelled_mass_takes_the_majority_sign():
    base = {"w": torch.zeros(5)}
    up = [{"w": torch.tensor([1.0, 2, 2, 2, -1])}, {"w": torch.tensor([-1.0, 2, 2, 2, -1])}]
    down = [{"w": -e["w"]} for e in up]
    ties = gratis.TIES(density=1.0)
    assert merge_state_dicts(ties, up, base)["w"].tolist() == [1, 2, 2, 2, -1]
    assert merge_state_dicts(ties, down, base)["w"].tolist() == [-1, -2, -2, -2, 1]
    assert merge_state_dicts(gratis.TIES(density=1.0, zero_sums="positive"), down, base)["w"].tolist() == [
        1,
        -2,
        -2,
        -2,
        1,
    ]
    assert isinstance(ties.revised({"signs": -1.0}), Negative)


def test_limits():
    base, experts = models()
    same = [experts[0]] * 3
    for method in (
        gratis.TIES(density=1.0),
        gratis.Average(),
        gratis.TaskArithmetic(scale=1 / 3),
        gratis.DARETIES(density=1.0),
    ):
        assert_close(merge_state_dicts(method, same, base), floats(experts[0]), 1e-5)
    for method in (
        gratis.TIES(scale=0),
        gratis.TaskArithmetic(scale=0),
        gratis.DARE(scale=0),
        gratis.DARETIES(scale=0),
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            base, experts = models(dtype)
            merged = merge_state_dicts(method, experts, base)
            assert all(torch.equal(merged[n], base[n]) for n in base)
    base, experts = models()
    plain = merge_state_dicts(gratis.TaskArithmetic(scale=0.4), experts, base)
    dropped = merge_state_dicts(gratis.DARE(scale=0.4, density=1.0), experts, base)
    assert all(torch.equal(plain[n], dropped[n]) for n in plain)
    one_sign = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}]
    merged = merge_state_dicts(gratis.TIES(density=1.0), one_sign, {"w": torch.zeros(2)})
    assert merged["w"].tolist() == [2.0, 3.0]


def test_dropping_is_unbiased_even_for_heavy_tails():
    tau = torch.from_numpy(np.random.default_rng(0).standard_t(2, 4000)).float()
    total = torch.zeros(4000)
    for seed in range(400):
        piece = tau.clone()
        drop(piece, 0.1, seed, 0, MergePart("w", 0, (1.0,)))
        total += piece
        kept = piece[piece != 0]
        torch.testing.assert_close(kept, 10 * tau[piece != 0], rtol=1e-6, atol=0)
    error = (total / 400 - tau) / (tau.abs() * (0.9 / 0.1 / 400) ** 0.5)
    assert error.abs().mean() < 1.0
    assert abs(error.mean()) < 0.1


@pytest.mark.parametrize(
    "method",
    [
        gratis.TIES(density=0.3),
        gratis.DARE(seed=5),
        gratis.DARETIES(trim=0.5),
        gratis.TaskArithmetic(),
        gratis.Average(),
        gratis.ModelStock(),
        gratis.MagMax(),
        gratis.Consensus(),
    ],
    ids=lambda m: m.name,
)
def test_streamed_equals_in_memory_for_any_stretch_and_threads(method, tmp_path):
    base, experts = models(torch.bfloat16)
    save(tmp_path, base, experts)
    expected = merge_state_dicts(method, experts, base)
    sources = [tmp_path / f"expert{i}" for i in range(3)]
    for stretch, threads, shard in ((65536, 1, 10**9), (131072, 3, 10**5), (10**6, 2, 10**9)):
        out = tmp_path / f"out{stretch}"
        report = merge(
            method,
            base=tmp_path / "base",
            experts=sources,
            out=out,
            stretch=stretch,
            threads=threads,
            shard_bytes=shard,
        )
        got = {n: t for file in sorted(out.glob("*.safetensors")) for n, t in load_file(file).items()}
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[n], expected[n]) for n in got)
        assert report.tensors == len(expected)
        assert (out / "config.json").is_file()
        assert method.name in (out / "README.md").read_text()
    assert len(list((tmp_path / "out131072").glob("*.safetensors"))) > 1


def save(folder, base, experts, **config):
    for name, tensors in [("base", base)] + [(f"expert{i}", e) for i, e in enumerate(experts)]:
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"model_type": "tiny", **config}))


def test_several_devices_share_the_elements_and_the_bytes_are_the_same(monkeypatch):
    """Two names of the processor stand for two devices: each has tensors of its own."""
    devices = (torch.device("cpu"), torch.device("cpu:0"))
    parts = [Stretch("w", at * 10, 10 if at % 3 else 30) for at in range(31)]
    given = {device: 0 for device in devices}
    for part, device in zip(parts, merge_engine.placed(parts, devices), strict=True):
        given[device] += part.count
    assert abs(given[devices[0]] - given[devices[1]]) <= 30

    generator = torch.Generator().manual_seed(0)
    base, *experts = [{"w": torch.randn(400_000, generator=generator)} for _ in range(4)]
    alone = merge_state_dicts(gratis.TIES(density=0.3), experts, base, stretch=65536)
    seen, real = set(), merge_engine.Engine._buffers

    def buffers(self, count):
        seen.add(getattr(self._scratch, "device", devices[0]))
        return real(self, count)

    monkeypatch.setattr(merge_engine, "_device", torch.device)
    monkeypatch.setattr(merge_engine.Engine, "_buffers", buffers)
    shared = merge_state_dicts(
        gratis.TIES(density=0.3), experts, base, stretch=65536, device=[str(device) for device in devices]
    )
    assert seen == set(devices)
    assert torch.equal(alone["w"], shared["w"])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mars", "device must be cpu"),
        ("mps", "device must be cpu"),
        ("cuda:99", "There is no device cuda:99"),
        ([], "at least"),
    ],
)
def test_devices_that_are_not_there(device, message):
    with pytest.raises(ParameterError, match=message):
        merge_state_dicts(gratis.Average(), [{"w": torch.ones(3)}], device=device)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path, *models())
    return tmp_path


def attempt(folder, method=None, **options):
    options = {
        "base": folder / "base",
        "experts": [folder / f"expert{i}" for i in range(3)],
        "out": folder / "out",
        **options,
    }
    return merge(method or gratis.TaskArithmetic(), **options)


def nothing_left(folder):
    return not (folder / "out").exists() and not list(folder.glob("*.partial"))


def rewrite(folder, change):
    path = folder / "expert1" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "lacks norm.weight"),
        (lambda t: t.update(more=torch.zeros(2)), "has beyond the others more"),
        (lambda t: t.update({"norm.weight": torch.zeros(65)}), r"'norm.weight' has shape \[64\] .* \[65\]"),
        (
            lambda t: t["norm.weight"].__setitem__(3, float("nan")),
            "'norm.weight' of .*expert1 holds values that are not finite",
        ),
        (lambda t: t["embed.weight"].__setitem__((3, 7), float("inf")), "'embed.weight' of .*expert1 holds values"),
    ],
)
def test_checkpoints_that_do_not_fit(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(InputError, match=message):
        attempt(saved)
    assert nothing_left(saved)


def header(entries, data=b"\0" * 64):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty or truncated"),
        (b"\x01\x02", "empty or truncated"),
        (struct.pack("<Q", 10**12), "truncated or no safetensors"),
        (struct.pack("<Q", 4) + b"{{{{", "damaged header"),
        (struct.pack("<Q", 2) + b"[]", "not a table"),
        (header({"a": entry(offsets=(0, 20))}), "does not fill bytes 0 to 20"),
        (header({"a": entry(shape=(-4,))}), "does not fill"),
        (header({"a": entry(offsets=(160, 176))}), "truncated: tensor 'a'"),
        (header({"a": entry(), "b": entry(offsets=(8, 24))}), "'a' and 'b' overlap"),
        (header({"a": entry(dtype="F4")}), "dtype 'F4'"),
        (header({"a": {"dtype": "F32"}}), "entry of tensor 'a' is damaged"),
        (header({"a": entry(offsets=(-16, 0))}), "does not fill"),
    ],
)
def test_damaged_files(saved, content, message):
    (saved / "expert1" / "model.safetensors").write_bytes(content)
    with pytest.raises(FileError, match=message):
        attempt(saved)
    assert nothing_left(saved)


def test_a_header_of_very_many_tensors(tmp_path):
    entries = {f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(100_000)}
    path = tmp_path / "many.safetensors"
    path.write_bytes(header(entries))
    assert len(read_header(path)) == 100_000


def test_a_header_of_a_million_tensors_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    entry = '"t%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % number for number in range(1_000_000)) + "}").encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("the header was parsed"))
    with pytest.raises(
        FileError, match=r"holds 1,000,000 tensors, more than any model does; at most 250,000 are read\."
    ):
        Checkpoint(tmp_path / "m.safetensors")


def test_tensors_are_counted_over_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MOST_TENSORS", 3)
    for number in range(2):
        save_file({f"{number}{name}": torch.ones(1) for name in "ab"}, tmp_path / f"part{number}.safetensors")
    with pytest.raises(FileError, match="holds 4 tensors"):
        Checkpoint(tmp_path)


def test_different_architectures_and_tokenizers(saved):
    (saved / "expert1" / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(InputError, match="different models: model_type is tiny and other"):
        attempt(saved)
    (saved / "expert1" / "config.json").write_text("{}")
    for name, vocabulary in (("base", {"a": 0, "b": 1}), ("expert1", {"a": 1, "b": 0})):
        (saved / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with pytest.raises(InputError, match=r"different tokenizers \(2 tokens differ\)"):
        attempt(saved)
    assert nothing_left(saved)


def test_output_over_an_input_or_over_something(saved):
    for out in (saved / "base", saved / "expert0" / "inner", saved):
        with pytest.raises(FileError, match="would overwrite the input"):
            attempt(saved, out=out, overwrite=True)
    (saved / "out").mkdir()
    (saved / "out" / "mine").write_text("x")
    with pytest.raises(FileError, match="exists already"):
        attempt(saved)
    attempt(saved, overwrite=True)
    assert not (saved / "out" / "mine").exists()
    assert Checkpoint(saved / "out").places


def test_missing_base_and_wrong_weights(saved):
    with pytest.raises(InputError, match="needs the base"):
        attempt(saved, base=None)
    with pytest.raises(InputError, match="3 experts but 2 weights"):
        attempt(saved, weights=[1, 2])
    with pytest.raises(InputError, match="finite"):
        attempt(saved, weights=[1, 2, float("nan")])
    with pytest.raises(InputError, match="at least one"):
        attempt(saved, experts=[])
    with pytest.raises(InputError, match="sum to 0"):
        attempt(saved, gratis.Average(), weights=[1, -1, 0])
    with pytest.raises(ParameterError, match="dtype"):
        attempt(saved, dtype="int8")
    assert nothing_left(saved)


def test_a_disk_that_is_too_small_or_fills_up(saved, monkeypatch):
    import collections
    import errno
    import shutil

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(FileError, match="1 bytes free"):
        attempt(saved)
    monkeypatch.undo()
    real, calls = os.pwrite, []

    def full(handle, data, offset):
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FileError, match="disk is full"):
        attempt(saved)
    assert nothing_left(saved)


def test_a_kill_leaves_nothing_under_the_name_and_the_next_run_cleans_up(saved):
    code = (
        "import os, sys, pathlib, gratis\nfrom gratis.subjects import checkpoint_writer\n"
        "real = checkpoint_writer.Writer.write\n"
        "def slow(self, name, values, start=0):\n"
        "    real(self, name, values, start); print('writing', flush=True); import time; time.sleep(30)\n"
        "checkpoint_writer.Writer.write = slow\n"
        "f = pathlib.Path(sys.argv[1])\n"
        "gratis.merge(gratis.Average(), experts=[f / 'expert0', f / 'expert1'], out=f / 'out', threads=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(saved)], stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"writing"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (saved / "out").exists()
    assert len(list(saved.glob("*.partial"))) == 1
    attempt(saved)
    assert (saved / "out").is_dir()
    assert not list(saved.glob("*.partial"))


def test_the_result_can_have_another_dtype_and_inputs_are_untouched(saved):
    before = {p: p.read_bytes() for p in saved.rglob("*.safetensors")}
    attempt(saved, dtype="bfloat16")
    assert load_file(saved / "out" / "model.safetensors")["embed.weight"].dtype == torch.bfloat16
    assert all(p.read_bytes() == content for p, content in before.items())


RECIPE = """
method: ties
parameters: {density: 0.5}
base: base
experts:
  - {path: expert0, weight: 0.4}
  - expert1
dtype: float32
"""


def test_a_recipe_runs_relative_to_its_place(saved):
    (saved / "recipe.yaml").write_text(RECIPE)
    merge_recipe(saved / "recipe.yaml", saved / "out")
    base, experts = models()
    expected = merge_state_dicts(gratis.TIES(density=0.5), experts[:2], base, (0.4, 1.0))
    got = load_file(saved / "out" / "model.safetensors")
    assert all(torch.equal(got[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("dtype", "dtpye"), FileError, "unknown key 'dtpye'; did you mean 'dtype'"),
        (("ties", "tise"), UnknownNameError, "did you mean 'ties'"),
        (("ties", "lacache"), UnknownNameError, "is no merge"),
        (("density", "desnity"), ParameterError, "did you mean 'density'"),
        (("0.4", "heavy"), FileError, "weight must be a number"),
        (("base: base", "base: !!python/object/apply:os.system [ls]"), FileError, "not safe YAML"),
        (("expert1", "expert9"), FileError, "There is no checkpoint"),
        (("experts:", "experts: 3\nx:"), FileError, "unknown key 'x'"),
    ],
)
def test_bad_recipes(saved, change, error, message):
    (saved / "recipe.yaml").write_text(RECIPE.replace(*change))
    with pytest.raises(error, match=message):
        merge_recipe(saved / "recipe.yaml", saved / "out")
    assert nothing_left(saved)


def stream(values, size):
    parts = [Stretch("w", at, min(size, len(values) - at)) for at in range(0, len(values), size)]
    return parts, lambda part: values[part.start : part.start + part.count].clone()


@pytest.mark.parametrize("kind", ["normal", "heavy", "many ties", "all equal", "mostly zero", "sorted"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999, 1.0])
def test_the_kth_magnitude_is_exact(kind, share):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200_000, generator=generator).abs()
    if kind == "heavy":
        values = values**8
    elif kind == "many ties":
        values = (values * 4).round()
    elif kind == "all equal":
        values = torch.full((200_000,), 0.25)
    elif kind == "mostly zero":
        values[values < 2] = 0
    elif kind == "sorted":
        values = values.sort().values
    keep = max(int(share * len(values)), 1)
    parts, magnitudes = stream(values, 65536)
    ordered = values.sort(descending=True).values
    for found in (
        largest(parts, keep, magnitudes, map),
        _by_bits(parts, len(values) - keep, len(values), magnitudes, map),
    ):
        assert found.magnitude == float(ordered[keep - 1])
        assert found.ties == keep - int((values > found.magnitude).sum())
        assert found.all_ties == (found.ties == int((values == found.magnitude).sum()))


@pytest.mark.parametrize("kind", ["normal", "many ties", "drifting", "subnormal"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_kth_magnitude_is_exact_where_little_can_be_held(monkeypatch, kind, share):
    from gratis.subjects import selection

    monkeypatch.setattr(selection, "MOST_HELD", 2000)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(600_000, generator=generator).abs()
    if kind == "many ties":
        values = (values * 40).round()
    elif kind == "drifting":
        values *= torch.linspace(0.5, 2, len(values))
    elif kind == "subnormal":
        values *= 1e-40
    keep = int(share * len(values))
    parts, magnitudes = stream(values, 20_000)

    def at_once(work, over):
        return [work(part) for part in over]

    ordered = values.sort(descending=True).values
    for run in (map, at_once):
        found = largest(parts, keep, magnitudes, run)
        assert found.magnitude == float(ordered[keep - 1])
        assert found.ties == keep - int((values > found.magnitude).sum())
        assert found.all_ties == (found.ties == int((values == found.magnitude).sum()))


def test_a_recipe_that_is_no_text(saved):
    (saved / "recipe.yaml").write_bytes(b"method: \xff\xfe")
    with pytest.raises(FileError, match="not UTF-8"):
        merge_recipe(saved / "recipe.yaml", saved / "out")
