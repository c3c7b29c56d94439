"""Draw N responses and return the first whose answer most of them give.

X. Wang et al., "Self-consistency improves chain of thought reasoning in language models", 2022 (arXiv 2203.11171).
"""

from __future__ import annotations

from typing import Any

from gratis.contract.attach import Scope
from gratis.contract.card import Card
from gratis.contract.errors import ParameterError
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.answers import AnswerName, borda, response_answers
from gratis.subjects.generate_door import Choice, check_generates, install_choice
from gratis.subjects.opening import tokenizer_of
from gratis.subjects.sampling_loop import Samples


class MajorityVote(Decoding):
    """Self-consistency: the answer that most of N sampled responses give; the first such response, ties by index."""

    card = Card(
        title="Self-consistency improves chain of thought reasoning in language models",
        authors="X. Wang et al.",
        year=2022,
        paper="arXiv 2203.11171",
        acts_on="language model",
        free_of=("training", "labels", "a reward model"),
        summary="the answer that most of several responses give",
        unchanged_when={"samples": 1},
        examples={"samples": 3, "answer": "response", "temperature": 1.0},
        holds=("generate",),
        limits="Needs an answer that can be compared; open text has none.",
    )

    samples: int = param(4, at_least=1, help="responses drawn per prompt", search=(4, 8, 16))
    answer: AnswerName = param("number", help="where a response's answer is")
    temperature: float = param(0.6, above=0, help="of the draws, where the call does not say")
    top_p: float = param(0.9, above=0, at_most=1, help="probability mass drawn from, where the call does not say")
    top_k: int = param(0, at_least=0, unit="tokens", help="tokens drawn from, 0 for all, where the call does not say")

    def check_parameters(self) -> None:
        if self.answer == "none":
            raise ParameterError("MajorityVote: a vote needs an answer to vote on: set answer to 'number' or another.")

    def check(self, subject: Any) -> None:
        check_generates(subject, "MajorityVote")
        if self.answer != "response":
            tokenizer_of(subject)

    def install(self, subject: Any, scope: Scope) -> Any:
        if self.samples == 1:
            return lambda: {"samples": 0}

        def choose(samples: Samples) -> Choice:
            answers = response_answers(subject, samples.responses, self.answer)
            vote = borda([0.0] * len(answers), answers, power=0)
            return Choice(vote.ranking, {"answers": answers, "votes": list(vote.totals)})

        return install_choice(
            subject,
            "MajorityVote",
            scope,
            samples=self.samples,
            sampling={"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k},
            choose=choose,
        )
