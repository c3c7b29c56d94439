"""Train `arithmetic-masked`: a bidirectional transformer that fills in masked tokens, a diffusion model of text.

Each window is masked at a rate drawn uniformly, and the cross-entropy of masked tokens is weighted by one over the
rate (LLaDA: Nie et al., "Large Language Diffusion Models", 2025, eq. 3). One prompt in ten is masked too, so that
unsupervised classifier-free guidance has its unconditional side.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM

from gratis.zoo.arithmetic import CHARACTERS, PIECES
from gratis.zoo.masked_arithmetic import ANSWER, WINDOW, by_prompt_length, decode, sums
from gratis.zoo.text import character_tokenizer
from gratis.zoo.train.loop import Average, arguments, fit, save_half, write_card

TEST_SEED = 1_000_003


def language_model(vocabulary: int) -> ModernBertForMaskedLM:
    """Four layers of width 64 with rotary positions; every layer attends to everything."""
    config = ModernBertConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, layer_types=["full_attention"] * 4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    config.mask_token_id = 4
    return ModernBertForMaskedLM(config)


def masked(windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows with tokens masked at stratified rates, and the weight of each place's loss: 1 / rate where masked."""
    rows = len(windows)
    rates = ((torch.arange(rows) + torch.rand(1, generator=generator)) / rows).clamp(min=0.02)[:, None]
    hidden = torch.rand(windows.shape, generator=generator) < rates
    return windows.masked_fill(hidden, 4), hidden / rates


def main() -> None:
    """Train, save, measure as saved."""
    wish = arguments(__doc__ or "", steps=2500, batch=64, rate=2.5e-3)
    tokenizer = character_tokenizer(CHARACTERS, 128, mask=True, pieces=PIECES)
    model = language_model(len(tokenizer))
    model.set_attn_implementation("eager")  # its backward pass is the fastest one on a CPU for short rows
    average = Average(model, 0.998)
    generator = torch.Generator().manual_seed(wish.seed)
    shuffle = np.random.default_rng(wish.seed)
    waiting: list[tuple[Tensor, Tensor]] = []

    def loss_at(step: int) -> Tensor:
        if not waiting:
            groups = by_prompt_length(tokenizer, sums(wish.batch * 16, seed=step))
            for prompts, windows in groups:
                waiting.extend(zip(prompts.split(wish.batch), windows.split(wish.batch), strict=True))
            shuffle.shuffle(waiting)  # type: ignore[arg-type]
        prompts, windows = waiting.pop()
        corrupted, weights = masked(windows, generator)
        nameless = torch.rand(len(prompts), 1, generator=generator) < 0.1
        ids = torch.cat([prompts.masked_fill(nameless, 4), corrupted], dim=1)
        logits = model(input_ids=ids).logits[:, -WINDOW:].float()
        losses = F.cross_entropy(logits.flatten(0, 1), windows.flatten(), reduction="none").view_as(windows)
        return (losses * weights).mean()

    figures = fit(loss_at, model.parameters(), steps=wish.steps, rate=wish.rate, averages=[average])
    folder = wish.out / "arithmetic-masked"
    save_half(average.module, folder)
    tokenizer.save_pretrained(folder)
    saved = ModernBertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = sums(512 if wish.steps > 100 else 8, TEST_SEED)
    shares = {}
    for steps in (WINDOW, WINDOW // 4, 1):
        right = 0
        for prompts, windows in by_prompt_length(tokenizer, asked):
            found = decode(saved, prompts, 4, steps)
            right += int((found[:, list(ANSWER)] == windows[:, list(ANSWER)]).all(1).sum())
        shares[f"accuracy over {len(asked)} problems, {steps} steps"] = round(right / len(asked), 4)
    write_card(
        folder, "arithmetic-masked",
        "A `ModernBertForMaskedLM` trained as a masked-diffusion language model: it writes a sum or difference of two "
        "numbers up to 999 digit by digit, and the answer at a known place (`gratis.zoo.masked_arithmetic`). The mask "
        "token is `<mask>`, id 4.",
        f"generated, `gratis.zoo.masked_arithmetic.sums`, tests with seed {TEST_SEED:,}",
        "`gratis.open('zoo:arithmetic-masked')`; `gratis.zoo.masked_arithmetic.decode(model, prompts, 4)`",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), "seed": wish.seed, "batch": wish.batch,
            **figures, **shares,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
