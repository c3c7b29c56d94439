"""The generated docs cover the catalogue, and their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gratis

ROOT = Path(__file__).parent.parent


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), *arguments], capture_output=True, text=True
    )


def test_pages_follow_from_the_code(tmp_path):
    done = generate("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "methods" / "index.md").read_text()
    for entry in gratis.catalogue.entries.values():
        page = (tmp_path / "methods" / f"{entry.name}.md").read_text()
        assert f"({entry.name}.md)" in index
        assert entry.card.title in page
        for parameter in entry.load().declared().values():
            assert f"| `{parameter.name}` |" in page
        for claim in entry.card.claims:
            assert claim.name.replace("|", "\\|") in page
    for name in gratis.task_catalogue:
        assert f"## {name}" in (tmp_path / "tasks.md").read_text()
    for page in tmp_path.rglob("*.md"):
        for line in page.read_text().splitlines():
            if line.startswith("|"):
                assert line.endswith("|")
        for link in re.findall(r"\]\(([^)#]+\.md)\)", page.read_text()):
            by_hand = (ROOT / "docs" / page.relative_to(tmp_path)).parent / link
            assert (page.parent / link).exists() or by_hand.exists(), f"{page.name}: {link}"
    assert generate("--out", str(tmp_path), "--check").returncode == 0
    (tmp_path / "methods" / "gone.md").write_text("a method that is no more")
    (tmp_path / "results.md").write_text("old")
    stale = generate("--out", str(tmp_path), "--check")
    assert stale.returncode == 1
    assert "gone.md" in stale.stderr
    assert "results.md" in stale.stderr
    assert generate("--out", str(tmp_path)).returncode == 0
    assert not (tmp_path / "methods" / "gone.md").exists()
