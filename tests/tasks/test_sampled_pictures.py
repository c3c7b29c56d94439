"""Pictures as tokens, on an untrained prior: what is counted, and that the plain law is recognised."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gratis
import gratis.zoo
from gratis.contract.errors import SubjectError
from gratis.subjects.opening import set_tokenizer
from gratis.tasks.sampled_pictures import picture
from gratis.zoo.sprites_tokens import CODES, FIRST_CODE, PROMPT, TOKENS, VOCABULARY, WORLD, prompts, said
from gratis.zoo.text import word_tokenizer
from tests import tiny_language as tiny


def prior():
    torch.manual_seed(0)
    tokenizer = word_tokenizer(VOCABULARY, PROMPT + TOKENS)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=PROMPT + TOKENS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    set_tokenizer(model, tokenizer)
    return model, tokenizer


def test_pictures_are_image_tokens_and_a_cold_one_is_the_plain_loops():
    from gratis.zoo.sprites_tokens import sample

    model, tokenizer = prior()
    asked = prompts(tokenizer, [said(WORLD[0])])
    with gratis.attach(model, gratis.Greedy()):
        cold = picture(model, tokenizer, asked, 2.0)
    assert ((cold >= FIRST_CODE) & (cold < FIRST_CODE + CODES)).all()
    assert torch.equal(cold, sample(model, asked, guidance=2.0, temperature=1e-6, tokenizer=tokenizer))


def test_passes_p_value_and_agreement_are_told(monkeypatch):
    pytest.importorskip("diffusers")
    from gratis.zoo.train.sprites_vq import autoencoder

    real = gratis.zoo.load
    monkeypatch.setattr(
        gratis.zoo, "load", lambda name, **options: autoencoder().eval() if name == "sprites-vq" else real(name)
    )
    model, _ = prior()
    task = gratis.task_catalogue["sampled-pictures"](pictures=4)
    with gratis.attach(model, gratis.SJD(window=4)):
        found = task.measure(model, seed=0)
    assert 0.25 <= found.metrics["passes_per_token"] <= 1
    assert 0 < found.metrics["p_value"] <= 1
    assert len(found.items["agreement"]) == 2
    with pytest.raises(SubjectError, match="sprites-prior"):
        task.check(lettered())


def lettered():
    from tests.subjects.test_generate_door import letters

    model = tiny.tiny_language_model()
    set_tokenizer(model, letters())
    return model
