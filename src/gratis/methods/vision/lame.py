"""Correct a frozen classifier's predictions on a whole batch at once, without touching its weights.

M. Boudiaf, R. Mueller, I. Ben Ayed and L. Bertinetto, "Parameter-free Online Test-time Adaptation", CVPR 2022.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, ParameterError
from gratis.contract.method import Estimator
from gratis.contract.parameters import param

CHUNK = 2048
"""Rows of the distance matrix that are held at a time."""


@dataclass(frozen=True)
class Adapted:
    """A batch after adaptation. Arrays are of the kind that was passed in."""

    labels: Any
    """(samples,) most probable class."""
    probabilities: Any
    """(samples, classes) soft assignments, rows on the simplex."""
    iterations: int
    energy: list[float]
    """Bound of the objective after each update (it uses the neighbours' assignments of the update before)."""
    converged: bool
    changed: int
    """Samples whose most probable class is not the classifier's."""
    guarded: bool = False
    """Whether the predictions were left alone because neighbours hardly agree more than by chance."""


class LAME(Estimator):
    """Fewer errors on correlated streams: neighbours in feature space are pulled towards the same class.

    Nothing is carried from one batch to the next, and the classifier is not touched. Use it when consecutive inputs
    are related (video, production lines, albums) or classes come in runs; on shuffled inputs it costs a little.
    """

    card = Card(
        title="Parameter-free Online Test-time Adaptation",
        authors="Boudiaf, Mueller, Ben Ayed, Bertinetto",
        year=2022,
        seed=30,
        paper="CVPR 2022, arXiv:2201.05718",
        acts_on="features",
        free_of=("training", "labels", "back-propagation", "parameter updates"),
        summary="fewer errors of a frozen classifier on correlated streams, batch by batch",
        unchanged_when={"weight": 0.0},
        examples={"neighbors": 3},
        differs=(
            "The default affinity is k nearest neighbours: row sums of the dense affinities grow with the batch, and "
            "with them the assignments collapse onto one class."
        ),
        limits="On shuffled, class-balanced inputs it loses about a point; switch it off there, or use guard.",
        claims=(
            Claim(
                name="on a stream sorted by class it corrects the frozen classifier",
                task="digits-stream",
                metric="accuracy",
                compare="difference",
                at_least=0.08,
                parameters={"neighbors": 5},
                task_parameters={"stream": "sorted"},
            ),
            Claim(
                name="on a shuffled balanced stream it does not help, and costs at most six points",
                task="digits-stream",
                metric="accuracy",
                compare="difference",
                at_least=-0.06,
                parameters={"neighbors": 5},
                task_parameters={"stream": "iid"},
            ),
            Claim(
                name="on corrupted crops of real photographs that come in runs it corrects an ImageNet classifier",
                task="image-stream",
                metric="accuracy",
                compare="difference",
                at_least=0.02,
                parameters={"neighbors": 5},
                task_parameters={"stream": "runs"},
            ),
        ),
    )

    affinity: Literal["knn", "rbf", "linear"] = param("knn", help="nearest neighbours, Gaussian, or cosine similarity")
    neighbors: int = param(
        5, above=0, help="neighbours of a sample; for rbf, the one that sets the width", search=(1, 15)
    )
    weight: float = param(1.0, at_least=0, help="weight of agreement with neighbours (lambda); 1 in the paper")
    symmetric: bool = param(False, help="average the affinity with its transpose")
    max_iterations: int = param(100, above=0, help="updates at most")
    tolerance: float = param(1e-8, above=0, help="relative change of the bound at which the updates end")
    guard: bool = param(False, help="leave predictions alone where neighbours agree no more than by chance")

    def check_parameters(self) -> None:
        if self.affinity == "rbf" and self.neighbors < 2:
            raise ParameterError("LAME: neighbors must be at least 2 with affinity 'rbf', whose width would be 0.")

    def adapt(self, probabilities: Any, features: Any, *, logits: bool = False) -> Adapted:
        """Joint assignment of one batch.

        `probabilities` (samples, classes), rows summing to 1, or logits; `features` (samples, dimensions), those that
        enter the classifier's last layer. NumPy arrays or torch tensors. Raises InputError.
        """
        as_numpy = not isinstance(probabilities, Tensor)
        p = _probabilities(_matrix(probabilities, "probabilities"), logits)
        f = _directions(_matrix(features, "features").to(p), len(p))
        y, energy, converged = p, [], False
        guarded = self.guard and not self._neighbors_agree(p, f)
        if not guarded and self.weight > 0:
            y, energy, converged = self._assign(p, f)
        out = y.argmax(1)
        return Adapted(
            labels=out.numpy() if as_numpy else out,
            probabilities=y.numpy() if as_numpy else y,
            iterations=len(energy),
            energy=energy,
            converged=converged or not energy,
            changed=int((out != p.argmax(1)).sum()),
            guarded=guarded,
        )

    def _assign(self, p: Tensor, f: Tensor) -> tuple[Tensor, list[float], bool]:
        """Concave-convex updates of the Laplacian-adjusted likelihood (section 4, eq. 6 and 7)."""
        affinity = self._affinity(f)
        unary = -torch.log(p + 1e-10)
        y = torch.softmax(-unary, dim=1)
        energy: list[float] = []
        for step in range(self.max_iterations):
            pairwise = self.weight * affinity(y)
            y = torch.softmax(-unary + pairwise, dim=1)
            bound = (unary * y - pairwise * y + y * torch.log(y.clamp_min(1e-20))).sum().item()
            energy.append(bound)
            if step > 1 and abs(bound - energy[-2]) <= self.tolerance * abs(energy[-2]):
                return y, energy, True
        return y, energy, False

    def _affinity(self, f: Tensor) -> Any:
        """The function Y -> W Y, sparse for nearest neighbours."""
        if self.affinity == "knn":
            index = nearest(f, self.neighbors)
            if self.symmetric:
                count = torch.ones_like(index, dtype=f.dtype)
                w = torch.zeros(len(f), len(f), dtype=f.dtype, device=f.device).scatter_add_(1, index, count)
                w = (w + w.T) / 2
                return lambda y: w @ y
            return lambda y: y[index].sum(1) if index.shape[1] else torch.zeros_like(y)
        if len(f) > 32:
            warnings.warn(
                f"affinity {self.affinity!r} over {len(f)} samples: its row sums grow with the batch, and assignments "
                "may collapse onto one class; use 'knn' or smaller batches.",
                stacklevel=4,
            )
        if self.affinity == "linear":
            return lambda y: f @ (f.T @ y)
        if len(f) == 1:
            return lambda y: y
        distance = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
        width = distance.kthvalue(min(self.neighbors, len(f)), dim=1).values.mean()
        if width <= 0:
            raise InputError("LAME: all features are the same, so affinity 'rbf' has no width; use 'knn'.")
        w = torch.exp(-distance.square() / (2 * width.square()))
        if self.symmetric:
            w = (w + w.T) / 2
        return lambda y: w @ y

    def _neighbors_agree(self, p: Tensor, f: Tensor) -> bool:
        index = nearest(f, self.neighbors)
        if not index.numel():
            return False
        labels = p.argmax(1)
        agree = (labels[index] == labels[:, None]).to(p.dtype).mean().item()
        shares = torch.bincount(labels).to(p.dtype) / len(labels)
        chance = shares.square().sum().item()
        return agree > chance + 2 * (chance * (1 - chance) / index.numel()) ** 0.5


def nearest(f: Tensor, count: int) -> Tensor:
    """(samples, count) nearest other samples: of the count + 1 smallest distances of a row, all but the first."""
    n = min(count + 1, len(f))
    parts = []
    for rows in f.split(CHUNK):
        distance = torch.cdist(rows, f, compute_mode="donot_use_mm_for_euclid_dist")
        parts.append(distance.topk(n, dim=1, largest=False, sorted=True).indices[:, 1:])
    return torch.cat(parts)


def group_classes(probabilities: Any, groups: list[list[int]]) -> Any:
    """(samples, groups) probabilities of superclasses: sums over their members, each row renormalised to 1."""
    if not groups or any(not group for group in groups):
        raise InputError("Every superclass needs at least one class of the model.")
    stack = torch.stack if isinstance(probabilities, Tensor) else np.stack
    grouped = stack([probabilities[:, group].sum(1) for group in groups], 1)
    return grouped / grouped.sum(1)[:, None]


def _matrix(values: Any, what: str) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if tensor.dim() != 2:
        raise InputError(
            f"LAME: {what} must have two dimensions (samples, …), not {tensor.dim()}; average pooled maps over height "
            "and width first."
        )
    return tensor.detach() if tensor.dtype in (torch.float32, torch.float64) else tensor.detach().float()


def _probabilities(p: Tensor, logits: bool) -> Tensor:
    if p.shape[1] < 2:
        raise InputError("LAME: at least two classes are needed.")
    if len(p) == 0:
        raise InputError("LAME: the batch is empty.")
    if not bool(p.isfinite().all()):
        raise InputError("LAME: probabilities hold values that are not finite.")
    if logits:
        return torch.softmax(p, dim=1)
    if bool((p < 0).any()) or bool(((p.sum(1) - 1).abs() > 1e-3).any()):
        raise InputError("LAME: rows of probabilities must be non-negative and sum to 1; pass logits=True for logits.")
    return p


def _directions(f: Tensor, samples: int) -> Tensor:
    if len(f) != samples:
        raise InputError(f"LAME: {samples} rows of probabilities but {len(f)} of features.")
    if not bool(f.isfinite().all()):
        raise InputError("LAME: features hold values that are not finite.")
    norm = f.norm(dim=1, keepdim=True)
    zero = (norm[:, 0] == 0).nonzero()
    if len(zero):
        raise InputError(f"LAME: the features of row {int(zero[0])} are all zero, so they have no direction.")
    return f / norm


def _has_transform(self: LAMEClassifier) -> bool:
    return self.transformer is not None


class LAMEClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Any scikit-learn classifier whose predictions are adapted by LAME, batch by batch in the order of the rows.

    Parameters
    ----------
    classifier : a classifier with `predict_proba`; it is cloned and fitted by `fit`.
    method : LAME, or None for its defaults.
    transformer : a fitted object whose `transform` gives the features; None uses the inputs themselves.
    batch_size : rows that are adapted together.

    """

    def __init__(
        self, classifier: Any = None, method: LAME | None = None, transformer: Any = None, batch_size: int = 16
    ):
        self.classifier = classifier
        self.method = method
        self.transformer = transformer
        self.batch_size = batch_size

    def fit(self, X: Any, y: Any) -> LAMEClassifier:
        """Fit a clone of the classifier."""
        from sklearn.linear_model import LogisticRegression

        if self.batch_size < 1:
            raise ParameterError(f"LAMEClassifier: batch_size must be at least 1, not {self.batch_size}.")
        X, y = validate_data(self, X, y)
        inner = LogisticRegression() if self.classifier is None else self.classifier
        self.classifier_ = clone(inner).fit(X, y)
        self.classes_ = self.classifier_.classes_
        return self

    def predict_proba(self, X: Any) -> np.ndarray[Any, Any]:
        """(samples, classes) adapted probabilities."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        method = self.method if self.method is not None else LAME()
        p = np.asarray(self.classifier_.predict_proba(X), dtype=np.float64)
        features = np.asarray(X if self.transformer is None else self.transformer.transform(X), dtype=np.float64)
        features = np.where((features == 0).all(1)[:, None], 1.0, features)
        cuts = range(0, len(p), self.batch_size)
        return np.concatenate(
            [method.adapt(p[i : i + self.batch_size], features[i : i + self.batch_size]).probabilities for i in cuts]
        )

    def predict(self, X: Any) -> np.ndarray[Any, Any]:
        """(samples,) adapted classes."""
        adapted = self.predict_proba(X)
        chosen: np.ndarray[Any, Any] = self.classes_[adapted.argmax(1)]
        return chosen

    @available_if(_has_transform)
    def transform(self, X: Any) -> Any:
        """The features that neighbours are found by."""
        return self.transformer.transform(X)
