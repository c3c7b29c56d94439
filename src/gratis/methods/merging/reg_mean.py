"""Merge linear layers so that their outputs on each model's own inputs change least.

X. Jin, X. Ren, D. Preotiuc-Pietro and P. Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR
2023 (RegMean): `W' = (sum G_i)^-1 sum G_i W_i'` with `G_i = X_i' X_i / N`, off-diagonal entries times a.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.subjects.checkpoints import Checkpoint


class RegMean(Merge):
    """Linear layers by least squares over each expert's inputs, all other tensors by the mean.

    The inputs come as files of Gram matrices, one per expert: `from_inputs` writes them.
    """

    card = Card(
        title="Dataless Knowledge Fusion by Merging Weights of Language Models",
        authors="Jin, Ren, Preotiuc-Pietro, Cheng",
        year=2023,
        paper="ICLR 2023, arXiv:2212.09849",
        acts_on="checkpoints",
        free_of=("training", "labels", "base model"),
        summary="one model from several fine-tunes, whose linear layers answer as each expert's did",
        limits="Needs some unlabelled inputs per expert. Weights of the call are used for the mean only.",
        claims=(
            Claim(
                name="with 256 unlabelled pictures of each way of showing digits, better than the average by 0.04",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.04,
                against="average",
                parameters={},
            ),
        ),
    )
    needs_base = False

    grams: tuple[str, ...] = param((), help="safetensors files of Gram matrices, one per expert")
    off_diagonal: float = param(
        0.9, at_least=0, at_most=1, help="factor of off-diagonal entries (a): 0.9 in the paper", search=(0.1, 1.0)
    )

    def check_experts(self, count: int) -> None:
        if len(self.grams) != count:
            raise InputError(f"RegMean: there are {count} experts but {len(self.grams)} files of Gram matrices.")

    def from_inputs(
        self,
        models: Sequence[torch.nn.Module],
        inputs: Sequence[Iterable[Any]],
        folder: str | os.PathLike[str],
        run: Callable[[Any, Any], Any] | None = None,
    ) -> Self:
        """The method with the Gram matrices of `models` on `inputs`, one collection of examples per expert.

        Files go into `folder`. `run(model, example)` runs a model; by default it is called with the example. Raises
        InputError without examples.
        """
        from safetensors.torch import save_file

        files = []
        for number, (model, examples) in enumerate(zip(models, inputs, strict=True)):
            file = Path(folder) / f"grams-{number}.safetensors"
            found = gram_matrices(model, examples, run or (lambda model, example: model(example)))
            save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, file)
            files.append(str(file))
        return self.replace(grams=tuple(files))

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["stretch", "tensor"]:
        return "tensor" if len(shape) == 2 and self._known(tensor) else "stretch"

    def _known(self, tensor: str) -> bool:
        return all(tensor in _opened(path).places for path in self.grams)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        if len(part.shape) != 2 or not self._known(part.tensor):
            total = sum(part.weights)
            if total == 0:
                raise InputError("RegMean: the weights sum to 0, so there is no mean.")
            merged = experts[0].mul_(part.weights[0] / total)
            for expert, weight in zip(experts[1:], part.weights[1:], strict=True):
                merged.add_(expert, alpha=weight / total)
            return merged
        total_gram, right = None, None
        for expert, path in zip(experts, self.grams, strict=True):
            gram = _opened(path).tensor(part.tensor).double()
            if gram.shape != (part.shape[1], part.shape[1]):
                raise InputError(f"RegMean: the Gram matrix of {part.tensor!r} in {path} has another width.")
            diagonal = gram.diagonal().clone()
            gram = gram * self.off_diagonal
            gram.diagonal().copy_(diagonal)
            product = gram @ expert.view(part.shape).double().T
            total_gram = gram if total_gram is None else total_gram + gram
            right = product if right is None else right + product
        assert total_gram is not None
        assert right is not None
        # Inputs that were never seen leave the system singular: the least-norm solution there.
        solved: Tensor = torch.linalg.pinv(total_gram, hermitian=True) @ right
        return solved.T.float().flatten()


@torch.no_grad()
def gram_matrices(model: torch.nn.Module, examples: Iterable[Any], run: Callable[[Any, Any], Any]) -> dict[str, Tensor]:
    """By name of its weight, the mean of x x' over all inputs x of every linear layer; `run(model, example)` runs it."""
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            product = rows.T @ rows
            sums[name] = sums[name].add_(product) if name in sums else product
            seen[name] = seen.get(name, 0) + len(rows)

        return record

    handles = [
        module.register_forward_pre_hook(hook(f"{name}.weight" if name else "weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        for example in examples:
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise InputError("Gram matrices need at least one example that reaches a linear layer.")
    return {name: total / seen[name] for name, total in sums.items()}


@functools.lru_cache(maxsize=64)
def _opened(path: str) -> Checkpoint:
    return Checkpoint(path)
