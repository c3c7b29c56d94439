"""Reading and writing safetensors checkpoints by key, without loading them.

A header is checked against the file before anything is read: lengths, offsets, dtypes, shapes. Tensors are views on
the file; outputs are laid out in advance and written in place under a temporary name.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import mmap
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import FileError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    """From the beginning of the file, in bytes."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.elements * self.dtype.itemsize


class Checkpoint:
    """The tensors of a safetensors file, or of a folder with one or several, as views on the files.

    Raises FileError, in one sentence naming the file, for anything that is missing, truncated or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.places: dict[str, TensorPlace] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in _files(self.path):
            for place in read_header(file):
                if place.name in self.places:
                    raise FileError(f"{self.path}: tensor {place.name!r} is in two files.")
                self.places[place.name] = place
        if not self.places:
            raise FileError(f"{self.path} holds no tensors.")

    @property
    def folder(self) -> Path:
        """The folder that holds configuration and tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(place.bytes for place in self.places.values())

    def view(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """(count,) elements of tensor `name` from flat index `start` on, as a view on the file. Not to be written."""
        place = self.places[name]
        count = place.elements - start if count is None else count
        if count == 0:
            return torch.empty(0, dtype=place.dtype)
        if place.file not in self._maps:
            with open(place.file, "rb") as file:
                self._maps[place.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        offset = place.offset + start * place.dtype.itemsize
        if offset % place.dtype.itemsize:
            data = bytearray(self._maps[place.file][offset : offset + count * place.dtype.itemsize])
            return torch.frombuffer(data, dtype=place.dtype, count=count)
        return torch.frombuffer(self._maps[place.file], dtype=place.dtype, count=count, offset=offset)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, as a view on the file."""
        return self.view(name).view(self.places[name].shape)

    def config(self) -> dict[str, Any]:
        """The model's configuration, empty where there is none."""
        path = self.folder / "config.json"
        if not path.is_file():
            return {}
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileError(f"{path} is not JSON: {error}") from error
        return config if isinstance(config, dict) else {}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileError(f"There is no checkpoint {path}.")
    index = path / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FileError(f"{index} is damaged: it has no weight_map.") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise FileError(f"{index} names a file outside its folder: {name!r}.")
            if not (path / name).is_file():
                raise FileError(f"{path} lacks {name}, which its index names.")
        return [path / name for name in sorted(names)]
    found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if not found:
        raise FileError(f"{path} holds no .safetensors file.")
    return found


def read_header(file: Path) -> list[TensorPlace]:
    """The tensors of one safetensors file, in the order of their bytes. Raises FileError if they do not fit together."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        head = handle.read(8)
        if len(head) < 8:
            raise FileError(f"{file} is empty or truncated: it has no safetensors header.")
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, LONGEST_HEADER):
            raise FileError(f"{file} is truncated or no safetensors file: its header would be {length:,} bytes long.")
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise FileError(f"{file} has a damaged header: {error}.") from error
    if not isinstance(header, dict):
        raise FileError(f"{file} has a damaged header: it is not a table of tensors.")
    header.pop("__metadata__", None)
    begin, places, ends = 8 + length, [], []
    for name, entry in header.items():
        place, end = _place(file, name, entry, begin)
        if end > size:
            raise FileError(f"{file} is truncated: tensor {name!r} ends at byte {end:,} of {size:,}.")
        places.append(place)
        ends.append(end)
    order = sorted(range(len(places)), key=lambda i: (places[i].offset, ends[i]))
    for before, after in itertools.pairwise(order):
        if places[after].offset < ends[before]:
            raise FileError(f"{file}: tensors {places[before].name!r} and {places[after].name!r} overlap.")
    return [places[i] for i in order]


def _place(file: Path, name: str, entry: Any, begin: int) -> tuple[TensorPlace, int]:
    try:
        dtype, shape, (first, last) = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise FileError(f"{file}: the entry of tensor {name!r} is damaged.") from None
    if dtype is None:
        raise FileError(f"{file}: tensor {name!r} has dtype {entry['dtype']!r}, which cannot be merged.")
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, first, last))
    if not whole or last - first != math.prod(shape) * dtype.itemsize:
        raise FileError(f"{file}: tensor {name!r} of shape {list(shape)} does not fill bytes {first} to {last}.")
    return TensorPlace(name, dtype, shape, file, begin + first), begin + last


class Writer:
    """A checkpoint folder that is written in place under a temporary name and appears when it is complete."""

    def __init__(self, out: Path, places: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], shard_bytes: int) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.{os.getpid()}.partial")
        remove_left_behind(out)
        self.folder.mkdir(parents=True)
        self._files: dict[str, int] = {}
        self._where: dict[str, tuple[str, int]] = {}
        shards = _shards(places, shard_bytes)
        try:
            for number, names in enumerate(shards, 1):
                single = len(shards) == 1
                file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                self._layout(file, {name: places[name] for name in names})
            if len(shards) > 1:
                total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in places.values())
                index = {
                    "metadata": {"total_size": total},
                    "weight_map": {name: file for name, (file, _) in self._where.items()},
                }
                (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
        except BaseException:
            self.abandon()
            raise

    def _layout(self, file: str, places: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in places.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in places:
            self._where[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])
        handle = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files[file] = handle
        try:
            if offset:
                os.posix_fallocate(handle, 0, 8 + len(text) + offset)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise FileError(f"The disk is too small for {self.out}: {offset:,} more bytes are needed.") from error
            os.ftruncate(handle, 8 + len(text) + offset)
        _write(handle, struct.pack("<Q", len(text)) + text, 0)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write flat `values` of tensor `name` from flat index `start` on."""
        file, offset = self._where[name]
        data = values.contiguous().view(torch.uint8).numpy()
        _write(self._files[file], data, offset + start * values.dtype.itemsize)

    def finish(self) -> None:
        """Flush everything and put the folder under its name; a folder that was there is replaced."""
        for handle in self._files.values():
            os.fsync(handle)
            os.close(handle)
        self._files.clear()
        old = self.out.with_name(f"{self.out.name}.{os.getpid()}.old.partial")
        if self.out.exists():
            os.replace(self.out, old)
        os.replace(self.folder, self.out)
        shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        """Remove what was written."""
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(handle: int, data: Any, offset: int) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        try:
            done = os.pwrite(handle, rest, offset)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise FileError("The disk is full: the merge was given up and nothing was left behind.") from error
            raise
        rest, offset = rest[done:], offset + done


def _shards(places: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in places.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def remove_left_behind(out: Path) -> None:
    """Remove the temporary folders that killed writers of `out` left."""
    import glob

    for left in out.parent.glob(f"{glob.escape(out.name)}.*.partial"):
        writer = left.name.removeprefix(f"{out.name}.").split(".")[0]
        if writer.isdigit() and not Path(f"/proc/{writer}").exists():
            if left.name.endswith(".old.partial") and not out.exists():
                os.replace(left, out)
            else:
                shutil.rmtree(left, ignore_errors=True)
