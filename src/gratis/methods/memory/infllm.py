"""Read far beyond the trained window: a local window, the first tokens, and the past blocks that matter to the query.

C. Xiao, P. Zhang, X. Han, G. Xiao, Y. Lin, Z. Zhang, Z. Liu and M. Sun, "InfLLM: Training-Free Long-Context
Extrapolation for LLMs with an Efficient Context Memory", NeurIPS 2024. The scores of representative tokens and the
distances are those of the released code (attention received; everything outside the window at distance window - 1).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import MemoryShortError, ParameterError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.block_store import BlockStore, HotBlocks, gib
from gratis.subjects.language import CachedLayer, Rotation, cached_layers, input_device, text_config
from gratis.subjects.looked_up import LookedUp
from gratis.subjects.memory_need import Footprint
from gratis.subjects.reading_door import Reading
from gratis.subjects.recent_entries import RecentEntries
from gratis.subjects.unrotated_door import LayerMemory, Text, check_memory, install_memory


class InfLLM(Attachable):
    """Look up, per layer and per token, which blocks of a long past to attend to beside the latest tokens.

    Nothing is forgotten: all keys and values are kept, in main memory or in a file, and the model's device holds the
    window and what was looked up. Made for recalling things said once in a long text; what has to be gathered from all
    of it (counting, summaries) is limited to what the retrieved blocks contain.
    """

    card = Card(
        title="InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
        authors="Xiao, Zhang, Han, Xiao, Lin, Zhang, Liu, Sun",
        year=2024,
        seed=100,
        paper="NeurIPS 2024",
        acts_on="language model",
        free_of=("training", "fine-tuning", "labels", "changed position embeddings"),
        summary="text of any length, with the blocks of its past that matter looked up",
        unchanged_when={"window": 200},
        examples={
            "window": 16,
            "sinks": 2,
            "block": 4,
            "blocks": 2,
            "lookup": 8,
            "hot_blocks": 4,
            "representatives": 2,
        },
        any_length=True,
        holds=("kv cache", "attention", "key of the first token", "scale of attention", "text of a pass"),
        why={
            "kv cache": "keeps the text in blocks of its own and leaves no cache behind",
            "attention": "attends by itself, to its window and to the blocks that it looked up",
            "key of the first token": "keeps keys as they were before rotation and turns them anew",
            "scale of attention": "sees everything outside its window from one distance, however long the text is",
            "text of a pass": "remembers one text in every pass of the model",
        },
        differs=(
            "A query attends to a token either inside its window or outside, never both: the released prefill counts up "
            "to lookup - 1 tokens twice. Scores are summed in float32. Rotary frequencies are the model's own, scaling "
            "included. A text that fits the window is left to the model. Blocks are scored by one product with all "
            "representatives, which has no use for an index of them."
        ),
        limits=(
            "Time without gain for texts within the trained window. Rows of unequal length, beams and assistants are "
            "refused once the text outgrows the window."
        ),
        claims=(
            Claim(
                name="finds the pass key in 10,000 tokens, past the trained window, as often as the full cache or more",
                task="pass-key-retrieval",
                metric="accuracy",
                compare="difference",
                at_least=0.0,
                parameters={"window": 1024, "sinks": 32, "block": 64, "blocks": 16, "lookup": 128},
                task_parameters={"length": 10000, "depths": 3, "trials": 1, "chunk": 128},
            ),
            Claim(
                name="finds at least two of three pass keys in 10,000 tokens",
                task="pass-key-retrieval",
                metric="accuracy",
                compare="value",
                at_least=0.66,
                parameters={"window": 1024, "sinks": 32, "block": 64, "blocks": 16, "lookup": 128},
                task_parameters={"length": 10000, "depths": 3, "trials": 1, "chunk": 128},
            ),
            Claim(
                name="finds more of them than a sliding window that attends to as many tokens",
                task="pass-key-retrieval",
                metric="accuracy",
                compare="difference",
                at_least=0.5,
                against="sliding-window",
                against_parameters={"budget": 2080, "sinks": 32},
                parameters={"window": 1024, "sinks": 32, "block": 64, "blocks": 16, "lookup": 128},
                task_parameters={"length": 10000, "depths": 3, "trials": 1, "chunk": 128},
            ),
        ),
    )

    window: int = param(4096, above=1, unit="tokens", help="latest tokens, attended to as usual", search=(512, 4096))
    sinks: int = param(128, at_least=1, at_most=4096, unit="tokens", help="first tokens, always attended to")
    block: int = param(128, at_least=1, unit="tokens", help="size of a block of the past", search=(32, 256))
    blocks: int = param(16, at_least=1, unit="blocks", help="blocks that are looked up", search=(4, 96))
    representatives: int = param(4, at_least=1, unit="tokens", help="tokens per block and head that stand for it")
    representatives_in: Literal["device", "memory"] = param(
        "device", help="where those are kept and scored: what the device holds grows with the text, or not at all"
    )
    lookup: int | None = param(
        None, at_least=1, unit="tokens", help="tokens of a prompt that share one look-up; None is 512, or the window"
    )
    chunk: int | None = param(8192, above=0, unit="tokens", help="read prompts of generate in pieces of this length")
    store: Literal["memory", "file", "device"] = param("memory", help="where blocks are kept that are not looked up")
    hot_blocks: int = param(32, at_least=1, unit="blocks", help="blocks of a file or other device that are kept near")
    eviction: Literal["lru", "lru-s"] = param(
        "lru", help="which of those make room: the least recently used, or the least attended to"
    )
    decay: float = param(0.1, at_least=0, at_most=1, help="factor of earlier attention under lru-s")
    per_head: bool = param(False, help="every query head looks up blocks of its own")
    score: Literal["attention", "logits"] = param(
        "attention", help="representatives by attention received (released code), or by q·k (paper)"
    )
    distance_scale: float = param(1.0, above=0, help="factor of all distances")
    base: float | None = param(
        None, above=1, help="rotary base of texts that outgrow the window; None: the model's own frequencies"
    )
    together: int = param(
        1, at_least=1, unit="look-ups", help="look-ups of a prompt whose scores are computed at once, older blocks only"
    )
    memory_budget: float | None = param(
        None, above=0, unit="GiB", help="main memory that blocks may take; None: what is free"
    )
    compat: bool = param(
        False, help="as the released prefill: tokens between window and blocks may be attended to twice"
    )

    def check_parameters(self) -> None:
        if self.lookup is not None and self.lookup > self.window:
            raise ParameterError(f"InfLLM: lookup {self.lookup} must be at most window {self.window}.")
        if self.hot_blocks < self.blocks:
            raise ParameterError(f"InfLLM: hot_blocks {self.hot_blocks} must be at least blocks {self.blocks}.")
        if self.representatives > self.block:
            raise ParameterError(f"InfLLM: representatives {self.representatives} must be at most block {self.block}.")

    def check(self, subject: Any) -> None:
        # Memories that hold a text whole must compute what the model does, which other distances would hide.
        plain = self.replace(distance_scale=1.0, base=None)
        check_memory(subject, type(self).__name__, self.window, plain._memories)

    def install(self, subject: Any, scope: Scope) -> Any:
        layers = cached_layers(subject, type(self).__name__)
        there = "" if self.store == "file" else "use store='file', or "

        def announce(rows: int, tokens: int) -> None:
            stored = max(tokens - self.window - self.sinks, 0) // self.block * self.block
            each = rows * sum(layer.numbers for layer in layers) * subject.dtype.itemsize
            self._check_budget(stored * each, stored, tokens)

        reading = Reading(
            type(self).__name__, self.window, self.chunk, False,
            lambda rows, tokens: self._footprint(subject, layers, rows, tokens), f"{there}pass a shorter text", announce,
        )  # fmt: skip
        return install_memory(subject, type(self).__name__, self.window, self._memories, scope, reading)

    def _memories(self, turns: list[Rotation], text: Text) -> list[LayerMemory]:
        return [BlockMemory(self, turn, text, len(turns)) for turn in turns]

    def _check_budget(self, size: int, stored: int, tokens: int) -> None:
        """Refuse blocks of `size` bytes, `stored` tokens of a text of `tokens`, that exceed the memory budget."""
        if self.memory_budget is None or self.store == "file" or size <= self.memory_budget * 2**30:
            return
        fits = int(self.memory_budget * 2**30 * stored / size) // self.block * self.block
        raise MemoryShortError(
            f"InfLLM: blocks of {tokens:,} tokens take {gib(size)}, over the memory_budget of {self.memory_budget} GiB: "
            f"about {self.window + self.sinks + fits:,} tokens fit; raise it, or use store='file'."
        )

    def footprint(self, model: Any, tokens: int, rows: int = 1) -> Footprint:
        """Bytes that `rows` texts of `tokens` tokens take at most on `model`: grows with the text in `store` only."""
        return self._footprint(model, cached_layers(model, type(self).__name__), rows, tokens)

    def _footprint(self, model: Any, layers: list[CachedLayer], rows: int, tokens: int) -> Footprint:
        size, sinks = model.dtype.itemsize, min(self.sinks, tokens)
        stored = tokens // self.block * self.block if tokens > self.window else 0
        piece = min(tokens, self.chunk or tokens)
        recent = min(tokens, 2 * self.window + 2 * self.block + piece)
        far = sinks + self.blocks * self.block if stored else 0
        heads = int(text_config(model).num_attention_heads)
        apart = self.store == "file" or (self.store == "memory" and input_device(model).type != "cpu")
        hot = self.hot_blocks * self.block if stored and apart else 0
        near = blocks = standing = 0
        for layer in layers:
            # Recent keys are kept as they came and turned.
            near += recent * (layer.numbers + layer.heads * layer.key_dim) * size
            near += far * layer.numbers * size * (heads // layer.heads if self.per_head else 1)
            near += hot * layer.numbers * size + 4 * heads * recent
            standing += 4 * heads * layer.key_dim * (stored // self.block) * 3 // 2
            blocks += stored * layer.numbers * size
        # What grows by half at a time is copied meanwhile.
        blocks = rows * blocks if self.store == "file" else rows * blocks * 3 // 2
        where = {"file": "file", "memory": "main", "device": "device"}[self.store]
        parts = {"device": rows * near, "main": 0, "file": 0}
        parts[where] += blocks
        parts["device" if self.representatives_in == "device" else "main"] += rows * standing
        return Footprint(**parts)


class BlockMemory:
    """One layer's past: recent entries in one piece, older ones in blocks of which a few are attended to.

    Positions count from the start of the text. Shapes are (rows, query or key heads, length, head_dim).
    """

    def __init__(self, method: InfLLM, turn: Rotation, text: Text, layers: int = 1) -> None:
        self.method, self.turn, self.text = method, turn, text
        self._layers = layers
        self._wrote = turn
        """The rotation of what the model wrote into its cache."""
        if method.base is not None and not turn.none:
            pairs = turn.frequencies.numel()
            powers = torch.arange(0, 2 * pairs, 2).double() / (2 * pairs)
            self.turn = replace(turn, frequencies=(method.base**-powers).to(turn.frequencies.dtype))
        self._together = method.lookup if method.lookup is not None else min(512, method.window)
        self._heads = 0
        """Query heads."""
        self.recent = RecentEntries(method.window, method.block)
        self.store = BlockStore(method.store, "InfLLM")
        self.standing: Tensor | None = None
        """Representatives of blocks (rows, room, query heads, head_dim), float32, where the method wants them."""
        self._hot: HotBlocks | None = None
        self._far: LookedUp | None = None
        self._lookups = 0
        self._ahead: list[NDArray[np.int64]] = []
        """What the next look-ups want, where several were scored at once."""

    # What the model's own cache would keep, while the text fits the window

    @property
    def keys(self) -> Tensor | None:
        """(rows, key heads, length, head_dim) of recent entries: rotated by the model, later as it wrote them."""
        recent = self.recent
        if recent.empty:
            return None
        return (recent.plain if recent.keeps_plain else recent.turned)(recent.first, recent.end)

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return None if self.recent.empty else self.recent.values(self.recent.first, self.recent.end)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.recent.append(keys, values)
        return self.recent.turned(0, self.recent.end), self.recent.values(0, self.recent.end)

    def watch(self, query: Tensor, scaling: float, first: Tensor | None = None) -> None:
        """Sum up the attention that tokens receive, as `read` does later."""
        end, self._heads = self.recent.end, query.shape[1]
        keys = self.recent.turned(0, end)
        for at in range(0, query.shape[2], self._together):
            part = query[:, :, at : at + self._together]
            begin = end - query.shape[2] + at
            mask = self.text.mask(part.shape[2], end, begin, end + 1, part.device)
            logits = _products(part, keys).float() * scaling
            if first is not None:
                logits[..., 0] += first[:, None]
            self._score(logits, mask, (logits + mask).softmax(-1), 0)

    def leave_window(self) -> None:
        """Turn what the model rotated back to position 0."""
        recent, scale = self.recent, self.method.distance_scale
        recent.keep_plain()
        if recent.empty:
            return
        turned = recent.turned(0, recent.end)
        keys = turned.to(torch.float32, copy=True)
        positions = torch.arange(recent.end, dtype=torch.float64)
        self._wrote.turn_(keys, -positions)
        recent.plain(0, recent.end).copy_(keys)
        if scale != 1 or self.turn is not self._wrote:
            turned.copy_(self.turn.turn_(keys, positions * scale))

    # Once it does not

    def read(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, first: Tensor | None = None) -> Tensor:
        """(rows, heads, length, head_dim), one look-up after the other."""
        length = query.shape[2]
        if length == 1:
            return self._read_together(query, key, value, scaling, first)
        ends = [*range(self._together, length, self._together), length]
        if self.text.seen + length == self.text.prompt_end and (length - 1) not in ends:
            # The last token of a prompt looks up for itself: it knows what was asked.
            ends.insert(-1, length - 1)
        outputs, begin = [], 0
        for number, stop in enumerate(ends):
            now = slice(begin, stop)
            if self.method.together > 1 and number % self.method.together == 0:
                self._score_ahead(query, begin, ends[number : number + self.method.together], scaling)
            outputs.append(self._read_together(query[:, :, now], key[:, :, now], value[:, :, now], scaling, first))
            begin = stop
        self._ahead = []
        return torch.cat(outputs, 2)

    def _read_together(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, first: Tensor | None) -> Tensor:
        """Attention of tokens that share a look-up: one softmax over first tokens, blocks, what is between, and window.

        first: (heads,) what is added to the logit of the text's first token.
        """
        method, recent, (_, heads, count, _) = self.method, self.recent, query.shape
        begin, end, self._heads = recent.end, recent.end + count, heads
        local, distant, turned = self._turned(query * scaling, key, begin, end)
        recent.append(turned, value, key)
        self._look_up(distant)
        near = max(recent.first, begin - method.window + 1)
        between = max(recent.first, end - method.window)
        logits, values = [], []
        if self._far is not None:
            keys, far_values = self._far.attended(self.store.count)
            logits.append(_products(distant, keys))
            values.append(far_values)
        if between > recent.first:
            logits.append(_products(distant, recent.plain(recent.first, between)))
            values.append(recent.values(recent.first, between))
            if count > 1 and not method.compat:
                width, offset = between - recent.first, begin - recent.first
                logits[-1] += self.text.mask(count, width, offset, method.window, query.device, outside=True)
        close = _products(local, recent.turned(near, end))
        logits.append(close)
        values.append(recent.values(near, end))
        inside = None
        if count > 1:
            inside = self.text.mask(count, end - near, begin - near, method.window, query.device)
            logits[-1] = close + inside.to(close.dtype)
        if first is not None:
            # It is the first of what is kept, wherever that is; some queries may have it in their window, some not.
            logits[0][..., 0] += first[:, None]
            if near == 0 and len(logits) > 1:
                logits[-1][..., 0] += first[:, None]
        weights = torch.cat(logits, -1).softmax(-1, dtype=torch.float32)
        output = _weighted(weights.to(value.dtype), values)
        self._score(close, inside, weights[..., -(end - near) :], near)
        if self._hot is not None and self._far is not None and method.eviction == "lru-s":
            self._far.note_attention(weights, self.store.count, self._hot)
        self._pack()
        return output

    def _turned(self, query: Tensor, key: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries at their positions, and as they see what is outside the window: from its far end; keys at theirs."""
        if self.turn.none:
            return query, query, key
        last, scale = self.method.window - 1, self.method.distance_scale
        if query.shape[2] == 1:
            # All of a single token's in one go: it costs what the calls cost.
            heads, turned = query.shape[1], torch.cat([query, query, key], 1)
            stands = ((last, heads), (begin, heads + key.shape[1]))
            self.turn.turn_by_(turned, self.text.angles_of_heads(self.turn, stands, query, scale))
            return turned[:, heads : 2 * heads], turned[:, :heads], turned[:, 2 * heads :]
        far_end = self.text.angles(self.turn, last, last + 1, query, scale)
        distant = self.turn.turn_by_(query.clone(memory_format=torch.contiguous_format), far_end)
        both = self.turn.turn_by_(torch.cat([query, key], 1), self.text.angles(self.turn, begin, end, query, scale))
        return both[:, : query.shape[1]], distant, both[:, query.shape[1] :]

    def _look_up(self, query: Tensor) -> None:
        """Fetch the blocks whose representatives agree best with the mean of these queries (rows, heads, n, head_dim)."""
        known = self.store.count
        if self._far is None:
            return
        rows, heads = query.shape[:2]
        if self._ahead:
            wanted = self._ahead.pop(0)
        elif known <= self.method.blocks:
            wanted = np.tile(np.arange(known), (rows * (heads if self.method.per_head else 1), 1))
        else:
            mean = query[:, :, 0].float() if query.shape[2] == 1 else query.float().mean(2)
            wanted = self._best(mean[:, None], known)[0]
        self._lookups += 1
        self._far.fetch(wanted, self.store, self._hot)

    def _best(self, means: Tensor, known: int) -> NDArray[np.int64]:
        """(n, groups, blocks) numbers of the `known` blocks that agree best with (rows, n, heads, head_dim)."""
        assert self.standing is not None
        standing = self.standing[:, :known]
        means = means.to(standing.device)
        if self.method.per_head:
            scores = torch.einsum("rnhd,rlhd->lrhn", standing, means).flatten(1, 2)
        else:
            scores = (standing.flatten(2) @ means.flatten(2).transpose(1, 2)).permute(2, 0, 1)
        wanted: NDArray[np.int64] = scores.topk(self.method.blocks, sorted=False).indices.cpu().numpy()
        return wanted

    def _score_ahead(self, query: Tensor, begin: int, ends: list[int], scaling: float) -> None:
        """Decide the look-ups of the pieces that stop at `ends` in one product; none while all blocks are taken."""
        known = self.store.count
        if known <= self.method.blocks:
            return
        part = query[:, :, begin : ends[-1]]
        distant = self._turned(part * scaling, part[:, :0], 0, part.shape[2])[1].float()
        sizes = [stop - start for start, stop in zip([begin, *ends], ends, strict=False)]
        means = torch.stack([piece.mean(2) for piece in distant.split(sizes, 2)], 1)
        self._ahead = list(self._best(means, known))

    # Keeping

    def _score(self, logits: Tensor, mask: Tensor | None, weights: Tensor, start: int) -> None:
        """Add to the scores of tokens from `start` on what logits and weights (rows, heads, queries, length) give."""
        received = weights
        if self.method.score == "logits":
            received = logits.float() if mask is None else logits.float() * (mask == 0)
        received = received[:, :, 0] if received.shape[2] == 1 else received.sum(2)
        self.recent.score(received, start, start + received.shape[2])

    def _pack(self) -> None:
        """Make blocks of what left the window: first the first tokens are set aside, then whole blocks follow."""
        method, recent = self.method, self.recent
        start = max(recent.first, method.sinks)
        count = (recent.end - start - method.window) // method.block
        if count < 1:
            return
        stop = start + count * method.block
        if method.memory_budget is not None:
            each = sum(tensor.nbytes // count for tensor in (recent.plain(start, stop), recent.values(start, stop)))
            blocks = self.store.count + count
            method._check_budget(blocks * each * self._layers, blocks * method.block, recent.end)
        if self._far is None:
            heads = self._heads if method.per_head else None
            first = recent.plain(0, method.sinks), recent.values(0, method.sinks)
            self._far = LookedUp(*first, method.blocks, method.block, heads)
        keys, values, scores = (
            entries(start, stop).unflatten(2, (count, method.block))
            for entries in (recent.plain, recent.values, recent.scores)
        )
        self._stand(keys, scores)
        self.store.append(keys.permute(2, 0, 1, 3, 4), values.permute(2, 0, 1, 3, 4))
        if self._hot is None and not self.store.near:
            self._hot = HotBlocks(method.hot_blocks * len(keys), method.eviction, method.decay, keys.device)
        recent.forget(stop)

    def _stand(self, keys: Tensor, scores: Tensor) -> None:
        """Per query head, the mean key of the tokens of a block (rows, heads, blocks, block, …) that mattered most."""
        rows, groups, count, _, dim = keys.shape
        best = scores.topk(self.method.representatives, -1, sorted=False).indices
        best = best.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)
        picked = keys.float().gather(3, best[..., None].expand(*best.shape, dim))
        means = picked.unflatten(3, (self._heads // groups, -1)).mean(4)
        fresh = means.permute(0, 2, 1, 3, 4).reshape(rows, count, self._heads, dim)
        if self.method.representatives_in == "memory":
            fresh = fresh.cpu()
        known = self.store.count
        if self.standing is None or self.standing.shape[1] < known + count:
            grown = fresh.new_empty(rows, (known + count) * 3 // 2 + 16, self._heads, dim)
            if self.standing is not None:
                grown[:, :known] = self.standing[:, :known]
            self.standing = grown
        self.standing[:, known : known + count] = fresh

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockMemory:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            setattr(new, name, value if name in {"method", "turn", "_wrote"} else copy.deepcopy(value, memo))
        return new

    def select_rows(self, rows: Tensor) -> None:
        self.recent.select_rows(rows)
        self.store.select_rows(rows)
        if self.standing is not None:
            self.standing = self.standing[rows.to(self.standing.device)]
        if self._far is not None:
            self._far.select_rows(rows)
        if self._hot is not None:
            self._hot.empty(self.method.hot_blocks * len(rows))

    @property
    def bytes(self) -> int:
        """Memory held, files not counted."""
        return sum(self._near_and_far_bytes) + self.store.bytes

    @property
    def _near_and_far_bytes(self) -> tuple[int, int]:
        """Of what the device holds, and of representatives in main memory."""
        near = sum(part.bytes for part in (self.recent, self._far, self._hot) if part is not None)
        standing = int(self.standing.nbytes) if self.standing is not None else 0
        return (near + standing, 0) if self.method.representatives_in == "device" else (near, standing)

    def report(self) -> dict[str, Any]:
        """Counts and bytes, and where the blocks begin that the last token (or tokens) looked up, per group."""
        chosen = np.empty(0, dtype=np.int64) if self._far is None else self._far.chosen
        near, far = self._near_and_far_bytes
        counts = dict(self._hot.counts) if self._hot is not None else {"hot_hits": 0, "hot_misses": 0}
        return {
            "blocks": self.store.count,
            "lookups": self._lookups,
            "near_bytes": near,
            "stored_bytes": self.store.stored_bytes + far,
            **counts,
            "retrieved": (np.unique(chosen[chosen >= 0]) * self.method.block + self.method.sinks).tolist(),
        }


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """(rows, heads, n, length) of queries (rows, heads, n, head_dim) and keys (rows, key heads, length, head_dim)."""
    rows, heads, count, dim = queries.shape
    # Heads that share a key head lie one under another.
    grouped = queries.reshape(rows * keys.shape[1], -1, dim)
    return torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).view(rows, heads, count, -1)


def _weighted(weights: Tensor, parts: list[Tensor]) -> Tensor:
    """(rows, heads, n, head_dim): weights (rows, heads, n, all) of values (rows, key heads, length, head_dim) in parts."""
    rows, heads, count, _ = weights.shape
    output = weights.new_zeros(rows, heads, count, parts[0].shape[3])
    for part, values in zip(weights.split([part.shape[2] for part in parts], -1), parts, strict=True):
        grouped = rows * values.shape[1]
        output.view(grouped, -1, values.shape[3]).baddbmm_(
            part.reshape(grouped, -1, values.shape[2]), values.flatten(0, 1)
        )
    return output
