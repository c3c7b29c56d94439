"""Merging models whose tokenizers differ: rows of embedding and head are put in the order of one vocabulary.

The result has the base's tokens ("base"), every model's ("union"), or those that all have ("intersect"). A row that a
model lacks is the base's, or else the mean of those that have it: as a difference to the base it changes nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import InputError
from gratis.subjects.checkpoints import TensorSource

POLICIES = ("error", "base", "union", "intersect")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
       "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")  # fmt: skip


def vocabulary(source: TensorSource) -> dict[str, int]:
    """Tokens and their numbers. Raises InputError where there is no tokenizer.json to read them from."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise InputError(f"{source.path} has no tokenizer.json, so its rows cannot be told: save its tokenizer there.")
    try:
        known = tokenizer["model"]["vocab"]
        pairs = known.items() if isinstance(known, dict) else ((entry[0], n) for n, entry in enumerate(known))
        found = dict(pairs)
        found |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"The tokenizer.json of {source.path} is damaged: {error}.") from error
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in found.values()):
        raise InputError(f"The tokenizer.json of {source.path} numbers tokens that cannot be rows.")
    return found


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    component: str = ""
    stem: str = "model"

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


class Reordered(TensorSource):
    """A checkpoint whose rows of tokens are those of another vocabulary."""

    def __init__(self, source: TensorSource, names: Sequence[str], rows: Tensor, fill: Any) -> None:
        self._source, self._names, self._rows, self._fill = source, set(names), rows, fill
        self.path = source.path
        self.places: dict[str, Any] = dict(source.places)
        for name in names:
            place = source.places[name]
            shape = (len(rows), *place.shape[1:])
            self.places[name] = _Place(
                place.dtype, shape, getattr(place, "component", ""), getattr(place, "stem", "model")
            )

    @property
    def folder(self) -> Path:
        return self._source.folder

    @property
    def files(self) -> list[Path]:
        return self._source.files

    def config(self) -> dict[str, Any]:
        return {key: value for key, value in self._source.config().items() if key != "vocab_size" and key not in IDS}

    def tokenizer(self) -> None:
        return None

    def prefetch(self, name: str, start: int, count: int) -> None:
        if name not in self._names:
            self._source.prefetch(name, start, count)

    def view(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """(count,) elements from flat index `start` on."""
        if name not in self._names:
            return self._source.view(name, start, count)
        place = self.places[name]
        end = place.elements if count is None else start + count
        width = place.elements // place.shape[0] if place.shape[0] else 1
        first, last = start // width, -(-end // width)
        wanted = self._rows[first:last]
        whole = self._source.tensor(name).reshape(-1, width)
        taken = whole.index_select(0, wanted.clamp(min=0))
        absent = (wanted < 0).nonzero()[:, 0]
        if len(absent):
            taken[absent] = self._fill(name, absent + first, width).to(taken.dtype)
        return taken.reshape(-1)[start - first * width : end - first * width]


@dataclass(frozen=True)
class Vocabulary:
    """The result's tokens and how every model's rows go into them."""

    tokens: dict[str, int]
    size: int
    """Rows of the embedding, padding included."""
    tokenizer: dict[str, Any]
    kept: tuple[dict[int, int], ...]
    """The row numbers of every model, the base first, and what they become."""

    def write(self, folder: Path, of: int = 0) -> None:
        """Put tokenizer.json and the numbers in the configuration files, which are those of model `of`, into agreement."""
        kept = self.kept[of]
        (folder / "tokenizer.json").write_text(json.dumps(self.tokenizer, ensure_ascii=False), encoding="utf-8")
        for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "vocab.txt", "spiece.model"):
            (folder / name).unlink(missing_ok=True)
        for name in ("config.json", "generation_config.json"):
            path = folder / name
            if path.is_file():
                settings = json.loads(path.read_text(encoding="utf-8"))
                if name == "config.json" and "vocab_size" in settings:
                    settings["vocab_size"] = self.size
                for key in IDS:
                    if isinstance(settings.get(key), int):
                        settings[key] = kept.get(settings[key])
                    elif isinstance(settings.get(key), list):
                        settings[key] = [kept[n] for n in settings[key] if n in kept]
                path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        path = folder / "tokenizer_config.json"
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(settings.get("added_tokens_decoder"), dict):
                known = {t["content"]: t for t in self.tokenizer.get("added_tokens", [])}
                settings["added_tokens_decoder"] = {
                    str(known[entry["content"]]["id"]): entry
                    for entry in settings["added_tokens_decoder"].values()
                    if entry.get("content") in known
                }
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def reconcile(sources: Sequence[TensorSource], policy: str) -> tuple[list[Any], Vocabulary | None]:
    """The checkpoints (the one the result is laid out by first) with rows in one order, and that order.

    None, and the checkpoints as they are, where the tokenizers agree already. Raises InputError.
    """
    known = [vocabulary(source) for source in sources]
    if all(other == known[0] for other in known[1:]):
        return list(sources), None
    first = known[0]
    rows = [_row_count(source, tokens) for source, tokens in zip(sources, known, strict=True)]
    if policy == "base":
        tokens, size = dict(first), rows[0]
    elif policy == "intersect":
        common = [t for t, _ in sorted(first.items(), key=lambda item: item[1]) if all(t in other for other in known)]
        tokens = {token: number for number, token in enumerate(common)}
        size = len(tokens)
    else:
        tokens = dict(first)
        following = max(first.values(), default=-1) + 1
        for other in known[1:]:
            for token, _ in sorted(other.items(), key=lambda item: item[1]):
                if token not in tokens:
                    tokens[token] = following
                    following += 1
        size = max(following, rows[0])
    if not tokens:
        raise InputError("The tokenizers have no token in common.")
    maps = []
    for own in known:
        rows_of = torch.full((size,), -1, dtype=torch.long)
        shared = [(number, own[token]) for token, number in tokens.items() if token in own]
        places = torch.tensor(shared, dtype=torch.long).reshape(-1, 2)
        rows_of[places[:, 0]] = places[:, 1]
        maps.append(rows_of)
    if policy != "intersect":
        # Rows beyond the tokenizer are padding: they stay the base's.
        padding = torch.arange(max(first.values(), default=-1) + 1, rows[0])
        unused = padding[~torch.isin(padding, torch.tensor(sorted(tokens.values())))]
        maps[0][unused] = unused
    names = [_row_tensors(source, count) for source, count in zip(sources, rows, strict=True)]
    for source, found in zip(sources[1:], names[1:], strict=True):
        if found != names[0]:
            raise InputError(f"{source.path} and {sources[0].path} have their rows of tokens in different tensors.")

    def fill(name: str, wanted: Tensor, width: int) -> Tensor:
        total, owners = torch.zeros(len(wanted), width), torch.zeros(len(wanted), 1)
        filled = torch.zeros(len(wanted), dtype=torch.bool)
        for number, (source, mapped) in enumerate(zip(sources, maps, strict=True)):
            own = mapped[wanted]
            has = (own >= 0) & ~filled
            total[has] += source.tensor(name).reshape(-1, width).index_select(0, own[has]).float()
            owners[has] += 1
            if not number:
                filled = has
        return total / owners.clamp(min=1)

    made = [Reordered(s, n, m, fill) for s, n, m in zip(sources, names, maps, strict=True)]
    content = _tokenizer(sources, tokens)
    kept = tuple({number: tokens[token] for token, number in own.items() if token in tokens} for own in known)
    return made, Vocabulary(tokens, size, content, kept)


def _row_count(source: TensorSource, tokens: Mapping[str, int]) -> int:
    config = source.config()
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if not isinstance(size, int):
        raise InputError(f"The config.json of {source.path} has no vocab_size, so rows of tokens cannot be found.")
    highest = max(tokens.values(), default=-1)
    if highest >= size:
        raise InputError(f"{source.path} has a token numbered {highest}, but only {size} rows.")
    return size


def _row_tensors(source: TensorSource, rows: int) -> list[str]:
    """Tensors with one row for each token: embeddings, heads and their biases, by shape and name."""
    words = ("embed", "wte", "lm_head", "output", "decoder.bias", "predictions", "shared")
    found = [
        name
        for name, place in source.places.items()
        if place.shape and place.shape[0] == rows and len(place.shape) <= 2 and any(word in name for word in words)
    ]
    if not found:
        raise InputError(f"No tensor of {source.path} has a row for each of its {rows} tokens.")
    return sorted(found)


def _tokenizer(sources: Sequence[TensorSource], tokens: Mapping[str, int]) -> dict[str, Any]:
    """The first model's tokenizer.json with other tokens; merges of the others follow its own."""
    files = [source.tokenizer() or {} for source in sources]
    content = copy.deepcopy(files[0])
    if tokens == vocabulary(sources[0]):
        return content
    kinds = {file["model"].get("type") for file in files}
    if len(kinds) > 1:
        raise InputError(f"The tokenizers are of different kinds: {', '.join(map(str, sorted(kinds, key=str)))}.")
    added: dict[str, dict[str, Any]] = {}
    for file in files:
        for entry in file.get("added_tokens", []):
            if entry["content"] in tokens:
                added.setdefault(entry["content"], {**entry, "id": tokens[entry["content"]]})
    content["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        # Added tokens too: their numbers are read from here where they do not follow the others.
        model["vocab"] = dict(sorted(tokens.items(), key=lambda item: item[1]))
    else:
        scores: dict[str, float] = {}
        for file in files:
            for token, score in file["model"]["vocab"]:
                scores.setdefault(token, score)
        order = sorted((n, t) for t, n in tokens.items() if t in scores)
        if [n for n, _ in order] != list(range(len(order))):
            raise InputError("This kind of tokenizer (Unigram) cannot take tokens after its added ones: choose base.")
        if isinstance(model.get("unk_id"), int):
            unknown = files[0]["model"]["vocab"][model["unk_id"]][0]
            model["unk_id"] = tokens.get(unknown)
        model["vocab"] = [[t, scores[t]] for _, t in order]
    if "merges" in model:
        merges: dict[tuple[str, str], None] = {}
        for file in files:
            for pair in file["model"].get("merges", []):
                one, two = pair.split(" ", 1) if isinstance(pair, str) else pair
                if one in tokens and two in tokens and one + two in tokens:
                    merges.setdefault((one, two))
        model["merges"] = [list(pair) for pair in merges]
    _renumber(content.get("post_processor"), tokens)
    return content


def _renumber(part: Any, tokens: Mapping[str, int]) -> None:
    """Give the special tokens that a post-processor names their new numbers."""
    if isinstance(part, list):
        for entry in part:
            _renumber(entry, tokens)
    elif isinstance(part, dict):
        for key in ("sep", "cls"):
            pair = part.get(key)
            if isinstance(pair, list) and len(pair) == 2 and pair[0] in tokens:
                pair[1] = tokens[pair[0]]
        if isinstance(part.get("special_tokens"), dict):
            for entry in part["special_tokens"].values():
                entry["ids"] = [
                    tokens.get(token, number) for token, number in zip(entry["tokens"], entry["ids"], strict=True)
                ]
        _renumber(part.get("processors"), tokens)
