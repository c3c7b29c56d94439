"""CONTRIBUTING.md is followed literally: its files are written to a copy of the project, and its commands are run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_method_is_added_as_the_guide_says(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    blocks = re.findall(r"`((?:src|tests)/[\w/]+\.py)`:\n\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for path, code in blocks:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(code)
    commands = re.search(r"### 3. See it\n\n```sh\n(.*?)```", text, flags=re.DOTALL).group(1).strip().splitlines()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    outputs = []
    for command in commands:
        program, *arguments = command.split()
        runner = {"gratis": ["-m", "gratis"], "python": []}[program]
        done = subprocess.run(
            [sys.executable, *runner, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    assert "logit-scaling" in outputs[0]
    assert "temperature" in outputs[1]
    assert re.search(r"\b1[0-9] passed", outputs[2]), outputs[2]
