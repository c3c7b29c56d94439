from __future__ import annotations

import subprocess
import sys

import pytest

import gratis
from gratis.contract.errors import FileError, ParameterError, UnknownNameError
from gratis.contract.recipe import Figure, Recipe, TrialLine
from tests import tiny_language as tiny

PLAIN = "version: 1\nmethods:\n- name: lacache\n  parameters: {budget: 64, span: 1}\n"


def test_a_recipe_survives_its_file(tmp_path):
    recipe = Recipe(
        [gratis.LaCache(budget=64, span=1)],
        subject="smollm2",
        trials=[
            TrialLine(
                task="streaming-perplexity",
                task_parameters={"tokens": 96},
                figures={"loss": Figure(before=2.5, after=2.0)},
            )
        ],
        note="für lange Texte: 'so'",
    )
    path = recipe.save(tmp_path / "deep" / "recipe.yaml")
    loaded = Recipe.load(path)
    assert loaded == recipe
    assert loaded.trials[0].figures["loss"].after == 2.0
    assert loaded.save(path).read_text() == recipe.dump()
    assert [p.name for p in path.parent.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("entry", list(gratis.catalogue.entries.values()), ids=lambda e: e.name)
def test_every_method_survives_a_recipe(entry):
    try:
        method = entry.load()(**entry.card.examples)
    except ParameterError as error:
        pytest.skip(str(error))
    assert Recipe.parse(Recipe([method]).dump()).methods == (method,)


def test_parameters_at_their_defaults_are_written_out():
    assert "sinks: 4" in Recipe([gratis.LaCache()]).dump()


def test_attach_and_back():
    model = tiny.tiny_language_model()
    before = tiny.snapshot(model)
    with Recipe.parse(PLAIN).attach(model) as attachment:
        assert attachment.methods == (gratis.LaCache(budget=64, span=1),)
        again = Recipe.from_attachment(attachment, note="x")
    assert again.methods == attachment.methods
    assert tiny.snapshot(model) == before
    with pytest.raises(ParameterError, match="names no subject"):
        Recipe.parse(PLAIN).attach()


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", FileError, "is not a recipe"),
        ("- a\n- b\n", FileError, "is not a recipe"),
        ("methods: []", FileError, "has no version"),
        (PLAIN.replace("1", "2", 1), FileError, "has version 2; this gratis reads version 1"),
        (PLAIN.replace("1", "true", 1), FileError, "has version True"),
        ("version: 1\nmethods: []\n", FileError, "methods: list should have at least 1 item"),
        ("version: 1\n", FileError, "methods is missing"),
        (PLAIN + "subjekt: smollm2\n", FileError, "unknown key 'subjekt'; did you mean 'subject'"),
        (PLAIN.replace("parameters", "paramters"), FileError, "unknown key 'paramters'; did you mean 'parameters'"),
        (PLAIN + "subject: 5\n", FileError, "subject: input should be a valid string"),
        (PLAIN.replace("lacache", "lacash"), UnknownNameError, "did you mean 'lacache'"),
        (PLAIN.replace("budget", "budgt"), ParameterError, "did you mean 'budget'"),
        (PLAIN.replace("64", "many"), ParameterError, "budget must be int"),
        (PLAIN.replace("64", "-3"), ParameterError, "budget must be int"),
        ("version: 1\nmethods: [\n", FileError, r"is not plain YAML: .*line"),
        ("version: 1\nmethods: !!python/object/apply:os.system ['true']\n", FileError, "could not determine a constr"),
        ("a: &a [x]\nb: *a\n", FileError, "anchors or aliases"),
        ("version: 1\nx: " + "[" * 5000, FileError, "is not plain YAML"),
        ("version: 1\nnote: \x00\n", FileError, "is not plain YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_sentence(text, error, said):
    with pytest.raises(error, match=said) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


def test_reading_a_recipe_runs_no_code(tmp_path):
    mark = tmp_path / "ran"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"):
        with pytest.raises(FileError):
            Recipe.parse(f"version: 1\nmethods: {tag} ['{mark}']\n")
    assert not mark.exists()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(FileError, match="cannot be read"):
        Recipe.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(FileError, match="not text"):
        Recipe.load(tmp_path / "binary.yaml")
    (tmp_path / "huge.yaml").write_text("#" * 1_000_001)
    with pytest.raises(FileError, match="too large"):
        Recipe.load(tmp_path / "huge.yaml")


def test_a_recipe_needs_methods():
    with pytest.raises(ParameterError, match="at least one"):
        Recipe([])
    with pytest.raises(ParameterError, match="holds methods"):
        Recipe([gratis.LaCache])


def test_a_kill_while_writing_leaves_the_old_recipe(tmp_path):
    path = Recipe.parse(PLAIN).save(tmp_path / "r.yaml")
    old = path.read_text()
    code = (
        "import os, gratis\nfrom gratis.contract import files\n"
        "os.fsync = lambda f: os._exit(9)\n"
        f"gratis.Recipe.parse({PLAIN!r} + 'note: new\\n').save({str(path)!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert path.read_text() == old
    assert Recipe.load(path)
    Recipe.parse(PLAIN + "note: newest\n").save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]
