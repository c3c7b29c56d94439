"""Describe pictures of one sprite: does the caption find its picture among others, is it true, is it what people say?"""

from __future__ import annotations

import statistics
from typing import Any

from gratis.contract.errors import SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent
from gratis.zoo.captioning import TOKENS, WORLD, pixel_values, reference
from gratis.zoo.sprites import ATTRIBUTES, agreement, consistent, render

FIRST, SIDE = 2_000_000, 32
PEOPLE = 10
"""Reference captions of each picture."""


class PictureCaptions(Task):
    """Greedy captions of held-out pictures, judged by what they say: each word's truth is known of every picture.

    A caption finds its picture if it is true of it; where it is true of several of the `group`, it finds one of them by
    chance. Two captions of different wording that say the same are found alike.
    """

    card = TaskCard(
        title="Captions of sprites",
        acts_on="language model",
        subject="zoo:sprites-captioner",
        data="pictures of the sprite world that the captioner was not trained on, with ten ambiguous captions each",
        metrics=(
            Metric(name="recall", help="share of captions that find their picture among the group"),
            Metric(name="attributes", help="share of what can be said of a sprite that is said, and true"),
            Metric(name="hallucination", help="share of what is said that is not true", higher_is_better=False),
            Metric(name="likelihood", help="log-probability of the captions given the picture, by the model", unit="nats"),
            Metric(name="reference", help="share of captions that are word for word one of the references"),
            Metric(name="words", help="words per caption"),
        ),
        warm_up={"pictures": 32},
    )  # fmt: skip

    pictures: int = param(512, at_least=32, at_most=4096, unit="pictures", help="pictures described")
    group: int = param(32, at_least=2, at_most=512, unit="pictures", help="pictures that a caption must choose from")

    def check(self, subject: Any) -> None:
        if getattr(subject, "main_input_name", "") != "pixel_values" or not hasattr(subject, "generate"):
            raise SubjectError(
                f"picture-captions needs a captioner of sprites, such as zoo:sprites-captioner; {type(subject).__name__} "
                "takes no pictures."
            )

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        from gratis.subjects.opening import tokenizer_of

        tokenizer = tokenizer_of(subject)
        first = FIRST + seed * 10_000
        scenes = WORLD.scenes(first, first + self.pictures)
        rows = list(scenes)
        images = render(scenes, SIDE).images
        items: dict[str, list[float]] = {metric.name: [] for metric in self.card.metrics}
        tokens = 0
        for start in range(0, self.pictures, self.group):
            part = rows[start : start + self.group]
            pixels = pixel_values(images[start : start + self.group]).to(subject.device)
            texts, likelihoods, written = described(subject, tokenizer, pixels)
            tokens += written
            for place, text in enumerate(texts):
                fits, agreed = consistent(text, part), agreement(text, part[place])
                items["recall"].append(float(fits[place]) / max(int(sum(fits)), 1))
                items["attributes"].append(agreed.true / len(ATTRIBUTES))
                items["hallucination"].append(agreed.false / max(agreed.stated, 1))
                items["reference"].append(float(any(text == reference(part[place], one) for one in range(PEOPLE))))
                items["words"].append(float(len(text.split())))
            items["likelihood"] += likelihoods
            progress(min(start + self.group, self.pictures) / self.pictures, "pictures described")
        return Measurement(
            metrics={name: statistics.fmean(values) for name, values in items.items()},
            items=items,
            tokens=tokens,
            details={"captions": texts[:8]},
        )


def described(model: Any, tokenizer: Any, pixels: Any) -> tuple[list[str], list[float], int]:
    """Captions of pictures, each one's log-probability given its picture, and the tokens written in all."""
    import torch

    with torch.no_grad():
        ids = model.generate(pixel_values=pixels, max_new_tokens=TOKENS, do_sample=False)
        logits = model(pixel_values=pixels, decoder_input_ids=ids[:, :-1], use_cache=False).logits
    chosen = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    ended = (ids[:, 1:] == tokenizer.eos_token_id).long().cumsum(1) - (ids[:, 1:] == tokenizer.eos_token_id).long()
    inside = ended == 0
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts, (chosen * inside).sum(1).tolist(), int(inside.sum())
