"""Train `sprites-classifier`: a ResNet that names colour and shape of the one sprite of a 32 x 32 picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from gratis.zoo.sprites import COLOURS, SHAPES, TEXTURES, World, render, shift
from gratis.zoo.sprites_classifier import classify
from gratis.zoo.train.loop import Average, arguments, fit, save_half, write_card

WORLD = World(textures=TEXTURES, background_kinds=("plain", "gradient", "noisy"), turn=0.2, seed=12)
TEST = 1_000_000
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def classifier() -> ResNetForImageClassification:
    """Three resolutions (8, 4, 2) of one basic block each after the usual stem; 64 joint classes."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic",
            id2label=dict(enumerate(NAMES)), label2id={name: index for index, name in enumerate(NAMES)},
        )
    )  # fmt: skip


def accuracy(model: ResNetForImageClassification, world: World, domain: str = "clear") -> tuple[float, float]:
    """Accuracy of colour and of shape over 1,024 unseen scenes."""
    scenes = world.scenes(TEST, TEST + 1024)
    images = shift(render(scenes, 32).images, domain)
    seen = classify(model, torch.from_numpy(images))
    colour = (seen.colour == torch.from_numpy(scenes.colour[:, 0])).float().mean().item()
    shape = (seen.shape == torch.from_numpy(scenes.shape[:, 0])).float().mean().item()
    return round(colour, 4), round(shape, 4)


def main() -> None:
    """Train, save, measure as saved."""
    wish = arguments(__doc__ or "", steps=4000, batch=128, rate=3e-3)
    model = classifier()
    average = Average(model, 0.998)

    def loss_at(step: int) -> Tensor:
        scenes = WORLD.scenes(step * wish.batch, (step + 1) * wish.batch)
        images = torch.from_numpy(render(scenes, 32).images).permute(0, 3, 1, 2).float() / 127.5 - 1
        images = images + 0.1 * torch.rand(wish.batch, 1, 1, 1) * torch.randn_like(images)
        labels = torch.from_numpy(scenes.colour[:, 0]).long() * len(SHAPES) + torch.from_numpy(scenes.shape[:, 0])
        return F.cross_entropy(model(pixel_values=images).logits.float(), labels, label_smoothing=0.02)

    figures = fit(loss_at, model.parameters(), steps=wish.steps, rate=wish.rate, averages=[average])
    folder = wish.out / "sprites-classifier"
    save_half(average.module, folder)
    saved = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    whole, large = accuracy(saved, WORLD), accuracy(saved, World(sizes=("medium", "large"), seed=11))
    shifted = {
        f"colour, shape accuracy in domain {domain}": " / ".join(
            f"{value:.3f}" for value in accuracy(saved, WORLD, domain)
        )
        for domain in ("noise", "fog", "night", "cast", "blur")
    }
    write_card(
        folder, "sprites-classifier",
        "A `ResNetForImageClassification` over 64 joint classes (colour and shape) of the one sprite of a "
        "32 × 32 picture; pixels in -1..1. It judges generated pictures, and meets data that it was not trained on "
        "in the sprite world's other domains.",
        "procedural, `gratis.zoo.sprites.World(textures=TEXTURES, background_kinds=('plain', 'gradient', 'noisy'), "
        f"turn=0.2, seed=12)` with a little noise, tests from scene {TEST:,}",
        "`gratis.zoo.sprites_classifier.classify(gratis.open('zoo:sprites-classifier'), images)`",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), "seed": wish.seed,
            "batch": wish.batch, **figures, "colour accuracy": whole[0], "shape accuracy": whole[1],
            "colour accuracy, plain medium and large sprites": large[0],
            "shape accuracy, plain medium and large sprites": large[1], **shifted,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
