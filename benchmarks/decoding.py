"""All decoding methods of language models on the same problems, at about equal cost in tokens.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py [MODEL …] [--problems N] [--device cpu] [--items FOLDER]

Models: smollm2 (small sums, products and divisors), arithmetic-small and arithmetic-large (step-by-step sums). Methods
that draw several responses draw as many as make up about the tokens that CNTP draws, all of them from the same draws.
Accuracy with 95 % intervals from resampling problems; tokens drawn and forward passes per problem; CPU seconds per
problem on the first of them. Renews the models' parts of benchmarks/results/decoding.json.

Responses are kept in FOLDER as they come, so that an interrupted run goes on, and another machine can draw them:
`--only ARM` (greedy, sjd, cntp-0 …, draws, thinking) draws that arm's alone, `--part 0/2` every second problem of it,
`--limit SECONDS` begins none after that, and no table is made. `--questions FILE` keeps questions that were generated
where reasoning-gym is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import renew
from rich.progress import track

import gratis
from gratis import subjects
from gratis.subjects.answers import borda, extract, ranking
from gratis.subjects.folders import cache_folder
from gratis.subjects.token_statistics import log_probability
from gratis.tasks.reasoning import encoded, respond
from gratis.tasks.reasoning import problems as reasoning_problems
from gratis.zoo.arithmetic import answer_of
from gratis.zoo.arithmetic import problems as sums

MODELS = ("smollm2", "arithmetic-small", "arithmetic-large")
PROBLEMS, SEED, TEMPERATURE, CNTP_SEEDS, COSTED = 60, 20_001, 0.8, 3, 2
KINDS = ("chain_sum", "products", "gcd")
SAMPLES = {"smollm2": 6, "arithmetic-small": 4, "arithmetic-large": 4}
"""Responses of the methods that draw several: about the tokens that CNTP draws."""
LONGEST = {"smollm2": 48, "arithmetic-small": 300, "arithmetic-large": 300}
ANSWER = {"smollm2": "number", "arithmetic-small": "boxed", "arithmetic-large": "boxed"}
DRAWS = {"temperature": TEMPERATURE, "top_p": 1.0}


@dataclass(frozen=True)
class Asked:
    """One problem: what the model reads, and what an answer is worth."""

    prompt: torch.Tensor
    score: Callable[[str], float]


def questions(count: int, file: Path | None) -> list[str]:
    """Questions for SmolLM2: from the file where there is one, else generated (and kept in it)."""
    if file is not None and file.exists():
        found: list[str] = json.loads(file.read_text(encoding="utf-8"))
        return found[:count]
    made = [problem.question for problem in reasoning_problems(KINDS, count, SEED, "easy")]
    if file is not None:
        file.write_text(json.dumps(made, indent=0), encoding="utf-8")
    return made


def asked(name: str, model: Any, count: int, file: Path | None, scored: bool) -> list[Asked]:
    """The problems put to a model; `scored` where their answers are needed."""
    if name != "smollm2":
        tokenizer = subjects.tokenizer_of(model)
        return [
            Asked(
                tokenizer(problem.prompt, return_tensors="pt")["input_ids"].to(model.device),
                lambda text, right=problem.answer: float(answer_of(text) == right),  # type: ignore[misc]
            )
            for problem in sums(count, SEED)
        ]
    posed: list[Any] = reasoning_problems(KINDS, count, SEED, "easy") if scored else [None] * count
    return [
        Asked(encoded(model, question), lambda text, problem=problem: problem.score(extract("number", text)))  # type: ignore[misc]
        for question, problem in zip(questions(count, file), posed, strict=True)
    ]


def arms(name: str) -> dict[str, Any]:
    """Methods by arm: those that give one response, and `draws`, whose responses all the choosing methods share."""
    found: dict[str, Any] = {"greedy": gratis.Greedy()}
    if name != "smollm2":
        # Its law is that of sampling; what it is for is fewer passes.
        found["sjd"] = gratis.SJD(window=4, random_law="uniform", **DRAWS)
    found |= {f"cntp-{seed}": gratis.CNTP(**DRAWS) for seed in range(CNTP_SEEDS)}
    found["draws"] = gratis.SelfCertainty(samples=SAMPLES[name], **DRAWS)
    if name == "arithmetic-small":
        target = gratis.open("zoo:arithmetic-large")
        found["thinking"] = gratis.SpeculativeThinking(target=target, temperature=TEMPERATURE, top_p=1.0, top_k=0)
    return found


def answered(model: Any, method: Any, arm: str, prompt: torch.Tensor, number: int, longest: int) -> dict[str, Any]:
    """What a method did with one problem."""
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    several = getattr(method, "samples", 1)
    seed = 1000 * number + (int(arm[5:]) if arm.startswith("cntp-") else 0)
    options = {} if several == 1 else {"num_return_sequences": several}
    with gratis.attach(model, method) as handle:
        hooks = [one.register_forward_hook(count) for one in {model, getattr(method, "target", None) or model}]
        torch.manual_seed(seed)
        responses = respond(model, prompt, longest, **options)
        for hook in hooks:
            hook.remove()
        report = handle.report()[method.name]
    lengths = [len(response.tokens) for response in responses]
    found = {
        "texts": [response.text for response in responses],
        "lengths": lengths,
        "drawn": report.get("generated_tokens", sum(lengths)),
        "passes": passes[0],
    }
    if arm == "draws":
        scores = [report["self_certainty"][0][place] for place in report["ranking"][0]]
        likely = [mean_log_probability(model, prompt, response.tokens) for response in responses]
        # In the order in which they were drawn: ties go to the first.
        order = sorted(range(several), key=lambda place: report["ranking"][0][place])
        found |= {"self-certainty": [scores[place] for place in order], "likely": [likely[place] for place in order]}
        found |= {key: [found[key][place] for place in order] for key in ("texts", "lengths")}
    if "target_share" in report:
        found["target share"] = report["target_share"][0]
    return found


@torch.no_grad()
def mean_log_probability(model: Any, prompt: torch.Tensor, tokens: list[int]) -> float:
    """What PerplexityPick ranks by: the mean log-probability of a response under the raw distribution."""
    response = torch.tensor([tokens], device=prompt.device)
    logits = model(torch.cat([prompt, response], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    return float(log_probability(logits.float(), response[0]).mean())


class Items:
    """What the arms did with the problems of a model, kept in files as it comes."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, arm: str) -> dict[int, dict[str, Any]]:
        """By number of the problem."""
        found = {}
        for file in sorted(self.folder.glob(f"{self.name}-{arm}[.@]*jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                number, item = json.loads(line)
                found[number] = item
        return found

    def draw(self, model: Any, method: Any, arm: str, posed: list[Asked], part: str, limit: float) -> None:
        """Put the problems of this part that are not answered yet to the model."""
        at, of = map(int, part.split("/"))
        known, begin = self.of(arm), time.monotonic()
        file = self.folder / f"{self.name}-{arm}{'' if of == 1 else f'@{at}'}.jsonl"
        with file.open("a", encoding="utf-8") as out:
            for number in track(range(at, len(posed), of), description=f"{self.name}, {arm}"):
                if number in known or time.monotonic() - begin > limit:
                    continue
                item = answered(model, method, arm, posed[number].prompt, number, LONGEST[self.name])
                out.write(json.dumps([number, item]) + "\n")
                out.flush()


def interval(values: list[float]) -> list[float]:
    """95 % interval of the mean, from 2,000 resamplings."""
    data = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(data), (2000, len(data)), generator=torch.Generator().manual_seed(0))
    return [round(float(v), 3) for v in data[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))]


def rows(name: str, found: dict[str, dict[int, dict[str, Any]]], posed: list[Asked]) -> Iterator[tuple[str, Any]]:
    """Each method's marks, tokens drawn and passes, problem by problem, on the problems that all arms answered."""
    numbers = sorted(set.intersection(*(set(items) for items in found.values())))

    def single(arms: list[str]) -> Any:
        items = [[found[arm][number] for arm in arms] for number in numbers]
        marks = [
            statistics.mean(posed[n].score(one["texts"][0]) for one in row)
            for n, row in zip(numbers, items, strict=True)
        ]
        drawn = [statistics.mean(one["drawn"] for one in row) for row in items]
        return marks, drawn, [statistics.mean(one["passes"] for one in row) for row in items]

    yield "greedy", single(["greedy"])
    draws = [found["draws"][number] for number in numbers]
    marks = [[posed[n].score(text) for text in one["texts"]] for n, one in zip(numbers, draws, strict=True)]
    lengths = [statistics.mean(one["lengths"]) for one in draws]
    yield "sampling", ([statistics.mean(row) for row in marks], lengths, lengths)
    if "sjd" in found:
        yield "sjd", single(["sjd"])
    cautious = [f"cntp-{seed}" for seed in range(CNTP_SEEDS)]
    yield "cntp", single(cautious)

    def chosen(choose: Callable[[dict[str, Any], list[str | None]], int]) -> Any:
        picks = [choose(one, [extract(ANSWER[name], text) for text in one["texts"]]) for one in draws]
        picked = [row[pick] for row, pick in zip(marks, picks, strict=True)]
        return picked, [one["drawn"] for one in draws], [one["passes"] for one in draws]

    yield "perplexity pick", chosen(lambda one, answers: ranking(one["likely"])[0])
    yield "self-certainty, best", chosen(lambda one, answers: ranking(one["self-certainty"])[0])
    yield "majority vote", chosen(lambda one, answers: borda([0.0] * len(answers), answers, 0).index)
    yield "self-certainty, vote", chosen(lambda one, answers: borda(one["self-certainty"], answers, 0.5).index)
    votes = []
    for number in numbers:
        texts = [found[arm][number]["texts"][0] for arm in cautious]
        answers = [extract(ANSWER[name], text) for text in texts]
        votes.append(posed[number].score(texts[borda([0.0] * len(texts), answers, 0).index]))
    total = [[sum(found[arm][n][key] for arm in cautious) for n in numbers] for key in ("drawn", "passes")]
    yield f"cntp, majority of {CNTP_SEEDS}", (votes, *total)
    if "thinking" in found:
        yield "speculative thinking", single(["thinking"])
    best = [max(row) for row in marks]
    yield "a perfect pick", (best, [one["drawn"] for one in draws], [one["passes"] for one in draws])


def seconds(model: Any, name: str, posed: list[Asked]) -> dict[str, float]:
    """CPU seconds per problem of each method by itself, on the first problems."""
    several = {"samples": SAMPLES[name], **DRAWS}
    methods = {
        "greedy": gratis.Greedy(),
        "sampling": gratis.Sampling(**DRAWS),
        "cntp": gratis.CNTP(**DRAWS),
        "perplexity pick": gratis.PerplexityPick(**several),
        "self-certainty, best": gratis.SelfCertainty(**several),
        "majority vote": gratis.MajorityVote(answer=ANSWER[name], **several),
        "self-certainty, vote": gratis.SelfCertainty(select="borda", answer=ANSWER[name], **several),
    }
    others = {"sjd": "sjd", "thinking": "speculative thinking"}
    methods |= {others[arm]: one for arm, one in arms(name).items() if arm in others}
    spent: dict[str, list[float]] = {method: [] for method in methods}
    for number in track(range(COSTED), description=f"{name}, seconds"):
        for method, one in methods.items():
            begin = time.process_time()
            with gratis.attach(model, one):
                torch.manual_seed(number)
                respond(model, posed[number].prompt, LONGEST[name])
            spent[method].append(time.process_time() - begin)
    return {method: statistics.mean(values) for method, values in spent.items()}


def table(model: Any, name: str, items: Items, posed: list[Asked], methods: dict[str, Any]) -> dict[str, Any]:
    """All methods on one model."""
    found = {arm: items.of(arm) for arm in methods}
    spent = seconds(model.to("cpu"), name, [Asked(one.prompt.cpu(), one.score) for one in posed[:COSTED]])
    lines = {}
    for method, (marks, drawn, passes) in rows(name, found, posed):
        lines[method] = {
            "accuracy": round(statistics.mean(marks), 3),
            "interval": interval(marks),
            "tokens drawn per problem": round(statistics.mean(drawn), 1),
            "forward passes per problem": round(statistics.mean(passes), 1),
            **({"CPU s per problem": round(spent[method], 2)} if method in spent else {}),
        }
    content: dict[str, Any] = {
        "problems": len(marks),
        "samples of those that draw several": SAMPLES[name],
        "longest response": LONGEST[name],
        "methods": lines,
    }
    if shares := [item["target share"] for item in found.get("thinking", {}).values()]:
        content["share of tokens by the target of speculative thinking"] = round(statistics.mean(shares), 3)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=[], help=", ".join(MODELS))
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--items", type=Path, default=cache_folder() / "benchmarks" / "decoding")
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="ARM")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--limit", type=float, default=float("inf"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.models or MODELS:
        model = gratis.open(name if name == "smollm2" else f"zoo:{name}").to(chosen.device)
        posed = asked(name, model, chosen.problems, chosen.questions, scored=not chosen.only)
        items, methods = Items(chosen.items, name), arms(name)
        begin = time.monotonic()
        for arm in chosen.only or methods:
            left = chosen.limit - (time.monotonic() - begin)
            items.draw(model, methods[arm], arm, posed, chosen.part, left)
        if not chosen.only:
            said = {"repeat": "OMP_NUM_THREADS=1 python benchmarks/decoding.py", "temperature": TEMPERATURE}
            renew("decoding", {**said, name: table(model, name, items, posed, methods)})


if __name__ == "__main__":
    main()
