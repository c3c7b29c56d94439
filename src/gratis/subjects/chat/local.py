"""A transformers language model answering chat requests in batches, with shared beginnings read once."""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from gratis.contract.attach import attached
from gratis.contract.errors import InputError, SubjectError
from gratis.subjects.chat.messages import Reply, Request, Usage

PREFIX_LEAST = 64
_log = logging.getLogger(__name__)


class LocalModel:
    """Greedy or sampled answers of a live model. Results do not depend on how requests are batched or ordered.

    Shared beginnings are read once where every layer keeps all keys and values. Models with recurrent layers, and those
    with methods attached, are asked one request at a time. Nothing that was read is used again after the weights or
    what is attached changed.
    """

    runs_here = True
    continues = True

    def __init__(self, model: Any, batch_tokens: int, prefix_bytes: int) -> None:
        from gratis.subjects.opening import tokenizer_of

        self._model, self._tokenizer = model, tokenizer_of(model)
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise SubjectError(f"The tokenizer of this {type(model).__name__} has no chat template, so it cannot chat.")
        self._batch_tokens, self._prefix_bytes = batch_tokens, prefix_bytes
        self._prefixes: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._name = str(getattr(model, "name_or_path", "") or type(model).__name__).rstrip("/").rpartition("/")[2]
        self._state: Any = None
        self._identity = ""
        self._keeps_all = self._rows_go_together = self._shares = self._batches = True
        self.prefill_tokens = 0
        """Prompt tokens that were read so far."""
        self._refresh()

    @property
    def live(self) -> Any:
        """The transformers model."""
        return self._model

    @property
    def model(self) -> str:
        """The model's name, a checksum of its weights, and what is attached to it."""
        with self._lock:
            self._refresh()
            return self._identity

    def generate(self, requests: list[Request]) -> list[Reply]:
        """Replies in the order of the requests."""
        with self._lock, torch.no_grad():
            self._refresh()
            prompts = [self._prompt(request) for request in requests]
            replies: list[Reply | None] = [None] * len(requests)
            for number, request in enumerate(requests):
                if request.choices:
                    replies[number] = self._choose(request, prompts[number])
            rest = sorted((n for n in range(len(requests)) if replies[n] is None), key=lambda n: len(prompts[n]))
            for group in self._groups(rest, prompts, requests):
                answers = self._decode([prompts[n] for n in group], [requests[n] for n in group])
                for number, reply in zip(group, answers, strict=True):
                    replies[number] = reply
        return [reply for reply in replies if reply is not None]

    def score(self, request: Request, continuations: list[str]) -> list[float]:
        """Sum of log-probabilities of each continuation after the request's prompt."""
        with self._lock, torch.no_grad():
            self._refresh()
            return self._score(self._prompt(request), continuations)

    def _refresh(self) -> None:
        """Forget what was read by other weights or under other methods."""
        methods = tuple(repr(method) for attachment in attached(self._model) for method in attachment.methods)
        weights = [w for w in self._model.parameters() if not w.is_inference()]
        state = (methods, tuple((weight.data_ptr(), weight._version) for weight in weights))
        if state == self._state:
            return
        if self._state is None:
            self._look_at_the_cache()
        self._prefixes.clear()
        self._identity = "+".join((f"{self._name}:{_fingerprint(self._model)}", *methods))
        self._shares, self._batches = self._keeps_all and not methods, self._rows_go_together and not methods
        self._state = state

    def _look_at_the_cache(self) -> None:
        with torch.no_grad():
            out = self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._model.device), use_cache=True)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise SubjectError(
                f"A {type(self._model).__name__} gives no past_key_values to go on from, so it cannot chat here."
            )
        layers = getattr(cache, "layers", [])
        self._rows_go_together = not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        # Sliding windows would count the padding between a shared beginning and its continuation.
        self._keeps_all = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in layers)

    def _prompt(self, request: Request) -> list[int]:
        if request.logprobs is not None:
            raise InputError("A local model gives no logprobs of what it writes; use score for given text.")
        messages = [dict(message) for message in request.messages]
        try:
            text = self._rendered(messages)
        except _template_error() as error:
            merged = _without_system(messages)
            if merged == messages:
                raise InputError(f"The model's chat template does not allow this conversation: {error}.") from error
            _log.info("%s has no system role; its words begin the first question.", self._name)
            try:
                text = self._rendered(merged)
            except _template_error() as again:
                raise InputError(f"The model's chat template does not allow this conversation: {again}.") from again
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        window = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if window is not None and len(ids) + request.max_tokens > window:
            raise InputError(
                f"The prompt of {len(ids)} tokens and max_tokens {request.max_tokens} exceed the model's window of {window}."
            )
        return list(ids)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        if messages[-1]["role"] == "assistant":
            # What transformers offers for it trims the blanks at the end, and a paragraph's break with them.
            return self._rendered(messages[:-1]) + messages[-1]["content"]
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _groups(self, order: list[int], prompts: list[list[int]], requests: list[Request]) -> list[list[int]]:
        groups: list[list[int]] = []
        longest = 0
        for number in order:
            longest = max(longest if groups else 0, len(prompts[number]) + requests[number].max_tokens)
            if groups and self._batches and (len(groups[-1]) + 1) * longest <= self._batch_tokens:
                groups[-1].append(number)
            else:
                groups.append([number])
                longest = len(prompts[number]) + requests[number].max_tokens
        return groups

    def _prefilled(self, prompts: list[list[int]]) -> tuple[Any, int]:
        """A cache of the longest shared beginning of at least two prompts (None, 0 where it is short)."""
        shared = _shared(prompts) if len(prompts) > 1 and self._shares else 0
        shared = min(shared, min(len(p) for p in prompts) - 1)
        if shared < PREFIX_LEAST:
            return None, 0
        key = tuple(prompts[0][:shared])
        if key not in self._prefixes:
            ids = torch.tensor([key], device=self._model.device)
            self._prefixes[key] = self._model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            self.prefill_tokens += shared
        self._prefixes.move_to_end(key)
        while len(self._prefixes) > 1 and sum(map(_bytes, self._prefixes.values())) > self._prefix_bytes:
            self._prefixes.popitem(last=False)
        cache = copy.deepcopy(self._prefixes[key])
        cache.batch_repeat_interleave(len(prompts))
        return cache, shared

    def _decode(self, prompts: list[list[int]], requests: list[Request]) -> list[Reply]:
        began = time.perf_counter()
        cache, shared = self._prefilled(prompts)
        device = self._model.device
        rest = [prompt[shared:] for prompt in prompts]
        width = max(map(len, rest))
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0
        tokens = torch.tensor([[pad] * (width - len(r)) + r for r in rest], device=device)
        mask = torch.tensor([[1] * shared + [0] * (width - len(r)) + [1] * len(r) for r in rest], device=device)
        self.prefill_tokens += sum(map(len, rest))
        rows = [_Row(request, self._tokenizer) for request in requests]
        live = list(range(len(rows)))
        ends = _end_tokens(self._model, self._tokenizer)
        while True:
            places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
            padded = {} if bool((mask == 1).all()) else {"attention_mask": mask}
            out = self._model(
                input_ids=tokens, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1, **padded
            )
            cache = out.past_key_values
            chosen = [rows[n].choose(out.logits[i, -1].float()) for i, n in enumerate(live)]
            kept = [i for i, n in enumerate(live) if not rows[n].add(chosen[i], ends)]
            if not kept:
                break
            if len(kept) < len(live):
                index = torch.tensor(kept, device=device, dtype=torch.long)
                cache.batch_select_indices(index)
                mask, live = mask[index], [live[i] for i in kept]
            tokens = torch.tensor([[chosen[i]] for i in kept], device=device)
            mask = torch.cat([mask, mask.new_ones(len(kept), 1)], dim=1)
        seconds = (time.perf_counter() - began) / len(prompts)
        return [
            row.reply(self._identity, len(prompt), shared, seconds) for row, prompt in zip(rows, prompts, strict=True)
        ]

    def _choose(self, request: Request, prompt: list[int]) -> Reply:
        began = time.perf_counter()
        scores = self._score(prompt, list(request.choices))
        best = max(range(len(scores)), key=lambda i: scores[i])
        return Reply(
            text=request.choices[best],
            parsed=request.choices[best],
            usage=Usage(input=len(prompt)),
            logprobs=[dict(zip(request.choices, scores, strict=True))],
            model=self._identity,
            latency_s=time.perf_counter() - began,
        )

    def _score(self, prompt: list[int], continuations: list[str]) -> list[float]:
        tails = [self._tokenizer(text, add_special_tokens=False).input_ids for text in continuations]
        if not all(tails):
            raise InputError("A continuation to score must not be empty.")
        device = self._model.device
        ids = torch.tensor([prompt], device=device)
        out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.prefill_tokens += len(prompt)
        first = out.logits[0, -1].float().log_softmax(-1)
        scores = []
        for tail in tails:
            score = first[tail[0]].item()
            if len(tail) > 1:
                cache = copy.deepcopy(out.past_key_values)
                after = self._model(input_ids=torch.tensor([tail[:-1]], device=device), past_key_values=cache).logits[0]
                picked = after.float().log_softmax(-1).gather(1, torch.tensor(tail[1:], device=device)[:, None])
                score += picked.sum().item()
            scores.append(score)
        return scores


class _Row:
    """One answer as it grows."""

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._tokens: list[int] = []
        self._text: str | None = None
        self._finish = "length"
        self._stopped_by: str | None = None
        self._generator = torch.Generator()
        seed = hashlib.sha256(f"{request.seed}/{request.key('')}".encode()).digest()
        self._generator.manual_seed(int.from_bytes(seed[:8], "big") >> 1)

    def choose(self, logits: Tensor) -> int:
        """The next token: greedy, or drawn by the request's own generator."""
        if self._request.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits.cpu() / self._request.temperature).softmax(-1)
        if self._request.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            cut = ordered.cumsum(0) - ordered >= self._request.top_p
            probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered.masked_fill(cut, 0.0))
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def add(self, token: int, ends: set[int]) -> bool:
        """Take a token; True when the answer is complete."""
        if token in ends:
            self._finish, self._stopped_by = "stop", ""
            return True
        self._tokens.append(token)
        if self._request.stop:
            text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            found = [(text.index(stop), stop) for stop in self._request.stop if stop in text]
            if found:
                at, self._stopped_by = min(found)
                self._text, self._finish = text[:at], "stop"
                return True
        return len(self._tokens) >= self._request.max_tokens

    def reply(self, model: str, prompt: int, shared: int, seconds: float) -> Reply:
        """The finished answer."""
        text = self._text if self._text is not None else self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        usage = Usage(input=prompt, cached_input=shared, output=len(self._tokens))
        return Reply(
            text=text, finish_reason=self._finish, stopped_by=self._stopped_by, usage=usage, model=model,
            latency_s=seconds,
        )  # fmt: skip


def _shared(prompts: list[list[int]]) -> int:
    first, last = min(prompts), max(prompts)
    length = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        length += 1
    return length


def _bytes(cache: Any) -> int:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.nbytes for t in tensors)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _fingerprint(model: Any) -> str:
    """A checksum of all weights: exact sums of their bits, and a few of their values in order."""
    digest = hashlib.sha256()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        total = int(flat.view(bits[flat.element_size()]).sum(dtype=torch.int64)) if flat.element_size() in bits else 0
        digest.update(f"{name}{tuple(weight.shape)}{total}".encode())
        digest.update(flat[:: max(len(flat) // 64, 1)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _template_error() -> type[Exception]:
    from jinja2 import TemplateError

    return TemplateError


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation with the system's words at the beginning of the first question."""
    said = [message["content"] for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    if not said:
        return messages
    return [{**turns[0], "content": "\n\n".join([*said, turns[0]["content"]])}, *turns[1:]]
