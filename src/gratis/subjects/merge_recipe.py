"""Merge recipes: a file that names checkpoints, how they are combined, and tensor by tensor where they are otherwise.

gratis's own form, and mergekit's (`gratis.subjects.mergekit_recipe`). A recipe is data: it runs no code, and names
checkpoints within its own folder and the folders that the user adds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gratis.contract.catalogue import catalogue
from gratis.contract.errors import FileError, UnknownNameError, suggestion
from gratis.contract.files import write_text
from gratis.contract.method import Merge
from gratis.subjects.merge_engine import MergeProgress
from gratis.subjects.merge_rules import Rule
from gratis.subjects.merging import MergeReport, merge
from gratis.subjects.vocabularies import POLICIES

KEYS = ("method", "parameters", "base", "experts", "rules", "dtype", "tokenizer", "trials", "note")
RULE_KEYS = ("tensors", "method", "parameters", "experts", "weights")
MAXIMUM_BYTES = 4_000_000
MOST_VALUES = 400_000
"""Values of a recipe, aliases written out: a few lines of YAML could otherwise stand for gigabytes."""


@dataclass(frozen=True)
class MergeRecipe:
    """Checkpoints, how they are combined, and the trials behind that."""

    method: Merge
    experts: tuple[Any, ...]
    """Paths, or checkpoints whose layers are taken from several places."""
    weights: tuple[float, ...]
    base: Any = None
    rules: tuple[Rule, ...] = ()
    dtype: str | None = None
    trials: tuple[Mapping[str, Any], ...] = ()
    """What was measured on the way to this recipe, as plain values."""
    note: str = ""
    written: Mapping[str, Any] = field(default_factory=dict)
    """How the file names base and experts, for writing it again."""
    tokenizer: str = "error"
    """What becomes of different vocabularies: "error", "base", "union" or "intersect"."""

    def run(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        threads: int | None = None,
        device: str | Sequence[str] = "cpu",
        workers: int | None = None,
        progress: MergeProgress | None = None,
    ) -> MergeReport:
        """Merge into the new folder `out`. Raises what `gratis.merge` raises."""
        return merge(
            self.method, base=self.base, experts=self.experts, weights=self.weights, rules=self.rules, out=out,
            dtype=self.dtype, tokenizer=self.tokenizer, overwrite=overwrite, threads=threads, device=device,
            workers=workers, progress=progress,
        )  # fmt: skip

    def dump(self) -> str:
        """The recipe in gratis's own form. Raises FileError for one whose layers come from several places."""
        names = self.written
        if not names:
            raise FileError(
                "This recipe puts layers of several checkpoints together, which only mergekit's form can say."
            )
        content: dict[str, Any] = {"method": self.method.name, "parameters": _plain(self.method.parameters())}
        if names.get("base"):
            content["base"] = names["base"]
        content["experts"] = [
            {"path": path, "weight": weight} for path, weight in zip(names["experts"], self.weights, strict=True)
        ]
        if self.rules:
            content["rules"] = [_rule_lines(rule) for rule in self.rules]
        if self.dtype:
            content["dtype"] = self.dtype
        if self.tokenizer != "error":
            content["tokenizer"] = self.tokenizer
        if self.note:
            content["note"] = self.note
        if self.trials:
            content["trials"] = [_plain(trial) for trial in self.trials]
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe: a kill leaves the old file or none."""
        file = Path(path)
        write_text(file, self.dump())
        return file


def load_recipe(path: str | os.PathLike[str], models: Sequence[str | os.PathLike[str]] = ()) -> MergeRecipe:
    """Read a merge recipe in gratis's or mergekit's form.

    Checkpoints are looked for in the recipe's folder and in `models`, and refused elsewhere. Raises FileError for a
    file that cannot be read, is no safe YAML, or has unknown keys; UnknownNameError and ParameterError for methods.
    """
    file = Path(path).expanduser()
    content = _read(file)
    if "merge_method" in content:
        from gratis.subjects.mergekit_recipe import from_mergekit

        return from_mergekit(file, content, lambda name: locate(file, name, models))
    for key in content:
        if key not in KEYS:
            raise FileError(f"The recipe {file} has an unknown key {key!r}{suggestion(str(key), KEYS)}.")
    method = _method(file, content)
    named, weights = _experts(file, content.get("experts"))
    base = content.get("base")
    if base is not None and not isinstance(base, str):
        raise FileError(f"The recipe {file}: base must be a path.")
    rules = content.get("rules") or []
    if not isinstance(rules, list):
        raise FileError(f"The recipe {file}: rules must be a list.")
    dtype, note, trials = content.get("dtype"), content.get("note") or "", content.get("trials") or []
    if not isinstance(note, str) or not isinstance(trials, list) or not isinstance(dtype, str | None):
        raise FileError(f"The recipe {file}: dtype and note are texts, trials a list.")
    tokenizer = content.get("tokenizer", "error")
    if tokenizer not in POLICIES:
        raise FileError(
            f"The recipe {file}: tokenizer must be one of {', '.join(POLICIES)}, not {tokenizer!r}"
            f"{suggestion(str(tokenizer), POLICIES)}."
        )
    return MergeRecipe(
        method,
        tuple(locate(file, name, models) for name in named),
        tuple(weights),
        locate(file, base, models) if base else None,
        tuple(_rule(file, rule, method) for rule in rules),
        dtype,
        tuple(trials),
        note,
        {"base": base, "experts": named},
        tokenizer,
    )


def locate(recipe: Path, name: str, models: Sequence[str | os.PathLike[str]] = ()) -> Path:
    """The checkpoint that a recipe calls `name`, of `MODEL+ADAPTER` both.

    Raises FileError where one of them lies outside what the user named.
    """
    folders = [recipe.parent, *(Path(folder).expanduser() for folder in models)]
    roots = [folder.resolve() for folder in folders]
    wanted = Path(name)
    candidates = [wanted] if wanted.is_absolute() else [folder / wanted for folder in folders]
    found = next((c for c in candidates if c.exists()), candidates[0])
    if "+" in name and not found.exists():
        model, _, adapter = name.rpartition("+")
        return Path(f"{locate(recipe, model, models)}+{locate(recipe, adapter, models)}")
    resolved = found.resolve()
    if not any(resolved == root or root in resolved.parents for root in roots):
        raise FileError(
            f"The recipe {recipe} names {name!r}, which is outside its folder: if you trust it, name that folder too "
            "(--models FOLDER)."
        )
    if not found.exists():
        raise FileError(f"There is no checkpoint {found}, which the recipe {recipe} names.")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAXIMUM_BYTES:
            raise FileError(f"{file} is too large to be a recipe.")
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"The recipe {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise FileError(f"The recipe {file} is not UTF-8 text.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise FileError(f"The recipe {file} is not safe YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise FileError(f"The recipe {file} must be a table with {', '.join(KEYS[:5])}.")
    _count(file, content, [0], 0)
    return content


def _count(file: Path, value: Any, counted: list[int], depth: int) -> None:
    """Raise FileError where a recipe has more values than any honest one."""
    counted[0] += 1
    if counted[0] > MOST_VALUES or depth > 20:
        raise FileError(f"The recipe {file} has too many values to be a recipe.")
    if isinstance(value, dict):
        for item in value.values():
            _count(file, item, counted, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _count(file, item, counted, depth + 1)


def _method(file: Path, content: Mapping[str, Any]) -> Merge:
    name, parameters = content.get("method"), content.get("parameters") or {}
    if not isinstance(name, str) or not isinstance(parameters, dict):
        raise FileError(f"The recipe {file} must name a method, and parameters must be a table.")
    return merge_method(name, parameters)


def merge_method(name: str, parameters: Mapping[str, Any]) -> Merge:
    """The merge called `name`. Raises UnknownNameError or ParameterError."""
    entry = catalogue.resolve(name)
    if entry.kind != "merge":
        merges = [e.name for e in catalogue.entries.values() if e.kind == "merge"]
        raise UnknownNameError(f"{name!r} is no merge; there is {', '.join(merges)}.")
    method = entry.load()(**parameters)
    assert isinstance(method, Merge)
    return method


def _experts(file: Path, experts: Any) -> tuple[list[str], list[float]]:
    if not isinstance(experts, list) or not experts:
        raise FileError(f"The recipe {file} must list experts.")
    names, weights = [], []
    for expert in experts:
        entry = {"path": expert} if isinstance(expert, str) else expert
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - {"path", "weight"}:
            raise FileError(f"The recipe {file}: each expert is a path, or a table with path and weight.")
        names.append(entry["path"])
        weights.append(_weight(file, entry.get("weight", 1.0)))
    return names, weights


def _weight(file: Path, weight: Any) -> float:
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
        raise FileError(f"The recipe {file}: weight must be a number, not {weight!r}.")
    return float(weight)


def _rule(file: Path, rule: Any, method: Merge) -> Rule:
    if not isinstance(rule, dict) or not rule.get("tensors"):
        raise FileError(f"The recipe {file}: a rule is a table with {', '.join(RULE_KEYS)}; tensors must be named.")
    for key in rule:
        if key not in RULE_KEYS:
            raise FileError(f"The recipe {file}: a rule has an unknown key {key!r}{suggestion(str(key), RULE_KEYS)}.")
    tensors = [rule["tensors"]] if isinstance(rule["tensors"], str) else rule["tensors"]
    experts, weights, parameters = rule.get("experts"), rule.get("weights"), rule.get("parameters") or {}
    if not isinstance(tensors, list) or not all(isinstance(name, str) for name in tensors):
        raise FileError(f"The recipe {file}: the tensors of a rule are names, with * and ? as wildcards.")
    if experts is not None and not (isinstance(experts, list) and all(type(place) is int for place in experts)):
        raise FileError(f"The recipe {file}: the experts of a rule are their places in the list, from 0 on.")
    if not isinstance(parameters, dict) or not isinstance(weights, list | None):
        raise FileError(f"The recipe {file}: the parameters of a rule are a table, its weights a list.")
    name = rule.get("method", method.name)
    if not isinstance(name, str):
        raise FileError(f"The recipe {file}: the method of a rule is a name.")
    own = method.replace(**parameters) if "method" not in rule else merge_method(name, parameters)
    return Rule(
        tuple(tensors), own,
        None if weights is None else tuple(_weight(file, weight) for weight in weights),
        None if experts is None else tuple(experts),
    )  # fmt: skip


def _rule_lines(rule: Rule) -> dict[str, Any]:
    if rule.each:
        raise FileError("Parameters of single experts can only be said in mergekit's form.")
    lines: dict[str, Any] = {
        "tensors": list(rule.tensors), "method": rule.method.name, "parameters": _plain(rule.method.parameters())
    }  # fmt: skip
    if rule.experts is not None:
        lines["experts"] = list(rule.experts)
    if rule.weights is not None:
        lines["weights"] = list(rule.weights)
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
