"""Whether a stretch is worked on by loops that numba compiled: it comes with the extra `speed`."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

from gratis.contract.errors import GratisWarning

SMALLEST = 65536
"""Elements below which a stretch is left to torch: loading the loops takes longer than they save."""


def compiled_loops(stretch: Tensor) -> ModuleType | None:
    """`gratis.subjects.merge_loops` for a stretch that it can work on; None for others, and without numba."""
    fits = stretch.device.type == "cpu" and stretch.dtype == torch.float32 and stretch.is_contiguous()
    return merge_loops() if fits and stretch.numel() >= SMALLEST else None


@functools.cache
def merge_loops() -> ModuleType | None:
    """The compiled loops, or None where numba is not installed; warns where it is installed and does not work."""
    try:
        return importlib.import_module("gratis.subjects.merge_loops")
    except ImportError as error:
        if getattr(error, "name", None) != "numba" or not isinstance(error, ModuleNotFoundError):
            warnings.warn(f"numba does not work here ({error}): merging goes on without it.", GratisWarning)
        return None
