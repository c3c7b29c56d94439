"""Decode a masked-diffusion model along reversed diffusion times over the whole window: the schedule of Dream.

J. Ye et al., "Dream 7B: diffusion large language models", 2025 (arXiv 2508.15487).
"""

from __future__ import annotations

from typing import Any, Literal

from gratis.contract.attach import Scope
from gratis.contract.card import Card
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.masked_diffusion import Times
from gratis.subjects.masked_diffusion_door import Record, check_masked_diffusion, install


class GlobalSchedule(Decoding):
    """At each step the share of masked places that the diffusion times give takes tokens, anywhere in the window.

    Gives the model a `generate`; a call's own `steps`, `alg`, `eps`, `temperature`, `top_p`, `top_k` and `alg_temp`
    come before the parameters. A model's own `diffusion_generate` stays as it is.
    """

    card = Card(
        title="Dream 7B: diffusion large language models",
        authors="J. Ye et al.",
        year=2025,
        paper="arXiv 2508.15487",
        acts_on="masked-diffusion model",
        free_of=("training", "labels"),
        summary="tokens by reversed diffusion times over the whole window, without blocks",
        examples={"steps": 4},
        holds=("unmasking",),
        differs="Shares are taken of each row's masked places, not of the batch's mean. The mask token is never proposed.",
        limits="Without blocks the end of the window is often decided before its beginning.",
    )

    steps: int | None = param(None, above=0, help="forward passes for the window; None: one per place")
    eps: float = param(1e-3, above=0, below=1, help="the last diffusion time")
    alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = param(
        "entropy", help="places at random, or the most confident by probability, p1 - p2 or negative entropy"
    )
    temperature: float = param(0.0, at_least=0, help="of the draw of tokens; 0: the likeliest")
    top_p: float | None = param(None, above=0, at_most=1, help="probability mass that tokens are drawn from")
    top_k: int | None = param(None, above=0, unit="tokens", help="tokens drawn from")
    alg_temp: float = param(0.0, at_least=0, help="above 0, places are drawn from softmax(confidence / alg_temp)")

    def check(self, subject: Any) -> None:
        check_masked_diffusion(subject, "GlobalSchedule")

    def install(self, subject: Any, scope: Scope) -> Any:
        record = Record()
        base = Times(self.steps, self.eps, self.alg, self.temperature, self.top_p, self.top_k, self.alg_temp)
        install(subject, scope, base=base, heard=record)
        return record.report
