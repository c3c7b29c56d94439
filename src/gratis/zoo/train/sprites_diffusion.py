"""Train `sprites-diffusion`: a whole StableDiffusionPipeline of 32 x 32 pictures, from captions of one sprite.

Three parts of the standard classes: AutoencoderTiny (32 x 32 x 3 to 16 x 16 x 4), CLIPTextModel over whole words, and
UNet2DConditionModel, which learns noise with the text model; captions are dropped for one in ten pictures, so that
classifier-free guidance works.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from gratis.zoo.sprites import World, ambiguous_caption, render, words
from gratis.zoo.sprites_tokens import pixels
from gratis.zoo.text import word_tokenizer
from gratis.zoo.train.loop import Average, Examples, arguments, fit, note_pace, write_card

WORLD = World(sizes=("medium", "large"), seed=11)
SAID = {"size": 0.5, "colour": 1.0, "shape": 1.0, "position": 0.7}
TOKENS = 16
PICTURES, WORDINGS = 30_000, 4
TEST = 1_000_000


def autoencoder() -> Any:
    """Two resolutions, 32 channels; 4 latent channels at half the side."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32), num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1), latent_channels=4, upsampling_scaling_factor=2, scaling_factor=1.0,
    )  # fmt: skip


def denoiser() -> Any:
    """Three resolutions (16, 8, 4) with two layers each, cross-attention to the caption at 4."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(32, 48, 48),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8, use_linear_projection=True,
    )  # fmt: skip


def text_encoder(vocabulary: int) -> CLIPTextModel:
    """Two layers of width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=TOKENS, projection_dim=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def train_autoencoder(model: Any, shown: Tensor, wish: argparse.Namespace) -> dict[str, float]:
    """Reconstruct, with a little noise on the latents so that the decoder forgives the denoiser's errors."""
    examples = Examples(shown, batch=2 * wish.batch, seed=wish.seed, device=wish.device)

    def loss_at(step: int) -> Tensor:
        images = pixels(examples.draw()[0])
        latents = model.encoder(images)
        decoded = model.decoder(latents + 0.05 * torch.randn_like(latents))
        error = F.mse_loss(decoded, images) + 0.3 * F.l1_loss(decoded, images)
        return error + 1e-3 * F.relu(latents**2 - 1).mean()

    return fit(
        loss_at, model.parameters(), steps=max(wish.steps // 8, 2), rate=2e-3, seconds=0.2 * wish.seconds,
        say="autoencoder",
    )  # fmt: skip


def train(pipeline: Any, shown: Tensor, captions: Tensor, wish: argparse.Namespace) -> dict[str, float]:
    """Predict the noise (epsilon) at uniform timesteps; the pipeline ends with averaged weights.

    captions: (pictures, wordings, 16); one in ten is replaced by that of the empty text.
    """
    unet, text, vae = pipeline.unet, pipeline.text_encoder, pipeline.vae
    averages = [Average(unet, 0.999), Average(text, 0.999)]
    noise_levels = pipeline.scheduler.alphas_cumprod.to(wish.device)
    with torch.no_grad():
        latents = torch.cat([vae.encoder(pixels(part.to(wish.device))) for part in shown.split(256)])
    latents = latents * vae.config.scaling_factor
    examples = Examples(latents, captions, batch=wish.batch, seed=wish.seed, device=wish.device)
    empty = pipeline.tokenizer("", padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids

    def loss_at(step: int) -> Tensor:
        clean, wordings = examples.draw()
        ids = wordings[:, step % wordings.shape[1]]
        dropped = torch.rand(len(ids), 1, device=ids.device) < 0.1
        ids = torch.where(dropped, empty.to(ids.device), ids)
        noise = torch.randn_like(clean)
        times = torch.randint(len(noise_levels), (len(clean),), device=clean.device)
        level = noise_levels[times][:, None, None, None]
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        predicted = unet(noisy, times, encoder_hidden_states=text(ids).last_hidden_state).sample
        return F.mse_loss(predicted, noise)

    parameters = [*unet.parameters(), *text.parameters()]
    figures = fit(
        loss_at, parameters, steps=wish.steps, rate=wish.rate, averages=averages, seconds=0.8 * wish.seconds,
        say="denoiser",
    )  # fmt: skip
    for module, average in zip((unet, text), averages, strict=True):
        module.load_state_dict(average.module.state_dict())
    return figures


@torch.no_grad()
def attribute_accuracy(pipeline: Any, count: int, steps: int = 50, guidance: float = 3.0) -> dict[str, float]:
    """How often the classifier of the zoo sees the caption's shape, colour and both in `count` generated pictures."""
    from gratis.zoo import load
    from gratis.zoo.sprites_classifier import classify

    scenes = WORLD.scenes(TEST, TEST + count)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, count, 64):
        rows = scenes[start : start + 64]
        images.append(
            pipeline(
                [ambiguous_caption(scene, SAID, seed=0, background=0.5) for scene in rows],
                num_inference_steps=steps, guidance_scale=guidance, output_type="np",
                generator=torch.Generator(pipeline.device).manual_seed(start),
            ).images
        )  # fmt: skip
    seen = classify(load("sprites-classifier"), torch.from_numpy(np.concatenate(images)))
    colour = torch.from_numpy(scenes.colour[:, 0]).long() == seen.colour
    shape = torch.from_numpy(scenes.shape[:, 0]).long() == seen.shape
    return {
        "colour accuracy of generated pictures": round(colour.float().mean().item(), 4),
        "shape accuracy of generated pictures": round(shape.float().mean().item(), 4),
        "colour and shape accuracy of generated pictures": round((colour & shape).float().mean().item(), 4),
    }


def main() -> None:
    """Train the parts, save the pipeline, measure it as saved."""
    wish = arguments(__doc__ or "", steps=3000, batch=32, rate=1.5e-3)
    tokenizer = word_tokenizer(words(), TOKENS)
    scenes = WORLD.scenes(0, min(PICTURES, 2 * wish.steps * wish.batch))
    shown = torch.from_numpy(render(scenes, 32).images)
    said = [ambiguous_caption(scene, SAID, seed=seed, background=0.5) for scene in scenes for seed in range(WORDINGS)]
    captions = tokenizer(said, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    vae = autoencoder().to(wish.device)
    vae_figures = train_autoencoder(vae, shown, wish)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        test = pixels(torch.from_numpy(render(WORLD.scenes(TEST, TEST + 512), 32).images)).to(wish.device)
        latents = vae.encoder(test)
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        error = F.mse_loss(vae.decoder(latents), test).item() / 4
    scheduler = DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    kind: Any = StableDiffusionPipeline
    pipeline = kind(
        vae=vae, text_encoder=text_encoder(len(tokenizer)), tokenizer=tokenizer, unet=denoiser(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(wish.device)  # fmt: skip
    parameters = sum(weight.numel() for weight in [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()])
    print(f"{parameters} parameters", flush=True)
    folder: Path = wish.out / "sprites-diffusion"
    figures = train(pipeline, shown, captions.view(len(scenes), WORDINGS, TOKENS), wish)
    if wish.pace:
        note_pace(folder, figures)
        return
    pipeline.to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True)
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32).to(wish.device)
    pipeline.set_progress_bar_config(disable=True)
    whole = figures["steps"] > 100
    measured = attribute_accuracy(pipeline, 256 if whole else 4, 50 if whole else 2)
    write_card(
        folder, "sprites-diffusion",
        "A `StableDiffusionPipeline` that draws one coloured sprite on a plain background, 32 × 32 pixels, from a "
        "caption such as `a large red circle at the top left on a grey background`. Latents are 16 × 16 × 4. "
        "It predicts noise over 1,000 steps with linear betas; use DDIM with 50 steps and guidance 3.",
        f"procedural, `gratis.zoo.sprites.World(sizes=('medium', 'large'), seed=11)`, tests from scene {TEST:,}",
        "`gratis.open('zoo:sprites-diffusion')(\"a large red circle\").images[0]`",
        {
            "parameters of U-Net and text model": parameters, "seed": wish.seed, "batch": wish.batch,
            "rate": wish.rate, **figures, "autoencoder steps": vae_figures["steps"],
            "autoencoder CPU seconds": vae_figures["cpu_seconds"],
            "autoencoder PSNR in dB": round(-10 * torch.tensor(error).log10().item(), 2), **measured,
        },
        device=wish.device,
    )  # fmt: skip


if __name__ == "__main__":
    main()
