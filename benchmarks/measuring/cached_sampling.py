"""Sampling with DeepCache, in a process of its own: prints one line of JSON and saves the latents.

python cached_sampling.py {gratis|deepcache} FOLDER STEPS. The same random U-Net of Stable Diffusion's shape with a
fifth of its width in both environments; FOLDER/latents-ARM.pt receives the final latents by interval and branch.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

ARM, FOLDER, STEPS = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
SETTINGS = ((1, 0), (2, 0), (3, 0), (5, 0), (3, 1), (3, 2))
"""Interval and branch (down layers that still run)."""


def pipeline() -> Any:
    """Text encoder left out, picture decoder unused: the time is that of the sampling loop."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=192, attention_head_dim=8,
        norm_num_groups=16,
    ).eval()  # fmt: skip
    decoder = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=decoder, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def cached(pipe: Any, interval: int, branch: int) -> Iterator[None]:
    if interval == 1:
        yield
    elif ARM == "gratis":
        import gratis

        with gratis.attach(pipe, gratis.DeepCache(interval=interval, skip=branch)):
            yield
    else:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        yield
        helper.disable()


def main() -> None:
    torch.set_num_threads(1)
    pipe = pipeline()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randn(1, 77, 192, generator=generator) for _ in range(2)]

    def sample() -> tuple[torch.Tensor, float]:
        begin = time.process_time()
        latents = pipe(
            prompt_embeds=texts[0], negative_prompt_embeds=texts[1], num_inference_steps=STEPS, guidance_scale=7.5,
            height=256, width=256, generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip
        return latents, time.process_time() - begin

    sample()
    found, seconds = {}, {}
    for interval, branch in SETTINGS:
        with cached(pipe, interval, branch):
            found[f"{interval} {branch}"], seconds[f"{interval} {branch}"] = sample()
    torch.save(found, FOLDER / f"latents-{ARM}.pt")
    print(json.dumps(seconds))


main()
