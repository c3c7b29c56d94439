"""What the zoo's training scripts share: batches, the loop, cards."""

import json

import pytest
import torch
from torch import nn

from gratis.zoo.train.loop import Average, Examples, fit, note_pace, started, together, write_card


def test_batches_hold_every_row_once_a_pass_and_keep_columns_together():
    numbers = torch.arange(12)
    examples = Examples(numbers, numbers * 10, batch=4, seed=0, device="cpu")
    passes = [[examples.draw() for _ in range(3)] for _ in range(2)]
    for drawn in passes:
        rows = torch.cat([batch[0] for batch in drawn])
        assert sorted(rows.tolist()) == list(range(12))
        assert all((tens == ones * 10).all() for ones, tens in drawn)
    assert any((a[0] != b[0]).any() for a, b in zip(*passes, strict=True))
    again = Examples(numbers, batch=4, seed=0, device="cpu")
    assert (again.draw()[0] == passes[0][0][0]).all()


def test_a_batch_is_never_larger_than_the_set_and_leftovers_wait_for_the_next_pass():
    assert len(Examples(torch.arange(3), batch=8, seed=0, device="cpu").draw()[0]) == 3
    examples = Examples(torch.arange(10), batch=4, seed=0, device="cpu")
    assert {len(examples.draw()[0]) for _ in range(6)} == {4}


def line(steps, seconds=float("inf")):
    """A fit of y = 3 x - 1, its figures and the average of the weights."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    average = Average(model, 0.9)
    x = torch.linspace(-1, 1, 32)[:, None]
    figures = fit(
        lambda step: (model(x) - (3 * x - 1)).square().mean(), model.parameters(), steps=steps, rate=0.1,
        averages=[average], decay=0.0, warmup=10, seconds=seconds,
    )  # fmt: skip
    return average.module, figures


def test_the_loop_finds_a_line(capsys):
    model, figures = line(300)
    assert figures["steps"] == 300
    assert figures["loss"] < 1e-3
    assert model.weight.item() == pytest.approx(3, abs=0.05)
    assert model.bias.item() == pytest.approx(-1, abs=0.05)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert "step    299" in capsys.readouterr().out


def test_the_loop_ends_when_its_time_is_over():
    assert line(10_000, seconds=1e-9)[1]["steps"] == 1


def test_cards_tell_figures_and_take_up_the_pace_of_this_machine(tmp_path):
    folder = tmp_path / "model"
    figures = {"seed": 0, "steps": 600, "seconds": 9.0, "cpu_seconds": 8.0, "share | right": 0.5}
    write_card(folder, "model", "A model.", "numbers", "use it", figures, script="line")
    known = json.loads((folder / "figures.json").read_text())
    assert known == {"trained on": "CPU", **figures}
    note_pace(folder, {"steps": 20, "cpu_seconds": 10.0})
    noted = json.loads((folder / "figures.json").read_text())
    assert noted == {**known, "CPU seconds per step": 0.5, "CPU minutes of a training": 5.0}
    card = (folder / "README.md").read_text()
    assert "python -m gratis.zoo.train.line`" in card
    assert card.count("| CPU minutes of a training | 5.0 |\n\nTrained and measured") == 1
    note_pace(folder, {"steps": 20, "cpu_seconds": 20.0})
    assert (folder / "README.md").read_text().count("CPU minutes") == 1
    assert json.loads((folder / "figures.json").read_text())["CPU minutes of a training"] == 10.0
    joined = together([started(folder), {"steps": 50, "seconds": 1.0, "cpu_seconds": 2.0, "loss": 0.1}], "cpu")
    assert joined == {
        "trained on": "CPU, the last stage CPU", "steps": 650, "seconds": 10.0, "cpu_seconds": 10.0, "loss": 0.1,
    }  # fmt: skip
    assert (
        together([started(None), {"steps": 50, "seconds": 1.0, "cpu_seconds": 2.0, "loss": 0.1}], "cpu")["steps"] == 50
    )
