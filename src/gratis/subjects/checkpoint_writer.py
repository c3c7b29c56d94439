"""Writing a safetensors checkpoint in place: laid out in advance, gone on with after a kill, complete under its name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import FileError
from gratis.subjects.checkpoints import NAMES, RECORD, STEMS, read_json

JOURNAL, LOCK = "journal.jsonl", "lock"


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
        _write(self._files[file], _bytes_of(values), offset + start * values.dtype.itemsize)

    def settle(self) -> None:
        """Have everything written so far on the disk."""
        for handle in self._files.values():
            os.fdatasync(handle)

    def __reduce__(self) -> Any:
        return DistantWriter, (self.folder, self._where)

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
        self.settle()
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


class DistantWriter:
    """What a writer is in another process: it writes tensors at their places in the files that were laid out."""

    def __init__(self, folder: Path, where: Mapping[str, tuple[str, int]]) -> None:
        self.folder, self._where = folder, where
        self._files: dict[str, int] = {}

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """See Writer."""
        file, offset = self._where[name]
        if file not in self._files:
            self._files[file] = os.open(self.folder / file, os.O_RDWR | os.O_NOFOLLOW)
        _write(self._files[file], _bytes_of(values), offset + start * values.dtype.itemsize)

    def settle(self) -> None:
        """See Writer."""
        for handle in self._files.values():
            os.fdatasync(handle)

    def __del__(self) -> None:
        for handle in self._files.values():
            os.close(handle)


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


def _bytes_of(values: Tensor) -> Any:
    return values.contiguous().cpu().view(torch.uint8).numpy()


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
