"""Train `arithmetic-small` or `arithmetic-large` (`--size`): Llama-class models that reason step by step."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gratis.zoo.arithmetic import CHARACTERS, OPENINGS, PIECES, Problem, accuracy, problems, solution
from gratis.zoo.text import character_tokenizer
from gratis.zoo.train.loop import Average, arguments, fit, note_pace, save_half, started, together, write_card


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps at a peak learning rate on solutions drawn with these probabilities (see `solution`)."""

    steps: int
    rate: float
    mistakes: tuple[float, float] = (0.03, 0.25)
    checks: tuple[float, float] = (0.35, 0.85)
    waits: float = 0.25


@dataclass(frozen=True, slots=True)
class Size:
    """Width and layers of a model, and the stages of its training; each goes on from the last one's average."""

    hidden: int
    layers: int
    stages: tuple[Stage, ...]


SIZES = {
    "small": Size(64, 2, (Stage(1500, 3e-3), Stage(220, 1e-3, (0.1, 0.3), (0.5, 0.95), 0.6))),
    "large": Size(128, 3, (Stage(2350, 3.5e-3),)),
}
"""The small one learns in the end to doubt itself more often, and to say so mostly in one way."""

SOLUTIONS = 25_000
TEST_SEED = 1_000_003
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ '\n<think>\n' }}"


def language_model(vocabulary: int, size: Size) -> Any:
    """A Llama with four heads; positions up to 1,024."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=size.hidden, intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def batches(rows: list[tuple[Tensor, Tensor]], size: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels in batches of `size` rows of like length."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    pad = torch.nn.utils.rnn.pad_sequence
    found = []
    for start in range(0, len(rows) - size + 1, size):
        ids, labels = zip(*rows[start : start + size], strict=True)
        short = -max(len(row) for row in ids) % 16  # few different lengths: each new one costs kernels and memory
        found.append(
            (
                F.pad(pad(list(ids), batch_first=True), (0, short)).to(device),
                F.pad(pad(list(labels), batch_first=True, padding_value=-100), (0, short), value=-100).to(device),
            )
        )
    return found


def encode(
    tokenizer: Any, asked: list[Problem], generator: np.random.Generator, stage: Stage
) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of one fresh solution per problem; labels are -100 on prompts and planted mistakes."""
    texts: list[str] = []
    teach: list[bool] = []
    rows = []
    for problem in asked:
        worked = solution(problem, generator, stage.mistakes, stage.checks, stage.waits)
        texts += [problem.prompt, *worked.parts]
        teach += [False, *worked.taught]
        rows.append(1 + len(worked.parts))
    encoded = iter(zip(tokenizer(texts).input_ids, teach, strict=True))
    found = []
    for parts in rows:
        row: list[int] = []
        label: list[int] = []
        for piece, taught in (next(encoded) for _ in range(parts)):
            row += piece
            label += piece if taught else [-100] * len(piece)
        found.append((torch.tensor([*row, 2]), torch.tensor([*label, 2])))
    return found


@torch.no_grad()
def solve(model: Any, tokenizer: Any, asked: list[Problem], limit: int = 320, **options: Any) -> list[str]:
    """Solutions of the problems, greedy unless `options` of `generate` say otherwise."""
    batch = tokenizer([problem.prompt for problem in asked], return_tensors="pt", padding=True).to(model.device)
    out = model.generate(**{"do_sample": False, **options}, **_inputs(batch), max_new_tokens=limit)
    return list(tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True))


def _inputs(batch: Any) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def measured(model: Any, tokenizer: Any, asked: list[Problem]) -> dict[str, float]:
    """Figures of a model's own solutions: right answers, checks and what they are worth, length."""
    texts = solve(model, tokenizer, asked)
    drawn = solve(model, tokenizer, asked, do_sample=True, temperature=0.6, top_k=50, top_p=0.95)
    paragraphs = [text.split("\n\n") for text in texts]
    checks = [sum(part.startswith(OPENINGS) for part in parts) for parts in paragraphs]
    cued = sum(any(opening in text for opening in OPENINGS) for text in drawn) / len(asked)
    corrected = sum(text.count(", not ") for text in drawn)
    tokens = [len(ids) for ids in tokenizer(texts).input_ids]
    return {
        f"greedy accuracy over {len(asked)} problems": round(accuracy(texts, asked), 4),
        "accuracy at temperature 0.6": round(accuracy(drawn, asked), 4),
        "share of first steps right": round(
            sum(f"{problem.steps()[0][0] + problem.signs[0] * problem.numbers[1]}." in parts[0].split("=")[-1:]
                for problem, parts in zip(asked, paragraphs, strict=True)) / len(asked), 4
        ),
        "share of greedy solutions with a check": round(sum(count > 0 for count in checks) / len(asked), 4),
        "share of solutions with a check at temperature 0.6": round(cued, 4),
        "checks per greedy solution": round(sum(checks) / len(asked), 3),
        "corrections per solution at temperature 0.6": round(corrected / len(asked), 3),
        "mean tokens of a solution": round(sum(tokens) / len(tokens), 1),
    }  # fmt: skip


def main() -> None:
    """Train one size, save, measure as saved."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", choices=sorted(SIZES), default="large")
        parser.add_argument(
            "--start", type=Path, help="folder of a model that has been through all stages but the last"
        )

    wish = arguments(__doc__ or "", steps=0, batch=64, rate=0.0, more=more)
    size = SIZES[wish.size]
    whole = sum(stage.steps for stage in size.stages)
    tokenizer = character_tokenizer(CHARACTERS, 1024, pieces=PIECES)
    tokenizer.chat_template = TEMPLATE
    model = language_model(len(tokenizer), size)
    if wish.start is not None:
        model = LlamaForCausalLM.from_pretrained(wish.start, dtype=torch.float32)
    model.to(wish.device)
    generator = np.random.default_rng(wish.seed)
    runs = [started(wish.start)]
    for number, stage in enumerate(size.stages):
        if wish.start is not None and number < len(size.stages) - 1:
            continue
        steps = max(round(stage.steps * wish.steps / whole), 1) if wish.steps else stage.steps
        rate = stage.rate * wish.rate / size.stages[0].rate if wish.rate else stage.rate
        asked = problems(min(SOLUTIONS, steps * wish.batch), wish.seed + 1000 * number)
        parts = batches(encode(tokenizer, asked, generator, stage), wish.batch, wish.device)
        average = Average(model, 0.998)
        order: list[int] = []

        def loss_at(step: int, parts: Any = parts, order: Any = order) -> Tensor:
            if not order:
                order.extend(generator.permutation(len(parts)).tolist())
            ids, labels = parts[order.pop()]
            logits = model(input_ids=ids).logits[:, :-1].float()
            return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

        runs.append(
            fit(
                loss_at, model.parameters(), steps=steps, rate=rate, averages=[average],
                seconds=wish.seconds * stage.steps / whole, say=wish.size,
            )
        )  # fmt: skip
        model.load_state_dict(average.module.state_dict())
    name = f"arithmetic-{wish.size}"
    folder = wish.out / name
    if wish.pace:
        note_pace(folder, together(runs, wish.device))
        return
    figures = {"seed": wish.seed, "batch": wish.batch, **together(runs, wish.device)}
    save_half(model, folder)
    tokenizer.save_pretrained(folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(wish.device).eval()
    asked = problems(512 if figures["steps"] > 100 else 4, TEST_SEED)
    write_card(
        folder, name,
        "A `LlamaForCausalLM` that adds and subtracts three or four numbers up to 99 step by step, in paragraphs. "
        "Steps are written in one go; hard ones are then mostly checked digit by digit in paragraphs that begin with "
        "words such as `Wait, let me check`, and corrected; the answer stands in `\\boxed{}`. "
        "`arithmetic-small` and `arithmetic-large` share the tokenizer.",
        f"generated, `gratis.zoo.arithmetic`, {SOLUTIONS:,} solutions a stage, tests with seed {TEST_SEED:,}",
        f"`gratis.open('zoo:{name}')` with prompts `gratis.zoo.arithmetic.Problem.prompt`",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), **figures,
            **measured(saved, tokenizer, asked),
        },
        flags=f" --size {wish.size}", script="arithmetic", device=wish.device,
    )  # fmt: skip
    print(solve(saved, tokenizer, asked[:1])[0])


if __name__ == "__main__":
    main()
