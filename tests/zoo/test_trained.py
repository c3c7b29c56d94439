"""What the trained models of the zoo can do, measured on the weights that come with gratis."""

import re

import pytest
import torch

from gratis import zoo
from gratis.subjects import tokenizer_of
from gratis.zoo.arithmetic import OPENINGS, accuracy, carries, problems
from gratis.zoo.captioning import WORLD as CAPTIONED
from gratis.zoo.captioning import captions
from gratis.zoo.masked_arithmetic import ANSWER, WINDOW, by_prompt_length, sums
from gratis.zoo.masked_arithmetic import decode as fill
from gratis.zoo.sprites import agreement, render
from gratis.zoo.sprites_classifier import classify
from gratis.zoo.sprites_tokens import FIRST_CODE, WORLD, decode, encode, prompts, said, sample
from gratis.zoo.train.arithmetic import solve
from gratis.zoo.train.sprites_captioner import retrieval

ASKED = problems(48, 4_000_004)


@pytest.fixture(scope="module")
def worked():
    """Greedy solutions of both arithmetic models."""
    found = {}
    for size in ("small", "large"):
        model = zoo.load(f"arithmetic-{size}")
        found[size] = solve(model, tokenizer_of(model), ASKED)
    return found


def test_the_larger_reasoner_is_much_better(worked):
    small, large = (accuracy(worked[size], ASKED) for size in ("small", "large"))
    assert 0.2 <= small <= 0.7
    assert large >= 0.85
    assert large - small >= 0.25


def test_both_reasoners_check_themselves_the_weaker_more_often(worked):
    checks = {
        size: [sum(part.startswith(OPENINGS) for part in text.split("\n\n")) for text in texts]
        for size, texts in worked.items()
    }
    assert sum(checks["small"]) > sum(checks["large"]) > 0
    assert sum(count > 0 for count in checks["small"]) / len(ASKED) > 0.4
    assert all(text.count("So the final answer is \\boxed{") == 1 for text in worked["large"])


def test_checks_come_where_digits_carry(worked):
    checked = {True: [0, 0], False: [0, 0]}
    for problem, text in zip(ASKED, worked["large"], strict=True):
        for value, sign, number in problem.steps():
            counted = checked[carries(value, sign, number)]
            counted[0] += any(f"{opening}{value}{'+' if sign > 0 else '-'}{number}: " in text for opening in OPENINGS)
            counted[1] += 1
    assert checked[True][0] / checked[True][1] > 0.4 + checked[False][0] / checked[False][1]


def test_what_the_larger_reasoner_checks_it_works_out_right(worked):
    found = [
        (expression, result)
        for text in worked["large"]
        for expression, result in re.findall(r"(\d+[+-]\d+): .*?, so (\d+)\.", text)
    ]
    assert len(found) >= 10
    assert sum(eval(expression) == int(result) for expression, result in found) / len(found) > 0.9


def test_the_pair_shares_its_tokenizer():
    small, large = (tokenizer_of(zoo.load(f"arithmetic-{size}")) for size in ("small", "large"))
    assert small.get_vocab() == large.get_vocab()
    messages = [{"role": "user", "content": ASKED[0].question}]
    assert small.apply_chat_template(messages, tokenize=False) == ASKED[0].prompt


def test_the_masked_model_adds_and_often_knows_the_answer_early():
    model = zoo.load("arithmetic-masked")
    ((prompt, right),) = by_prompt_length(tokenizer_of(model), sums(64, 4_000_004))
    places = list(ANSWER)
    full = fill(model, prompt, 4, WINDOW)[:, places]
    assert (full == right[:, places]).all(1).float().mean() >= 0.7
    early = fill(model, prompt, 4, 1)[:, places]
    assert (early == full).all(1).float().mean() >= 0.5


def test_the_image_tokenizer_keeps_what_the_classifier_sees():
    vq, judge = zoo.load("sprites-vq"), zoo.load("sprites-classifier")
    scenes = WORLD.scenes(4_000_000, 4_000_128)
    seen = classify(judge, torch.from_numpy(decode(vq, encode(vq, render(scenes, 32).images) + FIRST_CODE)))
    assert (seen.colour.numpy() == scenes.colour[:, 0]).mean() >= 0.95
    assert (seen.shape.numpy() == scenes.shape[:, 0]).mean() >= 0.75


def test_guidance_makes_the_pictures_more_what_was_asked_for():
    vq, prior, judge = (zoo.load(name) for name in ("sprites-vq", "sprites-prior", "sprites-classifier"))
    tokenizer = tokenizer_of(prior)
    scenes = WORLD.scenes(4_000_000, 4_000_128)
    right = {}
    for guidance in (1.0, 2.0):
        tokens = sample(prior, prompts(tokenizer, [said(scene) for scene in scenes]), guidance, tokenizer=tokenizer)
        seen = classify(judge, torch.from_numpy(decode(vq, tokens)))
        right[guidance] = (
            (seen.colour.numpy() == scenes.colour[:, 0]).mean(), (seen.shape.numpy() == scenes.shape[:, 0]).mean()
        )  # fmt: skip
    assert right[1.0][0] > 0.75  # one in eight by chance
    assert right[2.0][0] > 0.8
    assert right[2.0][1] > right[1.0][1] + 0.02 > 0.3


def test_captions_are_true_and_guidance_makes_them_identify_the_picture():
    model = zoo.load("sprites-captioner")
    tokenizer = tokenizer_of(model)
    scenes = CAPTIONED.scenes(4_000_000, 4_000_096)
    images = render(scenes, 32).images
    recall, stated, true = {}, {}, {}
    for guidance in (1.0, 2.0):
        texts = captions(model, tokenizer, images, guidance)
        agreed = [agreement(text, scene) for text, scene in zip(texts, scenes, strict=True)]
        stated[guidance] = sum(found.stated for found in agreed)
        true[guidance] = sum(found.true for found in agreed) / stated[guidance]
        recall[guidance] = retrieval(texts, scenes)
    assert true[1.0] >= 0.85
    assert stated[2.0] > stated[1.0]
    assert recall[2.0] > recall[1.0] + 0.1


def test_without_the_picture_the_captioner_says_what_is_likeliest():
    model = zoo.load("sprites-captioner")
    images = render(CAPTIONED.scenes(4_000_000, 4_000_008), 32).images
    assert len(set(captions(model, tokenizer_of(model), images, guidance=0.0))) == 1
