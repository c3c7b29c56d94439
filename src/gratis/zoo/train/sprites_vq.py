"""Train `sprites-vq`: a VQModel that turns 32 x 32 pictures into 8 x 8 of 256 codes and back."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from gratis.zoo import load
from gratis.zoo.sprites import render
from gratis.zoo.sprites_classifier import classify
from gratis.zoo.sprites_tokens import CODES, FIRST_CODE, SIDE, WORLD, decode, encode, pixels
from gratis.zoo.train.loop import Examples, arguments, fit, note_pace, save_half, write_card

PICTURES = 30_000
TEST = 1_000_000


def autoencoder(channels: tuple[int, int, int] = (24, 32, 48)) -> Any:
    """Three resolutions (32, 16, 8) of one layer each; codes of 8 numbers."""
    return VQModel(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=8, vq_embed_dim=8,
        num_vq_embeddings=CODES, norm_num_groups=8, sample_size=32, mid_block_add_attention=False,
    )  # fmt: skip


class Usage:
    """Which codes are in use; codes out of use are moved onto latents of the current batch."""

    def __init__(self, device: str = "cpu") -> None:
        self.counts = torch.zeros(CODES, device=device)  # the first update that revives places every code on latents

    @torch.no_grad()
    def update(self, codes: Tensor, latents: Tensor, codebook: Tensor, revive: bool) -> None:
        """codes: (places,), latents: (places, 8), codebook: (256, 8), changed in place where `revive` is set."""
        self.counts.mul_(0.98).add_(torch.bincount(codes, minlength=CODES).float(), alpha=0.02)
        dead = (self.counts < 0.02 * codes.numel() / CODES).nonzero().flatten() if revive else codes[:0]
        if len(dead):
            picked = latents[torch.randint(len(latents), (len(dead),), device=latents.device)].float()
            codebook[dead] = picked + 0.01 * torch.randn_like(picked)
            self.counts[dead] = codes.numel() / CODES


def main() -> None:
    """Train, save, measure as saved."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--channels", type=int, nargs=3, default=(24, 32, 48), help="at 32, 16 and 8 pixels")

    wish = arguments(__doc__ or "", steps=1800, batch=48, rate=2e-3, more=more)
    model = autoencoder(tuple(wish.channels)).to(wish.device)
    usage = Usage(wish.device)
    shown = torch.from_numpy(render(WORLD.scenes(0, min(PICTURES, wish.steps * wish.batch)), 32).images)
    examples = Examples(shown, batch=wish.batch, seed=wish.seed, device=wish.device)

    def loss_at(step: int) -> Tensor:
        (part,) = examples.draw()
        images = pixels(part)
        latents = model.encode(images).latents
        if step < min(100, wish.steps // 8):
            quantised, commitment = latents, latents.square().mean() * 0.01
        else:
            quantised, commitment, (_, _, codes) = model.quantize(latents)
            flat = latents.detach().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
            revive = step % 10 == 0 and step < 0.7 * wish.steps
            usage.update(codes, flat, model.quantize.embedding.weight.data, revive)
        decoded = model.decode(quantised, force_not_quantize=True).sample
        error = F.mse_loss(decoded, images) + 0.3 * F.l1_loss(decoded, images)
        return error + torch.as_tensor(commitment)

    figures = fit(loss_at, model.parameters(), steps=wish.steps, rate=wish.rate, seconds=wish.seconds)
    folder = wish.out / "sprites-vq"
    if wish.pace:
        note_pace(folder, figures)
        return
    figures = {"seed": wish.seed, "batch": wish.batch, "rate": wish.rate, **figures}
    save_half(model, folder)
    saved = VQModel.from_pretrained(folder, torch_dtype=torch.float32).to(wish.device).eval()
    scenes = WORLD.scenes(TEST, TEST + 512)
    images = render(scenes, 32).images
    codes = encode(saved, images)
    decoded = decode(saved, codes + FIRST_CODE)
    error = F.mse_loss(torch.from_numpy(decoded).float() / 255, torch.from_numpy(images).float() / 255)
    seen = classify(load("sprites-classifier"), torch.from_numpy(decoded))
    before = classify(load("sprites-classifier"), torch.from_numpy(images))
    write_card(
        folder, "sprites-vq",
        f"A diffusers `VQModel`: 32 × 32 pictures of one sprite as {SIDE} × {SIDE} of {CODES} codes, and back. "
        "The image tokenizer of `sprites-prior`.",
        f"procedural, `gratis.zoo.sprites_tokens.WORLD`, tests from scene {TEST:,}",
        "`gratis.zoo.sprites_tokens.encode` and `decode` with `gratis.open('zoo:sprites-vq')`",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), **figures,
            "PSNR in dB": round(-10 * error.log10().item(), 2),
            "codes in use over 512 pictures": int(codes.unique().numel()),
            "colour accuracy of decoded pictures": round(
                (seen.colour == torch.from_numpy(scenes.colour[:, 0])).float().mean().item(), 4
            ),
            "shape accuracy of decoded pictures": round(
                (seen.shape == torch.from_numpy(scenes.shape[:, 0])).float().mean().item(), 4
            ),
            "shape accuracy of the pictures themselves": round(
                (before.shape == torch.from_numpy(scenes.shape[:, 0])).float().mean().item(), 4
            ),
        },
        device=wish.device,
    )  # fmt: skip


if __name__ == "__main__":
    main()
