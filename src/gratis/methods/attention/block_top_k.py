"""Attend to the blocks of the cache that matter to the current token, and to sinks and the latest tokens.

R. Sadhukhan et al., "Kinetics: Rethinking Test-Time Scaling Laws", 2025 (arXiv 2506.05333), the block top-k attention of
its engine. While decoding, a block's score is the mean, over the query heads of a key head and the block's tokens, of
the attention logits. A mean of products with one query is a product of means: one mean key per block is kept.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import SubjectError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.attention_door import check_attention, install_attention, takes_masks
from gratis.subjects.growing_cache import grow_in_place
from gratis.subjects.language import language_model


class BlockTopK(Attachable):
    """Make long generations cheaper: every new token attends to a few blocks of what was read, not to all of it.

    All keys and values stay in memory; what shrinks is what is read per token. Prompts are read densely, and so is
    everything below the length at which there is something to leave out.
    """

    card = Card(
        title="Kinetics: Rethinking Test-Time Scaling Laws",
        authors="Sadhukhan et al.",
        year=2025,
        seed=99,
        paper="arXiv 2506.05333",
        acts_on="language model",
        free_of=("training", "calibration data"),
        summary="each new token attends to the blocks of the text that matter to it",
        holds=("kv cache", "choice of keys"),
        why={"kv cache": "keeps the mean key of every block of the cache, so entries must stay where they are"},
        unchanged_when={"blocks": 1000},
        examples={"blocks": 1, "block": 4, "window": 8, "dense_layers": (0,)},
        differs=(
            "Mean keys are kept per complete block instead of recomputed (except in the first layer, whose keys do not tell "
            "texts apart); in a left-padded row the block with the row's first tokens is always among the chosen, in the "
            "place of sinks that are padding."
        ),
        limits="The cache keeps its full size. Not while reading a prompt, and not for layers with a window of their own.",
        claims=(
            Claim(
                name="with a quarter of the cache attended to, the loss on plain text rises by at most 0.1 nats",
                task="streaming-perplexity",
                metric="loss",
                compare="difference",
                at_most=0.1,
                parameters={"blocks": 8, "window": 64},
                task_parameters={"tokens": 900, "chunk": 1},
            ),
        ),
    )

    blocks: int = param(32, at_least=1, unit="blocks", help="blocks that a token attends to (k)", search=(4, 128))
    block: int = param(16, at_least=1, unit="tokens", help="size of a block (b)", search=(8, 128))
    window: int = param(64, at_least=0, unit="tokens", help="latest tokens, always attended to (w)", search=(0, 512))
    sinks: int = param(4, at_least=0, unit="tokens", help="first tokens, always attended to")
    dense_layers: tuple[int, ...] = param((0,), at_least=0, help="layers that attend to everything")
    choose: Literal["block", "token", "overlapping", "local", "random"] = param(
        "block",
        help="blocks by their mean key; single tokens by their own logits (an oracle); blocks at half steps; for "
        "comparison: none, or any blocks",
    )
    seed: int = param(0, at_least=0, help="of the random choice")

    @property
    def active_from(self) -> int:
        """Length from which something is left out."""
        return -(-(self.sinks + self.window + self.blocks * self.block) // self.block) * self.block

    def check(self, subject: Any) -> None:
        if not takes_masks(language_model(subject, type(self).__name__)):
            raise SubjectError(
                "BlockTopK attends to a few keys at a time: load the model with attention 'sdpa' or 'eager'."
            )
        modules = check_attention(subject, type(self).__name__)
        name = type(subject).__name__
        if self.dense_layers and max(self.dense_layers) >= len(modules):
            raise SubjectError(f"BlockTopK: dense_layers must be below {len(modules)}, the layers of this {name}.")
        if any(getattr(one.module, "is_causal", True) is False for one in modules):
            raise SubjectError(f"BlockTopK needs causal attention; this {name} attends in both directions.")
        if not self._sparse(modules):
            raise SubjectError(f"BlockTopK: no layer of this {name} is left to act on; all are dense or local.")

    def install(self, subject: Any, scope: Scope) -> Any:
        modules = check_attention(subject, type(self).__name__)
        sparse = self._sparse(modules)
        counts = {"decoded": 0, "attended": 0, "cached": 0}
        states = {key: _Means(kept=key != id(modules[0].module)) for key in sparse}
        text, scratch = _Text(), _Scratch()

        def attend(inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            if query.shape[2] != 1 or id(module) not in states or key.shape[2] <= self.active_from:
                return inner(module, query, key, value, mask, **kwargs)
            length, real = text.of(mask, key)
            if length <= self.active_from:
                return inner(module, query, key, value, mask, **kwargs)
            columns = self._columns(states[id(module)], query, key, length, real)
            counts["decoded"] += 1
            counts["attended"] += columns.shape[2]
            counts["cached"] += length
            part = scratch.picked(key, columns, "keys"), scratch.picked(value, columns, "values")
            return inner(module, query, *part, self._mask(mask, columns, query.shape[1], real), **kwargs)

        install_attention(subject, self.name, torch.compiler.disable(attend), scope)
        grow_in_place(subject, scope)

        def report() -> dict[str, Any]:
            attended = counts["attended"] / counts["cached"] if counts["cached"] else 1.0
            return {"sparse_layers": len(sparse), "sparse_steps": counts["decoded"], "share_attended": attended}

        return report

    def _sparse(self, modules: list[Any]) -> set[int]:
        return {id(one.module) for n, one in enumerate(modules) if not one.local and n not in self.dense_layers}

    def _columns(self, state: _Means, query: Tensor, key: Tensor, length: int, real: Tensor | None) -> Tensor:
        """(batch, key heads, attended) columns of the cache that one new token attends to, ascending."""
        at = self.sinks
        end = at + (length - self.window - at) // self.block * self.block
        middle, real = key[:, :, at:end], None if real is None else real[:, at:end]
        sinks, latest = torch.arange(at, device=key.device), torch.arange(end, length, device=key.device)
        parts = [sinks.expand(*key.shape[:2], -1), latest.expand(*key.shape[:2], -1)]
        if self.choose == "token":
            parts.insert(1, self._tokens(query, middle, real) + at)
        elif self.choose == "overlapping":
            parts.insert(1, self._overlapping(query, middle, real) + at)
        elif self.choose != "local":
            within = torch.arange(at, at + self.block, device=key.device)
            chosen = self._blocks(state, query, middle, real)
            parts.insert(1, (chosen[..., None] * self.block + within).flatten(2))
        return torch.cat(parts, 2)

    def _mask(self, mask: Tensor | None, columns: Tensor, heads: int, real: Tensor | None) -> Tensor | None:
        """The mask of the chosen columns, one per query head; None where nothing chosen is hidden."""
        if mask is None or (mask.dtype == torch.bool and real is None):
            return None
        columns = columns.repeat_interleave(heads // columns.shape[1], 1)
        return mask.expand(len(columns), heads, 1, -1)[:, :, 0].gather(2, columns)[:, :, None]

    def _tokens(self, query: Tensor, keys: Tensor, real: Tensor | None) -> Tensor:
        scores = _group_mean(query, keys.shape[1]) @ keys.transpose(2, 3)
        scores = scores[:, :, 0] if real is None else scores[:, :, 0].masked_fill(~real[:, None], -torch.inf)
        return scores.topk(self.blocks * self.block, sorted=False).indices.sort(-1).values

    def _blocks(self, state: _Means, query: Tensor, keys: Tensor, real: Tensor | None) -> Tensor:
        count = keys.shape[2] // self.block
        if self.choose == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + keys.shape[2])
            shares = torch.rand(*keys.shape[:2], count, generator=generator).to(keys.device)
            return shares.topk(self.blocks, sorted=False).indices.sort(-1).values
        means = state.of(keys, self.block, real)
        scores = (means @ _group_mean(query, keys.shape[1]).float().transpose(2, 3))[..., 0]
        if real is not None:
            inside = real.unflatten(1, (count, self.block)).any(-1)
            scores = scores.masked_fill(~inside[:, None], -torch.inf)
            begins = torch.zeros_like(inside).scatter_(1, inside.long().argmax(1, keepdim=True), True)
            begins &= ~real[:, :1]
            scores = scores.masked_fill(begins[:, None], torch.inf)
        return scores.topk(self.blocks, sorted=False).indices.sort(-1).values

    def _overlapping(self, query: Tensor, keys: Tensor, real: Tensor | None) -> Tensor:
        """Twice as many candidate blocks at half steps; their tokens, each once, up to the budget, best block first."""
        half = max(self.block // 2, 1)
        weights = torch.ones(keys.shape[0], keys.shape[2], device=keys.device) if real is None else real.float()
        scores = (_group_mean(query, keys.shape[1]) @ keys.transpose(2, 3))[:, :, 0] * weights[:, None]
        sums = scores.unfold(2, self.block, half).sum(-1) / weights.unfold(1, self.block, half).sum(-1)[:, None]
        sums = torch.nan_to_num(sums, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        best = sums.topk(min(2 * self.blocks, sums.shape[-1])).indices
        tokens = (best[..., None] * half + torch.arange(self.block, device=keys.device)).flatten(2)
        places = torch.arange(tokens.shape[-1], device=keys.device).expand_as(tokens)
        first = torch.full(scores.shape, tokens.shape[-1], device=keys.device).scatter_reduce_(
            2, tokens, places, "amin"
        )
        return first.topk(self.blocks * self.block, largest=False).indices.sort(-1).values


@dataclass
class _Means:
    """Mean keys of one layer's complete blocks, in float32, grown as the text grows."""

    kept: bool
    """Whether they are kept from token to token. The first layer's keys are of single tokens: they tell no texts apart."""
    means: Tensor | None = None
    last: Tensor | None = None
    """Key of the last token that was averaged: it depends on the whole text before it, so it tells texts apart."""

    def of(self, keys: Tensor, block: int, real: Tensor | None) -> Tensor:
        """(batch, key heads, count, head_dim) for keys (batch, key heads, count * block, head_dim)."""
        count = keys.shape[2] // block
        known = 0 if self.means is None or not self._is_of(keys, block) else self.means.shape[2]
        if known < count:
            fresh = keys[:, :, known * block :].unflatten(2, (count - known, block))
            if real is None:
                found = fresh.mean(3, dtype=torch.float32)
            else:
                weights = real[:, known * block :].float().unflatten(1, (count - known, block))[:, None, :, :, None]
                found = (fresh * weights).sum(3) / weights.sum(3).clamp_min(1)
            self.means = found if not known or self.means is None else torch.cat([self.means, found], 2)
            self.last = keys[:, :, count * block - 1].clone()
        assert self.means is not None
        return self.means[:, :, :count]

    def _is_of(self, keys: Tensor, block: int) -> bool:
        assert self.means is not None
        assert self.last is not None
        end = self.means.shape[2] * block
        if not self.kept or end > keys.shape[2] or self.last.shape != keys[:, :, 0].shape:
            return False
        return self.last.device == keys.device and torch.equal(self.last, keys[:, :, end - 1])


@dataclass
class _Text:
    """What of a cache is text, found once per mask: all layers of a step share one."""

    mask: Tensor | None = None
    found: tuple[int, Tensor | None] = (0, None)

    def of(self, mask: Tensor | None, key: Tensor) -> tuple[int, Tensor | None]:
        """Columns in use (fewer than all in a preallocated cache), and (batch, all) which are text; None: all in use."""
        if mask is None:
            return key.shape[2], None
        if mask is not self.mask:
            real = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] > torch.finfo(mask.dtype).min / 2
            length = int(real.any(0).nonzero()[-1]) + 1
            self.mask = mask
            self.found = length, None if bool(real[:, :length].all()) else real.expand(key.shape[0], -1)
        return self.found


@dataclass
class _Scratch(threading.local):
    """Memory for the keys and values that are attended to, taken once: allocating as much per layer costs more."""

    held: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def picked(self, tensor: Tensor, columns: Tensor, part: str) -> Tensor:
        """Columns (batch, key heads, attended) of (batch, key heads, all, head_dim)."""
        batch, heads, length, dim = tensor.shape
        rows = _row_strides(tensor)
        if rows is None or (torch.is_grad_enabled() and tensor.requires_grad):
            every = torch.arange(batch, device=tensor.device)[:, None, None]
            return tensor[every, torch.arange(heads, device=tensor.device)[:, None], columns]
        whole, step = rows
        first = torch.arange(batch, device=tensor.device)[:, None] * whole
        first = first + torch.arange(heads, device=tensor.device) * step
        places = (columns + first[..., None]).flatten()
        flat = tensor.as_strided(((batch - 1) * whole + (heads - 1) * step + length, dim), (dim, 1))
        key, size = (part, tensor.dtype, tensor.device), places.numel() * dim
        if key not in self.held or self.held[key].numel() < size:
            self.held[key] = tensor.new_empty(size + size // 4)
        out = self.held[key][:size].view(-1, dim)
        torch.index_select(flat, 0, places, out=out)
        return out.view(batch, heads, -1, dim)


def _row_strides(tensor: Tensor) -> tuple[int, int] | None:
    """Rows of head_dim numbers between batch entries, and between heads; None where rows do not lie side by side."""
    dim = tensor.shape[-1]
    batch, head, row, one = tensor.stride()
    if one != 1 or row != dim or batch % dim or head % dim:
        return None
    return batch // dim, head // dim


def _group_mean(query: Tensor, heads: int) -> Tensor:
    """(batch, key heads, 1, head_dim): the mean query of the heads that share a key head."""
    grouped: Tensor = query.unflatten(1, (heads, -1))
    return grouped.mean(2)
