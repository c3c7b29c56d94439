"""Attaching to how a model's own `generate` reads a long text: in pieces, watched, and refused where it cannot fit.

What contradicts a memory is refused before anything is read; rows that were padded to unequal lengths are read in
groups of one length once the text outgrows what a memory holds whole.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.errors import InputError, MemoryShortError
from gratis.subjects.generate_door import setting, split_prompts
from gratis.subjects.language import input_device, window_of
from gratis.subjects.memory_need import LONGEST, FootprintOf, check_fits, is_out_of_memory, longest
from gratis.subjects.progress_bar import PatientBar

PIECE = 512
"""Tokens read at a time of a prompt that is longer than the trained window, where a method says nothing."""
NO_GRADIENTS = "{method} keeps what was read without gradients: call the model under torch.no_grad()."


class Pass(Protocol):
    """What a method's hooks know of the generate call around them."""

    prompt_end: int | None


@dataclass(frozen=True)
class Reading:
    """How a method reads what `generate` is given."""

    method: str
    holds: int
    """Length up to which a text is kept whole: then rows may be padded and beams may be searched."""
    chunk: int | None
    """Tokens read at a time; None: all at once, as far as the trained window reaches."""
    beams: bool
    """Whether beams can be followed once the text is longer than `holds`."""
    footprint: FootprintOf
    advice: str
    """What to do where a text does not fit."""
    announce: Callable[[int, int], None] = lambda rows, tokens: None
    """Told how many rows of how many tokens are about to be read; may refuse them."""
    spare: int | None = None
    """Most tokens read at a time with what is held already inside the trained window; None where any number is."""


def install_reading(model: Any, reading: Reading, here: Any, scope: Scope) -> None:
    """Read prompts of `model.generate` as `reading` says. `here.prompt_end` is the prompt's length meanwhile.

    Calls raise InputError for settings that contradict the method, MemoryShortError for a text that does not fit.
    """
    inner = model.generate
    signature = inspect.signature(inner)
    method = reading.method

    @functools.wraps(inner)
    def generate(*args: Any, **kwargs: Any) -> Any:
        call = dict(signature.bind_partial(*args, **kwargs).arguments)
        call.update(call.pop("kwargs", {}))
        call = {name: value for name, value in call.items() if value is not None}
        prompt = next((call[n] for n in ("input_ids", "inputs", "inputs_embeds") if n in call), None)
        if not isinstance(prompt, Tensor) or prompt.dim() < 2:
            return inner(**call)
        rows, length = int(prompt.shape[0]), int(prompt.shape[1])
        total = length + _new_tokens(model, call, length)
        held = _check_settings(model, call, reading, length, total)
        several = max(int(setting(model, call, n) or 1) for n in ("num_beams", "num_return_sequences"))
        check_fits(
            method, input_device(model), reading.footprint(rows * several, total),
            lambda tokens: reading.footprint(rows * several, tokens), reading.advice,
        )  # fmt: skip
        reading.announce(rows, total)
        mask = call.get("attention_mask")
        if rows > 1 and total > reading.holds and isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
            return _read_in_groups(model, inner_once, call, prompt, method)
        return inner_once(**call, held=held)

    def inner_once(*, held: int = 0, **call: Any) -> Any:
        prompt = next(call[n] for n in ("input_ids", "inputs", "inputs_embeds") if n in call)
        length = int(prompt.shape[1])
        chunk = call.get("prefill_chunk_size") or _chunk(reading, window_of(model), held, length)
        if chunk is not None and chunk < length:
            call["prefill_chunk_size"] = chunk
        before, here.prompt_end = getattr(here, "prompt_end", None), length
        counted = [held]

        def count(module: Any, arguments: Any, named: Any, output: Any) -> None:
            given = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
            fed = int(given.shape[1]) if given is not None else 0
            counted[0] += fed
            bar.advance(fed)

        with PatientBar(length - held, f"{method} reads") as bar:
            handle = model.register_forward_hook(count, with_kwargs=True) if chunk is not None else None
            try:
                return inner(**call)
            except Exception as error:
                if not is_out_of_memory(error) or isinstance(error, MemoryShortError):
                    raise
                raise _short(model, reading, prompt, counted[0], chunk) from error
            finally:
                here.prompt_end = before
                if handle is not None:
                    handle.remove()

    scope.set_attribute(model, "generate", generate)


def _chunk(reading: Reading, window: int | None, held: int, length: int) -> int | None:
    """Tokens to read at a time."""
    chunk = reading.chunk
    if chunk is None and reading.spare is not None and window is not None and held + length > window:
        chunk = PIECE
    if chunk is None:
        return None
    return chunk if reading.spare is None else max(1, min(chunk, reading.spare))


def _new_tokens(model: Any, call: dict[str, Any], length: int) -> int:
    if (new := setting(model, call, "max_new_tokens")) is not None:
        return int(new)
    limit = setting(model, call, "max_length")
    return max(int(limit) - length, 0) if limit else 20


def _check_settings(model: Any, call: dict[str, Any], reading: Reading, length: int, total: int) -> int:
    """Refuse what contradicts the method; tokens of the prompt that a cache passed back has read already."""
    method = reading.method
    if setting(model, call, "use_cache") is False:
        raise InputError(f"{method} keeps what was read in the cache: leave out use_cache=False.")
    for name, what in (("assistant_model", "an assistant"), ("prompt_lookup_num_tokens", "prompt lookup")):
        if setting(model, call, name) is not None:
            raise InputError(f"{method} cannot take tokens back, which {what} needs: leave out {name}.")
    if not reading.beams and (setting(model, call, "num_beams") or 1) > 1 and total > reading.holds:
        raise InputError(
            f"{method} keeps one memory per text and cannot follow beams past {reading.holds} tokens: generate with "
            "num_beams=1."
        )
    cache = call.get("past_key_values")
    if getattr(cache, "method", None) is None:
        return 0
    assert cache is not None
    held, mask = int(cache.get_seq_length()), call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != length:
        return 0
    if held >= length:
        raise InputError(
            f"This cache has read {held} tokens and the prompt has {length}: pass the whole text, with at least one "
            "token more than was read."
        )
    return held


def _short(model: Any, reading: Reading, prompt: Tensor, read: int, chunk: int | None) -> MemoryShortError:
    rows, length = int(prompt.shape[0]), int(prompt.shape[1])
    tokens = longest(input_device(model), lambda count: reading.footprint(rows, count))
    fitting = "any length" if tokens >= LONGEST else f"a text of about {min(tokens, max(read, 1)):,} tokens"
    pieces = f"{chunk:,} at a time" if chunk is not None and chunk < length else "in one piece"
    return MemoryShortError(
        f"{reading.method} ran out of memory after {read:,} tokens of a text of {length:,} (read {pieces}): {fitting} "
        f"would fit with smaller pieces (prefill_chunk_size={max(1, min(chunk or length, length) // 4)}); "
        f"{reading.advice}."
    )


def _read_in_groups(model: Any, generate: Callable[..., Any], call: dict[str, Any], prompt: Tensor, method: str) -> Any:
    """Rows of one length at a time, without their padding; put together as if they had been read at once."""
    if "past_key_values" in call or setting(model, call, "return_dict_in_generate") or "streamer" in call:
        raise InputError(
            f"{method} reads rows of unequal lengths one length after another and returns their tokens: pass prompts "
            "of one length, or one at a time, to get or to give more."
        )
    rows = split_prompts(model, call, method)
    lengths = [int(next(row[n] for n in ("input_ids", "inputs", "inputs_embeds") if n in row).shape[1]) for row in rows]
    keep = int(setting(model, call, "num_return_sequences") or 1)
    done: list[Tensor] = [prompt] * (len(rows) * keep)
    for length in sorted(set(lengths)):
        members = [place for place, own in enumerate(lengths) if own == length]
        group = dict(rows[members[0]])
        for name, value in group.items():
            if isinstance(value, Tensor) and value.dim() and len(value) == 1 and isinstance(call[name], Tensor):
                group[name] = torch.cat([rows[place][name] for place in members])
        out = generate(**group)
        embedded = "inputs_embeds" in group
        for number, place in enumerate(members):
            for copy in range(keep):
                new = out[number * keep + copy, 0 if embedded else length :]
                done[place * keep + copy] = new if embedded else torch.cat([prompt[place].to(new.device), new])
    widest = max(len(row) for row in done)
    pad = setting(model, call, "pad_token_id")
    pad = setting(model, call, "eos_token_id") if pad is None else pad
    pad = int(pad[0] if isinstance(pad, list) else pad or 0)
    return torch.stack([torch.nn.functional.pad(row, (0, widest - len(row)), value=pad) for row in done])
