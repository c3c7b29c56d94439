"""What a language model with a chat template answers to many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gratis.contract.errors import SubjectError


@dataclass(frozen=True)
class Answers:
    """Greedy answers to prompts, in their order."""

    texts: list[str]
    ended: list[bool]
    """Whether the model ended the answer itself, before the limit."""
    tokens: int
    """Tokens read and generated, padding left out."""


def chat(tokenizer: Any, prompt: str) -> str:
    """A prompt in the chat template, up to where the answer begins. Raises SubjectError without a template."""
    if not tokenizer.chat_template:
        raise SubjectError("The tokenizer has no chat template: use that of the instruct model.")
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], longest: int, batch: int = 40) -> Answers:
    """What `model` answers greedily to each prompt, in at most `longest` tokens, ended by the tokenizer's end token."""
    import torch

    texts: list[str] = []
    ended: list[bool] = []
    tokens = 0
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for at in range(0, len(prompts), batch):
        rows = [tokenizer(chat(tokenizer, p), add_special_tokens=False)["input_ids"] for p in prompts[at : at + batch]]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.arange(width) >= torch.tensor([width - len(row) for row in rows])[:, None]
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device), max_new_tokens=longest,
                do_sample=False, pad_token_id=pad, eos_token_id=end,
            )[:, width:]  # fmt: skip
        tokens += int(mask.sum()) + out.numel()
        ended += (out == end).any(1).tolist()
        texts += tokenizer.batch_decode(out, skip_special_tokens=True)
    return Answers(texts, ended, tokens)
