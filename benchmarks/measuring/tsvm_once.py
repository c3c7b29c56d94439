"""python tsvm_once.py ARM FOLDER: merge FOLDER/task*.safetensors, changes of matrices, by task singular vectors once.

ARM is gratis, gratis_r (R-TSVM) or fusion_bench. Prints CPU seconds net of imports, after a small merge to warm up, and
writes FOLDER/ARM.safetensors.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    arm, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    tasks = [load_file(file) for file in sorted(folder.glob("task*.safetensors"))]
    if arm == "fusion_bench":
        from fusion_bench.method.task_singular_vector.utils import TSVM_utils

        def merged(changes: Any) -> Any:
            return TSVM_utils.compute_and_sum_svd_mem_reduction(changes, [], accelerator="cpu")
    else:
        import gratis
        from gratis.subjects.merging import merge_state_dicts

        method = gratis.RTSVM() if arm == "gratis_r" else gratis.TSVM()

        def merged(changes: Any) -> Any:
            return merge_state_dicts(method, changes, {name: torch.zeros_like(t) for name, t in changes[0].items()})

    merged([{"w": torch.randn(16, 12)} for _ in tasks])
    began = time.process_time()
    found = merged([dict(task) for task in tasks])
    seconds = time.process_time() - began
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{arm}.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"CPU s": round(seconds, 3), "peak MiB": round(peak)}))


if __name__ == "__main__":
    main()
