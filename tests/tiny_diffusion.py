"""A tiny random Stable-Diffusion-shaped pipeline, and what the contract tests compare about it."""

from __future__ import annotations

import hashlib

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

STEPS = 6


def tiny_unet(layers_per_block: int = 2, seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32, 32), layers_per_block=layers_per_block,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
    ).eval()  # fmt: skip


def tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    unet = tiny_unet(seed=seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(
    pipeline: StableDiffusionPipeline, seed: int = 0, batch: int = 1, steps: int = STEPS, **options
) -> torch.Tensor:
    """Latents (batch, 4, 16, 16); row i is the same whatever the batch."""
    dtype = pipeline.unet.dtype
    draw = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    prompt = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(99)).to(dtype)
    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in draw]).to(dtype)
    return pipeline(
        prompt_embeds=prompt[:1].expand(batch, -1, -1), negative_prompt_embeds=prompt[1:].expand(batch, -1, -1),
        num_inference_steps=steps, guidance_scale=4.0, latents=latents, output_type="latent", **options,
    ).images  # fmt: skip


def snapshot(pipeline) -> dict:
    """Everything that a method could leave behind on the pipeline, its U-Net and its scheduler."""
    parts = {"pipeline": sorted(vars(pipeline)), "scheduler": sorted(vars(pipeline.scheduler))}
    for name, module in pipeline.unet.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in {"_parameters", "_buffers", "_modules"}}
        parts[name] = (
            sorted(own),
            {k: id(v) for k, v in own.items() if callable(v)},
            {k: len(v) for k, v in own.items() if "hook" in k and hasattr(v, "__len__")},
            module.training,
        )
    weights = {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in pipeline.unet.state_dict().items()
    }
    processors = {name: id(processor) for name, processor in pipeline.unet.attn_processors.items()}
    return {
        "parts": parts,
        "weights": weights,
        "processors": processors,
        "config": repr(pipeline.scheduler.config),
        "method_calls": {n: n in vars(pipeline.scheduler) for n in ("step", "set_timesteps")},
    }
