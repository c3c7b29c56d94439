"""How fast a machine multiplies and reads: from a list, from two numbers, or measured here."""

from __future__ import annotations

import difflib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from gratis.contract.errors import ParameterError

_SIZE, _ROUNDS = 1024, 7
_BYTES = 1 << 28


@dataclass(frozen=True)
class Hardware:
    """Peak arithmetic in FLOP/s and memory bandwidth in bytes/s."""

    name: str
    flops: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (0 < self.flops < float("inf") and 0 < self.bandwidth < float("inf")):
            raise ParameterError(f"{self.name}: FLOP/s and bytes/s must be positive and finite.")

    @property
    def intensity(self) -> float:
        """FLOP that are done while a byte is read."""
        return self.flops / self.bandwidth

    def seconds(self, total: float) -> float:
        """Time of `total` eFLOP at the peak."""
        return total / self.flops

    @classmethod
    def named(cls, text: str) -> Hardware:
        """A preset by name, `measure` or `measure:DEVICE`, or `TFLOPS:TB/S`. Raises ParameterError."""
        if text == "measure" or text.startswith("measure:"):
            return measure(text.partition(":")[2] or None)
        if text.lower() in PRESETS:
            return PRESETS[text.lower()]
        flops, _, bandwidth = text.partition(":")
        try:
            amounts = float(flops) * 1e12, float(bandwidth) * 1e12
        except ValueError:
            near = difflib.get_close_matches(text.lower(), PRESETS, n=1)
            raise ParameterError(
                f"There is no hardware {text!r}{f'; did you mean {near[0]!r}' if near else ''}: name one of "
                f"{', '.join(PRESETS)}, 'measure', or TFLOP/s and TB/s as in 989:3.35."
            ) from None
        return cls(f"{float(flops):g} TFLOP/s, {float(bandwidth):g} TB/s", *amounts)


PRESETS = {
    key: Hardware(name, flops * 1e12, bandwidth * 1e12)
    for key, name, flops, bandwidth in (
        ("b200", "NVIDIA B200", 4500, 8.0),
        ("h200", "NVIDIA H200", 989, 4.8),
        ("h100", "NVIDIA H100 SXM", 989, 3.35),
        ("h100-pcie", "NVIDIA H100 PCIe", 756, 2.0),
        ("a100", "NVIDIA A100 80GB SXM", 312, 2.039),
        ("l40s", "NVIDIA L40S", 362, 0.864),
        ("l4", "NVIDIA L4", 121, 0.3),
        ("a10", "NVIDIA A10", 125, 0.6),
        ("v100", "NVIDIA V100 SXM", 125, 0.9),
        ("t4", "NVIDIA T4", 65, 0.32),
        ("rtx5090", "NVIDIA GeForce RTX 5090", 209.5, 1.792),
        ("rtx3090", "NVIDIA GeForce RTX 3090", 71, 0.936),
        ("rtx4090", "NVIDIA GeForce RTX 4090", 165, 1.008),
        ("mi300x", "AMD Instinct MI300X", 1307, 5.3),
        ("mi325x", "AMD Instinct MI325X", 1307, 6.0),
    )
}
"""Dense 16-bit peaks of the makers' data sheets (B200: the paper's figures)."""


def measure(device: str | None = None) -> Hardware:
    """Time products of matrices and copies of memory, and take the medians: on `device`, or the fastest that is here.

    Raises ParameterError for a device that this machine does not have.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = device or ("cpu" if accelerator is None else str(accelerator))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    size = _SIZE if device == "cpu" else 8 * _SIZE
    try:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        source = torch.ones(_BYTES // 4, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip().splitlines()[0].rstrip(".")
        raise ParameterError(f"Nothing can be measured on {device!r} here: {said}.") from error
    target = torch.empty_like(source)

    def median(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(_ROUNDS + 1):
            _wait(device)
            begin = time.perf_counter()
            work()
            _wait(device)
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken[1:])

    multiplying = median(lambda: torch.mm(left, right))
    copying = median(lambda: target.copy_(source))
    return Hardware(f"this machine ({device})", 2 * size**3 / multiplying, 2 * source.nbytes / copying)


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize(device)
