"""A digit classifier that meets noisy digits in an order it was not trained on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from gratis.contract.method import Method
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Series, Task, TaskCard, silent


class DigitsStream(Task):
    """Handwritten digits with noise, in class runs, under a prior shift, or shuffled."""

    card = TaskCard(
        title="Digits in a stream",
        acts_on="features",
        data=(
            "scikit-learn's digits: a 64-unit network trained on 800 clean ones meets the other 997 with Gaussian "
            "noise of 0.35"
        ),
        metrics=(Metric(name="accuracy", help="share of right labels along the stream"),),
    )

    stream: Literal["sorted", "iid", "prior-shift", "sorted-prior-shift"] = param(
        "sorted", help="order of the test digits: in runs of one class or shuffled, and whether classes are imbalanced"
    )
    batch_size: int = param(16, above=0, help="digits that are adapted together")
    noise: float = param(0.35, at_least=0, help="standard deviation of the noise, of pixels in [0, 1]")

    def subject(self) -> Any:
        return _classifier()

    def applied(self, subject: Any, method: Method | None) -> AbstractContextManager[Any]:
        return _pair(subject, method)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import numpy as np

        from gratis.subjects.streams import adapted_labels, order_of

        (network, images, labels), method = subject
        generator = np.random.default_rng(seed)
        noisy = images + self.noise * generator.standard_normal(images.shape)
        features = np.maximum(noisy @ network.coefs_[0] + network.intercepts_[0], 0)
        probabilities = network.predict_proba(noisy)
        order = order_of(
            labels, generator, runs=self.stream.startswith("sorted"), shifted=self.stream.endswith("prior-shift")
        )
        right = adapted_labels(method, probabilities, features, order, self.batch_size) == labels[order]
        return stream_measurement(right, self.batch_size, progress)


def stream_measurement(right: Any, batch_size: int, progress: Progress) -> Measurement:
    """The measurement of a stream from its (samples,) right or wrong labels."""
    items = [float(value) for value in right]
    cuts = range(0, len(items), batch_size)
    progress(1.0, f"{int(sum(items))} of {len(items)} right")
    return Measurement(
        metrics={"accuracy": statistics.fmean(items)},
        items={"accuracy": items},
        series={
            "accuracy": Series(
                list(cuts),
                [statistics.fmean(items[i : i + batch_size]) for i in cuts],
                "position in the stream",
                "accuracy of the batch",
            )
        },
        calls=len(cuts),
    )


@contextmanager
def _pair(subject: Any, method: Method | None) -> Iterator[Any]:
    yield subject, method


def _classifier() -> Any:
    """The trained network, the test images (997, 64) and their labels."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    images = images / 16
    network = MLPClassifier(hidden_layer_sizes=(64,), max_iter=1000, random_state=0).fit(images[:800], labels[:800])
    return network, images[800:], labels[800:]
