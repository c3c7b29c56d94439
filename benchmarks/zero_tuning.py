"""What ZeroTuning finds on calibration prompts and what it is worth on others, what it costs, and what it acts on.

    python benchmarks/zero_tuning.py tuning [reviews|questions] [begun|chat|plain] [--device cuda]
    python benchmarks/zero_tuning.py attention [--device cuda]
    OMP_NUM_THREADS=1 python benchmarks/zero_tuning.py cost

On the embedded language model. `tuning` searches heads and scale on 100 prompts, by every objective and level, and measures
accuracies, valid answers and entropies on 500 others. `attention` measures how much attention heads pay to the first token.
`cost` compares processor time per token with that of the plain model, in turns, and times a search against reading its
prompts once. Writes benchmarks/results/zero_tuning.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from measuring import renew, renew_rows

import gratis
from gratis.subjects import tokenizer_of
from gratis.subjects.first_token import attention_to_first_token
from gratis.subjects.prompted_answers import answer_scores, token_rows
from gratis.subjects.text import documentation, tokens_of
from gratis.tasks.prompted_classification import CLASSES, answer_tokens, examples, prompts_of
from gratis.trials.statistics import paired_interval

CALIBRATION, TEST = 100, 500
FORMS = ("begun", "chat", "plain")
SEARCHES = (
    ("logit", "accuracy", 2), ("logit", "parsed accuracy", 2), ("logit", "entropy", 2), ("logit", "answer entropy", 2),
    ("logit", "accuracy", 1), ("logit", "entropy", 1), ("logit", "accuracy", 0), ("logit", "entropy", 0),
    ("key", "accuracy", 2), ("key", "entropy", 2),
)  # fmt: skip
MEASURED = "tuned on {calibration} texts, measured on {test} others"
READ, STEPS, ROUNDS = 256, 24, 3


def tuning(model: Any, data: str, form: str, calibration: int, test: int, device: str) -> None:
    """What every search finds on the calibration prompts, and what that does to the test prompts."""
    answers = answer_tokens(model, data)
    known, unseen = examples(data, calibration, 0, calibration=True), examples(data, test, 0)
    asked, asked_then = (prompts_of(model, data, [text for text, _ in part], form) for part in (known, unseen))
    labels, labels_then = ([label for _, label in part] for part in (known, unseen))

    def scored() -> Any:
        return answer_scores(model, asked_then, answers=answers, labels=labels_then, batch=64)

    before = scored()
    for mode, objective, level in SEARCHES:
        given = {} if objective == "entropy" else {"answers": answers}
        if "accuracy" in objective:
            given["labels"] = labels
        found = gratis.ZeroTuning(mode=mode).tune(
            model, asked, objective=objective, level=level, batch=64, progress=shown(data, form), **given
        )
        with gratis.attach(model, found.method):
            after = scored()
        search = {"data": data, "form": form, "mode": mode, "objective": objective, "level": level}
        row = {
            **search,
            "scale": found.method.scale,
            "heads": "all" if found.method.heads is None else ", ".join(map(str, found.method.heads)),
            "calibration, before": round(found.baseline, 4),
            "calibration, after": round(found.curve[found.method.scale], 4),
        }
        for name in ("accuracy", "parsed_accuracy", "valid", "entropy"):
            words = name.replace("_", " ")
            low, high = paired_interval(getattr(after, name), getattr(before, name)) or (0.0, 0.0)
            values = {when: getattr(scores, name) for when, scores in (("before", before), ("after", after))}
            row |= {f"{words}, {when}": round(statistics.fmean(each), 4) for when, each in values.items()}
            row[f"{words}, change"] = f"{low:+.3f} to {high:+.3f}"
        renew_rows("zero_tuning", MEASURED.format(calibration=calibration, test=test), [row], place, device)
        curve = {f"scale {scale}": round(value, 4) for scale, value in found.curve.items()}
        groups = {f"heads, {name}": ", ".join(map(str, heads)) for name, heads in found.groups.items()}
        renew_rows("zero_tuning", "objective along the scale", [{**search, **curve, **groups}], place, device)


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["data"], row["form"], row["mode"], row["objective"], row["level"]


def shown(data: str, form: str) -> Any:
    return lambda share, words: print(f"{data}, {form}: {words}", flush=True) if share == 1 else None


def attention(model: Any, device: str) -> None:
    """Attention on the first token, as a word and as the start of a chat, with several scales."""
    tokenizer = tokenizer_of(model)
    word = token_rows(model, [tokens_of(tokenizer, documentation(), 256, at)[0] for at in (0, 20000, 40000, 60000)])
    start = token_rows(
        model, [torch.cat([torch.tensor([tokenizer.convert_tokens_to_ids("<|im_start|>")]), row]) for row in word]
    )
    rows = []
    for name, prompts in (("a word", word), ("<|im_start|>", start)):
        for scale in (1.0, 0.3, 0.5, 2.0, 4.0):
            method = gratis.ZeroTuning(scale=scale)
            shares = attention_to_first_token(model, prompts, None if scale == 1 else method, skip=64)
            rows.append(
                {
                    "first token": name, "scale": scale, "mean share": round(float(shares.mean()), 4),
                    "heads above a half, %": round(100 * float((shares > 0.5).double().mean()), 1),
                }
            )  # fmt: skip
    renew("zero_tuning", {"attention on the first token": rows}, device)


@torch.no_grad()
def cost(model: Any) -> None:
    """Processor time of decoding and reading, attached and not, in turns; and of a search against one reading."""
    tokens = tokens_of(tokenizer_of(model), documentation(), READ + STEPS + 1)
    methods = {
        "one scale for all heads": gratis.ZeroTuning(scale=1.5),
        "keys": gratis.ZeroTuning(scale=1.5, mode="key"),
    }
    rows = []
    for name, method in methods.items():
        caches: dict[str, Any] = {}

        def step(ids: torch.Tensor, arm: str, caches: dict[str, Any] = caches) -> None:
            out = model(ids, past_key_values=caches.get(arm), use_cache=True, logits_to_keep=1)
            caches[arm] = out.past_key_values

        def whole(ids: torch.Tensor, arm: str) -> None:
            model(ids, use_cache=False, logits_to_keep=1)

        in_turns(model, method, step, [tokens[:, :READ]])
        wrote = in_turns(model, method, step, [tokens[:, at : at + 1] for at in range(READ, READ + STEPS)])
        has_read = in_turns(model, method, whole, [tokens[:, :READ]] * ROUNDS)
        rows.append(
            {
                "what": name,
                "plain, ms per token": round(1e3 * statistics.median(plain for plain, _ in wrote), 2),
                "attached / plain, a token": ratio(wrote),
                f"attached / plain, reading {READ} tokens": ratio(has_read),
            }
        )
    renew("zero_tuning", {"cost of being attached": rows, "cost of a search": searching(model)})


def in_turns(model: Any, method: Any, run: Any, inputs: list[torch.Tensor]) -> list[tuple[float, float]]:
    """Processor seconds of each input, plain and attached; attaching itself is not in them."""
    found = []
    for turn, ids in enumerate(inputs):
        seconds = {}
        for arm in ("plain", "attached") if turn % 2 else ("attached", "plain"):
            off = gratis.attach(model, method).detach if arm == "attached" else lambda: None
            begin = time.process_time()
            run(ids, arm)
            seconds[arm] = time.process_time() - begin
            off()
        found.append((seconds["plain"], seconds["attached"]))
    return found


def ratio(pairs: list[tuple[float, float]]) -> float:
    return round(statistics.median(attached / plain for plain, attached in pairs), 3)


def searching(model: Any) -> list[dict[str, Any]]:
    """Processor seconds of whole searches over few prompts, as multiples of reading these prompts once."""
    asked = prompts_of(model, "reviews", [text for text, _ in examples("reviews", 8, 0, calibration=True)], "begun")
    answer_scores(model, asked)
    rows = []
    for level, settings in ((0, 4), (2, 29)):
        begin = time.process_time()
        answer_scores(model, asked)
        once = time.process_time() - begin
        begin = time.process_time()
        gratis.ZeroTuning().tune(
            model, asked, level=level, labels=[0] * len(asked), answers=answer_tokens(model, "reviews")
        )
        rows.append(
            {
                "level": level, "settings": settings, "prompts": len(asked), "seconds of one reading": round(once, 2),
                "search / one reading": round((time.process_time() - begin) / once, 1),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tuning", "attention", "cost"))
    parser.add_argument("data", nargs="?", choices=tuple(CLASSES), help="of `tuning`; all, where it is not said")
    parser.add_argument("form", nargs="?", choices=FORMS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration", type=int, default=CALIBRATION)
    parser.add_argument("--test", type=int, default=TEST)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = gratis.open("smollm2").to(given.device)
    if given.part == "attention":
        attention(model, given.device)
    elif given.part == "cost":
        cost(model)
    else:
        for data in [given.data] if given.data else CLASSES:
            for form in [given.form] if given.form else FORMS:
                tuning(model, data, form, given.calibration, given.test, given.device)


if __name__ == "__main__":
    main()
