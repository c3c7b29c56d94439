"""What `arithmetic-masked`, a masked-diffusion language model, reads and writes.

The prompt is a sum of two numbers of three digits such as "347+285" and a line break; the answer window has 32 places:
the columns from the right, each with its digits, what was carried into it, and its sum; `<eos>`; "The answer is " as
one token; three digits; and `<eos>`:

    7+5+0=12, 4+8+1=13, 3+2+1=06 <eos> The answer is 632 <eos>

so that the answer region is known: places 28 to 30 of the window. One pair of numbers in ten is held out: training
never sees it, tests see nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gratis.contract.errors import InputError
from gratis.zoo.arithmetic import Problem

WINDOW = 32
SUFFIX = "The answer is "
SUFFIX_PLACE = 27
ANSWER = (28, 29, 30)
"""Places of the answer's digits in the window."""


def sums(count: int, seed: int, held_out: bool = True) -> list[Problem]:
    """Sums of two numbers of three digits, at most 999 together; `held_out` says from which of the two parts."""
    generator = np.random.default_rng([seed, 8])
    found: list[Problem] = []
    while len(found) < count:
        first = generator.integers(100, 900, size=2 * count + 64)
        second = 100 + (generator.random(len(first)) * (900 - first)).astype(np.int64)
        parted = (first * 1000 + second) * 2_654_435_761 % 2**32 % 10 == 0
        rows = np.flatnonzero(parted == held_out)[: count - len(found)]
        found += [Problem((int(first[row]), int(second[row])), (1,)) for row in rows]
    return found


def column_work(first: int, second: int) -> str:
    """Three columns from the right with what is carried into them, for example "7+5+0=12, 4+8+1=13, 3+2+1=06"."""
    carried, parts = 0, []
    for place in (1, 10, 100):
        top, bottom = first // place % 10, second // place % 10
        total = top + bottom + carried
        parts.append(f"{top}+{bottom}+{carried}={total:02d}")
        carried = total // 10
    return ", ".join(parts)


def prompt_ids(tokenizer: Any, problem: Problem) -> Tensor:
    """Token ids (length,) of the problem's question and a line break."""
    return torch.tensor(tokenizer(problem.question + "\n").input_ids)


def window_ids(tokenizer: Any, problem: Problem) -> Tensor:
    """Token ids (32,) of the right answer window. Raises InputError for a problem of another kind."""
    if problem.signs != (1,) or min(problem.numbers) < 100 or problem.answer > 999:
        raise InputError(
            f"The masked model knows sums of two numbers of three digits, at most 999, not {problem.question}."
        )
    work = tokenizer(column_work(*problem.numbers)).input_ids
    answer = tokenizer(f"{SUFFIX}{problem.answer:03d}").input_ids
    eos = tokenizer.eos_token_id
    return torch.tensor([*work, *[eos] * (SUFFIX_PLACE - len(work)), *answer, eos])


def answers_of(tokenizer: Any, windows: Tensor) -> list[int | None]:
    """The numbers in the answer region of windows (batch, 32), None where it holds no number."""
    texts = tokenizer.batch_decode(windows[:, list(ANSWER)])
    return [int(text) if text.isdecimal() else None for text in texts]


@torch.no_grad()
def decode(model: Any, prompts: Tensor, mask_id: int, steps: int = WINDOW, length: int = WINDOW) -> Tensor:
    """Plain greedy masked diffusion: at each step the most confident masked places take their likeliest token.

    prompts: (batch, prompt length), all of one length; `steps` divides `length`. Returns the windows (batch, length).
    This is the reference that the figures on the model's card were measured with.
    """
    if length % steps:
        raise InputError(f"steps must divide the window's {length} places, not {steps}.")
    ids = torch.cat([prompts, prompts.new_full((len(prompts), length), mask_id)], dim=1)
    for _ in range(steps):
        probability, token = model(ids).logits.float().softmax(-1).max(-1)
        probability = probability.masked_fill(ids != mask_id, -1)
        chosen = probability.topk(length // steps, dim=1).indices
        ids.scatter_(1, chosen, token.gather(1, chosen))
    return ids[:, prompts.shape[1] :]


def by_prompt_length(tokenizer: Any, asked: Sequence[Problem]) -> list[tuple[Tensor, Tensor]]:
    """Prompts and windows of problems grouped by the prompt's length: pairs (rows, length) and (rows, 32)."""
    groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for problem in asked:
        prompt = prompt_ids(tokenizer, problem)
        groups.setdefault(len(prompt), []).append((prompt, window_ids(tokenizer, problem)))
    return [
        (torch.stack([prompt for prompt, _ in rows]), torch.stack([window for _, window in rows]))
        for _, rows in sorted(groups.items())
    ]
