"""Base decoders of masked-diffusion language models: which masked places take their token at which step.

A window of masks follows the prompt. Each step reads the whole sequence, proposes a token for every masked place, and
lets some of them in; a place that has its token keeps it. Three ways to choose how many and which:

- `Blocks`: an even schedule within blocks from left to right (LLaDA: S. Nie et al., 2025, arXiv 2502.09992);
- `Times`: one schedule over the whole window along reversed diffusion times (Dream: J. Ye et al., 2025, arXiv
  2508.15487);
- `Threshold`: within blocks, every place that is confident enough (Fast-dLLM: C. Wu et al., 2025, arXiv 2505.22618).

Tensors are (rows, window) or (rows, window, vocabulary). Every row draws from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gratis.contract.errors import InputError

BLOCK = 32
"""Places per block where the call names no other number and the window is a multiple of it."""


class Plan(Protocol):
    """A base decoder for windows of known size."""

    @property
    def steps(self) -> int:
        """Steps at which at the latest no place is masked."""
        ...

    def propose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Tokens (rows, window) and how confident the model is of each."""
        ...

    def take(
        self, step: int, masked: Tensor, confidence: Tensor, rows: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Places (rows, window) that take their proposal at `step`, counted from 1. rows: which of the call's."""
        ...


class Base(Protocol):
    """The settings of a base decoder: a frozen dataclass whose fields a call may name."""

    def plan(self, masked: Tensor) -> Plan:
        """The decoder for windows that are masked at (rows, window). Raises InputError where settings do not fit."""
        ...


@dataclass(frozen=True)
class Blocks:
    """An even schedule within blocks from left to right."""

    steps: int | None = None
    """Steps for the whole window; None: as many as it has places."""
    block_length: int | None = None
    """Places per block; None: 32, or the whole window where that is no multiple of it."""
    remasking: Literal["low_confidence", "random", "topk_margin", "entropy"] = "low_confidence"
    temperature: float = 0.0

    def plan(self, masked: Tensor) -> Plan:
        """Raises InputError where blocks do not divide the window, or the steps are no multiple of the blocks."""
        window = masked.shape[1]
        block = block_of(window, self.block_length)
        blocks = window // block
        steps = window if self.steps is None else self.steps
        if not 1 <= steps <= window or steps % blocks:
            raise InputError(
                f"steps must be a multiple of the {blocks} blocks (window {window}, block_length {block}), at most "
                f"{window}, not {steps}."
            )
        counts = masked.view(len(masked), blocks, block).sum(-1)
        return _BlockPlan(steps, block, self.remasking, self.temperature, transfer_schedule(counts, steps // blocks))


@dataclass(frozen=True)
class Threshold:
    """Within blocks from left to right, every place whose probability is above a threshold, and at least one."""

    threshold: float = 0.9
    block_length: int | None = None
    """Places per block; None: 32, or the whole window where that is no multiple of it."""
    temperature: float = 0.0

    def plan(self, masked: Tensor) -> Plan:
        """Raises InputError where blocks do not divide the window."""
        window = masked.shape[1]
        return _ThresholdPlan(window, block_of(window, self.block_length), self.threshold, self.temperature)


@dataclass(frozen=True)
class Times:
    """One schedule over the whole window, along diffusion times from 1 down to `eps`."""

    steps: int | None = None
    """Steps for the whole window; None: as many as it has places."""
    eps: float = 1e-3
    alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = "entropy"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float = 0.0

    def plan(self, masked: Tensor) -> Plan:
        """Raises InputError where steps are fewer than one or more than the window's places."""
        window = masked.shape[1]
        steps = window if self.steps is None else self.steps
        if not 1 <= steps <= window:
            raise InputError(f"steps must be within 1 to the window's {window} places, not {steps}.")
        return _TimesPlan(steps, self)


def block_of(window: int, block_length: int | None) -> int:
    """Places per block of a window. Raises InputError where they do not divide it."""
    if block_length is None:
        return BLOCK if window % BLOCK == 0 else window
    if not 1 <= block_length <= window or window % block_length:
        raise InputError(f"block_length must divide the window's {window} places, not {block_length}.")
    return block_length


def transfer_schedule(masked: Tensor, steps: int) -> Tensor:
    """How many masked places take their token at each step: (…, steps) from counts (…); they sum to the counts."""
    base, more = masked[..., None] // steps, masked[..., None] % steps
    return base + (torch.arange(steps, device=masked.device) < more)


def perturbed(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Logits whose largest is a draw at `temperature`, in float64: logits − temperature · ln(−ln U).

    The order is that of exp(logits) / (−ln U)^temperature, LLaDA's form. Temperature 0 gives the logits themselves.
    """
    if temperature == 0:
        return logits
    uniform = _uniform(logits, generators, torch.float64)
    return logits.double() - temperature * (-uniform.log()).log()


def confidence(logits: Tensor, tokens: Tensor, strategy: str, generators: Sequence[torch.Generator]) -> Tensor:
    """How sure the model is of `tokens` (rows, window), from clean logits at temperature 1.

    low_confidence: the token's probability; topk_margin: the largest probability minus the second; entropy: Σ p ln p;
    random: uniform noise.
    """
    if strategy == "random":
        return _uniform(tokens, generators, torch.float32)
    if strategy == "low_confidence":
        return (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)).exp()
    p = logits.softmax(-1)
    if strategy == "topk_margin":
        top = p.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]
    return torch.xlogy(p, p).sum(-1)


def most_confident(confidence: Tensor, allowed: Tensor, count: Tensor) -> Tensor:
    """The `count` (rows,) most confident of the allowed places, as a mask (rows, window)."""
    ranked = confidence.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (ranked < count[:, None]) & allowed


def _uniform(like: Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    noise = torch.empty(like.shape, dtype=dtype, device=like.device)
    for row, generator in zip(noise, generators, strict=True):
        row.uniform_(generator=generator)
    return noise.clamp_min_(torch.finfo(dtype).tiny)


@dataclass(frozen=True)
class _BlockPlan:
    steps: int
    block: int
    strategy: str
    temperature: float
    schedule: Tensor
    """(rows, blocks, steps per block) places that take their token."""

    def propose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        tokens = perturbed(logits, self.temperature, generators).argmax(-1)
        return tokens, confidence(logits, tokens, self.strategy, generators)

    def take(
        self, step: int, masked: Tensor, confidence: Tensor, rows: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        block, within = divmod(step - 1, self.schedule.shape[-1])
        allowed = masked.clone()
        allowed[:, (block + 1) * self.block :] = False
        return most_confident(confidence, allowed, self.schedule[rows, block, within])


@dataclass(frozen=True)
class _ThresholdPlan:
    steps: int
    block: int
    threshold: float
    temperature: float

    def propose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        tokens = perturbed(logits, self.temperature, generators).argmax(-1)
        return tokens, confidence(logits, tokens, "low_confidence", generators)

    def take(
        self, step: int, masked: Tensor, confidence: Tensor, rows: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        end = (masked.long().argmax(-1) // self.block + 1) * self.block
        allowed = masked & (torch.arange(masked.shape[1], device=masked.device) < end[:, None])
        one = most_confident(confidence, allowed, torch.ones_like(end))
        return one | (allowed & (confidence > self.threshold))


@dataclass(frozen=True)
class _TimesPlan:
    steps: int
    settings: Times

    def propose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        chosen = self.settings
        if chosen.temperature > 0:
            logits = logits / chosen.temperature
        logits = _nucleus(logits, chosen.top_p, chosen.top_k)
        tokens = perturbed(logits, 1.0 if chosen.temperature > 0 else 0.0, generators).argmax(-1)
        strategy = "low_confidence" if chosen.alg in {"origin", "maskgit_plus"} else chosen.alg
        return tokens, confidence(logits, tokens, strategy, generators)

    def take(
        self, step: int, masked: Tensor, confidence: Tensor, rows: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        chosen = self.settings
        if step >= self.steps:
            return masked
        times = torch.linspace(1, chosen.eps, self.steps + 1)
        share = float(1 - times[step] / times[step - 1])
        if chosen.alg == "origin":
            return masked & (_uniform(masked, generators, torch.float32) < share)
        count = (masked.sum(-1) * share).long()
        if chosen.alg_temp > 0:
            # The largest of scores with Gumbel noise are draws without replacement from their softmax.
            confidence = confidence / chosen.alg_temp - (-_uniform(masked, generators, torch.float32).log()).log()
        return most_confident(confidence, masked, count)


def _nucleus(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Logits with tokens beyond the likeliest `top_k`, and beyond a mass of `top_p`, ruled out."""
    if top_p is not None and top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = torch.empty_like(logits).scatter_(-1, places, ordered.masked_fill(before > top_p, -torch.inf))
    if top_k is not None and 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    return logits
