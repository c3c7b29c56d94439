"""What one question costs: arithmetic, and bytes of the key-value cache that are read while tokens are generated.

The cost model of "Kinetics" (R. Sadhukhan et al., 2025): closed forms that integrate over the generated tokens.
Reading the prompt is not counted. All arithmetic is in float64: numbers span nine orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gratis.contract.errors import ParameterError, SubjectError


@dataclass(frozen=True)
class Shape:
    """What the cost of a language model depends on."""

    name: str
    parameters: float
    """Parameters that every token passes (of a mixture of experts: those of the experts that it is sent to)."""
    layers: int
    heads: int
    key_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        numbers = (self.parameters, self.layers, self.heads, self.key_heads, self.head_dim)
        if min(numbers) <= 0:
            raise ParameterError(f"The shape of {self.name} must be of positive numbers, not {numbers}.")
        if self.heads % self.key_heads:
            raise ParameterError(
                f"The {self.heads} heads of {self.name} cannot share {self.key_heads} key heads evenly."
            )

    @classmethod
    def of(cls, config: Any, name: str = "", parameters: float | None = None) -> Shape:
        """From a transformers configuration. Its parameters are counted on a model without memory unless given.

        Raises SubjectError for encoder-decoders and for layers that keep no cache of keys and values.
        """
        text = config.get_text_config(decoder=True)
        name = name or getattr(config, "_name_or_path", "") or type(config).__name__
        if config.is_encoder_decoder:
            raise SubjectError(f"{name} has an encoder; the cost model is that of decoder-only language models.")
        others = {kind for kind in getattr(text, "layer_types", None) or () if "attention" not in kind}
        others |= {kind for kind in getattr(text, "layer_types", None) or () if "linear" in kind}
        if others:
            raise SubjectError(f"{name} has layers of another cost ({', '.join(sorted(others))}).")
        try:
            layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
            key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
            head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        except AttributeError as error:
            raise SubjectError(f"The configuration of {name} does not say its layers and heads: {error}.") from error
        counted = parameters if parameters is not None else active_parameters(config)
        return cls(name, counted, layers, heads, key_heads, head_dim)


def active_parameters(config: Any) -> float:
    """Parameters that every token passes, tied ones once: counted on a model that takes no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config(decoder=True)
    experts = next(
        (getattr(text, n) for n in ("num_experts", "num_local_experts", "n_routed_experts") if hasattr(text, n)), 0
    )
    share = getattr(text, "num_experts_per_tok", experts) / experts if experts else 1.0
    return float(sum(p.numel() * (share if ".experts." in name else 1.0) for name, p in model.named_parameters()))


@dataclass(frozen=True)
class Attention:
    """Dense attention, or attention to `budget` tokens of the cache: any of them, or blocks of `block`."""

    budget: int | None = None
    """Tokens that are attended to; None is dense."""
    block: int = 1
    """Tokens per block that is chosen; 1 is a free choice, whose search costs nothing (an oracle)."""
    window: int = 0
    """Of the budget, the latest tokens."""

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise ParameterError(f"budget {self.budget} must be at least 1.")
        if self.block < 1 or self.window < 0:
            raise ParameterError(f"block {self.block} must be at least 1 and window {self.window} at least 0.")

    @classmethod
    def of_study(cls, budget: int) -> Attention:
        """A budget with the block size that balances what is attended to against the search (16,384 / budget)."""
        return cls(budget, max(1, 16384 // budget))

    @property
    def blocks(self) -> int:
        """Blocks that are chosen."""
        return 0 if self.budget is None else (self.budget - self.window) // self.block

    def __str__(self) -> str:
        if self.budget is None:
            return "dense"
        return f"top {self.budget}" if self.block == 1 else f"{self.blocks} blocks of {self.block}"


@dataclass(frozen=True)
class Cost:
    """Arithmetic in FLOP and traffic in bytes."""

    compute: float
    traffic: float

    def total(self, intensity: float) -> float:
        """Both in one unit: FLOP that the hardware could have done meanwhile (eFLOP)."""
        return self.compute + intensity * self.traffic

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.compute + other.compute, self.traffic + other.traffic)

    def scaled(self, factor: float) -> Cost:
        """`factor` times the cost."""
        return Cost(self.compute * factor, self.traffic * factor)


def attended(attention: Attention, prompt: int, length: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cached tokens attended to, summed over the generation of `length` tokens."""
    if attention.budget is None:
        return length * (2 * prompt + length) / 2
    budget, room = float(attention.budget), float(attention.budget - prompt)
    if room <= 0:
        return budget * length
    # Until the budget is reached everything is attended to. The released top-k function adds this correction.
    return np.where(length < room, length * (2 * prompt + length) / 2, budget * length - room**2 / 2)


def generation_cost(
    shape: Shape,
    prompt: int,
    lengths: ArrayLike,
    trials: int = 1,
    attention: Attention | None = None,
    *,
    element_bytes: float = 2.0,
    batch: float | None = None,
) -> Cost:
    """Mean cost of a question over `lengths` that its generations had: the mean of costs, as cost grows with the square.

    `trials` generations share the prompt's cache where attention is dense. With `batch` questions at a time the
    weights are read once per step for all of them; None leaves that out, as for very large batches.

    Raises ParameterError for numbers that are none of tokens, trials or bytes.
    """
    attention = attention or Attention()
    length = np.atleast_1d(np.asarray(lengths, dtype=np.float64))
    if length.size == 0 or not np.isfinite(length).all() or (length <= 0).any():
        raise ParameterError("lengths must be positive numbers of tokens.")
    if prompt < 0 or trials < 1 or element_bytes <= 0 or (batch is not None and batch <= 0):
        raise ParameterError("prompt must be at least 0, trials at least 1, element_bytes and batch above 0.")
    width, n, e = shape.head_dim * shape.layers, trials, element_bytes
    kept = attended(attention, prompt, length)
    compute = n * (2 * shape.parameters * length + 4 * kept * shape.heads * width)
    if attention.budget is None:
        traffic = e * (2 * prompt + n * length) * length * shape.key_heads * width
    else:
        traffic = n * 2 * e * kept * shape.key_heads * width
        if attention.block > 1:
            compute += n * (2 * prompt + length) / attention.block * length * shape.heads * width
            traffic += e / 2 * (2 * prompt + n * length) / attention.block * length * shape.key_heads * width
    if batch is not None:
        traffic = traffic + e * shape.parameters * length / batch
    return Cost(float(compute.mean()), float(traffic.mean()))


def coverage(correct: int, recorded: int, trials: int) -> float:
    """Probability that one of `trials` drawn from `recorded` generations is among the `correct`: the unbiased estimate.

    Raises ParameterError if more are drawn than were recorded.
    """
    if not 0 <= correct <= recorded:
        raise ParameterError(f"{correct} of {recorded} generations cannot be correct.")
    if not 1 <= trials <= recorded:
        raise ParameterError(f"trials {trials} must be between 1 and the {recorded} recorded generations.")
    return 1.0 - math.comb(recorded - correct, trials) / math.comb(recorded, trials)


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """The mean over questions."""
    return Cost(
        math.fsum(cost.compute for cost in costs) / len(costs), math.fsum(cost.traffic for cost in costs) / len(costs)
    )
