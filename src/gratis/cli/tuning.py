"""`gratis tune`: find a method's parameters on prompts of the user's own."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from gratis.cli import arguments, terminal

SCORES = {"accuracy": "accuracy", "parsed_accuracy": "written", "valid": "valid", "entropy": "entropy"}
"""What is measured, and its column."""


def tune(
    name: Annotated[
        str, typer.Argument(metavar="NAME[:key=value,…]", help="The method.", autocompletion=arguments.complete_method)
    ],
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS", help='JSON lines {"prompt": …, "label": …}, the label left out where it is not known.'
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A language model.", autocompletion=arguments.complete_model)
    ] = "smollm2",
    answers: Annotated[
        list[str] | None, typer.Option("--answer", help="A word that may be the answer.  [default: the labels]")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective", help="accuracy, parsed accuracy, entropy or answer entropy.  [default: by the labels]"
        ),
    ] = None,
    level: Annotated[int, typer.Option("--level", help="0: a few scales; 1: a grid; 2: heads, then the grid.")] = 2,
    fraction: Annotated[float, typer.Option("--fraction", help="Share of the heads that help which is kept.")] = 0.5,
    chat: Annotated[bool, typer.Option("--chat", help="Put every prompt into the chat template.")] = False,
    begun: Annotated[str, typer.Option("--begun", help="What the answer in the chat begins with.")] = "",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts at a time.")] = 16,
    device: Annotated[str | None, typer.Option("--device", help="Where the model is put: cpu, cuda …")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Recipe to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Find a method's parameters on prompts of yours, with right answers or without; write them as a recipe."""
    from gratis.contract.errors import ParameterError
    from gratis.contract.recipe import Recipe
    from gratis.subjects import open as open_subject
    from gratis.subjects.prompted_answers import word_tokens

    method = arguments.method(name)
    if not hasattr(method, "tune"):
        raise ParameterError(
            f"{type(method).__name__} finds nothing on prompts: give its parameters, as `gratis show` says."
        )
    texts, labels = _read(prompts)
    words = answers or sorted(set(labels or ()))
    if labels is not None and set(labels) - set(words):
        raise ParameterError(f"{', '.join(sorted(set(labels) - set(words)))}: no such --answer is given.")
    options: dict[str, Any] = {"device": device} if device else {}
    subject = open_subject(model, **options)
    given: dict[str, Any] = {"answers": word_tokens(subject, words)} if words else {}
    if labels is not None:
        given["labels"] = [words.index(label) for label in labels]
    with terminal.progress(not as_json) as progress, warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always", UserWarning)
        found = method.tune(
            subject, _in_chat(subject, texts, begun) if chat or begun else texts, objective=objective, level=level,
            fraction=fraction, batch=batch, progress=progress, **given,
        )  # fmt: skip
    for doubt in doubts:
        print(f"gratis: {doubt.message}", file=sys.stderr)
    if out is not None:
        Recipe([found.method], subject=model, note=f"tuned on {len(texts)} prompts by {found.objective}").save(out)
    if as_json:
        terminal.print_json(
            {
                "method": found.method.parameters(), "objective": found.objective, "baseline": found.baseline_scores,
                "scores": found.scores, "profile": found.profile, "groups": found.groups, "recipe": out,
            }
        )  # fmt: skip
        return
    _print(found, len(texts), out)


def _read(path: Path) -> tuple[list[str], list[str] | None]:
    """Prompts and, where every line has one, labels. Raises FileError naming the line that is wrong."""
    from gratis.contract.errors import FileError

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"The prompts {path} cannot be read: {error}.") from error
    texts: list[str] = []
    labels: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FileError(f"Line {number} of {path} is no JSON: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or set(row) - {"prompt", "label"}:
            raise FileError(f'Line {number} of {path} must be {{"prompt": "…"}}, with a "label" or without.')
        texts.append(row["prompt"])
        if row.get("label") is not None:
            labels.append(str(row["label"]))
    if not texts:
        raise FileError(f"{path} holds no prompts.")
    if labels and len(labels) < len(texts):
        raise FileError(
            f"{len(labels)} of the {len(texts)} prompts in {path} have a label: give it to all, or to none."
        )
    return texts, labels or None


def _in_chat(subject: Any, texts: list[str], begun: str) -> list[list[int]]:
    from gratis.contract.errors import SubjectError
    from gratis.subjects import tokenizer_of

    tokenizer = tokenizer_of(subject)
    if tokenizer.chat_template is None:
        raise SubjectError("This model has no chat template: leave out --chat and --begun.")
    turns = [[{"role": "user", "content": text}] for text in texts]
    said = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + begun for turn in turns]
    return [tokenizer(one, add_special_tokens=False).input_ids for one in said]


def _print(found: Any, count: int, out: Path | None) -> None:
    shown = [name for name in SCORES if name in found.baseline_scores]
    console, table = terminal.console(), terminal.table("scale", *(SCORES[name] for name in shown), numbers=range(6))
    rows = sorted({1.0: found.baseline_scores, **found.scores}.items())
    for scale, scores in rows:
        style = "bold" if scale == found.method.scale else ""
        named = "1, as it is" if scale == 1 else f"{scale:g}"
        table.add_row(named, *(f"{scores[name]:.3f}" for name in shown), style=style)
    heads = "all heads" if found.method.heads is None else f"heads {', '.join(map(str, found.method.heads))}"
    console.print(f"{heads}, by {found.objective} on {count} prompts")
    console.print(table)
    for direction, members in found.groups.items():
        console.print(f"better {direction}: {', '.join(map(str, members)) or 'none'}")
    console.print(f"found: scale {found.method.scale:g}, {heads}. Measure it on other prompts than these.")
    if out is not None:
        print(f"recipe {out}")
