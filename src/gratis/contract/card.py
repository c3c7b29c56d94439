"""What a method declares about itself.

Cards are literals: the catalogue reads them from the source without importing the method, so that listing a
hundred methods loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ActsOn = Literal[
    "language model", "masked-diffusion model", "checkpoints", "chat", "features", "diffusion pipeline",
    "torch module",
]  # fmt: skip
"""What a method acts on: the ecosystem's own object, in the field's words."""

Compare = Literal["value", "difference", "ratio"]

HELD: Mapping[str, str] = {
    "answers": "asks for several answers to make one of them",
    "attention": "attends in a way of its own",
    "attention to the first token": "decides how much attention the first token gets",
    "choice of keys": "chooses the keys that are attended to",
    "early commit": "decides when the rest is written at once",
    "generate": "chooses the tokens that generate returns",
    "key of the first token": "changes the first token's key",
    "kv cache": "keeps the cache in a way of its own",
    "logits": "makes the logits that tokens are chosen by",
    "scale of attention": "scales the logits of attention",
    "text of a pass": "decides which text a pass of the model reads",
    "unet forward": "decides which parts of the U-Net run",
    "unmasking": "decides which tokens are unmasked",
}
"""What only one method at a time can have of a subject, and what one that has it does, in words after its name."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a method promises on a task, written so that it can fail.

    The figure is the metric with the method on (`value`), that minus the baseline's (`difference`), or divided by
    it (`ratio`). The baseline is the untouched subject unless `against` names a method.
    """

    name: str
    """What is promised, as a sentence fragment that a newcomer understands."""
    task: str
    metric: str
    compare: Compare = "value"
    at_most: float | None = None
    at_least: float | None = None
    against: str | None = None
    """Name of the baseline method; None is the untouched subject."""
    against_parameters: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the method under the claim, where they differ from the defaults."""
    task_parameters: Mapping[str, Any] = field(default_factory=dict)
    subject: str | None = None
    """Name of the subject for `gratis.open`; None is the task's own."""

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"claim {self.name!r} needs exactly one of at_most and at_least")

    @property
    def bound(self) -> str:
        """The bound as text: `<= 0.1` or `>= 3`."""
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def holds(self, figure: float) -> bool:
        """Whether `figure` is within the bound; a figure that is not a number never is."""
        if self.at_most is not None:
            return figure <= self.at_most
        return self.at_least is not None and figure >= self.at_least


@dataclass(frozen=True, kw_only=True)
class Card:
    """Identity of a method: its paper, what it acts on, what it spares the user, and what it promises."""

    title: str
    """Title of the paper."""
    year: int
    acts_on: ActsOn
    free_of: tuple[str, ...]
    """What the user does not need: training, labels, calibration data …"""
    seed: int | None = None
    """Row of the project's list of papers; None for baselines."""
    authors: str = ""
    paper: str = ""
    """Where to read it: an arXiv number or an address."""
    summary: str = ""
    """One line for the list: what the user gets."""
    unchanged_when: Mapping[str, Any] | None = None
    """Parameter values at which the method changes nothing; None where the method has no such limit."""
    any_length: bool = False
    """Whether it lets a model read texts longer than the window that the model was trained for."""
    holds: tuple[str, ...] = ()
    """What the method needs for itself, of `HELD`: two that hold the same cannot stack."""
    why: Mapping[str, str] = field(default_factory=dict)
    """What it does with what it holds, where that is more than `HELD` says: words that follow the method's name."""
    examples: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that make the method act on the tiny subjects of the contract tests."""
    differs: str = ""
    """Where this implementation leaves the authors' code, and why."""
    limits: str = ""
    """When not to use it."""
    claims: tuple[Claim, ...] = ()
