"""The answers of a language model to prompts that end where one begins: which is likeliest, and how sure it is."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import InputError, SubjectError
from gratis.subjects.language import input_device
from gratis.subjects.token_statistics import entropy

Answers = Sequence[int | Sequence[int]]
"""Per class, the token that names it, or several that all do."""
Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor
SHARED = 8
"""Tokens that all prompts must begin with before they are read once for all."""


@dataclass
class AnswerScores:
    """One value per prompt; empty where there was nothing to compute it from."""

    entropy: list[float]
    """Of the next token, over the whole vocabulary, in nats."""
    answer_entropy: list[float]
    """Over the answers only, renormalised, in nats."""
    accuracy: list[float]
    """1 where the right answer is the likeliest of the answers."""
    parsed_accuracy: list[float]
    """1 where what the model writes is the right answer."""
    valid: list[float]
    """1 where what the model writes is an answer at all."""

    def means(self) -> dict[str, float]:
        """The mean of each that was computed."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: statistics.fmean(each) for name, each in values.items() if each}


def token_rows(model: Any, prompts: Prompts) -> list[Tensor]:
    """Prompts as rows of token ids; texts are read by the model's tokenizer. Raises InputError for none, or empty ones."""
    from gratis.subjects import tokenizer_of

    rows = []
    for prompt in prompts:
        ids = tokenizer_of(model)(prompt).input_ids if isinstance(prompt, str) else prompt
        rows.append(torch.as_tensor(ids, dtype=torch.long).reshape(-1))
    if not rows or not all(len(row) for row in rows):
        raise InputError("There must be at least one prompt, and none may be empty.")
    return rows


def word_tokens(model: Any, words: Sequence[str]) -> list[list[int]]:
    """Per class the tokens that begin its word, written in any case and with or without a space before it.

    Tokens that begin several words tell nothing and are left out. Raises SubjectError where a word has no other.
    """
    from gratis.subjects import tokenizer_of

    tokenizer = tokenizer_of(model)
    found = [
        {
            tokenizer(space + written, add_special_tokens=False).input_ids[0]
            for space in ("", " ")
            for written in (word, word.capitalize())
        }
        for word in words
    ]
    shared = {token for at, tokens in enumerate(found) for token in tokens if any(token in o for o in found[:at])}
    if any(not tokens - shared for tokens in found):
        raise SubjectError(f"Some of the words {', '.join(words)} begin with the same token of this tokenizer.")
    return [sorted(tokens - shared) for tokens in found]


@torch.no_grad()
def answer_scores(
    model: Any,
    rows: Sequence[Tensor],
    *,
    answers: Answers | None = None,
    labels: Sequence[int] | None = None,
    parse: Callable[[str], int | None] | None = None,
    new_tokens: int = 8,
    batch: int = 16,
) -> AnswerScores:
    """Score what the model answers to each prompt.

    `answers` name the classes by their tokens and `labels` give each prompt's class. What the model writes is its likeliest
    token; with `parse`, `new_tokens` of greedy text from which `parse` reads a class, or None for none.
    """
    found = AnswerScores([], [], [], [], [])
    classes = None if answers is None else [[one] if isinstance(one, int) else list(one) for one in answers]
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    for group, logits in _last_logits(model, rows, order, batch):
        wanted = None if labels is None else torch.tensor([labels[n] for n in group], device=logits.device)
        found.entropy += entropy(logits).tolist()
        if classes is not None:
            named = torch.stack([logits[:, tokens].logsumexp(-1) for tokens in classes], 1)
            found.answer_entropy += entropy(named).tolist()
            written = logits.argmax(-1, keepdim=True)
            says = torch.stack([(written == written.new_tensor(tokens)).any(-1) for tokens in classes], 1)
            if wanted is not None:
                found.accuracy += (named.argmax(1) == wanted).double().tolist()
            if parse is None:
                found.valid += says.any(1).double().tolist()
                if wanted is not None:
                    found.parsed_accuracy += says.gather(1, wanted[:, None])[:, 0].double().tolist()
        if parse is not None:
            read = [parse(text) for text in _written(model, [rows[n] for n in group], new_tokens)]
            found.valid += [float(one is not None) for one in read]
            if labels is not None:
                found.parsed_accuracy += [float(one == labels[n]) for one, n in zip(read, group, strict=True)]
    for one in fields(found):
        values = getattr(found, one.name)
        setattr(found, one.name, [value for _, value in sorted(zip(order, values, strict=False))])
    return found


def _last_logits(
    model: Any, rows: Sequence[Tensor], order: Sequence[int], batch: int
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Which prompts, and their last logits (prompts, vocabulary) in float32; what all begin with is read once."""
    prefix, past = _shared_prefix(model, rows)
    for begin in range(0, len(rows), batch):
        group = order[begin : begin + batch]
        ids, mask = _padded([rows[n][prefix:] for n in group], input_device(model))
        cache = copy.deepcopy(past)
        if cache is not None:
            cache.batch_repeat_interleave(len(group))
            mask = torch.nn.functional.pad(mask, (prefix, 0), value=1)
        places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=cache is not None,
            logits_to_keep=1,
        )  # fmt: skip
        yield group, out.logits[:, -1].float()


def _shared_prefix(model: Any, rows: Sequence[Tensor]) -> tuple[int, Any]:
    """Length of what all rows begin with, and its cache; 0 and None where it is short, or the cache is no plain one."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    length = min(map(len, rows)) - 1
    heads = torch.stack([row[:length] for row in rows])
    same = (heads == heads[0]).all(0).long().cumprod(0)
    length = int(same.sum())
    if len(rows) < 2 or length < SHARED:
        return 0, None
    past = model(input_ids=rows[0][None, :length].to(input_device(model)), use_cache=True).past_key_values
    if type(past) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in past.layers):
        return 0, None
    return length, past


def _padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the left to one length, and their mask: (rows, length) each."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return ids.to(device), mask.to(device)


def _written(model: Any, rows: Sequence[Tensor], new_tokens: int) -> list[str]:
    from gratis.subjects import tokenizer_of

    tokenizer = tokenizer_of(model)
    ids, mask = _padded(rows, input_device(model))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=padding
    )
    texts: list[str] = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts
