"""Draw one response from the model's distribution: the plain baseline of everything that draws several."""

from __future__ import annotations

from typing import Any

from gratis.contract.attach import Scope
from gratis.contract.card import Card
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.generate_door import Choice, check_generates, install_choice


class Sampling(Decoding):
    """One response, drawn at a temperature from the smallest set of tokens that holds a probability mass.

    (Nucleus sampling: A. Holtzman et al., "The curious case of neural text degeneration", 2019.) It is the first of
    the responses that the methods which choose among several draw under the same seed.
    """

    card = Card(
        title="The curious case of neural text degeneration",
        authors="A. Holtzman et al.",
        year=2019,
        paper="arXiv 1904.09751",
        acts_on="language model",
        free_of=("training", "labels"),
        summary="one response, drawn at random: the baseline of what draws several",
        examples={"temperature": 1.0},
        holds=("generate",),
    )

    temperature: float = param(0.6, above=0, help="of the draw, where the call does not say")
    top_p: float = param(0.9, above=0, at_most=1, help="probability mass drawn from, where the call does not say")
    top_k: int = param(0, at_least=0, unit="tokens", help="tokens drawn from, 0 for all, where the call does not say")

    def check(self, subject: Any) -> None:
        check_generates(subject, "Sampling")

    def install(self, subject: Any, scope: Scope) -> Any:
        return install_choice(
            subject,
            "Sampling",
            scope,
            samples=1,
            sampling={"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k},
            choose=lambda samples: Choice([0]),
        )
