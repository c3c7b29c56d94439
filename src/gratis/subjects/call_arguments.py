"""The arguments of a call by name, whatever way they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, those of **kwargs among them. Raises TypeError as the call itself would."""
    bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound
