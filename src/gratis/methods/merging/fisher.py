"""Average weights by how much each matters to its model: the diagonal of the Fisher information.

M. Matena and C. Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, eq. 3 and 6.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.subjects.checkpoints import Checkpoint

FLOOR = 1e-6
"""Added to every importance, so that weights that matter to no model are averaged."""


class Fisher(Merge):
    """The mean of the experts' weights, each entry weighted by its Fisher information in its own model.

    The information comes from files, one per expert, with a tensor per weight: `from_inputs` writes them.
    """

    card = Card(
        title="Merging Models with Fisher-Weighted Averaging",
        authors="Matena, Raffel",
        year=2022,
        paper="NeurIPS 2022, arXiv:2111.09832",
        acts_on="checkpoints",
        free_of=("training", "labels", "base model"),
        summary="one model from several fine-tunes, each weight by the models that it matters to",
        limits=(
            "Needs some unlabelled inputs per expert. Tensors without information are averaged. A model whose gradients "
            "are larger wins everywhere unless information is normalised."
        ),
        claims=(
            Claim(
                name="no gain over the average on digits; within 0.03 of it where information is normalised",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.03,
                against="average",
                parameters={"normalize": True},
            ),
        ),
    )
    needs_base = False

    information: tuple[str, ...] = param((), help="safetensors files of Fisher information, one per expert")
    normalize: bool = param(False, help="divide each expert's information by its norm over the whole model")

    def check_experts(self, count: int) -> None:
        if len(self.information) != count:
            raise InputError(f"Fisher: there are {count} experts but {len(self.information)} files of information.")

    def from_inputs(
        self,
        models: Sequence[torch.nn.Module],
        inputs: Sequence[Iterable[Any]],
        folder: str | os.PathLike[str],
        log_probabilities: Callable[[Any, Any], Tensor] | None = None,
    ) -> Self:
        """The method with the information of `models` on `inputs`, one collection of examples per expert.

        Files go into `folder`. `log_probabilities(model, example)` returns (classes,); by default the model is a
        classifier that is called with the example, (features,). Raises InputError without examples.
        """
        from safetensors.torch import save_file

        def of_classifier(model: Any, example: Any) -> Tensor:
            logs: Tensor = model(example[None])[0].log_softmax(-1)
            return logs

        files = []
        for number, (model, examples) in enumerate(zip(models, inputs, strict=True)):
            file = Path(folder) / f"information-{number}.safetensors"
            found = fisher_information(model, examples, log_probabilities or of_classifier)
            save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, file)
            files.append(str(file))
        return self.replace(information=tuple(files))

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        merged, total = torch.zeros_like(experts[0]), torch.zeros_like(experts[0])
        for expert, weight, path in zip(experts, part.weights, self.information, strict=True):
            importance = _importance(path, part, len(expert)).to(expert.device)
            if self.normalize:
                importance = importance / _norm(path)
            importance = (importance + FLOOR) * weight
            merged.addcmul_(importance, expert)
            total.add_(importance)
        return merged.div_(total)


def fisher_information(
    model: torch.nn.Module, examples: Iterable[Any], log_probabilities: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """The diagonal Fisher information of every weight: the mean over examples of E_{y~p} (d log p(y) / d weight)^2.

    `log_probabilities(model, example)` returns (classes,) log-probabilities of one example. The expectation over
    classes is exact, and gradients are squared example by example.
    """
    names, weights = zip(*((n, w) for n, w in model.named_parameters() if w.requires_grad), strict=True)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    count = 0
    for example in examples:
        logs = log_probabilities(model, example)
        every = torch.eye(len(logs), dtype=logs.dtype, device=logs.device)
        gradients = torch.autograd.grad(logs, weights, every, is_grads_batched=True, allow_unused=True)
        shares = logs.detach().exp()
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total.add_(torch.tensordot(shares, gradient.square().to(shares.dtype), 1))
        count += 1
    if not count:
        raise InputError("Fisher information needs at least one example.")
    return {name: total / count for name, total in zip(names, sums, strict=True)}


@functools.lru_cache(maxsize=64)
def _opened(path: str) -> Checkpoint:
    return Checkpoint(path)


@functools.lru_cache(maxsize=64)
def _norm(path: str) -> float:
    squares = sum(float(_opened(path).view(name).double().square().sum()) for name in _opened(path).places)
    return math.sqrt(squares) or 1.0


def _importance(path: str, part: MergePart, count: int) -> Tensor:
    source = _opened(path)
    if part.tensor not in source.places:
        return torch.zeros(count)
    if source.places[part.tensor].shape != part.shape:
        raise InputError(f"Fisher: {part.tensor!r} has another shape in {path} than in the experts.")
    return source.view(part.tensor, part.start, count).float()
