"""Read a long text piece by piece: does the model read on, and at what cost?"""

from __future__ import annotations

import statistics
import time
from typing import Any, Literal

from gratis.contract.errors import SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Series, Task, TaskCard, silent


class StreamingPerplexity(Task):
    """Loss along a long text that is fed to the model in pieces, with its cache carried on."""

    card = TaskCard(
        title="Streaming perplexity",
        acts_on="language model",
        subject="smollm2",
        untouched="full cache",
        warm_up={"tokens": 768, "chunk": 128},
        data="English documentation prose that ships with Python, in its order, from a place chosen by the seed",
        metrics=(
            Metric(name="loss", help="mean next-token loss", unit="nats", higher_is_better=False),
            Metric(
                name="tail_loss", help="mean next-token loss of the last sixth", unit="nats", higher_is_better=False
            ),
            Metric(
                name="cache_bytes",
                help="keys and values held at the end",
                unit="bytes",
                higher_is_better=False,
                cost=True,
            ),
            Metric(
                name="token_seconds",
                help="median processor time per token in the last sixth",
                unit="s",
                higher_is_better=False,
                cost=True,
            ),
            Metric(
                name="slowdown",
                help="time per token in the last sixth relative to the second sixth",
                higher_is_better=False,
                cost=True,
            ),
        ),
    )

    tokens: int = param(12000, above=12, unit="tokens", help="length of the text")
    chunk: int = param(128, above=0, unit="tokens", help="tokens per forward pass")
    prose: Literal["documentation", "repeated"] = param("documentation", help="running prose, or repeated filler")

    def check(self, subject: Any) -> None:
        if self.tokens < 6 * self.chunk:
            raise SubjectError(f"streaming-perplexity needs at least six pieces: lower chunk below {self.tokens // 6}.")

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import torch

        from gratis.subjects import tokenizer_of
        from gratis.subjects.text import FILLER, documentation, tokens_of

        text = documentation() if self.prose == "documentation" else FILLER
        start = 0 if seed == 0 else (seed * 7919) % 50000
        ids = tokens_of(tokenizer_of(subject), text, self.tokens + 1, start).to(subject.device)
        losses: list[float] = []
        held: list[float] = []
        seconds: list[float] = []
        ends: list[int] = []
        cache, previous = None, None
        with torch.no_grad():
            for at in range(0, self.tokens, self.chunk):
                piece = ids[:, at : min(at + self.chunk, self.tokens)]
                began = time.process_time()
                out = subject(input_ids=piece, past_key_values=cache, use_cache=True)
                seconds.append((time.process_time() - began) / piece.shape[1])
                cache = out.past_key_values
                logits = out.logits[0].float()
                if previous is not None:
                    losses.append(_loss(previous, piece[0, :1]))
                losses.extend(_losses(logits[:-1], piece[0, 1:]))
                previous = logits[-1:]
                held.append(_bytes(cache))
                ends.append(at + piece.shape[1])
                progress(ends[-1] / self.tokens, f"{ends[-1]:,} of {self.tokens:,} tokens read")
        assert previous is not None
        losses.append(_loss(previous, ids[0, self.tokens :]))
        window = getattr(subject.config.get_text_config(), "max_position_embeddings", None)
        return self._measurement(losses, held, seconds, ends, window)

    def _measurement(
        self, losses: list[float], held: list[float], seconds: list[float], ends: list[int], window: int | None
    ) -> Measurement:
        tail = losses[-len(losses) // 6 :]
        marks = [(float(window), "trained window")] if window else []
        sixth = max(len(seconds) // 6, 1)
        last, second = statistics.median(seconds[-sixth:]), statistics.median(seconds[sixth : 2 * sixth])
        pieces = [losses[i : i + 64] for i in range(0, len(losses), 64)]
        tail_pieces = [tail[i : i + 64] for i in range(0, len(tail), 64)]
        return Measurement(
            metrics={
                "loss": statistics.fmean(losses),
                "tail_loss": statistics.fmean(tail),
                "cache_bytes": held[-1],
                "token_seconds": last,
                "slowdown": last / second if second else float("nan"),
            },
            items={
                "loss": [statistics.fmean(p) for p in pieces],
                "tail_loss": [statistics.fmean(p) for p in tail_pieces],
            },
            series={
                "loss": Series(
                    [64 * i + len(p) / 2 for i, p in enumerate(pieces)],
                    [statistics.fmean(p) for p in pieces],
                    "position in the text (tokens)",
                    "loss (nats)",
                    marks,
                ),
                "seconds": Series(ends, seconds, "position in the text (tokens)", "time per token (s)", marks),
                "memory": Series(ends, held, "position in the text (tokens)", "cache (bytes)", marks),
            },
            tokens=self.tokens,
            calls=len(ends),
        )


def _losses(logits: Any, targets: Any) -> list[float]:
    import torch

    if not len(targets):
        return []
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()  # type: ignore[no-any-return]


def _loss(logits: Any, target: Any) -> float:
    return _losses(logits, target)[0]


def _bytes(cache: Any) -> float:
    """Bytes of keys and values that a transformers cache holds, counting memory and not the views on it.

    A cache that keeps more than its layers show says so itself, as `bytes`.
    """
    if hasattr(cache, "bytes"):
        return float(cache.bytes)
    stores: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                storage = tensor.untyped_storage()
                stores[storage.data_ptr()] = storage.nbytes()
    return float(sum(stores.values()))
