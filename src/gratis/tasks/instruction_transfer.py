"""Ask a model in a form that it never saw about facts that it was only told plainly: does the form come with a vector?

A small language model knows facts as plain text. One fine-tune of it learned to answer questions about some of them,
another learned more facts, plainly. The two are merged and asked about the later facts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from gratis.contract.errors import SubjectError
from gratis.contract.method import Merge, Method
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent

EARLY, LATE, VALUES = 80, 80, 20
"""Keys of the facts that the base knows, of those that only the domain model knows, and values that a key can have."""
ASKED = 60
"""Early keys that the instruct model learned to answer questions about."""
QUESTION, ANSWER, END, SEPARATOR, START = range(EARLY + LATE + VALUES, EARLY + LATE + VALUES + 5)
VOCABULARY = EARLY + LATE + VALUES + 5


class InstructionTransfer(Task):
    """Facts "key value" in a base model, a fine-tune that answers "Q key A", another with new facts; both merged."""

    card = TaskCard(
        title="Answering about facts that were only told plainly",
        acts_on="checkpoints",
        data=(
            "160 keys with one of 20 values each; a three-layer language model trained on plain facts about the first 80, "
            "a fine-tune of it on questions and answers about 60 of them, another on plain facts about all 160; without "
            "a method, the latter"
        ),
        metrics=(
            Metric(name="answered", help="share of questions about the later facts answered rightly, and ended"),
            Metric(name="early", help="the same for early facts that no question of the training was about"),
            Metric(name="recall", help="share of the later facts still recalled in the plain form"),
        ),
        untouched="domain model",
    )

    device: str = param("cpu", help="where the models are trained and asked")
    models: int = param(0, at_least=0, help="seed of the models: each has other facts")

    def subject(self) -> Any:
        return trained(self.models, self.device)

    def applied(self, subject: Any, method: Method | None) -> AbstractContextManager[Any]:
        if method is not None and not isinstance(method, Merge):
            raise SubjectError(f"{method.name} is no merge.")
        return self._merged(subject, method)

    @contextmanager
    def _merged(self, subject: Any, method: Merge | None) -> Iterator[Any]:
        from gratis.subjects.merging import merge_state_dicts

        model, base, domain, instruct, values = subject
        model.load_state_dict(domain if method is None else merge_state_dicts(method, [domain, instruct], base))
        yield model, values

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        model, values = subject
        late, unasked = range(EARLY, EARLY + LATE), range(ASKED, EARLY)
        right = {
            "answered": answered(model, values, late),
            "early": answered(model, values, unasked),
            "recall": recalled(model, values, late),
        }
        progress(1.0, f"{sum(right['answered']):g} of {LATE} answered")
        return Measurement(
            metrics={name: statistics.fmean(found) for name, found in right.items()}, items=dict(right), calls=3
        )


def language_model(seed: int) -> Any:
    """Three layers of width 96 with rotary positions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def trained(seed: int, device: str = "cpu", batch: int = 32, facts: int = 8) -> Any:
    """(model, base weights, domain weights, instruct weights, values of the keys); about a minute on one core.

    500 steps of plain facts about the early keys; from there 150 steps of questions and answers, and 400 steps of plain
    facts about all keys.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    values = EARLY + LATE + torch.randint(0, VALUES, (EARLY + LATE,), generator=generator)
    model = language_model(seed).to(device)

    def plainly(keys: int) -> Any:
        chosen = torch.randint(0, keys, (batch, facts), generator=generator)
        rows = torch.stack([chosen, values[chosen], torch.full_like(chosen, SEPARATOR)], -1).flatten(1)
        return torch.cat([torch.full((batch, 1), START), rows], 1)

    def in_questions() -> Any:
        chosen = torch.randint(0, ASKED, (batch, 1), generator=generator)
        parts = [torch.full_like(chosen, token) for token in (START, QUESTION, ANSWER, END)]
        return torch.cat([parts[0], parts[1], chosen, parts[2], values[chosen], parts[3]], 1)

    def fitted(start: Any, rows: Any, steps: int, rate: float) -> Any:
        if start is not None:
            model.load_state_dict(start)
        model.train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        with torch.enable_grad():
            for _ in range(steps):
                ids = rows().to(device)
                optimiser.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimiser.step()
        model.eval()
        return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    base = fitted(None, lambda: plainly(EARLY), 500, 1e-3)
    instruct = fitted(base, in_questions, 150, 3e-4)
    domain = fitted(base, lambda: plainly(EARLY + LATE), 400, 1e-3)
    return model, base, domain, instruct, values


def answered(model: Any, values: Any, keys: range) -> list[float]:
    """1 for every key whose question the model answers with the value and then the end, else 0."""
    import torch

    chosen = torch.tensor(list(keys))[:, None]
    prompt = torch.cat([torch.full_like(chosen, START), torch.full_like(chosen, QUESTION), chosen,
                        torch.full_like(chosen, ANSWER)], 1).to(model.device)  # fmt: skip
    with torch.no_grad():
        value = model(input_ids=prompt).logits[:, -1].argmax(-1, keepdim=True)
        end = model(input_ids=torch.cat([prompt, value], 1)).logits[:, -1].argmax(-1)
    right: list[float] = ((value[:, 0].cpu() == values[chosen[:, 0]]) & (end.cpu() == END)).double().tolist()
    return right


def recalled(model: Any, values: Any, keys: range) -> list[float]:
    """1 for every key that the model follows with its value in the plain form, else 0."""
    import torch

    chosen = torch.tensor(list(keys))
    prompt = torch.stack([torch.full_like(chosen, START), chosen], 1).to(model.device)
    with torch.no_grad():
        value = model(input_ids=prompt).logits[:, -1].argmax(-1).cpu()
    right: list[float] = (value == values[chosen]).double().tolist()
    return right
