"""Questions about capitals, currencies and regions of countries: real knowledge that even small models partly have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gratis.contract.attach import Attachment
from gratis.contract.errors import MissingExtraError, ParameterError, SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent

PROMPTS = {
    "capital": ("The capital of {country} is", "What is the capital of {country}?"),
    "currency": ("The three-letter code of the currency of {country} is", "What is the currency code of {country}?"),
    "region": ("{country} is a country in the continent of", "In which part of the world is {country}?"),
}
"""Relation to the beginning of a statement, which the candidates complete, and the question of the same."""


class CountryFacts(Task):
    """Complete statements about countries: by the likeliest of several candidates, or in the model's own words.

    `candidates` compares the log-probabilities of the true completion and of other countries' (of four); `free` lets
    the model generate and looks for the truth in what it says.
    """

    card = TaskCard(
        title="Country facts",
        acts_on="language model",
        subject="smollm2",
        data="capitals, currency codes and regions of some 200 countries, from the package countryinfo",
        metrics=(
            Metric(name="accuracy", help="share of statements completed with the truth"),
            Metric(
                name="log_probability",
                help="mean log-probability of the true completion given the statement",
                unit="nats",
            ),
        ),
        untouched="as trained",
        warm_up={"size": 4},
    )

    size: int = param(60, above=0, help="questions, shared out among the relations")
    relations: tuple[str, ...] = param(("capital", "currency", "region"), help="capital, currency and region")
    form: Literal["candidates", "free"] = param("candidates", help="choose the likeliest candidate, or generate")
    candidates: int = param(4, at_least=2, help="completions to choose from, the true one included")
    max_new_tokens: int = param(24, above=0, unit="tokens", help="longest generated answer")

    def check_parameters(self) -> None:
        if not self.relations or set(self.relations) - set(PROMPTS):
            raise ParameterError(f"CountryFacts: relations must be some of {', '.join(PROMPTS)}.")

    def check(self, subject: Any) -> None:
        if not hasattr(subject, "generate"):
            raise SubjectError(f"country-facts needs a language model, not a {type(subject).__name__}.")
        facts()

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import torch

        from gratis.subjects import tokenizer_of
        from gratis.tasks.reasoning import encoded, respond

        model = subject.subject if isinstance(subject, Attachment) else subject
        tokenizer = tokenizer_of(model)
        posed = questions(self.relations, self.size, self.candidates, seed)
        torch.manual_seed(seed)
        right: list[float] = []
        logs: list[float] = []
        tokens = calls = 0
        for number, question in enumerate(posed):
            wanted = question.options if self.form == "candidates" else question.options[:1]
            values = [completion(model, tokenizer, question.statement, " " + option) for option in wanted]
            calls += len(values)
            logs.append(values[0][0])
            tokens += sum(count for _, count in values)
            if self.form == "candidates":
                right.append(float(values[0][0] > max(value for value, _ in values[1:])))
            else:
                response = respond(model, encoded(model, question.question), self.max_new_tokens)[0]
                tokens, calls = tokens + len(response.tokens), calls + 1
                right.append(float(question.options[0].casefold() in response.text.casefold()))
            progress((number + 1) / len(posed), f"{sum(right):g} of {number + 1} right")
        return Measurement(
            metrics={"accuracy": sum(right) / len(right), "log_probability": sum(logs) / len(logs)},
            items={"accuracy": right, "log_probability": logs},
            tokens=tokens,
            calls=calls,
            details={"relations": [question.relation for question in posed]},
        )


@dataclass(frozen=True)
class Question:
    """A statement to complete."""

    relation: str
    country: str
    options: tuple[str, ...]
    """The truth, then other countries' completions."""

    @property
    def statement(self) -> str:
        """The beginning of the statement."""
        return PROMPTS[self.relation][0].format(country=self.country)

    @property
    def question(self) -> str:
        """The same as a question."""
        return PROMPTS[self.relation][1].format(country=self.country)


def facts() -> dict[str, dict[str, str]]:
    """Relation to country to its value, countries in alphabetical order. Raises MissingExtraError."""
    try:
        from countryinfo import all_countries
    except ImportError as error:
        raise MissingExtraError.of("countryinfo", "tasks") from error
    known: dict[str, dict[str, str]] = {relation: {} for relation in PROMPTS}
    for info in sorted((country.info() for country in all_countries()), key=lambda info: str(info["name"])):
        values = {
            "capital": info.get("capital"),
            "currency": next(iter(info.get("currencies") or ()), None),
            "region": info.get("region"),
        }
        for relation, value in values.items():
            if isinstance(value, str) and value.strip():
                known[relation][str(info["name"])] = value.strip()
    return known


def questions(relations: Sequence[str], size: int, options: int, seed: int) -> list[Question]:
    """`size` questions, the relations in turn, drawn without repeating a country within a relation."""
    generator = random.Random(seed)
    known = facts()
    made: list[Question] = []
    countries = {relation: generator.sample(sorted(known[relation]), len(known[relation])) for relation in relations}
    for number in range(size):
        relation = relations[number % len(relations)]
        if number // len(relations) >= len(countries[relation]):
            continue
        country = countries[relation][number // len(relations)]
        truth = known[relation][country]
        others = sorted(set(known[relation].values()) - {truth})
        wrong = generator.sample(others, min(options - 1, len(others)))
        made.append(Question(relation, country, (truth, *wrong)))
    return made


def completion(model: Any, tokenizer: Any, statement: str, text: str) -> tuple[float, int]:
    """Log-probability of `text` after `statement`, in nats per token of `text`, and the tokens read."""
    import torch

    from gratis.subjects.token_statistics import log_probability

    start = tokenizer(statement, return_tensors="pt")["input_ids"].to(model.device)
    rest = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    ids = torch.cat([start, rest], dim=1)
    with torch.no_grad():
        logits = model(ids).logits[0, start.shape[1] - 1 : -1]
    return float(log_probability(logits, rest[0]).mean()), ids.shape[1]
