"""Attaching to a model's own `generate`: the call stays as it is, the method decides which response it returns.

Each prompt of a batch is drawn for by itself, without its padding and with seeds of its own, so that a prompt gives
the same responses alone and in company. Samples of one prompt are one batch, and the prompt is encoded once for all.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.errors import InputError, SubjectError
from gratis.subjects.sampling_loop import Recorder, Samples, SamplingLoop
from gratis.subjects.text_limits import room_for

SAMPLING_ARGUMENTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Arguments of generate that say how a token is drawn."""


@dataclass(frozen=True)
class Choice:
    """What a method decided about the samples of one prompt."""

    ranking: Sequence[int]
    """All samples, the chosen one first."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain values for the report: scores, answers, votes."""


Choose = Callable[[Samples], Choice]


class Loop(Protocol):
    """What decodes one prompt inside the model's own generate."""

    @property
    def run(self) -> Callable[..., Samples]:
        """The responses, from what transformers hands to a decoding loop; the streamer has had the prompt already."""
        ...


def check_generates(subject: Any, method: str) -> Any:
    """`subject`, if it is a transformers model in evaluation mode that generates text. Raises SubjectError."""
    from transformers import PreTrainedModel

    if not isinstance(subject, PreTrainedModel) or not subject.can_generate():
        raise SubjectError(f"{method} acts on a transformers model that generates, not on a {type(subject).__name__}.")
    if subject.training:
        raise SubjectError(f"{method} acts on a model in evaluation mode: call model.eval() first.")
    return subject


def install_choice(
    model: Any,
    method: str,
    scope: Scope,
    *,
    samples: int,
    sampling: Mapping[str, Any],
    choose: Choose,
    recorder: Callable[[], Recorder] | None = None,
    loop: Callable[[list[int], bool], Loop] | None = None,
) -> Callable[[], dict[str, Any]]:
    """Make `model.generate` draw `samples` responses per prompt and return the one that `choose` ranks first.

    `sampling` says how tokens are drawn (temperature, top_p, top_k) where the call itself does not; `recorder` makes
    what measures the raw logits of every step. With num_return_sequences=k the call returns the k that rank first.
    `loop(seeds, greedy)` makes what decodes a prompt in the place of plain sampling; `greedy` is whether the call asked
    for no sampling.
    Returns a function that reports: totals over all calls, and what was seen and decided in the last one. Where the last
    call was interrupted, `interrupted` holds the tokens that were committed by then, the prompt's before them.
    """
    inner = model.generate
    signature = inspect.signature(inner)
    totals: Counter[str] = Counter(
        calls=0, prompts=0, samples=0, generated_tokens=0, forward_passes=0, prompt_tokens_encoded=0, truncated=0
    )
    last: dict[str, Any] = {}

    @functools.wraps(inner)
    def generate(*args: Any, **kwargs: Any) -> Any:
        call = _flat(signature, args, kwargs)
        keep = _returned(model, call, method, samples)
        greedy, streamer = _asked(call) is False, call.pop("streamer", None)
        call = {**call, **_drawing(call, sampling), "num_return_sequences": 1}
        _take_stop_strings(call)
        drawn: list[Samples] = []
        choices: list[Choice] = []
        prompts = split_prompts(model, call, method)
        _check_lengths(model, prompts)
        if streamer is not None and len(prompts) > 1:
            raise InputError(f"{method} decodes one prompt after another: pass one prompt, or leave out the streamer.")
        for row, seeds in zip(prompts, prompt_seeds(prompts, samples), strict=True):
            if loop is not None:
                decoding = loop(seeds, greedy)
            else:
                decoding = SamplingLoop(seeds, recorder() if recorder is not None else None)

            def decode(model: Any, input_ids: Any, *, decoding: Loop = decoding, **prepared: Any) -> Samples:
                # A loop of one's own is not given the streamer that generate was called with.
                if streamer is not None:
                    streamer.put(input_ids.cpu())
                return decoding.run(model, input_ids, streamer=streamer, **prepared)

            try:
                drawn.append(inner(**row, custom_generate=decode))
            except BaseException:
                last.clear()
                if (committed := getattr(decoding, "committed", None)) is not None:
                    last["interrupted"] = committed[0].tolist()
                raise
            choices.append(choose(drawn[-1]))
        _count(totals, drawn)
        last.clear()
        last.update(_details(drawn, choices))
        return _assemble(model, call, drawn, [choice.ranking[:keep] for choice in choices])

    scope.set_attribute(model, "generate", generate)
    return lambda: {**totals, **last}


def put(streamer: Any, tokens: Tensor, note: str = "") -> None:
    """Hand tokens (count,) to a streamer; one that has a method `note` is told first what is special about them."""
    if note and hasattr(streamer, "note"):
        streamer.note(note)
    streamer.put(tokens)


def _flat(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, those that are None left out."""
    bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return {name: value for name, value in bound.items() if value is not None}


def setting(model: Any, call: Mapping[str, Any], name: str) -> Any:
    """A generation setting as the call will have it: from its arguments, its generation_config, or the model's."""
    for source in (call.get("generation_config"), model.generation_config):
        if name in call:
            return call[name]
        if (value := getattr(source, name, None)) is not None:
            return value
    return call.get(name)


def _returned(model: Any, call: Mapping[str, Any], method: str, samples: int) -> int:
    """How many sequences per prompt the call wants; refuses what has no meaning when a method chooses."""
    if "streamer" in call and samples > 1:
        raise InputError(f"{method} knows its response only when all {samples} are complete: leave out the streamer.")
    if (setting(model, call, "num_beams") or 1) > 1:
        raise InputError(f"{method} draws samples and cannot search with beams: leave out num_beams.")
    for name, what in (
        ("assistant_model", "assisted decoding"),
        ("prompt_lookup_num_tokens", "prompt lookup"),
        ("custom_generate", "another custom_generate"),
    ):
        if setting(model, call, name) is not None:
            raise InputError(f"{method} chooses tokens itself and cannot be combined with {what}: leave out {name}.")
    if "past_key_values" in call:
        raise InputError(
            f"{method} starts from the whole prompt and encodes it once for all samples: leave out past_key_values."
        )
    keep = int(setting(model, call, "num_return_sequences") or 1)
    if keep > samples:
        raise InputError(f"{method} draws {samples} samples and cannot return {keep}: lower num_return_sequences.")
    return keep


def _asked(call: Mapping[str, Any]) -> Any:
    """Whether the call says to sample or not to; None where it says neither."""
    return call.get("do_sample", getattr(call.get("generation_config"), "do_sample", None))


def _drawing(call: Mapping[str, Any], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that make the call sample: its own where it says how to, else the method's."""
    given, asked = call.get("generation_config"), _asked(call)
    named = {name for name in SAMPLING_ARGUMENTS if name in call}
    if asked is False:
        return {**dict.fromkeys(named), **sampling, "do_sample": True}
    own = named | {name for name in SAMPLING_ARGUMENTS if asked and getattr(given, name, None) is not None}
    return {**{name: value for name, value in sampling.items() if name not in own}, "do_sample": True}


def _take_stop_strings(call: dict[str, Any]) -> None:
    """Turn stop strings into a stopping criterion: generate drops the tokenizer that they need in a custom loop."""
    from transformers import GenerationConfig
    from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

    given = call.get("generation_config")
    strings = call.pop("stop_strings", None)
    if strings is None and isinstance(given, GenerationConfig):
        strings = given.stop_strings
    tokenizer = call.pop("tokenizer", None)
    if strings is None:
        return
    if tokenizer is None:
        raise InputError("Stop strings need the tokenizer: pass tokenizer= to generate as well.")
    if isinstance(given, GenerationConfig) and given.stop_strings is not None:
        call["generation_config"] = given = GenerationConfig.from_dict({**given.to_dict(), "stop_strings": None})
    call["stopping_criteria"] = StoppingCriteriaList(
        [*call.get("stopping_criteria", ()), StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)]
    )


_PROMPT = ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")
_ALONG = ("attention_mask", "position_ids", "token_type_ids", "inputs", "input_ids")


def split_prompts(model: Any, call: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    """The call's arguments for each prompt of its batch, left padding taken off. Raises InputError."""
    prompt = next((call[name] for name in _PROMPT if isinstance(call.get(name), Tensor)), None)
    batch = 1 if prompt is None else prompt.shape[0]
    if prompt is not None and prompt.dim() == 2 and prompt.shape[1] == 0:
        raise InputError(f"{method} needs a prompt, and this one is empty: pass at least one token.")
    rows: list[dict[str, Any]] = []
    for row in range(batch):
        arguments = dict(call)
        for name, value in call.items():
            if batch == 1 or not (isinstance(value, Tensor) or hasattr(value, "last_hidden_state")):
                continue
            if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch:
                raise InputError(f"{method} cannot tell which prompt {name} belongs to: pass one prompt at a time.")
            arguments[name] = value[row : row + 1]
        rows.append(arguments if model.config.is_encoder_decoder else _unpadded(model, arguments))
    return rows


def _unpadded(model: Any, row: dict[str, Any]) -> dict[str, Any]:
    mask, tokens = row.get("attention_mask"), row.get("input_ids", row.get("inputs"))
    if not isinstance(mask, Tensor) or not isinstance(tokens, Tensor) or mask.shape != tokens.shape:
        return row
    padding = int(mask[0].long().argmax())
    if padding == 0:
        return row
    row = {**row, **{name: row[name][..., padding:] for name in _ALONG if isinstance(row.get(name), Tensor)}}
    for name, other in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = setting(model, row, name)
        # Lengths count padding in generate: the row keeps the room that it had.
        if limit and setting(model, row, other) is None:
            row[name] = limit - padding
    return row


def _check_lengths(model: Any, prompts: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError for a prompt that leaves no room in the window of the model as it is."""
    for prompt in prompts:
        tokens = prompt.get("input_ids", prompt.get("inputs"))
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and not model.config.is_encoder_decoder:
            room_for(model, tokens.shape[1])


def prompt_seeds(prompts: Sequence[Mapping[str, Any]], samples: int) -> list[list[int]]:
    """A seed per prompt and sample: from torch's generator, the prompt, and how often the batch held it before."""
    base = int(torch.randint(2**62, ()))
    seen: Counter[bytes] = Counter()
    seeds = []
    for prompt in prompts:
        digest = hashlib.sha256()
        for name in _PROMPT:
            if isinstance(value := prompt.get(name), Tensor):
                digest.update(repr(value.tolist()).encode())
        key = digest.digest()
        own = hashlib.sha256(key + f"{base} {seen[key]}".encode()).digest()
        seen[key] += 1
        seeds.append([(int.from_bytes(own[:8]) + sample) % 2**63 for sample in range(samples)])
    return seeds


def _count(totals: Counter[str], drawn: Sequence[Samples]) -> None:
    totals["calls"] += 1
    totals["prompts"] += len(drawn)
    for samples in drawn:
        totals["samples"] += len(samples.lengths)
        totals["generated_tokens"] += sum(samples.lengths) + samples.discarded
        totals["forward_passes"] += samples.passes
        totals["prompt_tokens_encoded"] += samples.encoded
        totals["truncated"] += sum(samples.truncated)


def _details(drawn: Sequence[Samples], choices: Sequence[Choice]) -> dict[str, Any]:
    """What happened in one call, one entry per prompt."""
    details: dict[str, Any] = {
        "chosen": [int(choice.ranking[0]) for choice in choices],
        "ranking": [[int(sample) for sample in choice.ranking] for choice in choices],
        "lengths": [samples.lengths for samples in drawn],
        "truncated_samples": [samples.truncated for samples in drawn],
    }
    for name in choices[0].details if choices else ():
        details[name] = [choice.details[name] for choice in choices]
    return details


def _assemble(model: Any, call: Mapping[str, Any], drawn: list[Samples], kept: list[Sequence[int]]) -> Any:
    """What generate returns for the kept samples of all prompts, in the type that the call asked for."""
    device = drawn[0].sequences.device
    prompt = call.get("input_ids", call.get("inputs"))
    own = not model.config.is_encoder_decoder and isinstance(prompt, Tensor)
    rows: list[Tensor] = []
    for index, (samples, chosen) in enumerate(zip(drawn, kept, strict=True)):
        for sample in chosen:
            start, end = samples.start, samples.start + samples.lengths[sample]
            prefix = prompt[index].to(device) if own and prompt is not None else samples.sequences[sample, :start]
            rows.append(torch.cat([prefix, samples.sequences[sample, start:end]]))
    longest = max(len(row) for row in rows)
    pad = next((samples.pad for samples in drawn if samples.pad is not None), 0)
    sequences = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=pad) for row in rows])
    if isinstance(drawn[0].output, Tensor):
        return sequences
    steps = max(samples.lengths[sample] for samples, chosen in zip(drawn, kept, strict=True) for sample in chosen)
    output = drawn[0].output
    fields: dict[str, Any] = {"sequences": sequences}
    for name, value in output.items():
        if name in {"scores", "logits"}:
            fields[name] = _steps([s.output[name] for s in drawn], kept, steps)
        elif name == "past_key_values":
            fields[name] = _kept_cache(value, drawn, kept) if len(drawn) == 1 else None
        elif name.startswith("encoder_"):
            fields[name] = value if len(drawn) == 1 else None
        elif name != "sequences":
            fields[name] = _rows(value[:steps], torch.as_tensor(kept[0])) if len(drawn) == 1 else None
    return type(output)(**fields)


def _steps(values: list[Any], kept: list[Sequence[int]], steps: int) -> tuple[Tensor, ...]:
    """Per step, (kept sequences, vocabulary); zeros after the end of a prompt's longest sample."""
    return tuple(
        torch.cat(
            [
                own[step][list(chosen)] if step < len(own) else torch.zeros_like(own[0][list(chosen)])
                for own, chosen in zip(values, kept, strict=True)
            ]
        )
        for step in range(steps)
    )


def _rows(value: Any, chosen: Tensor) -> Any:
    """The chosen rows of tensors in nested tuples."""
    if isinstance(value, Tensor):
        return value[chosen.to(value.device)]
    return tuple(_rows(item, chosen) for item in value) if isinstance(value, tuple) else value


def _kept_cache(cache: Any, drawn: list[Samples], kept: list[Sequence[int]]) -> Any:
    """The cache of the one sequence that is returned, as long as that sequence; None where it cannot be cut so."""
    samples, chosen = drawn[0], list(kept[0])
    surplus = samples.sequences.shape[1] - samples.start - max(samples.lengths[sample] for sample in chosen)
    croppable = bool(getattr(cache, "is_croppable", False))
    if not hasattr(cache, "batch_select_indices") or (surplus and not croppable):
        return None
    cache.batch_select_indices(torch.tensor(chosen, device=samples.sequences.device))
    if surplus:
        cache.crop(-surplus)
    return cache


def install_greedy(model: Any, method: str, scope: Scope) -> Callable[[], dict[str, Any]]:
    """Make `model.generate` take the likeliest token at every step. Returns a function that reports the calls."""
    inner = model.generate
    signature = inspect.signature(inner)
    totals = Counter(calls=0)

    @functools.wraps(inner)
    def generate(*args: Any, **kwargs: Any) -> Any:
        call = _flat(signature, args, kwargs)
        _returned(model, call, method, 1)
        _check_lengths(model, [call])
        call = {name: value for name, value in call.items() if name not in SAMPLING_ARGUMENTS}
        totals["calls"] += 1
        return inner(**{**call, "do_sample": False})

    scope.set_attribute(model, "generate", generate)
    return lambda: dict(totals)
