"""Decode a masked-diffusion model in a fixed number of steps, block by block: the schedule of LLaDA.

S. Nie et al., "Large language diffusion models", 2025 (arXiv 2502.09992), section 2.4.
"""

from __future__ import annotations

from typing import Any, Literal

from gratis.contract.attach import Scope
from gratis.contract.card import Card
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.masked_diffusion import Blocks
from gratis.subjects.masked_diffusion_door import Record, check_masked_diffusion, install


class FixedSteps(Decoding):
    """As many tokens at every step, the most confident ones first, in blocks from left to right.

    Gives the model a `generate`; a call's own `steps`, `block_length`, `remasking`, `temperature`, `cfg_scale` and
    `max_new_tokens` come before the parameters. One block as long as the window decodes in any order.
    """

    card = Card(
        title="Large language diffusion models",
        authors="S. Nie et al.",
        year=2025,
        paper="arXiv 2502.09992",
        acts_on="masked-diffusion model",
        free_of=("training", "labels"),
        summary="a fixed number of steps, the most confident tokens first: the baseline of masked-diffusion decoding",
        unchanged_when={"steps": None},
        examples={"steps": 4},
        holds=("unmasking",),
        differs=(
            "The mask token is never proposed, as a place that took it would stay masked. A step at which no place "
            "takes a token reuses the logits of the step before."
        ),
        limits="Fewer steps than tokens lose quality: several places then take tokens that were not read together.",
    )

    steps: int | None = param(None, above=0, help="forward passes for the window; None: one per place")
    block_length: int | None = param(
        None, above=0, unit="places", help="places per block; None: 32, or the window where that is no multiple of it"
    )
    remasking: Literal["low_confidence", "random", "topk_margin", "entropy"] = param(
        "low_confidence", help="confidence: the token's probability, noise, p1 - p2, or negative entropy"
    )
    temperature: float = param(0.0, at_least=0, help="of the Gumbel noise on the logits; 0: the likeliest token")
    cfg_scale: float = param(0.0, at_least=0, help="unsupervised guidance, the prompt masked; doubles the passes")

    def check(self, subject: Any) -> None:
        check_masked_diffusion(subject, "FixedSteps")

    def install(self, subject: Any, scope: Scope) -> Any:
        record = Record()
        base = Blocks(self.steps, self.block_length, self.remasking, self.temperature)
        install(subject, scope, base=base, guidance=self.cfg_scale, heard=record)
        return record.report
