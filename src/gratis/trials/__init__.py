"""Before and after: measuring, claims, reports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gratis.trials.claims import ClaimResult, verify
    from gratis.trials.measuring import try_method
    from gratis.trials.page import save_page
    from gratis.trials.trial import Trial

_PUBLIC = {
    "ClaimResult": "gratis.trials.claims",
    "Trial": "gratis.trials.trial",
    "save_page": "gratis.trials.page",
    "try_method": "gratis.trials.measuring",
    "verify": "gratis.trials.claims",
}
__all__ = ["ClaimResult", "Trial", "save_page", "try_method", "verify"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'gratis.trials' has no attribute {name!r}")
