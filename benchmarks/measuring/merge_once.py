"""One merge in a process of its own: prints one line of JSON with CPU seconds and peak anonymous memory.

python merge_once.py {gratis|torch|plain|mergekit|copy} METHOD BASE EXPERT EXPERT EXPERT OUT. `torch` is gratis without
compiled loops. Each arm's imports are done before the clock starts; anonymous memory is what the process holds above
that point, so that file pages do not count.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

ARM, METHOD = sys.argv[1:3]
BASE, EXPERTS, OUT = Path(sys.argv[3]), [Path(name) for name in sys.argv[4:7]], Path(sys.argv[7])
WEIGHTS, DENSITY = (0.4, 0.3, 0.3), 0.5


def anonymous() -> float:
    """MB of memory that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("this system does not tell anonymous memory")


def with_gratis() -> Any:
    import gratis

    methods = {
        "task_arithmetic": lambda: gratis.TaskArithmetic(),
        "ties": lambda: gratis.TIES(density=DENSITY),
        "ties_per_tensor": lambda: gratis.TIES(density=DENSITY, scope="tensor"),
        "dare_ties": lambda: gratis.DARETIES(density=DENSITY),
    }
    method = methods[METHOD]()
    from gratis.subjects import compiled
    from gratis.subjects.merging import merge

    if ARM == "torch":
        compiled.merge_loops = lambda: None
    elif compiled.merge_loops() is None:
        raise SystemExit("numba is not installed: pip install 'gratis[speed]'")
    return lambda: merge(method, base=BASE, experts=EXPERTS, weights=WEIGHTS, out=OUT, threads=1)


def with_mergekit() -> Any:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    models = [
        {"model": str(e), "parameters": {"weight": w, "density": DENSITY}}
        for e, w in zip(EXPERTS, WEIGHTS, strict=True)
    ]
    content = {"merge_method": METHOD, "base_model": str(BASE), "models": models}
    config = MergeConfiguration.model_validate(content)
    options = MergeOptions(write_model_card=False, copy_tokenizer=True, random_seed=0)
    return lambda: run_merge(config, str(OUT), options=options)


def with_plain_torch() -> Any:
    """The same arithmetic a tensor at a time, as a careful user would write it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = torch.tensor(WEIGHTS)

    def run() -> None:
        torch.manual_seed(0)
        files = [safe_open(str(folder / "model.safetensors"), "pt") for folder in (BASE, *EXPERTS)]
        merged = {}
        for name in files[0].keys():  # noqa: SIM118
            base, *experts = [file.get_tensor(name) for file in files]
            dtype, base = base.dtype, base.float()
            delta = torch.stack([expert.float().sub_(base) for expert in experts])
            scale = weights.view(-1, *[1] * base.ndim)
            if METHOD == "task_arithmetic":
                merged[name] = (base + (delta * scale).sum(0)).to(dtype)
                continue
            for row in delta:
                flat = row.view(-1)
                keep = max(1, int(DENSITY * flat.numel()))
                if METHOD == "ties":
                    flat.mul_(flat.abs() >= flat.abs().kthvalue(max(1, flat.numel() - keep + 1)).values)
                else:
                    flat.mul_(torch.rand_like(flat) < DENSITY).div_(DENSITY)
            delta *= scale
            agree = delta.sign() == torch.where(delta.sum(0) >= 0, 1.0, -1.0)
            total = (delta * agree).sum(0)
            if METHOD == "ties":
                share = (scale * agree).sum(0)
                total /= torch.where(share == 0, 1.0, share)
            merged[name] = (base + total).to(dtype)
        OUT.mkdir()
        save_file(merged, str(OUT / "model.safetensors"), metadata={"format": "pt"})

    return run


def with_copy() -> Any:
    """Read the bytes of all four files, and write those of one: what any merge does at least."""
    buffer = bytearray(1 << 20)

    def run() -> None:
        OUT.mkdir()
        with open(OUT / "model.safetensors", "wb") as out:
            for number, folder in enumerate((BASE, *EXPERTS)):
                with open(folder / "model.safetensors", "rb", buffering=0) as file:
                    while got := file.readinto(buffer):
                        if not number:
                            out.write(memoryview(buffer)[:got])

    return run


def main() -> None:
    torch.set_num_threads(1)
    arms = {"gratis": with_gratis, "torch": with_gratis, "mergekit": with_mergekit}
    run = {**arms, "plain": with_plain_torch, "copy": with_copy}[ARM]()
    torch.ones(8).abs().sum()
    before, peak, stop = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    stop.set()
    thread.join()
    size = sum(file.stat().st_size for folder in EXPERTS for file in folder.glob("*.safetensors")) / 1e6
    print(
        json.dumps(
            {
                "CPU s": round(cpu, 2),
                "wall s": round(wall, 2),
                "MB of experts per CPU s": round(size / cpu, 1),
                "MB of experts per wall s": round(size / wall, 1),
                "peak anonymous memory above imports, MB": round(max(peak[0] - before, 0.0), 1),
            }
        )
    )


main()
