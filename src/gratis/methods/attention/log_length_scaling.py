"""Keep the entropy of softmax attention where it was in training: sharpen it as texts grow longer than those.

The part of "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models", 2025 (arXiv
2501.13428), that an ordinary model can take without training. The logits of a row that attends to N keys are multiplied
by max(1, ln N / ln N_train). Re-weighting the weights of a softmax by a power p is a softmax of p times the logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.errors import ParameterError, SubjectError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param
from gratis.subjects.attention_door import check_attention, install_attention, takes_masks
from gratis.subjects.language import window_of


class LogLengthScaling(Attachable):
    """Sharpen attention by the logarithm of the length, beyond the length that the model was trained for.

    Up to that length nothing changes. `sharpen` adds a mild constant sharpening; it is only enabled where it does no
    harm on a text of the user's own.
    """

    card = Card(
        title="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
        authors="Gao and Spratling",
        year=2025,
        seed=55,
        paper="arXiv 2501.13428",
        acts_on="language model",
        free_of=("training", "fine-tuning", "calibration data"),
        summary="attention that stays as sharp as in training when texts grow longer than that",
        holds=("scale of attention",),
        unchanged_when={"length": 10_000, "sharpen": 1.0},
        examples={"length": 8},
        differs=(
            "The paper's re-weighting is not offered here: on the weights of a softmax it is a softmax of the power times the "
            "logits, far sharper than what the model was trained with. Only the length scale, and a mild power, are. On the "
            "embedded model the strong form (power 15, offset 1) costs 4.9 nats of loss, a power of 3 alone 1.5, and a power "
            "of 1.2 already 0.03 (benchmarks/reweighting.py)."
        ),
        limits=(
            "Positions beyond training are the larger problem of most models, and stay. For endless text use a bounded "
            "cache; for recall beyond the window, InfLLM."
        ),
        claims=(
            Claim(
                name="up to the trained length the loss is untouched (difference on plain text)",
                task="streaming-perplexity",
                metric="loss",
                compare="difference",
                at_most=0.0,
                parameters={},
                task_parameters={"tokens": 1536, "chunk": 256},
            ),
            Claim(
                name="at 16 times the length of training it does not repair the loss of a small model, but makes it no worse by "
                "0.1 nats",
                task="length-extrapolation",
                metric="loss",
                compare="difference",
                at_most=0.1,
                subject="zoo:help-softmax",
                parameters={"length": 128},
                task_parameters={"length": 2048},
            ),
        ),
    )

    length: int | None = param(None, at_least=2, unit="tokens", help="length of training; None is the model's window")
    sharpen: float = param(1.0, at_least=1.0, at_most=1.2, help="factor of all logits; above 1 it needs `text`")
    text: str | None = param(None, help="a text of yours on which sharpening must do no harm")

    def check_parameters(self) -> None:
        if self.sharpen > 1 and self.text is None:
            raise ParameterError("LogLengthScaling: sharpen above 1 needs text, on which it must do no harm.")

    def check(self, subject: Any) -> None:
        name = type(subject).__name__
        check_attention(subject, type(self).__name__)
        if not takes_masks(subject):
            raise SubjectError("LogLengthScaling: load the model with attention 'sdpa' or 'eager'.")
        if self._trained_length(subject) is None:
            raise SubjectError(f"LogLengthScaling: the configuration of this {name} names no length; pass length=….")
        if self.text is not None:
            self._check_harmless(subject)

    def install(self, subject: Any, scope: Scope) -> Any:
        length = self._trained_length(subject)
        assert length is not None
        most = {"factor": self.sharpen}

        def attend(inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            if self.sharpen == 1 and key.shape[2] <= length:
                return inner(module, query, key, value, mask, **kwargs)
            factors = self.sharpen * length_factors(mask, query.shape[2], key.shape[2], length, query.device)
            most["factor"] = max(most["factor"], float(factors.max()))
            return inner(module, query * factors.to(query.dtype), key, value, mask, **kwargs)

        install_attention(subject, self.name, attend, scope)
        return lambda: {"length": length, "largest_factor": most["factor"]}

    def _trained_length(self, subject: Any) -> int | None:
        return self.length if self.length is not None else window_of(subject)

    @torch.no_grad()
    def _check_harmless(self, subject: Any) -> None:
        from gratis.subjects import tokenizer_of

        assert self.text is not None
        tokens = tokenizer_of(subject)(self.text, return_tensors="pt", verbose=False).input_ids.to(subject.device)
        if tokens.shape[1] < 2:
            raise ParameterError("LogLengthScaling: text must be at least two tokens long.")
        losses = [float(subject(input_ids=tokens, labels=tokens).loss)]
        scope = Scope()
        try:
            self.install(subject, scope)
            losses.append(float(subject(input_ids=tokens, labels=tokens).loss))
        finally:
            scope.close()
        if not losses[1] <= losses[0]:
            raise SubjectError(
                f"LogLengthScaling makes the loss on the given text worse, from {losses[0]:.4f} to {losses[1]:.4f} nats: "
                "lower sharpen, or leave it off."
            )


def length_factors(mask: Tensor | None, queries: int, keys: int, length: int, device: torch.device) -> Tensor:
    """(batch or 1, 1, queries, 1) max(1, ln N / ln length) of every row, N being the keys that it attends to."""
    if mask is None:
        counts = torch.arange(keys - queries + 1, keys + 1, device=device)[None, None, :, None]
    else:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        counts = seen[:, :1].sum(-1, keepdim=True)
    return (counts.clamp_min(1).double().log() / math.log(length)).clamp_min(1.0)
