"""Finds methods and tasks by walking their folders; nothing is registered by hand.

Names and cards are read from the source text, so that listing them imports nothing heavy; a class is imported when
it is asked for.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gratis.contract.card import Card, Claim
from gratis.contract.errors import UnknownNameError
from gratis.contract.method import KINDS, kebab


@dataclass(frozen=True)
class Entry:
    """One class of a catalogue, known without importing it."""

    name: str
    class_name: str
    module: str
    family: str
    base: str
    """Name of the class that it extends, as written."""
    card: Any

    @property
    def kind(self) -> str:
        """What the user writes: attach, decode, program, edit, merge, estimator (empty for tasks)."""
        return KINDS.get(self.base, "")

    def load(self) -> Any:
        """Import the module and return the class."""
        return getattr(importlib.import_module(self.module), self.class_name)


class Catalogue(Mapping[str, Any]):
    """Names to classes, found in a package's folder: one file, one public class with a literal `card`."""

    def __init__(self, package: str, folder: Path, what: str, makers: Mapping[str, Any]) -> None:
        self._package, self._folder, self._what, self._makers = package, folder, what, makers

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """All entries by name, sorted by family and name."""
        found: list[Entry] = []
        for path in sorted(self._folder.rglob("*.py")):
            found.extend(self._read(path))
        return {entry.name: entry for entry in sorted(found, key=lambda e: (e.family, e.name))}

    def _read(self, path: Path) -> Iterator[Entry]:
        source = path.read_text(encoding="utf-8")
        if "card = " not in source:
            return
        parts = path.relative_to(self._folder).with_suffix("").parts
        try:
            yield from self._entries(source, parts)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{'/'.join(parts)}.py: {error}") from None

    def _entries(self, source: str, parts: tuple[str, ...]) -> Iterator[Entry]:
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for statement in node.body:
                if (
                    isinstance(statement, ast.Assign)
                    and isinstance(statement.targets[0], ast.Name)
                    and statement.targets[0].id == "card"
                    and not isinstance(statement.value, ast.Attribute)
                ):
                    yield Entry(
                        name=kebab(parts[-1]),
                        class_name=node.name,
                        module=".".join((self._package, *parts)),
                        family=parts[0] if len(parts) > 1 else "",
                        base=ast.unparse(node.bases[0]) if node.bases else "",
                        card=literal(statement.value, self._makers),
                    )

    def resolve(self, name: str) -> Entry:
        """The entry called `name` (hyphens or underscores, any case, or the class's name). Raises UnknownNameError."""
        wanted = kebab(name)
        for entry in self.entries.values():
            if (
                wanted == entry.name
                or name == entry.class_name
                or wanted.replace("-", "") == entry.name.replace("-", "")
            ):
                return entry
        raise UnknownNameError.among(self._what, name, self.entries)

    def __getitem__(self, name: str) -> Any:
        try:
            return self.resolve(name).load()
        except UnknownNameError as error:
            raise _UnknownKey(str(error)) from None

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self.resolve(name))
        except UnknownNameError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, **wanted: Any) -> list[Entry]:
        """Entries whose family, or card field, equals (or, for a tuple field, contains) each wanted value."""

        def matches(entry: Entry) -> bool:
            for field, value in wanted.items():
                have = getattr(entry, field, None) if field in {"name", "family"} else getattr(entry.card, field)
                if have != value and not (isinstance(have, tuple) and value in have):
                    return False
            return True

        return [entry for entry in self.entries.values() if matches(entry)]


class _UnknownKey(UnknownNameError, KeyError):
    """UnknownNameError that a mapping's users can catch as KeyError."""

    def __str__(self) -> str:
        return str(self.args[0])


def literal(node: ast.expr, makers: Mapping[str, Any]) -> Any:
    """The value of a literal expression in which calls to the named `makers` are allowed. Raises ValueError."""
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in makers or node.args:
            raise ValueError(f"a card must be a literal, found {ast.unparse(node)}")
        return makers[node.func.id](**{k.arg: literal(k.value, makers) for k in node.keywords if k.arg})
    if isinstance(node, ast.Tuple):
        return tuple(literal(item, makers) for item in node.elts)
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(k): literal(v, makers) for k, v in zip(node.keys, node.values, strict=True) if k}
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"a card must be a literal, found {ast.unparse(node)} (line {node.lineno})") from None


_root = Path(__file__).parent.parent
catalogue = Catalogue("gratis.methods", _root / "methods", "method", {"Card": Card, "Claim": Claim})
"""Every method of the installation, by name."""
