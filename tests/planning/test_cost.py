from __future__ import annotations

import itertools

import numpy as np
import pytest
from transformers import LlamaConfig, Qwen3MoeConfig, T5Config

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


def test_an_encoder_is_refused():
    with pytest.raises(SubjectError, match="encoder"):
        Shape.of(T5Config(), "t5")
