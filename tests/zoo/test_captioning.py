"""What people would say of a scene, and a captioner of the standard class that learns it."""

import pytest
import torch

from gratis.zoo.captioning import SAID, TOKENS, WORLD, captions, reference
from gratis.zoo.sprites import agreement, render, words
from gratis.zoo.train.sprites_captioner import captioner, retrieval

SCENES = WORLD.scenes(2_000_000, 2_000_064)
IMAGES = render(SCENES, 32).images


def test_references_are_true_and_leave_things_open():
    said = [reference(scene, person) for scene in SCENES for person in range(8)]
    found = [agreement(text, SCENES[place // 8]) for place, text in enumerate(said)]
    assert sum(one.false for one in found) == 0
    mean = sum(one.stated for one in found) / len(found)
    assert mean == pytest.approx(sum(SAID.values()) + 0.15, abs=0.25)


def test_retrieval_counts_what_a_caption_fits():
    scenes = [*SCENES[:4]]
    assert retrieval(["nothing"] * 4, scenes, group=4) == pytest.approx(0.25)
    from gratis.zoo.sprites import caption

    full = retrieval([caption(scene, background=True) for scene in scenes], scenes, group=4)
    assert full == 1.0
    assert retrieval(["a red circle and a red circle"] * 4, scenes, group=4) == 0.0


def test_an_untrained_captioner_runs_and_ends():
    from gratis.zoo.text import word_tokenizer

    torch.manual_seed(0)
    tokenizer = word_tokenizer(words(), TOKENS + 4)
    model = captioner(len(tokenizer)).eval()
    assert len(captions(model, tokenizer, IMAGES[:2])) == 2
