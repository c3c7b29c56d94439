"""Methods, tasks and parameters as they are typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gratis.contract.errors import ParameterError, suggestion


def assignments(texts: Iterable[str], option: str = "--set") -> dict[str, str]:
    """`key=value` texts as a mapping. Raises ParameterError for one that is none."""
    found: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ParameterError(f"{option} takes key=value, not {text!r}.")
        found[key.strip().replace("-", "_")] = value.strip()
    return found


def parsed(kind: Any, texts: Mapping[str, str]) -> dict[str, Any]:
    """Typed values of the parameters of `kind` (a method or task class). Raises ParameterError."""
    declared = kind.declared()
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in declared:
            raise ParameterError(f"{kind.__name__} has no parameter {name!r}{suggestion(name, declared)}.")
        values[name] = declared[name].parse(kind.__name__, text)
    return values


def method(text: str, sets: Iterable[str] = ()) -> Any:
    """The method that `NAME` or `NAME:key=value,key=value` stands for, with further `key=value` texts."""
    from gratis.contract.catalogue import catalogue

    name, given = specification(text)
    kind = catalogue.resolve(name).load()
    return kind(**parsed(kind, {**given, **assignments(sets)}))


def rival(text: str) -> Any:
    """As `method`, but a bare name stays one: a trial gives it the parameters that it shares with its method."""
    from gratis.contract.catalogue import catalogue

    name, given = specification(text)
    return method(text) if given else catalogue.resolve(name).name


def task(name: str | None, sets: Iterable[str], of: Any) -> Any:
    """The task called `name`, or that of the first claim of the method `of`, with `key=value` texts."""
    from gratis.tasks.task import task_catalogue
    from gratis.trials.measuring import default_task

    given = assignments(sets, "--task-set")
    kind = task_catalogue[name or default_task(of)]
    claims = of.card.claims
    usual = dict(claims[0].task_parameters) if name is None and claims else {}
    return kind(**{**usual, **parsed(kind, given)})


def specification(text: str) -> tuple[str, dict[str, str]]:
    """`NAME:key=value,key=value` in its parts; commas inside a value are its own."""
    name, _, rest = text.partition(":")
    return name, assignments(re.split(r",(?=\s*[\w-]+=)", rest), "a method") if rest else {}


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Names of methods for the shell, with what they are for."""
    from gratis.contract.catalogue import catalogue

    return [(n, e.card.summary) for n, e in catalogue.entries.items() if n.startswith(incomplete)]


def complete_task(incomplete: str) -> list[tuple[str, str]]:
    """Names of tasks for the shell."""
    from gratis.tasks.task import task_catalogue

    entries = task_catalogue.entries
    return [(n, e.card.title) for n, e in entries.items() if n.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Short names of models for the shell."""
    from gratis.subjects.embedded import EMBEDDED

    return [name for name in EMBEDDED if name.startswith(incomplete)]
