from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from gratis.contract.files import replacing, write_text


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "a [1].json"
    write_text(path, "old")
    code = (
        "import sys, time, pathlib\nfrom gratis.contract.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as t:\n t.write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout.readline().strip() == b"ready"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    time.sleep(0)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
