"""Files that survive a kill: written beside their final name, flushed, and put in place in one step."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of a file that is being written; what carries it is never read and is removed at the next write."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends without error.

    An exception leaves the old file as it was and removes the temporary one; so does the next write after a kill.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_partial(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a kill leaves the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def clean_partial(path: Path) -> None:
    """Remove what killed writers of `path` left behind (a writer that still lives keeps its own)."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"):
        writer = left.name.removesuffix(PARTIAL).rpartition(".")[2]
        if not (writer.isdigit() and _alive(int(writer))):
            left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
