"""The zoo as a shelf: names, folders, cards, sizes, refusals."""

import json

import pytest
import torch

import gratis
from gratis import zoo
from gratis.contract.errors import FileError, SubjectError, UnknownNameError


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_is_small_licensed_and_described(name):
    folder = zoo.folder_of(name)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "python -m gratis.zoo.train." in card
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 3.5e6
    assert not [file for file in folder.rglob("*") if file.suffix in {".bin", ".pt", ".pkl", ".pth"}]
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert figures["steps"] >= 200
    assert figures.get("CPU minutes of a training", figures["cpu_seconds"] / 60) < 30
    assert all(f"| {value} |" in card for value in figures.values())


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_opens_as_its_own_class(name):
    model = gratis.open(f"zoo:{name}")
    assert type(model).__module__.split(".")[0] in {"transformers", "diffusers"}
    parts = model.components.values() if hasattr(model, "components") else [model]
    weights = [weight for part in parts if isinstance(part, torch.nn.Module) for weight in part.parameters()]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert not any(part.training for part in parts if isinstance(part, torch.nn.Module))


def test_unknown_names_and_dtypes_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'sprites-classifier'"):
        gratis.open("zoo:sprite-classifier")
    with pytest.raises(SubjectError, match="not a dtype"):
        zoo.load("sprites-classifier", dtype="float99")
    assert zoo.load("sprites-classifier", dtype="bfloat16").dtype == torch.bfloat16


def test_a_damaged_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "README.md").write_text("card")
    monkeypatch.setattr(zoo, "_WEIGHTS", tmp_path)
    with pytest.raises(FileError, match="names no model class"):
        zoo.load("broken")
    (tmp_path / "broken" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(FileError, match="cannot be loaded"):
        zoo.load("broken")


def test_the_classifier_knows_the_sprites():
    from gratis.zoo.sprites import COLOURS, SHAPES, World, render
    from gratis.zoo.sprites_classifier import classify

    scenes = World(sizes=("medium", "large"), seed=99).scenes(0, 200)
    images = render(scenes, 32).images
    model = zoo.load("sprites-classifier")
    seen = classify(model, torch.from_numpy(images))
    assert (seen.colour.numpy() == scenes.colour[:, 0]).mean() > 0.98
    assert (seen.shape.numpy() == scenes.shape[:, 0]).mean() > 0.88
    torch.testing.assert_close(classify(model, torch.from_numpy(images / 255)).probability, seen.probability)
    assert model.config.id2label[len(SHAPES) + 1] == f"{list(COLOURS)[1]} {SHAPES[1]}"
