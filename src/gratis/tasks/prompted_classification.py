"""Short texts sorted into classes by a prompt that a language model answers with one word."""

from __future__ import annotations

import functools
import random
import statistics
from typing import Any, Literal

from gratis.contract.errors import ParameterError, SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent

CLASSES = {"reviews": ("positive", "negative"), "questions": ("person", "place", "number", "date")}
ASKED = {
    "reviews": "Classify the sentence into one of the following sentiments: positive or negative.\n"
    "Sentence: {text}\nSentiment:",
    "questions": "What does the question ask for: person, place, number or date? Answer with one word.\n"
    "Question: {text}\nAnswer:",
}
CALIBRATION = 100
"""Texts that are set apart: tune on these, and none of them is ever tested on."""
QUESTIONS = {
    "person": ("Who {did} {thing}?", "Which person {did} {thing}?", "What is the name of the one who {did} {thing}?"),
    "place": ("Where was {thing} {done}?", "In which city was {thing} {done}?", "What country was {thing} {done} in?"),
    "number": ("How many people {did} {thing}?", "How much did {thing} cost?", "How many years did {thing} take?"),
    "date": ("When was {thing} {done}?", "In what year was {thing} {done}?", "On which day was {thing} {done}?"),
}
DEEDS = (
    ("built", "built"), ("designed", "designed"), ("painted", "painted"), ("found", "found"), ("sold", "sold"),
    ("stole", "stolen"), ("broke", "broken"), ("drew", "drawn"), ("hid", "hidden"), ("bought", "bought"),
)  # fmt: skip
THINGS = (
    "the first bridge", "the old tower", "the great clock", "the royal ship", "the golden mask", "the city gate",
    "the stone lion", "the long wall", "the white palace", "the silver bell", "the printing press", "the steam engine",
    "the glass dome", "the wooden horse", "the iron bridge", "the blue window", "the secret map", "the lost crown",
)  # fmt: skip


class PromptedClassification(Task):
    """Movie-review snippets by sentiment, or made-up questions by what they ask for; the answer is one word.

    Reports how often the model's next word is a class at all beside how often the likeliest class is right: much of what
    a changed prompt or a changed attention gains is the former.
    """

    card = TaskCard(
        title="Classification by prompt",
        acts_on="language model",
        subject="smollm2",
        data=(
            "movie-review snippets rated by twenty people each (C. Hutto and E. Gilbert, VADER, ICWSM 2014), balanced, or "
            "questions made from templates; 100 of each are set apart for calibration"
        ),
        metrics=(
            Metric(name="accuracy", help="share of texts whose likeliest class word is right"),
            Metric(name="parsed_accuracy", help="share of texts for which the likeliest token of all is right"),
            Metric(name="valid", help="share of texts for which the likeliest token of all names a class"),
            Metric(
                name="entropy",
                help="mean entropy of the next token, over the vocabulary",
                unit="nats",
                higher_is_better=False,
            ),
        ),
        warm_up={"size": 8},
    )

    size: int = param(100, above=1, help="texts, none of which are those set apart for calibration")
    data: Literal["reviews", "questions"] = param(
        "reviews", help="reviews by sentiment, or questions by what they ask for"
    )

    form: Literal["begun", "chat", "plain"] = param(
        "begun", help="a chat whose answer has begun with 'Sentiment:', a chat, or the text of the prompt alone"
    )

    def check(self, subject: Any) -> None:
        if not hasattr(subject, "generate"):
            raise SubjectError(f"prompted-classification needs a language model, not a {type(subject).__name__}.")
        examples(self.data, 1, 0)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        from gratis.subjects.prompted_answers import answer_scores

        chosen = examples(self.data, self.size, seed)
        rows = prompts_of(subject, self.data, [text for text, _ in chosen], self.form)
        answers = answer_tokens(subject, self.data)
        items: dict[str, list[float]] = {metric.name: [] for metric in self.card.metrics}
        for at in range(0, len(rows), 32):
            part = slice(at, at + 32)
            found = answer_scores(subject, rows[part], answers=answers, labels=[label for _, label in chosen[part]])
            for name, values in items.items():
                values += getattr(found, name)
            progress(
                len(items["accuracy"]) / len(rows), f"{int(sum(items['accuracy']))} of {len(items['accuracy'])} right"
            )
        return Measurement(
            metrics={name: statistics.fmean(values) for name, values in items.items()},
            items=items,
            tokens=sum(map(len, rows)),
            calls=len(rows),
        )


def examples(data: str, count: int, seed: int, *, calibration: bool = False) -> list[tuple[str, int]]:
    """(text, place of its class) of `count` texts of every class alike, drawn by `seed` among those that are set apart for
    calibration or among the others. Raises ParameterError where there are not as many.
    """
    by_class = _texts(data)
    apart = CALIBRATION // len(by_class)
    drawn = random.Random(f"{data} {seed} {calibration}")
    found: list[tuple[str, int]] = []
    for label, texts in enumerate(by_class):
        own = list(texts)
        random.Random(data).shuffle(own)
        own = own[:apart] if calibration else own[apart:]
        wanted = count // len(by_class) + (label < count % len(by_class))
        if wanted > len(own):
            raise ParameterError(
                f"There are {len(own) * len(by_class):,} {data} to choose from: lower size from {count:,}."
            )
        found += [(text, label) for text in drawn.sample(own, wanted)]
    drawn.shuffle(found)
    return found


def prompts_of(model: Any, data: str, texts: list[str], form: str) -> list[Any]:
    """Token ids of the prompts of a form, in the model's chat template. Raises SubjectError where it has none."""
    from gratis.subjects import tokenizer_of
    from gratis.subjects.prompted_answers import token_rows

    tokenizer = tokenizer_of(model)
    asked = [ASKED[data].format(text=text) for text in texts]
    if form == "plain":
        return token_rows(model, asked)
    if tokenizer.chat_template is None:
        raise SubjectError("This model has no chat template: take form=plain.")
    said = []
    for one in asked:
        question, _, begun = one.rpartition("\n")
        turn = [{"role": "user", "content": question if form == "begun" else one}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        said.append(text + begun if form == "begun" else text)
    return token_rows(model, [tokenizer(one, add_special_tokens=False).input_ids for one in said])


def answer_tokens(model: Any, data: str) -> list[list[int]]:
    """Per class the tokens that begin its word. Raises SubjectError where two begin alike."""
    from gratis.subjects.prompted_answers import word_tokens

    return word_tokens(model, CLASSES[data])


@functools.cache
def _texts(data: str) -> list[list[str]]:
    """Per class all texts there are."""
    if data == "questions":
        return [
            [
                form.format(did=did, done=done, thing=thing)
                for form in QUESTIONS[name]
                for did, done in (DEEDS if "{did}" in form or "{done}" in form else DEEDS[:1])
                for thing in THINGS
            ]
            for name in CLASSES["questions"]
        ]
    from gratis.tasks.sentiment import LEAST_RATING, rated_snippets

    rated = [(rating, text) for rating, text in rated_snippets() if abs(rating) >= LEAST_RATING]
    return [[text for rating, text in rated if (rating > 0) == positive] for positive in (True, False)]
