"""Sampling with DeepCache and with its authors' package, in one process: prints one line of JSON.

python cached_sampling.py SITE STEPS ROUNDS. SITE is the folder of packages that holds `DeepCache`; everything else comes
from the running environment, so that both arms call the same torch and diffusers. Each arm has its own pipeline with the
same random weights: a U-Net of Stable Diffusion's shape with a fifth of its width.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import gratis

SITE, STEPS, ROUNDS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
SETTINGS = ((2, 0), (3, 0), (5, 0), (3, 1), (3, 2))
"""Interval and branch (down layers that still run)."""
ARMS = ("gratis", "deepcache")


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
def cached(arm: str, pipe: Any, interval: int, branch: int) -> Iterator[None]:
    if arm == "gratis":
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
    sys.path.append(SITE)
    pipes = {arm: pipeline() for arm in (*ARMS, "untouched")}
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randn(1, 77, 192, generator=generator) for _ in range(2)]

    def sample(arm: str) -> tuple[torch.Tensor, float]:
        begin = time.process_time()
        latents = pipes[arm](
            prompt_embeds=texts[0], negative_prompt_embeds=texts[1], num_inference_steps=STEPS, guidance_scale=7.5,
            height=256, width=256, generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip
        return latents, time.process_time() - begin

    whole, _ = sample("untouched")
    seconds: dict[str, list[float]] = {"untouched": []}
    found: dict[str, torch.Tensor] = {}
    for number in range(ROUNDS + 1):
        _, spent = sample("untouched")
        if number:
            seconds["untouched"].append(spent)
        for interval, branch in SETTINGS:
            for arm in ARMS if number % 2 else ARMS[::-1]:
                key = f"{arm} {interval} {branch}"
                with cached(arm, pipes[arm], interval, branch):
                    found[key], spent = sample(arm)
                if number:
                    seconds.setdefault(key, []).append(spent)
    rows = []
    for interval, branch in SETTINGS:
        ours, theirs = (found[f"{arm} {interval} {branch}"] for arm in ARMS)
        rows.append(
            {
                "interval": interval,
                "branch": branch,
                **{arm: statistics.median(seconds[f"{arm} {interval} {branch}"]) for arm in ARMS},
                "difference": float((ours - theirs).abs().max()),
                "change": float((ours - whole).norm() / whole.norm()),
            }
        )
    print(json.dumps({"untouched": statistics.median(seconds["untouched"]), "rows": rows}))


main()
