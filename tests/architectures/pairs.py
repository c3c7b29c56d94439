"""Every two language methods on the embedded model, in both orders: they stack and keep the promises, or refuse.

`python -m tests.architectures.pairs` attaches them all and writes docs/pairs.json, from which the docs' table is
generated; it exits with 1 where a pair fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

import gratis
from gratis.contract.catalogue import Entry
from gratis.contract.errors import GratisError, ParameterError, StackingError, SubjectError
from gratis.contract.files import write_text
from tests import tiny_language
from tests.architectures.matrix import FAILS, REFUSES, WORKS, Cell, language_methods

TOKENS, NEW = 24, 8
RESULTS = Path(__file__).parents[2] / "docs" / "pairs.json"
SETTINGS: dict[str, dict[str, Any]] = {"lacache": {"budget": 52, "sinks": 4}, "sliding-window": {"budget": 24}}
"""Where a method's examples do not fit a model of thirty layers."""


def run(model: Any) -> torch.Tensor:
    """What the model generates from a prompt, and its last logits of reading it."""
    tokens = torch.randint(3, 1000, (1, 3 * TOKENS), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=NEW, max_new_tokens=NEW,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        logits = model(input_ids=tokens).logits[:, -1]
    return torch.cat([out.double(), logits.double()], dim=1)


def method(entry: Entry) -> Any:
    """The method with its examples, at which it acts on a short text."""
    return entry.load()(**{**entry.card.examples, **SETTINGS.get(entry.name, {})})


def examine(model: Any, first: Entry, second: Entry, expected: torch.Tensor) -> Cell:
    """Attach the first, then the second."""
    try:
        handle = gratis.attach(model, method(first), method(second))
    except (StackingError, SubjectError, ParameterError) as error:
        untouched = torch.equal(run(model), expected)
        return Cell(REFUSES, str(error)) if untouched else Cell(FAILS, f"refused, but changed the model: {error}")
    try:
        with handle:
            once, again = run(model), run(model)
            handle.report()
    except GratisError as error:
        return Cell(FAILS, f"attached, then refused: {error}")
    except Exception as error:
        return Cell(FAILS, f"{type(error).__name__}: {error}")
    if not once.isfinite().all() or not torch.equal(once, again):
        return Cell(FAILS, "results are not finite, or differ from run to run")
    if not torch.equal(run(model), expected):
        return Cell(FAILS, "something stays behind")
    return Cell(WORKS)


def main() -> None:
    """Examine all pairs and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="methods whose pairs are renewed, the others kept; all without any")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model = gratis.open(flags.model)
    before, expected = tiny_language.snapshot(model), run(model)
    entries = language_methods()
    known = json.loads(flags.out.read_text())["pairs"] if flags.names and flags.out.exists() else {}
    names = {entry.name for entry in entries}
    cells = {a: {b: cell for b, cell in row.items() if b in names} for a, row in known.items() if a in names}
    pairs = [
        (a, b)
        for a, b in itertools.permutations(entries, 2)
        if not flags.names or a.name in flags.names or b.name in flags.names
    ]
    for first, second in track(pairs, description="pairs"):
        cells.setdefault(first.name, {})[second.name] = asdict(examine(model, first, second, expected))
    if tiny_language.snapshot(model) != before:
        sys.exit("something of the methods stays on the model")
    found = {"model": flags.model, "transformers": transformers.__version__, "pairs": cells}
    write_text(flags.out, json.dumps(found, indent=1) + "\n")
    failures = [(a, b, c["reason"]) for a, row in cells.items() for b, c in row.items() if c["outcome"] == FAILS]
    for one, other, reason in failures:
        print(f"FAILS  {one} + {other}: {reason}")
    print(f"{len(pairs)} pairs of {len(entries)} methods, {len(failures)} failures: {flags.out}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
