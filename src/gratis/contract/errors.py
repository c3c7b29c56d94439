"""What gratis says when it refuses: one sentence each, what was wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GratisError(Exception):
    """Base of every error that gratis raises on purpose. The message is one sentence for a person."""


class ParameterError(GratisError, ValueError):
    """A parameter is unknown, of the wrong type, or out of its bounds."""


class SubjectError(GratisError, TypeError):
    """A method cannot act on this subject; nothing was changed."""


class StackingError(GratisError):
    """Two methods cannot be on the same subject together; the message names both and says why."""


class AttachmentError(GratisError):
    """An attachment was used in a way that has no meaning, for example the same method twice on one subject."""


class FileError(GratisError, ValueError):
    """A recipe, delta, trial or checkpoint file is missing, damaged or not what it says it is."""


class InputError(GratisError, ValueError):
    """The data given to a method (arrays, questions, checkpoints' contents) cannot be used."""


class MemoryShortError(InputError, MemoryError):
    """There is no room for a text, before it was read or in the middle of it; the message says what would fit."""


class UnknownNameError(GratisError, LookupError):
    """No method, task or model has this name."""

    @classmethod
    def among(cls, what: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """An error that says `what` `name` is unknown and suggests the nearest of `known`."""
        return cls(f"There is no {what} {name!r}{suggestion(name, known)}.")


class GratisWarning(UserWarning):
    """Something that works, but not as a user may expect. The message is one sentence for a person."""


class MissingExtraError(GratisError, ImportError):
    """A package that an extra of gratis installs is absent."""

    @classmethod
    def of(cls, package: str, extra: str) -> MissingExtraError:
        """An error that names the absent `package` and the line that installs it."""
        return cls(f"This needs the package {package!r}: install it with `pip install 'gratis[{extra}]'`.")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, else the list of what there is when it is short."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    if 0 < len(options) <= 12:
        return "; there is " + ", ".join(options)
    return ""
