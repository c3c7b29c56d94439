from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import gratis
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.methods.decoding.prophet import calibrate
from gratis.subjects.masked_diffusion import transfer_schedule
from gratis.subjects.masked_diffusion_door import generate
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language
from tests import tiny_masked as tiny
from tests.tiny_masked import MASK, NEW, PROMPT, VOCABULARY

NEVER = {"tau_high": 1e9, "tau_mid": 1e9, "tau_low": 1e9}
AT_ONCE = {"tau_high": 0.0, "tau_mid": 0.0, "tau_low": 0.0}


@torch.no_grad()
def reference(model, prompt, window, steps, block, constraints=()):
    """LLaDA's loop in a few lines: greedy, low confidence, one prompt."""
    x = torch.cat([prompt, torch.full((1, window), MASK)], dim=1)
    start = prompt.shape[1]
    for place, token in constraints:
        x[0, start + place] = token
    for end in range(start + block, start + window + 1, block):
        left = int((x[0, end - block : end] == MASK).sum())
        per = steps // (window // block)
        for step in range(per):
            logits = model(input_ids=x).logits[0].float()
            logits[:, MASK] = -math.inf
            probability, token = logits.softmax(-1).max(-1)
            probability[x[0] != MASK] = -math.inf
            probability[end:] = -math.inf
            chosen = probability.topk(left // per + (step < left % per)).indices
            x[0, chosen] = token[chosen]
    return x


@pytest.mark.parametrize(("steps", "block"), [(16, 16), (16, 4), (8, 8), (4, 16)])
def test_the_base_decoder_is_the_reference_loop(steps, block):
    model, prompt = tiny.tiny_masked_model(), tiny.prompt()
    found = generate(model, prompt, max_new_tokens=NEW, steps=steps, block_length=block)
    assert torch.equal(found, reference(model, prompt, NEW, steps, block))
    fixed = {2: 7, 5: 9}
    with gratis.attach(model, gratis.FixedSteps(steps=steps, block_length=block)):
        found = model.generate(prompt, max_new_tokens=NEW, constraints=fixed)
    assert torch.equal(found, reference(model, prompt, NEW, steps, block, fixed.items()))
    assert [int(found[0, PROMPT + place]) for place in fixed] == list(fixed.values())


def test_the_schedule_sums_to_the_masks():
    for masks in range(40):
        for steps in range(1, 20):
            shares = transfer_schedule(torch.tensor(masks), steps)
            assert int(shares.sum()) == masks
            assert int(shares.max() - shares.min()) <= 1
            assert torch.equal(shares, shares.sort(descending=True).values)


@pytest.mark.parametrize("base", [None, gratis.FixedSteps(steps=8, block_length=4, remasking="entropy", temperature=0.7),
                                  gratis.GlobalSchedule(steps=6, alg="origin", temperature=1.0),
                                  gratis.ConfidenceThreshold(threshold=0.05)])  # fmt: skip
def test_a_threshold_that_never_fires_is_the_base_decoder_bit_for_bit(base):
    model, prompt = tiny.tiny_masked_model(), tiny.prompt(2)
    methods = [] if base is None else [base]
    found = []
    for more in ([], [gratis.Prophet(**NEVER)]):
        torch.manual_seed(3)
        if methods + more:
            with gratis.attach(model, *more, *methods):
                found.append(generate(model, prompt, max_new_tokens=NEW))
        else:
            found.append(generate(model, prompt, max_new_tokens=NEW))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_threshold_of_zero_is_one_pass_and_fills_later_blocks_too():
    model, prompt = tiny.tiny_masked_model(), tiny.prompt()
    masks = torch.full((1, NEW), MASK)
    logits = model(input_ids=torch.cat([prompt, masks], dim=1)).logits[:, PROMPT:]
    logits[..., MASK] = -math.inf
    with gratis.attach(model, gratis.Prophet(**AT_ONCE), gratis.FixedSteps(block_length=4)) as handle:
        found = model.generate(prompt, max_new_tokens=NEW)
    assert torch.equal(found[:, PROMPT:], logits.argmax(-1))
    report = handle.report()["prophet"]
    assert (report["forward_passes"], report["committed_fraction"], report["steps_saved"]) == (1, [1.0], NEW - 1)


def growing(gap_at):
    """Logits of token 7 whose gap to token 8, at every place, is `gap_at(places that have their token)`."""

    def script(ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        known = (ids[:, PROMPT:] != MASK).sum(-1).float()
        logits[..., 8] = 20.0
        logits[..., 7] = 20.0 + gap_at(known)[:, None]
        return logits

    return tiny.Scripted(script).eval()


@pytest.mark.parametrize(
    ("method", "gap", "step"),
    [
        ({}, lambda known: 0.5 + known, 6),  # gap at step t: t - 0.5; 5.5 at progress 6 / 16 passes 5.0
        ({}, lambda known: 7.6 + 0 * known, 1),
        ({}, lambda known: 5.1 + 0 * known, 6),  # 6 / 16 is the first progress above 0.33
        ({"progress": "paper"}, lambda known: 5.1 + 0 * known, 7),
        ({}, lambda known: 2.6 + 0 * known, 11),  # 11 / 16 is the first above 0.67
        ({"min_progress": 0.5}, lambda known: 50 + 0 * known, 8),
        ({}, lambda known: 2.4 + 0 * known, None),
    ],
)
def test_it_exits_at_the_exact_step(method, gap, step):
    model = growing(gap)
    with gratis.attach(model, gratis.Prophet(**method)) as handle:
        before = model.passes
        model.generate(tiny.prompt(), max_new_tokens=16, block_length=4)
    report = handle.report()["prophet"]
    assert report["exit_step"] == [step]
    assert model.passes - before == (step or 16)
    if step:
        assert report["committed_fraction"] == [(16 - step + 1) / 16]


def test_the_gap_is_of_logits_over_the_region_and_rows_exit_alone():
    def script(ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        logits[..., 7] = 1.0
        if ids.shape[1] <= PROMPT:
            return logits
        logits[:, PROMPT + 3, 7] = 12.0
        logits[:, PROMPT + 4, 7] = torch.where(ids[:, 0] == 5, 4.0, 1.0)
        return logits

    model = tiny.Scripted(script).eval()
    prompt = tiny.prompt(2)
    prompt[0, 0], prompt[1, 0] = 5, 6
    with gratis.attach(model, gratis.Prophet(answer_positions=(3, 4))) as handle:
        model.generate(prompt, max_new_tokens=8, block_length=8)
    report = handle.report()["prophet"]
    assert [gaps[0] for gaps in report["gaps"]] == pytest.approx([8.0, 6.5])
    assert report["exit_step"] == [1, 3]  # 8 passes 7.5 at once; 6.5 passes 5.0 at 3 / 8


def test_guidance_doubles_passes_and_is_the_stated_formula():
    model, prompt = tiny.tiny_masked_model(), tiny.prompt()
    ids = torch.cat([prompt, torch.full((1, NEW), MASK)], dim=1)
    nameless = ids.clone()
    nameless[:, :PROMPT] = MASK
    with torch.no_grad():
        clean, free = model(input_ids=ids).logits, model(input_ids=nameless).logits
    guided = (free + 2.5 * (clean - free))[:, PROMPT:]
    guided[..., MASK] = -math.inf
    with gratis.attach(model, gratis.Prophet(**AT_ONCE)) as handle:
        found = model.generate(prompt, max_new_tokens=NEW, cfg_scale=1.5)
    assert torch.equal(found[:, PROMPT:], guided.argmax(-1))
    assert handle.report()["prophet"]["forward_passes"] == 2


def test_padded_rows_equal_rows_alone():
    model = tiny.tiny_masked_model()
    short, long = tiny.prompt(length=5), tiny.prompt(seed=2)
    batch = torch.cat([torch.nn.functional.pad(short, (PROMPT - 5, 0)), long])
    mask = (batch != 0).long()
    with gratis.attach(model, gratis.Prophet(tau_high=1.0, tau_mid=0.7, tau_low=0.3, answer_length=4)):
        together = model.generate(batch, attention_mask=mask, max_new_tokens=NEW)
        alone = [model.generate(one, max_new_tokens=NEW)[0, -NEW:] for one in (short, long)]
    assert torch.equal(together[:, -NEW:], torch.stack(alone))


def test_a_model_that_shifts_and_its_own_loop_agree_with_ours():
    plain, dream, llada = tiny.tiny_masked_model(), tiny.DreamStyle().eval(), tiny.LLaDAStyle().eval()
    prompt = tiny.prompt()
    expected = generate(plain, prompt, max_new_tokens=NEW)
    assert torch.equal(generate(dream, prompt, max_new_tokens=NEW), expected)
    assert torch.equal(generate(llada, prompt, max_new_tokens=NEW), expected)
    own = dream.diffusion_generate(prompt, max_new_tokens=NEW, steps=8)
    with gratis.attach(dream, gratis.Prophet(**NEVER)):
        assert torch.equal(dream.diffusion_generate(prompt, max_new_tokens=NEW, steps=8), own)
    with gratis.attach(dream, gratis.Prophet(**AT_ONCE)) as handle:
        before = dream.passes
        found = dream.diffusion_generate(prompt, max_new_tokens=NEW, steps=8, return_dict_in_generate=True).sequences
        assert dream.passes - before == 1
        assert torch.equal(found, model_at_once(plain, prompt))
        assert handle.report()["prophet"]["steps_saved"] == 7


def model_at_once(model, prompt):
    with gratis.attach(model, gratis.Prophet(**AT_ONCE)):
        return model.generate(prompt, max_new_tokens=NEW)


def test_interrupted_it_returns_what_was_committed():
    model = growing(lambda known: 0 * known + 1)
    inner = model.script

    def script(ids):
        if int((ids[:, PROMPT:] != MASK).sum()) == 5 and ids.shape[1] > PROMPT:
            raise KeyboardInterrupt
        return inner(ids)

    with gratis.attach(model, gratis.Prophet(**NEVER)) as handle:
        model.script = script
        found = model.generate(tiny.prompt(), max_new_tokens=8, block_length=8)
    assert int((found == MASK).sum()) == 3
    assert handle.report()["prophet"]["interrupted"]


def test_streaming_shows_every_token_once_and_in_order():
    class Streamer:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.flatten())

        def end(self):
            self.ended = True

    model, streamer = tiny.tiny_masked_model(), Streamer()
    found = generate(model, tiny.prompt(), max_new_tokens=NEW, block_length=4, streamer=streamer)
    assert torch.equal(torch.cat(streamer.parts), found[0])
    assert streamer.ended
    assert len(streamer.parts) > 2


def test_calibrated_thresholds_agree_with_the_full_decode():
    model, prompts = tiny.tiny_masked_model(), tiny.prompt(6)
    method = gratis.Prophet(answer_length=4)
    scaled, found = calibrate(model, prompts, method, agreement=0.8, max_new_tokens=NEW)
    assert scaled.tau_high / scaled.tau_low == pytest.approx(3.0)
    full = generate(model, prompts, max_new_tokens=NEW)
    with gratis.attach(model, scaled) as handle:
        early = model.generate(prompts, max_new_tokens=NEW)
    same = (full[:, -4:] == early[:, -4:]).all(1).double().mean()
    assert float(same) == pytest.approx(found["agreement"])
    assert found["agreement"] >= 0.8
    assert handle.report()["prophet"]["steps"] / (6 * NEW) == pytest.approx(found["steps"])


def test_bad_parameters_calls_and_models():
    for wrong in ({"tau_mid": 9.0}, {"switch_mid": 0.9}, {"template": "no slot"}, {"answer_positions": ()},
                  {"template": "{}", "suffix": ("a",)}):  # fmt: skip
        with pytest.raises(ParameterError):
            gratis.Prophet(**wrong)
    causal = tiny_language.tiny_language_model()
    with pytest.raises(SubjectError, match="no mask token"):
        gratis.attach(causal, gratis.Prophet())
    causal.config.mask_token_id = 4
    with pytest.raises(SubjectError, match="autoregressive"):
        gratis.attach(causal, gratis.Prophet())
    model, prompt = tiny.tiny_masked_model(), tiny.prompt()
    with gratis.attach(model, gratis.Prophet(answer_positions=(20,))), pytest.raises(InputError, match="window"):
        model.generate(prompt, max_new_tokens=NEW)
    for call, words in (
        ({"block_length": 5}, "divide"), ({"steps": 3, "block_length": 4}, "multiple"), ({"stpes": 3}, "steps"),
        ({"max_new_tokens": 100}, "shorten"), ({"remasking": "best"}, "one of"), ({"stop_strings": "x"}, "tokenizer"),
        ({"constraints": {99: 3}}, "constraints"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            generate(model, prompt, **{"max_new_tokens": NEW, **call})
    with pytest.raises(InputError, match="empty"):
        generate(model, prompt[:, :0])
    nan = tiny.Scripted(lambda ids: torch.full((*ids.shape, VOCABULARY), math.nan)).eval()
    with pytest.raises(InputError, match="not a number"):
        generate(nan, prompt, max_new_tokens=NEW)


class Words:
    """A tokenizer of a few words."""

    mask_token_id, unk_token_id = MASK, 3
    known = {" The": [11], " answer": [12, 13], " is": [14], "So ": [15], " .": [16]}  # noqa: RUF012

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=self.known.get(text, [3]))


def worded():
    model = tiny.tiny_masked_model()
    set_tokenizer(model, Words())
    return model


@pytest.mark.parametrize(
    ("method", "places", "constraints"),
    [
        # " The answer is" takes 4 places, one is skipped, 5 are the answer: together 10, at the window's end.
        ({"suffix": ("The", "answer", "is")}, (11, 12, 13, 14, 15), {6: 11, 7: 12, 8: 13, 9: 14}),
        # The authors' place: the largest offset of a fixed token plus 2.
        ({"suffix": ("The", "answer", "is"), "suffix_at": 2}, (7, 8, 9, 10, 11), {2: 11, 3: 12, 4: 13, 5: 14}),
        ({"suffix": ("is",), "answer_skip": 0, "answer_length": 2}, (14, 15), {13: 14}),
        ({"template": "So {} .", "answer_length": 3}, (12, 13, 14), {11: 15, 15: 16}),
        ({"template": "So {} .", "suffix_at": 0}, (1, 2, 3, 4, 5), {0: 15, 6: 16}),
        ({"answer_length": 4}, (12, 13, 14, 15), {}),
        ({"answer_positions": (3, 9)}, (3, 9), {}),
        ({}, tuple(range(16)), {}),
    ],
)
def test_the_answer_region_and_the_fixed_words(method, places, constraints):
    assert gratis.Prophet(**method).answer_region(16, Words()) == (places, constraints)


def test_words_that_are_fixed_stay_and_the_baseline_can_have_them_too():
    model, method = worded(), {"suffix": ("The", "answer", "is"), "suffix_at": 2}
    _, fixed = gratis.Prophet(**method).answer_region(NEW, Words())
    with gratis.attach(model, gratis.FixedSteps(block_length=4)):
        baseline = model.generate(tiny.prompt(), max_new_tokens=NEW, constraints=fixed)
    for thresholds in (NEVER, AT_ONCE, {}):
        with gratis.attach(model, gratis.FixedSteps(block_length=4), gratis.Prophet(**method, **thresholds)) as handle:
            found = model.generate(tiny.prompt(), max_new_tokens=NEW)
        assert [int(found[0, PROMPT + place]) for place in fixed] == list(fixed.values())
        if thresholds is NEVER:
            assert torch.equal(found, baseline)
        if thresholds is AT_ONCE:
            # What is fixed is committed by nobody.
            assert handle.report()["prophet"]["committed_tokens"] == NEW - len(fixed)
    free = generate(model, tiny.prompt(), max_new_tokens=NEW, block_length=4)
    assert not torch.equal(free, baseline)


def test_guidance_takes_away_the_fixed_words_with_the_prompt():
    model, fixed = tiny.tiny_masked_model(), {2: 7}
    ids = torch.cat([tiny.prompt(), torch.full((1, NEW), MASK)], dim=1)
    ids[0, PROMPT + 2] = 7
    nothing = torch.full_like(ids, MASK)
    with torch.no_grad():
        clean, free = model(input_ids=ids).logits, model(input_ids=nothing).logits
    guided = (free + 2.5 * (clean - free))[0, PROMPT:]
    guided[:, MASK] = -math.inf
    expected = guided.argmax(-1)
    expected[2] = 7
    with gratis.attach(model, gratis.Prophet(**AT_ONCE)):
        found = model.generate(tiny.prompt(), max_new_tokens=NEW, cfg_scale=1.5, constraints=fixed)
    assert torch.equal(found[0, PROMPT:], expected)


def test_of_the_region_all_places_count_or_those_that_are_still_masked():
    """Place 3 has a gap of 9 and is taken first; place 4 has a gap of 1: together 5, alone 1."""

    def script(ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        logits[..., 7] = 0.5
        if ids.shape[1] > PROMPT:
            logits[:, PROMPT + 3, 7], logits[:, PROMPT + 4, 7] = 9.0, 1.0
        return logits

    found = {}
    for region in ("all", "masked"):
        model = tiny.Scripted(script).eval()
        with gratis.attach(model, gratis.Prophet(answer_positions=(3, 4), region=region)) as handle:
            model.generate(tiny.prompt(), max_new_tokens=8, block_length=8)
        found[region] = handle.report()["prophet"]
    # At step 2 place 3 has its token: 5.0 still passes nothing at 2 / 8, and passes the middle threshold at 3 / 8.
    assert found["all"]["gaps"][0][:2] == pytest.approx([5.0, 5.0])
    assert found["all"]["exit_step"] == [3]
    assert found["masked"]["gaps"][0][:2] == pytest.approx([5.0, 1.0])
    # Once both have their tokens the answer cannot change, and the rest is committed.
    assert found["masked"]["exit_step"] == [3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gaps_are_taken_in_float32(dtype):
    """Logits of half precision that differ by 3.5 pass 2.5 at the first progress above 0.67, which is 11 / 16."""

    class Half(tiny.Scripted):
        def forward(self, input_ids):
            out = super().forward(input_ids)
            # What says that later tokens count is too small for half precision.
            out.logits = out.logits.to(dtype if input_ids.shape[1] > PROMPT else torch.float32)
            return out

    def script(ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        logits[..., 7], logits[..., 8] = 5.0, 1.5
        return logits

    model = Half(script).eval()
    with gratis.attach(model, gratis.Prophet(answer_length=3)) as handle:
        model.generate(tiny.prompt(), max_new_tokens=16, block_length=16)
    report = handle.report()["prophet"]
    assert report["gaps"][0] == [3.5] * 11
    assert report["exit_step"] == [11]


def test_words_without_room_or_tokens_and_wrong_regions_are_refused():
    model = worded()
    for method, words in (
        ({"suffix": ("The", "answer", "is"), "suffix_at": 12}, "window has 16"),
        ({"suffix": ("Foo",)}, "does not know"),
        ({"template": "So {} .", "answer_length": 20}, "window has 16"),
        ({"answer_length": 17}, "answer region"),
    ):
        with gratis.attach(model, gratis.Prophet(**method)), pytest.raises(InputError, match=words):
            model.generate(tiny.prompt(), max_new_tokens=NEW)
    with pytest.raises(SubjectError, match="tokenizer"):
        gratis.attach(tiny.tiny_masked_model(), gratis.Prophet(suffix=("The",)))
    with pytest.raises(ParameterError):
        gratis.Prophet(suffix=("",))
