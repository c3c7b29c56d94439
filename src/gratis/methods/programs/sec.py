"""Let the model write its own few-shot examples for each question, then answer with them.

R. Li, G. Wang and J. Li, "Are Human-generated Demonstrations Necessary for In-context Learning?", ICLR 2024.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import GratisWarning, ParameterError, SubjectError
from gratis.contract.method import Program
from gratis.contract.parameters import param
from gratis.subjects.chat import Answer, Chat, ChatError, Format, Request, Usage, read_answer, solving
from gratis.subjects.chat.formats import format_of, integers, normal_latex

ASKED = 5
"""Demonstrations that the instruction always asks for."""
PARAPHRASES = tuple(f"{please}{verb}" for please in ("", "please ") for verb in ("generate", "create", "output"))
"""Openings of the six paraphrases of the instruction."""
LONG = 20_000
"""Tokens that may be written for one question, from which on a local model's user is warned."""

Demo = dict[str, Any]


class SEC(Program):
    """Few-shot quality without collecting examples: for every question the model first writes similar ones.

    Two separate requests: one that writes demonstrations, and one that answers with them as chat turns.
    """

    card = Card(
        title="Are Human-generated Demonstrations Necessary for In-context Learning?",
        authors="Li, Wang, Li",
        year=2024,
        seed=98,
        paper="ICLR 2024, arXiv:2309.14681",
        acts_on="chat",
        free_of=("training", "labelled examples", "hand-written examples"),
        summary="few-shot answers with examples that the model writes itself",
        unchanged_when={"shots": 0},
        examples={"shots": 2},
        holds=("answers",),
        differs=(
            "Demonstrations that copy the question are dropped; where none are valid after all attempts, it falls back to "
            "answers without rationale and then to no examples, and says so; an answer-only demonstration shows the answer "
            "(the released code shows the solution: compatible=True)."
        ),
        limits=(
            "Needs a model that writes mostly correct examples; doubles the latency and multiplies the output tokens. Where "
            "good human examples exist they are about as good."
        ),
        claims=(
            Claim(
                name="where a model writes no valid examples, as a 135M one, no answer gets worse than without",
                task="sentiment",
                metric="accuracy",
                compare="difference",
                at_least=0.0,
                parameters={"shots": 2, "max_attempts": 1, "greedy_attempts": 1, "generation_tokens": 160},
                task_parameters={"snippets": 8},
            ),
            Claim(
                name="a question costs no more requests than the attempts allowed, here one",
                task="sentiment",
                metric="calls_per_question",
                compare="difference",
                at_most=1.0,
                parameters={"shots": 2, "max_attempts": 1, "greedy_attempts": 1, "generation_tokens": 160},
                task_parameters={"snippets": 8},
            ),
        ),
    )

    shots: int = param(4, at_least=0, at_most=ASKED, help="demonstrations used; 0 is the plain question")
    mode: Literal["vanilla", "cot"] = param("vanilla", help="answers only, or rationale then answer")
    max_attempts: int = param(24, above=0, help="attempts to get valid demonstrations")
    paraphrases: int = param(6, above=0, at_most=len(PARAPHRASES), help="wordings of the instruction, tried in turn")
    greedy_attempts: int = param(6, at_least=0, help="attempts at temperature 0, before those at temperature 1")
    generation_tokens: int = param(3000, above=0, unit="tokens", help="longest reply with demonstrations")
    share: bool = param(False, help="use the demonstrations of the first question for all questions of one call")
    compatible: bool = param(False, help="show solutions behind 'The answer is', as the released code does for numbers")

    def check(self, subject: Any) -> None:
        if not isinstance(subject, Chat):
            raise SubjectError(
                f"SEC acts on a gratis.Chat, not on a {type(subject).__name__}: open a language model as chat:NAME, or put "
                "it in gratis.Chat(model)."
            )

    def install(self, subject: Chat, scope: Scope) -> Callable[[], dict[str, Any]]:
        most = self.max_attempts * self.generation_tokens
        if self.shots and most > LONG and getattr(subject.backend, "runs_here", False):
            warnings.warn(
                f"SEC: a model that writes no valid examples writes up to {most:,} tokens for every question, which can "
                "take hours on a model that runs here; max_attempts=2 and generation_tokens=400 make a quick try.",
                GratisWarning,
                stacklevel=2,
            )
        run = _Run(self, subject)
        scope.set_attribute(subject, "answer_many", run.answer_many)
        return run.report


class _Run:
    """One attachment: its chat, and what happened."""

    def __init__(self, method: SEC, chat: Chat) -> None:
        self._method, self._chat = method, chat
        self._plain = chat.answer_many
        self._seen = {"questions": 0, "generation_calls": 0, "valid": 0, "fallbacks": 0}

    def report(self) -> dict[str, Any]:
        return dict(self._seen)

    def answer_many(
        self, questions: Sequence[Any], kind: str | Format = "text", *, max_tokens: int = 800
    ) -> list[Answer]:
        """Demonstrations for every question in batches, then all answers in one batch."""
        if self._method.shots == 0:
            return self._plain(questions, kind, max_tokens=max_tokens)
        form = format_of(kind)
        if form.name == "code" and self._method.mode == "cot":
            raise ParameterError("SEC: code has no rationales; use mode='vanilla'.")
        items = [form.item(question) for question in questions]
        writers = items[:1] if self._method.share else items
        written = self._write(form, writers, self._method.mode)
        failed = [n for n, demos in enumerate(written) if not demos.valid]
        if failed and self._method.mode == "cot":
            for n, demos in zip(failed, self._write(form, [writers[n] for n in failed], "vanilla"), strict=True):
                demos.attempts += written[n].attempts
                demos.usage = written[n].usage + demos.usage
                written[n] = demos
        if self._method.share:
            written = written * len(items)
        requests = [
            solving(form, [self._turn(form, d, w.mode) for d in w.demos], item, max_tokens, self._chat.seed)
            for item, w in zip(items, written, strict=True)
        ]
        replies = self._chat(requests)
        return [
            self._answer(read_answer(form, item, reply), w)
            for item, reply, w in zip(items, replies, written, strict=True)
        ]

    def _answer(self, answer: Answer, written: _Written) -> Answer:
        self._seen["questions"] += 1
        self._seen["valid"] += written.valid
        fallback: str | None = "zero-shot"
        if written.valid:
            fallback = None if written.mode == self._method.mode else written.mode
        self._seen["fallbacks"] += fallback is not None
        answer.demos, answer.attempts, answer.valid = written.demos, written.attempts, written.valid
        answer.fallback = fallback
        answer.usage = _total([*written.usage, answer.usage])
        return answer

    def _write(self, form: Format, items: Sequence[Mapping[str, Any]], mode: str) -> list[_Written]:
        """Attempts over all questions at once: paraphrases at temperature 0, then sampled ones, until valid."""
        method = self._method
        written = [_Written(mode) for _ in items]
        for attempt in range(method.max_attempts):
            open_ = [n for n, w in enumerate(written) if not w.valid]
            if not open_:
                break
            requests = [self._request(form, items[n], mode, attempt, n) for n in open_]
            for n, reply in zip(open_, self._chat(requests), strict=True):
                self._seen["generation_calls"] += 1
                written[n].attempts += 1
                written[n].usage.append(reply.usage)
                if reply.error is not None:
                    raise ChatError(f"SEC: the chat did not write examples: {reply.error.rstrip('.')}.")
                demos = parse(form, reply.text, mode, items[n])
                if len(demos) >= method.shots:
                    written[n].demos, written[n].valid = demos[: method.shots], True
        return written

    def _request(self, form: Format, item: Mapping[str, Any], mode: str, attempt: int, number: int) -> Request:
        greedy = attempt < self._method.greedy_attempts
        return Request(
            messages=(
                {"role": "system", "content": "You are a helpful assistant that writes few-shot examples."},
                {"role": "user", "content": instruction(form, item, mode, attempt % self._method.paraphrases)},
            ),
            temperature=0.0 if greedy else 1.0,
            max_tokens=self._method.generation_tokens,
            seed=self._chat.seed,
            sample_index=attempt,
            tags={"method": "sec", "role": "demonstrations", "item": number, "attempt": attempt},
        )

    def _turn(self, form: Format, demo: Demo, mode: str) -> tuple[str, str]:
        return render_question(form, demo), render_answer(form, demo, mode, self._method.compatible)


class _Written:
    """Demonstrations for one question."""

    def __init__(self, mode: str) -> None:
        self.mode, self.valid, self.attempts = mode, False, 0
        self.demos: list[Demo] = []
        self.usage: list[Usage] = []


def fields(form: Format, mode: str) -> tuple[str, ...]:
    """Parts of one demonstration, in the order in which they are written."""
    rationale = ("Solution",) if mode == "cot" else ()
    if form.name == "choice":
        return ("Question", "Labels", "Texts", *rationale, "Answer")
    if form.name == "code":
        return ("Function Header", "Function Body")
    return ("Question", *rationale, "Answer")


def instruction(form: Format, item: Mapping[str, Any], mode: str, attempt: int) -> str:
    """The request to write demonstrations, in the paraphrase of this attempt (section 3.1)."""
    opening = PARAPHRASES[attempt % len(PARAPHRASES)]
    names = fields(form, mode)
    template = "\n".join(
        "[" + "\n".join(f"{name}{number}: ..." for name in names) + "]" for number in range(1, ASKED + 1)
    )
    hints = {
        "choice": " Labels and texts are separated by ' | '.",
        "latex": " Write every answer as $...$.",
        "number": " Every answer is one whole number.",
        "code": " The body contains a return statement.",
    }
    question = (
        f"[Function Header0: {item['header']}\nFunction Body0: ...]" if form.name == "code" else form.render(item)
    )
    return (
        f"{question}\n\nFollowing the example above, {opening} {ASKED} similar ones with "
        f"{', '.join(name.lower() for name in names)}, exactly in this form, brackets included:{hints.get(form.name, '')}\n"
        f"{template}"
    )


def parse(form: Format, text: str, mode: str, item: Mapping[str, Any]) -> list[Demo]:
    """Complete and valid demonstrations in a reply, without copies of the question. Never raises, never evaluates."""
    names = fields(form, mode)
    code = form.name == "code"
    flat = text if code else re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    found = _matches(flat, names, code)
    if len(found) < ASKED and not code:
        paragraphs = re.split(r"\n\s*\n", flat)
        for opens in ("[", "[Ques"):
            joined: list[str] = []
            for paragraph in paragraphs:
                if joined and not paragraph.lstrip().startswith(opens):
                    joined[-1] += " " + paragraph
                else:
                    joined.append(paragraph)
            again = _matches("\n\n".join(joined), names, code)
            found = again if len(again) > len(found) else found
    demos = [demo for parts in found if (demo := _demo(form, parts, item)) is not None]
    return [demo for demo in demos if _plain_text(_asked(form, demo)) != _plain_text(_asked(form, item))]


def _matches(text: str, names: tuple[str, ...], code: bool) -> list[dict[str, str]]:
    label = [rf"{re.escape(name)}\s*\d*\s*:" for name in names]
    after = r"[ \t]*\n?(.*?)\s*" if code else r"\s*(.*?)\s*"
    pattern = r"\[?\s*" + after.join(label) + after + r"(?=\]\s*(?:\n|\[|$)|\[?\s*" + label[0] + r"|\Z)"
    found = []
    for match in re.finditer(pattern, text, flags=re.DOTALL):
        strip = (lambda part: part.strip("\n")) if code else (lambda part: part.strip().strip("[]").strip())
        found.append({name: strip(part) for name, part in zip(names, match.groups(), strict=True)})
    return found


def _demo(form: Format, parts: Mapping[str, str], item: Mapping[str, Any]) -> Demo | None:
    """A demonstration with clean fields, None where one is missing or does not fit."""
    if form.name == "code":
        header, body = parts["Function Header"], parts["Function Body"]
        return {"header": header, "answer": body} if header.strip() and re.search(r"\breturn\b", body) else None
    demo: Demo = {"question": _clean(parts["Question"]), "rationale": parts.get("Solution", "").strip()}
    if not demo["question"] or ("Solution" in parts and not demo["rationale"]):
        return None
    answer = parts["Answer"]
    if form.name == "choice":
        demo["labels"] = [_clean(label) for label in re.split(r"[|,]", parts["Labels"]) if _clean(label)]
        demo["texts"] = [_clean(option) for option in parts["Texts"].split("|") if _clean(option)]
        demo["answer"] = _clean(answer).rstrip(".")
        fits = len(demo["labels"]) == len(demo["texts"]) == len(item["labels"]) and demo["answer"] in demo["labels"]
        return demo if fits and len(set(demo["labels"])) == len(demo["labels"]) else None
    if form.name == "number":
        numbers = integers(answer)
        demo["answer"] = numbers[-1] if numbers else ""
    elif form.name == "latex":
        groups = re.findall(r"\$([^$]+)\$", answer)
        demo["answer"] = normal_latex(groups[-1] if groups else answer)
    else:
        demo["answer"] = _clean(answer)
        possible = form.choices(item)
        if possible:
            demo["answer"] = next((p for p in possible if p.lower() == demo["answer"].rstrip(".").lower()), "")
    return demo if demo["answer"] else None


def render_question(form: Format, demo: Demo) -> str:
    """A demonstration's question, put as the real one is."""
    return form.render(demo)


def render_answer(form: Format, demo: Demo, mode: str, compatible: bool = False) -> str:
    """A demonstration's answer as the assistant's turn (section 3.2)."""
    answer, rationale = demo["answer"], demo.get("rationale", "")
    if form.name == "number":
        if mode == "cot":
            return f"Solution: {rationale}\nThe answer is {answer}."
        return f"The answer is {rationale if compatible and rationale else answer}."
    if form.name == "choice":
        return f"Solution: {rationale} Answer: {answer}" if mode == "cot" else f"Answer: {answer}"
    if form.name == "latex":
        step = f"Solution: Let's think step by step. {rationale} " if mode == "cot" else ""
        return f"{step}Answer: ${answer}$"
    if form.name == "code":
        return str(answer)
    return f"Solution: {rationale} Answer: {answer}" if mode == "cot" else str(answer)


def _asked(form: Format, item: Mapping[str, Any]) -> str:
    return str(item["header"] if form.name == "code" else item["question"])


def _clean(text: str) -> str:
    return text.strip().strip("\"'[]{}").strip()


def _plain_text(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def _total(usages: Sequence[Usage]) -> Usage:
    return Usage(
        input=sum(u.input for u in usages),
        cached_input=sum(u.cached_input for u in usages),
        output=sum(u.output for u in usages),
        reasoning=sum(u.reasoning for u in usages),
        estimated=any(u.estimated for u in usages),
    )
