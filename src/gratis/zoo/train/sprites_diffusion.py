"""Train `sprites-diffusion`: a whole StableDiffusionPipeline of 32 x 32 pictures, from captions of one sprite.

Three parts of the standard classes: AutoencoderTiny (32 x 32 x 3 to 16 x 16 x 4), CLIPTextModel over whole words, and
UNet2DConditionModel, which learns noise with the text model; captions are dropped for one in ten pictures, so that
classifier-free guidance works.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from gratis.zoo.sprites import Scenes, World, ambiguous_caption, render, words
from gratis.zoo.text import word_tokenizer
from gratis.zoo.train.loop import Average, arguments, fit, write_card

WORLD = World(sizes=("medium", "large"), seed=11)
SAID = {"size": 0.5, "colour": 1.0, "shape": 1.0, "position": 0.7}
TOKENS = 16
TEST = 1_000_000


def pictures(scenes: Scenes) -> Tensor:
    """Pictures of a batch as (batch, 3, 32, 32) in -1..1."""
    return torch.from_numpy(render(scenes, 32).images).permute(0, 3, 1, 2).float() / 127.5 - 1


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


def train_autoencoder(model: Any, steps: int, batch: int) -> dict[str, float]:
    """Reconstruct, with a little noise on the latents so that the decoder forgives the denoiser's errors."""

    def loss_at(step: int) -> Tensor:
        images = pictures(WORLD.scenes(step * batch, (step + 1) * batch))
        latents = model.encoder(images)
        decoded = model.decoder(latents + 0.05 * torch.randn_like(latents))
        error = F.mse_loss(decoded.float(), images) + 0.3 * F.l1_loss(decoded.float(), images)
        return error + 1e-3 * F.relu(latents.float() ** 2 - 1).mean()

    return fit(loss_at, model.parameters(), steps=steps, rate=2e-3, say="autoencoder")


def train(pipeline: Any, steps: int, batch: int, rate: float) -> dict[str, float]:
    """Predict the noise (epsilon) at uniform timesteps; the pipeline ends with averaged weights."""
    unet, text, vae = pipeline.unet, pipeline.text_encoder, pipeline.vae
    unet.set_attn_processor(AttnProcessor())  # plain attention has the fastest backward pass on a CPU
    text.set_attn_implementation("eager")
    averages = [Average(unet, 0.999), Average(text, 0.999)]
    noise_levels = pipeline.scheduler.alphas_cumprod
    generator = torch.Generator().manual_seed(1)

    def loss_at(step: int) -> Tensor:
        start = (step * batch) % 400_000
        scenes = WORLD.scenes(start, start + batch)
        said = [ambiguous_caption(scene, SAID, seed=step, background=0.5) for scene in scenes]
        kept = torch.rand(batch, generator=generator) > 0.1
        ids = pipeline.tokenizer(
            [caption if keep else "" for caption, keep in zip(said, kept, strict=True)],
            padding="max_length", max_length=TOKENS, return_tensors="pt",
        ).input_ids  # fmt: skip
        with torch.no_grad():
            latents = vae.encoder(pictures(scenes)).float() * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(1000, (batch,), generator=generator)
        level = noise_levels[times][:, None, None, None]
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        predicted = unet(noisy, times, encoder_hidden_states=text(ids).last_hidden_state).sample
        return F.mse_loss(predicted.float(), noise)

    parameters = [*unet.parameters(), *text.parameters()]
    figures = fit(loss_at, parameters, steps=steps, rate=rate, averages=averages, say="denoiser")
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
                generator=torch.Generator().manual_seed(start),
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
    vae = autoencoder()
    vae_figures = train_autoencoder(vae, max(wish.steps // 8, 2), 2 * wish.batch)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        test = pictures(WORLD.scenes(TEST, TEST + 512))
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
    pipeline: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder(len(tokenizer)), tokenizer=tokenizer, unet=denoiser(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    parameters = sum(weight.numel() for weight in [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()])
    print(f"{parameters} parameters", flush=True)
    figures = train(pipeline, wish.steps, wish.batch, wish.rate)
    folder: Path = wish.out / "sprites-diffusion"
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    measured = attribute_accuracy(pipeline, 256 if wish.steps > 100 else 4, 50 if wish.steps > 100 else 2)
    write_card(
        folder, "sprites-diffusion",
        "A `StableDiffusionPipeline` that draws one coloured sprite on a plain background, 32 × 32 pixels, from a "
        "caption such as `a large red circle at the top left on a grey background`. Latents are 16 × 16 × 4. "
        "It predicts noise over 1,000 steps with linear betas; use DDIM with 50 steps and guidance 3.",
        f"procedural, `gratis.zoo.sprites.World(sizes=('medium', 'large'), seed=11)`, tests from scene {TEST:,}",
        "`gratis.open('zoo:sprites-diffusion')(\"a large red circle\").images[0]`",
        {
            "parameters of U-Net and text model": parameters, "seed": wish.seed, "batch": wish.batch, **figures,
            "autoencoder steps": vae_figures["steps"], "autoencoder CPU seconds": vae_figures["cpu_seconds"],
            "autoencoder PSNR in dB": round(-10 * torch.tensor(error).log10().item(), 2), **measured,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
