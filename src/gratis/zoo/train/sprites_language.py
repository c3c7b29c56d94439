"""Train `sprites-language`: a language model of complete captions of sprites, which never sees a picture."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gratis.zoo.captioning import TOKENS, WORLD
from gratis.zoo.sprites import caption, words
from gratis.zoo.text import word_tokenizer
from gratis.zoo.train.loop import Average, Examples, arguments, fit, save_half, write_card

SCENES = 20_000
HELD_OUT = 1_000_000


def main() -> None:
    """Train, save, measure as saved."""
    wish = arguments(__doc__ or "", steps=500, batch=64, rate=3e-3)
    tokenizer = word_tokenizer(words(), TOKENS + 4)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=TOKENS + 4, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(wish.device)

    def encoded(first: int, last: int) -> Tensor:
        said = [caption(scene, background=True) for scene in WORLD.scenes(first, last)]
        ids: Tensor = tokenizer(said, padding=True, return_tensors="pt").input_ids
        return ids

    def loss_of(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        return model(input_ids=ids, labels=labels, use_cache=False).loss  # type: ignore[no-any-return]

    examples = Examples(encoded(0, SCENES), batch=wish.batch, seed=wish.seed, device=wish.device)
    average = Average(model, 0.998)
    figures = fit(
        lambda step: loss_of(model, examples.draw()[0]), model.parameters(), steps=wish.steps, rate=wish.rate,
        averages=[average], seconds=wish.seconds,
    )  # fmt: skip
    folder = wish.out / "sprites-language"
    save_half(average.module, folder)
    tokenizer.save_pretrained(folder)
    saved = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        held_out = float(loss_of(saved, encoded(HELD_OUT, HELD_OUT + 512)))
        written = saved.generate(torch.ones(8, 1, dtype=torch.long), do_sample=True, max_new_tokens=TOKENS)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    write_card(
        folder, "sprites-language",
        "A GPT-2 of two layers that writes complete captions of sprites: what a good caption sounds like, for guidance "
        "by a language model. It has the tokens of `sprites-captioner`.",
        f"procedural, complete captions of `gratis.zoo.captioning.WORLD`, tests from scene {HELD_OUT:,}",
        "`gratis.GuidedCaptioning(lm='zoo:sprites-language', gamma=2)` on `zoo:sprites-captioner`",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), "seed": wish.seed, "batch": wish.batch,
            **figures, "held-out loss in nats per word": round(held_out, 4),
            "different captions among 8": len(set(texts)),
        },
        device=wish.device,
    )  # fmt: skip


if __name__ == "__main__":
    main()
