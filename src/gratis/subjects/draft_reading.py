"""Reading drafts: several tokens that may yet be dropped go through the model in one pass, and the cache is cut back.

Classifier-free guidance is applied on the way: the prompt and the unconditional prompt are two rows of one batch where
both are plain text, and two passes elsewhere.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.candidate_generator import (
    _prepare_attention_mask,
    _prepare_position_ids,
    _prepare_token_type_ids,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.utils import ALL_CACHE_NAMES

from gratis.contract.errors import InputError, SubjectError

_PLAIN = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache"}
"""Model inputs that a prompt may have, beside its tokens, and share a batch with the unconditional prompt."""


class Reader(Protocol):
    """What reads drafts for one text."""

    passes: int
    """Forward passes so far."""
    read_tokens: int
    """Tokens that went through the model, in all rows."""

    def prefill(self, guided: int) -> Tensor:
        """Read the prompt; returns the logits (1, vocabulary) of the token after it, in float32."""
        ...

    def read(self, ids: Tensor, count: int, guided: int) -> Tensor:
        """Read the last `count` tokens of `ids` (1, length); returns what follows each, (count, vocabulary), float32.

        Guidance acts on the first `guided` of them.
        """
        ...

    def drop(self, count: int) -> None:
        """Forget the last `count` tokens that were read."""
        ...


_TOLERANCE = 1e-3
"""Largest difference, relative to the largest logit, between reading on after drafts were dropped and reading afresh."""


@torch.no_grad()
def check_drops(model: Any, method: str) -> None:
    """Raise SubjectError where a model cannot read several tokens at once and forget some of them: tried on a few."""
    if model.config.is_encoder_decoder:
        return
    tokens = (torch.arange(36, device=model.device) * 7 % model.get_input_embeddings().num_embeddings)[None]
    try:
        read = model(input_ids=tokens[:, :24], use_cache=True)
        cache = next((held for name in ALL_CACHE_NAMES if (held := getattr(read, name, None)) is not None), None)
        if cache is None:
            if getattr(model, "_is_stateful", False):
                raise ValueError("it keeps its state in itself")
            return
        if not _can_drop(cache):
            raise ValueError(f"a {type(cache).__name__} of its layers cannot be cut back")
        cache.activate_past_recording()
        model(input_ids=torch.cat([tokens[:, 24:27], tokens[:, :5]], dim=1), past_key_values=cache, use_cache=True)
        cache.crop(-5)
        found = model(input_ids=tokens[:, 27:33], past_key_values=cache, use_cache=True).logits.float()
        afresh = model(input_ids=tokens[:, :33]).logits[:, 27:].float()
        rounding = _TOLERANCE if model.dtype == torch.float32 else 3e-2
        if not bool((found - afresh).abs().max() <= rounding * afresh.abs().max()):
            raise ValueError("what it reads after that differs")
    except (
        AssertionError,
        AttributeError,
        NotImplementedError,
        TypeError,
        ValueError,
        RuntimeError,
        IndexError,
    ) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SubjectError(
            f"{method} reads drafts and takes them back, which {type(model).__name__} does not allow: {first}."
        ) from error


def _can_drop(cache: Any) -> bool:
    return isinstance(cache, Cache) and not cache.is_compileable and bool(cache.is_croppable)


def take_guidance(processors: Any) -> tuple[Any, list[Any]]:
    """The guidance that generate prepared among `processors` (None without), and the others in order."""
    found = [one for one in processors if isinstance(one, UnbatchedClassifierFreeGuidanceLogitsProcessor)]
    return (found[0] if found else None), [one for one in processors if one not in found]


class DraftReader:
    """Reads drafts through a transformers model, from what transformers hands to a decoding loop.

    `guidance` is generate's own processor for guidance_scale and negative_prompt_ids; its arithmetic is kept, on log
    probabilities: u + scale (c - u).
    """

    def __init__(
        self, model: Any, ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], guidance: Any = None
    ) -> None:
        self.passes = 0
        self.read_tokens = 0
        self._model, self._config = model, generation_config
        self._scale = 1.0 if guidance is None else float(guidance.guidance_scale)
        kwargs = dict(model_kwargs)
        start = ids.shape[1]
        self._streams = [_Stream(model, ids, kwargs, start)]
        self._rows = 1
        if guidance is None:
            return
        other, mask = _unconditional(guidance, ids)
        if {name for name, value in kwargs.items() if value is not None} <= _PLAIN and kwargs.get("use_cache", True):
            self._streams = [_Stream(model, *_side_by_side(model, ids, other, mask, kwargs), start)]
            self._rows = 2
        else:
            own = {"attention_mask": mask, "use_cache": kwargs.get("use_cache", True)}
            if kwargs.get("past_key_values") is not None:
                own["past_key_values"] = DynamicCache(config=model.config.get_text_config(decoder=True))
            self._streams.append(_Stream(model, other, own, start))

    @property
    def cache(self) -> Any:
        """What the model remembers of the text; with guidance None, as it holds the unconditional side too."""
        return self._streams[0].cache if self._rows == 1 else None

    @torch.no_grad()
    def prefill(self, guided: int) -> Tensor:
        rows = [stream.prefill(self._config).float() for stream in self._streams]
        self._count(sum(stream.ids.numel() for stream in self._streams))
        return self._guided([row[:, None] for row in rows], guided)

    @torch.no_grad()
    def read(self, ids: Tensor, count: int, guided: int) -> Tensor:
        rows = [stream.read(ids, count).float() for stream in self._streams]
        self._count(count * len(self._streams) * self._rows)
        return self._guided(rows, guided)

    def drop(self, count: int) -> None:
        for stream in self._streams:
            stream.drop(count)

    def _count(self, tokens: int) -> None:
        self.passes += len(self._streams)
        self.read_tokens += tokens

    def _guided(self, rows: list[Tensor], guided: int) -> Tensor:
        """(count, vocabulary) from logits (1 or 2, count, vocabulary) of each stream."""
        every = torch.cat(rows)
        if len(every) == 1:
            alone: Tensor = every[0]
            return alone
        both = every.log_softmax(-1)
        given: Tensor = both[0].clone()
        other = both[1]
        given[:guided] = other[:guided] + self._scale * (given[:guided] - other[:guided])
        return given


class _Stream:
    """One batch of rows that read the same drafts; responses begin at place `start` of the text."""

    def __init__(self, model: Any, ids: Tensor, kwargs: dict[str, Any], start: int) -> None:
        self.ids, self._model, self._kwargs, self._start = ids, model, kwargs, start
        self._ahead = 0

    @property
    def cache(self) -> Any:
        return next((self._kwargs[name] for name in ALL_CACHE_NAMES if self._kwargs.get(name) is not None), None)

    def prefill(self, generation_config: Any) -> Tensor:
        model, embeddings = self._model, self._kwargs.get("inputs_embeds")
        outputs = model._prefill(self.ids, generation_config, self._kwargs)
        if embeddings is not None and not model.config.is_encoder_decoder:
            # A prompt of embeddings takes places in the mask that it does not take among the tokens.
            self._ahead = embeddings.shape[1] - self.ids.shape[1]
        self._kwargs = model._update_model_kwargs_for_generation(
            outputs, self._kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        cache = self.cache
        if cache is not None:
            if not _can_drop(cache):
                raise InputError(
                    f"Drafts are read and taken back, which a {type(cache).__name__} does not allow: leave out "
                    "cache_implementation and caches of your own, and detach methods that bound the cache."
                )
            cache.activate_past_recording()
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def read(self, ids: Tensor, count: int) -> Tensor:
        model, encoder_decoder = self._model, self._model.config.is_encoder_decoder
        whole = torch.cat([self.ids, ids[:, self._start :].expand(len(self.ids), -1)], dim=1)
        kwargs = copy.copy(self._kwargs)
        length = whole.shape[1] + self._ahead
        kwargs = _prepare_attention_mask(kwargs, length, encoder_decoder)
        kwargs = _prepare_token_type_ids(kwargs, length)
        kwargs = _prepare_position_ids(kwargs, length, encoder_decoder)
        inputs = model.prepare_inputs_for_generation(
            whole, next_sequence_length=count if self.cache is not None else None, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = count
        outputs = model(**inputs, return_dict=True)
        for name in ALL_CACHE_NAMES:
            if outputs.get(name) is not None:
                self._kwargs[name] = outputs[name]
        logits: Tensor = outputs.logits[:, -count:].to(ids.device)
        return logits

    def drop(self, count: int) -> None:
        if count and self.cache is not None:
            self.cache.crop(-count)


def _unconditional(guidance: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask of the unconditional prompt, (1, length) each; generate's own default is the last token."""
    context = guidance.unconditional_context
    other = context["input_ids"]
    other = ids[:, -1:] if other is None else other.to(ids.device)
    mask = context["attention_mask"]
    return other, torch.ones_like(other) if mask is None else mask.to(ids.device)


def _side_by_side(
    model: Any, ids: Tensor, other: Tensor, other_mask: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The prompt and the unconditional one as a batch of two, the shorter padded on the left."""
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    length = max(ids.shape[1], other.shape[1])

    def padded(row: Tensor) -> Tensor:
        return torch.nn.functional.pad(row, (length - row.shape[1], 0))

    masks = torch.cat([padded(mask.long()), padded(other_mask.long())])
    together = {**kwargs, "attention_mask": masks}
    together.pop("position_ids", None)
    if "position_ids" in inspect.signature(model.forward).parameters:
        together["position_ids"] = (masks.cumsum(-1) - 1).clamp_min(0)
    return torch.cat([padded(ids), padded(other)]), together
