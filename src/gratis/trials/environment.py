"""What a measurement was made on: machine, versions, load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "diffusers", "numpy", "scikit-learn", "safetensors")
"""Packages whose versions can change a result."""


def environment() -> dict[str, Any]:
    """Machine, operating system, threads, load and versions, as plain values. Names no host, user or path."""
    described: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }
    if hasattr(os, "getloadavg"):
        described["load"] = round(os.getloadavg()[0], 2)
    torch = sys.modules.get("torch")
    if torch is not None:
        described["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            described["accelerator"] = torch.cuda.get_device_name(0)
    return described


def versions() -> dict[str, str]:
    """Versions of gratis and of the installed packages that can change a result."""
    import gratis

    found = {"gratis": gratis.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
