"""Correct a frozen classifier's predictions on a whole batch at once, without touching its weights.

M. Boudiaf, R. Mueller, I. Ben Ayed and L. Bertinetto, "Parameter-free Online Test-time Adaptation", CVPR 2022.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils import check_scalar
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError, ParameterError
from gratis.contract.method import Estimator
from gratis.contract.parameters import param
from gratis.subjects.vision import group_classes, read_features

BLOCK = 1 << 24
"""Numbers that the search for neighbours holds at a time."""
SPARE = 8
"""Candidates beyond the wanted neighbours whose distances are computed from differences."""

DIFFERENCES = "donot_use_mm_for_euclid_dist"
"""Distances from differences: those from products lose the small ones to rounding."""


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
    agreement: float | None = None
    """Share of neighbours that the classifier gives the sample's own class; None where they were not looked for."""
    guarded: bool = False
    """Whether the predictions were left alone, because neighbours did not look like being of one class."""


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
            "with them the assignments collapse onto one class. A sample is never its own neighbour, also where "
            "another one is identical to it; the authors drop the first of the nearest, which may be that other one."
        ),
        limits=(
            "On shuffled, class-balanced inputs it costs accuracy where a batch holds few samples of each class (one "
            "to six points on average, seventeen at worst); leave it off there, or use guard."
        ),
        claims=(
            Claim(
                name="on noisy digits that come in runs of one class it corrects the frozen classifier",
                task="digits-stream",
                metric="accuracy",
                compare="difference",
                at_least=0.12,
                task_parameters={"stream": "sorted"},
            ),
            Claim(
                name="the guard keeps that gain",
                task="digits-stream",
                metric="accuracy",
                compare="difference",
                at_least=0.12,
                parameters={"guard": True},
                task_parameters={"stream": "sorted"},
            ),
            Claim(
                name="on shuffled balanced digits it brings nothing",
                task="digits-stream",
                metric="accuracy",
                compare="difference",
                at_most=0.01,
                task_parameters={"stream": "iid"},
            ),
            Claim(
                name="on shuffled balanced digits it costs at most five points",
                task="digits-stream",
                metric="accuracy",
                compare="difference",
                at_least=-0.05,
                task_parameters={"stream": "iid"},
            ),
            Claim(
                name="with the guard they cost at most one point",
                task="digits-stream",
                metric="accuracy",
                compare="difference",
                at_least=-0.01,
                parameters={"guard": True},
                task_parameters={"stream": "iid"},
            ),
            Claim(
                name="on corrupted crops of real photographs that come in runs it corrects an ImageNet classifier",
                task="image-stream",
                metric="accuracy",
                compare="difference",
                at_least=0.08,
                task_parameters={"stream": "runs"},
            ),
            Claim(
                name="with the guard it costs at most six points on the same crops shuffled",
                task="image-stream",
                metric="accuracy",
                compare="difference",
                at_least=-0.06,
                parameters={"guard": True},
                task_parameters={"stream": "iid"},
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
    guard: bool = param(
        False, help="leave batches alone whose neighbours cannot be, or do not seem to be, of one class"
    )

    def check_parameters(self) -> None:
        if self.affinity == "rbf" and self.neighbors < 2:
            raise ParameterError("LAME: neighbors must be at least 2 with affinity 'rbf', whose width would be 0.")

    def adapt(self, probabilities: Any, features: Any, *, logits: bool = False) -> Adapted:
        """Joint assignment of one batch.

        `probabilities` (samples, classes), rows summing to 1, or logits; `features` (samples, dimensions), those that
        enter the classifier's last layer. NumPy arrays or torch tensors; half precision is raised to float32. Raises
        InputError.
        """
        as_numpy = not isinstance(probabilities, Tensor)
        p, f = _matrix(probabilities, "probabilities"), _matrix(features, "features")
        wide = torch.promote_types(p.dtype, f.dtype)
        p = _probabilities(p, logits).to(wide)
        f = _directions(f.to(p), len(p))
        index = nearest(f, self.neighbors) if self.affinity == "knn" or self.guard else None
        agreement = _agreement(p, index) if index is not None and index.numel() else None
        guarded = self.guard and not (agreement is not None and _worth_adapting(p, agreement, self.neighbors))
        y, energy, converged = p, list[float](), True
        if not guarded and self.weight > 0:
            y, energy, converged = self._assign(p, self._affinity(f, index))
        labels = y.argmax(1)
        return Adapted(
            labels=labels.numpy() if as_numpy else labels,
            probabilities=y.numpy() if as_numpy else y,
            iterations=len(energy),
            energy=energy,
            converged=converged,
            changed=int((labels != p.argmax(1)).sum()),
            agreement=agreement,
            guarded=guarded,
        )

    def adapt_stream(
        self,
        model: torch.nn.Module,
        batches: Iterable[Tensor],
        *,
        layer: str,
        pooling: Literal["mean"] | None = None,
        groups: list[list[int]] | None = None,
    ) -> Iterator[Adapted]:
        """Adapt the predictions of a torch classifier batch by batch, as the batches come.

        `layer` names the submodule whose input are the features (`"fc"`, `"classifier"`, `"head"`); `pooling="mean"`
        averages feature maps over height and width. `groups` lists the classes of the model that make up each class
        of the task: their probabilities are added before. The model runs in evaluation mode, without gradients, and
        is as it was between batches. Raises SubjectError, InputError.
        """
        for batch in batches:
            scores, features = read_features(model, layer, batch, batch_size=len(batch), pooling=pooling)
            p = torch.softmax(scores if scores.dtype == torch.float64 else scores.float(), dim=1)
            yield self.adapt(p if groups is None else group_classes(p, groups), features)

    def _assign(self, p: Tensor, affinity: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[float], bool]:
        """Concave-convex updates of the Laplacian-adjusted likelihood (section 4, eq. 6 and 7)."""
        unary = -torch.log(p + 1e-10)
        y = torch.softmax(-unary, dim=1)
        energy: list[float] = []
        for step in range(self.max_iterations):
            pairwise = self.weight * affinity(y)
            y = torch.softmax(pairwise - unary, dim=1)
            bound = (unary * y - pairwise * y + y * torch.log(y.clamp_min(1e-20))).sum().item()
            energy.append(bound)
            if step > 1 and abs(bound - energy[-2]) <= self.tolerance * abs(energy[-2]):
                return y, energy, True
        return y, energy, False

    def _affinity(self, f: Tensor, index: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The function Y -> W Y, in O(samples * neighbors) for nearest neighbours."""
        if self.affinity == "knn":
            assert index is not None
            return _neighbor_sum(index, self.symmetric)
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
        distance = torch.cdist(f, f, compute_mode=DIFFERENCES)
        width = distance.kthvalue(min(self.neighbors, len(f)), dim=1).values.mean()
        if width <= 0:
            raise InputError("LAME: all features are the same, so affinity 'rbf' has no width; use 'knn'.")
        w = torch.exp(-distance.square() / (2 * width.square()))
        if self.symmetric:
            w = (w + w.T) / 2
        return lambda y: w @ y


def nearest(f: Tensor, count: int) -> Tensor:
    """(samples, count) nearest other samples of the unit rows `f`; fewer columns where there are fewer others.

    Candidates come from a matrix product, a block of rows at a time, and are ranked by distances computed from
    differences. Rows of which rounding of the product could have hidden a neighbour are searched in full, so the
    result is that of the full distance matrix.
    """
    count = min(count, len(f) - 1)
    if count == 0:
        return torch.empty(len(f), 0, dtype=torch.long, device=f.device)
    step = max(1, BLOCK // max(len(f), (count + SPARE) * f.shape[1]))
    return torch.cat([_nearest_of(rows, f, count) for rows in torch.arange(len(f), device=f.device).split(step)])


def _nearest_of(rows: Tensor, f: Tensor, count: int) -> Tensor:
    if len(f) <= 128:
        return _nearest_in_full(rows, f, count)
    cosine = f[rows] @ f.T
    cosine.scatter_(1, rows[:, None], -torch.inf)
    candidates = cosine.topk(min(count + SPARE, len(f) - 1), dim=1)
    distance = torch.cdist(f[rows][:, None], f[candidates.indices], compute_mode=DIFFERENCES)[:, 0]
    best = distance.topk(count, dim=1, largest=False, sorted=True)
    index = candidates.indices.gather(1, best.indices)
    # A squared distance is 2 - 2 cosine; what is no candidate is at least as far as the last one, but for rounding.
    exact = torch.get_float32_matmul_precision() == "highest" or f.dtype == torch.float64
    rounding = 4 * (f.shape[1] + 4) * (torch.finfo(f.dtype).eps if exact else 2**-8)
    doubtful = best.values[:, -1].square() + rounding > 2 - 2 * candidates.values[:, -1]
    if bool(doubtful.any()):
        index[doubtful] = _nearest_in_full(rows[doubtful], f, count)
    return index


def _nearest_in_full(rows: Tensor, f: Tensor, count: int) -> Tensor:
    distance = torch.cdist(f[rows], f, compute_mode=DIFFERENCES)
    distance.scatter_(1, rows[:, None], torch.inf)
    return distance.topk(count, dim=1, largest=False, sorted=True).indices


def _neighbor_sum(index: Tensor, symmetric: bool) -> Callable[[Tensor], Tensor]:
    """Y -> W Y for the (samples, count) neighbours `index`, or (W + W^T) Y / 2, without forming W."""
    samples, count = index.shape
    if count == 0:
        return torch.zeros_like
    if not symmetric:
        return lambda y: F.embedding_bag(index, y, mode="sum")
    flat = index.flatten()
    sources = flat.argsort(stable=True) // count
    chosen = torch.bincount(flat, minlength=samples)
    starts = chosen.cumsum(0) - chosen
    return lambda y: (F.embedding_bag(index, y, mode="sum") + F.embedding_bag(sources, y, starts, mode="sum")) / 2


def _agreement(p: Tensor, index: Tensor) -> float:
    labels = p.argmax(1)
    return float((labels[index] == labels[:, None]).to(p.dtype).mean())


def _worth_adapting(p: Tensor, agreement: float, neighbors: int) -> bool:
    """Whether the neighbours of a sample can be, and seem to be, of its class.

    Most of them cannot where the classes of the batch have too few samples each, by the number of classes that the
    classifier's own labels effectively make up. They seem to be where they agree more than by chance; a batch in which
    a few classes prevail is not asked, since there chance is high and the method does most good.
    """
    samples, classes = p.shape
    chance = float((torch.bincount(p.argmax(1)).to(p.dtype) / samples).square().sum())
    if samples * chance < neighbors / 2 + 1:
        return False
    pairs = samples * (samples - 1) / 2
    mixed = 1 / samples + 2 * (pairs / classes + 2 * math.sqrt(pairs * (1 - 1 / classes) / classes)) / samples**2
    edges = samples * min(neighbors, samples - 1)
    return chance > mixed or agreement > chance + 2 * math.sqrt(chance * (1 - chance) / edges)


def _matrix(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise InputError(f"LAME: {what} must be numbers, not {array.dtype}.")
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if tensor.dim() != 2:
        raise InputError(
            f"LAME: {what} must have two dimensions (samples, …), not {tensor.dim()}; average pooled maps over height "
            "and width first."
        )
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _probabilities(p: Tensor, logits: bool) -> Tensor:
    if p.shape[1] < 2:
        raise InputError("LAME: at least two classes are needed.")
    if len(p) == 0:
        raise InputError("LAME: the batch is empty.")
    if not bool(p.isfinite().all()):
        raise InputError("LAME: probabilities hold values that are not finite.")
    if logits:
        return torch.softmax(p, dim=1)
    wrong = ((p < 0).any(1) | ((p.sum(1) - 1).abs() > 1e-3)).nonzero()
    if len(wrong):
        raise InputError(
            f"LAME: rows of probabilities must be non-negative and sum to 1, unlike row {int(wrong[0])}; pass "
            "logits=True for logits."
        )
    return p


def _directions(f: Tensor, samples: int) -> Tensor:
    if len(f) != samples:
        raise InputError(f"LAME: {samples} rows of probabilities but {len(f)} of features.")
    if not bool(f.isfinite().all()):
        raise InputError("LAME: features hold values that are not finite.")
    f = f / f.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(f.dtype).tiny)
    norm = f.norm(dim=1, keepdim=True)
    zero = (norm[:, 0] == 0).nonzero()
    if len(zero):
        raise InputError(f"LAME: the features of row {int(zero[0])} are all zero, so they have no direction.")
    directions: Tensor = f / norm
    return directions


def _has_transform(self: LAMEClassifier) -> bool:
    return self.transformer is not None


class LAMEClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Any scikit-learn classifier whose predictions are adapted by LAME, batch by batch in the order of the rows.

    Parameters
    ----------
    classifier : a classifier with `predict_proba`; it is cloned and fitted by `fit`. Put one that is trained already
        into `sklearn.frozen.FrozenEstimator`. None is a logistic regression.
    method : LAME, or None for its defaults.
    transformer : a fitted object whose `transform` gives the features; None uses the inputs themselves. A row whose
        features are all zero has no direction, and keeps the classifier's prediction.
    batch_size : rows that are adapted together.

    Attributes
    ----------
    classifier_ : the fitted classifier.
    classes_ : (classes,) its classes, in the order of the columns of `predict_proba`.

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

        check_scalar(self.batch_size, "batch_size", Integral, min_val=1)
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
        p = np.array(self.classifier_.predict_proba(X), dtype=np.float64)
        features = np.asarray(X if self.transformer is None else self.transformer.transform(X), dtype=np.float64)
        for start in range(0, len(p), self.batch_size):
            rows = start + np.flatnonzero(features[start : start + self.batch_size].any(axis=1))
            if len(rows):
                p[rows] = method.adapt(p[rows], features[rows]).probabilities
        return p

    def predict(self, X: Any) -> np.ndarray[Any, Any]:
        """(samples,) adapted classes."""
        adapted = self.predict_proba(X)
        chosen: np.ndarray[Any, Any] = self.classes_[adapted.argmax(1)]
        return chosen

    @available_if(_has_transform)  # type: ignore[untyped-decorator]
    def transform(self, X: Any) -> Any:
        """The features that neighbours are found by."""
        return self.transformer.transform(X)
