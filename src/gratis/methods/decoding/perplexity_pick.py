"""Draw N responses and return the one that the model finds least surprising, token by token.

A baseline of long standing: the highest mean log-probability, which is the lowest perplexity.
"""

from __future__ import annotations

from typing import Any

from gratis.contract.attach import Scope
from gratis.contract.card import Card
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.answers import ranking
from gratis.subjects.generate_door import Choice, check_generates, install_choice
from gratis.subjects.sampling_loop import Samples, TokenRecorder
from gratis.subjects.token_statistics import log_probability


class PerplexityPick(Decoding):
    """Return the sampled response of lowest perplexity under the raw distribution of the model (temperature 1)."""

    card = Card(
        title="Perplexity selection",
        year=2020,
        acts_on="language model",
        free_of=("training", "labels", "a reward model"),
        summary="the response, of several drawn, with the lowest perplexity",
        unchanged_when={"samples": 1},
        examples={"samples": 3, "temperature": 1.0},
        holds=("generate",),
        limits="Prefers bland and repetitive text, the more so the more responses there are.",
    )

    samples: int = param(4, at_least=1, help="responses drawn per prompt", search=(4, 8, 16))
    temperature: float = param(0.6, above=0, help="of the draws, where the call does not say; scores ignore it")
    top_p: float = param(0.9, above=0, at_most=1, help="probability mass drawn from, where the call does not say")
    top_k: int = param(0, at_least=0, unit="tokens", help="tokens drawn from, 0 for all, where the call does not say")

    def check(self, subject: Any) -> None:
        check_generates(subject, "PerplexityPick")

    def install(self, subject: Any, scope: Scope) -> Any:
        if self.samples == 1:
            return lambda: {"samples": 0}

        def choose(samples: Samples) -> Choice:
            scores = samples.means()
            return Choice(ranking(scores), {"mean_log_probability": scores})

        return install_choice(
            subject,
            "PerplexityPick",
            scope,
            samples=self.samples,
            sampling={"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k},
            recorder=lambda: TokenRecorder(log_probability),
            choose=choose,
        )
