"""What the guides show and hand out: recipes that can be attached, plots that follow from stored results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gratis.contract.attach import check_together
from gratis.contract.recipe import Recipe

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "docs" / "guides"


@pytest.mark.parametrize("file", sorted((GUIDES / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_of_the_guides_load(file):
    recipe = Recipe.load(file)
    check_together(recipe.methods)
    assert recipe.subject == "smollm2"


def test_plots_of_the_guides_follow_from_the_stored_results():
    spec = importlib.util.spec_from_file_location("plots", ROOT / "docs" / "plots.py")
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    for name, picture in plots.pictures().items():
        assert (GUIDES / f"memory-{name}.svg").read_text() == picture, f"run python docs/plots.py: {name} is old"
        assert f"memory-{name}.svg" in (GUIDES / "memory.md").read_text()
