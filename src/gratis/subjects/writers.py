"""Models that take turns at writing one text, each with its own tokens and its own memory of the text.

A writer is a transformers model here (`LocalWriter`) or a chat that goes on from a beginning (`ChatWriter`). What one
writes, the others read when it is their turn: token by token where they share a vocabulary, as text elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from gratis.contract.errors import SubjectError
from gratis.subjects.chat import Chat, Reply, Request, Usage
from gratis.subjects.language import text_config, window_of

CONTEXT = 4
"""Tokens before a piece that it is decoded with: a token's text may depend on its neighbours."""


@dataclass(frozen=True)
class Draft:
    """What a writer wrote, committed or not."""

    text: str = ""
    tokens: tuple[int, ...] | None = None
    """In the writer's own vocabulary; None where it does not tell them."""
    count: int = 0
    """Number of tokens."""
    marks: tuple[int, ...] = ()
    """After how many of its tokens a delimiter is complete; for text without tokens, after how many characters."""
    paused: bool = False
    """Whether it stopped because a delimiter was complete."""
    ended: bool = False
    """Whether the text ends here: an end-of-sequence token, a stop string, a limit."""
    error: str | None = None
    """Why there is no draft."""
    full: bool = False
    """Whether the writer's window has no room for more."""


@dataclass(frozen=True)
class Piece:
    """A committed part of the text."""

    author: str
    """Name of the writer; "" for what nobody of them wrote."""
    draft: Draft


@dataclass(frozen=True)
class Turn:
    """What a writer is asked for."""

    writer: str
    tokens: int
    """At most so many."""
    to_delimiter: bool = False
    """Stop where a delimiter is complete."""
    start: Draft | None = None
    """Tokens that this writer drafted before and that its draft begins with."""
    lead: str = ""
    """Text that is read after what was committed and before the draft; it is not part of the draft."""


class Writer(Protocol):
    """What takes turns."""

    def write(self, pieces: Sequence[Piece], turn: Turn) -> Draft:
        """A draft that goes on from the committed `pieces`."""
        ...

    def split(self, draft: Draft) -> tuple[Draft, Draft | None]:
        """A draft up to its first delimiter, and the rest (None where there is no rest)."""
        ...


@dataclass
class Counts:
    """What a writer did."""

    calls: int = 0
    passes: int = 0
    """Forward passes; for a chat, requests."""
    encoded: int = 0
    """Tokens that went through the model; for a chat, what it says of its prompts."""
    drafted: int = 0
    """Tokens that were written, kept or not."""
    usage: list[Usage] = field(default_factory=list)


class LocalWriter:
    """A transformers model that writes, its cache kept between turns.

    When its turn comes, the cache is cut to what it shares with the text, and only what is missing is read. Where a
    cache cannot be cut (sliding windows, recurrent states) and holds a draft that was dropped, the text is read again.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        prompt: Sequence[int],
        *,
        tokenizer: Any,
        draw: Callable[[Tensor, Tensor], int],
        delimiters: Sequence[str],
        delimiter_tokens: Sequence[int] = (),
        finished: Callable[[Tensor], bool] | None = None,
        shares: Sequence[str] = (),
    ) -> None:
        """`draw(ids, logits)` chooses the next token from (1, length) and (1, vocabulary); `finished(ids)` tells
        whether the text ends with its last token, beside the model's own end tokens; `shares` names the writers of
        the same vocabulary, whose tokens are read as they are.
        """
        self.name, self.model, self.counts = name, model, Counts()
        self.tokenizer, self._draw, self._finished = tokenizer, draw, finished
        self._delimiters, self._delimiter_tokens = tuple(delimiters), frozenset(delimiter_tokens)
        self.shares = {name, *shares}
        """Writers whose tokens are this model's own."""
        self._ends = end_tokens(model, tokenizer)
        self._window = window_of(model)
        self.ids = list(prompt)
        """The committed text in this model's tokens, as far as it was followed."""
        self.bounds = [len(self.ids)]
        """Where the prompt ends, and each piece that was followed."""
        self._cache: Any = None
        self._held: list[int] = []

    @torch.no_grad()
    def write(self, pieces: Sequence[Piece], turn: Turn) -> Draft:
        """See Writer. The draft is `full` where the model's window has no room for one more token."""
        self.counts.calls += 1
        self._follow(pieces)
        begun = turn.start.tokens or () if turn.start is not None else ()
        if turn.start is not None and (turn.start.ended or len(begun) >= turn.tokens):
            return turn.start
        ids = [*self.ids, *self._encoded(turn.lead), *begun]
        before = len(ids) - len(begun)
        limit = turn.tokens - len(begun)
        room = limit if self._window is None else self._window - len(ids)
        if room < 1:
            return Draft(error=f"the text fills its window of {self._window} tokens", full=True)
        marks = list(turn.start.marks) if turn.start is not None else []
        text = torch.tensor([ids], device=self.model.device)
        paused = ended = False
        for _ in range(min(limit, room)):
            token = self._draw(text, self._logits(text))
            ids.append(token)
            text = torch.cat([text, text.new_tensor([[token]])], dim=1)
            self.counts.drafted += 1
            if self._completes(ids):
                marks.append(len(ids) - before)
                paused = turn.to_delimiter
            ended = token in self._ends or (self._finished is not None and self._finished(text))
            if paused or ended:
                break
        return self._draft(ids, before, tuple(marks), paused, ended)

    def split(self, draft: Draft) -> tuple[Draft, Draft | None]:
        """See Writer."""
        tokens = draft.tokens or ()
        if not draft.marks or draft.marks[0] == len(tokens):
            return replace(draft, paused=bool(draft.marks)), None
        cut = draft.marks[0]
        head = self._piece(tokens[:cut], self.ids)
        rest = draft.text[len(head) :]
        return (
            Draft(head, tokens[:cut], cut, (cut,), paused=True),
            Draft(rest, tokens[cut:], len(tokens) - cut, tuple(m - cut for m in draft.marks[1:]), ended=draft.ended),
        )

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """The committed text in this model's tokens, prompt included."""
        self._follow(pieces)
        return self.ids

    def _follow(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces[len(self.bounds) - 1 :]:
            own = piece.author in self.shares and piece.draft.tokens is not None
            self.ids += piece.draft.tokens if own and piece.draft.tokens else self._encoded(piece.draft.text)
            self.bounds.append(len(self.ids))

    def _encoded(self, text: str) -> list[int]:
        """Tokens of a text that goes on, not of one that begins: some tokenizers mark the beginning with a space."""
        if not text:
            return []
        plain = list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        anchor = list(self.tokenizer("\n", add_special_tokens=False).input_ids)
        after = list(self.tokenizer("\n" + text, add_special_tokens=False, verbose=False).input_ids)
        return after[len(anchor) :] if anchor and after[: len(anchor)] == anchor else plain

    def _logits(self, text: Tensor) -> Tensor:
        """Logits (1, vocabulary) of the token after `text` (1, length); reads what the cache does not hold."""
        ids = text[0].tolist()
        common = 0
        if self._held == ids[: len(self._held)]:
            common = len(self._held)
        else:
            common = next(i for i, (a, b) in enumerate(zip(self._held, [*ids, -1], strict=False)) if a != b)
        common = min(common, len(ids) - 1)
        if surplus := len(self._held) - common:
            if bool(getattr(self._cache, "is_croppable", False)):
                self._cache.crop(-surplus)
            else:
                self._cache, common = None, 0
        if self._cache is None:
            self._cache, common = DynamicCache(config=text_config(self.model)), 0
        inputs = self.model.prepare_inputs_for_generation(
            text,
            next_sequence_length=len(ids) - common,
            past_key_values=self._cache,
            attention_mask=torch.ones_like(text),
            use_cache=True,
            is_first_iteration=common == 0,
        )
        outputs = self.model(**inputs, return_dict=True)
        # A method on the model may have put a cache of its own in the place of the one that was passed.
        self._cache = getattr(outputs, "past_key_values", None)
        self._held = ids if isinstance(self._cache, Cache) else []
        self.counts.passes += 1
        self.counts.encoded += len(ids) - common
        logits: Tensor = outputs.logits[:, -1].to(torch.float32, copy=True)
        return logits

    def _completes(self, ids: list[int]) -> bool:
        """Whether a delimiter ends within the last token."""
        if ids[-1] in self._delimiter_tokens:
            return True
        if not self._delimiters:
            return False
        before = self._decoded(ids[-1 - CONTEXT : -1])
        now = self._decoded(ids[-1 - CONTEXT :])
        return any((at := now.rfind(mark)) >= 0 and at + len(mark) > len(before) for mark in self._delimiters)

    def _draft(self, ids: list[int], before: int, marks: tuple[int, ...], paused: bool, ended: bool) -> Draft:
        tokens = ids[before:]
        text = self._piece(tokens, ids[:before])
        while text.endswith("�") and len(self.shares) == 1 and tokens and not ended:
            # Half a character means nothing to a writer with other tokens.
            tokens = tokens[:-1]
            text = self._piece(tokens, ids[:before])
        marks = tuple(mark for mark in marks if mark <= len(tokens))
        return Draft(text, tuple(tokens), len(tokens), marks, paused, ended)

    def _piece(self, tokens: Sequence[int], before: Sequence[int]) -> str:
        """Text of tokens in their place."""
        if self.tokenizer is None:
            return ""
        context = list(before[-CONTEXT:])
        return self._decoded([*context, *tokens])[len(self._decoded(context)) :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class ChatWriter:
    """A chat that writes: every turn is a request whose last message is the beginning of the answer."""

    def __init__(
        self,
        name: str,
        chat: Chat,
        messages: Sequence[dict[str, str]],
        *,
        delimiters: Sequence[str],
        opening: str = "",
        number: int = 0,
        **drawing: Any,
    ) -> None:
        """`messages` end with the user's turn; `opening` begins the answer; `number` tells equal questions apart."""
        self.name, self.chat, self.counts = name, chat, Counts()
        self._messages, self._opening, self._drawing = tuple(messages), opening, drawing
        self._delimiters, self._number = tuple(delimiters), number

    def request(self, pieces: Sequence[Piece], turn: Turn) -> Request:
        """The request of a turn."""
        begun = turn.start.text if turn.start is not None else ""
        text = self._opening + "".join(piece.draft.text for piece in pieces) + turn.lead + begun
        messages = (*self._messages, {"role": "assistant", "content": text}) if text else self._messages
        done = turn.start.count if turn.start is not None else 0
        return Request(
            messages=messages,
            max_tokens=max(turn.tokens - done, 1),
            stop=self._delimiters if turn.to_delimiter else (),
            seed=self.chat.seed,
            sample_index=1 + self._number,
            tags={"method": "speculative-thinking", "role": self.name},
            **self._drawing,
        )

    def draft(self, turn: Turn, reply: Reply) -> Draft:
        """The draft in a reply. An empty one ends the text."""
        self.counts.calls += 1
        self.counts.passes += 1
        self.counts.encoded += reply.usage.input - reply.usage.cached_input
        self.counts.drafted += reply.usage.output
        self.counts.usage.append(reply.usage)
        if reply.error is not None:
            return Draft(error=reply.error)
        text, paused = reply.text, False
        if turn.to_delimiter and reply.finish_reason == "stop" and text:
            # Servers that do not say what stopped them leave the delimiter out as the others do.
            stopped = reply.stopped_by if reply.stopped_by is not None else self._delimiters[0]
            paused = stopped in self._delimiters
            text += stopped if paused else ""
        begun = turn.start or Draft()
        whole = begun.text + text
        marks = self._marks(whole)
        ended = reply.finish_reason != "length" and not paused
        return Draft(whole, None, begun.count + reply.usage.output, marks, paused, ended)

    def write(self, pieces: Sequence[Piece], turn: Turn) -> Draft:
        """See Writer."""
        if turn.start is not None and (turn.start.ended or turn.start.count >= turn.tokens):
            return turn.start
        return self.draft(turn, self.chat([self.request(pieces, turn)])[0])

    def split(self, draft: Draft) -> tuple[Draft, Draft | None]:
        """See Writer. Tokens are shared out by characters."""
        if not draft.marks or draft.marks[0] == len(draft.text):
            return replace(draft, paused=bool(draft.marks)), None
        cut = draft.marks[0]
        head, rest = draft.text[:cut], draft.text[cut:]
        count = round(draft.count * cut / len(draft.text))
        return (
            Draft(head, None, count, (cut,), paused=True),
            Draft(rest, None, draft.count - count, self._marks(rest), ended=draft.ended),
        )

    def _marks(self, text: str) -> tuple[int, ...]:
        found = set()
        for mark in self._delimiters:
            at = text.find(mark)
            while at >= 0:
                found.add(at + len(mark))
                at = text.find(mark, at + 1)
        return tuple(sorted(found))


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every token the same id, whatever they are called."""
    return one is other or bool(one.get_vocab() == other.get_vocab())


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text, by the model's generation settings and its tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, (list, tuple)) else [ends]
    own = getattr(tokenizer, "eos_token_id", None)
    return {int(token) for token in (*listed, own) if token is not None}


def check_delimiters(tokenizer: Any, delimiters: Sequence[str], method: str) -> None:
    """Raise SubjectError for a delimiter that a tokenizer cannot write."""
    for delimiter in delimiters:
        ids = tokenizer(delimiter, add_special_tokens=False).input_ids
        again = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if delimiter not in again:
            raise SubjectError(
                f"{method} hands over after {delimiter!r}, which this {type(tokenizer).__name__} cannot write: name "
                "other delimiters, or set delimiter_tokens."
            )
