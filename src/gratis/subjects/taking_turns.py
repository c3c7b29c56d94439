"""Two models that write one text in turns: within the `generate` of one of them, or over chats that answer questions.

Who writes when is said by an algorithm (`Algorithm`); here is what carries it out: whose tokens are read as they are
and whose as text, what ends the text, what a streamer sees, and many questions side by side.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gratis.contract.errors import InputError, SubjectError
from gratis.subjects.chat import Answer, Chat, ChatError, Format, Reply, Usage, read_answer, zero_shot
from gratis.subjects.chat.formats import format_of
from gratis.subjects.generate_door import put
from gratis.subjects.opening import tokenizer_of
from gratis.subjects.sampling_loop import Samples, perturbed, refuse_internals, single_response
from gratis.subjects.writers import ChatWriter, Draft, LocalWriter, Piece, Turn, Writer, same_vocabulary

SMALL, LARGE = "small", "large"

Split = Callable[[Draft], tuple[Draft, Draft | None]]
"""Cuts a draft of the small model after its first delimiter."""


class JointText:
    """The text so far, in pieces of one author each."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ended = False
        """Whether a writer ended the text, rather than a limit of length."""

    def __str__(self) -> str:
        return "".join(piece.draft.text for piece in self.pieces)

    @property
    def count(self) -> int:
        """Number of tokens."""
        return sum(piece.draft.count for piece in self.pieces)

    def tokens_of(self, author: str) -> int:
        """Tokens of one writer."""
        return sum(piece.draft.count for piece in self.pieces if piece.author == author)

    def commit(self, author: str, draft: Draft) -> None:
        """Add a draft."""
        if draft.count or draft.text:
            self.pieces.append(Piece(author, draft))
        self.ended = self.ended or draft.ended


class Algorithm(Protocol):
    """What decides for one text who writes, and what is kept."""

    text: JointText
    takeovers: list[dict[str, Any]]
    """What the large model wrote: `kind`, `tokens` and `text`, in order."""
    small_only: str | None
    """Why the large model was left alone from some place on."""

    def run(self) -> Generator[Turn, Draft, None]:
        """Yields what a writer is asked for and is sent its draft; ends when the text does."""
        ...

    def report(self) -> dict[str, Any]:
        """Plain values."""
        ...


@dataclass(frozen=True)
class Pair:
    """How a small model and a large one (`target`: a model or a chat) write together."""

    method: str
    """Name in messages."""
    target: Any
    algorithm: Callable[[Split], Algorithm]
    delimiters: tuple[str, ...]
    delimiter_tokens: tuple[int, ...]
    reads_text: bool
    """Whether the small model's tokenizer is needed."""
    temperature: float
    top_p: float
    top_k: int
    instruction: str = ""
    """Text before a question that is put to a chat."""
    opening: str = ""
    """Text that the answer of a chat begins with."""

    def processors(self) -> Any:
        """Logits processors that draw so."""
        made = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k:
            made.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            made.append(TopPLogitsWarper(self.top_p))
        return made


class Choosing:
    """Chooses tokens from logits: the likeliest, or draws from a seed of its own."""

    def __init__(self, processors: Any, seed: int, greedy: bool) -> None:
        self._processors, self._seed, self._greedy = processors, seed, greedy
        self._generators: list[torch.Generator] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> int:
        """ids: (1, length); logits: (1, vocabulary)."""
        scores = self._processors(ids, logits)
        if not bool(scores.isfinite().any()):
            raise InputError(
                "The model's logits are not finite, or every token was ruled out: load it in float32 or bfloat16, and "
                "look at the logits processors."
            )
        if not self._generators:
            self._generators = [torch.Generator(device=scores.device).manual_seed(self._seed)]
        return int((scores if self._greedy else perturbed(scores, self._generators)).argmax(-1))


# Within the small model's generate


class TurnLoop:
    """A `custom_generate` for one prompt: the small model's own generate, with the target beside it.

    The small model's tokens are drawn from `seed` as Sampling draws them; the target has a seed of its own.
    """

    def __init__(self, pair: Pair, seed: int, greedy: bool) -> None:
        self.pair, self.seed, self.greedy = pair, seed, greedy
        self.committed: Tensor | None = None
        """Prompt and response so far."""

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Samples:
        """Decode one response. The arguments are those that transformers hands to a decoding loop."""
        pair, start = self.pair, input_ids.shape[1]
        refuse_internals(generation_config, pair.method, scores=False)
        _refuse_other_inputs(pair.method, model_kwargs)

        def finished(text: Tensor) -> bool:
            return bool(stopping_criteria(text.to(input_ids.device), None).all())

        small = LocalWriter(
            SMALL, model, input_ids[0].tolist(), tokenizer=tokenizer_of(model) if pair.reads_text else None,
            draw=Choosing(logits_processor, self.seed, self.greedy), delimiters=pair.delimiters,
            delimiter_tokens=pair.delimiter_tokens, finished=finished,
        )  # fmt: skip
        large = self._large(small, logits_processor, finished)
        algorithm = pair.algorithm(small.split)
        self.committed = input_ids
        for place, text in self._played(algorithm, small, large, finished):
            new, self.committed = text[0, self.committed.shape[1] :], text
            if streamer is not None and len(new):
                author = algorithm.text.pieces[place].author
                put(streamer, new.cpu(), "" if author == SMALL else "target")
        if streamer is not None:
            streamer.end()
        kept = algorithm.text.tokens_of(SMALL) + algorithm.text.tokens_of(LARGE)
        return single_response(
            model,
            self.committed,
            start,
            stopping_criteria,
            generation_config,
            passes=small.counts.passes + large.counts.passes,
            encoded=start * (2 if isinstance(large, LocalWriter) else 1),
            discarded=max(small.counts.drafted + large.counts.drafted - kept, 0),
            details=_details(algorithm, small, large, self.committed.shape[1] - start),
            ended=algorithm.text.ended,
        )

    def _played(
        self, algorithm: Algorithm, small: LocalWriter, large: Writer, finished: Callable[[Tensor], bool]
    ) -> Iterator[tuple[int, Tensor]]:
        """Carries the algorithm out: after each piece its number and the text (1, length) with it.

        A piece that was not written in the small model's tokens is cut where the call's own criteria end the text.
        """
        assert self.committed is not None
        like, pieces = self.committed, algorithm.text.pieces
        turns, writers = algorithm.run(), {SMALL: small, LARGE: large}
        seen, draft = 0, None
        while True:
            try:
                turn = next(turns) if draft is None else turns.send(draft)
            except StopIteration:
                turn = None
            for place in range(seen, len(pieces)):
                text, over = like.new_tensor([small.encode(pieces[: place + 1])]), False
                if pieces[place].author not in small.shares:
                    text, over = _cut(text, self.committed.shape[1], finished)
                yield place, text
                if over:
                    return
            seen = len(pieces)
            if turn is None:
                return
            draft = writers[turn.writer].write(pieces, turn)

    def _large(self, small: LocalWriter, processors: Any, finished: Callable[[Tensor], bool]) -> Any:
        """The target as a writer: of the same tokens where it has the same vocabulary, else of text."""
        pair, target, prompt = self.pair, self.pair.target, list(small.ids)
        draw = Choosing(processors, _seed_of_target(self.seed), self.greedy)
        own = target is small.model
        tokenizer = small.tokenizer if own else small.tokenizer or tokenizer_of(small.model)
        shared = own or (not isinstance(target, Chat) and same_vocabulary(tokenizer, tokenizer_of(target)))
        if shared:
            small.shares.add(LARGE)
            return LocalWriter(
                LARGE, target, prompt, tokenizer=tokenizer, draw=draw, delimiters=pair.delimiters,
                delimiter_tokens=pair.delimiter_tokens, finished=finished, shares=(SMALL,),
            )  # fmt: skip
        if small.tokenizer is None:
            raise InputError(f"{pair.method} hands text to a target of another vocabulary: name delimiters as text.")
        messages = [{"role": "user", "content": tokenizer.decode(prompt, skip_special_tokens=True)}]
        if isinstance(target, Chat):
            temperature = 0.0 if self.greedy else pair.temperature
            return ChatWriter(
                LARGE, target, messages, delimiters=pair.delimiters, temperature=temperature, top_p=pair.top_p
            )
        unfit = [type(one).__name__ for one in processors if type(one).__name__ not in VOCABULARY_FREE]
        if unfit:
            raise InputError(
                f"The target's vocabulary differs, and {unfit[0]} is made for the small model's tokens: leave it out."
            )
        own = tokenizer_of(target)
        return LocalWriter(LARGE, target, rendered(own, messages), tokenizer=own, draw=draw, delimiters=pair.delimiters)


VOCABULARY_FREE = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor",
    "InfNanRemoveLogitsProcessor", "LogitNormalization",
}  # fmt: skip
"""Logits processors that mean the same whatever the tokens are."""


def _refuse_other_inputs(method: str, model_kwargs: dict[str, Any]) -> None:
    """Raise InputError for prompts of more than tokens."""
    text_only = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
    given = {name: v for name, v in model_kwargs.items() if v is not None and not isinstance(v, (bool, int))}
    # Some models hand themselves an empty dict for the pictures and sounds that a text prompt has none of.
    others = {name for name, value in given.items() if not (isinstance(value, dict) and not value)} - text_only
    if others:
        raise InputError(f"{method} reads a prompt of tokens only: leave out {', '.join(sorted(others))}.")


def _cut(text: Tensor, known: int, finished: Callable[[Tensor], bool]) -> tuple[Tensor, bool]:
    """The text (1, length) up to where it ends after its first `known` tokens, and whether it ends there."""
    for end in range(known + 1, text.shape[1] + 1):
        if finished(text[:, :end]):
            return text[:, :end], True
    return text, False


def _details(algorithm: Algorithm, small: LocalWriter, large: Any, length: int) -> dict[str, Any]:
    return {
        **algorithm.report(),
        "encoded": {SMALL: small.counts.encoded, LARGE: large.counts.encoded},
        "drafted": {SMALL: small.counts.drafted, LARGE: large.counts.drafted},
        "places": _places(algorithm, small, length),
    }


def _places(algorithm: Algorithm, small: LocalWriter, length: int) -> list[list[Any]]:
    """[first, last + 1, kind] of what the target wrote, in tokens of the response of this length."""
    pieces = algorithm.text.pieces
    small.encode(pieces)
    kinds = iter(one["kind"] for one in algorithm.takeovers if one["tokens"] or one["text"])
    ends = [min(bound - small.bounds[0], length) for bound in small.bounds]
    spans = zip(ends[:-1], ends[1:], pieces, strict=True)
    found = [[first, end, next(kinds)] for first, end, piece in spans if piece.author == LARGE]
    return [one for one in found if one[0] < one[1]]


def _seed_of_target(seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} target".encode()).digest()[:8]) % 2**63


# Over chats


def check_goes_on(chat: Chat, method: str) -> None:
    """Raise SubjectError for a chat that cannot go on from the beginning of an answer."""
    if not chat.continues:
        raise SubjectError(
            f"{method} needs a chat that goes on from the beginning of an answer: a local model, or gratis.Chat("
            "address, model, continues='prefill' or 'completions'), as the endpoint can."
        )


def rendered(tokenizer: Any, messages: Sequence[dict[str, str]], opening: str = "") -> list[int]:
    """Token ids of a conversation that the model is to answer, by its chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text + opening, add_special_tokens=False, verbose=False).input_ids)
    text = "\n".join(message["content"] for message in messages)
    return list(tokenizer(text + "\n" + opening, verbose=False).input_ids)


class JointAnswers:
    """Questions answered by two writers over a chat; all questions of a call go on side by side."""

    def __init__(self, pair: Pair, chat: Chat) -> None:
        self._pair, self._chat = pair, chat
        self._totals: Counter[str] = Counter(
            questions=0, takeovers=0, target_calls=0, failed_calls=0, tokens=0, target_tokens=0, small_only=0
        )
        self._last: dict[str, Any] = {}

    def report(self) -> dict[str, Any]:
        """Totals over all calls, and the takeovers of the last."""
        share = self._totals["target_tokens"] / max(self._totals["tokens"], 1)
        return {**self._totals, "target_share": share, **self._last}

    def answer_many(
        self, questions: Sequence[Any], kind: str | Format = "text", *, max_tokens: int = 800
    ) -> list[Answer]:
        """One answer per question. Raises ChatError where the small model gives none at all."""
        form = format_of(kind)
        items = [form.item(question) for question in questions]
        threads = [
            _Thread(self._pair, self._chat, self._messages(form, item), number, max_tokens)
            for number, item in enumerate(items)
        ]
        active = threads
        while active:
            waiting = [thread for thread in active if isinstance(thread.writer, ChatWriter)]
            for chat in {id(thread.writer.chat): thread.writer.chat for thread in waiting}.values():
                asked = [thread for thread in waiting if thread.writer.chat is chat]
                replies = chat([thread.writer.request(thread.pieces, thread.turn) for thread in asked])
                for thread, reply in zip(asked, replies, strict=True):
                    thread.go_on(thread.writer.draft(thread.turn, reply))
            for thread in active:
                if thread not in waiting:
                    thread.go_on(thread.writer.write(thread.pieces, thread.turn))
            active = [thread for thread in active if thread.turn is not None]
        self._last = {"takeovers_of_last_call": [thread.algorithm.takeovers for thread in threads]}
        return [self._answer(form, item, thread) for item, thread in zip(items, threads, strict=True)]

    def _messages(self, form: Format, item: Any) -> list[dict[str, str]]:
        messages = [dict(message) for message in zero_shot(form, item, 1, self._chat.seed).messages]
        messages[-1]["content"] = self._pair.instruction + messages[-1]["content"]
        return messages

    def _answer(self, form: Format, item: Any, thread: _Thread) -> Answer:
        text, report = thread.algorithm.text, thread.algorithm.report()
        self._totals.update(
            questions=1,
            takeovers=len(thread.algorithm.takeovers),
            target_calls=report["target_calls"],
            failed_calls=report["failed_calls"],
            tokens=text.count,
            target_tokens=text.tokens_of(LARGE),
            small_only=int(thread.algorithm.small_only is not None),
        )
        if thread.failure is not None and not text.pieces:
            raise ChatError(thread.failure)
        reply = Reply(text=str(text), finish_reason="stop" if text.ended else "length", usage=thread.usage())
        answer = read_answer(form, item, reply)
        answer.fallback = thread.failure or thread.algorithm.small_only
        return answer


class _Thread:
    """One question on its way."""

    def __init__(self, pair: Pair, chat: Chat, messages: list[dict[str, str]], number: int, limit: int) -> None:
        self.failure: str | None = None
        """Why the small model did not go on."""
        self._limit = limit
        seed = chat.seed + number
        small = _writer(SMALL, pair, chat, messages, number, seed)
        large = small if pair.target is chat else _writer(LARGE, pair, pair.target, messages, number, seed + 1)
        for one, other in ((small, large), (large, small)):
            local = isinstance(one, LocalWriter) and isinstance(other, LocalWriter)
            if local and same_vocabulary(one.tokenizer, other.tokenizer):
                one.shares |= {SMALL, LARGE}
        self._writers: dict[str, Any] = {SMALL: small, LARGE: large}
        self.algorithm = pair.algorithm(small.split)
        self._turns = self.algorithm.run()
        self.turn: Any = self._limited(next(self._turns))
        """What is asked next, None at the end."""

    @property
    def writer(self) -> Any:
        """Who is asked now."""
        return self._writers[self.turn.writer]

    @property
    def pieces(self) -> list[Piece]:
        """What is committed."""
        return self.algorithm.text.pieces

    def go_on(self, draft: Draft) -> None:
        """Take the draft that was asked for."""
        try:
            self.turn = self._limited(self._turns.send(draft))
        except StopIteration:
            self.turn = None
        except ChatError as error:
            self.turn, self.failure = None, str(error)

    def _limited(self, turn: Turn) -> Turn | None:
        """The turn within what is left of the answer's length, None where nothing is."""
        room = self._limit - self.algorithm.text.count
        if room < 1 or turn.tokens <= room:
            return turn if room >= 1 else None
        return Turn(turn.writer, room, turn.to_delimiter, turn.start, turn.lead)

    def usage(self) -> Usage:
        """Tokens read and written by both."""
        total = Usage()
        for writer in {id(one): one for one in self._writers.values()}.values():
            total.output += writer.counts.drafted
            total.input += sum(one.input for one in writer.counts.usage) or writer.counts.encoded
        return total


def _writer(name: str, pair: Pair, subject: Any, messages: list[dict[str, str]], number: int, seed: int) -> Any:
    """A model or chat as a writer of the answer to `messages`."""
    model = subject.backend.live if isinstance(subject, Chat) and hasattr(subject.backend, "live") else subject
    if isinstance(model, Chat):
        return ChatWriter(
            name, model, messages, delimiters=pair.delimiters, opening=pair.opening, number=number,
            temperature=pair.temperature, top_p=pair.top_p,
        )  # fmt: skip
    tokenizer = tokenizer_of(model)
    return LocalWriter(
        name, model, rendered(tokenizer, messages, pair.opening), tokenizer=tokenizer,
        draw=Choosing(pair.processors(), seed, greedy=False), delimiters=pair.delimiters,
    )  # fmt: skip
