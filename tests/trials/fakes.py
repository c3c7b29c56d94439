"""A subject, a task and methods whose right measurements are known by construction."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from gratis.contract.attach import Scope
from gratis.contract.card import Card, Claim
from gratis.contract.catalogue import Catalogue, Entry
from gratis.contract.errors import SubjectError
from gratis.contract.method import Attachable, kebab
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Series, Task, TaskCard

LOG: list[tuple[str, float, int]] = []
"""What was measured, in order: size of the task, value of the subject, seed."""


class Number:
    """A subject: one number, which methods raise."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value


class Raise(Attachable):
    """Raise the number."""

    card = Card(
        title="Raising",
        year=2020,
        acts_on="torch module",
        free_of=("training",),
        summary="a higher number",
        claims=(
            Claim(name="raises by one", task="count", metric="score", compare="difference", at_least=0.9),
            Claim(name="raises a hundredfold", task="count", metric="score", compare="ratio", at_least=100),
        ),
    )

    by: float = param(1.0, at_least=0, help="how far")
    shared: int = param(3, above=0, help="what two methods have in common", unit="tokens")

    def check(self, subject: Any) -> None:
        if not isinstance(subject, Number):
            raise SubjectError("Raise acts on a Number.")

    def install(self, subject: Any, scope: Scope) -> Any:
        scope.set_attribute(subject, "value", subject.value + self.by)
        return lambda: {"raised_by": self.by}


class Lower(Raise):
    """Lower the number."""

    card = Card(title="Lowering", year=2021, acts_on="torch module", free_of=(), summary="a lower number")

    def install(self, subject: Any, scope: Scope) -> Any:
        scope.set_attribute(subject, "value", subject.value - self.by)


class Break(Raise):
    """Break when it is measured."""

    card = Card(
        title="Breaking",
        year=2022,
        acts_on="torch module",
        free_of=(),
        summary="nothing",
        claims=(
            Claim(name="breaks", task="count", metric="score", at_least=0),
            Claim(name="asks for what is not measured", task="count", metric="nothing", at_least=0),
        ),
    )

    def install(self, subject: Any, scope: Scope) -> Any:
        scope.set_attribute(subject, "value", None)


class Count(Task):
    """Items are the subject's value plus a wobble that is the same for every arm."""

    card = TaskCard(
        title="Counting",
        acts_on="torch module",
        data="whole numbers",
        metrics=(
            Metric(name="score", help="mean value", unit="points"),
            Metric(name="noise", help="what no method changes"),
            Metric(name="effort", help="work done", higher_is_better=False, cost=True),
        ),
        untouched="as it is",
    )

    size: int = param(8, above=0, help="items")
    wobble: float = param(0.1, at_least=0, help="spread of the items' differences")

    def subject(self) -> Any:
        return Number()

    def check(self, subject: Any) -> None:
        if not isinstance(subject, Number):
            raise SubjectError("count needs a Number.")

    def measure(self, subject: Any, *, seed: int, progress: Any = None) -> Measurement:
        LOG.append((str(self.size), subject.value, seed))
        time.sleep(0.002)
        items = [subject.value * (1 + self.wobble * ((i + seed) % 3 - 1)) for i in range(self.size)]
        return Measurement(
            metrics={"score": sum(items) / len(items), "noise": 0.5, "effort": float(self.size)},
            items={"score": items, "noise": [0.5] * self.size},
            series={"score": Series(list(range(self.size)), items, "item (number)", "score (points)", [(2.0, "two")])},
            tokens=self.size,
            calls=1,
            details={"largest": max(items)},
        )


class WarmCount(Count):
    """The same with a short form."""

    card = TaskCard(
        title="Counting", acts_on="torch module", data="whole numbers", metrics=Count.card.metrics, warm_up={"size": 2}
    )


def entries(*kinds: type) -> dict[str, Entry]:
    """Catalogue entries of classes that are defined here."""
    made = {}
    for kind in kinds:
        entry = Entry(
            name=kebab(kind.__name__), class_name=kind.__name__, module=__name__, family="fakes",
            base=kind.__bases__[0].__name__, card=kind.card,
        )  # fmt: skip
        made[entry.name] = entry
    return made


def fake_catalogue(*kinds: type) -> Catalogue:
    """A catalogue that holds just these classes."""
    made = Catalogue.__new__(Catalogue)
    made._what = "thing"
    made.__dict__["entries"] = entries(*kinds)
    return made


def install(monkeypatch: Any) -> SimpleNamespace:
    """Put the fakes where trials look for methods and tasks."""
    from gratis.trials import claims, measuring

    methods, tasks = fake_catalogue(Raise, Lower, Break), fake_catalogue(Count, WarmCount)
    for module in (claims, measuring):
        monkeypatch.setattr(module, "catalogue", methods)
        monkeypatch.setattr(module, "task_catalogue", tasks)
    LOG.clear()
    return SimpleNamespace(methods=methods, tasks=tasks)
