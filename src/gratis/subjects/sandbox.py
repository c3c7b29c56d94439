"""Running code that a model wrote, where it can do no harm.

The code runs in a process of its own that has given up, for good and before the first line of it, everything but
computing: the kernel answers every other system call with "not permitted" (seccomp, an allow list). It cannot open or
write files, use the network, start processes or threads, signal or inspect others, or change its limits. Its
environment is empty, its memory and processor time are limited, its output goes nowhere, and it is killed at a wall
limit. Standard modules that solutions commonly import are loaded before; others are not found.

What it says of itself is not to be trusted: code that wants to can report success. It guards the machine, not the score.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

if __name__ != "__main__":
    from gratis.contract.errors import InputError, SubjectError

MODULES = (
    "math", "cmath", "re", "string", "collections", "collections.abc", "itertools", "functools", "operator", "heapq",
    "bisect", "random", "statistics", "fractions", "decimal", "datetime", "calendar", "hashlib", "typing", "copy",
    "dataclasses", "enum", "json", "time", "textwrap", "unicodedata", "numbers", "array", "struct", "queue", "types",
    "abc", "contextlib", "io", "sys", "os", "warnings", "traceback", "encodings.idna", "zlib", "base64", "binascii",
)  # fmt: skip
"""Standard modules that are there in the sandbox."""

_CALLS = {
    "x86_64": {
        "audit": 0xC000003E,
        "allowed": {
            "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
            "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "mremap": 25, "madvise": 28, "getpid": 39,
            "sched_yield": 24, "nanosleep": 35, "exit": 60, "gettimeofday": 96, "getrusage": 98, "times": 100,
            "sigaltstack": 131, "gettid": 186, "futex": 202, "clock_gettime": 228, "clock_getres": 229,
            "clock_nanosleep": 230, "exit_group": 231, "restart_syscall": 219, "getrandom": 318,
        },
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "allowed": {
            "read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "mmap": 222, "mprotect": 226, "munmap": 215,
            "brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "mremap": 216, "madvise": 233,
            "getpid": 172, "sched_yield": 124, "nanosleep": 101, "exit": 93, "gettimeofday": 169, "getrusage": 165,
            "times": 153, "sigaltstack": 132, "gettid": 178, "futex": 98, "clock_gettime": 113, "clock_getres": 114,
            "clock_nanosleep": 115, "exit_group": 94, "restart_syscall": 128, "getrandom": 278,
        },
    },
}  # fmt: skip
"""Numbers of the system calls that stay allowed, by machine."""

_NO_NEW_PRIVILEGES, _SECCOMP, _DEATH_SIGNAL, _FILTER = 38, 22, 1, 2
LONGEST_REPORT = 1 << 12
"""Bytes of a report that are read; what comes after is an attempt to flood."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """Whether it ran to its end."""
    why: str
    """"passed", or what stopped it: an exception's name and words, "out of time", "killed by SIGKILL" …"""


def run_code(program: str, *, seconds: float = 5.0, memory_mb: int = 512, start_seconds: float = 30.0) -> Outcome:
    """Run a Python program in the sandbox and say whether it ended without an exception.

    `seconds` limits its processor time and its wall time, `memory_mb` (1e6 bytes) what it may take beside the
    interpreter; `start_seconds` limits how long the interpreter may take to get ready. Raises SubjectError where this
    system has no such sandbox: the program is not run then.
    """
    check_sandbox()
    if seconds <= 0 or memory_mb <= 0:
        raise InputError(f"A sandbox needs time and memory, not {seconds} s and {memory_mb} MB.")
    reading, writing = os.pipe()
    settings = json.dumps({"program": program, "seconds": seconds, "memory": memory_mb * 10**6, "report": writing})
    with tempfile.TemporaryDirectory(prefix="gratis-sandbox-") as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__), str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(writing,), env={},
            cwd=folder, start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        try:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(settings.encode())
                child.stdin.close()
            if not _ready(reading, start_seconds):
                return Outcome(False, "the sandbox did not get ready in time")
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds + 1)
            if child.poll() is None:
                return Outcome(False, "out of time")
            return _outcome(child.returncode, reading)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            os.close(reading)


def run_all(programs: list[str], *, seconds: float = 5.0, memory_mb: int = 512, together: int = 2) -> list[Outcome]:
    """`run_code` for several programs, `together` at a time."""
    check_sandbox()
    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(lambda program: run_code(program, seconds=seconds, memory_mb=memory_mb), programs))


def check_sandbox() -> None:
    """Raise SubjectError where the system offers no sandbox."""
    if not sys.platform.startswith("linux") or platform.machine() not in _CALLS:
        raise SubjectError(
            f"Code that a model wrote runs only in a sandbox, and there is none for {platform.system()} on "
            f"{platform.machine()}: use Linux on x86_64 or aarch64."
        )


def _ready(reading: int, seconds: float) -> bool:
    """Whether the child says that it has given everything up and begins."""
    import select

    found, _, _ = select.select([reading], [], [], seconds)
    return bool(found) and os.read(reading, 1) == b"!"


def _outcome(code: int, reading: int) -> Outcome:
    os.set_blocking(reading, False)
    try:
        said = os.read(reading, LONGEST_REPORT).decode("utf-8", "replace")
    except BlockingIOError:
        said = ""
    if code < 0:
        name = signal.Signals(-code).name
        return Outcome(False, "out of time" if name == "SIGXCPU" else f"killed by {name}")
    if code == 0 and said == "passed":
        return Outcome(True, "passed")
    return Outcome(False, said if said and said != "passed" else f"left early with code {code}")


# What follows runs in the child, as a script of its own: nothing of gratis is imported there.


def _give_up(machine: str) -> None:
    """Install the filter: system calls that are not allowed fail with EPERM from now on, for good."""
    table: dict[str, Any] = _CALLS[machine]
    allowed = sorted(table["allowed"].values())
    load, jump, answer = 0x20, 0x15, 0x06
    permit, refuse, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    lines = [(load, 0, 0, 4), (jump, 1, 0, table["audit"]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    count = len(allowed)
    lines += [(jump, count - place, 0, number) for place, number in enumerate(allowed)]
    lines += [(answer, 0, 0, refuse), (answer, 0, 0, permit)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code)))
    control = ctypes.CDLL(None, use_errno=True).prctl
    control.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if control(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or control(_SECCOMP, _FILTER, ctypes.addressof(program), 0, 0):
        os._exit(70)


def _child(parent: int) -> None:
    """Read the program, give everything up, run it, and say what became of it."""
    import importlib
    import resource

    control = ctypes.CDLL(None).prctl
    control(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(71)
    settings = json.loads(sys.stdin.buffer.read())
    for name in MODULES:
        importlib.import_module(name)
    compiled: Any = None
    problem: BaseException | None = None
    report, seconds = settings["report"], settings["seconds"]
    for kept in range(3, 256):
        if kept != report:
            with contextlib.suppress(OSError):
                os.close(kept)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    limit = int(seconds) + 1
    for what, most in (
        (resource.RLIMIT_AS, used + settings["memory"]),
        (resource.RLIMIT_CPU, limit),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, report + 1),
    ):
        resource.setrlimit(what, (most, most))
    names: dict[str, Any] = {"__name__": "__main__"}
    write: Callable[..., int] = os.write
    leave: Callable[..., Any] = os._exit
    _give_up(platform.machine())
    write(report, b"!")
    try:
        compiled = compile(settings["program"], "<solution>", "exec")
        exec(compiled, names)
    except BaseException as error:
        problem = error
    try:
        words = "passed" if problem is None else f"{type(problem).__name__}: {str(problem)[:200]}".rstrip(": ")
        write(report, words.encode("utf-8", "replace")[:1024])
    finally:
        leave(0)


if __name__ == "__main__":
    _child(int(sys.argv[1]))
