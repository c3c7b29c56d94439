"""Answers that were given before: a cache in SQLite, and transcripts that replay a run offline. Nothing is pickled."""

from __future__ import annotations

import difflib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gratis.contract.errors import FileError
from gratis.contract.release import VERSION
from gratis.subjects.chat.messages import SCHEMA_VERSION, ChatError, Reply, Request

LONGEST_LINE = 1 << 24
"""Bytes at the end of a transcript that are searched for an unfinished line."""


class ResponseCache:
    """Replies by request key, on disk, as JSON. Several processes may share one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, version INTEGER, time REAL, reply TEXT)"
            )
        except (OSError, sqlite3.Error) as error:
            raise FileError(f"The answer cache {path} cannot be used: {error}.") from error
        self._lock = threading.Lock()

    def get(self, key: str) -> Reply | None:
        """The reply stored under `key`, marked as cached."""
        try:
            with self._lock:
                row = self._connection.execute(
                    "SELECT reply FROM replies WHERE key = ? AND version = ?", (key, SCHEMA_VERSION)
                ).fetchone()
            if row is None:
                return None
            reply = Reply.from_json(json.loads(row[0]))
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
            raise FileError(f"The answer cache {self._path} is damaged: {error}; remove it.") from error
        reply.cached = True
        return reply

    def put(self, key: str, reply: Reply) -> None:
        """Store a complete reply; truncated and failed ones are not kept. Raises FileError where it cannot."""
        if reply.error is not None or reply.finish_reason != "stop":
            return
        try:
            with self._lock:
                self._connection.execute(
                    "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)",
                    (key, SCHEMA_VERSION, time.time(), json.dumps(asdict(reply))),
                )
        except sqlite3.Error as error:
            raise FileError(f"The answer cache {self._path} cannot be written: {error}.") from error

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


class Transcript:
    """Every request and reply of a run, appended to a JSONL file.

    A line that a killed run left unfinished is removed when the file is opened again. Raises FileError where the file
    cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - LONGEST_LINE, 0))
                tail = file.read()
                if tail and not tail.endswith(b"\n"):
                    file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        except OSError as error:
            raise FileError(f"The transcript {path} cannot be written: {error.strerror}.") from error

    def add(self, key: str, request: Request, reply: Reply) -> None:
        """Append one line."""
        entry = {"key": key, "request": request.content(), "reply": asdict(reply), "time": time.time()}
        line = json.dumps({**entry, "gratis": VERSION}) + "\n"
        try:
            with self._lock, open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise FileError(f"The transcript {self._path} cannot be written: {error.strerror}.") from error


class Replay:
    """A back end that answers from a transcript, by request; it needs no model and no network.

    A last line that a killed run left unfinished is left out.
    """

    def __init__(self, path: Path) -> None:
        self.model = ""
        self._replies: dict[str, Reply] = {}
        self._requests: dict[str, Mapping[str, Any]] = {}
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise FileError(f"The transcript {path} is damaged: {error}.") from error
        except OSError as error:
            raise FileError(f"The transcript {path} cannot be read: {error.strerror}.") from error
        for number, line in enumerate(lines, 1):
            unfinished = number == len(lines)
            if unfinished and not line:
                break
            try:
                entry = json.loads(line)
                request = Request(**{**entry["request"], "stop": tuple(entry["request"]["stop"]),
                                     "choices": tuple(entry["request"]["choices"])})  # fmt: skip
                key = request.key("")
                self._replies[key] = Reply.from_json(entry["reply"])
                self._requests[key] = request.content()
            except (ValueError, KeyError, TypeError) as error:
                if unfinished:
                    break
                raise FileError(f"Line {number} of the transcript {path} is damaged: {error}.") from error

    def generate(self, requests: list[Request]) -> list[Reply]:
        """The recorded replies. Raises ChatError for a request that was not recorded, with the nearest one."""
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        key = request.key("")
        if key in self._replies:
            return self._replies[key]
        text = json.dumps(request.content(), sort_keys=True, indent=1)
        known = {k: json.dumps(c, sort_keys=True, indent=1) for k, c in self._requests.items()}
        near = difflib.get_close_matches(text, known.values(), n=1, cutoff=0)
        lines = (
            list(difflib.unified_diff(near[0].splitlines(), text.splitlines(), lineterm="", n=0))[2:] if near else []
        )
        changed = "; ".join(line for line in lines if not line.startswith("@@"))[:300]
        raise ChatError(
            f"This request is not in the transcript; the nearest one differs in: {changed or 'everything'}."
        )
