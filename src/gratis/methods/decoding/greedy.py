"""Take the likeliest token at every step, whatever the call or the model's own settings say."""

from __future__ import annotations

from typing import Any

from gratis.contract.attach import Scope
from gratis.contract.card import Card
from gratis.contract.method import Decoding
from gratis.subjects.generate_door import check_generates, install_greedy


class Greedy(Decoding):
    """The likeliest token at every step: the plain baseline of decoding methods, the same whatever the seed."""

    card = Card(
        title="Greedy decoding",
        year=1990,
        acts_on="language model",
        free_of=("training", "labels", "randomness"),
        summary="the likeliest token at every step",
        holds=("generate",),
    )

    def check(self, subject: Any) -> None:
        check_generates(subject, "Greedy")

    def install(self, subject: Any, scope: Scope) -> Any:
        return install_greedy(subject, "Greedy", scope)
