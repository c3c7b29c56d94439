"""The sandbox: honest code runs, hostile code does no harm."""

from __future__ import annotations

import os
import socket
import time

import pytest

from gratis.contract.errors import InputError, SubjectError
from gratis.subjects import sandbox
from gratis.subjects.sandbox import run_all, run_code

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/seccomp") and not os.path.exists("/proc/self/status"), reason="needs Linux"
)


def test_honest_programs_run_with_the_standard_modules():
    program = "import math, re, heapq, hashlib\nfrom typing import List\nfrom collections import Counter\n"
    program += "def add(a, b):\n    return a + b\nassert add(1, 2) == 3 and math.comb(4, 2) == 6\n"
    program += "assert hashlib.md5(b'x').hexdigest()[:4] == '9dd4' and max(Counter('aab')) == 'b'\n"
    assert run_code(program).passed


@pytest.mark.parametrize(
    ("program", "why"),
    [("assert 1 == 2", "AssertionError"), ("1/0", "ZeroDivisionError: division by zero"), ("def f(:", "SyntaxError"),
     ("raise SystemExit(0)", "SystemExit"), ("import os; os._exit(0)", "left early with code 0"),
     ("import numpy", "ModuleNotFoundError"), ("raise KeyboardInterrupt", "KeyboardInterrupt"),
     ("def f(): f()\nf()", "RecursionError")],
)  # fmt: skip
def test_what_fails_is_told(program, why):
    outcome = run_code(program)
    assert not outcome.passed
    assert outcome.why.startswith(why)


HOSTILE = {
    "write a file": "open({path!r}, 'w').write('x')",
    "write by a raw call": "import os\nos.open({path!r}, os.O_CREAT | os.O_WRONLY)",
    "remove a file": "import os\nos.remove({victim!r})",
    "rename a file": "import os\nos.rename({victim!r}, {path!r})",
    "read a secret": "print(open({victim!r}).read())",
    "read the parent's environment": "import os\nopen(f'/proc/{{os.getppid()}}/environ').read()",
    "list a folder": "import os\nos.listdir('/')",
    "fork": "import os\nos.fork()",
    "start a process": "import os\nos.system('touch ' + {path!r})\nraise SystemExit(os.path.exists({path!r}))",
    "start a thread": "import threading\nthreading.Thread(target=print).start()",
    "open a socket": "import _socket\n_socket.socket().connect(('127.0.0.1', {port}))",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill everyone": "import os\nos.kill(-1, 9)",
    "raise its limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_programs_do_no_harm(what, tmp_path):
    victim, path = tmp_path / "secret", tmp_path / "written"
    victim.write_text("secret")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.05)
        names = {"victim": str(victim), "path": str(path), "port": listener.getsockname()[1]}
        outcome = run_code(HOSTILE[what].format(**names))
        with pytest.raises(TimeoutError):
            listener.accept()
    assert not outcome.passed, outcome
    assert victim.read_text() == "secret"
    assert not path.exists()


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "1234")
    assert run_code("import os\nassert 'SECRET_KEY' not in os.environ and not os.environ.get('HOME')").passed


def test_endless_loops_sleeps_and_memory_are_limited():
    begin = time.monotonic()
    outcomes = run_all(
        ["while True: pass", "import time\ntime.sleep(1000)", "x = 'a' * 10**9", "x = []\nwhile True: x.append('a' * 10**6)",
         "while True: print('x' * 10**6)"],
        seconds=1.0, memory_mb=200,
    )  # fmt: skip
    assert [outcome.passed for outcome in outcomes] == [False] * 5
    assert [outcome.why.split(":")[0] for outcome in outcomes[2:4]] == ["MemoryError"] * 2
    assert {outcome.why for outcome in outcomes[:2]} <= {"out of time", "killed by SIGKILL"}
    assert time.monotonic() - begin < 120


def test_without_a_sandbox_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(SubjectError, match="only in a sandbox"):
        run_code("pass")
    monkeypatch.undo()
    with pytest.raises(InputError, match="time and memory"):
        run_code("pass", seconds=0)


DIRECT = """
import ctypes, errno, json, os, platform, signal, socket, sys
from gratis.subjects import sandbox
call = ctypes.CDLL(None, use_errno=True).syscall
numbers = {"x86_64": {"socket": 41, "connect": 42, "socketpair": 53, "bind": 49, "sendto": 44, "open": 2, "openat": 257,
                      "fork": 57, "vfork": 58, "clone": 56, "clone3": 435, "execve": 59, "execveat": 322, "kill": 62,
                      "tgkill": 234, "ptrace": 101, "process_vm_readv": 310, "unlink": 87, "unlinkat": 263, "rename": 82,
                      "mkdir": 83, "setrlimit": 160, "prlimit64": 302, "prctl": 157, "mount": 165, "io_uring_setup": 425,
                      "memfd_create": 319, "dup": 32, "pipe2": 293, "chmod": 90, "setuid": 105, "bpf": 321, "shmget": 29,
                      "inotify_init1": 294, "keyctl": 250, "userfaultfd": 323, "seccomp": 317, "pidfd_open": 434,
                      "openat2": 437, "x32 socket": 41 | 0x40000000},
           "aarch64": {"socket": 198, "connect": 203, "openat": 56, "clone": 220, "execve": 221, "kill": 129,
                       "ptrace": 117, "unlinkat": 35, "prlimit64": 261, "prctl": 167, "memfd_create": 279}}
left, right = socket.socketpair()
before = call(39 if platform.machine() == "x86_64" else 172) == os.getpid()
sandbox._give_up(platform.machine())
found = {}
for name, number in numbers[platform.machine()].items():
    ctypes.set_errno(0)
    value = call(number, 0, 0, 0, 0, 0, 0)
    found[name] = [value, errno.errorcode.get(ctypes.get_errno(), ctypes.get_errno())]
try:
    socket.socket()
    found["socket.socket"] = [0, "made"]
except PermissionError:
    found["socket.socket"] = [-1, "EPERM"]
try:
    left.send(b"x")
    found["send on a socket that was open"] = [0, "sent"]
except PermissionError:
    found["send on a socket that was open"] = [-1, "EPERM"]
os.write(1, json.dumps([before, found]).encode())
os._exit(0)
"""


def test_the_kernel_refuses_the_calls_themselves():
    """Asked by number, without Python's modules in between: sockets, files, processes, limits."""
    import json
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", DIRECT], capture_output=True, timeout=60)
    before, found = json.loads(done.stdout)
    assert before, "calls go through before"
    assert {"socket", "connect", "execve", "socket.socket"} <= set(found)
    assert found == {name: [-1, "EPERM"] for name in found}


def test_only_what_computes_is_allowed():
    for table in sandbox._CALLS.values():
        names = set(table["allowed"])
        assert (
            names & {"socket", "connect", "open", "openat", "clone", "clone3", "fork", "execve", "kill", "tgkill"}
            == set()
        )
        assert len(set(table["allowed"].values())) == len(names)
