"""Read a long text to its end, and recall what was said once in another: what a memory is for, in one go."""

from __future__ import annotations

from typing import Any

from gratis.contract.parameters import param
from gratis.tasks.pass_key_retrieval import PassKeyRetrieval
from gratis.tasks.streaming_perplexity import StreamingPerplexity
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent


class LongReading(Task):
    """Loss along a long text, and pass keys found at several depths of a text of filler.

    Two texts, as a small model recalls numbers in filler long before it does in prose.
    """

    card = TaskCard(
        title="Long reading",
        acts_on="language model",
        subject="smollm2",
        untouched="full cache",
        warm_up={"tokens": 768, "recall": 768, "trials": 1},
        data="documentation prose that ships with Python; and pass keys planted at evenly spaced depths in filler",
        metrics=(
            Metric(name="recall", help="share of pass keys that were named"),
            Metric(
                name="tail_loss",
                help="mean next-token loss of the last sixth of the prose",
                unit="nats",
                higher_is_better=False,
            ),
            Metric(name="loss", help="mean next-token loss of the prose", unit="nats", higher_is_better=False),
            Metric(
                name="cache_bytes",
                help="keys and values held at the end of the prose",
                unit="bytes",
                higher_is_better=False,
                cost=True,
            ),
            Metric(
                name="token_seconds",
                help="median processor time per token in the last sixth of the prose",
                unit="s",
                higher_is_better=False,
                cost=True,
            ),
            Metric(
                name="slowdown",
                help="time per token in the last sixth of the prose relative to its second sixth",
                higher_is_better=False,
                cost=True,
            ),
        ),
    )

    tokens: int = param(12000, above=12, unit="tokens", help="length of the prose")
    chunk: int = param(128, above=0, unit="tokens", help="tokens per forward pass")
    recall: int = param(4000, above=64, unit="tokens", help="length of the text that hides a key")
    depths: int = param(3, above=0, help="evenly spaced depths of the key")
    trials: int = param(1, above=0, help="keys per depth")

    def check(self, subject: Any) -> None:
        self._reading.check(subject)
        self._recalling.check(subject)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        share = self.tokens / (self.tokens + self.recall * self.depths * self.trials)
        read = self._reading.measure(subject, seed=seed, progress=lambda done, words: progress(share * done, words))
        recalled = self._recalling.measure(
            subject, seed=seed, progress=lambda done, words: progress(share + (1 - share) * done, words)
        )
        return Measurement(
            metrics={**read.metrics, "recall": recalled.metrics["accuracy"]},
            items={**read.items, "recall": recalled.items["accuracy"]},
            series={"recall": recalled.series["accuracy"], **read.series},
            tokens=read.tokens + recalled.tokens,
            calls=read.calls + recalled.calls,
        )

    @property
    def _reading(self) -> StreamingPerplexity:
        return StreamingPerplexity(tokens=self.tokens, chunk=self.chunk)

    @property
    def _recalling(self) -> PassKeyRetrieval:
        return PassKeyRetrieval(length=self.recall, depths=self.depths, trials=self.trials, chunk=self.chunk)
