"""Merges shared out over the workers of a local ray cluster."""

from __future__ import annotations

import os
import signal

import cloudpickle
import pytest
import torch
from safetensors.torch import save_file

import gratis
from gratis.contract.errors import InputError, ParameterError
from gratis.subjects import merge_workers, merging
from gratis.subjects.checkpoint_writer import check_checksums
from gratis.subjects.merge_workers import WorkerLostError
from gratis.subjects.merging import merge


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        tensors = {f"layer{i}.weight": torch.randn(300, 512, generator=generator).bfloat16() for i in range(4)}
        tensors["steps"] = torch.tensor([1, 2])
        save_file(tensors, folder / name / "model.safetensors")
    return folder


class OfThisProcess:
    """Workers as ray has them, without ray: everything passes through pickles and is worked on by batches."""

    def __init__(self, count):
        self._workers = [merge_workers._Worker() for _ in range(count)]

    def each(self, work, parts, settle=None):
        given = cloudpickle.dumps((work, settle))
        for worker in self._workers:
            worker.begin(cloudpickle.loads(given))
        for number, batch in enumerate(merge_workers._batches(parts)):
            done = self._workers[number % len(self._workers)].do(cloudpickle.loads(cloudpickle.dumps(batch)))
            yield from cloudpickle.loads(cloudpickle.dumps(done))

    def close(self):
        self._workers.clear()


@pytest.mark.parametrize("method", [gratis.TIES(density=0.4), gratis.DARETIES(), gratis.ModelStock(), gratis.SCE()])
def test_work_and_results_survive_the_way_to_another_process(saved, monkeypatch, method):
    monkeypatch.setattr(merge_workers, "BATCH", 65536)
    monkeypatch.setattr(merging, "Workers", OfThisProcess)
    assert merged(saved, "shared", method, workers=2)[1] == merged(saved, "alone", method)[1]
    check_checksums(saved / "shared")


@pytest.fixture(scope="module")
def cluster():
    """One cluster for all tests, as a user who is connected to one has it."""
    ray = pytest.importorskip("ray", reason="needs the extra `scale`")
    before = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", _node_ip_address="127.0.0.1",
    )  # fmt: skip
    yield ray
    ray.shutdown()
    if before is None:
        del os.environ["RAY_USAGE_STATS_ENABLED"]


def merged(folder, out, method=None, **options):
    made = merge(
        method or gratis.TIES(density=0.4),
        base=folder / "base", experts=[folder / "a", folder / "b"], out=folder / out, stretch=65536, overwrite=True,
        **options,
    )  # fmt: skip
    return made, (folder / out / "model.safetensors").read_bytes()


def test_workers_that_cannot_be(saved):
    with pytest.raises(ParameterError, match="workers must be at least 1"):
        merged(saved, "none", workers=0)
    with pytest.raises(ParameterError, match="leave out device or workers"):
        merged(saved, "none", workers=2, device=["cuda"])
    assert not (saved / "none").exists()
    assert not (saved / "none.partial").exists()


@pytest.mark.evidence
def test_the_same_bytes_over_two_workers(saved, cluster, monkeypatch):
    monkeypatch.setattr(merge_workers, "BATCH", 65536)
    for method in (gratis.TIES(density=0.4), gratis.DARETIES(density=0.5), gratis.ModelStock()):
        assert merged(saved, "shared", method, workers=2)[1] == merged(saved, "alone", method)[1]
    check_checksums(saved / "shared")


@pytest.mark.evidence
def test_what_a_worker_refuses_is_said_here_and_nothing_is_left(saved, cluster, tmp_path):
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        values = torch.ones(70_000)
        values[-1] = torch.nan if name == "a" else 1.0
        save_file({"w": values}, tmp_path / name / "model.safetensors")
    with pytest.raises(InputError, match="'w' of .* holds values that are not finite"):
        merge(
            gratis.TaskArithmetic(), base=tmp_path / "base", experts=[tmp_path / "a"], out=tmp_path / "out",
            stretch=65536, workers=1,
        )  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.evidence
def test_a_lost_worker_leaves_a_merge_that_goes_on(saved, cluster, monkeypatch):
    monkeypatch.setattr(merge_workers, "BATCH", 65536)
    real, begun = merge_workers.Workers.each, []

    def lost(self, work, parts, settle=None):
        results = real(self, work, parts, settle)
        if settle is None:
            yield from results
            return
        begun.append(True)
        yield next(results)
        process = self._ray.get(self._actors[0].do_call.remote(os.getpid))
        os.kill(process, signal.SIGKILL)
        yield from results

    monkeypatch.setattr(merge_workers._Worker, "do_call", lambda self, call: call(), raising=False)
    monkeypatch.setattr(merge_workers.Workers, "each", lost)
    with pytest.raises(WorkerLostError, match="the same merge goes on from there"):
        merged(saved, "lost", workers=2)
    assert begun
    assert (saved / "lost.partial").is_dir()
    assert not (saved / "lost").exists()
    monkeypatch.undo()
    done, content = merged(saved, "lost")
    assert done.resumed
    assert content == merged(saved, "alone")[1]
    assert not (saved / "lost.partial").exists()
