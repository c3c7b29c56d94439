"""Tell positive from negative movie reviews: short-text sentiment over a chat."""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING, Any

from gratis.contract.errors import MissingExtraError, SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent

if TYPE_CHECKING:
    from pathlib import Path

ARCHIVE = "vaderSentiment-0.5.zip"
LEAST_RATING = 1.0
"""Mean human rating, on a scale from -4 to 4, from which on a snippet counts as positive or (negated) as negative."""


class Sentiment(Task):
    """Human-rated snippets of movie reviews, balanced; the two words are compared by their probability."""

    card = TaskCard(
        title="Sentiment of short texts",
        acts_on="chat",
        subject="chat:smollm2",
        data="movie-review snippets rated by twenty people each (C. Hutto and E. Gilbert, VADER, ICWSM 2014), balanced",
        metrics=(
            Metric(name="accuracy", help="share of snippets that get their sign right"),
            Metric(name="positive_share", help="share of snippets called positive; half of them are"),
            Metric(name="calls_per_question", help="requests for one snippet", higher_is_better=False, cost=True),
            Metric(name="output_tokens", help="tokens written for one snippet", higher_is_better=False, cost=True),
        ),
    )

    snippets: int = param(16, above=1, help="snippets, half of them positive")

    def check(self, subject: Any) -> None:
        from gratis.subjects.chat import Chat

        if not isinstance(subject, Chat):
            raise SubjectError(
                f"sentiment needs a gratis.Chat, not a {type(subject).__name__}: open a language model as chat:NAME."
            )

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        chosen = balanced(self.snippets, seed)
        before = subject.stats()
        hits: list[float] = []
        called: list[float] = []
        # Batches of a few keep the progress moving.
        for at in range(0, len(chosen), 4):
            part = chosen[at : at + 4]
            answers = subject.answer_many([text for text, _ in part], polarity(), max_tokens=4)
            hits += [float(answer.answer == sign) for answer, (_, sign) in zip(answers, part, strict=True)]
            called += [float(answer.answer == "positive") for answer in answers]
            progress(len(hits) / len(chosen), f"{int(sum(hits))} of {len(hits)} right")
        after = subject.stats()
        spent = {name: after[name] - before[name] for name in ("calls", "input", "output")}
        return Measurement(
            metrics={
                "accuracy": statistics.fmean(hits),
                "positive_share": statistics.fmean(called),
                "calls_per_question": spent["calls"] / len(chosen),
                "output_tokens": spent["output"] / len(chosen),
            },
            items={"accuracy": hits},
            tokens=int(spent["input"] + spent["output"]),
            calls=int(spent["calls"]),
        )


def polarity() -> Any:
    """The kind of question: a snippet whose answer is positive or negative."""
    from gratis.subjects.chat.formats import Format

    class Polarity(Format):
        def render(self, item: Any) -> str:
            return f"Is the sentiment of this movie review positive or negative?\n{item['question']}"

        def choices(self, item: Any) -> tuple[str, ...]:
            return ("positive", "negative")

        def extract(self, text: str, item: Any) -> str | None:
            word = text.strip().strip(".").lower()
            return word if word in ("positive", "negative") else None

    return Polarity("polarity", "You judge movie reviews. Answer with one word: positive or negative.")


def balanced(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` (snippet, sign) pairs, half of them positive, drawn and ordered by `seed`."""
    generator = random.Random(seed)
    by_sign: dict[str, list[str]] = {"positive": [], "negative": []}
    for rating, text in rated_snippets():
        if abs(rating) >= LEAST_RATING:
            by_sign["positive" if rating > 0 else "negative"].append(text)
    halves = {"positive": count // 2, "negative": count - count // 2}
    chosen = [(text, sign) for sign, texts in by_sign.items() for text in generator.sample(texts, halves[sign])]
    generator.shuffle(chosen)
    return chosen


def rated_snippets() -> list[tuple[float, str]]:
    """(mean rating, snippet) of every movie-review snippet. Raises MissingExtraError where the data is absent."""
    import io
    import tarfile
    import zipfile

    with zipfile.ZipFile(_archive()) as outer:
        name = next(n for n in outer.namelist() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as inner:
            file = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("latin-1").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    return [(float(rating), text.strip()) for _, rating, text in rows]


def _archive() -> Path:
    import sys
    from pathlib import Path

    from gratis.subjects.folders import cache_folder

    for folder in (Path(sys.prefix) / "share" / "gratis", cache_folder() / "data"):
        if (folder / ARCHIVE).is_file():
            return folder / ARCHIVE
    raise MissingExtraError(
        "The rated snippets are absent: run `pip download --no-deps --no-binary :all: vaderSentiment==0.5 --dest "
        f"{cache_folder() / 'data'}`."
    )
