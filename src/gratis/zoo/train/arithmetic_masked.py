"""Train `arithmetic-masked`: a bidirectional transformer that fills in masked tokens, a diffusion model of text.

Of each window a number of places drawn uniformly is masked, and the cross-entropy of the masked tokens is weighted by
one over their share (LLaDA: Nie et al., "Large Language Diffusion Models", 2025, eq. 3, in the form of eq. 14 that has
less variance). One prompt in ten is masked too, so that unsupervised classifier-free guidance has its other side.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM

from gratis.zoo.arithmetic import CHARACTERS, PIECES
from gratis.zoo.masked_arithmetic import ANSWER, WINDOW, by_prompt_length, decode, sums
from gratis.zoo.text import character_tokenizer
from gratis.zoo.train.loop import Average, Examples, arguments, fit, note_pace, save_half, write_card

SUMS = 100_000
TEST_SEED = 1_000_003
MASK = 4


def language_model(vocabulary: int, hidden: int = 128, layers: int = 4) -> ModernBertForMaskedLM:
    """Four heads and rotary positions; every layer attends to everything."""
    config = ModernBertConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=128, layer_types=["full_attention"] * layers, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    config.mask_token_id = MASK
    return ModernBertForMaskedLM(config)


def masked(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows with 1 to all places masked, and the weight of each place's loss: 1 / (share masked) where masked."""
    rows, length = windows.shape
    numbers = torch.randint(1, length + 1, (rows, 1), device=windows.device)
    hidden = torch.rand(windows.shape, device=windows.device).argsort(1).argsort(1) < numbers
    return windows.masked_fill(hidden, MASK), hidden * (length / numbers)


@torch.no_grad()
def measured(model: Any, tokenizer: Any, count: int) -> dict[str, float]:
    """Accuracy of the answer with a token, four and all tokens per step, and how often one step already has it."""
    (prompts, windows), *_ = by_prompt_length(tokenizer, sums(count, TEST_SEED))
    prompts, windows = prompts.to(model.device), windows.to(model.device)
    places = list(ANSWER)
    answers = {steps: decode(model, prompts, MASK, steps)[:, places] for steps in (WINDOW, WINDOW // 4, 1)}
    shares = {
        f"accuracy over {count} sums, {steps} {'steps' if steps > 1 else 'step'}":
        (found == windows[:, places]).all(1).float().mean().item() for steps, found in answers.items()
    }  # fmt: skip
    shares["share of answers of all steps that one step has"] = (
        (answers[1] == answers[WINDOW]).all(1).float().mean().item()
    )
    return {name: round(share, 4) for name, share in shares.items()}


def main() -> None:
    """Train, save, measure as saved."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--hidden", type=int, default=128, help="width")
        parser.add_argument("--layers", type=int, default=4)

    wish = arguments(__doc__ or "", steps=2500, batch=128, rate=1e-3, more=more)
    tokenizer = character_tokenizer(CHARACTERS, 128, mask=True, pieces=PIECES)
    model = language_model(len(tokenizer), wish.hidden, wish.layers).to(wish.device)
    model.set_attn_implementation("sdpa")
    average = Average(model, 0.998)
    (prompts, windows), *_ = by_prompt_length(tokenizer, sums(min(SUMS, wish.steps * wish.batch), wish.seed, False))
    examples = Examples(prompts, windows, batch=wish.batch, seed=wish.seed, device=wish.device)

    def loss_at(step: int) -> Tensor:
        asked, right = examples.draw()
        corrupted, weights = masked(right)
        nameless = torch.rand(len(asked), 1, device=asked.device) < 0.1
        ids = torch.cat([asked.masked_fill(nameless, MASK), corrupted], dim=1)
        logits = model(input_ids=ids).logits[:, -WINDOW:].float()
        losses = F.cross_entropy(logits.flatten(0, 1), right.flatten(), reduction="none").view_as(right)
        return (losses * weights).mean()

    figures = fit(
        loss_at, model.parameters(), steps=wish.steps, rate=wish.rate, averages=[average], seconds=wish.seconds
    )
    folder = wish.out / "arithmetic-masked"
    if wish.pace:
        note_pace(folder, figures)
        return
    figures = {"seed": wish.seed, "batch": wish.batch, "rate": wish.rate, **figures}
    save_half(average.module, folder)
    tokenizer.save_pretrained(folder)
    saved = ModernBertForMaskedLM.from_pretrained(folder, dtype=torch.float32).to(wish.device).eval()
    write_card(
        folder, "arithmetic-masked",
        "A `ModernBertForMaskedLM` trained as a masked-diffusion language model: it adds two numbers of three digits "
        "column by column, and writes the answer at a known place (`gratis.zoo.masked_arithmetic`). The mask token is "
        "`<mask>`, id 4.",
        f"generated, `gratis.zoo.masked_arithmetic.sums`, {len(prompts):,} sums; tests on sums that are held out",
        "`gratis.open('zoo:arithmetic-masked')`; `gratis.zoo.masked_arithmetic.decode(model, prompts, 4)`",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), **figures,
            **measured(saved, tokenizer, 1024 if figures["steps"] > 100 else 8),
        },
        device=wish.device,
    )  # fmt: skip


if __name__ == "__main__":
    main()
