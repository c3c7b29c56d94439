"""Train `sprites-captioner`: a VisionEncoderDecoderModel on ambiguous captions, half of them without the picture."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

from gratis.zoo.captioning import SAID, TOKENS, WORLD, captions, pixel_values, reference
from gratis.zoo.sprites import agreement, consistent, render, words
from gratis.zoo.text import word_tokenizer
from gratis.zoo.train.loop import Average, arguments, fit, save_half, write_card

TEST = 1_000_000
DROPPED = 0.5


def captioner(vocabulary: int) -> VisionEncoderDecoderModel:
    """A ViT of three layers over patches of 4 x 4 pixels, and a GPT-2 of two layers that looks at it; width 64."""
    encoder = ViTModel(
        ViTConfig(
            image_size=32, patch_size=4, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=TOKENS + 4, n_embd=64, n_layer=2, n_head=4, add_cross_attention=True,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.bos_token_id = 1, 1
        config.eos_token_id, config.pad_token_id = 2, 0
    return model


def retrieval(texts: list[str], scenes: object, group: int = 32) -> float:
    """Expected recall@1 of finding each scene among `group` by its caption: 1 / scenes that the caption fits."""
    total = 0.0
    rows = list(scenes)  # type: ignore[call-overload]
    for start in range(0, len(rows), group):
        part = rows[start : start + group]
        for place, text in enumerate(texts[start : start + group]):
            fits = consistent(text, part)
            total += fits[place] / max(sum(fits), 1)
    return total / len(rows)


def main() -> None:
    """Train, save, measure as saved."""
    wish = arguments(__doc__ or "", steps=2000, batch=48, rate=2e-3)
    tokenizer = word_tokenizer(words(), TOKENS + 4)
    model = captioner(len(tokenizer))
    model.set_attn_implementation("eager")  # its backward pass is the fastest one on a CPU for short rows
    average = Average(model, 0.998)
    generator = torch.Generator().manual_seed(wish.seed)

    def loss_at(step: int) -> Tensor:
        scenes = WORLD.scenes(step * wish.batch, (step + 1) * wish.batch)
        batch = tokenizer([reference(scene) for scene in scenes], padding=True, return_tensors="pt")
        seen = model.encoder(pixel_values=pixel_values(render(scenes, 32).images)).last_hidden_state
        kept = torch.rand(wish.batch, 1, 1, generator=generator) >= DROPPED
        logits = model.decoder(input_ids=batch.input_ids[:, :-1], encoder_hidden_states=seen * kept).logits.float()
        labels = batch.input_ids[:, 1:].masked_fill(batch.attention_mask[:, 1:] == 0, -100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    figures = fit(loss_at, model.parameters(), steps=wish.steps, rate=wish.rate, averages=[average])
    folder = wish.out / "sprites-captioner"
    save_half(average.module, folder)
    tokenizer.save_pretrained(folder)
    saved = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    scenes = WORLD.scenes(TEST, TEST + (512 if wish.steps > 100 else 4))
    texts = captions(saved, tokenizer, render(scenes, 32).images)
    agreed = [agreement(text, scene) for text, scene in zip(texts, scenes, strict=True)]
    stated = max(sum(found.stated for found in agreed), 1)
    write_card(
        folder, "sprites-captioner",
        "A `VisionEncoderDecoderModel` (ViT and GPT-2) that captions pictures of one sprite. Trained on ambiguous "
        "captions, with the encoder's output set to zeros for half of the pictures, so that zeros mean no picture.",
        f"procedural, `gratis.zoo.captioning.WORLD` with captions that say {SAID}, tests from scene {TEST:,}",
        "`gratis.zoo.captioning.captions` with `gratis.open('zoo:sprites-captioner')` and its tokenizer",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), "seed": wish.seed,
            "batch": wish.batch, **figures, "perplexity at the end": round(math.exp(min(figures["loss"], 20)), 3),
            "attributes stated by a greedy caption": round(stated / len(texts), 3),
            "share of stated attributes that are true": round(sum(found.true for found in agreed) / stated, 4),
            "recall@1 among 32 scenes by the greedy caption": round(retrieval(texts, scenes), 4),
        },
    )  # fmt: skip
    print(texts[:5])


if __name__ == "__main__":
    main()
