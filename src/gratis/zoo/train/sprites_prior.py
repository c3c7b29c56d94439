"""Train `sprites-prior`: a Llama-class model that writes pictures as codes of `sprites-vq` (train that one first)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gratis.zoo import load
from gratis.zoo.sprites import render
from gratis.zoo.sprites_classifier import classify
from gratis.zoo.sprites_tokens import (
    FIRST_CODE,
    PROMPT,
    SLOTS,
    TOKENS,
    VOCABULARY,
    WORLD,
    decode,
    encode,
    prompts,
    said,
    sample,
)
from gratis.zoo.text import word_tokenizer
from gratis.zoo.train.loop import Average, arguments, fit, save_half, write_card

TEST = 1_000_000


def language_model(vocabulary: int) -> LlamaForCausalLM:
    """Four layers of width 96."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=96, intermediate_size=288, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=PROMPT + TOKENS, tie_word_embeddings=False, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def main() -> None:
    """Train, save, measure as saved."""
    wish = arguments(__doc__ or "", steps=2000, batch=48, rate=3e-3)
    tokenizer = word_tokenizer(VOCABULARY, PROMPT + TOKENS)
    vq = load("sprites-vq")
    model = language_model(len(tokenizer))
    model.set_attn_implementation("eager")  # its backward pass is the fastest one on a CPU for short rows
    average = Average(model, 0.998)
    generator = np.random.default_rng(wish.seed)

    def loss_at(step: int) -> Tensor:
        scenes = WORLD.scenes(step * wish.batch, (step + 1) * wish.batch)
        codes = encode(vq, render(scenes, 32).images) + FIRST_CODE
        words = []
        for scene in scenes:
            kept = generator.random(len(SLOTS)) < (0.0 if generator.random() < 0.15 else 0.85)
            words.append(said(scene, [slot for slot, keep in zip(SLOTS, kept, strict=True) if keep]))
        ids = torch.cat([prompts(tokenizer, words), codes], dim=1)
        logits = model(input_ids=ids).logits[:, PROMPT - 1 : -1].float()
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    figures = fit(loss_at, model.parameters(), steps=wish.steps, rate=wish.rate, averages=[average])
    folder = wish.out / "sprites-prior"
    save_half(average.module, folder)
    tokenizer.save_pretrained(folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scenes = WORLD.scenes(TEST, TEST + (256 if wish.steps > 100 else 4))
    words = [said(scene) for scene in scenes]
    measured = {}
    for guidance in (1.0, 3.0):
        pictures = decode(vq, sample(saved, prompts(tokenizer, words), guidance, tokenizer=tokenizer))
        seen = classify(load("sprites-classifier"), torch.from_numpy(pictures))
        for name, found, truth in (("colour", seen.colour, scenes.colour), ("shape", seen.shape, scenes.shape)):
            right = (found == torch.from_numpy(truth[:, 0])).float().mean().item()
            measured[f"{name} accuracy, guidance {guidance:g}, {len(scenes)} pictures"] = round(right, 4)
    write_card(
        folder, "sprites-prior",
        "A `LlamaForCausalLM` that writes a picture of one sprite as 64 tokens (codes of `sprites-vq`) after a prompt "
        "of six words, with `<any>` for what is left open; that of `<any>` alone serves classifier-free guidance.",
        f"procedural, `gratis.zoo.sprites_tokens.WORLD`, tests from scene {TEST:,}",
        "`gratis.zoo.sprites_tokens.prompts`, `sample` and `decode` with `gratis.open('zoo:sprites-prior')`",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), "seed": wish.seed,
            "batch": wish.batch, **figures, **measured,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
