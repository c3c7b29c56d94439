from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from gratis.cli import run
from gratis.contract.catalogue import catalogue
from gratis.contract.recipe import Recipe
from gratis.tasks.task import task_catalogue
from tests.trials import fakes

RECIPE = "version: 1\nmethods:\n- name: lacache\n  parameters: {budget: 64}\n"


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """Two methods and a task whose right figures are known; `fakes` is the name that their files give them."""
    methods = fakes.entries(fakes.Raise, fakes.Lower, fakes.Break)
    methods["fakes"] = replace(methods["raise"], name="fakes")
    counting = fakes.entries(fakes.Count, fakes.WarmCount)
    counting["fakes"] = replace(counting["count"], name="fakes")
    monkeypatch.setitem(vars(catalogue), "entries", methods)
    monkeypatch.setitem(vars(task_catalogue), "entries", counting)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gratis(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gratis", *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_methods_lists_every_method_for_people_and_machines(capsys):
    assert run(["methods"]) == 0
    shown = capsys.readouterr().out
    assert run(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(catalogue)
    for row in rows:
        assert row["name"] in shown
        keys = {"name", "seed", "family", "kind", "acts_on", "free_of", "title", "year", "module"}
        assert keys <= set(row)
        assert row["kind"] in {"attach", "decode", "program", "edit", "merge", "estimator"}
    lacache = next(row for row in rows if row["name"] == "lacache")
    assert (lacache["seed"], lacache["kind"], lacache["family"]) == (24, "attach", "memory")


def test_methods_can_be_narrowed(capsys):
    assert run(["methods", "--json", "--family", "memory", "--free-of", "training"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["family"] for row in rows} == {"memory"}
    assert run(["methods", "--family", "memry"]) == 2
    assert "did you mean 'memory'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(catalogue))
def test_show_tells_everything_about_every_method(name, capsys):
    kind = catalogue[name]
    assert run(["show", name]) == 0
    shown = capsys.readouterr().out
    assert kind.card.summary.split()[0] in shown
    assert all(parameter in shown for parameter in kind.declared())
    assert run(["show", name, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in content["parameters"]] == list(kind.declared())
    assert len(content["claims"]) == len(kind.card.claims)


@pytest.mark.parametrize("name", list(task_catalogue))
def test_show_and_list_tasks(name, capsys):
    assert run(["show", name]) == 0
    shown = capsys.readouterr().out
    assert all(parameter in shown for parameter in task_catalogue[name].declared())
    assert run(["show", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == name
    assert run(["tasks"]) == 0
    assert name in capsys.readouterr().out
    assert run(["tasks", "--json"]) == 0
    assert name in [row["name"] for row in json.loads(capsys.readouterr().out)]


def test_try_prints_a_table_and_leaves_a_trial_and_a_page(faked, capsys):
    assert run(["try", "raise", "--task", "count", "--set", "by=2", "--task-set", "size=6", "--against", "lower"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Raise beside as it is: score" in shown.out
    assert "better" in shown.out
    [file] = (faked / "trials").glob("*.json")
    [page] = (faked / "trials").glob("*.html")
    assert file.name in shown.out
    assert page.name in shown.out
    trial = json.loads(file.read_text())
    assert trial["arms"][2]["methods"][0]["parameters"] == {"by": 2.0, "shared": 3}
    assert trial["arms"][1]["methods"][0]["parameters"] == {"by": 2.0, "shared": 3}
    assert trial["task"]["parameters"]["size"] == 6


def test_try_for_machines(faked, capsys):
    assert run(["try", "raise:by=3", "--rounds", "1", "--json", "--out", "elsewhere"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert Path(content["file"]).is_file()
    assert Path(content["page"]).is_file()
    assert content["arms"][1]["metrics"]["score"]["median"] == pytest.approx(4 * 0.9875)
    assert "items" not in content["arms"][1]
    assert content["comparisons"][0]["metric"] == "score"


def test_verify_says_pass_or_fail_and_fails_when_one_fails(faked, capsys):
    assert run(["verify", "raise"]) == 1
    shown = capsys.readouterr().out
    assert "PASS" in shown
    assert "FAIL" in shown
    assert "1 of 2 claims hold" in shown
    assert run(["verify", "raise", "break", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [(r["method"], r["passed"]) for r in rows] == [
        ("raise", True), ("raise", False), ("break", False), ("break", False)
    ]  # fmt: skip
    assert {"method", "claim", "passed", "figure", "bound"} <= set(rows[0])
    assert rows[2]["figure"] is None
    assert run(["verify", "lower"]) == 0
    assert "No claims" in capsys.readouterr().out


def test_stored_results_are_shown(faked, capsys, monkeypatch):
    from gratis.trials import claims

    assert run(["verify", "raise", "--results", "results.json"]) == 1
    capsys.readouterr()
    monkeypatch.setattr(claims.last_result, "__defaults__", (Path("results.json"),))
    assert run(["show", "raise"]) == 0
    shown = capsys.readouterr().out
    assert "PASS  raise  raises by one" in shown
    assert "FAIL  raise  raises a hundredfold" in shown
    assert run(["show", "raise", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["claims"][0]["last"]["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "lacash"], "There is no method 'lacash'; did you mean 'lacache'?"),
        (["try", "lacash"], "did you mean 'lacache'?"),
        (["verify", "lacash"], "did you mean 'lacache'?"),
        (["try", "lacache", "--task", "pass-kee"], "There is no task 'pass-kee'"),
        (["try", "lacache", "--model", "smolm2"], "did you mean 'smollm2'?"),
        (["try", "lacache", "--set", "budgt=3"], "did you mean 'budget'?"),
        (["try", "lacache", "--set", "budget"], "--set takes key=value"),
        (["try", "lacache", "--set", "budget=many"], "budget must be int > 1, not 'many'"),
        (["try", "lacache", "--set", "budget=-5"], "budget must be int > 1, not -5"),
        (["try", "lacache", "--task-set", "tokns=5"], "did you mean 'tokens'?"),
        (["try", "lacache", "--rounds", "0"], "--rounds"),
        (["try", "lacache", "--modle", "x"], "--model"),
        (["try"], "NAME"),
        (["methds"], "methods"),
        (["recipe", "check", "none.yaml"], "no such file"),
        (["recipe", "make", "out.yaml", "lacache:budget=x"], "budget must be int"),
        (["merge", "none.yaml", "out"], "none.yaml"),
    ],
)
def test_a_refusal_is_one_line_and_code_two(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.startswith("gratis: ")
    assert "Traceback" not in shown.err
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_arose(capsys):
    assert run(["show", "lacash", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_has_its_own_code(faked, capsys):
    assert run(["try", "break", "--rounds", "1"]) == 3
    assert "TypeError" in capsys.readouterr().err
    assert not (faked / "trials").exists()


def test_a_full_disk_is_one_line(faked, capsys, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("gratis.trials.trial.write_text", full)
    assert run(["try", "raise", "--rounds", "1"]) == 2
    assert "no space left on device" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert run([]) == 0
    bare = capsys.readouterr().out
    assert run(["--help"]) == 0
    assert capsys.readouterr().out == bare
    for command in ("methods", "show", "try", "verify", "tasks", "merge", "recipe", "demo"):
        assert command in bare
        assert run([command, "--help"]) == 0
    capsys.readouterr()
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gratis 0")


def test_recipes_are_made_checked_and_run(faked, capsys):
    assert run(["try", "raise", "--rounds", "1", "--set", "by=2", "--json"]) == 0
    file = json.loads(capsys.readouterr().out)["file"]
    assert run(["recipe", "make", "r.yaml", "raise:by=2", "--trial", file, "--note", "up"]) == 0
    recipe = Recipe.load("r.yaml")
    assert recipe.methods == (fakes.Raise(by=2.0),)
    assert recipe.trials[0].figures["score"].after == pytest.approx(3 * 0.9875)
    assert recipe.trials[0].file == file
    assert run(["recipe", "check", "r.yaml"]) == 0
    assert "valid" in capsys.readouterr().out
    assert run(["recipe", "check", "r.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"][0]["parameters"]["by"] == 2.0
    assert run(["recipe", "run", "r.yaml", "--json", "--out", "again"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"][1]["metrics"]["score"]["median"] == pytest.approx(3 * 0.9875)


def test_a_recipe_of_methods_that_cannot_stack_is_refused(capsys, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + "- name: sliding-window\n")
    assert run(["recipe", "check", str(path)]) == 2
    assert "lacache and sliding-window cannot be attached together" in capsys.readouterr().err


def test_a_trial_of_another_method_is_not_behind_a_recipe(faked, capsys, monkeypatch):
    assert run(["try", "raise", "--rounds", "1", "--json"]) == 0
    file = json.loads(capsys.readouterr().out)["file"]
    monkeypatch.undo()
    assert run(["recipe", "make", str(faked / "r.yaml"), "lacache", "--trial", str(faked / file)]) == 2
    assert "is a trial of fakes" in capsys.readouterr().err
    assert not (faked / "r.yaml").exists()


def test_merge_follows_its_recipe(tmp_path, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    for name, value in (("base", 0.0), ("one", 1.0), ("two", 3.0)):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.full((2, 3), value)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    recipe = tmp_path / "merge.yaml"
    recipe.write_text("method: task-arithmetic\nbase: base\nexperts: [one, two]\nparameters: {scale: 0.5}\n")
    assert run(["merge", str(recipe), str(tmp_path / "out")]) == 0
    assert "1 of 1 tensors merged" in capsys.readouterr().out
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], torch.full((2, 3), 2.0))
    assert run(["merge", str(recipe), str(tmp_path / "out")]) == 2
    assert "out" in capsys.readouterr().err
    assert run(["merge", str(recipe), str(tmp_path / "out"), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merged"] == 1


def test_output_into_a_pipe_is_plain_and_a_closed_pipe_is_no_error():
    done = gratis("methods")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    reader = subprocess.Popen(
        [sys.executable, "-m", "gratis", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    reader.stdout.close()
    assert reader.wait(60) == 0
    assert "Traceback" not in reader.stderr.read()


def test_listing_and_help_import_nothing_heavy():
    code = (
        "import sys\nfrom gratis.cli import run\nassert run(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'sklearn', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in (["--help"], ["methods"], ["methods", "--json"], ["tasks"], ["try", "--help"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)


def test_completion_knows_the_methods():
    done = gratis("show", _GRATIS_COMPLETE="complete_bash", COMP_WORDS="gratis show laca", COMP_CWORD="2")
    assert "lacache" in done.stdout


INTERRUPTED = """
import signal, sys, time
# A shell's background jobs, and what they start, ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
from gratis.cli import run
from gratis.contract.catalogue import catalogue
from gratis.tasks.task import task_catalogue
from tests.trials import fakes
vars(catalogue)["entries"] = fakes.entries(fakes.Raise)
vars(task_catalogue)["entries"] = fakes.entries(fakes.Count)
def slow(self, subject, *, seed, progress=None):
    print("measuring", file=sys.stderr, flush=True)
    time.sleep(60)
fakes.Count.measure = slow
sys.exit(run(["try", "raise", "--out", sys.argv[1]]))
"""


def test_an_interrupted_trial_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "trials")],
        stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert "measuring" in process.stderr.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    assert process.wait(30) == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not (tmp_path / "trials").exists()


def test_warnings_meant_for_people_are_one_line(capsys):
    from gratis.contract.errors import GratisWarning

    with warnings.catch_warnings():
        assert run(["methods", "--json"]) == 0
        capsys.readouterr()
        warnings.warn("this may take hours", GratisWarning, stacklevel=1)
        warnings.warn("this is for developers", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "gratis: this may take hours\n"


def test_errors_that_come_of_an_interrupt_are_one(monkeypatch, capsys):
    from gratis import cli
    from gratis.cli import commands

    def interrupted(*args, **kwargs):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("a library's own words") from error

    monkeypatch.setattr(commands, "app", object())
    monkeypatch.setattr("typer.main.get_command", interrupted)
    assert cli.run(["methods"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_plan_says_what_generations_cost(capsys):
    assert run(["plan", "smollm2", "--hardware", "b200", "--length", "1000", "--sparse", "512", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    assert [row["attention"] for row in costs] == ["dense", "16 blocks of 32"]
    assert costs[0]["traffic_bytes"] > costs[1]["traffic_bytes"]
    assert run(["plan", "smollm2", "--hardware", "b200"]) == 0
    assert "562.5 FLOP per byte" in capsys.readouterr().out
    both = ["plan", "zoo:help-softmax:parameters=1e6", "smollm2", "--seconds", "0.1", "--hardware", "b200"]
    assert run(both) == 0
    assert "1 of 2 take at most 0.1 s" in capsys.readouterr().out


def test_plan_from_traces(capsys, tmp_path):
    from gratis.planning import Trace
    from gratis.planning.traces import write_traces

    path = tmp_path / "t.jsonl"
    write_traces([Trace(model="m", question="q", prompt=9, lengths=(90,) * 4, scores=(1, 0, 0, 0))], path)
    said = ["plan", "smollm2:as=m,parameters=1e8", "--traces", str(path), "--out", str(tmp_path)]
    assert run([*said, "--seconds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["samples"] == 4
    assert run(said) == 0
    assert str(tmp_path / "plan-t.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["smollm2", "--hardware", "h10"], "did you mean 'h100'"),
        (["smollm"], "no configuration of 'smollm'"),
        (["smollm2:size=3"], "not size"),
        (["zoo:help-softmay"], "did you mean 'help-softmax'"),
        (["smollm2", "--hardware", "measure:warp"], "Nothing can be measured on 'warp'"),
        (["smollm2:parameters=many"], "parameters must be a number"),
        (["smollm2", "--traces", "absent.jsonl"], "absent.jsonl cannot be read"),
    ],
)
def test_plan_refuses_what_it_cannot_read(changed, message, capsys):
    assert run(["plan", *changed]) == 2
    assert message in capsys.readouterr().err
