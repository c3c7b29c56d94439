"""Merge a segmenter and its specialists into one that finds sprites in every look of the sprite world."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from gratis.contract.errors import SubjectError
from gratis.contract.method import Method
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent

MODELS = ("sprites-segmenter", "sprites-segmenter-textured", "sprites-segmenter-faded")
SEARCHED, REPORTED = 2_000_000, 3_000_000
"""First scene of the pictures that a search may see, and of those that are reported on."""


class SegmentationMerging(Task):
    """Three small SAM models, trained on plain, patterned and faded pictures; one merged model is measured on all looks."""

    card = TaskCard(
        title="Merging segmenters of different looks",
        acts_on="checkpoints",
        data=(
            "sprite pictures of four looks (plain, patterned, faded, thin shapes), 64 x 64 pixels with a box prompt; the "
            "zoo's three SAM models; a search sees other pictures than those reported on; without a method, the model "
            "that is best on the search's pictures"
        ),
        metrics=(
            Metric(name="dice", help="mean over the looks of the Dice score on unseen pictures"),
            Metric(name="worst", help="Dice score of the look that is served worst"),
        ),
        untouched="best single model",
    )

    search: int = param(40, above=0, unit="pictures", help="pictures of each look that a search scores on")
    pictures: int = param(100, above=0, unit="pictures", help="pictures of each look that are reported on")
    looks: tuple[str, ...] = param(("clean", "textured", "faded", "thin"), help="looks that count")
    regime: str = param("single", choices=("single", "multi"), help="search one mean score, or a front over looks")
    device: str = param("cpu", help="where pictures are segmented")
    prefix_cache: bool = param(
        False, help="run a model from the first changed group on: for models whose layers cost more than their hashes"
    )

    def subject(self) -> Any:
        from gratis import zoo
        from gratis.zoo.sprites_segmenter import boxed

        models = [zoo.load(name) for name in MODELS]
        states = [{name: tensor.detach().clone() for name, tensor in m.state_dict().items()} for m in models]
        seen = {look: boxed(look, SEARCHED, SEARCHED + self.search) for look in self.looks}
        unseen = {look: boxed(look, REPORTED, REPORTED + self.pictures) for look in self.looks}
        return models[0].to(self.device), states, seen, unseen

    def applied(self, subject: Any, method: Method | None) -> AbstractContextManager[Any]:
        return self._merged(subject, method)

    @contextmanager
    def _merged(self, subject: Any, method: Method | None) -> Iterator[Any]:
        from gratis.contract.method import Merge
        from gratis.methods.merging.medsamix import MedSAMix
        from gratis.subjects.merging import merge_state_dicts
        from gratis.subjects.prefix_cache import PrefixCache

        model, states, seen, unseen = subject
        before = states[0]
        details: dict[str, Any] = {}

        def score(state: Any, budget: int, load: Any = model.load_state_dict) -> Any:
            load(state)
            # Small sets lie within large ones, batch by batch.
            found = {look: _dice(model, seen[look].first(max(budget, 1)), 8).mean().item() for look in seen}
            return found if self.regime == "multi" else {"dice": sum(found.values()) / len(found)}

        try:
            if method is None:
                means = [sum(score(state, self.search).values()) for state in states]
                chosen = max(range(len(states)), key=lambda place: means[place])
                details["model"] = MODELS[chosen]
                model.load_state_dict(states[chosen])
            elif isinstance(method, MedSAMix):
                cached = PrefixCache(model, every=method.layer_granularity) if self.prefix_cache else nullcontext()
                with cached as cache:
                    load = cache.load if cache is not None else model.load_state_dict
                    found = method.search(
                        states[0], states, lambda state, budget: score(state, budget, load), samples=self.search
                    )
                if cache is not None:
                    details["layers skipped"] = cache.layers_skipped / (cache.layers_skipped + cache.layers_run)
                details |= {
                    "trials": len(found.trials),
                    "score on the search's pictures": sum(found.score.values()) / len(found.score),
                    "methods of the groups": ", ".join(group["method"] for group in found.configuration),
                    "front": len(found.front),
                }
                model.load_state_dict(found.state_dict)
            elif isinstance(method, Merge):
                # A base among its experts adds nothing to differences from it.
                experts = states[1:] if method.needs_base else states
                model.load_state_dict(merge_state_dicts(method, experts, states[0]))
            else:
                raise SubjectError(f"{method.name} is no merge.")
            yield model, unseen, details
        finally:
            model.load_state_dict(before)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        model, unseen, details = subject
        scores = {}
        for done, (look, pictures) in enumerate(unseen.items(), 1):
            scores[look] = _dice(model, pictures).tolist()
            progress(done / len(unseen), look)
        means = {look: sum(values) / len(values) for look, values in scores.items()}
        return Measurement(
            metrics={"dice": sum(means.values()) / len(means), "worst": min(means.values())},
            items={"dice": [value for values in scores.values() for value in values]},
            calls=len(unseen),
            details={**details, **{f"Dice, {look}": mean for look, mean in means.items()}},
        )


def _dice(model: Any, pictures: Any, batch: int = 64) -> Any:
    from gratis.zoo.sprites_segmenter import scores

    return scores(model, pictures, batch)
