"""The first token of a text in attention: where it is in a batch, and how much attention it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.errors import InputError, SubjectError
from gratis.contract.method import Attachable
from gratis.subjects.attention_door import check_attention, implementation_below, install_attention
from gratis.subjects.language import input_device, text_config

ROWS = 256
"""Queries whose attention is computed at a time."""


class FirstToken:
    """The column of the first real token in each row of a mask, found once per mask: all layers share one."""

    def __init__(self) -> None:
        self._mask: Any = None
        self._columns: Tensor | None = None

    def columns(self, mask: Any, batch: int) -> Tensor | None:
        """(batch,) columns, None where it is column 0 in all rows.

        mask: (batch or 1, 1, length, all) of booleans or floats, (batch, all) of ones and zeros, a block mask of flex
        attention, or None.
        """
        if mask is None:
            return None
        if mask is not self._mask:
            found = seen_by_last(mask, batch).long().argmax(-1).expand(batch)
            self._mask, self._columns = mask, found if bool(found.any()) else None
        return self._columns


def seen_by_last(mask: Any, batch: int) -> Tensor:
    """(batch or 1, all) which keys the last query attends to, in any mask that an attention function is given."""
    if isinstance(mask, Tensor):
        seen = mask[:, 0, -1] if mask.dim() == 4 else mask
        return seen if seen.dtype == torch.bool else (seen >= 0 if mask.dim() == 4 else seen > 0)
    queries, keys = mask.seq_lengths
    device = mask.kv_num_blocks.device
    rows = torch.arange(batch, device=device)[:, None].expand(batch, keys)
    places = torch.arange(keys, device=device)[None].expand(batch, keys)
    head, last = torch.zeros_like(rows), torch.full_like(rows, queries - 1)
    found: Tensor = mask.mask_mod(rows, head, last, places)
    return found


@torch.no_grad()
def attention_to_first_token(
    model: Any, prompts: Sequence[Sequence[int]] | Sequence[Tensor], method: Attachable | None = None, skip: int = 1
) -> Tensor:
    """(layers, heads) share of its attention that each query head pays to the first token, as measured.

    The mean over all tokens of the prompts (token ids) but the first `skip` of each, which see little else. With `method`
    the share is what is paid with it attached. Layers that are local or do not attend are NaN.

    Raises InputError where no prompt is longer than `skip`, SubjectError where something else is attached already.
    """
    rows = [torch.as_tensor(prompt, dtype=torch.long).reshape(-1) for prompt in prompts]
    if skip < 1 or not any(len(row) > skip for row in rows):
        raise InputError(f"Attention to the first token needs a prompt of more than {max(skip, 1)} tokens.")
    name = "Attention to the first token"
    if implementation_below(model) != (text_config(model)._attn_implementation or "eager"):
        raise SubjectError(f"{name} is measured below a method: detach what is attached, and pass it as `method`.")
    modules = check_attention(model, name)
    depth = max(int(getattr(text_config(model), "num_hidden_layers", 0)), len(modules))
    paid = torch.full((depth, max(one.heads for one in modules)), torch.nan, dtype=torch.float64)
    place = {id(one.module): layer_of(one.module, order) for order, one in enumerate(modules) if not one.local}
    for one in modules:
        if id(one.module) in place:
            paid[place[id(one.module)], : one.heads] = 0
    scope, reading = Scope(), False

    def attend(inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if reading and id(module) in place:
            shares = first_shares(query, key, mask, kwargs.get("scaling"), kwargs.get("softcap"))
            paid[place[id(module)], : query.shape[1]] += shares[:, :, skip:].double().sum((0, 2)).cpu()
        return inner(module, query, key, value, mask, **kwargs)

    try:
        install_attention(model, "first-token", attend, scope)
        if method is not None:
            method.check(model)
            method.install(model, scope)
        reading = True  # attaching reads a few tokens of its own
        for row in rows:
            model(input_ids=row[None].to(input_device(model)), use_cache=False)
    finally:
        scope.close()
    return paid / sum(max(len(row) - skip, 0) for row in rows)


def layer_of(module: Any, order: int) -> int:
    """Index of the layer that a module attends in: the model's own, or the order in which it is called."""
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else order


def first_shares(query: Tensor, key: Tensor, mask: Any, scaling: float | None, softcap: float | None = None) -> Tensor:
    """(batch, heads, length) probability of column 0 in every row of causal attention, in float32.

    query: (batch, heads, length, head_dim); key: (batch, key heads, length, head_dim); mask: floats that are added, booleans,
    or anything else for plain causal attention.
    """
    length, scaling = query.shape[2], scaling if scaling is not None else query.shape[-1] ** -0.5
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
    found = []
    for at in range(0, length, ROWS):
        scores = query[:, :, at : at + ROWS].float() @ keys * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if isinstance(mask, Tensor) and mask.dim() == 4:
            part = mask[:, :, at : at + ROWS, : keys.shape[3]]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
        else:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(at + 1)
            scores = scores.masked_fill(later, -torch.inf)
        found.append((scores[..., 0] - scores.logsumexp(-1)).exp())
    return torch.cat(found, 2)
