from __future__ import annotations

import itertools

import numpy as np
import pytest
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    FalconH1Config,
    Gemma3TextConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    T5Config,
)

from gratis.contract.errors import ParameterError, SubjectError
from gratis.planning import Attention, Shape, coverage, generation_cost
from gratis.planning.cost import active_parameters

QWEN = Shape("Qwen3-0.6B", 0.752e9, 28, 16, 8, 128)
SMALL = Shape("small", 1000.0, 2, 4, 2, 8)


def test_the_figures_of_the_paper_s_smallest_model():
    cost = generation_cost(QWEN, 200, 16384)
    linear = 2 * QWEN.parameters * 16384
    assert linear / 1e12 == pytest.approx(24.6, abs=0.05)
    assert (cost.compute - linear) / 1e12 == pytest.approx(31.5, abs=0.05)
    assert cost.traffic / 1e12 == pytest.approx(15.8, abs=0.05)
    assert 562.5 * cost.traffic / 1e12 == pytest.approx(8870, rel=0.002)
    assert 562.5 * cost.traffic / cost.compute == pytest.approx(158, abs=1)


def token_by_token(shape, prompt, length, trials, budget, block, e=2):
    """The same added up token by token: exact sums, where the closed forms integrate."""
    width, compute, traffic = shape.head_dim * shape.layers, 0.0, 0.0
    for t in range(1, length + 1):
        kept = prompt + t if budget is None else min(budget, prompt + t)
        compute += trials * (2 * shape.parameters + 4 * kept * shape.heads * width)
        shared = prompt + trials * t if budget is None else trials * kept
        traffic += 2 * e * shared * shape.key_heads * width
        if budget is not None and block > 1:
            compute += trials * 2 * (prompt + t) / block * shape.heads * width
            traffic += e * (prompt + trials * t) / block * shape.key_heads * width
    return compute, traffic


@pytest.mark.parametrize(
    ("prompt", "length", "trials", "budget", "block"),
    [
        (0, 700, 1, None, 1), (300, 700, 4, None, 1), (100, 900, 3, 50, 1), (100, 900, 3, 400, 1), (100, 200, 2, 4000, 1),
        (100, 900, 3, 400, 16), (300, 800, 1, 256, 8),
    ],
)  # fmt: skip
def test_closed_forms_against_sums_over_tokens(prompt, length, trials, budget, block):
    cost = generation_cost(SMALL, prompt, length, trials, Attention(budget, block))
    compute, traffic = token_by_token(SMALL, prompt, length, trials, budget, block)
    assert cost.compute == pytest.approx(compute, rel=3 / length)
    assert cost.traffic == pytest.approx(traffic, rel=3 / length)


def test_the_cost_of_the_mean_length_is_not_the_mean_cost():
    mean = generation_cost(SMALL, 0, [1, 3]).traffic
    assert mean == pytest.approx((generation_cost(SMALL, 0, 1).traffic + generation_cost(SMALL, 0, 3).traffic) / 2)
    assert mean > generation_cost(SMALL, 0, 2).traffic


def test_memory_counts_key_heads_and_arithmetic_all_heads():
    grouped, full = SMALL, Shape("full", 1000.0, 2, 4, 4, 8)
    one, two = generation_cost(grouped, 10, 100), generation_cost(full, 10, 100)
    assert one.compute == two.compute
    assert 2 * one.traffic == two.traffic


def test_the_prompt_is_shared_by_trials_where_attention_is_dense_only():
    dense = [generation_cost(SMALL, 1000, 10, n).traffic for n in (1, 8)]
    assert dense[1] < 1.1 * dense[0]
    sparse = [generation_cost(SMALL, 1000, 10, n, Attention(64)).traffic for n in (1, 8)]
    assert sparse[1] == pytest.approx(8 * sparse[0])


def test_a_budget_that_covers_everything_is_dense_attention():
    dense, sparse = generation_cost(SMALL, 50, 80), generation_cost(SMALL, 50, 80, 1, Attention(130))
    assert sparse.compute == pytest.approx(dense.compute)
    assert sparse.traffic == pytest.approx(dense.traffic)


def test_without_memory_the_law_counts_arithmetic_only():
    cost = generation_cost(SMALL, 50, 80)
    assert cost.total(0) == cost.compute
    assert cost.total(10) == cost.compute + 10 * cost.traffic


def test_weights_are_read_once_for_a_batch():
    alone, shared = (generation_cost(SMALL, 0, 10, batch=b).traffic for b in (1, 4))
    without = generation_cost(SMALL, 0, 10).traffic
    assert alone - without == 2 * 1000 * 10
    assert shared - without == 2 * 1000 * 10 / 4


def test_the_block_size_of_the_study():
    assert [(Attention.of_study(b).block, Attention.of_study(b).blocks) for b in (128, 512, 2048)] == [
        (128, 1), (32, 16), (8, 256),
    ]  # fmt: skip


@pytest.mark.parametrize("correct", [0, 1, 3, 6])
@pytest.mark.parametrize("trials", [1, 2, 4, 6])
def test_coverage_is_the_share_of_all_subsets(correct, trials):
    subsets = list(itertools.combinations([1] * correct + [0] * (6 - correct), trials))
    assert coverage(correct, 6, trials) == pytest.approx(np.mean([max(s) for s in subsets]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [5, 0]}, "lengths"), ({"lengths": []}, "lengths"), ({"lengths": [float("nan")]}, "lengths"),
        ({"prompt": -1}, "prompt"), ({"trials": 0}, "trials"), ({"element_bytes": 0}, "element_bytes"), ({"batch": 0}, "batch"),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_refused(change, message):
    with pytest.raises(ParameterError, match=message):
        generation_cost(SMALL, **{"prompt": 1, "lengths": [2], **change})


def test_more_trials_than_were_recorded_are_refused():
    with pytest.raises(ParameterError, match="trials 7 must be between 1 and the 6"):
        coverage(2, 6, 7)


def test_heads_that_cannot_share_are_refused():
    with pytest.raises(ParameterError, match="cannot share"):
        Shape("odd", 1.0, 1, 6, 4, 8)


def test_the_shape_of_a_configuration():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    from transformers import LlamaForCausalLM

    shape = Shape.of(config, "tiny")
    assert (shape.layers, shape.heads, shape.key_heads, shape.head_dim) == (3, 4, 2, 8)
    assert shape.parameters == sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert Shape.of(config, "tiny", 7.0).parameters == 7.0


def test_a_mixture_of_experts_counts_those_that_a_token_is_sent_to():
    def config(chosen):
        return Qwen3MoeConfig(
            hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50, num_experts=8, num_experts_per_tok=chosen, head_dim=8,
        )  # fmt: skip

    two, eight = active_parameters(config(2)), active_parameters(config(8))
    assert eight - two == 6 * 2 * 3 * 32 * 16


def local_token_by_token(shape, prompt, length, trials, e=2):
    """Layers that see everything, and layers that see a window, token by token: what of the prompt any trial reads is read
    once.
    """
    compute, traffic = 2 * shape.parameters * length * trials, 0.0
    for t in range(1, length + 1):
        place = prompt + t
        near = (place - 1) % shape.window + 1 if shape.chunked else min(place, shape.window)
        own = min(near, t)
        for layers, kept, generated in (
            (shape.layers - shape.local_layers, place, t), (shape.local_layers, near, own),
        ):  # fmt: skip
            compute += trials * layers * kept * shape.flop
            traffic += e * layers * shape.numbers * (kept - generated + trials * generated)
    return compute, traffic


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("prompt", "length", "trials", "window"),
    [
        (0, 900, 1, 128),
        (300, 900, 4, 128),
        (300, 900, 4, 700),
        (300, 50, 3, 128),
        (1000, 700, 2, 2000),
        (256, 512, 2, 128),
    ],
)
def test_local_layers_against_sums_over_tokens(prompt, length, trials, window, chunked):
    shape = Shape("local", 1000.0, 6, 4, 2, 8, local_layers=5, window=window, chunked=chunked)
    compute, traffic = local_token_by_token(shape, prompt, length, trials)
    cost = generation_cost(shape, prompt, length, trials)
    assert cost.compute == pytest.approx(compute, rel=4 / min(length, window))
    assert cost.traffic == pytest.approx(traffic, rel=4 / min(length, window))


def test_a_window_by_hand():
    """Ten tokens after a prompt of four, a window of two: two layers of one head of size one."""
    shape = Shape("hand", 1.0, 2, 1, 1, 1, local_layers=1, window=2)
    cost = generation_cost(shape, 4, 10)
    everything, near = 10 * 4 + 10 * 10 / 2, 10 * 2
    assert cost.compute == 2 * 10 + 4 * (everything + near)
    assert cost.traffic == 2 * 2 * (everything + near)
    # Of the window, 2 · 2 - 2 · 2 / 2 tokens are the prompt's, which three trials read once.
    three = generation_cost(shape, 4, 10, 3)
    assert three.traffic == 2 * 2 * (10 * 4 + 3 * 50 + 2 + 3 * (near - 2))


def test_a_window_that_covers_everything_is_full_attention():
    whole = generation_cost(SMALL, 50, 80, 3)
    local = generation_cost(Shape("w", 1000.0, 2, 4, 2, 8, local_layers=2, window=130), 50, 80, 3)
    assert (local.compute, local.traffic) == (pytest.approx(whole.compute), pytest.approx(whole.traffic))


def test_sparse_attention_leaves_local_layers_as_they_are():
    shape, local = Shape("l", 1000.0, 2, 4, 2, 8, local_layers=1, window=32), Shape("o", 1e-9, 1, 4, 2, 8)
    sparse = generation_cost(shape, 100, 400, 1, Attention(64, 8))
    own = generation_cost(Shape("f", 1000.0, 1, 4, 2, 8), 100, 400, 1, Attention(64, 8))
    near = generation_cost(local, 100, 400, 1, Attention(32))
    assert sparse.compute == pytest.approx(own.compute + near.compute)
    assert sparse.traffic == pytest.approx(own.traffic + near.traffic)


def test_latent_attention_by_hand():
    """Latents of 512 numbers and 64 for the position, read once for keys and values; 128 heads score 576 of them."""
    shape = Shape("latent", 37e9, 61, 128, 128, 128, latent=512, rotary=64)
    cost = generation_cost(shape, 1000, 2000, 2)
    kept = 2000 * 1000 + 2000**2 / 2
    assert cost.compute == pytest.approx(2 * (2 * 37e9 * 2000 + 61 * 128 * (2 * 576 + 2 * 512) * kept))
    assert cost.traffic == pytest.approx(2 * 61 * 576 * (2000 * 1000 + 2 * 2000**2 / 2))
    grouped = generation_cost(Shape("as heads", 37e9, 61, 128, 128, 128), 1000, 2000, 2)
    assert grouped.traffic / cost.traffic == pytest.approx(2 * 128 * 128 / 576)


def test_layers_without_keys_cost_the_same_at_every_length():
    shape = Shape("hybrid", 1000.0, 2, 4, 2, 8, other_layers=3, other_flop=500.0, other_bytes=70.0)
    cost, plain = generation_cost(shape, 50, 80, 4), generation_cost(SMALL, 50, 80, 4)
    assert cost.compute - plain.compute == pytest.approx(4 * 3 * 500 * 80)
    assert cost.traffic - plain.traffic == pytest.approx(4 * 3 * 70 * 80)


def test_shapes_of_configurations_with_windows_chunks_latents_and_other_layers():
    gemma = Shape.of(Gemma3TextConfig(num_hidden_layers=12, sliding_window=512), "gemma", 1e9)
    assert (gemma.layers, gemma.local_layers, gemma.window, gemma.chunked) == (12, 10, 512, False)
    mistral = Shape.of(MistralConfig(num_hidden_layers=4, sliding_window=64), "mistral", 1e9)
    assert (mistral.local_layers, mistral.window) == (4, 64)
    assert Shape.of(MistralConfig(sliding_window=None), "mistral", 1e9).window == 0
    qwen = Shape.of(Qwen2Config(sliding_window=64, use_sliding_window=False), "qwen", 1e9)
    assert (qwen.local_layers, qwen.window) == (0, 0)
    llama = Shape.of(Llama4TextConfig(num_hidden_layers=8, attention_chunk_size=256), "llama", 1e9)
    assert (llama.local_layers, llama.window, llama.chunked) == (6, 256, True)
    deep = Shape.of(DeepseekV3Config(), "deep", 37e9)
    assert (deep.latent, deep.rotary, deep.numbers, deep.flop) == (512, 64, 576, 2 * 128 * (576 + 512))
    hybrid = Qwen3NextConfig(num_hidden_layers=8)
    with pytest.raises(SubjectError, match="layers of another cost .linear_attention.: say what one costs"):
        Shape.of(hybrid, "next", 1e9)
    told = Shape.of(hybrid, "next", 1e9, other=(5.0, 6.0))
    assert (told.layers, told.other_layers, told.other_flop, told.other_bytes) == (2, 6, 5.0, 6.0)
    both = Shape.of(FalconH1Config(num_hidden_layers=4), "falcon", 1e9, other=(5.0, 6.0))
    assert (both.layers, both.other_layers) == (4, 4)


def test_a_mixture_that_does_not_say_how_many_experts_is_refused():
    config = DeepseekV2Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=16, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=None,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=50, first_k_dense_replace=0,
    )  # fmt: skip
    with pytest.raises(SubjectError, match="how many of its 4 experts a token is sent to"):
        active_parameters(config)


def test_experts_that_are_named_otherwise_are_found_by_their_shape():
    def config(chosen):
        return GraniteMoeConfig(
            hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50, num_local_experts=8, num_experts_per_tok=chosen,
        )  # fmt: skip

    assert active_parameters(config(8)) - active_parameters(config(2)) == 6 * 2 * 3 * 32 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 8}, "need a window"), ({"local_layers": 1}, "need a window"), ({"local_layers": 3, "window": 8}, "some of its 2"),
        ({"parameters": float("inf")}, "positive numbers"), ({"other_bytes": -1.0}, "negative"),
    ],
)  # fmt: skip
def test_shapes_that_are_none_are_refused(change, message):
    with pytest.raises(ParameterError, match=message):
        Shape(**{"name": "odd", "parameters": 1.0, "layers": 2, "heads": 4, "key_heads": 2, "head_dim": 8, **change})


def test_layers_that_differ_are_refused():
    class Listed:
        is_encoder_decoder = False
        num_hidden_layers, num_attention_heads, hidden_size = 2, [4, 8], 32

        def get_text_config(self, decoder):
            return self

    with pytest.raises(SubjectError, match="differ in their heads"):
        Shape.of(Listed(), "openelm")


def test_an_encoder_is_refused():
    with pytest.raises(SubjectError, match="encoder"):
        Shape.of(T5Config(), "t5")
