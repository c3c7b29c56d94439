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
from gratis.subjects.reading_door import Footprint, Reading
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
        holds=("kv cache", "attention", "attention to the first token", "scale of attention"),
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
        near = blocks = 0
        for layer in layers:
            # Recent keys are kept as they came and turned.
            near += recent * (layer.numbers + layer.heads * layer.key_dim) * size
            near += far * layer.numbers * size * (heads // layer.heads if self.per_head else 1)
            near += hot * layer.numbers * size + 4 * heads * recent
            near += 4 * heads * layer.key_dim * (stored // self.block) * 3 // 2
            blocks += stored * layer.numbers * size
        # What grows by half at a time is copied meanwhile.
        blocks = rows * blocks if self.store == "file" else rows * blocks * 3 // 2
        where = {"file": "file", "memory": "main", "device": "device"}[self.store]
        parts = {"device": rows * near, "main": 0, "file": 0}
        parts[where] += blocks
        return Footprint(**parts)


class BlockMemory:
    """One layer's past: recent entries in one piece, older ones in blocks of which a few are attended to.

    Positions count from the start of the text. `first` is that of the oldest recent entry, `end` that after the newest.
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
        self.first = self.end = 0
        self._left = False
        """Whether the text outgrew the window."""
        self._origin = 0
        """Position of the entry at the start of the memory of recent ones."""
        self._rotated: Tensor | None = None
        self._plain: Tensor | None = None
        self._values: Tensor | None = None
        self._scores: Tensor | None = None
        self._heads = 0
        self._together = method.lookup if method.lookup is not None else min(512, method.window)
        self._store = BlockStore(method.store, "InfLLM")
        self._hot: HotBlocks | None = None
        self._standing: Tensor | None = None
        """Representatives of blocks (rows, room, query heads, head_dim), float32."""
        self._far: tuple[Tensor, Tensor] | None = None
        """Keys and values (rows, heads, sinks + blocks * block, head_dim): the first tokens and what was looked up."""
        self._chosen = np.empty((0, 0), dtype=np.int64)
        """(groups, slots) numbers of the blocks in `_far`; -1 where none is. A group is a row, or a row's head."""
        self._lookups = 0
        self._ahead: list[NDArray[np.int64]] = []
        """What the next look-ups want, where several were scored at once."""

    # What the model's own cache would keep, while the text fits the window

    @property
    def keys(self) -> Tensor | None:
        """(rows, key heads, length, head_dim) of recent entries: rotated by the model, later as it wrote them."""
        source = self._plain if self._plain is not None else self._rotated
        return None if source is None else source[:, :, self.first - self._origin : self.end - self._origin]

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        source = self._values
        return None if source is None else source[:, :, self.first - self._origin : self.end - self._origin]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._make_room(keys, values)
        assert self._rotated is not None
        assert self._values is not None
        stop = self.end + keys.shape[2]
        self._rotated[:, :, self.end : stop] = keys
        self._values[:, :, self.end : stop] = values
        self.end = stop
        return self._rotated[:, :, :stop], self._values[:, :, :stop]

    def watch(self, query: Tensor, scaling: float) -> None:
        """Sum up the attention that tokens receive, as `read` does later."""
        assert self._rotated is not None
        keys = self._rotated[:, :, : self.end]
        self._ready_scores(query)
        for at in range(0, query.shape[2], self._together):
            part = query[:, :, at : at + self._together]
            begin = self.end - query.shape[2] + at
            mask = self.text.mask(part.shape[2], self.end, begin, self.end + 1, part.device)
            logits = _grouped(part, keys.shape[1]) @ keys.transpose(2, 3)
            self._score(logits.float() * scaling, mask, 0, self.end)

    def leave_window(self) -> None:
        """Turn what the model rotated back to position 0."""
        self._left = True
        if self._rotated is None:
            return
        keys = self._rotated[:, :, : self.end].to(torch.float32, copy=True)
        self._wrote.turn_(keys, -torch.arange(self.end) * 1.0)
        plain = torch.empty_like(self._rotated)
        plain[:, :, : self.end] = keys.to(plain.dtype)
        self._plain = plain
        if self.method.distance_scale != 1 or self.turn is not self._wrote:
            self.turn.turn_(keys, torch.arange(self.end) * self.method.distance_scale)
            self._rotated[:, :, : self.end] = keys.to(plain.dtype)

    # Once it does not

    def read(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(rows, heads, length, head_dim), one look-up after the other."""
        length = query.shape[2]
        ends = [*range(self._together, length, self._together), length]
        if length > 1 and self.text.seen + length == self.text.prompt_end and (length - 1) not in ends:
            # The last token of a prompt looks up for itself: it knows what was asked.
            ends.insert(-1, length - 1)
        outputs, begin = [], 0
        for number, stop in enumerate(ends):
            now = slice(begin, stop)
            if self.method.together > 1 and number % self.method.together == 0:
                self._score_ahead(query, begin, ends[number : number + self.method.together], scaling)
            outputs.append(self._read_together(query[:, :, now], key[:, :, now], value[:, :, now], scaling))
            begin = stop
        self._ahead = []
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def _read_together(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of tokens that share a look-up: one softmax over window, first tokens, blocks and what is between."""
        method, rows, heads, count, _ = self.method, *query.shape
        self._remember(key, value)
        self._ready_scores(query)
        assert self._rotated is not None
        assert self._plain is not None
        assert self._values is not None
        begin, groups = self.end - count, key.shape[1]
        near = max(self.first, begin - method.window + 1)
        between = max(self.first, self.end - method.window)
        at = slice(near - self._origin, self.end - self._origin)
        here = slice(self.first - self._origin, between - self._origin)
        local = self._turned(query * scaling, begin, self.end)
        distant = self._fixed(query * scaling)
        self._look_up(distant)
        pieces: list[tuple[Tensor, Tensor, Tensor | None]] = []
        if self._far is not None:
            width = method.sinks + method.block * min(method.blocks, self._store.count)
            pieces.append((self._far[0][:, :, :width], self._far[1][:, :, :width], None))
        if between > self.first:
            apart = None
            if count > 1 and not method.compat:
                width, offset = between - self.first, begin - self.first
                apart = self.text.mask(count, width, offset, method.window, query.device, outside=True)
            pieces.append((self._plain[:, :, here], self._values[:, :, here], apart))
        logits = []
        for keys, _, mask in pieces:
            logit = (_grouped(distant, keys.shape[1]) @ keys.transpose(2, 3)).view(rows, heads, count, -1)
            logits.append(logit if mask is None else logit + mask.to(logit.dtype))
        close = (_grouped(local, groups) @ self._rotated[:, :, at].transpose(2, 3)).view(rows, heads, count, -1)
        inside = None
        if count > 1:
            inside = self.text.mask(count, self.end - near, begin - near, method.window, query.device)
        logits.append(close if inside is None else close + inside.to(close.dtype))
        weights = torch.cat(logits, -1).softmax(-1, dtype=torch.float32)
        output, column = None, 0
        for keys, values in [*((k, v) for k, v, _ in pieces), (self._rotated[:, :, at], self._values[:, :, at])]:
            part = weights[..., column : column + keys.shape[2]]
            column += keys.shape[2]
            added = (_grouped(part.to(values.dtype), values.shape[1]) @ values).view(rows, heads, count, -1)
            output = added if output is None else output.add_(added)
        assert output is not None
        if method.score == "attention":
            self._add_scores(weights[..., column - (self.end - near) :].sum(2), near, self.end)
        else:
            self._score(close.float(), inside, near, self.end)
        if self._hot is not None and method.eviction == "lru-s" and self._chosen.size:
            self._note_attention(weights)
        self._pack()
        return output

    def _turned(self, vectors: Tensor, begin: int, stop: int) -> Tensor:
        """`vectors` (rows, heads, length, head_dim) turned to their positions; a copy."""
        if self.turn.none:
            return vectors
        angles = self.text.angles(self.turn, begin, stop, vectors, self.method.distance_scale)
        return self.turn.turn_by_(vectors.clone(), angles)

    def _fixed(self, query: Tensor) -> Tensor:
        """Queries as they see what is outside the window: from the window's far end."""
        if self.turn.none:
            return query
        last = self.method.window - 1
        return self.turn.turn_by_(
            query.clone(), self.text.angles(self.turn, last, last + 1, query, self.method.distance_scale)
        )

    def _look_up(self, query: Tensor) -> None:
        """Fetch the blocks whose representatives agree best with the mean of these queries (rows, heads, n, head_dim)."""
        known = self._store.count
        if not known:
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
        self._fetch(wanted)

    def _best(self, means: Tensor, known: int) -> NDArray[np.int64]:
        """(n, groups, blocks) numbers, ascending, of the `known` blocks that agree best with (rows, n, heads, head_dim)."""
        assert self._standing is not None
        standing = self._standing[:, :known]
        if self.method.per_head:
            scores = torch.einsum("rnhd,rlhd->lrhn", standing, means).flatten(1, 2)
        else:
            scores = (standing.flatten(2) @ means.flatten(2).transpose(1, 2)).permute(2, 0, 1)
        wanted: NDArray[np.int64] = scores.topk(self.method.blocks, sorted=False).indices.cpu().numpy()
        wanted.sort(-1)
        return wanted

    def _score_ahead(self, query: Tensor, begin: int, ends: list[int], scaling: float) -> None:
        """Decide the look-ups of the pieces that stop at `ends` in one product; none while all blocks are taken."""
        known = self._store.count
        if known <= self.method.blocks:
            return
        distant = self._fixed(query[:, :, begin : ends[-1]] * scaling).float()
        sizes = [stop - start for start, stop in zip([begin, *ends], ends, strict=False)]
        means = torch.stack([piece.mean(2) for piece in distant.split(sizes, 2)], 1)
        self._ahead = list(self._best(means, known))

    def _fetch(self, wanted: NDArray[np.int64]) -> None:
        """Bring `wanted` (groups, n) into the slots, in the place of what is not wanted any more."""
        assert self._far is not None
        method, slots, size = self.method, self._chosen, self._store.count + 1
        offset = np.arange(len(wanted))[:, None] * size
        there = np.isin(wanted + offset, np.where(slots < 0, -1, slots + offset))
        if there.all():
            return
        # Where there are fewer blocks than slots the first slots are used, so that what is attended to is one piece.
        usable = np.arange(slots.shape[1]) < wanted.shape[1]
        free = ~np.isin(np.where(slots < 0, -1, slots + offset), wanted + offset) & usable
        group, place = np.nonzero(free)
        blocks = wanted[~there]
        rows = group // (len(slots) // len(self._far[0]))
        if self._hot is None:
            found = self._store.read(blocks, rows)
        else:
            everything = np.unique(
                np.stack([wanted.ravel(), np.repeat(rows_of(slots, self._far[0]), wanted.shape[1])]), axis=1
            )
            found = self._hot.read(self._store, blocks, rows, everything)
        slots[group, place] = blocks
        device = self._far[0].device
        at_row, at_place = torch.from_numpy(rows).to(device), torch.from_numpy(place).to(device)
        for far, piece in zip(self._far, found, strict=True):
            held = far[:, :, method.sinks :].unflatten(2, (-1, method.block))
            if method.per_head:
                head = torch.from_numpy(group % self._heads).to(device)
                own = torch.arange(len(piece), device=device)
                held[at_row, head, at_place] = piece[own, head // (self._heads // piece.shape[1])]
            else:
                held[at_row, :, at_place] = piece

    def _note_attention(self, weights: Tensor) -> None:
        """Tell the hot blocks what the looked-up ones received."""
        assert self._hot is not None
        used = min(self.method.blocks, self._store.count)
        part = weights[..., self.method.sinks : self.method.sinks + used * self.method.block]
        mass = part.unflatten(-1, (used, self.method.block)).sum((2, 4)).cpu().numpy()
        slots = self._chosen[:, :used]
        mass = mass.reshape(len(slots), -1, used).sum(1)
        rows = np.repeat(rows_of(slots, weights), used)
        kept = slots.ravel() >= 0
        self._hot.attended(slots.ravel()[kept], rows[kept], mass.ravel()[kept])

    # Keeping

    def _remember(self, key: Tensor, value: Tensor) -> None:
        """Append entries that come without rotation."""
        self._make_room(key, value)
        assert self._plain is not None
        assert self._rotated is not None
        assert self._values is not None
        stop = self.end + key.shape[2]
        at = slice(self.end - self._origin, stop - self._origin)
        self._plain[:, :, at] = key
        self._values[:, :, at] = value
        self._rotated[:, :, at] = self._turned(key, self.end, stop)
        self.end = stop

    def _make_room(self, keys: Tensor, values: Tensor) -> None:
        """Memory for these entries behind the recent ones; what is recent moves to the front when the end is reached."""
        needed = self.end - self.first + keys.shape[2]
        if self._rotated is None or self._values is None:
            room = needed + (self.method.window + 2 * self.method.block if self._left else 64)
            self._rotated = keys.new_empty(*keys.shape[:2], room, keys.shape[3])
            self._values = values.new_empty(*values.shape[:2], room, values.shape[3])
            self._plain = torch.empty_like(self._rotated) if self._left else None
        if self.end - self._origin + keys.shape[2] <= self._rotated.shape[2]:
            return
        room = self._rotated.shape[2]
        if self._left:
            # After a long piece less is needed than it took.
            room = min(room, 2 * needed + self.method.window + 2 * self.method.block)
        if needed + self.method.window // 2 > room:
            room = needed + max(needed // 4, self.method.window if self._left else 64)
        old = slice(self.first - self._origin, self.end - self._origin)

        def moved(tensor: Tensor) -> Tensor:
            new = tensor.new_empty(*tensor.shape[:2], room, *tensor.shape[3:])
            new[:, :, : self.end - self.first] = tensor[:, :, old]
            return new

        self._rotated, self._values = moved(self._rotated), moved(self._values)
        self._plain = moved(self._plain) if self._plain is not None else None
        if self._scores is not None:
            scores = self._scores.new_zeros(*self._scores.shape[:2], room)
            scores[:, :, : self.end - self.first] = self._scores[:, :, old]
            self._scores = scores
        self._origin = self.first

    def _ready_scores(self, query: Tensor) -> None:
        assert self._rotated is not None
        self._heads = query.shape[1]
        if self._scores is None:
            self._scores = torch.zeros(
                *query.shape[:2], self._rotated.shape[2], dtype=torch.float32, device=query.device
            )

    def _score(self, logits: Tensor, mask: Tensor | None, start: int, stop: int) -> None:
        """Add to the scores what logits (rows, heads…, queries, stop - start) give."""
        logits = logits.reshape(len(logits), self._heads, -1, stop - start)
        if self.method.score == "attention":
            received = (logits if mask is None else logits + mask).softmax(-1)
        else:
            received = logits if mask is None else logits * (mask == 0)
        self._add_scores(received.sum(2), start, stop)

    def _add_scores(self, received: Tensor, start: int, stop: int) -> None:
        assert self._scores is not None
        self._scores[:, :, start - self._origin : stop - self._origin] += received

    def _pack(self) -> None:
        """Make blocks of what left the window: first the first tokens are set aside, then whole blocks follow."""
        method = self.method
        start = max(self.first, method.sinks)
        count = (self.end - start - method.window) // method.block
        if count < 1:
            return
        assert self._plain is not None
        assert self._values is not None
        assert self._scores is not None
        if method.memory_budget is not None:
            each = sum(tensor[:, :, : method.block].nbytes for tensor in (self._plain, self._values))
            blocks = self._store.count + count
            method._check_budget(blocks * each * self._layers, blocks * method.block, self.end)
        if self._far is None:
            self._set_aside(self._plain, self._values)
        at = slice(start - self._origin, start - self._origin + count * method.block)
        keys, values, scores = (
            tensor[:, :, at].unflatten(2, (count, method.block)) for tensor in (self._plain, self._values, self._scores)
        )
        self._stand(keys, scores)
        self._store.append(keys.permute(2, 0, 1, 3, 4), values.permute(2, 0, 1, 3, 4))
        if self._hot is None and not self._store.near:
            slots = method.hot_blocks * len(keys)
            self._hot = HotBlocks(slots, method.eviction, method.decay, keys.device)
        self.first = start + count * method.block

    def _set_aside(self, keys: Tensor, values: Tensor) -> None:
        """Keep the first tokens, with room behind them for blocks."""
        method, rows = self.method, len(keys)
        heads = self._heads if method.per_head else keys.shape[1]
        room = method.sinks + method.blocks * method.block
        far = []
        for tensor in (keys, values):
            kept = tensor[:, :, : method.sinks].repeat_interleave(heads // tensor.shape[1], 1)
            memory = tensor.new_empty(rows, heads, room, tensor.shape[3])
            memory[:, :, : method.sinks] = kept
            far.append(memory)
        self._far = (far[0], far[1])
        self._chosen = np.full((rows * (heads if method.per_head else 1), method.blocks), -1, dtype=np.int64)

    def _stand(self, keys: Tensor, scores: Tensor) -> None:
        """Per query head, the mean key of the tokens of a block (rows, heads, blocks, block, …) that mattered most."""
        rows, groups, count, _, dim = keys.shape
        best = scores.topk(self.method.representatives, -1, sorted=False).indices
        best = best.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)
        picked = keys.float().gather(3, best[..., None].expand(*best.shape, dim))
        means = picked.unflatten(3, (self._heads // groups, -1)).mean(4)
        fresh = means.permute(0, 2, 1, 3, 4).reshape(rows, count, self._heads, dim)
        known = self._store.count
        if self._standing is None or self._standing.shape[1] < known + count:
            grown = fresh.new_empty(rows, (known + count) * 3 // 2 + 16, self._heads, dim)
            if self._standing is not None:
                grown[:, :known] = self._standing[:, :known]
            self._standing = grown
        self._standing[:, known : known + count] = fresh

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockMemory:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            setattr(new, name, value if name in {"method", "turn"} else copy.deepcopy(value, memo))
        return new

    def select_rows(self, rows: Tensor) -> None:
        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows.to(tensor.device)]

        self._rotated, self._plain, self._values = of(self._rotated), of(self._plain), of(self._values)
        self._scores, self._standing = of(self._scores), of(self._standing)
        self._store.select_rows(rows)
        if self._far is not None:
            each = len(self._chosen) // len(self._far[0])
            groups = (rows[:, None] * each + torch.arange(each)).flatten().numpy()
            self._chosen = self._chosen[groups].copy()
            self._far = (self._far[0][rows.to(self._far[0].device)], self._far[1][rows.to(self._far[1].device)])
        if self._hot is not None:
            self._hot.empty(self.method.hot_blocks * len(rows))

    @property
    def bytes(self) -> int:
        """Memory held, files not counted."""
        return self._near_bytes + self._store.bytes

    @property
    def _near_bytes(self) -> int:
        held = [self._rotated, self._plain, self._values, self._scores, self._standing, *(self._far or ())]
        near = self._hot.bytes if self._hot is not None else 0
        return near + sum(int(tensor.nbytes) for tensor in held if tensor is not None)

    def report(self) -> dict[str, Any]:
        """Counts and bytes, and where the blocks begin that the last token (or tokens) looked up, per group."""
        chosen = np.unique(self._chosen[self._chosen >= 0])
        counts = dict(self._hot.counts) if self._hot is not None else {"hot_hits": 0, "hot_misses": 0}
        return {
            "blocks": self._store.count,
            "lookups": self._lookups,
            "near_bytes": self._near_bytes,
            "stored_bytes": self._store.stored_bytes,
            **counts,
            "retrieved": (chosen * self.method.block + self.method.sinks).tolist(),
        }


def rows_of(groups: NDArray[np.int64], rows: Tensor) -> NDArray[np.int64]:
    """The row of the batch that each group of slots belongs to."""
    return np.arange(len(groups)) // (len(groups) // len(rows))


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """(rows, groups, heads / groups * n, …) of (rows, heads, n, …): heads that share a key head, one under another."""
    return tensor.reshape(len(tensor), groups, -1, tensor.shape[-1])
