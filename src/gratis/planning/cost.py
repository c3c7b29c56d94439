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

ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names that configurations have for the number of experts that a token is sent to."""


@dataclass(frozen=True)
class Shape:
    """What the cost of a language model depends on."""

    name: str
    parameters: float
    """Parameters that every token passes (of a mixture of experts: those of the experts that it is sent to)."""
    layers: int
    """All that attend, those with a window included."""
    heads: int
    key_heads: int
    head_dim: int
    local_layers: int = 0
    """Of the layers, those that see a window of the text only."""
    window: int = 0
    """Tokens that a local layer sees."""
    chunked: bool = False
    """Whether windows stand side by side (a token sees the chunk it is in so far) instead of sliding."""
    latent: int = 0
    """Of latent attention, the numbers per token that stand for keys and values of all heads; 0 for other attention."""
    rotary: int = 0
    """Of latent attention, the numbers per token beside them that carry the position."""
    other_layers: int = 0
    """Layers without a cache of keys, whose cost per token is the same at every length."""
    other_flop: float = 0.0
    """Arithmetic of one of these per token, besides that of its parameters."""
    other_bytes: float = 0.0
    """Bytes that one of these reads and writes per token, its state for the most part."""

    def __post_init__(self) -> None:
        numbers = (self.parameters, self.layers, self.heads, self.key_heads, self.head_dim)
        if not all(0 < number < math.inf for number in numbers):
            raise ParameterError(f"The shape of {self.name} must be of positive numbers, not {numbers}.")
        if self.heads % self.key_heads:
            raise ParameterError(
                f"The {self.heads} heads of {self.name} cannot share {self.key_heads} key heads evenly."
            )
        if not 0 <= self.local_layers <= self.layers or (self.local_layers > 0) != (self.window > 0):
            raise ParameterError(f"{self.name}: local layers are some of its {self.layers} layers, and need a window.")
        if min(self.latent, self.rotary, self.other_layers, self.other_flop, self.other_bytes) < 0:
            raise ParameterError(f"{self.name}: sizes and costs cannot be negative.")

    @property
    def score_flop(self) -> float:
        """Arithmetic per query, layer and cached token for the product of query and key."""
        return 2.0 * self.heads * (self.latent + self.rotary if self.latent else self.head_dim)

    @property
    def flop(self) -> float:
        """Arithmetic per query, layer and cached token. Latents are attended to as they are, for keys and for values."""
        return self.score_flop + 2.0 * self.heads * (self.latent or self.head_dim)

    @property
    def key_numbers(self) -> int:
        """Numbers per layer and cached token that scores are computed from."""
        return self.latent + self.rotary if self.latent else self.key_heads * self.head_dim

    @property
    def numbers(self) -> int:
        """Numbers per layer and cached token that are read: keys and values, or a latent that is both."""
        return self.key_numbers if self.latent else 2 * self.key_numbers

    @classmethod
    def of(
        cls, config: Any, name: str = "", parameters: float | None = None, other: tuple[float, float] | None = None
    ) -> Shape:
        """From a transformers configuration. Its parameters are counted on a model without memory unless given.

        `other` is what each layer without a cache of keys costs per token: FLOP besides those of its parameters, and bytes.
        Raises SubjectError for encoder-decoders, for layers of another cost without `other`, and for layers that differ.
        """
        text = config.get_text_config(decoder=True)
        name = name or getattr(config, "_name_or_path", "") or type(config).__name__
        if config.is_encoder_decoder:
            raise SubjectError(f"{name} has an encoder; the cost model is that of decoder-only language models.")
        try:
            depth, heads = _number(text.num_hidden_layers), _number(text.num_attention_heads)
            key_heads = _number(getattr(text, "num_key_value_heads", None) or heads)
            head_dim = _number(getattr(text, "head_dim", None) or text.hidden_size // heads)
        except AttributeError as error:
            raise SubjectError(f"The configuration of {name} does not say its layers and heads: {error}.") from error
        except TypeError as error:
            raise SubjectError(
                f"The layers of {name} differ in their heads, which the cost model has no place for."
            ) from error
        kinds = _kinds(text, depth)
        others = sorted({kind for kind in kinds if kind not in _ATTENDING})
        if others and other is None:
            raise SubjectError(
                f"{name} has layers of another cost ({', '.join(others)}): say what one costs per token, in FLOP and bytes "
                "(other=…; on the command line layer_flop=… and layer_bytes=…)."
            )
        local = [kind for kind in kinds if kind in _LOCAL]
        attending = sum(kind in _ATTENDING or kind in _BOTH for kind in kinds)
        if len(set(local)) > 1:
            raise SubjectError(f"{name} has both sliding and chunked layers, which the cost model has no place for.")
        latent = _number(getattr(text, "kv_lora_rank", None) or 0)
        return cls(
            name, parameters if parameters is not None else active_parameters(config), attending,
            heads, key_heads, head_dim,
            local_layers=len(local), window=_number(getattr(text, _LOCAL[local[0]]) if local else 0),
            chunked="chunked_attention" in local,
            latent=latent, rotary=_number(getattr(text, "qk_rope_head_dim", None) or 0) if latent else 0,
            other_layers=sum(k in others for k in kinds), other_flop=other[0] if other else 0.0,
            other_bytes=other[1] if other else 0.0,
        )  # fmt: skip


_LOCAL = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of layers that see part of the text, and how a configuration calls that part's length."""
_ATTENDING = {"full_attention", *_LOCAL}
_BOTH = {"hybrid"}
"""Kinds of layers that attend to everything and have a state besides."""


def _number(value: Any) -> int:
    """A whole number. Raises TypeError for a list, one entry per layer."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no number")
    return value


def _kinds(text: Any, depth: int) -> list[str]:
    """The kind of every layer, as a configuration says it or as its other entries mean."""
    kinds = list(getattr(text, "layer_types", None) or [])
    if kinds:
        return kinds
    if any(name.startswith(("mamba_", "ssm_")) for name in text.to_dict()):
        return ["hybrid"] * depth
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * depth


def active_parameters(config: Any) -> float:
    """Parameters that every token passes, tied ones once: counted on a model that takes no memory.

    Raises SubjectError where a mixture of experts does not say to how many a token is sent.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((number for name in names if (number := getattr(text, name, None))), 0)
    chosen = next((number for name in ACTIVE if (number := getattr(text, name, None))), None)
    total = 0.0
    for name, tensor in model.named_parameters():
        share = 1.0
        if experts and (".experts." in name or (tensor.dim() == 3 and tensor.shape[0] == experts)):
            if chosen is None:
                raise SubjectError(
                    f"{type(config).__name__} does not say how many of its {experts} experts a token is sent to: pass its "
                    "active parameters."
                )
            share = min(chosen / experts, 1.0)
        total += tensor.numel() * share
    return total


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
        return (
            f"top {self.budget}"
            if self.block == 1
            else f"{self.blocks} block{'s' if self.blocks != 1 else ''} of {self.block}"
        )


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


def attended(
    shape: Shape, attention: Attention, prompt: int, length: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Cached tokens attended to while `length` tokens are generated, summed: in a layer that sees everything under
    `attention`; in a local layer; and of the latter those that were generated themselves.
    """
    everything = _up_to(attention.budget, prompt, length)
    if not shape.window:
        return everything, np.zeros_like(length), np.zeros_like(length)
    if not shape.chunked:
        return everything, _up_to(shape.window, prompt, length), _up_to(shape.window, 0, length)
    chunk, end = float(shape.window), prompt + length

    def before(place: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tokens of their own chunks that all tokens before `place` see."""
        return np.floor(place / chunk) * chunk**2 / 2 + np.mod(place, chunk) ** 2 / 2

    room = np.minimum(length, chunk - prompt % chunk)
    own = room**2 / 2 + before(end) - before(prompt + room)
    # At a chunk's end the remainder is none, and `before` counts the whole chunk: both agree.
    return everything, before(end) - before(np.full_like(length, prompt)), own


def _up_to(budget: float | None, prompt: int, length: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smaller of the cached tokens and `budget`, summed over the generation."""
    if budget is None:
        return length * (2 * prompt + length) / 2
    room = float(budget - prompt)
    if room <= 0:
        return float(budget) * length
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

    `trials` generations share the prompt's cache where attention is dense, and what a sparse one chooses blocks by. Local
    layers read their window whatever `attention` is. With `batch` questions at a time the
    weights are read once per step for all of them; None leaves that out, as for very large batches.

    Raises ParameterError for numbers that are none of tokens, trials or bytes.
    """
    attention = attention or Attention()
    length = np.atleast_1d(np.asarray(lengths, dtype=np.float64))
    if length.size == 0 or not np.isfinite(length).all() or (length <= 0).any():
        raise ParameterError("lengths must be positive numbers of tokens.")
    if prompt < 0 or trials < 1 or element_bytes <= 0 or (batch is not None and batch <= 0):
        raise ParameterError("prompt must be at least 0, trials at least 1, element_bytes and batch above 0.")
    n, e, full = trials, element_bytes, shape.layers - shape.local_layers
    kept, near, own = attended(shape, attention, prompt, length)
    compute = n * (2 * shape.parameters * length + shape.flop * (full * kept + shape.local_layers * near))
    # The prompt's part is read once for all trials, but not where each chooses from it.
    shared = length * (2 * prompt + n * length) / 2
    read = full * (shared if attention.budget is None else n * kept) + shape.local_layers * (near - own + n * own)
    traffic = e * shape.numbers * read
    if attention.budget is not None and attention.block > 1:
        compute = compute + n * full * shape.score_flop * (2 * prompt + length) * length / 2 / attention.block
        traffic = traffic + e * full * shape.key_numbers * shared / attention.block
    compute = compute + n * shape.other_layers * shape.other_flop * length
    traffic = traffic + n * shape.other_layers * shape.other_bytes * length
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
