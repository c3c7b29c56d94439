"""Read pieces longer than a model was trained with: how much does it lose, and how does another model compare?"""

from __future__ import annotations

import statistics
from typing import Any

from gratis.contract.errors import ParameterError, SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent

LENGTH, LONGEST, MEASURED = 128, 2048, 64
HELD_OUT = 0.15
PIECES = 12


class LengthExtrapolation(Task):
    """Loss of the last 64 bytes of held-out pieces, at the length of training and at a longer one.

    The pieces end at the same places whatever their length. The model `beside`, of the same size and trained alike, reads
    the same pieces as it is.
    """

    card = TaskCard(
        title="Pieces longer than those of training",
        acts_on="language model",
        subject="zoo:help-softmax",
        data="the last 15 % of the help topics that ship with Python, as bytes; no zoo:help-… model was trained on them",
        metrics=(
            Metric(
                name="loss",
                help="mean loss of the last 64 bytes of pieces of the length asked for",
                unit="nats",
                higher_is_better=False,
            ),
            Metric(
                name="growth",
                help="that loss minus the loss of the same bytes at the length of training",
                unit="nats",
                higher_is_better=False,
            ),
            Metric(name="lead", help="the loss of the model beside, minus that of this one", unit="nats"),
        ),
        warm_up={"length": 256},
    )

    length: int = param(2048, at_least=128, at_most=2048, unit="bytes", help="length of the pieces")
    beside: str = param("zoo:help-softmax", help="model to compare with, as gratis.open takes it")

    def check_parameters(self) -> None:
        if not self.beside.startswith("zoo:help-"):
            raise ParameterError("length-extrapolation compares with models of bytes: zoo:help-softmax or alike.")

    def check(self, subject: Any) -> None:
        vocabulary = subject.config.get_text_config().vocab_size
        if vocabulary != 256:
            raise SubjectError(
                f"length-extrapolation reads bytes, at {LENGTH} a piece in training: use zoo:help-softmax, or a model "
                f"trained alike; this one has {vocabulary:,} tokens."
            )

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        from gratis.subjects import open as open_subject

        _, text = texts()
        text = text[seed * 997 % 4096 :].to(subject.device)
        other = open_subject(self.beside).to(subject.device)
        long = losses(subject, text, self.length)
        progress(0.4, f"{self.length:,} bytes read")
        short = losses(subject, text, LENGTH)
        progress(0.5, f"{LENGTH:,} bytes read")
        theirs = losses(other, text, self.length)
        progress(1.0, f"{self.length:,} bytes read by {self.beside}")
        items = {
            "loss": long,
            "growth": [one - before for one, before in zip(long, short, strict=True)],
            "lead": [their - one for their, one in zip(theirs, long, strict=True)],
        }
        return Measurement(
            metrics={name: statistics.fmean(values) for name, values in items.items()},
            items=items,
            tokens=len(long) * (2 * self.length + LENGTH),
            calls=3 * len(long),
        )


def texts() -> tuple[Any, Any]:
    """Bytes to train on, and bytes held out at the end."""
    import torch

    from gratis.subjects.text import documentation

    every = torch.frombuffer(bytearray(documentation().encode()), dtype=torch.uint8).long()
    cut = int(len(every) * (1 - HELD_OUT))
    return every[:cut], every[cut:]


def losses(model: Any, text: Any, length: int) -> list[float]:
    """Mean loss of the last 64 bytes of evenly spaced pieces of `length` bytes, in nats per byte.

    The pieces end at the same places whatever their length.
    """
    import torch

    ends = torch.linspace(LONGEST + 1, len(text) - 1, PIECES).long().tolist()
    found = []
    for end in ends:
        piece = text[None, end - length : end]
        with torch.no_grad():
            logits = model(piece).logits[0, -MEASURED - 1 : -1]
        found.append(float(torch.nn.functional.cross_entropy(logits.float(), piece[0, -MEASURED:])))
    return found
