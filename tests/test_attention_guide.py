"""The guide on attention shows what is stored: every figure of its tables is that of a result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gratis
from gratis.trials.claims import stored

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "guides" / "attention.md").read_text(encoding="utf-8")
TUNED = "tuned on 100 texts, measured on 500 others"


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def lines(title: str) -> list[str]:
    """The rows of the guide's first table below a heading."""
    below = GUIDE.split(f"### {title}\n", 1)[1].split("\n### ", 1)[0].split("\n## ", 1)[0]
    rows = [line for line in below.splitlines() if line.startswith("| ")]
    return rows[1:]


def test_what_zero_tuning_finds():
    known = {
        (row["data"], row["form"], row["mode"], row["objective"], row["level"]): row
        for row in result("zero_tuning")[TUNED]
    }
    shown = lines("What it finds, and what that is worth")
    assert len(shown) >= 6
    for line in shown:
        data, form, mode, objective, level = (cell.strip() for cell in line.split("|")[1:6])
        row = known[data, form, mode, objective, int(level)]
        low, high = row["accuracy, change"].split(" to ")
        expected = (
            f"| {data} | {form} | {mode} | {objective} | {level} | {row['scale']:g} | {row['heads']} "
            f"| {row['accuracy, before']:.3f} → {row['accuracy, after']:.3f} | {low} to {high} "
            f"| {row['parsed accuracy, before']:.3f} → {row['parsed accuracy, after']:.3f} "
            f"| {row['valid, before']:.2f} → {row['valid, after']:.2f} |"
        )
        assert line == expected


def test_what_the_guide_takes_from_it():
    rows = result("zero_tuning")[TUNED]
    labelled = [row for row in rows if (row["mode"], row["objective"], row["level"]) == ("logit", "accuracy", 2)]
    assert len(labelled) == 6
    assert sum(float(row["accuracy, change"].split(" to ")[0]) > 0 for row in labelled) == 5
    without = [row for row in rows if row["objective"] == "entropy" and row["scale"] != 1]
    assert all(row["entropy, after"] < row["entropy, before"] for row in without)
    changes = [[float(end) for end in row["accuracy, change"].split(" to ")] for row in without]
    assert any(low > 0 for low, _ in changes)
    assert any(high < 0 for _, high in changes)


def test_attention_on_the_first_token():
    rows = result("zero_tuning")["attention on the first token"]
    expected = [
        f"| {row['first token'].replace('<|im_start|>', 'start of a chat')} | {row['scale']:g} | {row['mean share']:.2f} "
        f"| {row['heads above a half, %']:.0f} % |"
        for row in rows
    ]
    assert lines("How much attention the first token gets") == expected


def test_the_harm_of_the_strong_form():
    (rows,) = (value for key, value in result("reweighting").items() if key != "measured")
    expected = [
        f"| {row['power']:g} | {row['offset']:g} | {row['loss, nats']:.2f} | {row['more than the model as it is']:+.2f} |"
        for row in rows
    ]
    shown = lines("Sharper attention on a model trained with softmax")
    assert shown == [line.replace("-0.00", "+0.00") for line in expected]


def test_the_card_says_what_was_measured():
    (rows,) = (value for key, value in result("reweighting").items() if key != "measured")
    more = {(row["power"], row["offset"]): row["more than the model as it is"] for row in rows}
    said = gratis.LogLengthScaling.card.differs
    assert f"costs {more[15.0, 1.0]:.1f} nats" in said
    assert f"a power of 3 alone {more[3.0, 0.0]:.1f}" in said
    assert f"of 1.2 already {more[1.2, 0.0]:.2f}" in said


@pytest.mark.parametrize("title", ["Attention trained for length"])
def test_claims_of_the_trained_pair(title):
    figures = {f"{one.figure:.2f}" for one in stored() if one.method == "softplus" and one.figure is not None}
    below = GUIDE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    shown = {
        word for word in below.replace(",", " ").split() if word.count(".") == 1 and word.replace(".", "").isdigit()
    }
    assert shown
    assert shown <= figures
