"""One tiny subject per thing that methods act on. The promises run on these; none knows a method by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Kind:
    """How the promises handle one kind of live subject."""

    build: Callable[..., Any]
    """A fresh subject: `build(dtype=torch.float32)`."""
    run: Callable[..., np.ndarray]
    """What the subject does on a fixed input, as one array; `seed=` is that of torch's process-wide generator."""
    snapshot: Callable[[Any], Any]
    """All that a method could leave behind, comparable with ==."""
    rows: Callable[[Any, int], np.ndarray] | None
    """`rows(subject, batch)`: the outputs of the first `batch` rows of a fixed batch of two, row by row."""
    dtypes: tuple[torch.dtype, ...]


def _language() -> Kind:
    from tests import tiny_language as tiny

    def rows(model: Any, batch: int) -> np.ndarray:
        ids = tiny.prompt(2)
        return tiny.run(model, ids[:batch]).numpy()

    return Kind(
        build=lambda dtype=torch.float32: tiny.tiny_language_model(dtype=dtype),
        run=lambda model, seed=0: tiny.run(model, seed=seed).numpy(),
        snapshot=tiny.snapshot,
        rows=rows,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )


def _masked() -> Kind:
    from tests import tiny_language
    from tests import tiny_masked as tiny

    return Kind(
        build=lambda dtype=torch.float32: tiny.tiny_masked_model(dtype=dtype),
        run=lambda model, seed=0: tiny.run(model, seed=seed).numpy(),
        snapshot=tiny_language.snapshot,
        rows=lambda model, batch: tiny.run(model, tiny.prompt(2)[:batch]).numpy(),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )


def _diffusion() -> Kind:
    from tests import tiny_diffusion as tiny

    def build(dtype: torch.dtype = torch.float32) -> Any:
        return tiny.tiny_pipeline(seed=0).to(dtype)

    def run(pipeline: Any, seed: int = 0) -> np.ndarray:
        torch.manual_seed(seed)
        return tiny.run(pipeline, seed=0).float().numpy()

    def rows(pipeline: Any, batch: int) -> np.ndarray:
        out = tiny.run(pipeline, seed=0, batch=2) if batch == 2 else tiny.run(pipeline, seed=0, batch=1)
        return out.float().flatten(1).numpy()

    return Kind(
        build=build,
        run=run,
        snapshot=tiny.snapshot,
        rows=rows,
        dtypes=(torch.float32, torch.bfloat16),
    )


def _chat() -> Kind:
    from tests import tiny_chat as tiny

    return Kind(
        build=lambda dtype=None: tiny.tiny_chat(),
        run=lambda chat, seed=0: np.frombuffer(tiny.run(chat).encode(), dtype=np.uint8),
        snapshot=tiny.snapshot,
        rows=None,
        dtypes=(torch.float32,),
    )


LIVE: dict[str, Callable[[], Kind]] = {
    "language model": _language,
    "masked-diffusion model": _masked,
    "diffusion pipeline": _diffusion,
    "chat": _chat,
}
"""Kinds of live subject by the card's `acts_on`."""
