"""Keep different old tokens in different layers, so that a small cache spans a long history.

D. Shi, Y. Fu, X. Yuan, Z. Yu, H. You, S. Li, X. Dong, J. Kautz, P. Molchanov and Y. Lin, "LaCache: Ladder-Shaped KV
Caching for Efficient Long-Context Modeling of Large Language Models", ICML 2025. The index rule is that of the released
code (several short ladders stacked along the depth), which differs from the single ladder drawn in the paper.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import ParameterError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.bounded_cache import Selection, bounded_footprint, check_bounded_cache, install_bounded_cache
from gratis.subjects.memory_need import Footprint


class LaCache(Attachable):
    """Generate text of any length in constant memory, with old tokens thinned out instead of cut off.

    When the cache is full, groups of neighbouring entries ("ladders") are thinned from the oldest on: of each ladder
    every layer keeps a few entries, and neighbouring layers keep neighbouring ones. When all were thinned, it starts
    over, so that the older a text is, the sparser it is kept.
    """

    card = Card(
        title="LaCache: Ladder-Shaped KV Caching for Efficient Long-Context Modeling of Large Language Models",
        authors="Shi, Fu, Yuan, Yu, You, Li, Dong, Kautz, Molchanov, Lin",
        year=2025,
        seed=24,
        paper="ICML 2025",
        acts_on="language model",
        free_of=("training", "fine-tuning", "labels", "attention maps"),
        summary="text of any length in constant memory, the old part thinned out by layer",
        unchanged_when={"budget": 200},
        examples={"budget": 24, "sinks": 4, "span": 1},
        any_length=True,
        holds=("kv cache",),
        why={"kv cache": "evicts from the cache and moves what it keeps to other positions"},
        differs=(
            "Keys are turned to their new slots when entries are evicted instead of all keys at every step; a prompt "
            "much longer than the budget is thinned in several rounds where the released rule would under-fill the "
            "cache or run out of range."
        ),
        limits="Eviction is by position and final: a distant token is recalled only by the layers that kept it.",
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
            Claim(
                name="memory stays bounded: cache at 12,000 tokens relative to the full cache",
                task="streaming-perplexity",
                metric="cache_bytes",
                compare="ratio",
                at_most=0.2,
                parameters={"budget": 1024},
                task_parameters={"tokens": 12000, "chunk": 128},
            ),
            Claim(
                name="on documentation text it is no better than the plain sliding window, and at most 0.05 nats worse",
                task="streaming-perplexity",
                metric="tail_loss",
                compare="difference",
                at_most=0.05,
                against="sliding-window",
                against_parameters={"budget": 1024},
                parameters={"budget": 1024},
                task_parameters={"tokens": 12000, "chunk": 128},
            ),
        ),
    )

    budget: int = param(1024, above=1, unit="tokens", help="entries kept per layer", search=(256, 4096))
    sinks: int = param(
        4, at_least=1, unit="tokens", help="first tokens, never thinned; counted in budget", search=(1, 128)
    )
    span: int | None = param(None, above=0, unit="layers", help="layers that keep a token; None is half of the layers")
    overlap: int = param(0, at_least=0, unit="layers", help="layers that neighbouring tokens share")
    pattern: Literal["released", "contiguous"] = param(
        "released", help="short ladders stacked along the depth (released code), or one ladder (as drawn in the paper)"
    )
    chunk: int | None = param(
        None,
        above=0,
        unit="tokens",
        help="read prompts of generate in pieces of this length, thinning in between; None: at once, up to the window",
    )
    share: float | None = param(
        None, above=0, at_most=1, help="keep this share of each text's prompt (or first piece), at most budget tokens"
    )

    def check_parameters(self) -> None:
        if self.span is not None and self.overlap >= self.span:
            raise ParameterError(f"LaCache: overlap {self.overlap} must be below span {self.span}.")

    def check(self, subject: Any) -> None:
        layers = check_bounded_cache(subject, type(self).__name__, self.budget)
        Ladders(self, layers)

    def install(self, subject: Any, scope: Scope) -> Any:
        def begin(layers: int, length: int) -> Ladders:
            return Ladders(self, layers, None if self.share is None else int(self.share * length))

        return install_bounded_cache(subject, type(self).__name__, self.budget, self.chunk, begin, scope)

    def footprint(self, model: Any, tokens: int, rows: int = 1) -> Footprint:
        """Bytes that `rows` texts of `tokens` tokens take at most on `model`."""
        return bounded_footprint(model, type(self).__name__, self.budget, self.chunk, rows, tokens)


class Ladders:
    """The thinning of one cache: budget, cursor (slots before it are thinned already), and the rule.

    A ladder is `tall` neighbouring slots, of which every layer keeps `kept`; layer i keeps those from offset i on.
    """

    def __init__(self, method: LaCache, layers: int, kept: int | None = None) -> None:
        """The rule for one text of a model of `layers` layers; `kept` entries per layer where that is below budget."""
        span = method.span if method.span is not None else layers // 2
        if span < 1 or span > layers:
            raise ParameterError(f"LaCache: span {span} must be between 1 and the model's {layers} layers.")
        if method.overlap >= span:
            raise ParameterError(f"LaCache: overlap {method.overlap} must be below span {span}.")
        step = span - method.overlap
        self.layers, self.sinks, self.pattern = layers, method.sinks, method.pattern
        self.tall = 1 + -(-(layers - span) // step)
        self.kept = min(-(-span // step), self.tall)
        self.removed = self.tall - self.kept
        if self.removed < 1:
            raise ParameterError(f"LaCache: a span of {span} of {layers} layers thins nothing out; lower it.")
        least = method.sinks + layers + self.tall
        if method.budget < least:
            raise ParameterError(
                f"LaCache: budget {method.budget} is below {least}, the least for {layers} layers, {method.sinks} "
                f"sinks and ladders of {self.tall}; raise it."
            )
        self.budget = method.budget if kept is None else min(method.budget, max(kept, least))
        self.cursor = method.sinks
        self.first = True

    def select(self, length: int) -> list[Selection]:
        """What to keep of `length` entries per layer after a forward pass (the released rule, steps 2 to 6)."""
        if length <= self.budget:
            return []
        if self.first:
            # Raised once, so that the average length over a cycle of thinning is the requested budget.
            self.budget += self.removed // 2
            self.first = False
        need = length - self.budget
        if need <= 0:
            return []
        room = max(self.budget - self.cursor - self.layers, 0)
        ladders = room // self.kept
        if need <= ladders * self.removed:
            return [self._thin(length, self.cursor, -(-need // self.removed), 1)]
        return self._start_over(length, ladders, need)

    def _start_over(self, length: int, ladders: int, need: int) -> list[Selection]:
        """Finish the pass at the cursor, then thin from the sinks again, with wider ladders after a long prompt."""
        chosen = []
        ladders = min(ladders, (length - self.cursor) // self.tall)
        if ladders:
            chosen.append(self._thin(length, self.cursor, ladders, 1))
            length, need = chosen[-1].kept, need - ladders * self.removed
        per_pass = (self.budget - self.sinks - self.layers) // self.kept * self.removed
        stride = -(-need // per_pass)
        tall = self.tall + (stride - 1) * (self.tall - 1)
        count = -(-need // (tall - self.kept))
        last = self.sinks + tall * (count - 1) + (tall - self.kept) + stride * (self.kept - 1)
        fits = self.sinks + tall * count <= length and last < length
        under_filled = length - count * (tall - self.kept) < 0.9 * self.budget
        if fits and not under_filled:
            return [*chosen, self._thin(length, self.sinks, count, stride)]
        while need > 0:
            count = min(-(-need // self.removed), (length - self.sinks - self.layers) // self.tall)
            chosen.append(self._thin(length, self.sinks, count, 1))
            length, need = chosen[-1].kept, need - count * self.removed
        return chosen

    def _thin(self, length: int, start: int, count: int, stride: int) -> Selection:
        """Thin `count` ladders from slot `start` on, keeping every `stride`-th slot, and put the cursor behind them."""
        tall = self.tall + (stride - 1) * (self.tall - 1)
        removed = tall - self.kept
        layer = torch.arange(self.layers)
        offset = layer % (removed + 1)
        if self.pattern == "contiguous":
            offset = (layer * (removed + 1) // self.layers).clamp(max=removed)
        ladder: Tensor = start + tall * torch.arange(count)
        rung = stride * torch.arange(self.kept)
        middle = (offset[:, None, None] + ladder[:, None] + rung).reshape(self.layers, -1)
        self.cursor = start + count * self.kept
        return Selection(length, start, middle, length - start - tall * count)
