"""Get more out of models you already have, without training them.

One verb, `gratis.attach`, on standard transformers, diffusers, torch and scikit-learn objects. Methods are
attributes of this package by their class name (`gratis.LaCache`); `gratis.catalogue` lists them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gratis.contract.catalogue import catalogue
from gratis.contract.release import VERSION

if TYPE_CHECKING:
    from gratis.contract.attach import Attachment, attach, attached
    from gratis.contract.delta import Delta
    from gratis.contract.errors import GratisError
    from gratis.contract.recipe import Recipe
    from gratis.subjects import open
    from gratis.subjects.chat import Chat
    from gratis.subjects.merging import merge
    from gratis.tasks.task import task_catalogue
    from gratis.trials import try_method, verify

__version__ = VERSION

_PUBLIC = {
    "Attachment": "gratis.contract.attach",
    "attach": "gratis.contract.attach",
    "attached": "gratis.contract.attach",
    "Delta": "gratis.contract.delta",
    "GratisError": "gratis.contract.errors",
    "Recipe": "gratis.contract.recipe",
    "open": "gratis.subjects",
    "Chat": "gratis.subjects.chat",
    "merge": "gratis.subjects.merging",
    "task_catalogue": "gratis.tasks.task",
    "try_method": "gratis.trials",
    "verify": "gratis.trials",
}

__all__ = [
    "Attachment", "Chat", "Delta", "GratisError", "Recipe", "attach", "attached", "catalogue", "merge", "open",
    "task_catalogue", "try_method", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    for entry in catalogue.entries.values():
        if entry.class_name == name:
            return entry.load()
    raise AttributeError(f"module 'gratis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *(entry.class_name for entry in catalogue.entries.values())})
