"""Readers for benchmarks of long texts: one per arm, on models that share their weights and take turns."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gratis


def twin(model: Any) -> Any:
    """A copy of a model that shares its weights, so that every arm can have a method of its own attached."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class Reader:
    """One arm: a model with methods on it, the cache of the text read so far, and its length."""

    def __init__(self, model: Any, methods: tuple[Any, ...]) -> None:
        self.model = twin(model)
        self.attached = gratis.attach(self.model, *methods) if methods else None
        self.cache: Any = None
        self.at = 0
        self.seconds = 0.0
        """Process CPU seconds of the last call."""

    def read(self, ids: Tensor, chunk: int | None = None, *, logits: bool = False) -> Tensor:
        """Read ids (1, length) in pieces; return logits (length, vocabulary), or of the last token only."""
        kept, options = [], {} if logits else {"logits_to_keep": 1}
        begin = time.process_time()
        with torch.no_grad():
            for piece in ids.split(chunk or ids.shape[1], 1):
                out = self.model(piece, past_key_values=self.cache, use_cache=True, **options)
                self.cache = out.past_key_values
                kept = [*kept, out.logits[0]] if logits else [out.logits[0]]
        self.seconds = time.process_time() - begin
        self.at += ids.shape[1]
        return torch.cat(kept)

    def write(self, logits: Tensor, count: int) -> list[int]:
        """`count` tokens, the likeliest each time, after logits (1, vocabulary)."""
        written: list[int] = []
        for _ in range(count):
            written.append(int(logits[-1].argmax()))
            if len(written) < count:
                logits = self.read(torch.tensor([[written[-1]]]))
        return written


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, 1927): sensible at none and at all of few trials."""
    z, share = 1.96, hits / trials
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return round(max(0.0, (middle - spread) / scale), 3), round(min(1.0, (middle + spread) / scale), 3)


def source_code() -> str:
    """Python source that ships with Python itself."""
    import argparse
    import ast
    import dataclasses
    import tarfile

    files = [Path(str(module.__file__)) for module in (argparse, ast, dataclasses, tarfile)]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
