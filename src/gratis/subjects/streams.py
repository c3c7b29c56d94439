"""Orders in which a classifier meets its test data.

The evaluation protocol of M. Boudiaf et al., "Parameter-free Online Test-time Adaptation", CVPR 2022, section 5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gratis.contract.errors import InputError

DRAWS = 10_000
"""Proportions that are drawn at most until some keep the rule."""


def shuffled(count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Independent, identically distributed order: a permutation."""
    return generator.permutation(count)


def prior_shift(
    labels: ArrayLike, generator: np.random.Generator, *, top: float = 0.1, share: float = 0.9, total: int | None = None
) -> NDArray[np.int64]:
    """Indices drawn so that class proportions follow Zipf(2), with replacement, reshuffled.

    Proportions are drawn again until the most frequent `top` of the classes holds less than `share` of the data.
    """
    y = np.asarray(labels)
    classes = np.unique(y)
    if len(classes) < 2:
        raise InputError("A prior shift needs at least two classes.")
    leading = max(1, round(top * len(classes)))
    if share <= leading / len(classes):
        raise InputError(
            f"The {leading} most frequent of {len(classes)} classes always hold at least {leading / len(classes):.2g} "
            f"of the data, so share must be above that, not {share:g}."
        )
    for _ in range(DRAWS):
        weights = generator.zipf(2, size=len(classes)).astype(float)
        weights /= weights.sum()
        if np.sort(weights)[::-1][:leading].sum() < share:
            break
    else:
        raise InputError(f"No proportions with a share below {share:g} in {DRAWS} draws; raise share or top.")
    size = len(y) if total is None else total
    parts = [
        generator.choice(np.flatnonzero(y == c), size=int(size * w), replace=True)
        for c, w in zip(classes, weights, strict=True)
    ]
    return generator.permutation(np.concatenate(parts))


def in_runs(groups: ArrayLike, generator: np.random.Generator) -> NDArray[np.int64]:
    """Non-iid order: after a shuffle, all of one group (video, corruption or class), then the next.

    Groups come in the order in which the shuffle first shows them.
    """
    g = np.asarray(groups)
    order = generator.permutation(len(g))
    _, first, inverse = np.unique(g[order], return_index=True, return_inverse=True)
    return order[np.argsort(first[inverse], kind="stable")]


def order_of(
    groups: ArrayLike, generator: np.random.Generator, *, runs: bool, shifted: bool = False
) -> NDArray[np.int64]:
    """Order of the samples of a stream: shuffled, or in runs of one of `groups`; `shifted` by `prior_shift` before."""
    g = np.asarray(groups)
    drawn = prior_shift(g, generator) if shifted else np.arange(len(g))
    return drawn[in_runs(g[drawn], generator) if runs else shuffled(len(drawn), generator)]


def batches(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """`order` cut into batches; the last, incomplete one is kept."""
    return [order[i : i + size] for i in range(0, len(order), size)]


def adapted_labels(method: Any, probabilities: Any, features: Any, order: NDArray[np.int64], size: int) -> Any:
    """(len(order),) labels along the stream: the classifier's own, or those of `method` batch by batch."""
    if method is None:
        return np.asarray(probabilities)[order].argmax(1)
    parts = [method.adapt(probabilities[rows], features[rows]).labels for rows in batches(order, size)]
    return np.concatenate([np.asarray(part) for part in parts])
