"""Readers for benchmarks of long texts: one per arm, on models that share their weights and take turns."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import gratis


def twin(model: Any) -> Any:
    """A copy of a model that shares its weights, so that every arm can have a method of its own attached."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class Reader:
    """One arm: a model with methods on it, the cache of the texts read so far, and their length."""

    def __init__(self, model: Any, methods: tuple[Any, ...]) -> None:
        self.model = twin(model)
        self.attached = gratis.attach(self.model, *methods) if methods else None
        self.cache: Any = None
        self.at = 0
        self.seconds = 0.0
        """Process CPU seconds of the last call."""

    @torch.no_grad()
    def read(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        """Read ids (rows, length) in pieces; return logits (rows, vocabulary) of the next token."""
        begin = time.process_time()
        for piece in ids.split(chunk or ids.shape[1], 1):
            out = self.model(piece, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = out.past_key_values
        self.seconds = time.process_time() - begin
        self.at += ids.shape[1]
        return out.logits[:, -1]  # type: ignore[no-any-return]

    @torch.no_grad()
    def losses(self, ids: Tensor, chunk: int) -> Tensor:
        """(rows, length) losses of the tokens after each of ids (rows, length + 1) but the last, which are read."""
        found = []
        for at in range(0, ids.shape[1] - 1, chunk):
            piece, after = ids[:, :-1][:, at : at + chunk], ids[:, at + 1 : at + chunk + 1]
            out = self.model(piece, past_key_values=self.cache, use_cache=True)
            self.cache = out.past_key_values
            found.append(cross_entropy(out.logits.transpose(1, 2).float(), after, reduction="none"))
        self.at += ids.shape[1] - 1
        return torch.cat(found, 1)

    def write(self, logits: Tensor, count: int) -> Tensor:
        """(rows, count) tokens, the likeliest each time, after logits (rows, vocabulary)."""
        written: list[Tensor] = []
        for _ in range(count):
            written.append(logits.argmax(-1, keepdim=True))
            if len(written) < count:
                logits = self.read(written[-1])
        return torch.cat(written, 1)


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
