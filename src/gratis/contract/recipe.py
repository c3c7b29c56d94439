"""A recipe: a file that names a subject, methods with parameters, and the trials behind them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gratis.contract.attach import Attachment, attach
from gratis.contract.catalogue import catalogue
from gratis.contract.errors import FileError, ParameterError, suggestion
from gratis.contract.files import write_text
from gratis.contract.method import Method

VERSION = 1
"""Version of the file format; a file of another version is refused."""

MAXIMUM_BYTES = 1_000_000
"""A recipe is a page of text; what is larger is something else."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MethodLine(_Strict):
    """A method of a recipe: its name, and the parameters that differ from its defaults."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class Figure(_Strict):
    """A metric without and with the methods of a recipe."""

    before: float
    after: float


class TrialLine(_Strict):
    """A trial behind a recipe: enough to see what was measured, and to measure it again."""

    task: str
    task_parameters: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    figures: dict[str, Figure] = Field(default_factory=dict)
    """What was measured, by metric."""
    measured: str = ""
    file: str = ""
    """The trial file, relative to the recipe."""


class _File(_Strict):
    """The keys of a recipe file."""

    version: int
    subject: str = ""
    methods: list[MethodLine] = Field(min_length=1)
    trials: list[TrialLine] = Field(default_factory=list)
    note: str = ""


class Recipe:
    """A subject, methods with parameters, and the trials behind them: shared as a file, attached in one line.

    ```python
    recipe = gratis.Recipe.load("long-reading.yaml")
    with recipe.attach():                  # opens the subject it names; or recipe.attach(model)
        ...
    ```
    """

    def __init__(
        self,
        methods: Iterable[Method],
        *,
        subject: str = "",
        trials: Iterable[TrialLine] = (),
        note: str = "",
    ) -> None:
        self.methods = tuple(methods)
        self.subject = subject
        self.trials = tuple(trials)
        self.note = note
        if not self.methods:
            raise ParameterError("A recipe needs at least one method.")
        for method in self.methods:
            if not isinstance(method, Method):
                raise ParameterError(f"A recipe holds methods; {method!r} is none.")

    @classmethod
    def from_attachment(cls, attachment: Attachment, *, subject: str = "", note: str = "") -> Self:
        """The recipe of the methods that are on a subject now. Raises ParameterError for a delta, which is a file."""
        for method in attachment.methods:
            if not isinstance(method, Method):
                raise ParameterError(f"{method.name} is no method by name: a recipe cannot hold it, share its file.")
        return cls((m for m in attachment.methods if isinstance(m, Method)), subject=subject, note=note)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a recipe. Raises FileError, UnknownNameError or ParameterError, naming what is wrong and the nearest."""
        file = Path(path)
        try:
            if file.stat().st_size > MAXIMUM_BYTES:
                raise FileError(f"{file} is too large to be a recipe.")
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise FileError(f"The recipe {file} cannot be read: {(error.strerror or str(error)).lower()}.") from None
        except UnicodeDecodeError:
            raise FileError(f"The recipe {file} cannot be read: it is not text.") from None
        return cls.parse(text, str(file))

    @classmethod
    def parse(cls, text: str, where: str = "The recipe") -> Self:
        """The recipe that `text` describes; `where` names it in errors."""
        try:
            content = None if _has_aliases(text) else yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise FileError(f"{where} is not plain YAML: {_problem(error)}.") from None
        if content is None and text.strip():
            raise FileError(f"{where} uses YAML anchors or aliases, which recipes do not have; write the value out.")
        if not isinstance(content, Mapping):
            raise FileError(f"{where} is not a recipe: it must have the keys version, subject and methods.")
        version = content.get("version")
        if version != VERSION or isinstance(version, bool):
            was = "has no version" if version is None else f"has version {version!r}"
            raise FileError(f"{where} {was}; this gratis reads version {VERSION} (a first line `version: {VERSION}`).")
        try:
            read = _File.model_validate(dict(content))
        except ValidationError as error:
            raise FileError(f"{where}: {_first(error)}") from None
        methods = [catalogue[line.name](**line.parameters) for line in read.methods]
        return cls(methods, subject=read.subject, trials=read.trials, note=read.note)

    def dump(self) -> str:
        """The recipe as YAML. Parameters at their defaults are written too, so that new defaults change nothing."""
        content: dict[str, Any] = {"version": VERSION}
        if self.subject:
            content["subject"] = self.subject
        content["methods"] = [{"name": m.name, "parameters": _plain(m.parameters())} for m in self.methods]
        if self.trials:
            content["trials"] = [_plain(line.model_dump(exclude_defaults=True)) for line in self.trials]
        if self.note:
            content["note"] = self.note
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe: a kill leaves the old file or none."""
        file = Path(path)
        write_text(file, self.dump())
        return file

    def attach(self, subject: Any = None) -> Attachment:
        """Put the recipe's methods on `subject`, or on the subject that it names, opened.

        Raises SubjectError, StackingError or AttachmentError as `gratis.attach` does, and ParameterError where
        there is no subject to open.
        """
        if subject is None:
            if not self.subject:
                raise ParameterError("This recipe names no subject: give one, recipe.attach(model).")
            from gratis.subjects import open as open_subject

            subject = open_subject(self.subject)
        return attach(subject, *self.methods)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash((self.methods, self.subject, self.note))

    def __repr__(self) -> str:
        return f"Recipe({list(self.methods)!r}, subject={self.subject!r})"

    def _parts(self) -> tuple[Any, ...]:
        return self.methods, self.subject, self.trials, self.note


def _has_aliases(text: str) -> bool:
    """Whether YAML anchors or aliases are used, with which a few lines expand to gigabytes."""
    return any(isinstance(t, (yaml.AliasToken, yaml.AnchorToken)) for t in yaml.scan(text, Loader=yaml.SafeLoader))


def _problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1})" if mark is not None else str(problem)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, with the nearest name for an unknown key."""
    first = error.errors(include_url=False)[0]
    *parents, key = first["loc"]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known: Iterable[str] = _File.model_fields
        if parents and parents[0] == "methods":
            known = MethodLine.model_fields
        elif parents and parents[0] == "trials":
            known = Figure.model_fields if "figures" in parents else TrialLine.model_fields
        return f"unknown key {str(key)!r}{suggestion(str(key), known)}."
    if first["type"] == "missing":
        return f"{place} is missing."
    return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}."


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML's safe subset has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
