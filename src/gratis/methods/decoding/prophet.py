"""Stop a masked-diffusion language model as soon as its answer has converged, and fill in the rest in one step.

P. Li et al., "Diffusion language models know the answer before decoding", 2025 (arXiv 2508.19982), algorithm 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.contract.method import Decoding
from gratis.contract.parameters import param
from gratis.subjects.masked_diffusion_door import Ending, Outcome, Step, check_masked_diffusion, generate, install
from gratis.subjects.masked_diffusion_hooks import install_in_loop, install_in_scheduler, is_block_pipeline
from gratis.subjects.opening import tokenizer_of

ANSWER = 5
"""Places of the answer region behind a suffix, in the authors' code."""


class Prophet(Decoding):
    """Commit the whole window once the answer region's logits leave no doubt.

    After each forward pass the gap between the two largest logits is averaged over the answer region. Once it reaches
    the threshold of that stage of decoding, every masked place takes its likeliest token and decoding ends. Which
    places are the answer is said by `answer_positions`, a `suffix` or `template` that is fixed in the window, or
    `answer_length`, its last places; without any of them it is the whole window.

    Gives the model a `generate` on the base decoder that is attached (`FixedSteps` as it is otherwise). A model's own
    `diffusion_generate` (Dream) and diffusers' LLaDA2 pipeline are watched too, in their own loops.
    """

    card = Card(
        title="Diffusion language models know the answer before decoding",
        authors="P. Li et al.",
        year=2025,
        seed=9,
        paper="arXiv 2508.19982",
        acts_on="masked-diffusion model",
        free_of=("training", "labels", "calibration data", "a second model"),
        summary="fewer denoising steps: stops when the answer has converged",
        unchanged_when={"tau_high": 1e9, "tau_mid": 1e9, "tau_low": 1e9},
        examples={"tau_high": 3.0, "tau_mid": 2.0, "tau_low": 1.0, "answer_length": 4},
        holds=("early commit",),
        differs=(
            "Rows of a batch commit each for itself (the authors' code reads row 0 for all). The region's length and "
            "place are parameters. The mask token counts as no candidate."
        ),
        limits=(
            "Thresholds are in the model's logit units: `calibrate` scales them on unlabelled prompts. A commit may "
            "leave earlier reasoning inconsistent with the answer; min_progress holds it back. Open-ended text has no "
            "answer region, and little is saved there."
        ),
        claims=(
            Claim(
                name="sums take at most two thirds of the full schedule's passes, at the authors' thresholds",
                task="masked-arithmetic",
                metric="row_passes",
                compare="ratio",
                at_most=0.67,
                parameters={"answer_positions": (28, 29, 30)},
            ),
            Claim(
                name="their answers are about as often right as the full schedule's: at most 0.03 less",
                task="masked-arithmetic",
                metric="accuracy",
                compare="difference",
                at_least=-0.03,
                parameters={"answer_positions": (28, 29, 30)},
            ),
        ),
    )

    tau_high: float = param(7.5, at_least=0, unit="logits", help="mean gap that commits early in decoding")
    tau_mid: float = param(5.0, at_least=0, unit="logits", help="mean gap that commits in the middle")
    tau_low: float = param(2.5, at_least=0, unit="logits", help="mean gap that commits late")
    switch_mid: float = param(0.33, at_least=0, at_most=1, help="progress from which tau_mid counts")
    switch_low: float = param(0.67, at_least=0, at_most=1, help="progress from which tau_low counts")
    progress: Literal["release", "paper"] = param(
        "release", help="progress at step t of T, counted from 1: t / T as in the authors' code, or (t - 1) / T"
    )
    min_progress: float = param(0.0, at_least=0, at_most=1, help="progress before which nothing is committed")
    answer_positions: tuple[int, ...] | None = param(
        None, at_least=0, help="places of the window that hold the answer, counted from 0"
    )
    answer_length: int | None = param(
        None, above=0, unit="places", help="length of the answer region; None: 5 behind a suffix or in a slot"
    )
    suffix: tuple[str, ...] | None = param(
        None, help="words fixed in the window before the answer, each encoded with a space before it"
    )
    template: str | None = param(None, help="text fixed in the window, encoded as it is, with {} where the answer is")
    suffix_at: int | None = param(
        None, at_least=0, unit="places", help="where the suffix or template begins; None: so that it ends the window"
    )
    answer_skip: int = param(1, at_least=0, unit="places", help="places between the suffix and the answer region")
    region: Literal["all", "masked"] = param(
        "all", help="average the gap over all of the answer region, or over its places that are still masked"
    )

    def check_parameters(self) -> None:
        if not self.tau_high >= self.tau_mid >= self.tau_low:
            raise ParameterError(
                f"Prophet: thresholds must not increase: tau_high {self.tau_high}, tau_mid {self.tau_mid}, tau_low "
                f"{self.tau_low}."
            )
        if self.switch_mid > self.switch_low:
            raise ParameterError(
                f"Prophet: switch_mid {self.switch_mid} must not be above switch_low {self.switch_low}."
            )
        said = [name for name in ("answer_positions", "suffix", "template") if getattr(self, name) is not None]
        if len(said) > 1:
            raise ParameterError(f"Prophet: {said[0]} and {said[1]} both say where the answer is: name one.")
        if self.answer_positions is not None and (not self.answer_positions or self.answer_length is not None):
            raise ParameterError("Prophet: answer_positions must be one or more places, and excludes answer_length.")
        if self.suffix is not None and not any(self.suffix):
            raise ParameterError("Prophet: suffix must have at least one word.")
        if self.template is not None and self.template.count("{}") != 1:
            raise ParameterError("Prophet: template must hold {} once, where the answer is.")

    def check(self, subject: Any) -> None:
        if is_block_pipeline(subject):
            if self.suffix is not None or self.template is not None:
                raise SubjectError(
                    "Prophet cannot fix tokens in a pipeline that sees one block at a time: say where the answer is "
                    "with answer_positions or answer_length."
                )
            return
        check_masked_diffusion(subject, "Prophet")
        if self.suffix is not None or self.template is not None:
            tokenizer_of(subject)

    def install(self, subject: Any, scope: Scope) -> Any:
        record = _Record()

        def ending(model: Any, window: int) -> Ending:
            places, constraints = self.answer_region(window, tokenizer_of(model) if self._fixes_text else None)
            record.begin(window)

            def commits(step: Step) -> Tensor:
                gaps = self._gaps(step, places)
                progress = (step.number - (self.progress == "paper")) / step.total
                now = (gaps >= self.threshold(progress)) & (progress >= self.min_progress)
                record.add(step, gaps, now)
                return now

            return Ending(commits, constraints)

        if is_block_pipeline(subject):
            tell = install_in_scheduler(subject, scope, ending, record.complete)

            def report() -> dict[str, Any]:
                tell()
                return record.report()

            return report
        install(subject, scope, ending=ending, heard=record.complete)
        if hasattr(subject, "diffusion_generate"):
            install_in_loop(subject, scope, ending, record.complete)
        return record.report

    def threshold(self, progress: float) -> float:
        """The gap, in logit units, that commits at this progress (0 to 1)."""
        if progress < self.switch_mid:
            return self.tau_high
        return self.tau_mid if progress < self.switch_low else self.tau_low

    def answer_region(self, window: int, tokenizer: Any = None) -> tuple[tuple[int, ...], dict[int, int]]:
        """Places of the answer in a window, and the tokens that suffix or template fix there.

        A baseline that is compared with Prophet deserves the same: `model.generate(…, constraints=…)`.
        Raises InputError where they do not fit the window, or the tokenizer knows the text only in part.
        """
        if self._fixes_text:
            return self._fixed(window, tokenizer)
        if self.answer_positions is not None:
            return self._inside(self.answer_positions, window), {}
        length = window if self.answer_length is None else self.answer_length
        return self._inside(range(window - length, window), window), {}

    @property
    def _fixes_text(self) -> bool:
        return self.suffix is not None or self.template is not None

    def _fixed(self, window: int, tokenizer: Any) -> tuple[tuple[int, ...], dict[int, int]]:
        length = ANSWER if self.answer_length is None else self.answer_length
        if self.suffix is not None:
            head = [token for word in self.suffix for token in _tokens(tokenizer, " " + word)]
            tail: list[int] = []
            slot = len(head) + self.answer_skip
        else:
            before, after = (self.template or "").split("{}")
            head, tail = _tokens(tokenizer, before), _tokens(tokenizer, after)
            slot = len(head)
        size = slot + length + len(tail)
        at = window - size if self.suffix_at is None else self.suffix_at
        if at < 0 or at + size > window:
            raise InputError(
                f"Prophet: suffix and answer take {size} places from {max(at, 0)}, and the window has {window}: lengthen "
                "the window, or lower suffix_at or answer_length."
            )
        constraints = {at + place: token for place, token in enumerate(head)}
        constraints |= {at + slot + length + place: token for place, token in enumerate(tail)}
        return tuple(range(at + slot, at + slot + length)), constraints

    def _inside(self, places: Any, window: int) -> tuple[int, ...]:
        if min(places) < 0 or max(places) >= window:
            raise InputError(
                f"Prophet: the answer region reaches from place {min(places)} to {max(places)}, and the window has "
                f"{window}: lengthen the window, or name other places."
            )
        return tuple(places)

    def _gaps(self, step: Step, places: tuple[int, ...]) -> Tensor:
        """(rows,) mean gap between the two largest logits over the answer region (paper, eq. 4).

        Minus infinity where the decoder sees no place of it.
        """
        seen = [place - step.offset for place in places if 0 <= place - step.offset < step.logits.shape[1]]
        if not seen:
            return torch.full((len(step.logits),), -torch.inf, device=step.logits.device)
        top = step.logits[:, seen].topk(2, dim=-1).values
        gaps = top[..., 0] - top[..., 1]
        if self.region == "all":
            return gaps.mean(-1)
        masked = step.masked[:, seen]
        mean = gaps.where(masked, 0).sum(-1) / masked.sum(-1).clamp(min=1)
        # An answer all of whose places have their tokens cannot change any more.
        return mean.where(masked.any(-1), torch.finfo(mean.dtype).max)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if (unknown := getattr(tokenizer, "unk_token_id", None)) is not None and unknown in tokens:
        raise InputError(f"Prophet: the model's tokenizer does not know all of {text!r}: use words that it knows.")
    return tokens


class _Record:
    """What happened in all calls, and row by row in the last one."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter(
            calls=0, prompts=0, commits=0, committed_tokens=0, generated_tokens=0, steps=0, steps_saved=0,
            forward_passes=0, row_passes=0,
        )  # fmt: skip
        self.window = 1
        self.last: dict[str, Any] = {}
        self.steps: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def begin(self, window: int) -> None:
        self.totals["calls"] += 1
        self.window, self.steps, self.last = window, [], {}

    def add(self, step: Step, gaps: Tensor, now: Tensor) -> None:
        counts = step.masked.sum(-1).where(now, 0)
        self.steps.append((step.number, step.rows, gaps, now, counts))
        self.totals.update(commits=int(now.sum()), committed_tokens=int(counts.sum()))

    def complete(self, outcome: Outcome) -> None:
        self.totals.update(
            prompts=len(outcome.steps),
            generated_tokens=len(outcome.steps) * outcome.window,
            steps=int(outcome.steps.sum()),
            steps_saved=int((outcome.total_steps - outcome.steps).sum()),
            forward_passes=outcome.forward_passes,
            row_passes=outcome.row_passes,
        )
        self.last = {
            "row_steps": outcome.steps.tolist(),
            "total_steps": outcome.total_steps,
            "interrupted": outcome.interrupted,
        }

    def report(self) -> dict[str, Any]:
        rows: dict[int, dict[str, Any]] = {}
        for number, which, gaps, now, counts in self.steps:
            for row, gap, commits, count in zip(
                which.tolist(), gaps.tolist(), now.tolist(), counts.tolist(), strict=True
            ):
                about = rows.setdefault(row, {"gaps": [], "exit_step": None, "committed": 0})
                # A block without a place of the answer has no gap.
                about["gaps"].append(gap if math.isfinite(gap) else None)
                about["committed"] += count
                about["exit_step"] = number if commits else about["exit_step"]
        told = [about for _, about in sorted(rows.items())]
        return {
            **self.totals,
            **self.last,
            "triggered": [about["exit_step"] is not None for about in told],
            "exit_step": [about["exit_step"] for about in told],
            "committed_fraction": [about["committed"] / self.window for about in told],
            "gaps": [about["gaps"] for about in told],
        }


def calibrate(
    model: Any, prompts: Tensor, method: Prophet, agreement: float = 0.98, **call: Any
) -> tuple[Prophet, Mapping[str, float]]:
    """`method` with its thresholds scaled to the model's logits, on prompts without labels.

    Decodes the prompts (batch, length) in full, with what is attached to the model, and looks at what an early commit
    at each step would have given. The three thresholds are multiplied by the smallest factor from which on the answer
    regions of early commits agree with the full decode in at least `agreement` of the prompts. `call` goes to
    `generate`. Returns the new method, and what was found: the factor, the agreement, and the share of steps taken.

    Raises InputError where `agreement` is no share.
    """
    if not 0 < agreement <= 1:
        raise InputError(f"agreement must be above 0 and at most 1, not {agreement}.")
    seen: dict[int, list[tuple[int, float, Tensor]]] = {}
    found: dict[str, Any] = {}

    def ending(subject: Any, window: int) -> Ending:
        places, constraints = method.answer_region(window, tokenizer_of(subject) if method._fixes_text else None)
        found["places"] = list(places)

        def commits(step: Step) -> Tensor:
            progress = (step.number - (method.progress == "paper")) / step.total
            ratios = method._gaps(step, places).double() / max(method.threshold(progress), 1e-9)
            if progress >= method.min_progress:
                for row, ratio, tokens in zip(step.rows.tolist(), ratios.tolist(), step.tokens, strict=True):
                    seen.setdefault(row, []).append((step.number, ratio, tokens[found["places"]].clone()))
            return torch.zeros_like(step.rows, dtype=torch.bool)

        return Ending(commits, constraints)

    def heard(outcome: Outcome) -> None:
        found.update(window=outcome.window, total=outcome.total_steps)

    scope = Scope()
    try:
        install(model, scope, ending=ending, heard=heard)
        sequences = generate(model, prompts, **call)
    finally:
        scope.close()
    final = sequences[:, -found["window"] :][:, found["places"]]
    agrees = [
        [(number, ratio, bool((tokens == final[row]).all())) for number, ratio, tokens in steps]
        for row, steps in seen.items()
    ]
    factors = sorted({ratio for steps in agrees for _, ratio, _ in steps if ratio > 0}, reverse=True)
    best = factors[0] * 2 if factors else 1.0
    for factor in factors:
        if sum(right for _, right in _exits(agrees, factor, found["total"])) < agreement * len(agrees):
            break
        best = factor
    exits = _exits(agrees, best, found["total"])
    scaled = {name: getattr(method, name) * best for name in ("tau_high", "tau_mid", "tau_low")}
    count = max(len(exits), 1)
    return method.replace(**scaled), {
        "factor": best,
        "agreement": sum(right for _, right in exits) / count,
        "steps": sum(number for number, _ in exits) / (count * found["total"]),
    }


def _exits(agrees: list[list[tuple[int, float, bool]]], factor: float, total: int) -> list[tuple[int, bool]]:
    """Where each prompt would stop at this factor, and whether with the full decode's answer."""
    return [
        next(((number, right) for number, ratio, right in steps if ratio >= factor), (total, True)) for steps in agrees
    ]
