"""A scripted chat: it writes demonstrations when asked to, and otherwise answers by what it was shown."""

from __future__ import annotations

import hashlib
import re

from gratis.subjects.chat import Chat


def scripted(messages, **parameters) -> str:
    last = messages[-1]["content"]
    if "similar ones with" in last:
        seed = int(hashlib.sha256(last[:40].encode()).hexdigest()[:4], 16)
        return "\n\n".join(
            f"[Question{n}: What is {seed + n} plus {n}?\nSolution{n}: Add them.\nAnswer{n}: {seed + 2 * n}]"
            if "Solution1" in last
            else f"[Question{n}: What is {seed + n} plus {n}?\nAnswer{n}: {seed + 2 * n}]"
            for n in range(1, 6)
        )
    numbers = re.findall(r"\d+", last)
    return f"The answer is {sum(map(int, numbers)) + 1000 * (len(messages) - 1)}."


def tiny_chat() -> Chat:
    return Chat(scripted)


def run(chat: Chat) -> str:
    answers = chat.answer_many(["What is 2 plus 3?", "What is 4 plus 4?"], "number")
    return "|".join(f"{a.answer}/{a.response}" for a in answers) + "|" + chat.ask("What is 1 plus 1?")


def snapshot(chat: Chat) -> dict:
    return {k: id(v) for k, v in vars(chat).items() if k not in {"_spent", "_counts"}}
