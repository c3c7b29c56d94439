"""Growing a language model layer by layer on embeddings that are never learned.

A. Bochkov, "Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate", 2025 (arXiv
2507.07129): the first block and the head are trained on frozen embeddings; then the block is frozen, another is put on
top of it and trained with the head, and so on. A later version of the paper ends with low-rank updates of all blocks at
once. Frozen blocks stay what they are, bit for bit, and the optimiser holds nothing for them.

Learning rates and steps are not published; the defaults of the training script are this project's own: few steps for
each layer and many of low-rank updates, without which the model stays far behind one whose layers were trained all at
once (benchmarks/growth.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gratis.contract.errors import InputError

Train = Callable[[Any, int], dict[str, float]]
"""Trains what can be trained of a model in a stage (from 0 on), and returns figures."""


@dataclass
class Stage:
    """What a stage of growth did."""

    layers: int
    trained: int
    """Numbers that were trained; an Adam optimiser holds two for each."""
    figures: dict[str, float] = field(default_factory=dict)


def frozen_embeddings(model: Any, embeddings: Tensor) -> Any:
    """`model` with the rows of `embeddings` (vocabulary, width) in its input table, which is not trained any more.

    The head stays a table of its own. Raises InputError for another shape, or where head and input are one table.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table.weight.shape != embeddings.shape:
        raise InputError(
            f"The embeddings are {tuple(embeddings.shape)}, and the model's table {tuple(table.weight.shape)}."
        )
    if head is not None and head.weight is table.weight:
        raise InputError("Head and input are one table in this model: set tie_word_embeddings to False.")
    with torch.no_grad():
        table.weight.copy_(embeddings)
    table.weight.requires_grad_(False)
    return model


def blocks_of(model: Any) -> nn.ModuleList:
    """The blocks of a decoder-only model, the first one first. Raises InputError where there is not one list of them."""
    depth = model.config.num_hidden_layers
    found = [
        part for part in model.modules()
        if isinstance(part, nn.ModuleList) and len(part) == depth and len({type(block) for block in part}) == 1
    ]  # fmt: skip
    if len(found) != 1:
        raise InputError(f"{type(model).__name__} has {len(found)} lists of {depth} blocks, and growing needs one.")
    return found[0]


def add_block(model: Any, start: str = "identity") -> nn.Module:
    """Put another block on top of `model`, in place, and return it.

    "identity" sets the matrices through which the block adds to its input to zero, so that the model's outputs stay what
    they are; "random" leaves it as the architecture initialises it.
    """
    blocks = blocks_of(model)
    taller = copy.deepcopy(model.config)
    taller.num_hidden_layers = len(blocks) + 1
    if getattr(taller, "layer_types", None):
        taller.layer_types = [*model.config.layer_types, model.config.layer_types[-1]]
    block = blocks_of(type(model)(taller))[-1].to(next(model.parameters()))
    block.train(model.training)
    if start == "identity":
        silence(block)
    elif start != "random":
        raise InputError(f"A block starts as 'identity' or 'random', not {start!r}.")
    blocks.append(block)
    model.config.num_hidden_layers = taller.num_hidden_layers
    if getattr(taller, "layer_types", None):
        model.config.layer_types = taller.layer_types
    return block


def silence(block: nn.Module) -> None:
    """Set to zero the last matrix of every part of `block` that adds to the residual stream (attention and MLP)."""
    for part in block.children():
        matrices = [module for module in part.modules() if _is_matrix(module)]
        if matrices:
            for weight in matrices[-1].parameters():
                nn.init.zeros_(weight)


def grow(
    model: Any,
    train: Train,
    layers: int,
    *,
    start: str = "identity",
    rank: int = 0,
    before: Callable[[Any], None] = lambda model: None,
) -> list[Stage]:
    """Train `model`, of one block, and grow it to `layers` blocks, one stage for each; in place.

    In a stage the top block, the final norm and the head are trained, and nothing else. With `rank` above 0 a last stage
    trains low-rank updates of every matrix in all blocks, with the head, and adds them to the weights. `before` is
    called with the model at the start of each stage. Returns what each stage did.
    """
    blocks = blocks_of(model)
    if len(blocks) != 1 or layers < 1:
        raise InputError(f"Growing starts with one block and ends with at least one, not {len(blocks)} and {layers}.")
    table = model.get_input_embeddings().weight
    model.requires_grad_(True)
    table.requires_grad_(False)
    stages = []
    for number in range(layers):
        if number:
            blocks.requires_grad_(False)
            add_block(model, start)
        before(model)
        stages.append(Stage(len(blocks), trainable(model), train(model, number)))
    blocks.requires_grad_(False)
    if rank:
        with low_rank_updates(blocks, rank):
            before(model)
            stages.append(Stage(len(blocks), trainable(model), train(model, layers)))
    return stages


def trainable(model: nn.Module) -> int:
    """Numbers of `model` that an optimiser would hold states for."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


class LowRankUpdate(nn.Module):
    """W + B A (E. Hu et al., "LoRA", 2021, eq. 3) with A at random and B at zero, so that W is unchanged at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(torch.randn(rank, inputs, device=weight.device) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its update."""
        return weight + (self.up @ self.down).to(weight.dtype)


@contextmanager
def low_rank_updates(blocks: nn.Module, rank: int) -> Iterator[None]:
    """Every matrix of `blocks` gets a trainable update of `rank`, which is added to it at the end."""
    matrices = [module for module in blocks.modules() if _is_matrix(module)]
    for matrix in matrices:
        weight: Any = matrix.weight
        parametrize.register_parametrization(matrix, "weight", LowRankUpdate(weight, rank))
    try:
        yield
    finally:
        for matrix in matrices:
            parametrize.remove_parametrizations(matrix, "weight", leave_parametrized=True)


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
