"""Opening what methods act on, and finding its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gratis.subjects.opening import open, tokenizer_of

__all__ = ["open", "tokenizer_of"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from gratis.subjects import opening

        return getattr(opening, name)
    raise AttributeError(f"module 'gratis.subjects' has no attribute {name!r}")
