"""Merge experts for differently shown digits into one classifier of all of them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from gratis.contract.method import Method
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Series, Task, TaskCard, silent

TRAINED_ON = 1200
UNLABELLED = 256
"""Pictures of each way for methods that ask for inputs of every expert, as the papers take."""


class DigitsMerging(Task):
    """A network trained on plain digits is fine-tuned on digits shown in three other ways; the three are merged."""

    card = TaskCard(
        title="Merging experts for differently shown digits",
        acts_on="checkpoints",
        data=(
            "scikit-learn's digits; a 64-256-10 network trained on them as they are, and three fine-tunes of it on "
            "digits shifted right, shifted down, and inverted; without a method, the network before fine-tuning"
        ),
        metrics=(
            Metric(name="accuracy", help="mean over the ways of showing digits of the share of right labels"),
            Metric(name="worst", help="accuracy on the way of showing that the merge serves worst"),
        ),
    )

    epochs: int = param(80, above=0, help="passes of each fine-tuning over its digits")
    ways: int = param(3, at_least=1, at_most=3, help="ways of showing digits, and so experts")

    def subject(self) -> Any:
        base, tuned, groups = experts(self.epochs)
        return base, tuned[: self.ways], groups[: self.ways]

    def applied(self, subject: Any, method: Method | None) -> AbstractContextManager[Any]:
        return _merged(subject, method)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import torch

        weights, groups = subject
        items: list[float] = []
        shares: list[float] = []
        for images, labels in groups:
            with torch.no_grad():
                right = (_forward(weights, images).argmax(1) == labels).double().tolist()
            items.extend(right)
            shares.append(statistics.fmean(right))
        progress(1.0, f"{len(groups)} ways of showing digits")
        return Measurement(
            metrics={"accuracy": statistics.fmean(shares), "worst": min(shares)},
            items={"accuracy": items},
            series={"accuracy": Series(list(range(len(shares))), shares, "way of showing digits", "accuracy")},
            calls=len(groups),
        )


@contextmanager
def _merged(subject: Any, method: Method | None) -> Iterator[Any]:
    from gratis.contract.method import Merge
    from gratis.subjects.merging import merge_state_dicts

    base, tuned, groups = subject
    if method is None:
        yield base, groups
        return
    assert isinstance(method, Merge)
    if not hasattr(method, "from_inputs"):
        yield merge_state_dicts(method, tuned, base), groups
        return
    with tempfile.TemporaryDirectory() as folder:
        informed = method.from_inputs([_network(own) for own in tuned], _unlabelled(len(tuned)), folder)
        yield merge_state_dicts(informed, tuned, base), groups


def _network(weights: Any) -> Any:
    import torch

    network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    if weights is not None:
        network.load_state_dict(weights)
    return network


def _forward(weights: Any, images: Any) -> Any:
    import torch

    hidden = torch.relu(images @ weights["0.weight"].T + weights["0.bias"])
    return hidden @ weights["2.weight"].T + weights["2.bias"]


def _shown(images: Any) -> list[Any]:
    square = images.view(-1, 8, 8)
    return [square.roll(1, 2).flatten(1), square.roll(1, 1).flatten(1), 0.8 - 0.3 * images]


def _unlabelled(ways: int) -> list[Any]:
    """For each way of showing digits, pictures of the training without their labels."""
    import torch
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits(return_X_y=True)[0][:UNLABELLED] / 16).float()
    return _shown(images)[:ways]


def experts(epochs: int) -> Any:
    """(base weights, three fine-tuned weights, three pairs of test images and labels)."""
    import torch
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels / 16).float(), torch.from_numpy(digits)
    train, test = slice(0, TRAINED_ON), slice(TRAINED_ON, None)
    shown = _shown(images)

    def trained(start: Any, inputs: Any, passes: int, rate: float) -> Any:
        network = _network(start)
        optimizer = torch.optim.Adam(network.parameters(), lr=rate)
        for _ in range(passes):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs[train]), labels[train]).backward()
            optimizer.step()
        return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        base = trained(None, images, 100, 5e-3)
        tuned = [trained(base, inputs, epochs, 2e-3) for inputs in shown]
    return base, tuned, [(inputs[test], labels[test]) for inputs in shown]
