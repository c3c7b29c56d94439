"""Keep the first tokens and the most recent ones: the sliding window with attention sinks.

G. Xiao, Y. Tian, B. Chen, S. Han and M. Lewis, "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
section 3.2. Positions are those in the cache, not those in the text.
"""

from __future__ import annotations

from typing import Any

import torch

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import ParameterError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.bounded_cache import Selection, bounded_footprint, check_bounded_cache, install_bounded_cache
from gratis.subjects.memory_need import Footprint


class SlidingWindow(Attachable):
    """Read and write text of any length in constant memory, remembering only its beginning and its last part.

    The plain baseline of cache methods: what lies between the first `sinks` tokens and the window is forgotten.
    """

    card = Card(
        title="Efficient Streaming Language Models with Attention Sinks",
        authors="Xiao, Tian, Chen, Han, Lewis",
        year=2024,
        paper="arXiv:2309.17453",
        acts_on="language model",
        free_of=("training", "calibration data", "attention maps"),
        summary="text of any length in constant memory, forgetting the middle",
        unchanged_when={"budget": 200},
        examples={"budget": 24, "sinks": 4},
        any_length=True,
        holds=("kv cache",),
        why={
            "kv cache": "evicts from the cache and moves what it keeps to other positions",
            "attention to the first token": "forgets the first token where it has no sinks",
        },
        limits="What left the window is gone: do not use it to recall something from far back.",
        claims=(
            Claim(
                name="reads on past the model's window where the full cache breaks (loss of the last sixth)",
                task="streaming-perplexity",
                metric="tail_loss",
                compare="difference",
                at_most=-0.3,
                parameters={"budget": 1024},
                task_parameters={"tokens": 12000, "chunk": 128},
            ),
        ),
    )

    budget: int = param(1024, above=1, unit="tokens", help="entries kept per layer", search=(256, 4096))
    sinks: int = param(4, at_least=0, unit="tokens", help="first tokens, always kept; part of budget", search=(0, 64))
    chunk: int | None = param(
        None,
        above=0,
        unit="tokens",
        help="read prompts of generate in pieces of this length, evicting in between; None: at once, up to the window",
    )

    @property
    def holds(self) -> tuple[str, ...]:
        """Without sinks the first token is forgotten, so that nothing can be done with it."""
        return self.card.holds if self.sinks else (*self.card.holds, "attention to the first token")

    def check_parameters(self) -> None:
        if self.sinks >= self.budget:
            raise ParameterError(f"SlidingWindow: sinks {self.sinks} must be below budget {self.budget}.")

    def check(self, subject: Any) -> None:
        check_bounded_cache(subject, type(self).__name__, self.budget)

    def install(self, subject: Any, scope: Scope) -> Any:
        name = type(self).__name__
        return install_bounded_cache(subject, name, self.budget, self.chunk, lambda layers, length: self, scope)

    def footprint(self, model: Any, tokens: int, rows: int = 1) -> Footprint:
        """Bytes that `rows` texts of `tokens` tokens take at most on `model`."""
        return bounded_footprint(model, type(self).__name__, self.budget, self.chunk, rows, tokens)

    def select(self, length: int) -> list[Selection]:
        """Keep the first `sinks` and the last `budget - sinks` of `length` entries, the same in every layer."""
        if length <= self.budget:
            return []
        nothing = torch.empty(1, 0, dtype=torch.long)
        return [Selection(length, self.sinks, nothing, self.budget - self.sinks)]
