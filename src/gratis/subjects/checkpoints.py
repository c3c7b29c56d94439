"""Reading and writing safetensors checkpoints by key, without loading them.

A header is checked against the file before anything is read: lengths, offsets, dtypes, shapes. Tensors are views on
the file; outputs are laid out in advance, written in place under a temporary name, and can be gone on with after a kill.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import shutil
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
MOST_DIMENSIONS = 64
INDEX = "model.safetensors.index.json"
PIPELINE = "model_index.json"
"""What a folder of a diffusers pipeline has."""
RECORD = "merge.json"
"""Written into a merged folder: how it was made, and checksums of its files."""
JOURNAL, LOCK = "journal.jsonl", "lock"
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
        if not self.places:
            raise FileError(f"{self.path} holds no tensors.")

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


def _table(file: Path, text: bytes) -> dict[str, Any]:
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


class Writer:
    """A checkpoint folder that is written in place under a temporary name and appears when it is complete.

    `plan` says what is being written, from which inputs. A writer of the same plan goes on with what a killed one left:
    `left` holds that one's notes. Only one process writes an output at a time.
    """

    def __init__(
        self,
        out: Path,
        places: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        shard_bytes: int,
        homes: Mapping[str, tuple[str, str]] | None = None,
        plan: str = "",
    ) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self._old = out.with_name(f"{out.name}.old.partial")
        self._files: dict[str, int] = {}
        self._where: dict[str, tuple[str, int]] = {}
        self._pending: Future[None] | None = None
        self._remembered: dict[str, Any] = {}
        self.noted = time.monotonic()
        """When the last note was begun."""
        self._flusher = ThreadPoolExecutor(1)
        self.left: dict[str, Any] = {}
        """What the notes of a killed writer of the same plan said, by key; the latest of each."""
        self._lock = _locked(self.folder)
        try:
            restore_replaced(out)
            shutil.rmtree(self._old, ignore_errors=True)
            layout = _layout(places, shard_bytes, homes or {})
            self.left = self._resumable(layout, plan)
            for file, (header, size, where) in layout.items():
                self._where.update(where)
                self._open(file, header, size)
            if not self.left:
                _write_indices(self.folder, layout, places)
                self._append({"plan": plan})
        except BaseException:
            self.abandon()
            raise

    def _resumable(self, layout: Mapping[str, Any], plan: str) -> dict[str, Any]:
        left: dict[str, Any] = {}
        journal = self.folder / JOURNAL
        if plan and journal.is_file():
            for line in journal.read_bytes().split(b"\n"):
                try:
                    left |= json.loads(line)
                except ValueError:
                    break
        whole = all(_begins(self.folder / file, header, size) for file, (header, size, _) in layout.items())
        if left.get("plan") == plan and whole:
            return left
        for entry in self.folder.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return {}

    def _open(self, file: str, header: bytes, size: int) -> None:
        path = self.folder / file
        path.parent.mkdir(exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._files[file] = handle
        if self.left:
            return
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise FileError(f"The disk is too small for {self.out}: {size:,} more bytes are needed.") from error
            os.ftruncate(handle, size)
        _write(handle, header, 0)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write flat `values` of tensor `name` from flat index `start` on."""
        file, offset = self._where[name]
        data = values.contiguous().cpu().view(torch.uint8).numpy()
        _write(self._files[file], data, offset + start * values.dtype.itemsize)

    def remember(self, notes: Mapping[str, Any]) -> None:
        """Write `notes` down together with the next ones."""
        self._remembered |= notes

    def note(self, notes: Mapping[str, Any]) -> bool:
        """Write down `notes` once everything written so far is on the disk, beside the work that goes on.

        False, and nothing is noted, if the last note is still on its way.
        """
        if self._pending is not None:
            if not self._pending.done():
                return False
            self._pending.result()
        together, self._remembered = {**self._remembered, **notes}, {}
        self.noted = time.monotonic()
        self._pending = self._flusher.submit(self._flush, together)
        return True

    def _flush(self, notes: dict[str, Any]) -> None:
        for handle in self._files.values():
            os.fdatasync(handle)
        self._append(notes)

    def _append(self, notes: dict[str, Any]) -> None:
        line = json.dumps(notes) + "\n"
        handle = os.open(self.folder / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        try:
            _write_all(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file of weights, as they are now."""
        with ThreadPoolExecutor(min(len(self._files), os.cpu_count() or 1)) as pool:
            found = pool.map(lambda file: sha256(self.folder / file), self._files)
            return dict(zip(self._files, found, strict=True))

    def finish(self) -> None:
        """Flush everything and put the folder under its name; a folder that was there is replaced."""
        if self._pending is not None:
            self._pending.result()
        for handle in self._files.values():
            os.fsync(handle)
            os.close(handle)
        self._files.clear()
        (self.folder / JOURNAL).unlink(missing_ok=True)
        (self.folder / LOCK).unlink(missing_ok=True)
        _sync_folder(self.folder)
        if self.out.exists():
            os.replace(self.out, self._old)
        os.replace(self.folder, self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)
        self._release()

    def keep(self) -> None:
        """Stop, and leave what was written for a later writer of the same plan."""
        self._close()
        self._release()

    def abandon(self) -> None:
        """Remove what was written."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _close(self) -> None:
        self._flusher.shutdown(wait=True)
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def _release(self) -> None:
        self._flusher.shutdown(wait=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def restore_replaced(out: Path) -> None:
    """Put back what stood at `out` if a writer was killed while it put the new folder in its place."""
    old = out.with_name(f"{out.name}.old.partial")
    if old.exists() and not out.exists():
        os.replace(old, out)


def _locked(folder: Path) -> int | None:
    """Make `folder` and hold its lock. Raises FileError where another process holds it."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileError(f"{folder} is in the way: remove it.")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise FileError(f"Another merge is writing {folder} at the moment: wait for it.") from error
        try:
            if os.stat(folder / LOCK).st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _begins(file: Path, header: bytes, size: int) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    with open(file, "rb") as handle:
        return os.fstat(handle.fileno()).st_size == size and handle.read(len(header)) == header


_Layout = dict[str, tuple[bytes, int, dict[str, tuple[str, int]]]]


def _layout(
    places: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    shard_bytes: int,
    homes: Mapping[str, tuple[str, str]],
) -> _Layout:
    """By file: its header, its size, and where each tensor begins."""
    groups: dict[tuple[str, str], dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, place in places.items():
        groups.setdefault(homes.get(name, ("", STEMS[0])), {})[name] = place
    found: _Layout = {}
    for (component, stem), group in groups.items():
        shards = _shards(group, shard_bytes)
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            file = f"{component}/{file}" if component else file
            found[file] = _file_layout(file, {name: group[name] for name in names}, component)
    return found


def _file_layout(
    file: str, places: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], component: str
) -> tuple[bytes, int, dict[str, tuple[str, int]]]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for name, (dtype, shape) in places.items():
        end = offset + math.prod(shape) * dtype.itemsize
        own = name.removeprefix(f"{component}/") if component else name
        header[own] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offsets[name] = offset
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    where = {name: (file, begin + at) for name, at in offsets.items()}
    return struct.pack("<Q", len(text)) + text, begin + offset, where


def _write_indices(folder: Path, layout: _Layout, places: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """An index for each component whose tensors are in several files."""
    maps: dict[str, dict[str, str]] = {}
    sizes: Counter[str] = Counter()
    for file, (_, _, where) in layout.items():
        path = Path(file)
        if match := re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.safetensors", path.name):
            index = str(path.with_name(f"{match[1]}.safetensors.index.json"))
            prefix = f"{path.parent}/" if path.parent.name else ""
            maps.setdefault(index, {}).update({name.removeprefix(prefix): path.name for name in where})
            for name in where:
                dtype, shape = places[name]
                sizes[index] += math.prod(shape) * dtype.itemsize
    for index, weight_map in maps.items():
        (folder / index).parent.mkdir(exist_ok=True)
        content = {"metadata": {"total_size": sizes[index]}, "weight_map": weight_map}
        (folder / index).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


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


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_checksums(folder: str | os.PathLike[str]) -> None:
    """Raise FileError unless the weights in a merged folder are those that were written."""
    path = Path(folder)
    recorded = read_json(path / RECORD).get("files")
    if not isinstance(recorded, dict):
        raise FileError(f"{path} has no {RECORD} with checksums.")
    for name, digest in recorded.items():
        file = path / name
        if not file.is_file() or sha256(file) != digest:
            raise FileError(f"{file} is not what was written: its checksum differs.")


def fingerprint(files: Sequence[Path]) -> str:
    """What tells these files from others: place, size, time of change, header, and samples of their bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as handle:
            state = os.fstat(handle.fileno())
            digest.update(f"{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogatepass"))
            digest.update(handle.read(65536))
            for at in range(0, state.st_size, max(state.st_size // 64, 1)):
                digest.update(os.pread(handle.fileno(), 4096, at))
    return digest.hexdigest()
