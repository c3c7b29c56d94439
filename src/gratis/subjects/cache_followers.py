"""What a method keeps beside a model's cache, and that must go along when generate reorders, cuts or copies the cache."""

from __future__ import annotations

import functools
from typing import Any, Protocol

from torch import Tensor

ATTRIBUTE = "_gratis_followers"


class Follower(Protocol):
    """What generate does to a cache, by the names that transformers gives it."""

    def crop(self, count: int) -> None:
        """The last -`count` tokens go, or the first `count` stay where it is positive."""
        ...

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of beams."""
        ...

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        ...

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows only."""
        ...

    def reset(self) -> None:
        """Nothing is read."""
        ...


NAMES = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


def followers(cache: Any) -> list[Any]:
    """What follows a cache, none where nothing does."""
    return getattr(cache, ATTRIBUTE, [])


def follow(cache: Any, beside: list[Any]) -> None:
    """Make `beside` (each a Follower) be reordered, cut, repeated and copied as `cache` is."""
    if not hasattr(cache, ATTRIBUTE):
        kind: Any = type(cache)
        cache.__class__ = _followed(kind)
    setattr(cache, ATTRIBUTE, beside)


@functools.cache
def _followed(kind: type) -> type:
    """The class of caches `kind` with others that follow."""

    def following(name: str) -> Any:
        own = getattr(kind, name)

        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for other in followers(self):
                getattr(other, name)(*args, **kwargs)
            return own(self, *args, **kwargs)

        return call

    return type(kind.__name__, (kind,), {name: following(name) for name in NAMES if hasattr(kind, name)})
