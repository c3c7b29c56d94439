"""Decode a masked-diffusion model in parallel: every place of the block that is confident enough, at once.

C. Wu et al., "Fast-dLLM: training-free acceleration of diffusion LLM by enabling KV cache and parallel decoding",
2025 (arXiv 2505.22618), algorithm 1, the threshold rule.
"""

from __future__ import annotations

from typing import Any

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.masked_diffusion import Threshold
from gratis.subjects.masked_diffusion_door import Record, check_masked_diffusion, install


class ConfidenceThreshold(Decoding):
    """At every step all places of the current block whose token is likely enough take it, and at least one does.

    Gives the model a `generate`; a call's own `threshold`, `block_length`, `temperature` and `cfg_scale` come before
    the parameters. Goes together with Prophet.
    """

    card = Card(
        title="Fast-dLLM: training-free acceleration of diffusion LLM by enabling KV cache and parallel decoding",
        authors="C. Wu et al.",
        year=2025,
        paper="arXiv 2505.22618",
        acts_on="masked-diffusion model",
        free_of=("training", "labels"),
        summary="every confident place of a block at once",
        unchanged_when={"threshold": 1.0},
        examples={"threshold": 0.02},
        holds=("unmasking",),
        differs="The threshold rule alone, without the approximate cache of other blocks.",
        limits="The threshold depends on how sharp the model's distributions are.",
        claims=(
            Claim(
                name="sums take at most half of the full schedule's passes",
                task="masked-arithmetic",
                metric="row_passes",
                compare="ratio",
                at_most=0.5,
            ),
            Claim(
                name="their answers are about as often right as the full schedule's: at most 0.03 less",
                task="masked-arithmetic",
                metric="accuracy",
                compare="difference",
                at_least=-0.03,
            ),
        ),
    )

    threshold: float = param(0.9, at_least=0, at_most=1, help="probability above which a place takes its token")
    block_length: int | None = param(
        None, above=0, unit="places", help="places per block; None: 32, or the window where that is no multiple of it"
    )
    temperature: float = param(0.0, at_least=0, help="of the Gumbel noise on the logits; 0: the likeliest token")
    cfg_scale: float = param(0.0, at_least=0, help="unsupervised guidance, the prompt masked; doubles the passes")

    def check(self, subject: Any) -> None:
        check_masked_diffusion(subject, "ConfidenceThreshold")

    def install(self, subject: Any, scope: Scope) -> Any:
        record = Record()
        base = Threshold(self.threshold, self.block_length, self.temperature)
        install(subject, scope, base=base, guidance=self.cfg_scale, heard=record)
        return record.report
