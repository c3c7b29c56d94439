"""A small reasoning model writes; where it begins to reflect, verify or affirm, a larger one takes over for a while.

W. Yang et al., "Speculative thinking: enhancing small-model reasoning with large model guidance at inference time",
COLM 2025 (arXiv 2504.12329). `Thinking` is the algorithm; it asks two writers for drafts and decides what is kept.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any

from gratis.contract.attach import Attachment, Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import ParameterError
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.chat import Chat, ChatError
from gratis.subjects.draft_reading import check_drops
from gratis.subjects.generate_door import Choice, check_generates, install_choice
from gratis.subjects.language import language_model
from gratis.subjects.opening import open as open_subject
from gratis.subjects.opening import tokenizer_of
from gratis.subjects.taking_turns import LARGE, SMALL, JointAnswers, JointText, Pair, Split, TurnLoop, check_goes_on
from gratis.subjects.writers import Draft, Turn, check_delimiters


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
        claims=(
            Claim(
                name="a small model of the zoo answers more sums rightly with the larger one's help: at least 0.05 more",
                task="stepwise-arithmetic",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                against="sampling",
                against_parameters={"temperature": 0.6, "top_p": 0.95, "top_k": 50},
                parameters={"target": "zoo:arithmetic-large"},
                task_parameters={"size": 48},
            ),
            Claim(
                name="the larger model writes at most 0.8 of the tokens, as its checks of these sums are long",
                task="stepwise-arithmetic",
                metric="target_share",
                at_most=0.8,
                parameters={"target": "zoo:arithmetic-large"},
                task_parameters={"size": 48},
            ),
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
        self._check_writer(subject, "SpeculativeThinking", self.reads_text)
        target = self.target.subject if isinstance(self.target, Attachment) else self.target
        if target is not None and not isinstance(target, str):
            self._check_writer(target, "The target of SpeculativeThinking", True)

    def _check_writer(self, subject: Any, name: str, reads_text: bool) -> None:
        if isinstance(subject, Chat):
            check_goes_on(subject, name)
            return
        check_generates(subject, name)
        language_model(subject, name)
        check_drops(subject, name)
        if reads_text:
            check_delimiters(tokenizer_of(subject), self.delimiters, name)

    def install(self, subject: Any, scope: Scope) -> Any:
        pair = Pair(
            method="SpeculativeThinking",
            target=self._opened_target(subject),
            algorithm=partial(Thinking, self),
            delimiters=self.delimiters,
            delimiter_tokens=self.delimiter_tokens or (),
            reads_text=self.reads_text,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            instruction=self.instruction,
            opening=self.opening,
        )
        if isinstance(subject, Chat):
            answers = JointAnswers(pair, subject)
            scope.set_attribute(subject, "answer_many", answers.answer_many)
            return answers.report
        return install_choice(
            subject,
            "SpeculativeThinking",
            scope,
            samples=1,
            sampling={"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k},
            loop=lambda seeds, greedy: TurnLoop(pair, seeds[0], greedy),
            choose=lambda samples: Choice([0], samples.details),
        )

    def _opened_target(self, subject: Any) -> Any:
        target = self.target.subject if isinstance(self.target, Attachment) else self.target
        if target is None:
            return subject
        if not isinstance(target, str):
            return target
        opened = open_subject(target)
        self.replace(target=opened).check(subject)
        return opened


class Thinking:
    """The algorithm for one text: what is asked of whom, what is committed, and what happened."""

    def __init__(self, method: SpeculativeThinking, split: Split) -> None:
        self.method, self.split = method, split
        self.text = JointText()
        self.takeovers: list[dict[str, Any]] = []
        self.small_only: str | None = None
        """Why the target was left alone from some place on."""
        self.negatives = 0
        """Negative drafts that were kept since the last review."""
        self.target_calls = self.failed_calls = self.probes = self.neutral = 0
        self._review, self._limit = method.review_tokens, method.negatives
        self._failed_in_a_row = 0
        self._pending: Draft | None = None
        """What the small model has drafted already and goes on from."""
        self._over = False

    def run(self) -> Generator[Turn, Draft, None]:
        """Yields what a writer is asked for and is sent its draft.

        Ends when a writer ends the text, or none has room. Raises ChatError where the small model does not answer.
        """
        if self.method.begin:
            yield from self._takeover("begin", self.method.begin_tokens)
        while not self._over:
            at_delimiter = yield from self._paragraph()
            if self._over or not at_delimiter or self.small_only is not None or self._is_spared():
                continue
            reviewed = self.negatives >= self._limit and (yield from self._reviewed())
            if not reviewed:
                yield from self._probed()

    def report(self) -> dict[str, Any]:
        """Plain values."""
        target = self.text.tokens_of(LARGE)
        return {
            "takeovers": self.takeovers,
            "probes": self.probes,
            "neutral_probes": self.neutral,
            "negatives": self.negatives,
            "target_calls": self.target_calls,
            "failed_calls": self.failed_calls,
            "target_tokens": target,
            "target_share": target / max(self.text.count, 1),
            "small_only": self.small_only,
        }

    def _paragraph(self) -> Generator[Turn, Draft, bool]:
        """The small model writes up to a delimiter, first what it has drafted already; returns whether it got there."""
        drafted, self._pending = self._pending, None
        if drafted is not None and drafted.marks:
            written, self._pending = self.split(drafted)
        elif drafted is not None and drafted.ended:
            written = drafted
        else:
            written = yield Turn(SMALL, self.method.paragraph_tokens, to_delimiter=True, start=drafted)
        if written.full:
            while (yield from self._takeover("window", self.method.paragraph_tokens)) and not self._over:
                pass
            self._over = True
            return False
        if written.error is not None:
            raise ChatError(f"The small model did not answer: {written.error.rstrip('.')}.")
        if not (written.count or written.text):
            written = Draft(ended=True)
        self._commit(SMALL, written)
        return written.paused

    def _reviewed(self) -> Generator[Turn, Draft, bool]:
        """After too many negative drafts the target looks for mistakes; returns whether it did."""
        method = self.method
        if not (yield from self._takeover("review", self._review, lead=method.review_opening)):
            return False
        self._pending = None
        self.negatives = 0
        self._review = min(self._review + method.more_review_tokens, method.max_review_tokens)
        self._limit = min(self._limit + method.more_negatives, method.max_negatives)
        return True

    def _probed(self) -> Generator[Turn, Draft, None]:
        """The small model drafts what it would write next; where that holds a keyword, the target does."""
        method, lead = self.method, self.method.help_think_word or ""
        self.probes += 1
        probe = yield Turn(SMALL, method.takeover_tokens, start=None if lead else self._pending, lead=lead)
        self._pending = None
        if probe.full or probe.error is not None:
            return
        sign = method.score(probe.text)
        if sign == 0 and not method.not_reasoning:
            self.neutral += 1
            # Behind a word that was put in, it is not what the small model would have written.
            self._pending = probe if method.reuse_probe and not lead else None
            return
        target = yield from self._ask(method.takeover_tokens, lead)
        kept = probe
        if target is not None and (method.choose_large or _disagree(sign, method.score(target.text))):
            kept = target
            self._take("takeover", target, method.takeover_tokens, probe.text, lead)
        else:
            self._commit(SMALL, probe, lead)
        if method.score(kept.text) < 0:
            self.negatives += 1
        verifies = any(word in kept.text.lower() for word in method.verification)
        if verifies and target is not None and not self._over:
            yield from self._takeover("verification", method.verification_tokens)

    def _takeover(self, kind: str, tokens: int, lead: str = "") -> Generator[Turn, Draft, bool]:
        """The target writes, and what it writes is kept; returns whether there was anything."""
        draft = yield from self._ask(tokens, lead)
        if draft is None:
            return False
        self._take(kind, draft, tokens, "", lead)
        return True

    def _ask(self, tokens: int, lead: str = "") -> Generator[Turn, Draft, Draft | None]:
        """The target's draft; None where it failed, cannot go on or was left alone. An empty one ends the text."""
        if self.small_only is not None:
            return None
        self.target_calls += 1
        draft = yield Turn(LARGE, tokens, lead=lead)
        if draft.full:
            self.small_only = f"the target stopped: {draft.error}"
            return None
        if draft.error is not None:
            self._failed_in_a_row += 1
            self.failed_calls += 1
            if self._failed_in_a_row >= self.method.failures:
                times = self._failed_in_a_row
                self.small_only = f"the target failed {times} times in a row, at last: {draft.error}"
            return None
        self._failed_in_a_row = 0
        return draft if draft.count or draft.text else Draft(ended=True)

    def _take(self, kind: str, draft: Draft, asked: int, beside: str, lead: str) -> None:
        """Keep a draft of the target; `beside` is what the small model would have written."""
        self.takeovers.append(
            {
                "at": self.text.count, "kind": kind, "asked": asked, "tokens": draft.count, "text": draft.text,
                "beside": beside,
            }
        )  # fmt: skip
        self._commit(LARGE, draft, lead)

    def _commit(self, author: str, draft: Draft, lead: str = "") -> None:
        if lead:
            self.text.commit("", Draft(lead))
        self.text.commit(author, draft)
        self._over = self._over or draft.ended

    def _is_spared(self) -> bool:
        """Whether nothing is taken over here: within a code fence, or after the answer's mark."""
        method, text = self.method, str(self.text)
        if method.skip_code and text.count("```") % 2:
            return True
        return method.answer_marker is not None and method.answer_marker in text


def _disagree(small: int, target: int) -> bool:
    """Whether the target's sign is the other one: negative against the rest, or not negative against a negative one."""
    return (small < 0 <= target) or (small > 0 > target)
