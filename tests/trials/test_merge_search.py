"""Searching the numbers of a recipe: space, seeds, journals, failures, live models."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gratis.contract.errors import FileError, InputError
from gratis.subjects.merge_recipe import load_recipe
from gratis.tasks.task import Measurement, Metric, Task, TaskCard
from gratis.trials.merge_search import search_recipe, search_space

pytest.importorskip("optuna")


class Nearness(Task):
    """How near a linear layer is to three times the first expert's change and half the second's."""

    card = TaskCard(
        title="Nearness", acts_on="torch module", data="a linear layer",
        metrics=(Metric(name="nearness", help="how near the weights are"),),
    )  # fmt: skip
    runs: int = 0

    def measure(self, subject, *, seed, progress=None):
        wanted = torch.tensor([[0.9, 0.4]]) + (0.01 if seed else 0)
        distance = (subject.weight.detach() - wanted).square().sum().item()
        return Measurement(metrics={"nearness": 1 - distance})


@pytest.fixture
def folder(tmp_path):
    for name, row in (("base", [0.0, 0.0]), ("one", [1.0, 0.0]), ("two", [0.0, 1.0])):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.tensor([row])}, tmp_path / name / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text(
        "method: task-arithmetic\nparameters: {scale: 0.3}\nbase: base\nexperts: [one, two]\n"
    )
    return tmp_path


def layer():
    made = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(made.weight, 7.0)
    return made


def search(folder, **options):
    recipe = load_recipe(folder / "recipe.yaml")
    return search_recipe(recipe, Nearness(), subject=options.pop("subject", None) or layer(), **options)


def test_a_search_finds_the_numbers_and_leaves_the_model_as_it_was(folder):
    model = layer()
    found = search(folder, trials=40, subject=model)
    assert torch.equal(model.weight, layer().weight)
    assert found.before == pytest.approx(1 - 0.6**2 - 0.1**2)
    assert found.score > 0.97
    scale = found.values["scale"]
    assert scale * found.values["weight 0"] == pytest.approx(0.9, abs=0.2)
    assert found.elsewhere != found.score
    assert not found.same_data


def test_the_tuned_recipe_is_a_file_with_the_trials_behind_it(folder):
    found = search(folder, trials=6)
    (folder / "deeper").mkdir()
    path = found.recipe_at(folder / "recipe.yaml", folder / "deeper" / "tuned.yaml").save(
        folder / "deeper" / "tuned.yaml"
    )
    content = yaml.safe_load(path.read_text())
    assert content["experts"][0]["path"] == "../one"
    assert content["trials"][0]["score"] == found.score
    again = load_recipe(path, models=[folder])
    assert again.method == found.recipe.method
    assert again.weights == found.recipe.weights
    assert again.experts[0].resolve() == (folder / "one").resolve()


def test_an_interrupted_search_goes_on_and_comes_to_the_same(folder, monkeypatch):
    whole = search(folder, trials=14, seed=3)
    calls = []
    measure = Nearness.measure

    def interrupted(self, subject, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(self, subject, **options)

    monkeypatch.setattr(Nearness, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(folder, trials=14, seed=3, journal=folder / "journal")
    again = search(folder, trials=14, seed=3, journal=folder / "journal")
    assert len(calls) == 6 + 14 - 5 + 2
    assert again.values == whole.values
    assert again.score == whole.score
    with pytest.raises(FileError, match="another search \\(seed differs\\)"):
        search(folder, trials=14, seed=4, journal=folder / "journal")


def test_a_damaged_journal_is_refused(folder):
    (folder / "journal").write_text("no journal at all\n{}\n")
    with pytest.raises(FileError, match="damaged or no journal"):
        search(folder, trials=2, journal=folder / "journal")


def test_failed_trials_are_counted_and_all_failing_is_an_error(folder, monkeypatch):
    measure = Nearness.measure
    calls = []

    def sometimes(self, subject, **options):
        calls.append(1)
        if len(calls) % 2 == 0 and len(calls) < 8:
            raise InputError("no")
        return measure(self, subject, **options)

    monkeypatch.setattr(Nearness, "measure", sometimes)
    assert search(folder, trials=8).failed == 3

    def never(self, subject, **options):
        raise InputError("never")

    monkeypatch.setattr(Nearness, "measure", never)
    with pytest.raises(InputError, match="Every trial failed, the first because never"):
        search(folder, trials=3)


def test_the_space_is_what_is_declared_and_weights_where_they_matter(folder):
    recipe = load_recipe(folder / "recipe.yaml")
    assert set(search_space(recipe)) == {"scale", "weight 0", "weight 1"}
    assert search_space(recipe)["scale"].search == (0.05, 1.5)
    (folder / "recipe.yaml").write_text("method: slerp\nexperts: [one, two]\n")
    assert set(search_space(load_recipe(folder / "recipe.yaml"))) == {"t"}


@pytest.mark.evidence
def test_a_task_that_brings_its_own_checkpoints(folder):
    from gratis.tasks.digits_merging import DigitsMerging

    recipe = load_recipe(folder / "recipe.yaml")
    found = search_recipe(recipe, DigitsMerging(epochs=2), trials=4)
    assert set(found.values) == {"scale"}
    assert found.score >= found.before
    assert found.same_data


def test_rules_and_models_that_do_not_fit_are_refused(folder):
    with pytest.raises(Exception, match="no weight called 'weight'"):
        search(folder, trials=2, subject=torch.nn.Linear(3, 1))
    with open(folder / "recipe.yaml", "a") as file:
        file.write("rules: [{tensors: '*', weights: [1, 2]}]\n")
    with pytest.raises(InputError, match="rules cannot be searched"):
        search(folder, trials=2)
