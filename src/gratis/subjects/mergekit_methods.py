"""mergekit's methods as ours: what each key stands for, with the defaults of mergekit 0.1.5.

A method asks for the settings of one tensor and answers which of our merges it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gratis.contract.errors import FileError, GratisError
from gratis.contract.method import Merge
from gratis.subjects.merge_recipe import merge_method


class _Required:
    pass


REQUIRED = _Required()


@dataclass(frozen=True)
class Question:
    """What a method may ask about one tensor."""

    file: Path
    models: tuple[str, ...]
    """Names of the sources, in their order."""
    base: str | None
    setting: Callable[..., Any]
    """What the file says about a key: `setting(key, default, place)`, of the source at `place` or of the whole."""

    @property
    def others(self) -> list[int]:
        """Places of the sources that are not the base."""
        return [place for place, model in enumerate(self.models) if model != self.base]

    def made(self, name: str, **parameters: Any) -> Merge:
        try:
            return merge_method(name, parameters)
        except GratisError as error:
            raise FileError(f"The recipe {self.file}: {error}") from error

    def need_base(self, name: str) -> None:
        if self.base is None:
            raise FileError(f"The recipe {self.file}: {name} needs a base_model.")


Combination = tuple[Merge, tuple[float, ...], tuple[int, ...], tuple[Merge, ...]]


def _linear(ask: Question) -> Combination:
    places = range(len(ask.models))
    weights = tuple(ask.setting("weight", REQUIRED, place) for place in places)
    if not ask.setting("normalize", True) and abs(sum(weights) - 1) > 1e-9:
        return ask.made("average", normalize=False), weights, tuple(places), ()
    return ask.made("average"), weights, tuple(places), ()


def _task_vectors(name: str, normalized: bool, density: bool, divided: bool) -> Callable[[Question], Combination]:
    """Methods that add sparsified task vectors; `divided` where entries of one sign are averaged."""

    def combination(ask: Question) -> Combination:
        ask.need_base(name)
        places = ask.others
        if not places:
            raise FileError(f"The recipe {ask.file}: {name} needs models besides base_model.")
        weights = tuple(ask.setting("weight", REQUIRED, place) for place in places)
        ask.setting("int8_mask", False)
        normalize, scale = ask.setting("normalize", normalized), ask.setting("lambda", 1.0)
        dropped = name.startswith(("dare", "della"))
        if density and ask.setting("rescale", dropped) != dropped:
            raise FileError(
                f"The recipe {ask.file}: rescale: {str(not dropped).lower()} is not supported; what is dropped at random "
                "is rescaled, which is unbiased, and nothing else is."
            )
        parameters: dict[str, Any] = {"scale": scale}
        if name == "ties":
            parameters |= {"scope": "tensor", "zero_sums": "positive"}
        if divided:
            parameters["divisor"] = "weight" if normalize else "none"
        elif normalize:
            total = sum(weights)
            weights = tuple(w / total for w in weights) if abs(total) >= 1e-8 else weights
        densities = [min(ask.setting("density", 1.0, place), 1.0) for place in places] if density else []
        # A density of 0 is a weight of 0: nothing of that model is left.
        weights = tuple(
            0.0 if densities and densities[i] <= 0 else weight for i, weight in enumerate(weights)
        )  # fmt: skip
        densities = [value if value > 0 else 1.0 for value in densities]
        own = OURS[name]
        if not densities:
            return ask.made(own, **parameters), weights, tuple(places), ()
        ends: list[dict[str, Any]] = [{} for _ in places]
        if name.startswith("breadcrumbs"):
            # The share that is kept comes before the share of outliers.
            gammas = [ask.setting("gamma", 0.01, place) for place in places]
            ends = [{"outliers": min(g, 1 - d)} for g, d in zip(gammas, densities, strict=True)]
        elif name.startswith("della"):
            ends = [{"spread": ask.setting("epsilon", 0.15, place)} for place in places]
        each = tuple(ask.made(own, density=d, **end, **parameters) for d, end in zip(densities, ends, strict=True))
        return each[0], weights, tuple(places), each if len(set(each)) > 1 else ()

    return combination


OURS = {
    "task_arithmetic": "task-arithmetic", "ties": "ties", "dare_ties": "dare-ties", "dare_linear": "dare",
    "breadcrumbs": "breadcrumbs", "breadcrumbs_ties": "breadcrumbs-ties", "della": "della",
    "della_linear": "della-linear",
}  # fmt: skip


def _slerp(ask: Question) -> Combination:
    ask.need_base("slerp")
    first = next((n for n, model in enumerate(ask.models) if model == ask.base), None)
    if first is None or len(ask.models) != 2:
        raise FileError(f"The recipe {ask.file}: slerp needs two models, of which base_model is one.")
    return ask.made("slerp", t=ask.setting("t", REQUIRED)), (1.0, 1.0), (first, 1 - first), ()


def _near_swap(ask: Question) -> Combination:
    ask.need_base("nearswap")
    first = next((n for n, model in enumerate(ask.models) if model == ask.base), None)
    if first is None or len(ask.models) != 2:
        raise FileError(f"The recipe {ask.file}: nearswap needs two models, of which base_model is one.")
    return ask.made("near-swap", t=ask.setting("t", REQUIRED)), (1.0, 1.0), (first, 1 - first), ()


def _nuslerp(ask: Question) -> Combination:
    if ask.setting("nuslerp_row_wise", False) or not ask.setting("nuslerp_flatten", True):
        raise FileError(f"The recipe {ask.file}: nuslerp is done on whole tensors only (nuslerp_flatten: true).")
    if ask.base is not None:
        raise FileError(f"The recipe {ask.file}: nuslerp with a base_model is not supported; leave base_model out.")
    places = ask.others
    if len(places) != 2:
        raise FileError(f"The recipe {ask.file}: nuslerp needs two models.")
    weights = [ask.setting("weight", REQUIRED, place) for place in places]
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    if not 0 <= t <= 1:
        raise FileError(f"The recipe {ask.file}: the weights of nuslerp must not be negative.")
    return ask.made("slerp", t=t), (1.0, 1.0), tuple(places), ()


def _of_all(name: str, ours: str, keys: Mapping[str, tuple[str, float]]) -> Callable[[Question], Combination]:
    """Methods of task vectors without weights; `keys` are mergekit's, each with our name and its default."""

    def combination(ask: Question) -> Combination:
        ask.need_base(name)
        places = tuple(ask.others)
        if not places:
            raise FileError(f"The recipe {ask.file}: {name} needs models besides base_model.")
        ask.setting("int8_mask", False)
        parameters = {own: ask.setting(key, default) for key, (own, default) in keys.items()}
        return ask.made(ours, **parameters), (1.0,) * len(places), places, ()

    return combination


def _ram(ask: Question) -> Combination:
    if ask.setting("epsilon", 1e-5) != 1e-5:
        raise FileError(f"The recipe {ask.file}: epsilon of ram is 1e-5 here, which cannot be changed.")
    return _of_all("ram", "ram", {})(ask)


def _arcee_fusion(ask: Question) -> Combination:
    ask.need_base("arcee_fusion")
    if len(ask.others) != 1:
        raise FileError(f"The recipe {ask.file}: arcee_fusion needs two models, of which base_model is one.")
    return ask.made("arcee-fusion"), (1.0,), tuple(ask.others), ()


def _multislerp(ask: Question) -> Combination:
    if ask.base is not None:
        raise FileError(f"The recipe {ask.file}: multislerp with a base_model is not supported; leave base_model out.")
    if not ask.setting("normalize_weights", True):
        raise FileError(f"The recipe {ask.file}: normalize_weights: false is not supported.")
    places = tuple(ask.others)
    ask.setting("eps", 1e-8)
    return ask.made("multi-slerp"), tuple(ask.setting("weight", REQUIRED, p) for p in places), places, ()


def _karcher(ask: Question) -> Combination:
    places = tuple(range(len(ask.models)))
    parameters = {"iterations": int(ask.setting("max_iter", 10.0)), "tolerance": ask.setting("tol", 1e-5)}
    return ask.made("karcher", **parameters), (1.0,) * len(places), places, ()


def _model_stock(ask: Question) -> Combination:
    ask.need_base("model_stock")
    if ask.setting("filter_wise", False):
        raise FileError(f"The recipe {ask.file}: filter_wise is not supported.")
    places = tuple(ask.others)
    return ask.made("model-stock", clamp=False), (1.0,) * len(places), places, ()


def _passthrough(ask: Question) -> Combination:
    if len(ask.models) != 1:
        raise FileError(f"The recipe {ask.file}: passthrough takes one source per slice.")
    scale = ask.setting("scale", 1.0, 0)
    if scale == 1.0:
        return ask.made("average"), (1.0,), (0,), ()
    return ask.made("average", normalize=False), (scale,), (0,), ()


METHODS: dict[str, Callable[[Question], Combination]] = {
    "linear": _linear,
    "task_arithmetic": _task_vectors("task_arithmetic", False, False, False),
    "ties": _task_vectors("ties", True, True, True),
    "dare_ties": _task_vectors("dare_ties", False, True, True),
    "dare_linear": _task_vectors("dare_linear", False, True, False),
    "breadcrumbs": _task_vectors("breadcrumbs", False, True, False),
    "breadcrumbs_ties": _task_vectors("breadcrumbs_ties", False, True, True),
    "della": _task_vectors("della", True, True, True),
    "della_linear": _task_vectors("della_linear", False, True, False),
    "sce": _of_all("sce", "sce", {"select_topk": ("density", 1.0)}),
    "ram": _ram,
    "arcee_fusion": _arcee_fusion,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "nearswap": _near_swap,
    "model_stock": _model_stock,
    "passthrough": _passthrough,
}
"""By mergekit's name: which of our merges a tensor gets, weights, places of its sources, and parameters of each."""
