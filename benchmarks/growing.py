"""Specialists that share a table of drawn embeddings: alone, mixed, averaged, and models grown against trained whole.

    OMP_NUM_THREADS=1 python benchmarks/growing.py [--pieces 128]

Bits per character of held-out code and prose. Writes benchmarks/results/growing.json.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from measuring import renew

import gratis
from gratis import zoo
from gratis.methods.decoding.logit_mixture import LogitMixture
from gratis.subjects.opening import tokenizer_of
from gratis.tasks.two_texts import TwoTexts
from gratis.zoo.library_text import library_text

CODE, PROSE = "zoo:glyphs-code", "zoo:glyphs-prose"
EARLY = {"mode": "prob", "weights": (0.8, 0.2)}


def row(name: str, model: Any, task: TwoTexts, method: LogitMixture | None = None) -> dict[str, Any]:
    """Bits per character of both kinds, CPU seconds, and what the mixture did."""
    begin = time.process_time()
    with task.applied(model, method) as subject:
        found = task.measure(subject, seed=0)
    values = {key: round(found.metrics[key], 4) for key in ("code", "prose", "both")}
    return {"reader": name, **values, "cpu_seconds": round(time.process_time() - begin, 2)}


def averaged() -> Any:
    """The mean of both specialists' weights."""
    model, other = gratis.open(CODE), gratis.open(PROSE)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    return model


def left_out(model: Any, tokens: int = 64) -> list[dict[str, Any]]:
    """How many passes early exit saves while a text is written, and whether the text is another."""
    prompt = tokenizer_of(model)("def read(self, path):\n", return_tensors="pt").input_ids
    rows, texts = [], []
    for early in ("never", "decided", "close"):
        method = LogitMixture(experts=(PROSE,), **EARLY, early=early, tolerance=0.2)
        with gratis.attach(model, method) as handle:
            texts.append(model.generate(input_ids=prompt, max_new_tokens=tokens, do_sample=False))
            report = handle.report()["logit-mixture"]
        same = bool(torch.equal(texts[-1], texts[0]))
        rows.append(
            {"early": early, "passes": report["forward_passes"], "left out": report["left_out"], "same text": same}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--pieces", type=int, default=128)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task = TwoTexts(pieces=chosen.pieces)
    code, prose = gratis.open(CODE), gratis.open(PROSE)
    rows = [
        row("specialist of code", code, task),
        row("specialist of prose", prose, task),
        row("code, all layers trained at once", gratis.open("zoo:glyphs-code-whole"), task),
        row("mean of weights", averaged(), task),
    ]
    for mode in ("logit", "prob"):
        method = LogitMixture(experts=(prose,), mode=mode)
        rows.append(row(f"mixture, {mode}", code, task, method))
        for kind in ("code", "prose"):
            fitted = method.fitted(code, library_text(kind, held_out=False)[50_000:52_000])
            rows.append(row(f"mixture, {mode}, weights from 2,000 characters of {kind}", code, task, fitted))
    growth = {
        name: {
            key: value for key, value in figures(name).items() if "bits" in key or "stage" in key or "largest" in key
        }
        for name in ("glyphs-code", "glyphs-code-whole", "glyphs-prose")
    }
    renew("growing", {"readers": rows, "growth": growth, "early exit": left_out(code)})


def figures(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((zoo.folder_of(name) / "figures.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
