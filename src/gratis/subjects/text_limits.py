"""How long a text a model can read: by the window that it was trained for, and by the memory that is free.

What would allow a longer one is found in the catalogue, by what the methods' cards say and by trying them on the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gratis.contract.attach import attached
from gratis.contract.catalogue import catalogue
from gratis.contract.errors import InputError, MemoryShortError, ParameterError, SubjectError
from gratis.subjects.block_store import gib
from gratis.subjects.language import cached_layers, input_device, text_config, window_of
from gratis.subjects.memory_need import LONGEST, Footprint, Free, fits, free_bytes, full_footprint, longest

UNLIMITED = LONGEST
"""Tokens that can follow where nothing limits them."""

SMALLER: tuple[dict[str, Any], ...] = ({}, {"chunk": 512}, {"chunk": 512, "store": "file"})
"""Parameters with which a method may need less memory than it does as it is."""


def longest_text(model: Any) -> int | None:
    """Tokens that `model` reads by itself, those that it writes included; None where nothing limits them."""
    window, config = window_of(model), text_config(model)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if window is not None and isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "dynamic":
        return int(window * float(scaling.get("factor", 1.0)))
    return window


def room_for(model: Any, tokens: int, methods: Iterable[Any] = ()) -> int:
    """Tokens that can follow a prompt of `tokens` tokens, with what is attached to `model` and `methods` on it.

    Raises InputError where that is none, naming the methods in the catalogue that would let the model read on.
    """
    limit = longest_text(model)
    on = [*methods, *(method for attachment in attached(model) for method in attachment.methods)]
    if limit is None or any(_reads_any_length(method) for method in on):
        return UNLIMITED
    if tokens < limit:
        return limit - tokens
    allow = [method.name for method in _allowing(model)]
    advice = f"shorten it, or use a method that reads texts of any length: {_one_of(allow)}" if allow else "shorten it"
    raise InputError(
        f"The prompt of {tokens:,} tokens leaves no room in {type(model).__name__}'s window of {limit:,}: {advice}."
    )


def footprint(model: Any, methods: Iterable[Any], tokens: int, rows: int = 1) -> Footprint | None:
    """Bytes that `rows` texts of `tokens` tokens take at most on `model` under `methods`; None where nobody can say.

    Raises MemoryShortError, naming what would fit, where the full cache is kept and exceeds what is free. A method that
    keeps less refuses by itself, before it reads.
    """
    for method in methods:
        if hasattr(method, "footprint"):
            need: Footprint = method.footprint(model, tokens, rows)
            return need
    try:
        layers = cached_layers(model, "The estimate")
    except SubjectError:
        return None
    where = input_device(model)
    free, need = free_bytes(where), full_footprint(layers, model.dtype, rows, tokens)
    if fits(need, where, free):
        return need
    own = longest(where, lambda count: full_footprint(layers, model.dtype, rows, count))
    others = [named for method in _allowing(model) if (named := _fitting(method, model, tokens, rows)) is not None]
    raise MemoryShortError(
        f"The full cache of {tokens:,} tokens takes {in_words(need)}, more than is free: about {own:,} tokens fit"
        + (f"; {_one_of(others)} would hold this text." if others else ".")
    )


def in_words(need: Footprint) -> str:
    """A footprint by places: `0.21 GiB beside the model and 1.50 GiB of main memory`."""
    parts = ((need.device, "beside the model"), (need.main, "of main memory"), (need.file, "in a file"))
    return " and ".join(f"{gib(size)} {place}" for size, place in parts if size) or gib(0)


def free_in_words(free: Free, where: torch.device) -> str:
    """What is free, by places."""
    near = f", {gib(free.device)} on {where}" if where.type == "cuda" else ""
    return f"{gib(free.main)} of main memory{near}, {gib(free.file)} for temporary files"


def _reads_any_length(method: Any) -> bool:
    return bool(getattr(getattr(method, "card", None), "any_length", False))


def _allowing(model: Any) -> Iterator[Any]:
    """Methods for texts of any length that can act on `model`, at their defaults or, on a small one, their examples."""
    for entry in catalogue.select(any_length=True):
        kind = entry.load()
        for parameters in (dict[str, Any](), dict(entry.card.examples)):
            try:
                method = kind(**parameters)
                method.check(model)
            except (ParameterError, SubjectError):
                continue
            yield method
            break


def _fitting(method: Any, model: Any, tokens: int, rows: int) -> str | None:
    """The method, as the command line takes it, if its text fits what is free: as it is, in pieces, or from a file."""
    where = input_device(model)
    free = free_bytes(where)
    for changed in SMALLER:
        if not set(changed) <= set(method.parameters()):
            continue
        if fits(method.replace(**changed).footprint(model, tokens, rows), where, free):
            told = ",".join(f"{name}={value}" for name, value in changed.items())
            return f"{method.name}:{told}" if told else str(method.name)
    return None


def _one_of(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
