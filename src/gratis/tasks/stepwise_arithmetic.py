"""Sums worked out step by step in words, with checks: what small reasoning models of the zoo were trained on."""

from __future__ import annotations

from typing import Any

from gratis.contract.attach import Attachment, attached
from gratis.contract.errors import SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent


class StepwiseArithmetic(Task):
    r"""Answer sums and differences of three or four numbers; the last `\boxed{}` counts.

    Where a method lets a second model write, the share of tokens that it wrote is told.
    """

    card = TaskCard(
        title="Sums step by step",
        acts_on="language model",
        subject="zoo:arithmetic-small",
        data="generated sums and differences of three or four numbers up to 99, answered in paragraphs with checks",
        metrics=(
            Metric(name="accuracy", help="share of problems whose boxed answer is right"),
            Metric(
                name="response_tokens", help="mean length of the responses", unit="tokens", higher_is_better=False, cost=True
            ),
            Metric(
                name="target_share", help="share of tokens that a second model wrote", higher_is_better=False, cost=True
            ),
        ),
        untouched="greedy",
        warm_up={"size": 2},
    )  # fmt: skip

    size: int = param(64, above=0, help="problems")
    max_new_tokens: int = param(300, above=0, unit="tokens", help="longest response")

    def check(self, subject: Any) -> None:
        from gratis.subjects import tokenizer_of

        if not hasattr(subject, "generate") or "\\boxed{" not in tokenizer_of(subject).get_vocab():
            raise SubjectError(
                "stepwise-arithmetic poses its problems to zoo:arithmetic-small, or a model trained alike."
            )

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import torch

        from gratis.subjects import tokenizer_of
        from gratis.zoo.arithmetic import answer_of, problems

        model = subject.subject if isinstance(subject, Attachment) else subject
        tokenizer = tokenizer_of(model)
        right: list[float] = []
        lengths: list[float] = []
        shares: list[float] = []
        for number, problem in enumerate(problems(self.size, seed + 3_000_003)):
            ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"].to(model.device)
            torch.manual_seed(1000 * seed + number)
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.max_new_tokens
            )[0, ids.shape[1] :]
            right.append(float(answer_of(tokenizer.decode(out, skip_special_tokens=True)) == problem.answer))
            lengths.append(float(len(out)))
            shares.append(_target_tokens(model) / max(len(out), 1))
            progress((number + 1) / self.size, f"{sum(right):g} of {number + 1} right")
        return Measurement(
            metrics={
                "accuracy": sum(right) / len(right),
                "response_tokens": sum(lengths) / len(lengths),
                "target_share": sum(s * n for s, n in zip(shares, lengths, strict=True)) / max(sum(lengths), 1.0),
            },
            items={"accuracy": right, "response_tokens": lengths},
            tokens=int(sum(lengths)),
        )


def _target_tokens(model: Any) -> int:
    """Tokens of the last response that a second model wrote."""
    told = [report.get("target_tokens", []) for one in attached(model) for report in one.report().values()]
    return sum(int(tokens[0]) for tokens in told if tokens)
