"""A small reasoning model writes; where it begins to reflect, verify or affirm, a larger one takes over for a while.

W. Yang et al., "Speculative thinking: enhancing small-model reasoning with large model guidance at inference time",
COLM 2025 (arXiv 2504.12329). `think` is the algorithm; it asks two writers for drafts and decides what is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria

from gratis.contract.attach import Attachment, Scope
from gratis.contract.card import Card
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.chat import Answer, Chat, ChatError, Format, Reply, Usage, read_answer, zero_shot
from gratis.subjects.chat.formats import format_of
from gratis.subjects.draft_reading import check_drops
from gratis.subjects.generate_door import Choice, check_generates, install_choice, put
from gratis.subjects.language import language_model
from gratis.subjects.opening import open as open_subject
from gratis.subjects.opening import tokenizer_of
from gratis.subjects.sampling_loop import Samples, perturbed
from gratis.subjects.writers import (
    ChatWriter,
    Draft,
    LocalWriter,
    Piece,
    Turn,
    Writer,
    check_delimiters,
    same_vocabulary,
)

SMALL, LARGE = "small", "large"


class SpeculativeThinking(Decoding):
    """Let a larger model write the few tokens after a paragraph break at which the small one begins to reflect.

    After every delimiter the small model drafts a few tokens. Where these hold a keyword, the larger model (`target`)
    drafts as many from the whole text so far and its draft is taken; behind a word of verification it writes on; after
    many negative ones it is asked to look for mistakes. It is no token-level speculative decoding: the text is drawn
    from neither model's distribution.

    It attaches to the small model, and `generate` is called as before; or to a `gratis.Chat` (a local model, or an
    endpoint that goes on from the beginning of an answer), which then answers so. The target is a model, a chat, or a
    name for `gratis.open`. Models of one vocabulary share tokens; others share text, and a target of another
    vocabulary then reads the prompt's plain text as a user's message.
    """

    card = Card(
        title="Speculative thinking: enhancing small-model reasoning with large model guidance at inference time",
        authors="W. Yang et al.",
        year=2025,
        seed=69,
        paper="arXiv 2504.12329",
        acts_on="language model",
        free_of=("training", "labels", "logits of the larger model"),
        summary="a larger model takes over for a few tokens where the small one begins to reflect",
        unchanged_when={
            "affirmation": (), "reflection": (), "verification": (), "begin": False, "not_reasoning": False,
        },
        examples={
            "affirmation": (), "reflection": (), "verification": (), "not_reasoning": True, "takeover_tokens": 5,
            "delimiters": (), "delimiter_tokens": (3, 5, 7, 11, 13, 17, 19, 23),
        },
        holds=("generate", "answers"),
        differs=(
            "A draft without keywords is kept as the small model's next tokens up to its next delimiter (the release "
            "draws them anew: reuse_probe=False). Each model keeps one cache, cut to what it shares with the text (the "
            "release copies caches, and may go on from one of a dropped draft). End tokens are looked at everywhere "
            "(the release compares a token with a string). The reasoning tag begins the answer of a chat instead of "
            "standing in the question."
        ),
        limits=(
            "Nothing is gained where the small model never writes the keywords (look at its report first), nor where "
            "the target is no better at the problem. Keywords are English. On endpoints without prefix caching every "
            "takeover reads the whole text again."
        ),
    )  # fmt: skip

    target: Any | None = param(
        None, help="what takes over: a name for gratis.open, a model or a chat; None: the model itself"
    )
    delimiters: tuple[str, ...] = param(("\n\n",), help="texts after which the target may take over")
    delimiter_tokens: tuple[int, ...] | None = param(None, help="token ids that are delimiters; need no tokenizer")
    affirmation: tuple[str, ...] = param(
        ("yeah", "yes", "final answer", "confident"), help="lower-case texts that count as positive"
    )
    reflection: tuple[str, ...] = param(
        ("wait", "alternatively", "hold on", "another"), help="lower-case texts that count as negative"
    )
    verification: tuple[str, ...] = param(
        ("verify", "think again", "recap", "check"), help="lower-case texts that count as negative and ask for more"
    )
    takeover_tokens: int = param(20, at_least=1, unit="tokens", help="length of a probe and of a takeover")
    verification_tokens: int = param(
        125, at_least=1, unit="tokens", help="that the target writes more behind a word of verification"
    )
    review_tokens: int = param(125, at_least=1, unit="tokens", help="of the first review after many negatives")
    more_review_tokens: int = param(25, at_least=0, unit="tokens", help="that each review is longer than the last")
    max_review_tokens: int = param(200, at_least=1, unit="tokens", help="longest review")
    negatives: int = param(15, at_least=1, help="negative takeovers until the first review")
    more_negatives: int = param(5, at_least=0, help="by which that number grows after each review")
    max_negatives: int = param(30, at_least=1, help="largest such number")
    review_opening: str = param(
        "Let me check whether there are some wrong steps:", help="sentence that the target's review goes on from"
    )
    begin: bool = param(False, help="let the target write the beginning, for small models that do not reason")
    begin_tokens: int = param(100, at_least=1, unit="tokens", help="length of that beginning")
    not_reasoning: bool = param(False, help="ask the target after every delimiter, keywords or not")
    choose_large: bool = param(True, help="always take the target's draft; otherwise only where the signs disagree")
    reuse_probe: bool = param(True, help="keep a draft without keywords; False draws anew, as the authors' code does")
    help_think_word: str | None = param(None, help="text put before every probe")
    skip_code: bool = param(False, help="do not take over within a code fence")
    answer_marker: str | None = param(None, help="text from which on nothing is taken over, such as \\boxed{")
    paragraph_tokens: int = param(
        1024, at_least=1, unit="tokens", help="longest piece that the small model is asked for"
    )
    failures: int = param(3, at_least=1, help="failed calls of the target, one after the other, until it is left alone")
    temperature: float = param(0.6, above=0, help="of both models, where the call does not say")
    top_p: float = param(0.95, above=0, at_most=1, help="probability mass drawn from, where the call does not say")
    top_k: int = param(50, at_least=0, unit="tokens", help="tokens drawn from, 0 for all, where the call does not say")
    instruction: str = param(
        "Please reason step by step, and put your final answer within \\boxed{}. ",
        help="text before a question that is put to a chat",
    )
    opening: str = param("<think>\n", help="text that the answer of a chat begins with")

    def check_parameters(self) -> None:
        if not self.delimiters and not self.delimiter_tokens:
            raise ParameterError(
                "SpeculativeThinking: delimiters is empty: name at least one, such as two line breaks."
            )
        for name in ("delimiters", "affirmation", "reflection", "verification"):
            if not all(getattr(self, name)):
                raise ParameterError(f"SpeculativeThinking: {name} holds an empty text, which is everywhere.")
        for name in ("affirmation", "reflection", "verification"):
            if any(word != word.lower() for word in getattr(self, name)):
                raise ParameterError(
                    f"SpeculativeThinking: {name} must be lower-case; texts are lowered before they are looked for."
                )
        if self.delimiter_tokens is not None and min(self.delimiter_tokens, default=0) < 0:
            raise ParameterError("SpeculativeThinking: delimiter_tokens must be token ids, 0 or above.")
        if self.max_review_tokens < self.review_tokens or self.max_negatives < self.negatives:
            raise ParameterError(
                "SpeculativeThinking: max_review_tokens and max_negatives must not be below review_tokens and negatives."
            )

    @property
    def reads_text(self) -> bool:
        """Whether a tokenizer is needed."""
        return bool(self.delimiters or self.affirmation or self.reflection or self.verification)

    def score(self, text: str) -> int:
        """Sign of a draft: 1 affirming, -1 reflecting or verifying (also where both are equally many), 0 neither."""
        found = text.lower()
        positive = sum(found.count(word) for word in self.affirmation)
        negative = sum(found.count(word) for word in (*self.reflection, *self.verification))
        return 0 if positive == negative == 0 else 1 if positive > negative else -1

    def check(self, subject: Any) -> None:
        if isinstance(subject, Chat):
            check_continues_answers(subject)
        else:
            check_generates(subject, "SpeculativeThinking")
            language_model(subject, "SpeculativeThinking")
            check_drops(subject, "SpeculativeThinking")
            if self.reads_text:
                check_delimiters(tokenizer_of(subject), self.delimiters, "SpeculativeThinking")
        target = self.target.subject if isinstance(self.target, Attachment) else self.target
        if target is None or isinstance(target, str):
            return
        if isinstance(target, Chat):
            check_continues_answers(target)
        else:
            check_generates(target, "The target of SpeculativeThinking")
            language_model(target, "The target of SpeculativeThinking")
            check_drops(target, "The target of SpeculativeThinking")
            check_delimiters(tokenizer_of(target), self.delimiters, "The target of SpeculativeThinking")

    def install(self, subject: Any, scope: Scope) -> Any:
        target = self._target(subject)
        if isinstance(subject, Chat):
            run = _Answers(self, subject, target)
            scope.set_attribute(subject, "answer_many", run.answer_many)
            return run.report
        return install_choice(
            subject,
            "SpeculativeThinking",
            scope,
            samples=1,
            sampling={"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k},
            loop=lambda seeds, greedy: ThinkingLoop(self, target, seeds[0], greedy),
            choose=lambda samples: Choice([0], samples.details),
        )

    def _target(self, subject: Any) -> Any:
        target = self.target.subject if isinstance(self.target, Attachment) else self.target
        if target is None:
            return subject
        if not isinstance(target, str):
            return target
        opened = open_subject(target)
        self.replace(target=opened).check(subject)
        return opened


def check_continues_answers(chat: Chat) -> None:
    """Raise SubjectError for a chat that cannot go on from the beginning of an answer."""
    if not chat.continues:
        raise SubjectError(
            "SpeculativeThinking needs a chat that goes on from the beginning of an answer: a local model, or "
            "gratis.Chat(address, model, continues='prefill' or 'completions'), as the endpoint can."
        )


class Thinking:
    """The text so far, and what happened."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.takeovers: list[dict[str, Any]] = []
        self.negatives = 0
        self.target_calls = self.failed_calls = 0
        self.probes = self.neutral = 0
        self.small_only: str | None = None
        """Why the target was left alone from some place on."""
        self.ended = False
        """Whether a writer ended the text, rather than a limit of length."""

    @property
    def text(self) -> str:
        """All that was committed."""
        return "".join(piece.draft.text for piece in self.pieces)

    @property
    def count(self) -> int:
        """Number of committed tokens."""
        return sum(piece.draft.count for piece in self.pieces)

    def tokens_of(self, author: str) -> int:
        """Committed tokens of one writer."""
        return sum(piece.draft.count for piece in self.pieces if piece.author == author)

    def commit(self, author: str, draft: Draft) -> bool:
        """Add a draft; returns whether the text ends with it."""
        if draft.count or draft.text:
            self.pieces.append(Piece(author, draft))
        self.ended = self.ended or draft.ended
        return draft.ended


def think(
    method: SpeculativeThinking, state: Thinking, split: Callable[[Draft], tuple[Draft, Draft | None]]
) -> Generator[Turn, Draft, None]:
    """The algorithm. Yields what a writer is asked for and is sent its draft; commits to `state`.

    `split` cuts a draft of the small model after its first delimiter. Ends when a writer ends the text, or no writer
    has room.
    """
    review, limit, failed = method.review_tokens, method.negatives, 0
    pending: Draft | None = None

    def ask(tokens: int, lead: str = "") -> Generator[Turn, Draft, Draft | None]:
        """The target's draft; None where it failed, cannot go on or was left alone."""
        nonlocal failed
        if state.small_only is not None:
            return None
        state.target_calls += 1
        draft = yield Turn(LARGE, tokens, lead=lead)
        if draft.full:
            state.small_only = f"the target stopped: {draft.error}"
            return None
        if draft.error is not None:
            failed += 1
            state.failed_calls += 1
            if failed >= method.failures:
                state.small_only = f"the target failed {failed} times in a row, at last: {draft.error}"
            return None
        failed = 0
        return draft if draft.count or draft.text else Draft(ended=True)

    def take(kind: str, draft: Draft, asked: int, beside: str, lead: str = "") -> bool:
        state.takeovers.append(
            {
                "at": state.count,
                "kind": kind,
                "asked": asked,
                "tokens": draft.count,
                "text": draft.text,
                "beside": beside,
            }
        )
        if lead:
            state.commit("", Draft(lead))
        return state.commit(LARGE, draft)

    if method.begin:
        draft = yield from ask(method.begin_tokens)
        if draft is not None and take("begin", draft, method.begin_tokens, ""):
            return
    while True:
        # The small model writes up to a delimiter, first what it has drafted already.
        if pending is not None and pending.marks:
            head, pending = split(pending)
            written = head
        elif pending is not None and pending.ended:
            written, pending = pending, None
        else:
            written = yield Turn(SMALL, method.paragraph_tokens, to_delimiter=True, start=pending)
            pending = None
        if written.full:
            rest = yield from ask(method.paragraph_tokens)
            while rest is not None:
                if take("window", rest, method.paragraph_tokens, ""):
                    return
                rest = yield from ask(method.paragraph_tokens)
            return
        if written.error is not None:
            raise ChatError(f"The small model did not answer: {written.error.rstrip('.')}.")
        if not (written.count or written.text):
            state.ended = True
            return
        if state.commit(SMALL, written):
            return
        if not written.paused or state.small_only is not None or _spared(method, state.text):
            continue
        # Too many negative takeovers: the target looks for mistakes.
        if state.negatives >= limit:
            draft = yield from ask(review, lead=method.review_opening)
            if draft is not None:
                pending = None
                ended = take("review", draft, review, "", lead=method.review_opening)
                state.negatives = 0
                review = min(review + method.more_review_tokens, method.max_review_tokens)
                limit = min(limit + method.more_negatives, method.max_negatives)
                if ended:
                    return
                continue
        # The small model drafts what it would write next.
        lead = method.help_think_word or ""
        state.probes += 1
        probe = yield Turn(SMALL, method.takeover_tokens, start=None if lead else pending, lead=lead)
        pending = None
        if probe.full or probe.error is not None:
            continue
        sign = method.score(probe.text)
        if sign == 0 and not method.not_reasoning:
            state.neutral += 1
            # Behind a word that was put in, it is not what the small model would have written.
            pending = probe if method.reuse_probe and not lead else None
            continue
        draft = yield from ask(method.takeover_tokens, lead=lead)
        other = 0 if draft is None else method.score(draft.text)
        # The signs disagree: one is negative and the other is not.
        if draft is not None and (method.choose_large or (sign < 0 <= other) or (sign > 0 > other)):
            kept, ended = draft, take("takeover", draft, method.takeover_tokens, probe.text, lead)
        else:
            if lead:
                state.commit("", Draft(lead))
            kept, ended = probe, state.commit(SMALL, probe)
        if method.score(kept.text) < 0:
            state.negatives += 1
        if ended:
            return
        if any(word in kept.text.lower() for word in method.verification) and draft is not None:
            more = yield from ask(method.verification_tokens)
            if more is not None and take("verification", more, method.verification_tokens, ""):
                return


def _spared(method: SpeculativeThinking, text: str) -> bool:
    """Whether nothing is taken over here: within a code fence, or after the answer's mark."""
    if method.skip_code and text.count("```") % 2:
        return True
    return method.answer_marker is not None and method.answer_marker in text


class ThinkingLoop:
    """A `custom_generate` for one prompt: the small model's own generate, with the target beside it.

    The small model's tokens are drawn from `seed` as Sampling draws them; the target has a seed of its own.
    """

    def __init__(self, method: SpeculativeThinking, target: Any, seed: int, greedy: bool) -> None:
        self.method, self.target, self.seed, self.greedy = method, target, seed, greedy
        self.committed: Tensor | None = None

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
        config = generation_config
        if config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states:
            raise InputError(
                "SpeculativeThinking keeps no scores, logits, attentions or hidden states: leave them out."
            )
        text_only = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
        given = {n: v for n, v in model_kwargs.items() if v is not None and not isinstance(v, (bool, int))}
        # Some models hand themselves an empty dict for the pictures and sounds that a text prompt has none of.
        others = {n for n, v in given.items() if not (isinstance(v, dict) and not v)} - text_only
        if others or not input_ids.shape[1]:
            raise InputError(
                f"SpeculativeThinking reads a prompt of tokens only: leave out {', '.join(sorted(others))}."
            )
        method, start = self.method, input_ids.shape[1]
        tokenizer = tokenizer_of(model) if method.reads_text else None
        ids = input_ids[0].tolist()

        def finished(text: Tensor) -> bool:
            return bool(stopping_criteria(text.to(input_ids.device), None).all())

        small = LocalWriter(
            SMALL, model, ids, tokenizer=tokenizer, draw=self._draws(logits_processor, self.seed),
            delimiters=method.delimiters, delimiter_tokens=method.delimiter_tokens or (), finished=finished,
        )  # fmt: skip
        large = self._large(model, tokenizer, ids, logits_processor, finished, small)
        writers: dict[str, Writer] = {SMALL: small, LARGE: large}
        state = Thinking()
        machine = think(method, state, small.split)
        self.committed, seen, draft, over = input_ids, 0, None, False
        while not over:
            try:
                turn = machine.send(draft) if draft is not None else next(machine)
            except StopIteration:
                turn = None
            for place in range(seen, len(state.pieces)):
                seen = place + 1
                text = input_ids.new_tensor([small.encode(state.pieces[:seen])])
                if state.pieces[place].author not in small.shares:
                    text, over = self._cut(text, finished)
                new = text[0, self.committed.shape[1] :]
                if streamer is not None and len(new):
                    put(streamer, new.cpu(), "" if state.pieces[place].author == SMALL else "target")
                self.committed = text
                if over:
                    break
            if turn is None or over:
                break
            draft = writers[turn.writer].write(state.pieces, turn)
        if streamer is not None:
            streamer.end()
        return self._samples(model, start, stopping_criteria, generation_config, state, small, large)

    def _draws(self, processors: Any, seed: int) -> Callable[[Tensor, Tensor], int]:
        """What chooses a token from logits: the likeliest, or a draw of its own seed."""
        generators: list[torch.Generator] = []

        def draw(ids: Tensor, logits: Tensor) -> int:
            scores = processors(ids, logits)
            if not bool(scores.isfinite().any()):
                raise InputError(
                    "The model's logits are not finite, or every token was ruled out: load it in float32 or bfloat16, "
                    "and look at the logits processors."
                )
            if not generators:
                generators.append(torch.Generator(device=scores.device).manual_seed(seed))
            return int((scores if self.greedy else perturbed(scores, generators)).argmax(-1))

        return draw

    def _large(
        self, model: Any, tokenizer: Any, ids: list[int], processors: Any, finished: Any, small: LocalWriter
    ) -> Any:
        """The target as a writer: of the same tokens where it has the same vocabulary, else of text."""
        method, target = self.method, self.target
        draw = self._draws(processors, _seed_of_target(self.seed))
        if target is not model and tokenizer is None:
            tokenizer = tokenizer_of(model)
        if target is model or (not isinstance(target, Chat) and same_vocabulary(tokenizer, tokenizer_of(target))):
            small.shares.add(LARGE)
            return LocalWriter(
                LARGE, target, ids, tokenizer=tokenizer, draw=draw, delimiters=method.delimiters,
                delimiter_tokens=method.delimiter_tokens or (), finished=finished, shares=(SMALL,),
            )  # fmt: skip
        if small.tokenizer is None:
            raise InputError(
                "SpeculativeThinking hands text to a target of another vocabulary: name delimiters as text."
            )
        messages = [{"role": "user", "content": tokenizer.decode(ids, skip_special_tokens=True)}]
        if isinstance(target, Chat):
            drawing: dict[str, Any] = {"temperature": 0.0 if self.greedy else method.temperature, "top_p": method.top_p}
            return ChatWriter(LARGE, target, messages, delimiters=method.delimiters, **drawing)
        unfit = [type(one).__name__ for one in processors if type(one).__name__ not in VOCABULARY_FREE]
        if unfit:
            raise InputError(
                f"The target's vocabulary differs, and {unfit[0]} is made for the small model's tokens: leave it out."
            )
        own = tokenizer_of(target)
        return LocalWriter(
            LARGE, target, rendered(own, messages), tokenizer=own, draw=draw, delimiters=method.delimiters
        )

    def _cut(self, text: Tensor, finished: Callable[[Tensor], bool]) -> tuple[Tensor, bool]:
        """The text up to where the call's own criteria end it, and whether they do: of what was not written here."""
        assert self.committed is not None
        for end in range(self.committed.shape[1] + 1, text.shape[1] + 1):
            if finished(text[:, :end]):
                return text[:, :end], True
        return text, False

    def _samples(
        self, model: Any, start: int, criteria: Any, config: Any, state: Thinking, small: LocalWriter, large: Any
    ) -> Samples:
        output: Any = self.committed
        assert self.committed is not None
        length = self.committed.shape[1] - start
        if config.return_dict_in_generate:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            output = GenerateDecoderOnlyOutput(sequences=self.committed)  # type: ignore[arg-type]
        limits = [one for one in criteria if isinstance(one, (MaxLengthCriteria, MaxTimeCriteria))]
        itself = [one for one in criteria if not isinstance(one, (MaxLengthCriteria, MaxTimeCriteria))]
        ended = state.ended and not any(bool(one(self.committed, None).all()) for one in limits)
        ended = ended or any(bool(one(self.committed, None).all()) for one in itself)
        pad = config._pad_token_tensor
        drafted = small.counts.drafted + large.counts.drafted
        return Samples(
            output=output,
            start=start,
            lengths=[length],
            truncated=[not ended],
            statistics=None,
            passes=small.counts.passes + large.counts.passes,
            encoded=start * (2 if isinstance(large, LocalWriter) else 1),
            pad=None if pad is None else int(pad),
            discarded=max(drafted - state.tokens_of(SMALL) - state.tokens_of(LARGE), 0),
            details=_details(state, small, large),
        )


VOCABULARY_FREE = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor",
    "InfNanRemoveLogitsProcessor", "LogitNormalization",
}  # fmt: skip
"""Logits processors that mean the same whatever the tokens are."""


def _details(state: Thinking, small: Any, large: Any) -> dict[str, Any]:
    target = state.tokens_of(LARGE)
    return {
        "takeovers": state.takeovers,
        "probes": state.probes,
        "neutral_probes": state.neutral,
        "negatives": state.negatives,
        "target_calls": state.target_calls,
        "failed_calls": state.failed_calls,
        "target_tokens": target,
        "target_share": target / max(state.count, 1),
        "small_only": state.small_only,
        "encoded": {SMALL: small.counts.encoded, LARGE: large.counts.encoded},
        "drafted": {SMALL: small.counts.drafted, LARGE: large.counts.drafted},
        "places": _places(state, small),
    }


def _places(state: Thinking, small: LocalWriter) -> list[list[Any]]:
    """[first, last + 1, kind] of what the target wrote, in tokens of the response."""
    small.encode(state.pieces)
    kinds = iter(one["kind"] for one in state.takeovers if one["tokens"] or one["text"])
    begin = small.bounds[0]
    spans = zip(small.bounds[:-1], small.bounds[1:], state.pieces, strict=True)
    return [[first - begin, end - begin, next(kinds)] for first, end, piece in spans if piece.author == LARGE]


def _seed_of_target(seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} target".encode()).digest()[:8]) % 2**63


def rendered(tokenizer: Any, messages: Sequence[dict[str, str]], opening: str = "") -> list[int]:
    """Token ids of a conversation that the model is to answer, by its chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text + opening, add_special_tokens=False, verbose=False).input_ids)
    text = "\n".join(message["content"] for message in messages)
    return list(tokenizer(text + "\n" + opening, verbose=False).input_ids)


class _Answers:
    """Questions answered by two writers over a chat; all questions of a call go on side by side."""

    def __init__(self, method: SpeculativeThinking, chat: Chat, target: Any) -> None:
        self._method, self._chat, self._target = method, chat, target
        self._totals: dict[str, Any] = {
            "questions": 0, "takeovers": 0, "target_calls": 0, "failed_calls": 0, "tokens": 0, "target_tokens": 0,
            "small_only": 0,
        }  # fmt: skip
        self._last: dict[str, Any] = {}

    def report(self) -> dict[str, Any]:
        tokens = max(self._totals["tokens"], 1)
        return {**self._totals, "target_share": self._totals["target_tokens"] / tokens, **self._last}

    def answer_many(
        self, questions: Sequence[Any], kind: str | Format = "text", *, max_tokens: int = 800
    ) -> list[Answer]:
        """One answer per question. Raises ChatError where the small model gives none at all."""
        form = format_of(kind)
        items = [form.item(question) for question in questions]
        threads = [
            _Thread(self._method, self._chat, self._target, self._messages(form, item), number, max_tokens)
            for number, item in enumerate(items)
        ]
        active = threads
        while active:
            waiting = [thread for thread in active if isinstance(thread.writer, ChatWriter)]
            for chat in {id(t.writer.chat): t.writer.chat for t in waiting}.values():
                asked = [thread for thread in waiting if thread.writer.chat is chat]
                replies = chat([t.writer.request(t.state.pieces, t.turn) for t in asked])
                for thread, reply in zip(asked, replies, strict=True):
                    thread.go_on(thread.writer.draft(thread.turn, reply))
            for thread in active:
                if thread not in waiting:
                    thread.go_on(thread.writer.write(thread.state.pieces, thread.turn))
            active = [thread for thread in active if thread.turn is not None]
        self._last = {"takeovers_of_last_call": [thread.state.takeovers for thread in threads]}
        return [self._answer(form, item, thread) for item, thread in zip(items, threads, strict=True)]

    def _messages(self, form: Format, item: Any) -> list[dict[str, str]]:
        messages = [dict(message) for message in zero_shot(form, item, 1, self._chat.seed).messages]
        messages[-1]["content"] = self._method.instruction + messages[-1]["content"]
        return messages

    def _answer(self, form: Format, item: Any, thread: _Thread) -> Answer:
        state = thread.state
        for name, value in (
            ("questions", 1), ("takeovers", len(state.takeovers)), ("target_calls", state.target_calls),
            ("failed_calls", state.failed_calls), ("tokens", state.count), ("target_tokens", state.tokens_of(LARGE)),
            ("small_only", int(state.small_only is not None)),
        ):  # fmt: skip
            self._totals[name] += value
        if thread.failure is not None and not state.pieces:
            raise ChatError(thread.failure)
        reply = Reply(text=state.text, finish_reason="stop" if state.ended else "length", usage=thread.usage())
        answer = read_answer(form, item, reply)
        answer.fallback = thread.failure or state.small_only
        return answer


class _Thread:
    """One question on its way."""

    def __init__(
        self,
        method: SpeculativeThinking,
        chat: Chat,
        target: Any,
        messages: list[dict[str, str]],
        number: int,
        limit: int,
    ) -> None:
        self.state = Thinking()
        self.failure: str | None = None
        """Why the small model did not go on."""
        self._limit = limit
        drawing = {"temperature": method.temperature, "top_p": method.top_p}
        seed = chat.seed + number
        small = self._writer(SMALL, method, chat, messages, number, drawing, seed)
        large = small if target is chat else self._writer(LARGE, method, target, messages, number, drawing, seed + 1)
        for one, other in ((small, large), (large, small)):
            local = isinstance(one, LocalWriter) and isinstance(other, LocalWriter)
            if local and same_vocabulary(one.tokenizer, other.tokenizer):
                one.shares |= {SMALL, LARGE}
        self._writers: dict[str, Any] = {SMALL: small, LARGE: large}
        self._machine = think(method, self.state, small.split)
        self.turn: Any = next(self._machine)
        self._limit_turn()

    @staticmethod
    def _writer(
        name: str, method: SpeculativeThinking, subject: Any, messages: list[dict[str, str]], number: int,
        drawing: dict[str, Any], seed: int,
    ) -> Any:  # fmt: skip
        model = subject.backend.live if isinstance(subject, Chat) and hasattr(subject.backend, "live") else subject
        if isinstance(model, Chat):
            return ChatWriter(
                name, model, messages, delimiters=method.delimiters, opening=method.opening, number=number, **drawing
            )
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        tokenizer = tokenizer_of(model)
        processors = LogitsProcessorList([TemperatureLogitsWarper(method.temperature)])
        if method.top_k:
            processors.append(TopKLogitsWarper(method.top_k))
        if method.top_p < 1:
            processors.append(TopPLogitsWarper(method.top_p))
        return LocalWriter(
            name, model, rendered(tokenizer, messages, method.opening), tokenizer=tokenizer,
            draw=ThinkingLoop(method, None, seed, False)._draws(processors, seed), delimiters=method.delimiters,
        )  # fmt: skip

    @property
    def writer(self) -> Any:
        """Who is asked now."""
        return self._writers[self.turn.writer]

    def go_on(self, draft: Draft) -> None:
        """Take the draft that was asked for; `turn` is what is asked next, None at the end."""
        try:
            self.turn = self._machine.send(draft)
        except StopIteration:
            self.turn = None
        except ChatError as error:
            self.turn, self.failure = None, str(error)
        self._limit_turn()

    def _limit_turn(self) -> None:
        if self.turn is None:
            return
        room = self._limit - self.state.count
        if room < 1:
            self.turn = None
        elif self.turn.tokens > room:
            self.turn = Turn(self.turn.writer, room, self.turn.to_delimiter, self.turn.start, self.turn.lead)

    def usage(self) -> Usage:
        """Tokens read and written by both."""
        total = Usage()
        for writer in {id(w): w for w in self._writers.values()}.values():
            total.output += writer.counts.drafted
            total.input += sum(one.input for one in writer.counts.usage) or writer.counts.encoded
        return total
