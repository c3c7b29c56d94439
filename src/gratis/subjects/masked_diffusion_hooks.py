"""Ending masked diffusion early inside a decoder that is not ours: Dream's own loop, and diffusers' LLaDA2 pipeline.

Dream's `diffusion_generate` calls two functions at every step, with the logits and with the tokens; the LLaDA2 pipeline
asks its scheduler. Both run their own code; the rule looks on, fills in what is left, and stops.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.errors import InputError
from gratis.subjects.masked_diffusion_door import Ending, Heard, MakeEnding, Outcome, Step, mask_token


class _Committed(Exception):
    """Raised through the model's own loop once every row is complete."""


def install_in_loop(model: Any, scope: Scope, ending: MakeEnding, heard: Heard) -> None:
    """Let `ending` watch every call of the model's own `diffusion_generate`, and end it."""
    inner = model.diffusion_generate
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def diffusion_generate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs).arguments
        call = {**bound, **bound.get("kwargs", {})}
        prompt = call.get("inputs", call.get("input_ids"))
        if not isinstance(prompt, Tensor):
            raise InputError("diffusion_generate needs prompts as token ids: pass inputs.")
        watch = _Watch(model, ending, call, prompt)
        kwargs = {**kwargs, "generation_logits_hook_func": watch.logits, "generation_tokens_hook_func": watch.tokens}
        try:
            return inner(*args, **kwargs)
        except _Committed:
            return watch.result()
        finally:
            heard(watch.outcome)

    scope.set_attribute(model, "diffusion_generate", diffusion_generate)


class _Watch:
    """The two functions that one call of Dream's loop gets, and what they know."""

    def __init__(self, model: Any, make: MakeEnding, call: dict[str, Any], prompt: Tensor) -> None:
        self.model, self.make, self.prompt = model, make, prompt.shape[1]
        self.user_logits: Callable[..., Any] = call.get("generation_logits_hook_func", lambda step, x, logits: logits)
        self.user_tokens: Callable[..., Any] = call.get("generation_tokens_hook_func", lambda step, x, logits: x)
        self.settings = [call, call.get("generation_config"), getattr(model, "generation_config", None), model.config]
        mask = self._setting("mask_token_id", mask_token(model))
        if mask is None:
            raise InputError("Which token is the mask is unknown: pass mask_token_id.")
        self.mask = int(mask)
        self.ending: Ending | None = None
        self.done = torch.zeros(len(prompt), dtype=torch.bool)
        self.filled, self.sequences = torch.empty(0), prompt
        none = torch.zeros(len(prompt), dtype=torch.long)
        self.outcome = Outcome(0, 0, none, none.clone(), 0, 0)

    def _setting(self, name: str, default: Any) -> Any:
        for source in self.settings:
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if value is not None:
                return value
        return default

    def logits(self, step: int, ids: Tensor, logits: Tensor) -> Tensor:
        """Before places take their tokens: does the rule commit?"""
        logits = self.user_logits(step, ids, logits)
        assert self.ending is not None
        window = ids[:, self.prompt :]
        clean = logits[:, self.prompt :].float().clone()
        if bool(clean.isnan().any()):
            raise InputError("The model's logits are not a number: load it in float32 or bfloat16.")
        clean[..., self.mask] = -torch.inf
        masked = window == self.mask
        rows = (~self.done).nonzero()[:, 0].to(ids.device)
        self.filled = clean.argmax(-1).where(masked, window)
        self.outcome.forward_passes += 1
        self.outcome.row_passes += len(ids)
        one = Step(step + 1, self.outcome.total_steps, rows, clean[rows], self.filled[rows], masked[rows])
        commits = self.ending.commits(one).cpu()
        self.outcome.steps[rows.cpu()] = step + 1
        self.outcome.early[rows.cpu()] = one.masked.sum(-1).cpu().where(commits, 0)
        self.done[rows.cpu()] = commits
        return logits

    def tokens(self, step: int | None, ids: Tensor, logits: Tensor | None) -> Tensor:
        """After places took their tokens: constraints again, commits filled in, and the end."""
        ids = self.user_tokens(step, ids, logits)
        if step is None or self.ending is None:
            self.outcome.window = ids.shape[1] - self.prompt
            self.outcome.total_steps = int(self._setting("steps", self.outcome.window))
            self.ending = self.make(self.model, self.outcome.window)
        for place, token in self.ending.constraints.items():
            ids[:, self.prompt + place] = token
        if step is not None and bool(self.done.any()):
            done = self.done.to(ids.device)[:, None]
            ids[:, self.prompt :] = self.filled.where(done, ids[:, self.prompt :])
        self.sequences = ids
        if bool(self.done.all()):
            raise _Committed
        return ids

    def result(self) -> Any:
        """What the call returns: tokens, or an output object where it asked for one."""
        if not self._setting("return_dict_in_generate", False):
            return self.sequences
        from transformers.utils.generic import ModelOutput

        return ModelOutput(sequences=self.sequences, history=None)


def is_block_pipeline(subject: Any) -> bool:
    """Whether the subject is a diffusers pipeline of masked-diffusion text whose scheduler refines blocks."""
    scheduler = getattr(subject, "scheduler", None)
    return any(kind.__name__ == "BlockRefinementScheduler" for kind in type(scheduler).__mro__) and hasattr(
        subject, "model"
    )


def install_in_scheduler(pipeline: Any, scope: Scope, ending: MakeEnding, heard: Heard) -> Callable[[], None]:
    """Put a scheduler in the pipeline that commits a whole block where `ending` says so.

    The pipeline reads no further than its current block, so a commit fills that block, progress is the block's, and a
    block without a place of the answer region decodes as usual. `heard` is told of a call when the next one begins, or
    when the function that is returned is called: a pipeline does not say when it is done.
    """
    calls: list[_BlockCall] = []
    check_inputs, before = pipeline.check_inputs, pipeline.scheduler
    signature = inspect.signature(check_inputs)

    def tell() -> None:
        while calls:
            if (outcome := calls.pop().outcome) is not None:
                heard(outcome)

    @functools.wraps(check_inputs)
    def asked(*args: Any, **kwargs: Any) -> Any:
        tell()
        window = signature.bind(*args, **kwargs).arguments["gen_length"]
        calls.append(_BlockCall(ending(pipeline, window), window))
        return check_inputs(*args, **kwargs)

    def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if calls:
            calls[-1].passed(args[0] if args else kwargs["input_ids"])

    class EarlyCommitScheduler(type(before)):  # type: ignore[misc]
        """The pipeline's own scheduler, with an ending."""

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            out = super().step(model_output, timestep, sample, **{**kwargs, "return_dict": True})
            call, proposed = calls[-1], out.sampled_tokens
            fill, tokens = call.commits(self.num_inference_steps, model_output, int(timestep), sample, proposed, kwargs)
            out.prev_sample = tokens.where(fill, out.prev_sample)
            out.transfer_index = out.transfer_index | fill
            return out if kwargs.get("return_dict", True) else out.to_tuple()

        def check_block_should_continue(self, *args: Any, **kwargs: Any) -> bool:
            return not calls[-1].complete and bool(super().check_block_should_continue(*args, **kwargs))

    scheduler = copy.copy(before)
    scheduler.__class__ = EarlyCommitScheduler
    scope.hook(pipeline.model.register_forward_pre_hook(read, with_kwargs=True))
    scope.set_attribute(pipeline, "check_inputs", asked)
    scope.set_attribute(pipeline, "scheduler", scheduler)
    return tell


class _BlockCall:
    """What one call of the pipeline did so far."""

    def __init__(self, ending: Ending, window: int) -> None:
        self.ending, self.window = ending, window
        self.complete = False
        """Whether the last step committed every row that had masks."""
        self.outcome: Outcome | None = None
        self._end = 0
        self._prompt: int | None = None
        self._block: int | None = None

    def passed(self, ids: Tensor) -> None:
        """A forward pass over ids (rows, up to the current block's end)."""
        self._end = ids.shape[1]
        if self.outcome is None:
            none = torch.zeros(len(ids), dtype=torch.long)
            self.outcome = Outcome(self.window, 0, none, none.clone(), 0, 0)
        self.outcome.forward_passes += 1
        self.outcome.row_passes += len(ids)

    def commits(
        self, steps: int, logits: Tensor, step: int, sample: Tensor, proposed: Tensor, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Which places (rows, block) take a token now, beside those that the scheduler lets in, and the tokens."""
        assert self.outcome is not None
        mask, start = settings["mask_token_id"], self._end - sample.shape[1]
        if self._prompt is None:
            inside = settings.get("prompt_mask")
            self._prompt = start + (0 if inside is None else int(inside.sum()))
        if self._block != start:
            self._block = start
            self.outcome.total_steps += steps
        masked = sample == mask
        rows = masked.any(-1).nonzero()[:, 0]
        offset = start - self._prompt
        # Behind the window the pipeline fills its last block with places that it does not return.
        places = torch.arange(offset, offset + sample.shape[1], device=sample.device)
        wanted = masked & (places >= 0) & (places < self.window)
        clean = logits.float().clone()
        if bool(clean.isnan().any()):
            raise InputError("The model's logits are not a number: load it in float32 or bfloat16.")
        clean[..., mask] = -torch.inf
        tokens = clean.argmax(-1).where(proposed == mask, proposed)
        now = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
        if len(rows):
            one = Step(step + 1, steps, rows, clean[rows], tokens[rows], wanted[rows], offset=offset)
            now[rows] = self.ending.commits(one)
            self.outcome.steps[rows.cpu()] += 1
            self.outcome.early += wanted.sum(-1).where(now, 0).cpu()
        self.complete = len(rows) > 0 and bool((now | ~masked.any(-1)).all())
        return masked & now[:, None], tokens
