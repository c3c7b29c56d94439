"""Train `sprites-segmenter`, a small SAM that finds the sprite in a box, and specialists fine-tuned from it.

`--look clean` trains the generalist; `--look textured` and `--look faded` fine-tune it further on one look alone.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SamConfig, SamModel

from gratis.zoo.sprites_segmenter import LOOKS, SIDE, Boxed, boxed, scores, segment
from gratis.zoo.train.loop import WEIGHTS, Average, fit, save_half, write_card

TEST = 1_000_000
GENERALIST = "sprites-segmenter"


def segmenter() -> SamModel:
    """Six blocks of width 64 over 8 x 8 patches, windows of 4 except in every third; a decoder of width 64."""
    return SamModel(
        SamConfig(
            vision_config={
                "image_size": SIDE, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 6,
                "num_attention_heads": 4, "mlp_dim": 192, "output_channels": 64, "window_size": 4,
                "global_attn_indexes": [2, 5], "num_pos_feats": 32, "initializer_range": 0.02,
            },
            prompt_encoder_config={
                "hidden_size": 64, "image_size": SIDE, "patch_size": 8, "image_embedding_size": 8,
                "mask_input_channels": 8,
            },
            mask_decoder_config={
                "hidden_size": 64, "mlp_dim": 128, "num_attention_heads": 4, "iou_head_hidden_dim": 32,
            },
        )
    )  # fmt: skip


def loss_of(model: SamModel, pictures: Boxed, generator: torch.Generator) -> Tensor:
    """Cross-entropy per pixel and soft Dice; boxes are off by up to two pixels."""
    boxes = (pictures.boxes + 4 * torch.rand(pictures.boxes.shape, generator=generator) - 2).clamp(0, SIDE)
    logits = segment(model, pictures.images, boxes)
    target = pictures.masks.float()
    shares = logits.sigmoid().flatten(1)
    overlap = (shares * target.flatten(1)).sum(1)
    soft = 1 - (2 * overlap + 1) / (shares.sum(1) + target.flatten(1).sum(1) + 1)
    return 5 * F.binary_cross_entropy_with_logits(logits, target) + soft.mean()


def main() -> None:
    """Train, save, measure as saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--look", choices=LOOKS[:3], default="clean")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=type(WEIGHTS), default=WEIGHTS)
    wish = parser.parse_args()
    general = wish.look == "clean"
    steps, rate = wish.steps or (1000 if general else 200), wish.rate or (2e-3 if general else 5e-4)
    torch.set_num_threads(wish.threads)
    torch.manual_seed(wish.seed)
    model = segmenter() if general else SamModel.from_pretrained(wish.out / GENERALIST, dtype=torch.float32)
    model.train()
    average, generator = Average(model, 0.995), torch.Generator().manual_seed(wish.seed)

    def loss_at(step: int) -> Tensor:
        # Matrices this small are twice as fast in float32 on a processor.
        with torch.autocast("cpu", enabled=False):
            return loss_of(model, boxed(wish.look, step * wish.batch, (step + 1) * wish.batch), generator)

    figures = fit(loss_at, model.parameters(), steps=steps, rate=rate, averages=[average])
    name = GENERALIST if general else f"{GENERALIST}-{wish.look}"
    folder = wish.out / name
    save_half(average.module, folder)
    saved = SamModel.from_pretrained(folder, dtype=torch.float32).eval()
    seen = {
        f"Dice on 256 unseen {look} pictures": round(scores(saved, boxed(look, TEST, TEST + 256)).mean().item(), 4)
        for look in LOOKS
    }
    what = "trained on plain scenes" if general else f"the generalist, fine-tuned on the {wish.look} look alone"
    write_card(
        folder, name,
        f"A `SamModel` that finds the sprite in a box, {what}; pictures of 64 × 64 pixels in -1..1. With its "
        "siblings it is what merges of segmentation models are tried on.",
        f"procedural, the look `{wish.look}` of `gratis.zoo.sprites_segmenter`, tests from scene {TEST:,}",
        f"`gratis.zoo.sprites_segmenter.segment(gratis.open('zoo:{name}'), images, boxes)`",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), "seed": wish.seed,
            "batch": wish.batch, "rate": rate, **figures, **seen,
        },
        script="sprites_segmenter", flags="" if general else f" --look {wish.look}", precision="float32",
    )  # fmt: skip


if __name__ == "__main__":
    main()
