from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from transformers import StoppingCriteriaList

import gratis
from gratis.contract.errors import InputError, ParameterError, StackingError, SubjectError
from gratis.methods.decoding.sjd import Drafts, JacobiLoop, Warping, accepted, residual
from tests import tiny_language as tiny

NEW = 24


def ask(model, ids=None, seed=0, **options):
    ids = tiny.prompt() if ids is None else ids
    torch.manual_seed(seed)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": NEW, **options}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


class Table:
    """A model that is a table: what follows depends on the last two tokens."""

    def __init__(self, vocabulary=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.table = (2 * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator)).softmax(-1)
        self.passes = self.read_tokens = 0

    def after(self, tokens):
        row = [0, 0, *tokens]
        return self.table[row[-2], row[-1]]

    def prefill(self, guided):
        self.passes += 1
        return self.after([]).log()[None]

    def read(self, ids, count, guided):
        self.passes += 1
        row = ids[0, 1:].tolist()
        ends = range(len(row) - count + 1, len(row) + 1)
        return torch.stack([self.after(row[:end]) for end in ends]).log()

    def drop(self, count):
        pass


def joint(table, length):
    found = {}
    for tokens in itertools.product(range(3), repeat=length):
        chance = 1.0
        for place, token in enumerate(tokens):
            chance *= float(table.after(list(tokens[:place]))[token])
        found[tokens] = chance
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 3},
        {"window": 3, "random_law": "uniform"},
        {"window": 3, "initial": "repeat_horizon", "width": 2, "random_law": "uniform"},
        {"window": 3, "accept": "match"},
    ],
    ids=str,
)
def test_the_joint_distribution_is_the_models_own(settings):
    length, runs = 4, 1000
    exact = joint(Table(), length)
    method = gratis.SJD(**settings)
    seen, passes = Counter(), 0
    for seed in range(runs):
        table = Table()
        loop = JacobiLoop(method, seed, greedy=False)
        ids = loop.decode(table, torch.zeros(1, 1, dtype=torch.long), Warping([]), StoppingCriteriaList(), length)
        seen[tuple(ids[0, 1:].tolist())] += 1
        passes += table.passes
    rare = sum(chance for chance in exact.values() if chance * runs < 5)
    tokens = [one for one, chance in exact.items() if chance * runs >= 5]
    expected = torch.tensor([*(exact[one] for one in tokens), rare], dtype=torch.float64)
    observed = [*(seen[one] for one in tokens), runs - sum(seen[one] for one in tokens)]
    assert chisquare(observed, expected / expected.sum() * runs).pvalue > 1e-3
    assert passes < 0.95 * length * runs


def test_a_rejected_draft_is_replaced_from_what_its_law_lacks():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    grid = (torch.arange(1000) + 0.5) / 1000
    out = torch.zeros(3)
    for token in range(3):
        passed = torch.tensor([accepted(torch.tensor([token]), q, p, u[None]) for u in grid]).float().mean()
        rest = residual(p[0], q[0])
        out[token] += q[0, token] * passed
        out += q[0, token] * (1 - passed) * rest / rest.sum()
    torch.testing.assert_close(out, p[0], atol=1e-3, rtol=0)


def test_draft_i_is_tested_against_row_i_and_the_first_rejection_ends_the_run():
    laws = torch.full((3, 2), 0.5)
    rows = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1]])
    uniforms = torch.full((3,), 0.5)
    assert accepted(torch.tensor([0, 1, 0]), laws, rows, uniforms) == 3
    assert accepted(torch.tensor([0, 0, 0]), laws, rows, uniforms) == 1
    assert accepted(torch.tensor([1, 1, 0]), laws, rows, uniforms) == 0


def test_drafts_of_the_models_own_law_are_all_accepted():
    class Same(Table):
        def after(self, tokens):
            return torch.tensor([0.5, 0.3, 0.2])

    loop = JacobiLoop(gratis.SJD(window=4, random_law="uniform"), 1, greedy=False)
    laws = torch.tensor([[0.5, 0.3, 0.2]] * 3)
    drafts = Drafts(torch.tensor([2, 0, 1]), laws, torch.tensor([0, 0, 0]))
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        fresh, committed, _ = loop._verified(drafts, laws[:1].log().expand(4, -1), generator)
        assert committed == 4
        assert fresh[:3].tolist() == [2, 0, 1]


def test_new_drafts_come_from_the_new_pass_with_its_law():
    recorded = []

    class Seen(JacobiLoop):
        def _filled(self, drafts, *rest):
            recorded.append(drafts)
            return super()._filled(drafts, *rest)

    table = Table()
    loop = Seen(gratis.SJD(window=3), 3, greedy=False)
    loop.decode(table, torch.zeros(1, 1, dtype=torch.long), Warping([]), StoppingCriteriaList(), 12)
    for drafts in recorded:
        for token, law in zip(drafts.tokens, drafts.laws, strict=True):
            assert law[token] > 0
            assert any(torch.allclose(law, row) for row in table.table.flatten(0, 1))


def test_without_windows_it_draws_what_sampling_draws():
    model = tiny.tiny_language_model()
    with gratis.attach(model, gratis.Sampling(temperature=0.9, top_p=0.9)):
        plain = ask(model, temperature=None, do_sample=None, top_k=None)
    with gratis.attach(model, gratis.SJD(first=1000, temperature=0.9, top_p=0.9)) as handle:
        assert torch.equal(ask(model, temperature=None, do_sample=None, top_k=None), plain)
        assert handle.report()["sjd"]["forward_passes"] == NEW


@pytest.mark.parametrize(
    "initial", ["random", "repeat_horizon", "sample_horizon", "repeat_vertical", "sample_vertical"]
)
@pytest.mark.parametrize("window", [2, 7])
def test_the_greedy_response_is_that_of_generate(initial, window):
    model = tiny.tiny_language_model()
    plain = ask(model, do_sample=False)
    with gratis.attach(model, gratis.SJD(window=window, initial=initial, width=4)) as handle:
        assert torch.equal(ask(model, do_sample=False), plain)
        assert handle.report()["sjd"]["forward_passes"] <= NEW


def test_after_drafts_are_dropped_logits_are_those_of_a_fresh_pass():
    model = tiny.tiny_language_model()
    with gratis.attach(model, gratis.SJD(window=5)):
        out = ask(model, return_dict_in_generate=True, output_logits=True, output_scores=True)
    start = tiny.PROMPT
    with torch.no_grad():
        fresh = model(out.sequences).logits[0, start - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), fresh, atol=2e-5, rtol=1e-4)
    assert len(out.scores) == NEW
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.parametrize("others", [2, tiny.PROMPT, 60])
def test_guidance_is_that_of_generate(others):
    model = tiny.tiny_language_model()
    negative = tiny.prompt(seed=9).repeat(1, 2)[:, :others]
    options = {"do_sample": False, "guidance_scale": 2.5, "negative_prompt_ids": negative}
    plain = ask(model, **options)
    assert not torch.equal(plain, ask(model, do_sample=False))
    with gratis.attach(model, gratis.SJD(window=4)) as handle:
        assert torch.equal(ask(model, **options), plain)
        assert torch.equal(ask(model, do_sample=False, guidance_scale=2.5), ask_plainly(model, handle))


def ask_plainly(model, handle):
    handle.detach()
    return ask(model, do_sample=False, guidance_scale=2.5)


def test_guidance_of_the_window_alone_leaves_what_is_outside():
    model = tiny.tiny_language_model()
    options = {"do_sample": False, "guidance_scale": 4.0, "negative_prompt_ids": tiny.prompt(seed=9)}
    plain = ask(model, do_sample=False)
    with gratis.attach(model, gratis.SJD(window=4, first=6, guided="window")):
        out = ask(model, **options)
    assert torch.equal(out[:, : tiny.PROMPT + 6], plain[:, : tiny.PROMPT + 6])
    assert not torch.equal(out, plain)


def test_processors_that_look_at_the_text_see_each_places_own():
    model = tiny.tiny_language_model()

    def allowed(batch, ids):
        # Every fourth token ends a row of an image.
        return [7] if (len(ids) - tiny.PROMPT) % 4 == 3 else list(range(10, 30))

    with gratis.attach(model, gratis.SJD(window=6)):
        out = ask(model, prefix_allowed_tokens_fn=allowed)[0, tiny.PROMPT :]
        greedy = ask(model, prefix_allowed_tokens_fn=allowed, do_sample=False, repetition_penalty=1.3)
    assert out[3::4].tolist() == [7] * (NEW // 4)
    assert all(10 <= token < 30 for place, token in enumerate(out.tolist()) if place % 4 != 3)
    plain = ask(model, prefix_allowed_tokens_fn=allowed, do_sample=False, repetition_penalty=1.3)
    assert torch.equal(greedy, plain)


def test_text_outside_the_window_has_its_own_top_k():
    model = tiny.tiny_language_model()
    plain = ask(model, do_sample=False)
    with gratis.attach(model, gratis.SJD(window=4, first=6, text_top_k=1)):
        out = ask(model)
    assert torch.equal(out[:, : tiny.PROMPT + 6], plain[:, : tiny.PROMPT + 6])
    assert not torch.equal(out, plain)


def test_neighbours_are_those_of_the_grid():
    def places(initial, known, missing):
        loop = JacobiLoop(gratis.SJD(initial=initial, width=4, origin=2), 0, False)
        there, source = loop._neighbours(known, missing, torch.device("cpu"))
        return [(bool(t), int(s)) for t, s in zip(there, source, strict=True)]

    # The image's first row is places 2 to 5, its second 6 to 9; place 4 is the last known one.
    assert places("repeat_horizon", 5, 4) == [(True, 4), (False, 4), (True, 4), (True, 4)]
    assert places("repeat_vertical", 5, 4) == [(False, 1), (True, 2), (True, 3), (True, 4)]


@pytest.mark.parametrize("law", ["one-hot", "uniform"])
def test_initial_drafts_carry_the_law_that_they_come_from(law):
    method = gratis.SJD(initial="repeat_horizon", width=4, random_law=law, image_tokens=(2, 3, 5))
    loop = JacobiLoop(method, 0, False)
    response, empty = torch.tensor([5, 3, 2]), torch.empty(0, dtype=torch.long)
    drafts = loop._filled(
        Drafts(empty, torch.empty(0, 8), empty), 3, response, response, torch.full((8,), 0.125),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    one_hot = torch.nn.functional.one_hot(drafts.tokens, 8).float()
    assert drafts.tokens[0] == 2  # the left neighbour in the same row
    torch.testing.assert_close(drafts.laws[0], one_hot[0])
    assert drafts.tokens[1] in (2, 3, 5)  # a row begins
    uniform = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0]) / 3
    torch.testing.assert_close(drafts.laws[1], one_hot[1] if law == "one-hot" else uniform)
    torch.testing.assert_close(drafts.laws[2], one_hot[2])


def test_the_text_ends_at_a_stop_inside_an_accepted_run():
    model = tiny.tiny_language_model()
    plain = ask(model, do_sample=False)[0]
    stop = int(plain[tiny.PROMPT + 7])
    expected = ask(model, do_sample=False, eos_token_id=stop)
    for window in (3, 16):
        with gratis.attach(model, gratis.SJD(window=window)):
            out = ask(model, do_sample=False, eos_token_id=stop, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        assert out.past_key_values.get_seq_length() == expected.shape[1] - 1


def test_a_streamer_sees_what_is_committed():
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, streamer = tiny.tiny_language_model(), Streamer()
    with gratis.attach(model, gratis.SJD(window=4)) as handle:
        out = ask(model, streamer=streamer)
        report = handle.report()["sjd"]
    assert streamer.seen == out[0].tolist()
    assert streamer.ended
    (runs,) = report["tokens_per_pass"]
    assert sum(length * times for length, times in runs.items()) == NEW
    assert sum(runs.values()) == report["forward_passes"] <= NEW


def test_seeds_make_the_draws():
    model = tiny.tiny_language_model()
    with gratis.attach(model, gratis.SJD(window=4)):
        assert torch.equal(ask(model, seed=1), ask(model, seed=1))
        assert not torch.equal(ask(model, seed=1), ask(model, seed=2))


def test_refusals():
    with pytest.raises(ParameterError, match="width"):
        gratis.SJD(initial="repeat_horizon")
    with pytest.raises(ParameterError, match="window"):
        gratis.SJD(window=0)
    with pytest.raises(ParameterError, match="above first"):
        gratis.SJD(first=5, last=5)
    with pytest.raises(ParameterError, match="initial"):
        gratis.SJD(initial="diagonal")
    model = tiny.tiny_language_model()
    with gratis.attach(model, gratis.SJD(window=4)):
        with pytest.raises(InputError, match="beams"):
            ask(model, num_beams=2)
        with pytest.raises(InputError, match="StaticCache"):
            ask(model, cache_implementation="static")
        with pytest.raises(InputError, match="empty"):
            ask(model, ids=torch.empty(1, 0, dtype=torch.long))
    with gratis.attach(model, gratis.SJD(window=4, image_tokens=(500,))), pytest.raises(InputError, match="500"):
        ask(model)
    from transformers import SynthIDTextWatermarkingConfig

    watermark = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    with gratis.attach(model, gratis.SJD(window=4)), pytest.raises(InputError, match="keeps a state"):
        ask(model, watermarking_config=watermark)
    with pytest.raises(StackingError, match="cannot be attached together"):
        gratis.attach(model, gratis.SJD(), gratis.LaCache(budget=16))


def test_models_with_recurrent_layers_are_decoded_or_refused():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(SubjectError, match="SJD reads"):
        gratis.attach(model, gratis.SJD())


def janus():
    from transformers import JanusConfig, JanusForConditionalGeneration

    torch.manual_seed(0)
    config = JanusConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 128, "initializer_range": 0.3,
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
            "num_image_tokens": 16, "projection_dim": 32, "mlp_ratio": 2.0,
        },
        vq_config={
            "base_channels": 32, "channel_multiplier": [1], "embed_dim": 8, "latent_channels": 8, "num_embeddings": 24,
            "num_patches": 4, "image_token_embed_dim": 32, "projection_dim": 32, "num_hidden_layers": 1,
            "num_res_blocks": 1,
        },
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).eval()
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = 0, 1, 2
    generation.generation_kwargs = {"boi_token_id": 3}
    return model


def test_a_model_with_a_loop_of_its_own_for_pictures():
    model = janus()
    prompt = torch.tensor([[1, 8, 9, 11, 3], [1, 12, 30, 7, 3]])
    options = {
        "attention_mask": torch.ones_like(prompt), "generation_mode": "image", "guidance_scale": 3.0,
        "do_sample": False,
    }  # fmt: skip
    plain = model.generate(prompt, **options)
    with gratis.attach(model, gratis.SJD(window=4, initial="repeat_horizon", width=4)) as handle:
        assert torch.equal(model.generate(prompt, **options), plain)
        report = handle.report()["sjd"]["pictures"]
        torch.manual_seed(3)
        first = model.generate(prompt, **{**options, "do_sample": True})
        torch.manual_seed(3)
        alone = model.generate(prompt[1:], **{**options, "attention_mask": None, "do_sample": True})
    assert report["generated_tokens"] == 32
    assert report["forward_passes"] <= 32
    assert torch.equal(first[1:], alone)
    assert torch.equal(model.generate(prompt, **options), plain)


def test_models_of_image_tokens_among_words():
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    torch.manual_seed(0)
    vocabulary = {f"<tok{i}>": i for i in range(40)} | {f"IMGIMG{c}Z": 40 + i for i, c in enumerate("ABCDEFGH")}
    config = ChameleonConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, initializer_range=0.3, vocabulary_map=vocabulary | {"<image>": 39},
        vq_config={
            "embed_dim": 8, "num_embeddings": 8, "latent_dim": 8, "resolution": 16, "base_channels": 32,
            "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [],
        },
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = ChameleonForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 8, 9, 11, 3]])
    options = {"guidance_scale": 2.0, "negative_prompt_ids": ids[:, :2], "max_new_tokens": 16, "min_new_tokens": 16}
    plain = ask(model, ids, do_sample=False, **options)
    with gratis.attach(model, gratis.SJD(window=5)):
        assert torch.equal(ask(model, ids, do_sample=False, **options), plain)
        assert ask(model, ids, **options).shape == plain.shape
