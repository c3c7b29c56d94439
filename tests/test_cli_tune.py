"""`gratis tune`: prompts of a file, what is found on them, and what is refused before a model is opened."""

from __future__ import annotations

import json

import pytest

import gratis
from gratis.cli import run
from gratis.contract.recipe import Recipe
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language as tiny
from tests.tasks.test_prompted_classification import Letters

PROMPTS = [("a fine film", "yes"), ("a poor film", "no"), ("fine, fine", "yes"), ("poor", "no")]


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def model(monkeypatch):
    made = tiny.tiny_language_model()
    set_tokenizer(made, Letters())
    monkeypatch.setattr("gratis.subjects.open", lambda name, **given: made)
    return made


def test_what_is_found_is_written_as_a_recipe(model, tmp_path, capsys):
    file = written(tmp_path / "p.jsonl", [{"prompt": text, "label": label} for text, label in PROMPTS])
    recipe = tmp_path / "r.yaml"
    assert run(["tune", "zero-tuning:layers=1", file, "--level", "0", "--out", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [Letters()(text).input_ids for text, _ in PROMPTS]
    tokens = [[Letters()(one).input_ids[0] for one in (word, word.capitalize())] for word in ("no", "yes")]
    expected = gratis.ZeroTuning(layers=(1,)).tune(model, rows, labels=[1, 0, 1, 0], answers=tokens, level=0)
    assert found["objective"] == "accuracy"
    assert set(found["scores"]) == {"0.3", "1.0", "2.0", "4.0"}
    assert found["method"]["layers"] == [1]
    assert found["baseline"]["entropy"] == pytest.approx(expected.baseline_scores["entropy"], abs=1e-4)
    (loaded,) = Recipe.load(recipe).methods
    assert loaded.scale == found["method"]["scale"]


def test_without_labels_it_is_the_entropy(model, tmp_path, capsys):
    file = written(tmp_path / "p.jsonl", [{"prompt": text} for text, _ in PROMPTS])
    assert run(["tune", "zero-tuning", file, "--level", "2", "--begun", "So:"]) == 0
    said = capsys.readouterr()
    assert "by entropy on 4 prompts" in said.out
    assert "better up" in said.out
    assert "use 20 or more" in said.err


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([{"prompt": 3}], [], 'Line 1 of'), ([], [], "holds no prompts"), ([{"prompt": "a"}, {"text": "b"}], [], "Line 2 of"),
        ([{"prompt": "a", "label": "x"}, {"prompt": "b"}], [], "1 of the 2 prompts"),
        ([{"prompt": "a", "label": "x"}], ["--answer", "y"], "x: no such --answer"),
    ],
)  # fmt: skip
def test_files_that_are_none_are_refused(lines, options, message, tmp_path, capsys):
    assert run(["tune", "zero-tuning", written(tmp_path / "p.jsonl", lines), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_method_that_finds_nothing_on_prompts_is_refused(tmp_path, capsys):
    file = written(tmp_path / "p.jsonl", [{"prompt": "a"}])
    assert run(["tune", "lacache", file]) == 2
    assert "LaCache finds nothing on prompts" in capsys.readouterr().err
    assert run(["tune", "zero-tuning", str(tmp_path / "absent")]) == 2
    assert "cannot be read" in capsys.readouterr().err
