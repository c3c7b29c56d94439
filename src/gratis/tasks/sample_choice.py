"""How well a method chooses among the responses that it drew: against a random pick, and against the best there was."""

from __future__ import annotations

import math
from typing import Any, Literal

from gratis.contract.attach import Attachment, attached
from gratis.contract.errors import SubjectError
from gratis.contract.parameters import param
from gratis.tasks.reasoning import drawn_tokens, encoded, problems, respond
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent


class SampleChoice(Task):
    """Draw several responses to each problem and look at the order in which they come back.

    A method that chooses returns them best first (`num_return_sequences`), so chosen, random and best response are
    compared within the same draws. Without a method they come in random order.
    """

    card = TaskCard(
        title="Choosing among samples",
        acts_on="language model",
        subject="smollm2",
        data="several sampled responses to each of the generated problems of the task `reasoning`",
        metrics=(
            Metric(name="first_accuracy", help="mean score of the response that came first"),
            Metric(name="mean_accuracy", help="mean score of all responses: a random pick"),
            Metric(name="any_accuracy", help="mean of the best score among the responses: a perfect pick"),
            Metric(name="gain", help="first minus mean: what choosing adds to a random pick of the same responses"),
            Metric(
                name="length_correlation",
                help="rank correlation of a response's place with its length, mean over problems; 0 is no preference",
                higher_is_better=False,
            ),
            Metric(
                name="rescored_difference",
                help="largest difference of the reported self-certainty from that of a second, teacher-forced pass",
                unit="nats",
                higher_is_better=False,
            ),
        ),
        untouched="a random pick",
        warm_up={"size": 1},
    )

    size: int = param(24, above=0, help="problems, shared out among the kinds")
    samples: int = param(8, at_least=2, help="responses per problem; the method must draw as many")
    temperature: float = param(0.8, above=0, help="of the draws")
    kinds: tuple[str, ...] = param(("chain_sum", "products", "gcd"), help="names of reasoning-gym generators")
    difficulty: Literal["easy", "default"] = param("easy", help="small operands where we know them, or as generated")
    max_new_tokens: int = param(48, above=0, unit="tokens", help="longest response")
    answer: Literal["number", "text", "last line", "choice", "boxed"] = param("number", help="where the answer is")

    def check(self, subject: Any) -> None:
        if not hasattr(subject, "generate"):
            raise SubjectError(f"sample-choice needs a language model, not a {type(subject).__name__}.")
        problems(self.kinds, 1, 0, self.difficulty)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import torch

        from gratis.subjects.answers import extract

        model = subject.subject if isinstance(subject, Attachment) else subject
        posed = problems(self.kinds, self.size, seed, self.difficulty)
        before, tokens = drawn_tokens(model), 0
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}
        items: dict[str, list[float]] = {
            name: [] for name in ("first_accuracy", "mean_accuracy", "any_accuracy", "gain", "length_correlation")
        }
        differences: list[float] = []
        for number, problem in enumerate(posed):
            prompt = encoded(model, problem.question)
            responses = respond(model, prompt, self.max_new_tokens, num_return_sequences=self.samples, **options)
            scores = [problem.score(extract(self.answer, response.text)) for response in responses]
            lengths = [float(len(response.tokens)) for response in responses]
            mean = sum(scores) / len(scores)
            items["first_accuracy"].append(scores[0])
            items["mean_accuracy"].append(mean)
            items["any_accuracy"].append(max(scores))
            items["gain"].append(scores[0] - mean)
            items["length_correlation"].append(rank_correlation([-float(p) for p in range(len(lengths))], lengths))
            differences.append(rescored_difference(model, prompt, [response.tokens for response in responses]))
            tokens += int(sum(lengths))
            progress((number + 1) / len(posed), f"{sum(items['first_accuracy']):g} of {number + 1} right")
        metrics = {name: sum(values) / len(values) for name, values in items.items()}
        metrics["rescored_difference"] = max(differences)
        drawn = drawn_tokens(model)
        return Measurement(
            metrics=metrics,
            items={name: items[name] for name in ("first_accuracy", "mean_accuracy", "any_accuracy", "gain")},
            tokens=drawn - before if drawn > before else tokens,
            details={"right_per_sample": items["mean_accuracy"]},
        )


def rescored_difference(model: Any, prompt: Any, responses: list[list[int]]) -> float:
    """Largest difference of the last call's reported self-certainty from that of a teacher-forced pass.

    `responses` (token ids) are in the order in which they were returned; not a number where nothing was reported.
    """
    from gratis.methods.decoding.self_certainty import score

    for one in attached(model):
        for report in one.report().values():
            if "self_certainty" in report:
                online = [report["self_certainty"][0][sample] for sample in report["ranking"][0]]
                again = score(model, prompt, responses)
                return float(max(abs(a - b) for a, b in zip(online, again, strict=True)))
    return math.nan


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 0 where one of the lists is constant."""
    from scipy.stats import spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return float(spearmanr(first, second).statistic)
