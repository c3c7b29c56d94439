"""mergekit's YAML, read as a recipe: models or slices, one method, parameters per model, per filter and along layers.

What a key means is as mergekit 0.1.5 documents it. A gradient (a list of numbers) is spread over the layers of a slice;
tensors outside the layers get its beginning. Per tensor, the first setting that says something holds: that of the
model, then of the slice, then of the whole file. What cannot be done is refused by its key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gratis.contract.errors import FileError, suggestion
from gratis.contract.method import Merge
from gratis.subjects.adapters import is_adapter
from gratis.subjects.checkpoints import TensorSource
from gratis.subjects.merge_recipe import MergeRecipe
from gratis.subjects.merge_rules import Rule
from gratis.subjects.mergekit_methods import METHODS, REQUIRED, Question
from gratis.subjects.opening_checkpoints import open_checkpoint

KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "name", "tokenizer",
    "tokenizer_source",
)  # fmt: skip
UNSUPPORTED = {
    "modules": "merge each module's checkpoint with a recipe of its own",
    "chat_template": "the base's chat template is carried over",
    "residual_weight": "scale the tensors of a slice by filters instead",
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

Settings = Mapping[str, Any]
Scopes = Sequence[Settings]


def from_mergekit(file: Path, content: Mapping[str, Any], locate: Callable[[str], Path]) -> MergeRecipe:
    """The recipe that a mergekit file stands for; `locate` gives the checkpoint of a model's name.

    Raises FileError, in one sentence, for a key or value that cannot be followed.
    """
    _check_keys(file, content)
    name = content["merge_method"]
    if name not in METHODS:
        raise FileError(f"The recipe {file}: merge_method {name!r} has no counterpart{suggestion(str(name), METHODS)}.")
    slices = _slices(file, content)
    opened: dict[str, TensorSource] = {}
    located: dict[str, Path] = {}

    def checkpoint(model: Any, base: str | None = None) -> None:
        if not isinstance(model, str) or "@" in model:
            raise FileError(f"The recipe {file}: model {model!r} must be a folder or file; revisions are not read.")
        if model not in opened:
            located[model] = locate(model)
            opened[model] = open_checkpoint(located[model], opened[base] if base is not None else None)

    for part in slices:
        if part.base is not None:
            checkpoint(part.base)
        for source in part.sources:
            checkpoint(source.model, part.base)
    counts = {model: _layer_count(found) for model, found in opened.items()}
    slices = [part.with_ranges(file, counts) for part in slices]
    prefix = _layer_prefix(next(iter(opened.values())))
    reader = _Reader(file, name, content.get("parameters") or {}, slices, prefix, opened, located)
    return reader.recipe(_dtype(file, content), _tokenizer(file, content))


def _check_keys(file: Path, content: Mapping[str, Any]) -> None:
    for key in content:
        if key in UNSUPPORTED:
            raise FileError(f"The recipe {file}: the key {key!r} is not supported: {UNSUPPORTED[key]}.")
        if key not in KEYS:
            raise FileError(f"The recipe {file} has an unknown key {key!r}{suggestion(str(key), KEYS)}.")
    if bool(content.get("models")) == bool(content.get("slices")):
        raise FileError(f"The recipe {file} must have either models or slices.")


@dataclass(frozen=True)
class _Source:
    model: str
    settings: Settings
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Slice:
    """Layers of the result, and where each source has its counterparts."""

    sources: tuple[_Source, ...]
    base: str | None
    settings: Settings

    def with_ranges(self, file: Path, counts: Mapping[str, int]) -> _Slice:
        ranged = [replace(s, layers=s.layers or (0, counts[s.model])) for s in self.sources]
        lengths = {last - first for s in ranged for first, last in [s.layers or (0, 0)]}
        if len(lengths) != 1:
            raise FileError(f"The recipe {file}: the sources of a slice must have the same number of layers.")
        for source in ranged:
            first, last = source.layers or (0, 0)
            if not 0 <= first < last <= counts[source.model]:
                raise FileError(
                    f"The recipe {file}: layer_range [{first}, {last}] is not within the {counts[source.model]} layers "
                    f"of {source.model}."
                )
        return replace(self, sources=tuple(ranged))

    @property
    def length(self) -> int:
        first, last = self.sources[0].layers or (0, 0)
        return last - first


def _slices(file: Path, content: Mapping[str, Any]) -> list[_Slice]:
    base = content.get("base_model")
    if base is not None and not isinstance(base, str):
        raise FileError(f"The recipe {file}: base_model must be a name.")
    if content.get("models"):
        sources = [_source(file, entry, ("model", "parameters")) for entry in _list(file, content["models"], "models")]
        return [_Slice(tuple(sources), base, {})]
    made = []
    for entry in _list(file, content["slices"], "slices"):
        if not isinstance(entry, dict):
            raise FileError(f"The recipe {file}: a slice is a table with sources.")
        for key in entry:
            if key in UNSUPPORTED:
                raise FileError(f"The recipe {file}: the key {key!r} is not supported: {UNSUPPORTED[key]}.")
            if key not in ("sources", "base_model", "parameters"):
                raise FileError(f"The recipe {file}: a slice has an unknown key {key!r}.")
        known = ("model", "layer_range", "parameters")
        sources = [_source(file, source, known) for source in _list(file, entry.get("sources"), "sources")]
        made.append(_Slice(tuple(sources), entry.get("base_model", base), entry.get("parameters") or {}))
    return made


def _list(file: Path, value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise FileError(f"The recipe {file}: {what} must be a list.")
    return value


def _source(file: Path, entry: Any, known: tuple[str, ...]) -> _Source:
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise FileError(f"The recipe {file}: each source is a table with model and {known[-1]}.")
    for key in entry:
        if key not in known:
            raise FileError(f"The recipe {file}: a model has an unknown key {key!r}{suggestion(str(key), known)}.")
    layers, settings = entry.get("layer_range"), entry.get("parameters") or {}
    if layers is not None and not (
        isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
    ):
        raise FileError(f"The recipe {file}: layer_range must be two numbers, not {layers!r}.")
    if not isinstance(settings, dict):
        raise FileError(f"The recipe {file}: the parameters of {entry['model']} must be a table.")
    return _Source(entry["model"], settings, None if layers is None else (layers[0], layers[1]))


def _dtype(file: Path, content: Mapping[str, Any]) -> str | None:
    for key in ("dtype", "out_dtype"):
        if content.get(key) not in (None, "float16", "bfloat16", "float32", "float64"):
            raise FileError(f"The recipe {file}: {key} must be float16, bfloat16 or float32, not {content[key]!r}.")
    return content.get("out_dtype") or content.get("dtype")


def _tokenizer(file: Path, content: Mapping[str, Any]) -> str:
    """The policy for vocabularies that tokenizer_source, or source of the tokenizer, asks for."""
    table = content.get("tokenizer") or {}
    if not isinstance(table, dict):
        raise FileError(f"The recipe {file}: tokenizer must be a table with source.")
    for key in table:
        if key != "source":
            raise FileError(f"The recipe {file}: {key!r} of tokenizer is not supported, only source is.")
    named = [value for value in (content.get("tokenizer_source"), table.get("source")) if value is not None]
    if len(named) > 1:
        raise FileError(f"The recipe {file} names its tokenizer twice: leave out tokenizer_source.")
    if not named:
        return "error"
    if named[0] in ("base", content.get("base_model")):
        return "base"
    if named[0] == "union":
        return "union"
    raise FileError(
        f"The recipe {file}: the tokenizer must be base or union, not {named[0]!r}; that of another model is not taken."
    )


def _layer_count(checkpoint: TensorSource) -> int:
    config = checkpoint.config()
    for holder in (config, config.get("text_config") or {}):
        for key in LAYERS:
            if isinstance(holder.get(key), int):
                return int(holder[key])
    prefix = _layer_prefix(checkpoint)
    return len({_split(name, prefix)[0] for name in checkpoint.places} - {None})


def _layer_prefix(checkpoint: TensorSource) -> str:
    """What precedes the layer's number in tensor names: of several stacks the one that holds most tensors."""
    counts: dict[str, int] = {}
    for name in checkpoint.places:
        if found := re.match(r"(.*?\.|)(\d+)\.", name):
            counts[found.group(1)] = counts.get(found.group(1), 0) + 1
    return max(counts, key=lambda prefix: counts[prefix]) if counts else "\0"


def _split(name: str, prefix: str) -> tuple[int | None, str]:
    """Layer and rest of a tensor's name; None for one outside the layers."""
    if name.startswith(prefix):
        number, _, rest = name[len(prefix) :].partition(".")
        if number.isdigit():
            return int(number), rest
    return None, name


class Stacked:
    """A checkpoint whose layers are taken from others: what slices make. Tensors are read where they are."""

    def __init__(self, first: TensorSource, where: Mapping[str, tuple[TensorSource, str]], layers: int) -> None:
        self._first, self._where, self._layers = first, where, layers
        self.path = first.path
        self.folder = first.folder
        self.places = {name: checkpoint.places[own] for name, (checkpoint, own) in where.items()}
        self.bytes = sum(place.elements * place.dtype.itemsize for place in self.places.values())
        self.files = sorted({file for checkpoint, _ in where.values() for file in checkpoint.files})

    def view(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """(count,) elements of tensor `name` from flat index `start` on."""
        checkpoint, own = self._where[name]
        return checkpoint.view(own, start, count)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.view(name).view(self.places[name].shape)

    def prefetch(self, name: str, start: int, count: int) -> None:
        """Ask the system to have these elements in memory soon."""
        checkpoint, own = self._where[name]
        if hasattr(checkpoint, "prefetch"):
            checkpoint.prefetch(own, start, count)

    def tokenizer(self) -> Any:
        """The content of the first checkpoint's `tokenizer.json`."""
        return self._first.tokenizer()

    def config(self) -> dict[str, Any]:
        """The first checkpoint's configuration with the number of layers that there are now."""
        config = self._first.config()
        return {key: self._layers if key in LAYERS else value for key, value in config.items()}


@dataclass(frozen=True)
class _Reader:
    file: Path
    name: str
    settings: Settings
    slices: Sequence[_Slice]
    prefix: str
    opened: Mapping[str, TensorSource]
    located: Mapping[str, Path]

    def recipe(self, dtype: str | None, tokenizer: str) -> MergeRecipe:
        positions = max(len(part.sources) for part in self.slices)
        tensors = self._tensors()
        grouped: dict[tuple[Merge, tuple[float, ...], tuple[int, ...], tuple[Merge, ...]], list[str]] = {}
        for tensor, (part, layer, _) in tensors.items():
            grouped.setdefault(self._combination(tensor, part, layer), []).append(tensor)
        plain = len(self.slices) == 1 and all(s.layers[0] == 0 for s in self.slices[0].sources if s.layers)
        plain = plain and all(
            self.slices[0].length == _layer_count(self.opened[s.model]) for s in self.slices[0].sources
        )  # fmt: skip
        first = self.slices[0]
        used = sorted({place for _, _, chosen, _ in grouped for place in chosen})
        moved = {place: number for number, place in enumerate(used)}
        if plain:
            experts: list[Any] = [self.located[first.sources[place].model] for place in used]
            base: Any = self.located[first.base] if first.base is not None else None
        else:
            experts = [self._stacked(tensors, place) for place in used if place < positions]
            base = self._stacked(tensors, None) if first.base is not None else None
        (method, weights, chosen, own_parameters), *rest = grouped
        rules: tuple[Rule, ...] = ()
        if rest or own_parameters:
            rules = tuple(
                Rule(tuple(names), own, w, tuple(moved[place] for place in c), each)
                for (own, w, c, each), names in grouped.items()
            )
        elif len(chosen) != len(used):
            rules = (Rule(("*",), method, weights, tuple(moved[place] for place in chosen)),)
        # An adapter is read on its base, and vocabularies are compared with that of the base.
        needs_base = any(own.needs_base for own, *_ in grouped) or tokenizer != "error"
        needs_base = needs_base or any(isinstance(expert, Path) and is_adapter(expert) for expert in experts)
        whole = weights if len(weights) == len(used) else (1.0,) * len(used)
        written = {"base": first.base if needs_base else None, "experts": [first.sources[p].model for p in used]}
        return MergeRecipe(
            method, tuple(experts), whole, base if needs_base else None, rules, dtype,
            written=written if plain else {}, tokenizer=tokenizer,
        )  # fmt: skip

    def _tensors(self) -> dict[str, tuple[_Slice, int | None, str]]:
        """By name in the result: the slice, the layer within it (None outside layers), and the rest of the name."""
        made: dict[str, tuple[_Slice, int | None, str]] = {}
        first, last = self.slices[0], self.slices[-1]
        reference = self.opened[first.sources[0].model]
        outside = [name for name in reference.places if _split(name, self.prefix)[0] is None]
        for name in outside:
            early = re.search(r"embed|wte|wpe", name) is not None
            made[name] = (first if early else last, None, name)
        at = 0
        for part in self.slices:
            source = part.sources[0]
            begin = (source.layers or (0, 0))[0]
            rests: dict[int, list[str]] = {}
            for name in self.opened[source.model].places:
                number, rest = _split(name, self.prefix)
                if number is not None:
                    rests.setdefault(number, []).append(rest)
            for offset in range(part.length):
                for rest in rests.get(begin + offset, []):
                    made[f"{self.prefix}{at}.{rest}"] = (part, offset, rest)
                at += 1
        return made

    def _own_name(self, source: _Source, layer: int | None, rest: str) -> str:
        """What a source calls a tensor of the result."""
        return rest if layer is None else f"{self.prefix}{(source.layers or (0, 0))[0] + layer}.{rest}"

    def _stacked(self, tensors: Mapping[str, tuple[_Slice, int | None, str]], place: int | None) -> Stacked:
        """The checkpoint that the sources at `place` of each slice make together; None: the bases."""
        where = {}
        for name, (part, layer, rest) in tensors.items():
            if place is None:
                model = part.base or part.sources[0].model
                source = next((s for s in part.sources if s.model == model), replace(part.sources[0], model=model))
            else:
                source = part.sources[min(place, len(part.sources) - 1)]
            checkpoint, own = self.opened[source.model], self._own_name(source, layer, rest)
            if own not in checkpoint.places:
                raise FileError(f"The recipe {self.file}: {source.model} has no tensor {own!r}.")
            where[name] = (checkpoint, own)
        layers = sum(part.length for part in self.slices)
        first = next(iter(where.values()))[0]
        if hasattr(first, "write_description"):
            raise FileError(
                f"The recipe {self.file}: layers of {first.path} cannot be stacked; merge it by itself first."
            )
        return Stacked(first, where, layers)

    def _combination(
        self, tensor: str, part: _Slice, layer: int | None
    ) -> tuple[Merge, tuple[float, ...], tuple[int, ...], tuple[Merge, ...]]:
        within = 0.0 if layer is None else layer / max(part.length - 1, 1)
        along = 1.0 if layer is not None and part.length == 1 else within
        rest = _split(tensor, self.prefix)[1]

        def setting(key: str, default: Any, place: int | None = None) -> Any:
            scopes: list[Settings] = [part.settings, self.settings]
            name = tensor
            if place is not None:
                scopes.insert(0, part.sources[place].settings)
                name = self._own_name(part.sources[place], layer, rest if layer is not None else tensor)
            for scope in scopes:
                if key in scope:
                    value = evaluated(self.file, key, scope[key], name, along, type(default))
                    if value is not None:
                        return value
            if default is REQUIRED:
                raise FileError(f"The recipe {self.file}: {self.name} needs {key} for {tensor}.")
            return default

        return METHODS[self.name](Question(self.file, tuple(s.model for s in part.sources), part.base, setting))


def evaluated(file: Path, key: str, setting: Any, tensor: str, along: float, kind: type) -> Any:
    """What a setting says for a tensor: a value, a gradient at `along` in 0..1, or the first filter that fits."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return _number(file, key, setting, kind)
    if not setting:
        return None
    if all(isinstance(item, dict) for item in setting):
        for item in setting:
            if set(item) - {"filter", "value"} or "value" not in item:
                raise FileError(f"The recipe {file}: an entry of {key} is a table with filter and value.")
            wanted = item.get("filter")
            if wanted is None or wanted == "*" or (isinstance(wanted, str) and wanted in tensor):
                return evaluated(file, key, item["value"], tensor, along, kind)
        return None
    values = [_number(file, key, item, kind) for item in setting]
    scaled = along * (len(values) - 1)
    if kind is bool:
        return values[int(scaled)]
    low = int(scaled)
    high, share = min(len(values) - 1, low + 1), scaled - low
    return (1 - share) * values[low] + share * values[high]


def _number(file: Path, key: str, value: Any, kind: type) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise FileError(f"The recipe {file}: {key} must be true or false, not {value!r}.")
    try:
        # YAML 1.1 reads 1e-4 as text.
        return float(value)
    except (TypeError, ValueError):
        raise FileError(f"The recipe {file}: {key} must be a number, not {value!r}.") from None
