"""What benchmarks store: parts that are renewed one by one, with where each was measured; and the plots of them."""

from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def loaded(path, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    module = loaded("benchmarks/measuring/__init__.py", "benchmark_measuring")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/example.py", "part"])
    return module


def stored(tmp_path):
    return json.loads((tmp_path / "example.json").read_text())


def test_a_part_that_is_renewed_leaves_the_others_and_says_where_it_was_measured(measuring, tmp_path):
    measuring.renew("example", {"one": {"a": 1}, "length": 7})
    measuring.renew("example", {"two": [{"b": 2}]})
    found = stored(tmp_path)
    assert (found["one"], found["two"], found["length"]) == ({"a": 1}, [{"b": 2}], 7)
    assert set(found["measured"]) == {"one", "two"}
    assert found["measured"]["two"]["command"] == "python benchmarks/example.py part"
    assert found["measured"]["two"]["torch"] == torch.__version__


def test_rows_and_columns_are_added_in_order_and_renewed(measuring, tmp_path):
    def place(row):
        return row["at"]

    measuring.renew_rows("example", "table", [{"at": 2, "x": 20}], place)
    measuring.renew_rows("example", "table", [{"at": 1, "x": 10}, {"at": 2, "y": 0}], place)
    assert stored(tmp_path)["table"] == [{"at": 1, "x": 10}, {"at": 2, "x": 20, "y": 0}]


def test_rows_of_another_device_do_not_stay_beside_new_ones(measuring, tmp_path, monkeypatch):
    measuring.renew_rows("example", "table", [{"at": 1}], lambda row: row["at"])
    monkeypatch.setattr(measuring, "_device", lambda device: "another device")
    measuring.renew_rows("example", "table", [{"at": 2}], lambda row: row["at"])
    assert stored(tmp_path)["table"] == [{"at": 2}]
    assert stored(tmp_path)["measured"]["table"]["device"] == "another device"


def test_rows_that_are_named_stay_beside_those_of_another_device_and_say_so(measuring, tmp_path, monkeypatch):
    measuring.renew_rows("example", "table", [{"at": 1}], lambda row: row["at"])
    monkeypatch.setattr(measuring, "_device", lambda device: "another device")
    measuring.renew_rows("example", "table", [{"at": 2}], lambda row: row["at"], part="second")
    found = stored(tmp_path)
    assert found["table"] == [{"at": 1}, {"at": 2}]
    assert found["measured"]["table: second"]["device"] == "another device"
    assert found["measured"]["table"]["device"] != "another device"


def test_a_write_that_fails_leaves_what_was_stored(measuring, tmp_path):
    measuring.renew("example", {"one": [{"a": 1}]})
    before = (tmp_path / "example.json").read_bytes()
    with pytest.raises(TypeError):
        measuring.renew("example", {"two": [{"b": object()}]})
    assert (tmp_path / "example.json").read_bytes() == before


def test_plots_of_recall_and_of_maps_count_and_colour():
    plots = loaded("docs/plots.py", "plots")
    row = {"of": 4, "depth 0.25": 2, "depth 0.75": 0}
    results = {
        "2000 tokens of filler": [{"arm": "full cache", **row}, {"arm": "InfLLM", **row, "depth 0.75": 1}],
        "1000 tokens of filler": [{"arm": "full cache", **row}],
    }
    drawn = plots.recall(results)
    xml.etree.ElementTree.fromstring(drawn)
    assert drawn.index("1,000 filler") < drawn.index("2,000 filler")
    # Two trials per depth: all of the first depth, none of the second, one of the second under InfLLM.
    assert [drawn.count(f'class="{kind}"') for kind in ("better", "worse", "even")] == [3, 2, 1]
    ladder = {"text": "prose", "budget": 128, "L: difference": -0.2, "L: interval": [-0.3, -0.1]}
    drawn = plots.heat_map([ladder, {**ladder, "budget": 256, "L: interval": [-0.3, 0.1]}])
    xml.etree.ElementTree.fromstring(drawn)
    assert [drawn.count(f'class="{kind}"') for kind in ("better", "worse", "even")] == [1, 0, 1]
    fact = {"stated": 1, "tokens since": 600, "window: right": 0, "L: right": 24}
    drawn = plots.fact_map([fact], 24)
    xml.etree.ElementTree.fromstring(drawn)
    assert "24 of 24" in drawn
    assert [drawn.count(f'class="{kind}"') for kind in ("better", "worse", "even")] == [1, 1, 0]


def test_of_several_forms_of_one_arm_the_first_that_ran_is_drawn():
    plots = loaded("docs/plots.py", "plots")
    rows = [
        {"history": 8, "arm": "full cache, FlashAttention", "did not run": "no kernel"},
        {"history": 8, "arm": "full cache, torch's choice, in pieces", "speed": 3},
        {"history": 4, "arm": "full cache, FlashAttention", "speed": 5},
        {"history": 4, "arm": "full cache, torch's choice, in pieces", "speed": 2},
    ]
    assert plots.by_history(rows, "speed") == [{"history": 4, "full cache": 5}, {"history": 8, "full cache": 3}]
