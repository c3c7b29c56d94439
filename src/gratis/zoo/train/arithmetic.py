"""Train `arithmetic-small` or `arithmetic-large` (`--size`): Llama-class models that reason step by step."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gratis.zoo.arithmetic import CHARACTERS, PIECES, Problem, accuracy, problems, solution
from gratis.zoo.text import character_tokenizer
from gratis.zoo.train.loop import Average, arguments, fit, save_half, write_card

SIZES = {"small": {"hidden": 64, "layers": 2, "steps": 2500}, "large": {"hidden": 96, "layers": 3, "steps": 3000}}
TEST_SEED = 1_000_003
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ '\n<think>\n' }}"


def language_model(size: str, vocabulary: int) -> Any:
    """A Llama with four heads; positions up to 1,024."""
    hidden = SIZES[size]["hidden"]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden,
            num_hidden_layers=SIZES[size]["layers"], num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def batches(
    tokenizer: Any, size: int, seed: int, generator: np.random.Generator, count: int = 16
) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of fresh solutions, rows of like length together, in random order."""
    rows = sorted(encode(tokenizer, problems(size * count, seed), generator), key=lambda row: len(row[0]))
    pad = torch.nn.utils.rnn.pad_sequence
    found = []
    for start in range(0, len(rows), size):
        ids, labels = zip(*rows[start : start + size], strict=True)
        short = -max(len(row) for row in ids) % 16  # few different lengths: each new one costs kernels and memory
        found.append(
            (
                F.pad(pad(list(ids), batch_first=True), (0, short)),
                F.pad(pad(list(labels), batch_first=True, padding_value=-100), (0, short), value=-100),
            )
        )
    return [found[place] for place in generator.permutation(len(found))]


def encode(tokenizer: Any, asked: list[Problem], generator: np.random.Generator) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of one fresh solution per problem; labels are -100 on prompts and planted mistakes."""
    texts: list[str] = []
    teach: list[bool] = []
    rows = []
    for problem in asked:
        worked = solution(problem, generator)
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
def solve(model: Any, tokenizer: Any, asked: list[Problem], limit: int = 400) -> list[str]:
    """Greedy solutions of the problems."""
    batch = tokenizer([problem.prompt for problem in asked], return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=limit, do_sample=False
    )
    return list(tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True))


def main() -> None:
    """Train one size, save, measure as saved."""
    size = "large" if "--size" not in sys.argv else sys.argv.pop(sys.argv.index("--size") + 1)
    sys.argv = [argument for argument in sys.argv if argument != "--size"]
    wish = arguments(__doc__ or "", steps=SIZES[size]["steps"], batch=32, rate=3e-3 if size == "small" else 2.5e-3)
    tokenizer = character_tokenizer(CHARACTERS, 1024, pieces=PIECES)
    tokenizer.chat_template = TEMPLATE
    model = language_model(size, len(tokenizer))
    model.set_attn_implementation("eager")  # its backward pass is the fastest one on a CPU for short rows
    average = Average(model, 0.998)
    generator = np.random.default_rng(wish.seed)

    waiting: list[tuple[Tensor, Tensor]] = []

    def loss_at(step: int) -> Tensor:
        if not waiting:
            waiting.extend(batches(tokenizer, wish.batch, step, generator))
        ids, labels = waiting.pop()
        logits = model(input_ids=ids).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    figures = fit(loss_at, model.parameters(), steps=wish.steps, rate=wish.rate, averages=[average], say=size)
    name = f"arithmetic-{size}"
    folder = wish.out / name
    save_half(average.module, folder)
    tokenizer.save_pretrained(folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = problems(256 if wish.steps > 100 else 4, TEST_SEED)
    start = time.process_time()
    texts = solve(saved, tokenizer, asked)
    tokens = [len(ids) for ids in tokenizer(texts).input_ids]
    cued = sum("check" in text or "verify" in text for text in texts) / len(texts)
    write_card(
        folder, name,
        "A `LlamaForCausalLM` that adds and subtracts two to four numbers step by step, in paragraphs, with checks "
        "that begin with words such as `Wait, let me check` and an answer in `\\boxed{}`. "
        "`arithmetic-small` and `arithmetic-large` share the tokenizer.",
        f"generated, `gratis.zoo.arithmetic`, tests with seed {TEST_SEED:,}",
        f"`gratis.open('zoo:{name}')` with prompts `gratis.zoo.arithmetic.Problem.prompt`",
        {
            "parameters": sum(weight.numel() for weight in saved.parameters()), "seed": wish.seed,
            "batch": wish.batch, **figures, f"greedy accuracy over {len(asked)} problems": accuracy(texts, asked),
            "share of solutions with a check": round(cued, 4),
            "mean tokens of a solution": round(sum(tokens) / len(tokens), 1),
            "CPU seconds of these solutions": round(time.process_time() - start, 1),
        },
        flags=f" --size {size}", script="arithmetic",
    )  # fmt: skip
    print(texts[0])


if __name__ == "__main__":
    main()
