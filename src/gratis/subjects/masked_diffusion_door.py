"""`generate` for masked-diffusion language models, and the places where methods attach to it.

The model may be any module that gives logits for a whole sequence, `model(input_ids=ids).logits`, with bidirectional
attention and a mask token: LLaDA, Dream, a BERT-like masked language model. Models whose output j speaks of place j + 1
(Dream) are recognised by their configuration's `model_type`, or say so by an attribute `shifts_logits`.

A base decoder (how places take their tokens) and a rule that ends decoding early are attached separately and go
together in any order.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.errors import InputError, SubjectError, suggestion
from gratis.subjects.masked_diffusion import Base, Blocks

WINDOW = 128
"""Places of the answer window where the call names no number."""


@dataclass(frozen=True)
class Step:
    """What is known at a step after the forward pass and before any place takes its token."""

    number: int
    """Counted from 1, over all blocks."""
    total: int
    """Steps of the whole schedule."""
    rows: Tensor
    """(rows,) which of the call's rows still decode."""
    logits: Tensor
    """(rows, window, vocabulary) float32, after guidance and before noise; the mask token is ruled out."""
    tokens: Tensor
    """(rows, window) the proposals of this step, and what is known where nothing is masked."""
    masked: Tensor
    """(rows, window) places that have no token yet."""
    offset: int = 0
    """Place of the answer window at which these tensors begin, where a decoder sees one block of it at a time."""


@dataclass(frozen=True)
class Ending:
    """A rule that ends decoding early, for one call."""

    commits: Callable[[Step], Tensor]
    """Which rows (rows,) take all their proposals now and stop."""
    constraints: Mapping[int, int] = field(default_factory=dict)
    """Tokens that the rule wants at places of the window."""


@dataclass
class Outcome:
    """What happened in one call, row by row."""

    window: int
    total_steps: int
    steps: Tensor
    """(rows,) steps until the row was complete, or stopped."""
    early: Tensor
    """(rows,) tokens that an early commit filled in."""
    forward_passes: int
    """Passes of the model over a batch; guidance takes two per step."""
    row_passes: int
    """The same, each row counted."""
    interrupted: bool = False


MakeEnding = Callable[[Any, int], Ending]
"""From the model (or pipeline) and the window's size. Raises InputError where the rule does not fit the window."""
Heard = Callable[[Outcome], None]


@dataclass(frozen=True)
class _Generate:
    """What stands as `model.generate` while a method is on."""

    model: Any
    base: Base = field(default_factory=Blocks)
    ending: MakeEnding | None = None
    window: int | None = None
    guidance: float = 0.0
    heard: tuple[Heard, ...] = ()

    def __call__(self, inputs: Tensor | None = None, **call: Any) -> Any:
        return _generate(self, inputs, call)


def generate(model: Any, inputs: Tensor | None = None, **call: Any) -> Any:
    """Fill a window of masks after each prompt: the model's attached `generate`, or the base decoder without a method.

    Arguments, as `model.generate` takes them while a method is attached:
        inputs (or input_ids): (batch, length) token ids; attention_mask marks padding on the left.
        max_new_tokens: places of the window (max_length counts the prompt too).
        steps, block_length, remasking, temperature …: settings of the base decoder (`masked_diffusion.Blocks`).
        cfg_scale: strength of unsupervised guidance: logits u + (cfg_scale + 1)(l − u), u without the prompt.
        constraints: {place in the window: token id}, tokens that are fixed from the start.
        mask_token_id: where the model's configuration or tokenizer does not say it.
        streamer: gets the prompt, then tokens as soon as everything before them is known; one prompt only.
        stop_strings with tokenizer: a row stops once its known beginning contains one; the rest is padding.
        stopping_criteria: called with (batch, length + window) tokens after each step; rows stop as they are.
        return_dict_in_generate: an output object with `sequences` in the place of the tensor.

    Returns (batch, length + window) token ids. Interrupted (Ctrl-C) it returns what was committed until then; places
    without a token hold the mask token.

    Raises InputError where the call cannot be served, or logits are not a number.
    """
    attached = vars(model).get("generate")
    return (attached if isinstance(attached, _Generate) else _Generate(model))(inputs, **call)


def generate_with(model: Any, base: Base | None, inputs: Tensor, **call: Any) -> Any:
    """The same by this base decoder alone (`Blocks` for None), whatever is attached to the model."""
    return _Generate(model, base or Blocks())(inputs, **call)


def install(
    model: Any,
    scope: Scope,
    *,
    base: Base | None = None,
    ending: MakeEnding | None = None,
    window: int | None = None,
    guidance: float | None = None,
    heard: Heard,
) -> None:
    """Give the model a `generate` with this base decoder or ending, beside what other methods gave it."""
    on = vars(model).get("generate")
    before = on if isinstance(on, _Generate) else _Generate(model)
    changes = {"base": base, "ending": ending, "window": window, "guidance": guidance}
    wanted = {name: value for name, value in changes.items() if value is not None}
    scope.set_attribute(
        model,
        "generate",
        dataclasses.replace(before, **wanted, heard=(*before.heard, heard)),  # type: ignore[arg-type]
    )


class Record:
    """Counts over all calls, and what happened row by row in the last one: the report of a base decoder."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter(
            calls=0, prompts=0, generated_tokens=0, steps=0, forward_passes=0, row_passes=0
        )
        self.last: dict[str, Any] = {}

    def __call__(self, outcome: Outcome) -> None:
        rows = len(outcome.steps)
        self.totals.update(
            calls=1,
            prompts=rows,
            generated_tokens=rows * outcome.window,
            steps=int(outcome.steps.sum()),
            forward_passes=outcome.forward_passes,
            row_passes=outcome.row_passes,
        )
        self.last = {
            "row_steps": outcome.steps.tolist(),
            "total_steps": outcome.total_steps,
            "interrupted": outcome.interrupted,
        }

    def report(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.totals, **self.last}


def check_masked_diffusion(subject: Any, method: str) -> None:
    """Raise SubjectError unless the subject is a masked-diffusion language model in evaluation mode.

    One forward pass of a few tokens tells whether earlier outputs see later tokens.
    """
    if not isinstance(subject, torch.nn.Module):
        raise SubjectError(f"{method} acts on a masked-diffusion language model, not on a {type(subject).__name__}.")
    if subject.training:
        raise SubjectError(f"{method} acts on a model in evaluation mode: call model.eval() first.")
    mask = mask_token(subject)
    if mask is None:
        raise SubjectError(
            f"{method} acts on a masked-diffusion language model, and this {type(subject).__name__} names no mask "
            "token: set model.config.mask_token_id where it is one."
        )
    ids = torch.tensor([[0, 1, 2, mask], [0, 1, 2, int(mask == 0)]], device=_device(subject))
    try:
        with torch.no_grad():
            logits = subject(input_ids=ids).logits
    except (TypeError, AttributeError) as error:
        raise SubjectError(f"{method} needs logits from model(input_ids=ids).logits: {error}.") from None
    if logits.shape[:2] != ids.shape:
        raise SubjectError(f"{method} needs logits for every token, and this {type(subject).__name__} gives others.")
    if torch.allclose(logits[0, 0].float(), logits[1, 0].float(), rtol=1e-5, atol=1e-6):
        raise SubjectError(
            f"{method} needs bidirectional attention, and in this {type(subject).__name__} later tokens change no "
            "earlier outputs: it is an autoregressive model."
        )


def mask_token(model: Any, tokenizer: Any = None) -> int | None:
    """The mask token of a model: from its configuration, an attribute, its tokenizer; None where nothing says it."""
    sources: tuple[Any, ...] = (
        getattr(model, "config", None), getattr(model, "generation_config", None), model, tokenizer,
    )  # fmt: skip
    for source in sources:
        found = getattr(source, "mask_token_id", None)
        if isinstance(found, int):
            return found
    name = getattr(model, "name_or_path", "")
    if tokenizer is None and name:
        from gratis.subjects.opening import tokenizer_of

        try:
            return mask_token(model, tokenizer_of(model))
        except SubjectError:
            return None
    return None


def shifts_logits(model: Any) -> bool:
    """Whether output j speaks of place j + 1, as Dream's do."""
    said = getattr(model, "shifts_logits", None)
    kind = getattr(getattr(model, "config", None), "model_type", "")
    return bool(said) if said is not None else str(kind).lower() == "dream"


_COMMON = (
    "inputs", "input_ids", "attention_mask", "max_new_tokens", "max_length", "cfg_scale", "constraints",
    "mask_token_id", "streamer", "stop_strings", "tokenizer", "stopping_criteria", "return_dict_in_generate",
    "do_sample", "use_cache", "pad_token_id",
)  # fmt: skip


@torch.no_grad()
def _generate(door: _Generate, inputs: Tensor | None, call: dict[str, Any]) -> Any:
    call = {name: value for name, value in call.items() if value is not None}
    base = _base(door.base, call)
    ids = call.get("input_ids", inputs if inputs is not None else call.get("inputs"))
    prompts = _prompts(ids, call.get("attention_mask"))
    assert isinstance(ids, Tensor)
    mask = call.get("mask_token_id", mask_token(door.model, call.get("tokenizer")))
    if mask is None:
        raise InputError("Which token is the mask is unknown: pass mask_token_id, or set model.config.mask_token_id.")
    window = _window(door, call, ids.shape[1])
    _check_room(door.model, ids.shape[1] + window)
    if bool((ids == mask).any()):
        raise InputError("The prompt holds the mask token: fix tokens of the window with constraints instead.")
    streamer = call.get("streamer")
    if streamer is not None and len(prompts) > 1:
        raise InputError("A streamer shows one text: pass one prompt, or leave out the streamer.")
    ending = door.ending(door.model, window) if door.ending is not None else None
    constraints = {**call.get("constraints", {}), **(ending.constraints if ending is not None else {})}
    start = _start(ids, window, mask, constraints)
    shared = _Shared(
        door.model, base, ending, mask, float(call.get("cfg_scale", door.guidance)), _stops(call),
        call.get("stopping_criteria"), streamer, _pad(door.model, call), _seeds(prompts),
    )  # fmt: skip
    if streamer is not None:
        streamer.put(ids.cpu())
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(row)
    none = torch.zeros(len(prompts), dtype=torch.long, device=ids.device)
    outcome = Outcome(window, 0, none, none.clone(), 0, 0)
    sequences = torch.cat([ids, start], dim=1)
    for length, rows in groups.items():
        if not outcome.interrupted:
            one = torch.tensor(rows, device=ids.device)
            group = _Group(shared, sequences[one, ids.shape[1] - length :], length, rows)
            sequences[one, ids.shape[1] - length :] = group.run(outcome)
    if streamer is not None:
        streamer.end()
    for heard in door.heard:
        heard(outcome)
    if not call.get("return_dict_in_generate"):
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Shared:
    """What all rows of a call share."""

    model: Any
    base: Base
    ending: Ending | None
    mask: int
    guidance: float
    stops: tuple[Any, list[str]] | None
    criteria: Any
    streamer: Any
    pad: int
    seeds: list[int]


class _Group:
    """Rows whose prompts have one length, decoded as one batch that complete rows leave."""

    def __init__(self, shared: _Shared, ids: Tensor, prompt: int, rows: list[int]) -> None:
        self.shared, self.ids, self.prompt = shared, ids.clone(), prompt
        self.rows = torch.tensor(rows, device=ids.device)
        """Which of the call's rows these are."""
        self.window = self.ids[:, prompt:]
        self.known = self.ids != shared.mask
        """The prompt and what is fixed: what guidance takes away. (LLaDA's `prompt_index`.)"""
        self.plan = shared.base.plan(self.window == shared.mask)
        self.generators = [torch.Generator(device=ids.device).manual_seed(shared.seeds[row]) for row in rows]
        self.streamed = 0

    def run(self, outcome: Outcome) -> Tensor:
        """(rows, prompt + window) tokens; what happened is added to `outcome`."""
        outcome.total_steps = self.plan.steps
        try:
            self._steps(outcome)
        except KeyboardInterrupt:
            outcome.interrupted = True
        return self.ids

    def _steps(self, outcome: Outcome) -> None:
        mask, ending = self.shared.mask, self.shared.ending
        going = torch.arange(len(self.ids), device=self.ids.device)[(self.window == mask).any(-1)]
        logits, changed = torch.empty(0), True
        for number in range(1, self.plan.steps + 1):
            if len(going) == 0:
                break
            if changed:
                logits = self._logits(going, outcome)
            generators = [self.generators[row] for row in going.tolist()]
            window = self.window[going]
            masked = window == mask
            proposed, confidence = self.plan.propose(logits, generators)
            tokens = proposed.where(masked, window)
            outcome.steps[self.rows[going]] = number
            taken = self.plan.take(number, masked, confidence, going, generators)
            done = torch.zeros_like(going, dtype=torch.bool)
            if ending is not None:
                step = Step(number, self.plan.steps, self.rows[going], logits, tokens, masked)
                done = ending.commits(step)
                outcome.early[self.rows[going]] += masked.sum(-1).where(done, 0)
                taken = taken | (masked & done[:, None])
            self.window[going] = tokens.where(taken, window)
            stays = ~self._stopped(going)
            # Nothing new to read where no place of any row took a token.
            changed = bool(taken.any()) or not bool(stays.all())
            going = going[stays]

    def _stopped(self, going: Tensor) -> Tensor:
        """Which of the rows that decode are complete or were told to stop."""
        shared = self.shared
        if shared.streamer is not None:
            known = self._beginning(0)
            if known > self.streamed:
                shared.streamer.put(self.window[0, self.streamed : known].cpu())
                self.streamed = known
        if shared.stops is not None:
            self._cut(going, *shared.stops)
        done = ~(self.window[going] == shared.mask).any(-1)
        if shared.criteria is not None:
            criteria = shared.criteria if callable(shared.criteria) else _all_of(shared.criteria)
            done = done | torch.as_tensor(criteria(self.ids[going], None), device=done.device).expand(len(going))
        return done

    def _beginning(self, row: int) -> int:
        """Places of a row's window up to the first that is masked."""
        masked = self.window[row] == self.shared.mask
        return int(masked.long().argmax()) if bool(masked.any()) else len(masked)

    def _cut(self, going: Tensor, tokenizer: Any, strings: list[str]) -> None:
        """Fill rows with padding after the first stop string that their known beginning contains."""
        for row in going.tolist():
            tokens = self.window[row, : self._beginning(row)].tolist()
            if not any(string in tokenizer.decode(tokens) for string in strings):
                continue
            low, high = 1, len(tokens)
            while low < high:
                middle = (low + high) // 2
                found = any(string in tokenizer.decode(tokens[:middle]) for string in strings)
                low, high = (low, middle) if found else (middle + 1, high)
            self.window[row, low:] = self.shared.pad

    def _logits(self, going: Tensor, outcome: Outcome) -> Tensor:
        """(rows, window, vocabulary) logits in float32, guided, with the mask token ruled out."""
        shared, ids = self.shared, self.ids[going]
        passes = 1
        if shared.guidance > 0:
            passes = 2
            ids = torch.cat([ids, ids.masked_fill(self.known[going], shared.mask)])
        out = shared.model(input_ids=ids).logits
        first = self.prompt - 1 if shifts_logits(shared.model) else self.prompt
        logits = out[:, first : first + self.window.shape[1]].float()
        if bool(logits.isnan().any()):
            raise InputError("The model's logits are not a number: load it in float32 or bfloat16.")
        if shared.guidance > 0:
            with_prompt, without = logits.chunk(2)
            logits = without + (shared.guidance + 1) * (with_prompt - without)
        outcome.forward_passes += passes
        outcome.row_passes += passes * len(going)
        # A place that took the mask token would still be masked.
        logits[..., shared.mask] = -torch.inf
        masked: Tensor = logits
        return masked


def _all_of(criteria: Sequence[Any]) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList(criteria)


def _base(base: Base, call: dict[str, Any]) -> Base:
    """The base decoder with the settings that the call names. Raises InputError for arguments that nothing knows."""
    fields = {one.name for one in dataclasses.fields(base)}  # type: ignore[arg-type]
    unknown = [name for name in call if name not in fields and name not in _COMMON]
    if unknown:
        raise InputError(
            f"generate of a masked-diffusion model with {type(base).__name__.lower()} knows no argument "
            f"{unknown[0]!r}{suggestion(unknown[0], [*fields, *_COMMON])}."
        )
    named = {name: value for name, value in call.items() if name in fields}
    if "do_sample" in call and "temperature" in fields:
        wish = named.get("temperature", getattr(base, "temperature", 0.0)) or 1.0
        named["temperature"] = wish if call["do_sample"] else 0.0
    for name, value in named.items():
        _check_setting(name, value)
    return dataclasses.replace(base, **named)  # type: ignore[type-var]


_CHOICES = {
    "remasking": ("low_confidence", "random", "topk_margin", "entropy"),
    "alg": ("origin", "maskgit_plus", "topk_margin", "entropy"),
}


def _check_setting(name: str, value: Any) -> None:
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise InputError(f"{name} must be one of {', '.join(_CHOICES[name])}, not {value!r}.")
        return
    whole = name in {"steps", "block_length", "top_k"}
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and value >= 0
    if not good:
        raise InputError(f"{name} must be {'a whole number' if whole else 'a number'}, 0 or above, not {value!r}.")


def _prompts(ids: Any, attention_mask: Any) -> list[list[int]]:
    """The prompts' tokens without their padding. Raises InputError."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise InputError("generate needs prompts as token ids (batch, length): pass input_ids.")
    rows: list[list[int]] = ids.tolist()
    if attention_mask is None:
        prompts = rows
    elif attention_mask.shape != ids.shape:
        raise InputError(f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}.")
    else:
        kept = attention_mask.bool()
        if bool((kept[:, :-1] & ~kept[:, 1:]).any()):
            raise InputError("Prompts must be padded on the left: set tokenizer.padding_side = 'left'.")
        prompts = [row[len(row) - count :] for row, count in zip(rows, kept.sum(-1).tolist(), strict=True)]
    if not prompts or not all(prompts):
        raise InputError("generate needs a prompt, and this one is empty: pass at least one token.")
    return prompts


def _window(door: _Generate, call: Mapping[str, Any], length: int) -> int:
    if "max_new_tokens" in call:
        window = call["max_new_tokens"]
    elif "max_length" in call:
        window = call["max_length"] - length
    else:
        window = door.window or WINDOW
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise InputError(f"max_new_tokens must be a whole number above 0, not {window!r}.")
    return window


def _check_room(model: Any, length: int) -> None:
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(room, int) and length > room:
        raise InputError(
            f"Prompt and window have {length} places and the model {room}: shorten the prompt or max_new_tokens."
        )


def _start(ids: Tensor, window: int, mask: int, constraints: Mapping[int, int]) -> Tensor:
    start = torch.full((len(ids), window), mask, dtype=ids.dtype, device=ids.device)
    for place, token in constraints.items():
        if not 0 <= place < window or token == mask:
            raise InputError(
                f"constraints must give tokens other than the mask to places 0 to {window - 1}, not {token} to {place}."
            )
        start[:, place] = token
    return start


def _stops(call: Mapping[str, Any]) -> tuple[Any, list[str]] | None:
    strings = call.get("stop_strings")
    if strings is None:
        return None
    if call.get("tokenizer") is None:
        raise InputError("Stop strings need the tokenizer: pass tokenizer= to generate as well.")
    return call["tokenizer"], [strings] if isinstance(strings, str) else list(strings)


def _pad(model: Any, call: Mapping[str, Any]) -> int:
    if "pad_token_id" in call:
        return int(call["pad_token_id"])
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), call.get("tokenizer")):
        for name in ("pad_token_id", "eos_token_id"):
            if isinstance(found := getattr(source, name, None), int):
                return found
    return 0


def _seeds(prompts: Sequence[Sequence[int]]) -> list[int]:
    """A seed per row, from torch's generator, the prompt, and how often the batch held it before."""
    base, seen, seeds = int(torch.randint(2**62, ())), Counter[str](), []
    for prompt in prompts:
        key = repr(list(prompt))
        digest = hashlib.sha256(f"{base} {seen[key]} {key}".encode()).digest()
        seen[key] += 1
        seeds.append(int.from_bytes(digest[:8]) % 2**63)
    return seeds


def _device(model: Any) -> Any:
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))
