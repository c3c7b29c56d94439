"""Captions whose truth is known: complete, ambiguous and false ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import gratis
from gratis.contract.errors import SubjectError
from gratis.subjects.opening import set_tokenizer
from gratis.tasks.picture_captions import FIRST, PictureCaptions, described
from gratis.zoo.captioning import WORLD, pixel_values, reference
from gratis.zoo.sprites import caption, render, words
from gratis.zoo.text import word_tokenizer

PICTURES = 32


class Speaker(torch.nn.Module):
    """Says what it was told to say of the pictures of the task, each word with probability one half."""

    main_input_name, device = "pixel_values", torch.device("cpu")

    def __init__(self, texts):
        super().__init__()
        self.tokenizer = word_tokenizer(words(), 64)
        self.ids = self.tokenizer(texts, padding=True, return_tensors="pt").input_ids
        set_tokenizer(self, self.tokenizer)

    def generate(self, pixel_values, **options):
        return self.ids

    def forward(self, pixel_values, decoder_input_ids, use_cache):
        logits = torch.full((*decoder_input_ids.shape, len(self.tokenizer)), -30.0)
        logits.scatter_(-1, self.ids[:, 1:, None], 0.0)
        logits[..., 3] = 0.0
        return SimpleNamespace(logits=logits)


def measured(texts):
    return PictureCaptions(pictures=PICTURES).measure(Speaker(texts), seed=0).metrics


def test_complete_ambiguous_and_false_captions():
    scenes = list(WORLD.scenes(FIRST, FIRST + PICTURES))
    whole = measured([caption(scene) for scene in scenes])
    assert whole["attributes"] == 1
    assert whole["hallucination"] == 0
    assert whole["recall"] > 0.9
    least = [scene.sprites[0].shape for scene in scenes]
    short = measured([f"a {shape}" for shape in least])
    expected = sum(1 / least.count(shape) for shape in least) / PICTURES
    assert short["recall"] == pytest.approx(expected)
    assert short["attributes"] == pytest.approx(0.2)
    assert short["words"] == 2
    # Two words and the end, each with probability one half.
    assert short["likelihood"] == pytest.approx(-3 * 0.6931, abs=1e-3)
    wrong = measured([f"a {'circle' if shape != 'circle' else 'star'}" for shape in least])
    assert wrong["hallucination"] == 1
    assert wrong["recall"] == wrong["attributes"] == 0
    said = measured([reference(scene, person) for person, scene in enumerate(scenes)])
    assert said["reference"] >= 10 / PICTURES
    assert said["hallucination"] == 0


def test_the_captioner_says_true_things_and_guidance_stays_off_the_likelihood():
    model = gratis.open("zoo:sprites-captioner")
    tokenizer = gratis.subjects.opening.tokenizer_of(model)
    pixels = pixel_values(render(WORLD.scenes(FIRST, FIRST + 4), 32).images)
    texts, likelihoods, _ = described(model, tokenizer, pixels)
    with gratis.attach(model, gratis.GuidedCaptioning(gamma=1.0, cut=1e-9)):
        again = described(model, tokenizer, pixels)
    assert texts == again[0]
    assert likelihoods == pytest.approx(again[1], abs=1e-4)
    assert all(0 >= one > -20 for one in likelihoods)


def test_what_sees_nothing_is_refused():
    with pytest.raises(SubjectError, match="takes no pictures"):
        PictureCaptions().check(gratis.open("zoo:glyphs-code"))
