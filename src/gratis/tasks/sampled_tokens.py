"""Does a method that samples in another way keep the distribution, and how many forward passes does it take?"""

from __future__ import annotations

from typing import Any

from gratis.contract.attach import Attachment, attached
from gratis.contract.errors import SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent


class SampledTokens(Task):
    """Draw many short responses to one prompt, and compare them with as many that were drawn the plain way.

    Every place's tokens, and every place's pairs of neighbours, are tested for one distribution behind both (chi-square
    test of homogeneity, rare tokens pooled, Bonferroni's correction).
    """

    card = TaskCard(
        title="Distribution of sampled tokens",
        acts_on="language model",
        subject="zoo:help-softmax",
        data="responses of a model to one prompt from Python's help topics, and as many sampled token by token",
        metrics=(
            Metric(name="passes_per_token", help="forward passes per token of the responses", higher_is_better=False),
            Metric(
                name="p_value", help="smallest p-value over places and pairs, corrected: below 0.01 is a difference"
            ),
        ),
        untouched="plain sampling",
        warm_up={"responses": 2},
    )

    responses: int = param(400, at_least=2, help="responses of each kind")
    prompt_tokens: int = param(64, above=0, unit="tokens", help="length of the prompt")
    new_tokens: int = param(12, at_least=2, unit="tokens", help="length of a response")
    temperature: float = param(1.0, above=0, help="of the draws")

    def check(self, subject: Any) -> None:
        if not hasattr(subject, "generate"):
            raise SubjectError(f"sampled-tokens needs a language model, not a {type(subject).__name__}.")

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import torch

        model = subject.subject if isinstance(subject, Attachment) else subject
        prompt = _prompt(model, self.prompt_tokens)
        options = {
            "do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0,
            "max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens,
        }  # fmt: skip
        torch.manual_seed(seed)
        before = reported_passes(model)
        drawn = []
        for number in range(self.responses):
            out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
            drawn.append(out[0, prompt.shape[1] :])
            progress((number + 1) / self.responses, f"response {number + 1}")
        passes, tokens = reported_passes(model) - before, self.responses * self.new_tokens
        found = torch.stack(drawn).cpu()
        plain = sampled_plainly(model, prompt, self.responses, self.new_tokens, self.temperature, seed + 1).cpu()
        return Measurement(
            metrics={
                "passes_per_token": (passes or tokens) / tokens,
                "p_value": homogeneity(found.numpy(), plain.numpy()),
            },
            tokens=tokens,
        )


def sampled_plainly(model: Any, prompt: Any, count: int, length: int, temperature: float, seed: int) -> Any:
    """(count, length) tokens drawn one by one by torch's multinomial from the model's logits, without generate.

    prompt: (1, length) token ids.
    """
    import torch

    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    tokens, past, read = [], None, prompt.expand(count, -1)
    with torch.no_grad():
        for _ in range(length):
            out = model(input_ids=read, past_key_values=past, use_cache=True)
            past = out.past_key_values
            law = (out.logits[:, -1].float() / temperature).softmax(-1)
            read = torch.multinomial(law, 1, generator=generator)
            tokens.append(read)
    return torch.cat(tokens, dim=1)


def homogeneity(first: Any, second: Any, expected: float = 5.0) -> float:
    """Smallest p-value, times the number of tests, that columns and neighbouring pairs of two samples are alike.

    first, second: (rows, places) integers. Values expected less than `expected` times in either sample are pooled.
    """
    import numpy as np
    from scipy.stats import chi2_contingency

    values = []
    for one, other in [
        *((first[:, [place]], second[:, [place]]) for place in range(first.shape[1])),
        *((first[:, [place, place + 1]], second[:, [place, place + 1]]) for place in range(first.shape[1] - 1)),
    ]:
        _, codes = np.unique(np.concatenate([one, other]), axis=0, return_inverse=True)
        codes = codes.reshape(-1)
        counts = np.stack(
            [np.bincount(part, minlength=codes.max() + 1) for part in (codes[: len(one)], codes[len(one) :])]
        )
        share = min(len(one), len(other)) / (len(one) + len(other))
        often = counts.sum(0) * share >= expected
        table = np.concatenate([counts[:, often], counts[:, ~often].sum(1, keepdims=True)], axis=1)
        table = table[:, table.sum(0) > 0]
        if table.shape[1] > 1:
            values.append(float(chi2_contingency(table, correction=False).pvalue))
    return min(1.0, min(values, default=1.0) * max(len(values), 1))


def _prompt(model: Any, length: int) -> Any:
    import torch

    from gratis.subjects.opening import tokenizer_of
    from gratis.subjects.text import documentation

    text = documentation()
    if model.get_input_embeddings().num_embeddings == 256:  # a model of bytes has no tokenizer
        ids = list(text.encode()[:length])
    else:
        ids = tokenizer_of(model)(text[: 20 * length]).input_ids[:length]
    return torch.tensor([ids], device=model.device)


def reported_passes(model: Any) -> int:
    """Forward passes that attached methods have reported so far."""
    return sum(int(report.get("forward_passes", 0)) for one in attached(model) for report in one.report().values())
