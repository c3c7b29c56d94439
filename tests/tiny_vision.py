"""Tiny features and probabilities, and how the contract tests run an estimator on them."""

from __future__ import annotations

import numpy as np


def tiny_features(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(24, 3) probabilities and (24, 6) features of three noisy clusters."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), 8)
    centres = generator.standard_normal((3, 6)) * 2
    features = centres[labels] + generator.standard_normal((24, 6))
    logits = 1.5 * np.eye(3)[labels] + generator.standard_normal((24, 3))
    probabilities = np.exp(logits)
    return probabilities / probabilities.sum(1, keepdims=True), features


def run(method, data) -> np.ndarray:
    return np.asarray(method.adapt(*data).probabilities)


def identity(data) -> np.ndarray:
    return data[0]
