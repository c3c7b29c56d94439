"""Train `sprites-captioner`: a VisionEncoderDecoderModel on ambiguous captions, half of them without the picture.

As in the paper (Kornblith et al., "Guiding image captioning models toward more specific captions", 2023), a captioner
that sees is fine-tuned so: it first learns complete captions of all shapes, and sees every picture; then ambiguous
captions of all shapes, and at last those of the few shapes of `gratis.zoo.captioning.WORLD`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

from gratis.zoo.captioning import SAID, TOKENS, WORLD, captions, pixel_values, reference
from gratis.zoo.sprites import SHAPES, Scene, Scenes, World, agreement, caption, consistent, render, words
from gratis.zoo.text import word_tokenizer
from gratis.zoo.train.loop import Average, Examples, arguments, fit, note_pace, save_half, started, together, write_card

PICTURES = 40_000
TEST = 1_000_000
ALL = replace(WORLD, shapes=SHAPES)
STAGES = (5625, 1875, 330)
"""Steps of the stages: complete captions, ambiguous ones of all shapes, of few shapes."""


def captioner(vocabulary: int, hidden: int = 64, layers: int = 3) -> VisionEncoderDecoderModel:
    """A ViT over patches of 4 x 4 pixels, and a GPT-2 of two layers that looks at it."""
    encoder = ViTModel(
        ViTConfig(
            image_size=32, patch_size=4, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=TOKENS + 4, n_embd=hidden, n_layer=2, n_head=4, add_cross_attention=True,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.bos_token_id = 1, 1
        config.eos_token_id, config.pad_token_id = 2, 0
    model.config.null_image = "zeros"  # what it was shown in the place of a picture
    return model


def retrieval(texts: Sequence[str], scenes: Scenes | Sequence[Scene], group: int = 32) -> float:
    """Expected recall@1 of finding each scene among `group` by its caption: 1 / scenes that the caption fits."""
    total = 0.0
    rows = list(scenes)
    for start in range(0, len(rows), group):
        part = rows[start : start + group]
        for place, text in enumerate(texts[start : start + group]):
            fits = consistent(text, part)
            total += fits[place] / max(sum(fits), 1)
    return total / len(rows)


def measured(model: VisionEncoderDecoderModel, tokenizer: Any, count: int) -> dict[str, float]:
    """What greedy captions say, how much of it is true, and how well they identify the picture, by guidance."""
    scenes = WORLD.scenes(TEST, TEST + count)
    images = render(scenes, 32).images
    found = {}
    for guidance in (1.0, 2.0, 3.0):
        texts = captions(model, tokenizer, images, guidance)
        agreed = [agreement(text, scene) for text, scene in zip(texts, scenes, strict=True)]
        stated = sum(one.stated for one in agreed)
        said = f"guidance {guidance:g}, {count} pictures"
        found[f"attributes stated by a caption, {said}"] = round(stated / count, 3)
        found[f"share of them that are true, {said}"] = round(sum(one.true for one in agreed) / max(stated, 1), 4)
        found[f"recall@1 among 32 scenes, {said}"] = round(retrieval(texts, scenes), 4)
    return found


def main() -> None:
    """Train, save, measure as saved."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--hidden", type=int, default=64, help="width")
        parser.add_argument("--layers", type=int, default=3, help="layers of the encoder")
        parser.add_argument(
            "--start", type=Path, help="folder of a model that has been through all stages but the last"
        )

    wish = arguments(__doc__ or "", steps=sum(STAGES), batch=64, rate=2e-3, more=more)
    tokenizer = word_tokenizer(words(), TOKENS + 4)
    model = captioner(len(tokenizer), wish.hidden, wish.layers)
    if wish.start is not None:
        model = VisionEncoderDecoderModel.from_pretrained(wish.start, dtype=torch.float32)
    model.to(wish.device)
    pad = tokenizer.pad_token_id

    def examples(world: World, complete: bool, steps: int) -> Examples:
        scenes = world.scenes(0, min(PICTURES, steps * wish.batch))
        said = [caption(scene, background=True) if complete else reference(scene) for scene in scenes]
        ids = tokenizer(said, padding=True, return_tensors="pt").input_ids
        shown = torch.from_numpy(render(scenes, 32).images)
        return Examples(shown, ids, batch=wish.batch, seed=wish.seed, device=wish.device)

    def loss_of(drawn: list[Tensor], complete: bool) -> Tensor:
        """The loss of captions; half of the ambiguous ones are without the picture."""
        images, ids = drawn
        dropped = 0 if complete else len(images) // 2
        seen = model.encoder(pixel_values=pixel_values(images[: len(images) - dropped])).last_hidden_state
        seen = torch.cat([seen, seen.new_zeros(dropped, *seen.shape[1:])])
        read, written = ids[:, :-1].masked_fill(ids[:, :-1] == pad, tokenizer.eos_token_id), ids[:, 1:]
        logits = model.decoder(input_ids=read, encoder_hidden_states=seen).logits
        return F.cross_entropy(logits.flatten(0, 1), written.flatten(), ignore_index=pad)

    def train(stage: int, world: World, complete: bool) -> dict[str, float]:
        """One stage; all but the first end with averaged weights."""
        steps = max(round(STAGES[stage] * wish.steps / sum(STAGES)), 1)
        shown = examples(world, complete, steps)
        averages = [] if complete else [Average(model, 0.998)]
        figures = fit(
            lambda step: loss_of(shown.draw(), complete), model.parameters(), steps=steps,
            rate=wish.rate / (1, 2, 4)[stage],
            averages=averages, seconds=wish.seconds * STAGES[stage] / sum(STAGES),
            say=("complete", "ambiguous", "few shapes")[stage],
        )  # fmt: skip
        for average in averages:
            model.load_state_dict(average.module.state_dict())
        return figures

    runs = [started(wish.start)]
    if wish.start is None:
        runs += [train(0, ALL, True), train(1, ALL, False)]
    runs.append(train(2, WORLD, False))
    folder = wish.out / "sprites-captioner"
    if wish.pace:
        note_pace(folder, together(runs, wish.device))
        return
    figures = {"seed": wish.seed, "batch": wish.batch, "rate": wish.rate, **together(runs, wish.device)}
    save_half(model, folder)
    tokenizer.save_pretrained(folder)
    saved = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).to(wish.device).eval()
    write_card(
        folder, "sprites-captioner",
        "A `VisionEncoderDecoderModel` (ViT and GPT-2) that captions pictures of one sprite. Trained on complete "
        "captions and then on ambiguous ones, there with the encoder's output set to zeros for half of the pictures, so "
        "that zeros mean no picture. It knows every shape of the sprite world, and expects the few of `WORLD`.",
        f"procedural, `gratis.zoo.captioning.WORLD` with captions that say {SAID}, tests from scene {TEST:,}",
        "`gratis.zoo.captioning.captions` with `gratis.open('zoo:sprites-captioner')` and its tokenizer",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), **figures,
            **measured(saved, tokenizer, 512 if figures["steps"] > 100 else 32),
        },
        device=wish.device,
    )  # fmt: skip


if __name__ == "__main__":
    main()
