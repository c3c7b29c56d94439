"""Sums that a masked-diffusion language model works out in a window with a known place for the answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from gratis.contract.attach import Attachment, attach
from gratis.contract.errors import SubjectError
from gratis.contract.method import Attachable, Method
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent


class MaskedArithmetic(Task):
    """Fill the answer windows of generated sums, and compare them with the full decode's.

    The untouched model decodes one token per forward pass, the most confident first, over the whole window.
    """

    card = TaskCard(
        title="Sums by a masked-diffusion model",
        acts_on="masked-diffusion model",
        subject="zoo:arithmetic-masked",
        data="sums of two numbers of three digits, with the work column by column and the answer at its place",
        metrics=(
            Metric(name="accuracy", help="share of problems whose answer region holds the right number"),
            Metric(
                name="row_passes",
                help="forward passes that a problem took, mean",
                unit="passes",
                higher_is_better=False,
                cost=True,
            ),
            Metric(
                name="token_agreement",
                help="share of the window's tokens that are those of the full decode",
                fidelity=True,
            ),
        ),
        untouched="full schedule",
        warm_up={"size": 4},
    )

    size: int = param(256, above=0, help="problems")
    steps: int | None = param(None, above=0, help="steps of the call; None: the method's own, or one per token")

    def check(self, subject: Any) -> None:
        from gratis.subjects.masked_diffusion_door import check_masked_diffusion

        check_masked_diffusion(subject, "masked-arithmetic")
        if "The answer is " not in self._tokenizer(subject).get_vocab():
            raise SubjectError(
                "masked-arithmetic poses its problems to zoo:arithmetic-masked, or a model trained alike."
            )

    def applied(self, subject: Any, method: Method | None) -> AbstractContextManager[Any]:
        return self._applied(subject, method)

    @contextmanager
    def _applied(self, subject: Any, method: Method | None) -> Iterator[Any]:
        references: dict[int, list[Any]] = {}

        def full(seed: int) -> list[Any]:
            if seed not in references:
                references[seed] = _in_full(subject, self._groups(subject, seed))
            return references[seed]

        if method is None:
            yield subject, full
            return
        assert isinstance(method, Attachable)
        # The seeds of trials and claims begin at 0: what is known before the method goes on costs it no time.
        full(0)
        with attach(subject, method):
            yield subject, full

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import torch

        from gratis.subjects.masked_diffusion_door import generate
        from gratis.zoo.masked_arithmetic import ANSWER, WINDOW

        model, full = subject
        model = model.subject if isinstance(model, Attachment) else model
        groups, references = self._groups(model, seed), full(seed)
        right: list[float] = []
        agreement: list[float] = []
        passes = 0

        def count(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal passes
            passes += len(args[0] if args else kwargs["input_ids"])

        hook = model.register_forward_pre_hook(count, with_kwargs=True)
        call = {} if self.steps is None else {"steps": self.steps}
        torch.manual_seed(seed)
        try:
            for (prompts, windows), reference in zip(groups, references, strict=True):
                found = generate(model, prompts, max_new_tokens=WINDOW, **call)[:, -WINDOW:]
                places = list(ANSWER)
                right += (found[:, places] == windows[:, places]).all(1).double().tolist()
                agreement += (found == reference).double().mean(1).tolist()
                progress(len(right) / self.size, f"{sum(right):g} of {len(right)} right")
        finally:
            hook.remove()
        return Measurement(
            metrics={
                "accuracy": sum(right) / len(right),
                "row_passes": passes / len(right),
                "token_agreement": sum(agreement) / len(agreement),
            },
            items={"accuracy": right, "token_agreement": agreement},
            tokens=len(right) * WINDOW,
            calls=passes,
        )

    def _groups(self, subject: Any, seed: int) -> list[Any]:
        from gratis.zoo.masked_arithmetic import by_prompt_length, sums

        return by_prompt_length(self._tokenizer(subject), sums(self.size, seed + 2_000_003))

    def _tokenizer(self, subject: Any) -> Any:
        from gratis.subjects import tokenizer_of

        return tokenizer_of(subject)


def _in_full(model: Any, groups: list[Any]) -> list[Any]:
    """The windows of the base decoder with one token per pass, prompts of one length at a time."""
    from gratis.subjects.masked_diffusion_door import generate_with
    from gratis.zoo.masked_arithmetic import WINDOW

    return [generate_with(model, None, prompts, max_new_tokens=WINDOW)[:, -WINDOW:] for prompts, _ in groups]
