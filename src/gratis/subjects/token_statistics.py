"""What a model's own token distributions say about its text: one number per token, a reduction over the vocabulary.

All take raw logits `(…, vocabulary)`, at temperature 1 and before any warper, and reduce in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def self_certainty(logits: Tensor) -> Tensor:
    """Divergence KL(U ‖ p) of the uniform distribution from the model's, per token, in nats.

    Z. Kang et al., "Scalable best-of-N selection for large language models via self-certainty", 2025, eq. 8:
    `-(1/V) Σ_v ln(V p_v)`, which is `lse(z) - mean(z) - ln V`: two reductions, nothing of the vocabulary's size is
    kept. logits: (…, vocabulary); returns (…). Zero for a uniform distribution, infinite where a logit is minus
    infinity.
    """
    values = logits.float()
    certainty: Tensor = values.logsumexp(-1) - values.mean(-1) - math.log(values.shape[-1])
    return certainty


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Ln p of the token that was chosen. logits: (…, vocabulary), tokens: (…); returns (…)."""
    values = logits.float()
    chosen = values.gather(-1, tokens[..., None])[..., 0]
    found: Tensor = chosen - values.logsumexp(-1)
    return found


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the distribution, in nats. logits: (…, vocabulary); returns (…)."""
    logs = logits.float().log_softmax(-1)
    total: Tensor = torch.special.entr(logs.exp()).sum(-1)
    return total


def gini_impurity(logits: Tensor) -> Tensor:
    """1 - Σ p²: the chance that two draws differ. logits: (…, vocabulary); returns (…)."""
    return 1 - logits.float().softmax(-1).square().sum(-1)


REMAINDER_FLOOR = 1e-12
"""Least probability that is left to the tokens that an endpoint does not report."""


def self_certainty_bound(top: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """A lower bound on `self_certainty` from the K largest log-probabilities, all that an endpoint reports.

    The logarithm is concave, so the unseen tokens contribute most when they share what is left equally:
    `Σ_v ln p_v <= Σ_top ln p + (V - K) ln((1 - Σ_top p) / (V - K))`. It is not the published score, and K tokens say
    little about the tail that the score is about.

    top: (…, K) log-probabilities; vocabulary: size V of the model's. Returns the bound (…) and a mask (…) that is true
    where the reported tokens sum to one and the rest was set to a floor of 1e-12, so that the figure says nothing.
    """
    known = top.shape[-1]
    values = top.double()
    rest = 1 - values.exp().sum(-1)
    floored = rest < REMAINDER_FLOOR
    total = values.sum(-1)
    if vocabulary > known:
        total = total + (vocabulary - known) * (rest.clamp_min(REMAINDER_FLOOR) / (vocabulary - known)).log()
    else:
        floored = torch.zeros_like(floored)
    return -total / vocabulary - math.log(vocabulary), floored


def repeated_share(tokens: list[int], size: int = 4) -> float:
    """Share of a text's runs of `size` tokens that occurred in it before, 0 to 1: text that loops is near 1."""
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
