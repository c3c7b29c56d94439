"""What to spend an inference budget on: which model, how many samples, how long, dense or sparse attention.

R. Sadhukhan et al., "Kinetics: Rethinking Test-Time Scaling Laws", 2025 (arXiv 2506.05333).
"""

from __future__ import annotations

from gratis.planning.cost import Attention, Cost, Shape, coverage, generation_cost
from gratis.planning.frontier import Choice, Option, Plan, plan
from gratis.planning.hardware import PRESETS, Hardware, measure
from gratis.planning.traces import Trace, read_traces, record

__all__ = [
    "PRESETS", "Attention", "Choice", "Cost", "Hardware", "Option", "Plan", "Shape", "Trace", "coverage",
    "generation_cost", "measure", "plan", "read_traces", "record",
]  # fmt: skip
