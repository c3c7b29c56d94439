"""What a method is, by what the user writes: attach, edit, merge, decode, run over a chat, fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from gratis.contract.card import Card
from gratis.contract.parameters import Declared

if TYPE_CHECKING:
    from torch import Tensor

    from gratis.contract.attach import Scope


def kebab(name: str) -> str:
    """`self_certainty` or `SelfCertainty` as `self-certainty`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return spaced.replace("_", "-").lower()


class Method(Declared):
    """One published technique with its parameters: small, immutable, validated when constructed."""

    card: ClassVar[Card]
    kind: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """The method's name on the command line and in recipes: its file's name, hyphenated."""
        return type(self).method_name()

    @classmethod
    def method_name(cls) -> str:
        """The name of the class in the catalogue."""
        return kebab(cls.__module__.rpartition(".")[2])

    @classmethod
    def family(cls) -> str:
        """The family folder the method lives in."""
        return cls.__module__.split(".")[-2]

    @property
    def holds(self) -> tuple[str, ...]:
        """What this instance needs for itself on the subject."""
        return self.card.holds


class Attachable(Method):
    """A method that goes on a live subject and comes off without a trace."""

    kind = "attach"

    def check(self, subject: Any) -> None:
        """Raise SubjectError, in one sentence that says what to do, if the method cannot act on `subject`.

        Nothing may be changed here.
        """
        raise NotImplementedError

    def install(self, subject: Any, scope: Scope) -> Any:
        """Put the method on. Every change goes through `scope`, which undoes it.

        Returns None, or a function without arguments that returns the report (a dict of plain values) of what the
        method did since it was attached.
        """
        raise NotImplementedError


class Decoding(Attachable):
    """A method that chooses tokens: it attaches to the model's own `generate`."""

    kind = "decode"


class Program(Attachable):
    """A method over a chat: text in, text out, several requests for one answer."""

    kind = "program"


class Edit(Method):
    """A method that computes a weight change once: `edit(model, …)` returns a Delta, which is attached."""

    kind = "edit"


@dataclass
class MergePart:
    """A stretch of one tensor that a merge works on, and what is known about the whole."""

    tensor: str
    start: int
    """Flat index of the first element within its tensor."""
    weights: tuple[float, ...]
    """One per expert."""
    cutoffs: tuple[Cutoff, ...] = ()
    """One per expert, where the method keeps a share of the largest magnitudes."""
    measured: tuple[float, ...] = ()
    """Sums over the whole tensor of what `measure` returned for its parts."""
    totals: dict[str, float] = field(default_factory=dict)
    """Sums over all parts that the method adds to."""
    revise: bool = False
    """Set by the method where its result depends on totals that are complete only at the end."""
    shape: tuple[int, ...] = ()
    """Shape of the whole tensor."""
    base: Tensor | None = None
    """The base's stretch, for methods that are given weights rather than differences. Not to be written."""
    known: Any = None
    """What `survey` returned."""


@dataclass(frozen=True)
class Cutoff:
    """The smallest magnitude that is kept; of entries equal to it, those up to flat index `last`."""

    magnitude: float
    last: int


class Survey(Protocol):
    """What a merge may ask about whole tensors before any is combined; every question is a pass over the checkpoints."""

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the tensors that are merged, by name."""
        ...

    @property
    def experts(self) -> int:
        """Number of experts."""
        ...

    @property
    def each(self) -> Sequence[Any]:
        """The method with the parameters of each expert, which may have their own."""
        ...

    def sums(self, measure: Callable[[list[Tensor], MergePart], Tensor]) -> dict[str, tuple[float, ...]]:
        """By tensor, the sums over its stretches of what `measure` returns: (sums,) float64 numbers."""
        ...

    def cutoffs(
        self,
        values: Callable[[list[Tensor], MergePart], Tensor],
        share: float,
        scope: Literal["global", "tensor"] = "tensor",
    ) -> dict[str, Cutoff]:
        """By tensor, the exact cutoff of the largest `share` of `values`, of which at least one is kept.

        `values` maps the experts' stretches to one float32 number >= 0 per element.
        """
        ...


class Merge(Method):
    """A method that reads checkpoints and writes one: see `gratis.merge`.

    `combine` is a pure function of flat float32 stretches; reading, chunking, threads, dtypes and files are the
    engine's. The result must not depend on how tensors are cut into stretches, unless `unit` asks for whole ones.
    """

    kind = "merge"
    needs_base: ClassVar[bool] = True
    """Whether experts are given as differences to a base, and the result is added to it."""
    differences: ClassVar[bool] = True
    """False for a method that needs a base but works on weights: it is given `part.base` and returns weights."""
    describes: ClassVar[int | None] = None
    """Number of the expert whose tokenizer, chat template and generation settings the result has; None: the base's."""
    configures: ClassVar[int | None] = None
    """Number of the expert whose config.json the result has; None: the base's."""

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["stretch", "row", "tensor"]:
        """What `combine` needs of `tensor` at once: any stretch, whole rows of `reshape(shape[0], -1)`, or all of it."""
        return "stretch"

    def survey(self, survey: Survey) -> Any:
        """Ask about whole tensors once, before anything is combined; the answer is every part's `known`."""
        return None

    def check_experts(self, count: int) -> None:
        """Raise InputError where the method cannot merge `count` experts."""

    def kept_share(self) -> tuple[float, str] | None:
        """Share of the largest magnitudes that `combine` needs cutoffs for, and its scope ("tensor" or "global")."""
        return None

    measures: ClassVar[bool] = False
    """Whether `combine` needs sums over whole tensors, which `measure` takes in a pass of its own."""

    def measure(self, experts: list[Tensor], part: MergePart) -> Tensor:
        """(sums,) float64 numbers of this stretch, to be summed over the tensor: norms, inner products, counts."""
        raise NotImplementedError

    def prepare(self, expert: Tensor, number: int, part: MergePart) -> None:
        """Change expert `number`'s stretch in place before cutoffs are taken and before `combine`."""

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        """The merged stretch (a difference to the base where `needs_base`).

        `experts` are flat float32 tensors that may be overwritten, one of which may be returned.
        """
        raise NotImplementedError

    def revised(self, totals: dict[str, float]) -> Merge | None:
        """The method to redo stretches with that asked for it, once all totals are known; None leaves them."""
        return None


class Estimator(Method):
    """A method over arrays. Its parameters are read and cloned as scikit-learn's are."""

    kind = "estimator"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor arguments, as scikit-learn asks for them."""
        return self.parameters()

    def set_params(self, **changes: Any) -> Estimator:
        """Change parameters in place, as scikit-learn's searches do; all are validated first. Raises ParameterError."""
        for name, value in self.replace(**changes).parameters().items():
            object.__setattr__(self, name, value)
        return self


KINDS: dict[str, str] = {kind.__name__: kind.kind for kind in (Attachable, Decoding, Program, Edit, Merge, Estimator)}
"""Base class to kind, so that the kind of a method is known from its source."""
