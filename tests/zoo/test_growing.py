"""Growth on frozen embeddings: what may change in a stage and what may not, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from gratis import zoo
from gratis.contract.errors import InputError
from gratis.zoo.growing import add_block, blocks_of, frozen_embeddings, grow, low_rank_updates, trainable
from gratis.zoo.library_text import CHARACTERS, library_text
from gratis.zoo.train.loop import fit

IDS = torch.arange(5, 25)[None] % 17


def small(kind="llama", layers=1):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=17, n_embd=16, n_layer=layers, n_head=2, n_positions=64, tie_word_embeddings=False
        )
        return AutoModelForCausalLM.from_config(config).eval()
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def trained(seen, steps=3):
    def train(model, number):
        model.train()
        loss = lambda step: model(input_ids=IDS, labels=IDS, use_cache=False).loss  # noqa: E731
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        figures = fit(loss, model.parameters(), steps=steps, rate=1e-2, warmup=1)
        seen.append(
            {name: weight for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        )
        model.eval()
        return figures

    return train


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_frozen_blocks_stay_bit_for_bit_and_the_optimiser_holds_nothing_for_them(kind, monkeypatch):
    held = []
    plain = torch.optim.AdamW

    def watched(weights, **options):
        held.append({id(weight) for weight in weights})
        return plain(weights, **options)

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    model, seen = frozen_embeddings(small(kind), torch.nn.functional.normalize(torch.randn(17, 16))), []
    table = model.get_input_embeddings().weight.clone()
    stages = grow(model, trained(seen), layers=3)
    blocks = blocks_of(model)
    assert [stage.layers for stage in stages] == [1, 2, 3]
    assert len(blocks) == model.config.num_hidden_layers == 3
    assert torch.equal(model.get_input_embeddings().weight, table)
    of = {id(weight): depth for depth, block in enumerate(blocks) for weight in block.parameters()}
    for number, (optimised, changed) in enumerate(zip(held, seen, strict=True)):
        assert {of[one] for one in optimised if one in of} == {number}
        assert {of[id(weight)] for weight in changed.values() if id(weight) in of} == {number}
        assert any("lm_head" in name for name in changed)
        assert id(model.get_input_embeddings().weight) not in optimised
    every = sum(weight.numel() for weight in model.parameters()) - table.numel()
    per_block = sum(weight.numel() for weight in blocks[0].parameters())
    assert [stage.trained for stage in stages] == [every - 2 * per_block] * 3


def test_blocks_with_the_same_seed_are_the_same_after_any_growth():
    first, second = [], []
    once, again = small(), small()
    grow(once, trained(first), layers=1)
    lowest = {name: weight.clone() for name, weight in blocks_of(once)[0].named_parameters()}
    grow(again, trained(second), layers=3)
    assert all(torch.equal(weight, lowest[name]) for name, weight in blocks_of(again)[0].named_parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_identity_block_changes_nothing_and_can_learn(kind):
    model = small(kind)
    before = model(IDS).logits
    add_block(model)
    torch.testing.assert_close(model(IDS).logits, before)
    assert model.config.num_hidden_layers == 2
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(bool(weight.grad.abs().sum() > 0) for weight in blocks_of(model)[1].parameters())
    add_block(model, "random")
    assert not torch.allclose(model(IDS).logits, before)
    with pytest.raises(InputError, match="'identity' or 'random', not 'zero'"):
        add_block(model, "zero")


def test_low_rank_updates_begin_at_nothing_and_end_in_the_weights():
    model = small(layers=2)
    before = model(IDS).logits
    names = {name for name, _ in model.named_parameters()}
    matrices = {name: weight.clone() for name, weight in blocks_of(model).named_parameters()}
    blocks_of(model).requires_grad_(False)
    with low_rank_updates(blocks_of(model), rank=2):
        torch.testing.assert_close(model(IDS).logits, before)
        assert trainable(blocks_of(model)) == 2 * 2 * (4 * (16 + 16) + 3 * (16 + 32))
        trained([])(model, 0)
        changed = model(IDS).logits
    assert {name for name, _ in model.named_parameters()} == names
    torch.testing.assert_close(model(IDS).logits, changed)
    for name, weight in blocks_of(model).named_parameters():
        difference = weight - matrices[name]
        rank = int(torch.linalg.matrix_rank(difference)) if weight.dim() == 2 else 0
        assert rank == (2 if weight.dim() == 2 else 0)
        assert weight.dim() == 2 or not bool(difference.any())


def test_growth_ends_with_low_rank_updates_where_asked():
    model, seen = small(), []
    stages = grow(model, trained(seen), layers=2, rank=1)
    assert [stage.layers for stage in stages] == [1, 2, 2]
    assert stages[2].trained < stages[1].trained
    assert {name.split(".")[2] for name in seen[2] if "parametrizations" in name} == {"0", "1"}


def test_what_is_refused():
    with pytest.raises(InputError, match="tie_word_embeddings"):
        frozen_embeddings(LlamaForCausalLM(LlamaConfig(
            vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True)), torch.zeros(17, 16))  # fmt: skip
    with pytest.raises(InputError, match=r"\(17, 8\), and the model's table \(17, 16\)"):
        frozen_embeddings(small(), torch.zeros(17, 8))
    with pytest.raises(InputError, match="starts with one block"):
        grow(small(layers=2), trained([]), layers=3)


def test_the_texts_are_apart_and_of_known_characters():
    code, prose = library_text("code", held_out=True), library_text("prose", held_out=True)
    assert set(code) | set(prose) <= set(CHARACTERS)
    assert len(CHARACTERS) == 96
    assert code.count("def ") > 1000
    assert '"""' not in prose[:1000]
    assert prose.count(" the ") > 1000
    assert code.count(" the ") < 100


@pytest.mark.evidence
@pytest.mark.parametrize("name", ["glyphs-code", "glyphs-prose"])
def test_every_stage_reads_better_than_the_one_before(name):
    figures = json.loads((zoo.folder_of(name) / "figures.json").read_text(encoding="utf-8"))
    stages = [value for key, value in figures.items() if key.startswith("after stage")]
    assert len(stages) == 5
    assert stages == sorted(stages, reverse=True)
