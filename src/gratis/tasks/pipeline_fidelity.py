"""How close a pipeline's output stays to what the untouched pipeline makes from the same seeds."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from gratis.contract.attach import attach
from gratis.contract.errors import SubjectError
from gratis.contract.method import Attachable, Method
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Series, Task, TaskCard, silent


class PipelineFidelity(Task):
    """Run a diffusion pipeline from fixed seeds and compare its outputs with those of the pipeline as it is."""

    card = TaskCard(
        title="Fidelity of a diffusion pipeline to itself",
        acts_on="diffusion pipeline",
        data=(
            "outputs of the untouched pipeline from the same seeds; without a pipeline of yours, a small one of Stable "
            "Diffusion's shape with random weights, which shows cost and mechanism but no picture quality"
        ),
        metrics=(
            Metric(
                name="relative_error",
                help="norm of the difference to the untouched output, relative to that output's norm",
                higher_is_better=False,
                fidelity=True,
            ),
            Metric(
                name="psnr",
                help="peak signal-to-noise ratio to the untouched output, capped at 100",
                unit="dB",
                fidelity=True,
            ),
        ),
    )

    images: int = param(2, above=0, help="outputs, each from its own seed")
    steps: int = param(24, above=0, help="sampling steps")
    guidance: float = param(7.5, at_least=0, help="guidance scale, where the pipeline has one")
    prompt: str = param("a photograph of a lighthouse at dawn", help="for pipelines that take one")

    def subject(self) -> Any:
        return random_pipeline()

    def check(self, subject: Any) -> None:
        if not hasattr(subject, "scheduler") or not callable(subject):
            raise SubjectError(f"pipeline-fidelity needs a diffusers pipeline, not a {type(subject).__name__}.")

    def applied(self, subject: Any, method: Method | None) -> AbstractContextManager[Any]:
        return self._applied(subject, method)

    @contextmanager
    def _applied(self, subject: Any, method: Method | None) -> Iterator[Any]:
        subject.set_progress_bar_config(disable=True)
        references: dict[int, Any] = {}
        for number in range(self.images):
            references[number] = self._sample(subject, number)
        if method is None:
            yield subject, references
            return
        assert isinstance(method, Attachable)
        with attach(subject, method):
            yield subject, references

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        pipeline, references = subject
        errors: list[float] = []
        ratios: list[float] = []
        for number in range(self.images):
            out, expected = self._sample(pipeline, number), references[number]
            difference = (out - expected).double()
            errors.append((difference.norm() / expected.double().norm()).item())
            span = (expected.max() - expected.min()).item()
            mean_square = difference.square().mean().item()
            ratios.append(min(10 * math.log10(span**2 / mean_square), 100.0) if mean_square else 100.0)
            progress((number + 1) / self.images, f"{number + 1} of {self.images} outputs")
        return Measurement(
            metrics={"relative_error": statistics.fmean(errors), "psnr": statistics.fmean(ratios)},
            items={"relative_error": errors, "psnr": ratios},
            series={"relative_error": Series(list(range(self.images)), errors, "seed", "relative error")},
            calls=self.images * self.steps,
        )

    def _sample(self, pipeline: Any, number: int) -> Any:
        import numpy as np
        import torch

        takes = inspect.signature(type(pipeline).__call__).parameters
        options: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "generator": torch.Generator().manual_seed(number),
            "output_type": "latent" if getattr(pipeline, "vae", None) is not None else "np",
        }
        if "guidance_scale" in takes:
            options["guidance_scale"] = self.guidance
        if "prompt_embeds" in takes and getattr(pipeline, "text_encoder", None) is None:
            draw = torch.Generator().manual_seed(1234)
            width = int(pipeline.unet.config.cross_attention_dim)
            both = torch.randn(2, 77, width, generator=draw).to(pipeline.unet.dtype)
            options |= {"prompt_embeds": both[:1], "negative_prompt_embeds": both[1:]}
        elif "prompt" in takes:
            options["prompt"] = self.prompt
        images = pipeline(**options).images
        return images.float() if isinstance(images, torch.Tensor) else torch.from_numpy(np.asarray(images)).float()


def random_pipeline() -> Any:
    """A pipeline of Stable Diffusion's shape, a fifth as wide, with fixed random weights and no text encoder."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(
            sample_size=32, block_out_channels=(32, 64, 96, 96), cross_attention_dim=96, attention_head_dim=8,
            norm_num_groups=16,
        )  # fmt: skip
        vae: Any = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
