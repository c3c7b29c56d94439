"""Draw several responses to one prompt as one batch, the prompt encoded once, and watch them while they grow.

It runs inside the model's own `generate`, as its `custom_generate`: everything that generate prepares (processors,
stopping criteria, cache, limits) is used as it was prepared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, LinearAttentionCacheLayerMixin
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria

from gratis.contract.errors import InputError
from gratis.subjects.growing_cache import GrowingLayer

_TEXT_INPUTS = {"attention_mask", "position_ids", "token_type_ids"}
"""Model inputs, beside the tokens, that a prompt may have and still be encoded once for all its samples."""


@dataclass
class Samples:
    """The responses that were drawn for one prompt."""

    output: Any
    """What the model's own loop returned for all of them: sequences (samples, length), or generate's output object."""
    start: int
    """Where responses begin in the sequences."""
    lengths: list[int]
    """Tokens of each response, the end-of-sequence token included, padding not."""
    truncated: list[bool]
    """Whether a response stopped at a limit of length or time rather than by itself."""
    statistics: Tensor | None
    """(steps, samples) what the recorder measured; entries past a response's length mean nothing."""
    passes: int
    """Forward passes, those of the prompt included."""
    encoded: int
    """Prompt tokens that went through the model, over all samples."""
    pad: int | None
    """Token that fills the place after a response."""
    discarded: int = 0
    """Tokens that were drawn beside the responses, in trials that were not kept."""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values that the loop reports about these samples."""

    @property
    def sequences(self) -> Tensor:
        """(samples, length) prompt and response, token by token."""
        return self.output if isinstance(self.output, Tensor) else self.output.sequences

    @property
    def responses(self) -> list[list[int]]:
        """Tokens of each response."""
        rows = self.sequences[:, self.start :].tolist()
        return [row[:length] for row, length in zip(rows, self.lengths, strict=True)]

    def means(self) -> list[float]:
        """Mean of the recorded statistic over each response's tokens. Raises InputError where it is not finite."""
        assert self.statistics is not None, "samples drawn without a recorder have no statistics"
        values = self.statistics.double().cpu()
        inside = torch.arange(len(values))[:, None] < torch.tensor(self.lengths)[None, :]
        if not bool(values[inside].isfinite().all()):
            raise InputError(
                "The model's logits are not finite (not a number, or minus infinity for some tokens): load it in "
                "float32 or bfloat16, or restrict the vocabulary to the tokenizer's."
            )
        return (values.where(inside, 0.0).sum(0) / inside.sum(0)).tolist()


def single_response(
    model: Any, ids: Tensor, start: int, criteria: Any, config: Any, *, passes: int, details: dict[str, Any],
    ended: bool = True, discarded: int = 0, encoded: int | None = None, **output: Any,
) -> Samples:  # fmt: skip
    """What a decoding loop of one's own returns for its one response.

    ids: (1, length) prompt and response, which begins at `start`; `criteria` and `config` are what transformers handed
    to the loop, `output` what else the call's output object holds. `ended` is whether the text ended by itself, where
    no criterion of the call says so: at a limit of length or time a response counts as truncated.
    """
    returned: Any = ids
    if config.return_dict_in_generate:
        from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

        kind: Any = GenerateEncoderDecoderOutput if model.config.is_encoder_decoder else GenerateDecoderOnlyOutput
        returned = kind(sequences=ids, **output)
    limited = stops([one for one in criteria if isinstance(one, _LIMITS)], ids)
    itself = stops([one for one in criteria if not isinstance(one, _LIMITS)], ids)
    pad = config._pad_token_tensor
    return Samples(
        output=returned,
        start=start,
        lengths=[ids.shape[1] - start],
        truncated=[not itself and (limited or not ended)],
        statistics=None,
        passes=passes,
        encoded=start if encoded is None else encoded,
        pad=None if pad is None else int(pad),
        discarded=discarded,
        details=details,
    )


_LIMITS = (MaxLengthCriteria, MaxTimeCriteria)


def stops(criteria: Sequence[Any], ids: Tensor) -> bool:
    """Whether one of the stopping criteria ends the texts (rows, length)."""
    return any(bool(one(ids, None).all()) for one in criteria)


def refuse_internals(config: Any, method: str, scores: bool = True) -> None:
    """Raise InputError where a call asks for what a decoding loop of one's own does not keep.

    `scores` is whether scores and logits are kept.
    """
    if config.output_attentions or config.output_hidden_states:
        raise InputError(
            f"{method} keeps no attentions or hidden states: leave out output_attentions and _hidden_states."
        )
    if not scores and (config.output_scores or config.output_logits):
        raise InputError(f"{method} keeps no scores or logits: leave out output_scores and output_logits.")


class Recorder(LogitsProcessor):
    """Measures the raw logits of every step, at temperature 1 and before any processor, and passes them on unchanged.

    Placed first. Keeps one number per step and sample, never logits.
    """

    def __init__(self, measure: Callable[[Tensor], Tensor]) -> None:
        self.measure = measure
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (samples, length) so far; scores: (samples, vocabulary) raw logits."""
        self.steps.append(self.measure(scores))
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """(steps, samples) values. sequences: (samples, length) what was generated in the end."""
        return torch.stack(self.steps)


class TokenRecorder(Recorder):
    """A recorder of something that depends on the token that was then chosen; keeps the logits of one step."""

    def __init__(self, measure: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._of_token = measure
        self._pending: Tensor | None = None
        super().__init__(lambda logits: logits)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._settle(input_ids)
        self._pending = scores.clone()
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        self._settle(sequences)
        return super().finish(sequences)

    def _settle(self, sequences: Tensor) -> None:
        if self._pending is not None:
            self.steps.append(self._of_token(self._pending, sequences[:, -1].to(self._pending.device)))
            self._pending = None


class _Draw(LogitsProcessor):
    """Adds Gumbel noise, so that the largest score is an exact sample of the distribution that the scores describe.

    (Gumbel-max: E. J. Gumbel, 1954.) One generator per sample: a sample depends on its own seed only, not on how many
    others are drawn beside it, nor on what else in the process draws. Placed last.
    """

    def __init__(self, seeds: Sequence[int], keep: bool) -> None:
        self._seeds = seeds
        self._generators: list[torch.Generator] = []
        self.kept: list[Tensor] | None = [] if keep else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.kept is not None:
            self.kept.append(scores)
        if not self._generators:
            self._generators = [torch.Generator(device=scores.device).manual_seed(seed) for seed in self._seeds]
        return perturbed(scores, self._generators)


def perturbed(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Scores (rows, vocabulary) plus Gumbel noise, a generator per row: the largest is a sample of softmax(scores)."""
    noise = torch.empty_like(scores)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return scores - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


class _Ends(StoppingCriteriaList):
    """The stopping criteria that generate prepared, remembering where and why each sample ended."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.steps = 0
        self.seen: Tensor | None = None
        """Texts (samples, length) at the last step."""
        self._length: Tensor | None = None
        self._done: Tensor | None = None
        self._limited: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.seen = input_ids
        itself = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        limit = itself.clone()
        for criterion in self:
            done = criterion(input_ids, scores, **kwargs)
            if isinstance(criterion, _LIMITS):
                limit = limit | done
            else:
                itself = itself | done
        self.steps += 1
        if self._length is None or self._done is None or self._limited is None:
            self._length, self._limited = torch.zeros_like(input_ids[:, 0]), torch.zeros_like(limit)
            self._done = torch.zeros_like(limit)
        now = (itself | limit) & ~self._done
        # On some devices the loop looks at the result a step late: nothing here waits for the device.
        self._length = torch.where(now, torch.full_like(self._length, input_ids.shape[1]), self._length)
        self._limited = self._limited | (now & ~itself)
        self._done = self._done | now
        # A sample that a stop string ended goes on in transformers where no end-of-sequence token is set.
        return self._done

    def ends(self, total: int) -> list[int]:
        """Length of each sequence, `total` for those that never ended."""
        if self._length is None or self._done is None:
            return []
        return [min(int(n), total) if done else total for n, done in zip(self._length, self._done, strict=True)]

    def limited(self) -> list[bool]:
        """Whether each sequence stopped at a limit."""
        if self._limited is None or self._done is None:
            return []
        return (self._limited | ~self._done).tolist()


@dataclass
class SamplingLoop:
    """A `custom_generate` that draws `len(seeds)` samples for the one prompt that it is given and returns Samples."""

    seeds: Sequence[int]
    recorder: Recorder | None = None
    _passes: int = field(default=0, init=False)
    _encoded: int = field(default=0, init=False)
    _ends: _Ends | None = field(default=None, init=False)

    @property
    def committed(self) -> Tensor | None:
        """Prompt and response so far; of several samples none is committed before all are complete."""
        return self._ends.seen if self._ends is not None and len(self.seeds) == 1 else None

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Samples:
        """Draw the samples. The arguments are those that transformers hands to a decoding loop."""
        start = input_ids.shape[1]
        input_ids, model_kwargs = self._expanded(model, input_ids, generation_config, model_kwargs)
        draw = _Draw(self.seeds, keep=bool(generation_config.output_scores))
        first = [self.recorder] if self.recorder is not None else []
        self._ends = ends = _Ends(stopping_criteria)
        # The noise makes the draw, so the loop only takes the largest score.
        generation_config.do_sample = False
        output = type(model)._sample(
            model,
            input_ids,
            logits_processor=LogitsProcessorList([*first, *logits_processor, draw]),
            stopping_criteria=ends,
            generation_config=generation_config,
            streamer=streamer,
            **model_kwargs,
        )
        sequences = output if isinstance(output, Tensor) else output.sequences
        steps = sequences.shape[1] - start
        if not isinstance(output, Tensor) and draw.kept is not None:
            output.scores = tuple(draw.kept[:steps])
        pad = generation_config._pad_token_tensor
        return Samples(
            output=output,
            start=start,
            lengths=[end - start for end in ends.ends(sequences.shape[1])],
            truncated=ends.limited(),
            statistics=self.recorder.finish(sequences)[:steps] if self.recorder is not None else None,
            passes=self._passes + ends.steps,
            encoded=self._encoded,
            pad=None if pad is None else int(pad),
        )

    def _expanded(
        self, model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The inputs, one row per sample; where the cache allows it, all but the last token are encoded first."""
        samples, length = len(self.seeds), input_ids.shape[1]
        self._encoded = length * samples
        if samples > 1 and _can_share(model, input_ids, generation_config, model_kwargs):
            cache = self._prefill(model, input_ids, generation_config.prefill_chunk_size, model_kwargs)
            cache.batch_repeat_interleave(samples)
            model_kwargs["past_key_values"] = cache
            self._encoded = length - 1 + samples
        input_ids, model_kwargs = model._expand_inputs_for_generation(
            input_ids=input_ids,
            expand_size=samples,
            is_encoder_decoder=model.config.is_encoder_decoder,
            **model_kwargs,
        )
        return input_ids, model_kwargs

    def _prefill(self, model: Any, input_ids: Tensor, chunk: int | None, model_kwargs: dict[str, Any]) -> Any:
        """The cache of all tokens but the last, which the loop itself reads. input_ids: (1, length)."""
        cache = model_kwargs["past_key_values"]
        end = input_ids.shape[1] - 1
        chunk = chunk or end
        for start in range(0, end, chunk):
            stop = min(start + chunk, end)
            seen = {
                name: value[..., :stop] if name in _TEXT_INPUTS and isinstance(value, Tensor) else value
                for name, value in model_kwargs.items()
            }
            seen["past_key_values"] = cache
            inputs = model.prepare_inputs_for_generation(
                input_ids[:, :stop],
                next_sequence_length=stop - start,
                is_first_iteration=start == 0,
                **seen,
            )
            # A method on the model may have put a cache of its own in the place of the one that was passed.
            cache = model(**inputs, return_dict=True).past_key_values
            self._passes += 1
        if not can_repeat(cache):
            raise InputError(
                f"The {type(cache).__name__} of this model cannot be copied for several samples: pass use_cache=False."
            )
        return cache


def _can_share(model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    others = {name for name, value in model_kwargs.items() if value is not None and not isinstance(value, (bool, int))}
    return (
        not model.config.is_encoder_decoder
        and input_ids.shape[0] == 1
        and input_ids.shape[1] > 1
        and "past_key_values" in inspect.signature(model.forward).parameters
        and bool(generation_config.use_cache)
        and not generation_config.output_attentions
        and not generation_config.output_hidden_states
        and others <= _TEXT_INPUTS | {"past_key_values"}
        and can_repeat(model_kwargs.get("past_key_values"))
    )


def can_repeat(cache: Any) -> bool:
    """Whether rows of the cache can be repeated: recurrent states and preallocated memory cannot."""
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache) or cache.is_compileable:
        return False
    replicated = getattr(cache, "layer_class_to_replicate", None)
    if not cache.layers and replicated is not None and not issubclass(replicated, DynamicLayer):
        return False
    if type(cache).batch_repeat_interleave is not Cache.batch_repeat_interleave:
        return True
    # A model's own kind of layer may keep more than the keys and values that are repeated.
    return all(
        (type(layer).__module__ == Cache.__module__ or isinstance(layer, GrowingLayer))
        and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    )
