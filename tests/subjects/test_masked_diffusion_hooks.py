"""Early commits inside diffusers' LLaDA2 pipeline, which decodes block by block and sees no further than its block."""

from __future__ import annotations

import math

import pytest
import torch

import gratis
from gratis.contract.errors import InputError, SubjectError
from tests import tiny_masked as tiny
from tests.tiny_masked import MASK, PROMPT

BLOCK, WINDOW = 8, 16
NEVER = {"tau_high": 1e9, "tau_mid": 1e9, "tau_low": 1e9}
AT_ONCE = {"tau_high": 0.0, "tau_mid": 0.0, "tau_low": 0.0}


@pytest.fixture
def pipeline():
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.LLaDA2Pipeline(
        model=tiny.tiny_masked_model(), scheduler=diffusers.BlockRefinementScheduler(block_length=BLOCK), tokenizer=None
    )
    made.set_progress_bar_config(disable=True)
    made.passes = []
    made.model.register_forward_hook(lambda module, args, out: made.passes.append(out.logits.shape[1]))
    return made


def run(pipeline, rows=1, **options):
    pipeline.passes.clear()
    return pipeline(
        input_ids=tiny.prompt(rows), gen_length=WINDOW, block_length=BLOCK, num_inference_steps=BLOCK,
        mask_token_id=MASK, output_type="seq", threshold=2.0, editing_threshold=None, eos_early_stop=False,
        **options,
    ).sequences  # fmt: skip


def test_a_threshold_that_never_fires_leaves_the_pipeline_as_it_is(pipeline):
    plain, passes = run(pipeline, rows=2), list(pipeline.passes)
    with gratis.attach(pipeline, gratis.Prophet(**NEVER)) as handle:
        assert torch.equal(run(pipeline, rows=2), plain)
        assert pipeline.passes == passes
        report = handle.report()["prophet"]
    assert (report["forward_passes"], report["row_passes"]) == (len(passes), 2 * len(passes))
    assert report["commits"] == report["committed_tokens"] == 0
    assert torch.equal(run(pipeline, rows=2), plain)
    assert type(pipeline.scheduler).__name__ == "BlockRefinementScheduler"


def test_a_threshold_of_zero_fills_each_block_in_one_pass(pipeline):
    with gratis.attach(pipeline, gratis.Prophet(**AT_ONCE)) as handle:
        found = run(pipeline)
        report = handle.report()["prophet"]
    # Blocks begin at multiples of their length from place 0: the prompt takes 9 places, the window ends at 25 of 32.
    assert pipeline.passes == [16, 24, 32]
    text = torch.cat([tiny.prompt(), torch.full((1, 32 - PROMPT), MASK)], dim=1)
    with torch.no_grad():
        for end in (16, 24, 32):
            attend = (torch.arange(end) < PROMPT + WINDOW).long()[None]
            logits = pipeline.model(text[:, :end], attention_mask=attend).logits.float()
            logits[..., MASK] = -math.inf
            text[:, :end] = logits.argmax(-1).where(text[:, :end] == MASK, text[:, :end])
    assert torch.equal(found, text[:, PROMPT : PROMPT + WINDOW])
    assert report["committed_tokens"] == WINDOW
    assert report["committed_fraction"] == [1.0]
    assert report["steps_saved"] == 3 * (BLOCK - 1)


def test_blocks_without_a_place_of_the_answer_decode_as_usual(pipeline):
    plain, usual = run(pipeline), pipeline.passes.count(16)
    with gratis.attach(pipeline, gratis.Prophet(**AT_ONCE, answer_positions=(12, 13))) as handle:
        found = run(pipeline)
        report = handle.report()["prophet"]
    # Places 7 to 14 of the window are the second block: it is committed at once, the first is as it was.
    assert torch.equal(found[:, :7], plain[:, :7])
    assert (pipeline.passes.count(16), pipeline.passes.count(24)) == (usual, 1)
    assert report["committed_tokens"] == BLOCK
    assert report["gaps"][0][0] is None, "the first block tells no gap"


def test_rows_commit_each_for_itself_and_calls_are_counted(pipeline):
    with gratis.attach(pipeline, gratis.Prophet(tau_high=0.9, tau_mid=0.6, tau_low=0.3)) as handle:
        together = run(pipeline, rows=3)
        run(pipeline)
        report = handle.report()["prophet"]
        assert handle.report()["prophet"] == report, "asking twice counts nothing twice"
    assert (report["calls"], report["prompts"]) == (2, 4)
    assert report["generated_tokens"] == 4 * WINDOW
    with gratis.attach(pipeline, gratis.Prophet(tau_high=0.9, tau_mid=0.6, tau_low=0.3)):
        alone = run(pipeline)
    assert torch.equal(together[:1], alone)


def test_what_does_not_fit_a_pipeline_is_refused(pipeline):
    with pytest.raises(SubjectError, match="cannot fix tokens"):
        gratis.attach(pipeline, gratis.Prophet(suffix=("The", "answer", "is")))
    with gratis.attach(pipeline, gratis.Prophet(answer_positions=(WINDOW,))), pytest.raises(InputError, match="window"):
        run(pipeline)
    pipeline.model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits * math.nan))
    with gratis.attach(pipeline, gratis.Prophet()), pytest.raises(InputError, match="not a number"):
        run(pipeline)
