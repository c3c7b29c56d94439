"""The demo, on a tiny model and texts: what it measures, what it writes, and what it says that each method is for."""

from __future__ import annotations

import json

import pytest

import gratis
from gratis.cli import commands, run
from gratis.trials.measuring import try_method
from tests.tasks.test_long_reading import subject


@pytest.fixture(scope="module")
def trial():
    """What the demo measures, with the examples of the methods' cards, on a tiny model."""
    methods = [one(**one.card.examples) for one in (gratis.SlidingWindow, gratis.LaCache)]
    task = gratis.task_catalogue["long-reading"](tokens=96, chunk=8, recall=80, depths=3)
    return try_method(gratis.InfLLM(**gratis.InfLLM.card.examples), subject(), task, against=methods, rounds=1)


@pytest.fixture
def tiny(monkeypatch, tmp_path, trial):
    """The demo with what was measured put in; what it asked for is kept."""
    asked = {}

    def measure(chosen, model, task, against, rounds, seed, **options):
        asked.update(chosen=chosen, model=model, task=task, against=against)
        return trial

    monkeypatch.setattr(commands, "_measure", measure)
    monkeypatch.chdir(tmp_path)
    return asked


def test_it_reads_past_the_window_with_four_memories_of_one_size_and_says_what_each_is_for(tiny, tmp_path, capsys):
    assert run(["demo"]) == 0
    assert tiny["model"] == "smollm2"
    assert tiny["task"].tokens == 12000
    assert tiny["task"].depths > 2
    window, lacache = tiny["against"]
    infllm = tiny["chosen"]
    assert window.budget == lacache.budget == infllm.window + infllm.sinks + infllm.block * infllm.blocks
    said = capsys.readouterr().out
    ends = said[said.index("What each is for") :].splitlines()[1:]
    assert [line.partition(":")[0] for line in ends] == ["• full cache", "• SlidingWindow", "• LaCache", "• InfLLM"]
    assert all("recall 0.00, tail loss" in line for line in ends)
    for line, kind in zip(ends[1:], (gratis.SlidingWindow, gratis.LaCache, gratis.InfLLM), strict=True):
        assert kind.card.summary in line
    (page,) = (tmp_path / "trials").glob("*.html")
    assert "recall" in page.read_text()


def test_for_machines_it_prints_json_alone(tiny, capsys):
    assert run(["demo", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [arm["label"] for arm in found["arms"]] == ["full cache", "SlidingWindow", "LaCache", "InfLLM"]
