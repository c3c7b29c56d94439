"""Recorded generations: how long they were and which were right, per model and question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gratis.contract.errors import FileError, ParameterError
from gratis.contract.files import write_text
from gratis.tasks.task import Progress, silent


class Trace(BaseModel):
    """The generations of one model for one question."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    question: str
    prompt: int
    """Tokens of the prompt, chat template included."""
    lengths: tuple[int, ...]
    """Tokens of each generation."""
    scores: tuple[int, ...]
    """1 for each that is right, 0 for the others."""
    scores_at: dict[int, tuple[int, ...]] = {}
    """The same with every generation cut off at a number of tokens and read again."""
    budget: int | None = None
    """Tokens of the cache that were attended to; None for dense attention."""
    block: int = 1

    @model_validator(mode="after")
    def _agree(self) -> Trace:
        if self.prompt < 0 or not self.lengths or min(self.lengths) < 1:
            raise ValueError("prompt and lengths must be numbers of tokens, and there must be a generation")
        for scores in (self.scores, *self.scores_at.values()):
            if len(scores) != len(self.lengths):
                raise ValueError(f"there are {len(self.lengths)} lengths and {len(scores)} scores")
            if not set(scores) <= {0, 1}:
                raise ValueError("scores must be 0 or 1")
        return self


def read_traces(path: Path) -> list[Trace]:
    """Traces from a file with one JSON object a line. Raises FileError naming the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"The traces {path} cannot be read: {error}.") from error
    traces = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            traces.append(Trace.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise FileError(
                f"Line {number} of {path} is no trace: {where + ': ' if where else ''}{first['msg']}."
            ) from error
    if not traces:
        raise FileError(f"{path} holds no traces.")
    return traces


def write_traces(traces: Sequence[Trace], path: Path) -> None:
    """Write traces, one JSON object a line."""
    write_text(path, "".join(trace.model_dump_json() + "\n" for trace in traces))


def record(
    model: Any,
    name: str,
    *,
    questions: int = 12,
    generations: int = 16,
    max_new_tokens: int = 64,
    limits: Sequence[int] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> list[Trace]:
    """Let `model` answer generated reasoning problems several times each, and score the answers.

    `limits` are numbers of tokens at which generations are cut off and read again.
    """
    import torch

    from gratis.subjects import tokenizer_of
    from gratis.subjects.answers import extract
    from gratis.tasks.reasoning import encoded, problems

    if questions < 1 or generations < 1 or max_new_tokens < 1:
        raise ParameterError("questions, generations and max_new_tokens must be at least 1.")
    tokenizer = tokenizer_of(model)
    posed = problems(("chain_sum", "products", "gcd"), questions, seed, "easy")
    end = tokenizer.eos_token_id
    traces = []
    torch.manual_seed(seed)
    for number, problem in enumerate(posed):
        prompt = encoded(model, problem.question)
        length = prompt.shape[1]
        with torch.no_grad():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.8, num_return_sequences=generations,
                max_new_tokens=max_new_tokens, pad_token_id=end,
            )[:, length:]  # fmt: skip
        rows = [row[: row.index(end)] if end in row else row for row in out.tolist()]

        def right(limit: int, rows: list[list[int]] = rows, problem: Any = problem) -> tuple[int, ...]:
            texts = [tokenizer.decode(row[:limit], skip_special_tokens=True) for row in rows]
            return tuple(int(problem.score(extract("number", text)) >= 1) for text in texts)

        traces.append(
            Trace(
                model=name,
                question=problem.question,
                prompt=length,
                lengths=tuple(max(len(row), 1) for row in rows),
                scores=right(max_new_tokens),
                scores_at={limit: right(limit) for limit in limits if limit < max_new_tokens},
            )
        )
        progress((number + 1) / len(posed), f"{number + 1} of {len(posed)} questions")
    return traces
