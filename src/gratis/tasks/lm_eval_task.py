"""Any task of the Language Model Evaluation Harness, run on the live model with whatever is attached to it."""

from __future__ import annotations

import math
from typing import Any

from gratis.contract.attach import Attachment
from gratis.contract.errors import InputError, MissingExtraError, ParameterError, SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent


class LmEvalTask(Task):
    """A task of `lm-eval` (L. Gao et al., "The Language Model Evaluation Harness") by its name there.

    The harness's own prompts, requests, filters and metrics are used as they are. Tasks whose data is on the hub
    reach for it; a task of your own, with local data, is found through `include_path`.
    """

    card = TaskCard(
        title="Language Model Evaluation Harness",
        acts_on="language model",
        subject="smollm2",
        data="the data of the named lm-eval task",
        metrics=(
            Metric(name="score", help="the metric of the lm-eval task, by default the first that it reports"),
            Metric(name="samples", help="documents that were scored", cost=True),
        ),
    )

    lm_eval_name: str = param("arc_easy", help="name of the task in lm-eval")
    include_path: str | None = param(None, help="folder with task files of your own")
    metric: str | None = param(None, help="metric of the lm-eval task; None: the first")
    limit: int | None = param(None, above=0, help="first documents only; None: all")
    shots: int | None = param(None, at_least=0, help="examples in the prompt; None: as the task says")
    batch: int = param(1, above=0, help="requests at a time")
    chat: bool = param(False, help="put prompts through the chat template")

    def check(self, subject: Any) -> None:
        _harness()
        if not hasattr(subject, "generate"):
            raise SubjectError(f"lm-eval-task needs a language model, not a {type(subject).__name__}.")
        self._manager()

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        from gratis.subjects import tokenizer_of

        lm_eval = _harness()
        from lm_eval.models.huggingface import HFLM

        model = subject.subject if isinstance(subject, Attachment) else subject
        manager = self._manager()
        progress(0.0, self.lm_eval_name)
        backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
        live = HFLM(pretrained=model, tokenizer=tokenizer_of(model), batch_size=self.batch, backend=backend)
        found = lm_eval.simple_evaluate(
            model=live,
            tasks=[self.lm_eval_name],
            task_manager=manager,
            num_fewshot=self.shots,
            limit=self.limit,
            apply_chat_template=self.chat,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        progress(1.0, self.lm_eval_name)
        results = found["results"][self.lm_eval_name]
        values = {
            key.partition(",")[0]: float(value)
            for key, value in results.items()
            if isinstance(value, (int, float)) and "," in key and "_stderr" not in key
        }
        if not values:
            raise InputError(
                f"The lm-eval task {self.lm_eval_name!r} reported no metric: name one that is not a group."
            )
        name = self.metric or next(iter(values))
        if name not in values:
            raise ParameterError(
                f"LmEvalTask: {self.lm_eval_name} reports {', '.join(values)}: set metric to one of them, not {name!r}."
            )
        samples = found.get("samples", {}).get(self.lm_eval_name, [])
        items = [float(sample[name]) for sample in samples if isinstance(sample.get(name), (int, float))]
        return Measurement(
            metrics={"score": values[name], "samples": float(len(samples)) if samples else math.nan},
            items={"score": items} if len(items) == len(samples) and items else {},
            calls=len(samples),
            details={"metric": name, "all_metrics": values},
        )

    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=self.include_path)
        if self.lm_eval_name not in manager.all_tasks:
            raise ParameterError(f"LmEvalTask: lm-eval has no task {self.lm_eval_name!r}; see `lm-eval ls tasks`.")
        return manager


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise MissingExtraError.of("lm-eval", "eval") from error
    return lm_eval
