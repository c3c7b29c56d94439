"""Every attachable language method on every decoder-only architecture: it works and keeps the promises, or refuses.

`python -m tests.architectures.matrix` examines all of them and writes docs/architectures.json, from which the docs'
table is generated; it exits with 1 where one fails. With names of architectures or methods it renews their part.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

import gratis
from gratis.contract.attach import Scope
from gratis.contract.catalogue import Entry
from gratis.contract.errors import GratisError, ParameterError, SubjectError
from gratis.contract.files import write_text
from gratis.subjects.attention_door import check_attention, install_attention, pass_through
from tests import tiny_language
from tests.architectures.building import VOCABULARY, architectures, build

WORKS, REFUSES, FAILS = "works", "refuses", "fails"
DOOR = "attention door"
PROMPT, NEW = 40, 16
RESULTS = Path(__file__).parents[2] / "docs" / "architectures.json"


@dataclass(frozen=True)
class Cell:
    """What a method does on an architecture."""

    outcome: str
    reason: str = ""


def language_methods() -> list[Entry]:
    """Every method of the catalogue that attaches to a language model."""
    return [e for e in gratis.catalogue.entries.values() if e.card.acts_on == "language model" and e.kind in {"attach", "decode"}]  # fmt: skip


def run(model: Any) -> torch.Tensor:
    """Tokens that the model generates by itself, and the logits of reading a text at once: one row."""
    tokens = torch.randint(3, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False
        )
        logits = model(input_ids=tokens).logits[:, -1]
    return torch.cat([out.double(), logits.double()], dim=1)


def examine(name: str, entries: list[Entry]) -> dict[str, Cell] | None:
    """A cell per method and one for the attention door; None where the model itself does not run here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(name)
            expected = run(model)
        except Exception:
            return None
        if not torch.equal(expected, run(model)) or not expected.isfinite().all():
            return None
        cells = {entry.name: _promises(model, entry, expected) for entry in entries}
        return {**cells, DOOR: _door(model, expected)}


def _promises(model: Any, entry: Entry, expected: torch.Tensor) -> Cell:
    before = tiny_language.snapshot(model)
    kind = entry.load()
    try:
        handle = gratis.attach(model, kind(**entry.card.examples))
    except (SubjectError, ParameterError) as error:
        untouched = tiny_language.snapshot(model) == before and torch.equal(run(model), expected)
        return Cell(REFUSES, str(error)) if untouched else Cell(FAILS, f"refused, but changed the model: {error}")
    try:
        with handle:
            first, second = run(model), run(model)
    except GratisError as error:
        return Cell(FAILS, f"attached, then refused: {error}")
    except Exception as error:
        return Cell(FAILS, f"{type(error).__name__}: {error}")
    if not first.isfinite().all() or not torch.equal(first, second):
        return Cell(FAILS, "its results are not finite, or differ from run to run")
    if tiny_language.snapshot(model) != before or not torch.equal(run(model), expected):
        return Cell(FAILS, "something of it stays behind")
    if entry.card.unchanged_when is not None:
        with gratis.attach(model, kind(**{**entry.card.examples, **entry.card.unchanged_when})):
            same = run(model)
        if not torch.equal(same[:, : PROMPT + NEW], expected[:, : PROMPT + NEW]):
            return Cell(FAILS, f"other tokens at {entry.card.unchanged_when}")
        if not torch.allclose(same, expected, atol=1e-5, rtol=1e-4):
            return Cell(FAILS, f"other logits at {entry.card.unchanged_when}")
    return Cell(WORKS)


def _door(model: Any, expected: torch.Tensor) -> Cell:
    before = tiny_language.snapshot(model)
    try:
        check_attention(model, "An attention function")
    except SubjectError as error:
        return Cell(REFUSES, str(error)) if tiny_language.snapshot(model) == before else Cell(FAILS, "the probe stays")
    scope = Scope()
    install_attention(model, "pass-through", pass_through, scope)
    through = run(model)
    scope.close()
    if not torch.equal(through, expected):
        return Cell(FAILS, "a function that passes everything on changes the results")
    if tiny_language.snapshot(model) != before or not torch.equal(run(model), expected):
        return Cell(FAILS, "something of it stays behind")
    return Cell(WORKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all without any")
    parser.add_argument("--method", action="append", help="only this method, the others' results kept (repeatable)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    entries = [e for e in language_methods() if arguments.method is None or e.name in arguments.method]
    partial = bool(arguments.names or arguments.method) and arguments.out.exists()
    rows: dict[str, Any] = json.loads(arguments.out.read_text())["architectures"] if partial else {}
    for name in track(arguments.names or architectures(), description="architectures"):
        cells = examine(name, entries)
        if cells is not None:
            found_here = {method: asdict(cell) for method, cell in cells.items()}
            rows[name] = {**rows.get(name, {}), **found_here} if partial else found_here
    found = {"transformers": transformers.__version__, "torch": torch.__version__, "architectures": rows}
    write_text(arguments.out, json.dumps(found, indent=1) + "\n")
    failures = [(n, m, c["reason"]) for n, row in rows.items() for m, c in row.items() if c["outcome"] == FAILS]
    for name, method, reason in failures:
        print(f"FAILS  {name} · {method}: {reason}")
    print(f"{len(rows)} architectures, {len(entries)} methods, {len(failures)} failures: {arguments.out}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
