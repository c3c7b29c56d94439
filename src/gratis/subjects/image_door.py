"""The door of models that draw pictures in a loop of their own inside generate (`generation_mode="image"`).

Janus embeds and scores image tokens with layers of their own, and guides them by a second row whose prompt is blank; its
loop takes no `custom_generate`. What decodes tokens by drafts gets the same prepared inputs here.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicCache

from gratis.contract.attach import Scope
from gratis.contract.errors import InputError
from gratis.subjects.draft_reading import Reader
from gratis.subjects.generate_door import prompt_seeds, split_prompts


class ImageLoop(Protocol):
    """What decodes the tokens of one picture."""

    def picture(self, reader: Reader, ids: Tensor, processors: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
        """The picture's tokens (1, tokens), and plain values for the report. ids: (1, length) the prompt."""
        ...


def install_image_generation(
    model: Any,
    method: str,
    scope: Scope,
    sampling: Mapping[str, Any],
    loop: Callable[[int, bool], ImageLoop],
    report: Callable[[], dict[str, Any]],
) -> Callable[[], dict[str, Any]]:
    """Make `model.generate(generation_mode="image")` draw pictures by `loop(seed, greedy)`, where the model has that mode.

    Prompts are decoded one after another, without their padding. Returns `report`, with the last call's pictures added.
    """
    if not hasattr(model, "prepare_embeddings_for_image_generation"):
        return report
    inner = model.generate
    last: dict[str, Any] = {}

    @functools.wraps(inner)
    @torch.no_grad()
    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generation_mode") != "image":
            return inner(inputs, *args, **kwargs)
        if args:
            raise InputError(f"{method}: pass all arguments of generate but the first by name.")
        call = {name: value for name, value in kwargs.items() if name != "generation_mode" and value is not None}
        if inputs is not None:
            call["input_ids"] = inputs
        greedy = call.get("do_sample") is False
        if "do_sample" not in call:
            call = {**sampling, **call, "do_sample": True}
        rows = split_prompts(model, call, method)
        copies = int(call.get("num_return_sequences") or 1)
        drawn, details = [], []
        for row, seeds in zip(rows, prompt_seeds(rows, copies), strict=True):
            for seed in seeds:
                tokens, detail = _picture(model, row, method, loop(seed, greedy))
                drawn.append(tokens)
                details.append(detail)
        last.clear()
        last.update(_together(details))
        sequences = torch.cat(drawn)
        if not (
            call.get("return_dict_in_generate") or getattr(call.get("generation_config"), "return_dict_in_generate", 0)
        ):
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences.long())  # type: ignore[arg-type]

    scope.set_attribute(model, "generate", generate)
    return lambda: {**report(), **({"pictures": dict(last)} if last else {})}


def _picture(model: Any, row: dict[str, Any], method: str, loop: ImageLoop) -> tuple[Tensor, dict[str, Any]]:
    row = dict(row)
    ids, mask = row.pop("input_ids"), row.pop("attention_mask", None)
    own, stopping = row.pop("logits_processor", None), row.pop("stopping_criteria", None)
    if stopping:
        raise InputError(f"{method}: a picture has a fixed number of tokens: leave out stopping_criteria.")
    if row.pop("past_key_values", None) is not None:
        raise InputError(f"{method} reads the prompt itself: leave out past_key_values.")
    config, _ = model._prepare_generation_config(row.pop("generation_config", None), **row)
    scale = 5.0 if config.guidance_scale is None else float(config.guidance_scale)  # the model's own default
    config.guidance_scale = None
    model._prepare_special_tokens(config, mask is not None, device=ids.device)
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=ids.shape[1],
        encoder_input_ids=ids,
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(own or []),
        device=ids.device,
    )
    reader = ImageReader(model, ids, config, scale)
    return loop.picture(reader, ids, processors, model.model.vision_model.config.num_image_tokens)


class ImageReader:
    """Reads drafts of image tokens through the layers that such a model has for them.

    With guidance above 1 a second row, in which all of the prompt but its marks is padding, is the unconditional side:
    u + scale (c - u).
    """

    def __init__(self, model: Any, ids: Tensor, config: Any, scale: float) -> None:
        self.passes = 0
        self.read_tokens = 0
        self._model, self._scale = model, scale
        blank = ids.masked_fill(
            (ids != config.bos_token_id) & (ids != config.generation_kwargs["boi_token_id"]), config.pad_token_id
        )
        self._prompt = torch.cat([ids, blank]) if scale > 1 else ids
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))

    def prefill(self, guided: int) -> Tensor:
        return self._read(self._model.get_input_embeddings()(self._prompt), 1, guided)

    def read(self, ids: Tensor, count: int, guided: int) -> Tensor:
        tokens = ids[:, -count:].expand(len(self._prompt), -1)
        return self._read(self._model.prepare_embeddings_for_image_generation(tokens), count, guided)

    def drop(self, count: int) -> None:
        if count:
            self._cache.crop(-count)

    def _read(self, embeddings: Tensor, count: int, guided: int) -> Tensor:
        outputs = self._model.model.language_model(
            inputs_embeds=embeddings, past_key_values=self._cache, use_cache=True
        )
        self.passes += 1
        self.read_tokens += embeddings.shape[0] * embeddings.shape[1]
        logits = self._model.model.generation_head(outputs.last_hidden_state[:, -count:]).float()
        given: Tensor = logits[0]
        if len(logits) == 2:
            given = given.clone()
            given[:guided] = logits[1, :guided] + self._scale * (given[:guided] - logits[1, :guided])
        return given


def _together(details: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers summed over pictures."""
    total: Counter[str] = Counter(pictures=len(details))
    for detail in details:
        total.update({name: value for name, value in detail.items() if isinstance(value, (int, float))})
    return dict(total)
