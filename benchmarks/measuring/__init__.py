"""What the benchmarks share: interleaved medians, peers in environments of their own, results with machine and date."""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from gratis.subjects.folders import cache_folder
from gratis.trials.environment import environment

RESULTS = Path(__file__).parents[1] / "results"
TORCH = "torch==2.13.0"


def median_seconds(arms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Process CPU seconds of each arm: the median of `rounds` in which all take turns, after a warm-up."""
    seen: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in arms.items():
            begin = time.process_time()
            run()
            if number:
                seen[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seen.items()}


def peer_python(name: str, *packages: str) -> Path:
    """The interpreter of an environment with a peer's packages and torch, made at the first use (needs a network)."""
    import venv

    folder = cache_folder() / "peers" / name
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        print(f"making an environment for {name} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=folder.exists())
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TORCH, *packages]
        subprocess.run(install, check=True)
        (folder / ".complete").touch()
    return python


def run_apart(python: Path | str, script: Path | str, *arguments: Any, **settings: str) -> dict[str, Any]:
    """What a script prints last, as JSON, run with one thread in a process of its own. Raises where it fails."""
    around = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **settings,
    }
    command = [str(python), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=around)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Key by key the median of several runs' numbers; what is no number is the last run's."""
    return {
        key: statistics.median(row[key] for row in rows) if isinstance(value, (int, float)) else value
        for key, value in rows[-1].items()
    }


def store(name: str, content: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json with the machine and the date, and show it."""
    around = environment()
    machine = {key: around[key] for key in ("processor", "cores", "memory_gb", "system", "python") if key in around}
    found = {"date": date.today().isoformat(), "machine": machine, "versions": around.get("versions", {}), **content}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))
    return path


def stored(name: str) -> dict[str, Any]:
    """What earlier runs stored, without the machine and date of `store`; nothing where there was none."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {key: value for key, value in old.items() if key not in {"date", "machine", "versions"}}


def renew(name: str, content: dict[str, Any], device: str = "cpu") -> None:
    """Write these parts of benchmarks/results/NAME.json, each with when, where and how it was measured; keep the others.

    Processes that run side by side may write to one file.
    """
    with _locked(name):
        _write(name, {**stored(name), **content}, {key: key for key in content}, device)
    print(json.dumps(content, indent=1))


def renew_rows(
    name: str,
    title: str,
    rows: Sequence[dict[str, Any]],
    place: Callable[[dict[str, Any]], Any],
    device: str = "cpu",
    part: str = "",
) -> None:
    """As `renew` for rows of one table, which stand in the order of `place(row)`: rows and columns that are not given
    stay as they are, unless they were measured on another device; where `part` names the rows, it is said of them alone.
    """
    with _locked(name):
        old = stored(name)
        measured = old.get("measured", {}).get(title, {}).get("device")
        alike = measured in (None, _device(device))
        table: dict[Any, dict[str, Any]] = {place(row): row for row in old.get(title, [])} if alike or part else {}
        for row in rows:
            table[place(row)] = {**table.get(place(row), {}), **row}
        said = title if alike or not part else f"{title}: {part}"
        _write(name, {**old, title: [table[key] for key in sorted(table)]}, {title: said}, device)
    print(json.dumps({title: list(rows)}, indent=1))


def _write(name: str, found: dict[str, Any], fresh: Mapping[str, str], device: str) -> None:
    """Write what was found; `fresh` names what was measured just now, and as what that is noted."""
    versions = environment()["versions"]
    here = {
        "date": date.today().isoformat(),
        "device": _device(device),
        **{package: versions[package] for package in ("torch", "transformers") if package in versions},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    noted = [said for key, said in fresh.items() if isinstance(found[key], (dict, list))]
    measured = {**found.pop("measured", {}), **dict.fromkeys(noted, here)}
    found["measured"] = {
        key: where for key, where in measured.items() if key in found or key.rpartition(":")[0] in found
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    half.replace(path)


def _device(device: str) -> str:
    """The name of what computes."""
    if device == "cpu":
        return str(environment()["processor"])
    import torch

    return torch.cuda.get_device_name(device)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    with (Path(tempfile.gettempdir()) / f"gratis-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
