"""Train `sprites-prior`: a Llama-class model that writes pictures as codes of `sprites-vq` (train that one first)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gratis.zoo import load
from gratis.zoo.sprites import render
from gratis.zoo.sprites_classifier import classify
from gratis.zoo.sprites_tokens import (
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
from gratis.zoo.train.loop import Average, Examples, arguments, fit, note_pace, save_half, write_card

PICTURES = 30_000
TEST = 1_000_000
SILENT = 0.15
"""Share of pictures about which nothing is said, for guidance; of the others each word is said with KEPT."""
KEPT = 0.85


def language_model(vocabulary: int, hidden: int = 96, layers: int = 4) -> LlamaForCausalLM:
    """Four heads; positions for the prompt and a picture."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=PROMPT + TOKENS,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def main() -> None:
    """Train, save, measure as saved."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--hidden", type=int, default=96, help="width")
        parser.add_argument("--layers", type=int, default=4)
        parser.add_argument("--vq", type=Path, help="folder of sprites-vq; default: the one that is installed")

    wish = arguments(__doc__ or "", steps=3000, batch=64, rate=2e-3, more=more)
    tokenizer = word_tokenizer(VOCABULARY, PROMPT + TOKENS)
    if wish.vq is None:
        vq = load("sprites-vq", device=wish.device)
    else:
        vq = VQModel.from_pretrained(wish.vq, torch_dtype=torch.float32).to(wish.device).eval()
    model = language_model(len(tokenizer), wish.hidden, wish.layers).to(wish.device)
    average = Average(model, 0.998)
    scenes = WORLD.scenes(0, min(PICTURES, wish.steps * wish.batch))
    codes = encode(vq, render(scenes, 32).images) + FIRST_CODE
    asked = prompts(tokenizer, [said(scene) for scene in scenes])
    open_prompt = unconditional(tokenizer, 1).to(wish.device)
    examples = Examples(asked, codes, batch=wish.batch, seed=wish.seed, device=wish.device)

    def loss_at(step: int) -> Tensor:
        prompt, picture = examples.draw()
        kept = torch.rand(prompt.shape, device=prompt.device) < KEPT
        kept &= torch.rand(len(prompt), 1, device=prompt.device) >= SILENT
        ids = torch.cat([torch.where(kept, prompt, open_prompt), picture], dim=1)
        logits = model(input_ids=ids).logits[:, PROMPT - 1 : -1].float()
        return F.cross_entropy(logits.flatten(0, 1), picture.flatten())

    figures = fit(
        loss_at, model.parameters(), steps=wish.steps, rate=wish.rate, averages=[average], seconds=wish.seconds
    )
    folder = wish.out / "sprites-prior"
    if wish.pace:
        note_pace(folder, figures)
        return
    figures = {"seed": wish.seed, "batch": wish.batch, "rate": wish.rate, **figures}
    save_half(average.module, folder)
    tokenizer.save_pretrained(folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(wish.device).eval()
    scenes = WORLD.scenes(TEST, TEST + (512 if figures["steps"] > 100 else 4))
    asked = prompts(tokenizer, [said(scene) for scene in scenes]).to(wish.device)
    measured = {}
    for guidance in (1.0, 2.0, 3.0):
        pictures = decode(vq, sample(saved, asked, guidance, tokenizer=tokenizer))
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
            "parameters": sum(weight.numel() for weight in saved.parameters()), **figures, **measured,
        },
        device=wish.device,
    )  # fmt: skip


if __name__ == "__main__":
    main()
