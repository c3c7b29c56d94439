"""Merges that were killed, interrupted, or started twice; headers that lie."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import gratis
from gratis.contract.errors import FileError
from gratis.subjects import checkpoint_writer, merge_engine
from gratis.subjects.checkpoint_writer import check_checksums
from gratis.subjects.checkpoints import Checkpoint, read_header
from gratis.subjects.merging import merge, merge_state_dicts


@pytest.fixture
def saved(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        tensors = {f"layer{i}.weight": torch.randn(300, 512, generator=generator) for i in range(6)}
        tensors["steps"] = torch.tensor([1, 2])
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def run(folder, method=None, **options):
    return merge(
        method or gratis.TIES(density=0.4),
        base=folder / "base",
        experts=[folder / "a", folder / "b"],
        out=folder / "out",
        **{"stretch": 65536, "threads": 1, **options},
    )


def expected(folder, method=None):
    base, *experts = [load_file(folder / name / "model.safetensors") for name in ("base", "a", "b")]
    return merge_state_dicts(method or gratis.TIES(density=0.4), experts, base)


def same(folder, wanted):
    got = load_file(folder / "out" / "model.safetensors")
    check_checksums(folder / "out")
    return got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)


class Stop(BaseException):
    pass


def stopping_after(monkeypatch, count):
    """Writes that are counted, and an interruption after `count` of them. Notes are made at every part."""
    monkeypatch.setattr(merge_engine, "JOURNAL_SECONDS", 0.0)
    real, writes = checkpoint_writer.Writer.write, []

    def write(self, name, values, start=0):
        if len(writes) == count:
            raise Stop
        writes.append((name, start))
        real(self, name, values, start)
        if self._pending is not None:
            self._pending.result()

    monkeypatch.setattr(checkpoint_writer.Writer, "write", write)
    return writes


@pytest.mark.parametrize("method", [gratis.TIES(density=0.4), gratis.DARE(seed=3), gratis.Consensus()])
def test_an_interrupted_merge_goes_on_to_the_same_bytes(saved, monkeypatch, method):
    first = stopping_after(monkeypatch, 9)
    with pytest.raises(Stop):
        run(saved, method)
    monkeypatch.undo()
    assert not (saved / "out").exists()
    again = stopping_after(monkeypatch, None)
    report = run(saved, method)
    assert report.resumed
    assert len(first) == 9
    assert len(again) < 19 - 5, "most of what was done is not done again"
    assert same(saved, expected(saved, method))
    assert not list(saved.glob("*.partial"))
    assert sorted(p.name for p in (saved / "out").iterdir()) == ["README.md", "merge.json", "model.safetensors"]


def test_a_changed_input_or_method_begins_anew(saved, monkeypatch):
    stopping_after(monkeypatch, 9)
    with pytest.raises(Stop):
        run(saved)
    monkeypatch.undo()
    tensors = load_file(saved / "a" / "model.safetensors")
    tensors["layer0.weight"] += 1
    save_file(tensors, saved / "a" / "model.safetensors")
    assert not run(saved).resumed
    assert same(saved, expected(saved))
    stopping_after(monkeypatch, 9)
    with pytest.raises(Stop):
        run(saved, overwrite=True)
    monkeypatch.undo()
    other = gratis.TIES(density=0.6)
    assert not run(saved, other, overwrite=True).resumed
    assert same(saved, expected(saved, other))


def test_a_torn_or_forged_journal(saved, monkeypatch):
    stopping_after(monkeypatch, 9)
    with pytest.raises(Stop):
        run(saved)
    monkeypatch.undo()
    with open(saved / "out.partial" / "journal.jsonl", "ab") as journal:
        journal.write(b'{"done 0": [1')
    assert run(saved).resumed
    assert same(saved, expected(saved))


KILLED = """
import sys, pathlib, gratis
from gratis.subjects import checkpoint_writer, merge_engine
merge_engine.JOURNAL_SECONDS = 0.0
real = checkpoint_writer.Writer.write
def slow(self, name, values, start=0):
    real(self, name, values, start)
    print("written", flush=True)
    import time
    time.sleep(0.01)
checkpoint_writer.Writer.write = slow
f = pathlib.Path(sys.argv[1])
gratis.merge(gratis.TIES(density=0.4), base=f / "base", experts=[f / "a", f / "b"], out=f / "out", stretch=65536, threads=2)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.evidence)])
def test_kills_at_random_moments_leave_nothing_half_under_the_name(saved, kills):
    chance = random.Random()
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(saved)], stdout=subprocess.PIPE)
        for _ in range(chance.randrange(2, 6)):
            process.stdout.readline()
        time.sleep(chance.random() * 0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (saved / "out").exists()
        assert (saved / "out.partial").is_dir()
    report = run(saved)
    assert report.resumed
    assert same(saved, expected(saved))


def test_two_merges_to_one_place(saved):
    (saved / "out.partial").mkdir()
    with open(saved / "out.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileError, match="Another merge is writing"):
            run(saved)
    run(saved)
    assert same(saved, expected(saved))


def test_a_kill_between_the_two_renames_loses_nothing(saved):
    run(saved)
    os.rename(saved / "out", saved / "out.old.partial")
    with pytest.raises(FileError, match="exists already"):
        run(saved)
    assert same(saved, expected(saved))


def header_file(path, entries, data=b"\0" * 64):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


NUMBERS = st.one_of(st.integers(-20, 80), st.integers(-(2**70), 2**70), st.just(True), st.floats(), st.none())
ENTRIES = st.dictionaries(
    st.sampled_from(["a", "b", "é", "__metadata__", ""]),
    st.one_of(
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "F4", None]),
                "shape": st.lists(NUMBERS, max_size=4),
                "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
            }
        ),
        st.recursive(st.none() | st.text(max_size=3), lambda x: st.lists(x, max_size=2)),
    ),
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(entries=ENTRIES, data=st.binary(max_size=64), cut=st.integers(0, 90))
def test_a_header_that_lies_never_leads_out_of_the_file(tmp_path_factory, entries, data, cut):
    path = header_file(tmp_path_factory.getbasetemp() / "fuzz.safetensors", entries, data)
    path.write_bytes(path.read_bytes()[: 200 - cut] if cut < 20 else path.read_bytes())
    size = path.stat().st_size
    try:
        places = read_header(path)
        checkpoint = Checkpoint(path)
    except FileError:
        return
    for place in places:
        assert 8 <= place.offset <= place.offset + place.bytes <= size
        assert checkpoint.tensor(place.name).shape == torch.Size(place.shape)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "damaged header"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
         "'a' is in it twice"),
        (b'{"a":{"dtype":"U8","shape":[0,9999999999999999999],"data_offsets":[0,0]}}', "a shape that no tensor can"),
        (b'{"a":{"dtype":"U8","shape":' + str([1] * 65).encode() + b',"data_offsets":[0,1]}}', "a shape that no"),
    ],
)  # fmt: skip
def test_strange_headers(tmp_path, text, message):
    with pytest.raises(FileError, match=message):
        read_header(header_file(tmp_path / "strange.safetensors", text))


def test_reading_beyond_a_tensor_is_refused(saved):
    checkpoint = Checkpoint(saved / "a")
    for start, count in ((0, 300 * 512 + 1), (-1, 2), (300 * 512, 1)):
        with pytest.raises(IndexError):
            checkpoint.view("layer0.weight", start, count)
