"""Reading safetensors checkpoints by key, without loading them.

A header is checked against the file before anything is read: lengths, offsets, dtypes, shapes. Tensors are views on
the file.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import FileError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
MOST_TENSORS = 250_000
"""Of a checkpoint; the largest mixtures of experts have about 100,000. Each costs about a kilobyte of memory."""
MOST_DIMENSIONS = 64
INDEX = "model.safetensors.index.json"
PIPELINE = "model_index.json"
"""What a folder of a diffusers pipeline has."""
RECORD = "merge.json"
"""Written into a merged folder: how it was made, and checksums of its files."""
STEMS = ("model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    """From the beginning of the file, in bytes."""
    component: str = ""
    """The subfolder it belongs in, for a pipeline of several models."""
    stem: str = "model"
    """What its file's name begins with."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.elements * self.dtype.itemsize


class TensorSource:
    """Named tensors that can be read in stretches: a checkpoint on disk in any of its forms."""

    path: Path
    places: dict[str, Any]
    """By name: dtype, shape, elements."""

    @property
    def folder(self) -> Path:
        """The folder that holds configuration and tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def bytes(self) -> int:
        """Size of what is read."""
        return sum(place.elements * place.dtype.itemsize for place in self.places.values())

    @property
    def files(self) -> list[Path]:
        """Every file that tensors are read from."""
        raise NotImplementedError

    def view(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """(count,) elements of tensor `name` from flat index `start` on. Not to be written."""
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.view(name).view(self.places[name].shape)

    def prefetch(self, name: str, start: int, count: int) -> None:
        """Ask the system to have these elements in memory soon."""

    def config(self) -> dict[str, Any]:
        """The model's configuration, empty where there is none."""
        return read_json(self.folder / "config.json")

    def tokenizer(self) -> dict[str, Any] | None:
        """The content of `tokenizer.json`, where there is one."""
        return read_json(self.folder / "tokenizer.json") or None


def read_json(path: Path) -> dict[str, Any]:
    """The table that a JSON file holds, empty where there is no file. Raises FileError for a damaged one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    return content if isinstance(content, dict) else {}


class Checkpoint(TensorSource):
    """The tensors of a safetensors file, of a folder with one or several, or of a diffusers pipeline, as views on the
    files. The tensors of a pipeline are named `component/tensor`.

    Raises FileError, in one sentence naming the file, for anything that is missing, truncated or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.places: dict[str, TensorPlace] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self.components = _components(self.path)
        """Subfolders with weights, for a pipeline."""
        for component in self.components or [""]:
            for file in _files(self.path / component if component else self.path):
                for place in read_header(file, component):
                    if place.name in self.places:
                        raise FileError(f"{self.path}: tensor {place.name!r} is in two files.")
                    self.places[place.name] = place
                _check_number(self.path, len(self.places))
        if not self.places:
            raise FileError(f"{self.path} holds no tensors.")

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself.
        return {**self.__dict__, "_maps": {}}

    @property
    def files(self) -> list[Path]:
        return sorted({place.file for place in self.places.values()})

    def view(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """(count,) elements of tensor `name` from flat index `start` on, as a view on the file. Not to be written."""
        place = self.places[name]
        count = place.elements - start if count is None else count
        if start < 0 or count < 0 or start + count > place.elements:
            raise IndexError(f"tensor {name!r} has {place.elements} elements, not {start} to {start + count}")
        if count == 0:
            return torch.empty(0, dtype=place.dtype)
        mapped = self._map(place.file)
        offset = place.offset + start * place.dtype.itemsize
        if offset % place.dtype.itemsize:
            data = bytearray(mapped[offset : offset + count * place.dtype.itemsize])
            return torch.frombuffer(data, dtype=place.dtype, count=count)
        return torch.frombuffer(mapped, dtype=place.dtype, count=count, offset=offset)

    def prefetch(self, name: str, start: int, count: int) -> None:
        place = self.places[name]
        begin = place.offset + start * place.dtype.itemsize
        page = begin - begin % mmap.PAGESIZE
        if count and hasattr(mmap, "MADV_WILLNEED"):
            length = begin - page + count * place.dtype.itemsize
            self._map(place.file).madvise(mmap.MADV_WILLNEED, page, length)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open(path, "rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def _components(path: Path) -> list[str]:
    """The subfolders of a diffusers pipeline that hold weights, in the order of its index."""
    index = path / PIPELINE
    if not index.is_file():
        return []
    found = []
    for name, entry in read_json(index).items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        if Path(name).name != name or name in (".", ".."):
            raise FileError(f"{index} names a component outside its folder: {name!r}.")
        if (path / name).is_dir() and any((path / name).glob("*.safetensors")):
            found.append(name)
        elif (path / name).is_dir() and (other := _unsafe(path / name)):
            raise FileError(f"{path / name} has its weights in {other}, which is not safetensors: convert it first.")
    if not found:
        raise FileError(f"{path} is a pipeline without a component in safetensors.")
    return found


def _unsafe(folder: Path) -> str | None:
    kinds = ("*.bin", "*.pt", "*.pth", "*.ckpt")
    return next((file.name for kind in kinds for file in sorted(folder.glob(kind))), None)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        what = "is no file or folder" if path.exists() or path.is_symlink() else "does not exist"
        raise FileError(f"There is no checkpoint {path}: it {what}.")
    indices = [path / f"{stem}.safetensors.index.json" for stem in STEMS] + sorted(
        path.glob("*.safetensors.index.json")
    )
    index = next((file for file in indices if file.is_file()), None)
    if index is not None:
        return _indexed(path, index)
    found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))
    for stem in STEMS:
        # A variant ("model.fp16.safetensors") beside the plain file holds the same tensors once more.
        if path / f"{stem}.safetensors" in found:
            found = [f for f in found if f.name.split(".")[0] != stem or f.name == f"{stem}.safetensors"]
    if not found:
        other = _unsafe(path)
        hint = f", only {other}: convert it first, for example with save_pretrained" if other else ""
        raise FileError(f"{path} holds no .safetensors file{hint}.")
    for file in found:
        if not file.is_file():
            raise FileError(f"{file} is no regular file, or a link that leads nowhere.")
    return found


def _indexed(path: Path, index: Path) -> list[Path]:
    try:
        names = set(read_json(index)["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as error:
        raise FileError(f"{index} is damaged: it has no weight_map.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise FileError(f"{index} names a file outside its folder: {name!r}.")
        if not (path / name).is_file():
            raise FileError(f"{path} lacks {name}, which its index names.")
    return [path / name for name in sorted(names)]


def read_header(file: Path, component: str = "") -> list[TensorPlace]:
    """The tensors of one safetensors file, in the order of their bytes. Raises FileError if they do not fit together."""
    try:
        with open(file, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            head = handle.read(8)
            if len(head) < 8:
                raise FileError(f"{file} is empty or truncated: it has no safetensors header.")
            (length,) = struct.unpack("<Q", head)
            if length > min(size - 8, LONGEST_HEADER):
                raise FileError(
                    f"{file} is truncated or no safetensors file: its header would be {length:,} bytes long."
                )
            header = _table(file, handle.read(length))
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror}.") from error
    header.pop("__metadata__", None)
    begin, places, ends = 8 + length, [], []
    stem = next((stem for stem in STEMS[1:] if file.name.startswith(stem)), STEMS[0])
    for name, entry in header.items():
        place, end = _place(file, name, entry, begin, component, stem)
        if end > size:
            raise FileError(f"{file} is truncated: tensor {name!r} ends at byte {end:,} of {size:,}.")
        places.append(place)
        ends.append(end)
    order = sorted(range(len(places)), key=lambda i: (places[i].offset, ends[i]))
    for before, after in itertools.pairwise(order):
        if places[after].offset < ends[before]:
            raise FileError(f"{file}: tensors {places[before].name!r} and {places[after].name!r} overlap.")
    return [places[i] for i in order]


def _check_number(path: Path, tensors: int) -> None:
    if tensors > MOST_TENSORS:
        raise FileError(
            f"{path} holds {tensors:,} tensors, more than any model does; at most {MOST_TENSORS:,} are read."
        )


def _table(file: Path, text: bytes) -> dict[str, Any]:
    _check_number(file, text.count(b'"data_offsets"'))
    try:
        header = json.loads(text)
        if isinstance(header, dict) and text.count(b'"data_offsets"') > len(header):
            counts: Counter[str] = Counter()
            json.loads(text, object_pairs_hook=lambda pairs: counts.update(k for k, v in pairs if v == {}) or {})
            twice = next((name for name, number in counts.items() if number > 1), None)
            if twice is not None:
                raise FileError(f"{file} has a damaged header: tensor {twice!r} is in it twice.")
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{file} has a damaged header: {error}.") from error
    if not isinstance(header, dict):
        raise FileError(f"{file} has a damaged header: it is not a table of tensors.")
    return header


def _place(file: Path, name: str, entry: Any, begin: int, component: str, stem: str) -> tuple[TensorPlace, int]:
    try:
        dtype, shape, (first, last) = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise FileError(f"{file}: the entry of tensor {name!r} is damaged.") from None
    if dtype is None:
        raise FileError(f"{file}: tensor {name!r} has dtype {entry['dtype']!r}, which cannot be merged.")
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, first, last))
    if not whole or last - first != math.prod(shape) * dtype.itemsize:
        raise FileError(f"{file}: tensor {name!r} of shape {list(shape)} does not fill bytes {first} to {last}.")
    if len(shape) > MOST_DIMENSIONS or math.prod(max(n, 1) for n in shape) >= 2**63:
        raise FileError(f"{file}: tensor {name!r} has a shape that no tensor can have.")
    known = f"{component}/{name}" if component else name
    return TensorPlace(known, dtype, shape, file, begin + first, component, stem), begin + last
