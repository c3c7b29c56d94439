"""Fidelity of a pipeline to itself: nothing for nothing, and the figures of a known change."""

from __future__ import annotations

import math

import pytest
import torch

import gratis
from gratis.contract.errors import SubjectError
from gratis.tasks.pipeline_fidelity import PipelineFidelity, random_pipeline
from tests import tiny_diffusion as tiny


def test_the_untouched_pipeline_equals_itself_and_a_method_that_changes_nothing_too():
    pipeline, task = tiny.tiny_pipeline(), PipelineFidelity(images=2, steps=3)
    for method in (None, gratis.DeepCache(interval=1)):
        with task.applied(pipeline, method) as subject:
            measured = task.measure(subject, seed=0)
        assert measured.metrics == {"relative_error": 0.0, "psnr": 100.0}
        assert measured.calls == 6


def test_figures_of_a_known_difference():
    pipeline, task = tiny.tiny_pipeline(), PipelineFidelity(images=1, steps=2)
    with task.applied(pipeline, None) as (_, references):
        out = references[0]
        shifted = {0: out + 0.1}
        measured = task.measure((pipeline, shifted), seed=0)
    expected = out + 0.1
    assert measured.metrics["relative_error"] == pytest.approx(
        0.1 * math.sqrt(out.numel()) / expected.norm().item(), rel=1e-4
    )
    span = (expected.max() - expected.min()).item()
    assert measured.metrics["psnr"] == pytest.approx(20 * math.log10(span / 0.1), rel=1e-4)


def test_its_own_pipeline_is_the_same_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    weights = [random_pipeline().unet.conv_in.weight for _ in range(2)]
    assert torch.equal(*weights)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(SubjectError, match="needs a diffusers pipeline"):
        PipelineFidelity().check(tiny.tiny_unet())
