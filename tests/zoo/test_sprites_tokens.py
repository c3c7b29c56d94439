import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gratis.contract.errors import InputError, ParameterError
from gratis.zoo.sprites import Background, Scene, Sprite
from gratis.zoo.sprites_tokens import (
    CODES,
    FIRST_CODE,
    PROMPT,
    TOKENS,
    VOCABULARY,
    WORLD,
    decode,
    encode,
    prompts,
    said,
    sample,
    unconditional,
)
from gratis.zoo.text import word_tokenizer

TOKENIZER = word_tokenizer(VOCABULARY, PROMPT + TOKENS)


def test_every_prompt_has_the_same_length():
    scene = Scene((Sprite("star", "red", 0.1, 0.9, 0.23),), Background("black"))
    assert said(scene) == ["large", "red", "star", "bottom", "left", "black"]
    assert said(scene, ("colour",)) == ["<any>", "red", "<any>", "<any>", "<any>", "<any>"]
    ids = prompts(TOKENIZER, [said(one) for one in WORLD.scenes(0, 50)])
    assert ids.shape == (50, PROMPT)
    assert unconditional(TOKENIZER, 3).shape == (3, PROMPT)
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.convert_ids_to_tokens(ids[0, [0, -1]].tolist()) == ["<bos>", "<image>"]


def test_image_tokens_are_consecutive():
    assert TOKENIZER.convert_tokens_to_ids("<image_0>") == FIRST_CODE
    assert TOKENIZER.convert_tokens_to_ids(f"<image_{CODES - 1}>") == FIRST_CODE + CODES - 1 == len(TOKENIZER) - 1


def test_wrong_prompts_and_tokens_are_refused():
    with pytest.raises(ParameterError, match="'mauve'"):
        prompts(TOKENIZER, [["large", "mauve", "star", "top", "left", "black"]])
    with pytest.raises(InputError, match="six words"):
        prompts(TOKENIZER, [["red"]])
    with pytest.raises(InputError, match="one sprite"):
        said(Scene())
    with pytest.raises(InputError, match="64 image tokens"):
        decode(None, torch.zeros(1, TOKENS, dtype=torch.long))


def test_sampling_follows_the_guided_law():
    """With one layer and a flat prior, guidance g draws the first token from softmax(u + g (c - u))."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.6, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    prior = LlamaForCausalLM(config).eval()
    prompt = prompts(TOKENIZER, [said(WORLD[0])])
    with torch.no_grad():
        logits = [
            prior(input_ids=rows).logits[0, -1, FIRST_CODE:].float() for rows in (prompt, unconditional(TOKENIZER, 1))
        ]
        best = int((logits[1] + 50.0 * (logits[0] - logits[1])).argmax()) + FIRST_CODE
    tokens = sample(prior, prompt, guidance=50.0, temperature=1e-3, tokenizer=TOKENIZER)
    assert tokens.shape == (1, TOKENS)
    assert int(tokens[0, 0]) == best
    assert ((tokens >= FIRST_CODE) & (tokens < FIRST_CODE + CODES)).all()
    again = sample(prior, prompt, guidance=1.0, seed=3)
    torch.testing.assert_close(again, sample(prior, prompt, guidance=1.0, seed=3))
    assert (again != sample(prior, prompt, guidance=1.0, seed=4)).any()


def test_codes_and_pictures_go_back_and_forth_in_a_tiny_model():
    pytest.importorskip("diffusers")
    from gratis.zoo.train.sprites_vq import Usage, autoencoder

    torch.manual_seed(0)
    vq = autoencoder().eval()
    codes = torch.randint(CODES, (2, TOKENS))
    pictures = decode(vq, codes + FIRST_CODE)
    assert pictures.shape == (2, 32, 32, 3)
    assert pictures.dtype == np.uint8
    assert encode(vq, pictures).shape == (2, TOKENS)
    latents = torch.randn(2, 8, 8, 8)
    quantised, _, (_, _, found) = vq.quantize(latents)
    again = vq.quantize.get_codebook_entry(found.view(2, TOKENS)[1:].reshape(-1), (1, 8, 8, 8))
    torch.testing.assert_close(again, quantised[1:])
    usage = Usage()
    codebook, latents = torch.zeros(CODES, 8), torch.ones(64, 8)
    usage.update(torch.zeros(64, dtype=torch.long), latents, codebook, revive=True)
    assert (codebook[0] == 0).all()
    assert (codebook[1:].mean(1) - 1).abs().max() < 0.1
