"""The one verb: put methods on a live subject, and take them off without a trace."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from gratis.contract.card import HELD
from gratis.contract.errors import AttachmentError, StackingError, SubjectError

_MISSING = object()
_lock = threading.RLock()
_stacks: dict[int, tuple[weakref.ref[Any], list[Attachment]]] = {}


class Scope:
    """The changes that one method made to a subject, undone in reverse order when it comes off."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def defer(self, undo: Callable[[], Any]) -> None:
        """Call `undo` when the method comes off."""
        self._undo.append(undo)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute, put back (or removed, where there was none) when the method comes off."""
        before = vars(owner).get(name, _MISSING)

        def restore() -> None:
            if before is _MISSING:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = before

        vars(owner)[name] = value
        self.defer(restore)

    def set_item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set an entry of a mapping, put back or removed when the method comes off."""
        before = mapping.get(key, _MISSING)

        def restore() -> None:
            if before is _MISSING:
                mapping.pop(key, None)
            else:
                mapping[key] = before

        mapping[key] = value
        self.defer(restore)

    def hook(self, handle: Any) -> None:
        """Remove a torch hook, given by its handle, when the method comes off."""
        self.defer(handle.remove)

    def close(self) -> None:
        """Undo everything. One undo that fails does not keep the others from running; the first failure is raised."""
        failures: list[BaseException] = []
        while self._undo:
            try:
                self._undo.pop()()
            except BaseException as error:
                failures.append(error)
        if failures:
            raise failures[0]


@runtime_checkable
class AttachableLike(Protocol):
    """What `attach` accepts beside methods: a Delta, for example."""

    @property
    def name(self) -> str: ...

    @property
    def holds(self) -> tuple[str, ...]: ...

    def check(self, subject: Any) -> None: ...

    def install(self, subject: Any, scope: Scope) -> Any: ...


class Attachment:
    """Methods on a subject. A context manager, or a handle with `detach()`.

    It calls and reads through to the subject, so that an attached chat can be used where the chat was.
    """

    def __init__(self, subject: Any, methods: tuple[AttachableLike, ...]) -> None:
        self.subject = subject
        self.methods = methods
        self._scopes: list[Scope] = []
        self._reports: dict[str, Callable[[], dict[str, Any]]] = {}
        self._attached = False

    @property
    def attached(self) -> bool:
        """Whether the methods are on the subject now."""
        return self._attached

    def report(self) -> dict[str, dict[str, Any]]:
        """What each method did so far, by name (methods that report nothing are absent). Readable after detach."""
        return {name: read() for name, read in self._reports.items()}

    def detach(self) -> None:
        """Take the methods off. Those attached later stay on; taking off twice does nothing."""
        with _lock:
            if not self._attached:
                return
            stack = _stack(self.subject)
            position = stack.index(self)
            above = stack[position + 1 :]
            try:
                for later in reversed(above):
                    later._uninstall()
                self._uninstall()
            finally:
                del stack[position:]
                self._attached = False
                for later in above:
                    later._attached = False
                if not stack:
                    _stacks.pop(id(self.subject), None)
            for later in above:
                later._install()
                _stack(self.subject).append(later)
                later._attached = True

    def turn(self, strength: float, name: str | None = None) -> None:
        """Set the strength of the attached deltas (of all, or of those called `name`) while the subject is live.

        Weights are computed anew from the originals, so that turning back and forth leaves nothing behind. Raises
        AttachmentError where nothing can be turned, and where the attachment was taken off.
        """
        if not math.isfinite(strength):
            raise AttachmentError(f"The strength must be a finite number, not {strength}.")
        with _lock:
            if not self._attached:
                raise AttachmentError("This attachment was taken off already; call gratis.attach again.")
            turned = tuple(
                method.at(strength) if hasattr(method, "at") and name in (None, method.name) else method
                for method in self.methods
            )
            if all(new is old for new, old in zip(turned, self.methods, strict=True)):
                known = [method.name for method in self.methods if hasattr(method, "at")]
                raise AttachmentError(
                    f"Nothing here is called {name!r} and can be turned; there is {', '.join(known)}."
                    if known
                    else "Nothing here can be turned: only deltas have a strength."
                )
            stack = _stack(self.subject)
            above = stack[stack.index(self) + 1 :]
            for later in reversed(above):
                later._uninstall()
            self._uninstall()
            self.methods = turned
            for attachment in (self, *above):
                attachment._install()

    def _install(self) -> None:
        try:
            for method in self.methods:
                scope = Scope()
                self._scopes.append(scope)
                report = method.install(self.subject, scope)
                if report is not None:
                    self._reports[method.name] = report
        except BaseException:
            self._uninstall()
            raise

    def _uninstall(self) -> None:
        failures: list[BaseException] = []
        while self._scopes:
            try:
                self._scopes.pop().close()
            except BaseException as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def __enter__(self) -> Self:
        if not self._attached:
            raise AttachmentError("This attachment was taken off already; call gratis.attach again.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.subject(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.subject, name)

    def __repr__(self) -> str:
        names = ", ".join(repr(m) for m in self.methods)
        return f"<{'attached' if self._attached else 'detached'}: {names} on {type(self.subject).__name__}>"


def attach(subject: Any, *methods: Any) -> Attachment:
    """Put `methods` on `subject`, in the given order, and return the handle that takes them off.

    Use it as a context manager (`with gratis.attach(model, gratis.LaCache(budget=1024)): …`), or keep the handle
    and call `detach()`. The subject is the ecosystem's own object and stays so: call it as before.

    Raises SubjectError if a method cannot act on the subject, StackingError if two methods cannot be on it
    together, AttachmentError if one is on it already. Nothing is changed when it raises.
    """
    subject = subject.subject if isinstance(subject, Attachment) else subject
    if not methods:
        raise AttachmentError(
            "Nothing to attach: name at least one method, for example gratis.attach(model, gratis.LaCache())."
        )
    for method in methods:
        if isinstance(method, type):
            raise AttachmentError(f"{method.__name__} is a class: attach an instance, {method.__name__}(…).")
        if not isinstance(method, AttachableLike):
            raise AttachmentError(
                f"{type(method).__name__} does not attach to a live subject; see `gratis show` for how it is used."
            )
    with _lock:
        present = [m for attachment in attached(subject) for m in attachment.methods]
        _check_stacking(present, methods)
        for method in methods:
            method.check(subject)
        attachment = Attachment(subject, methods)
        attachment._install()
        try:
            _stack(subject).append(attachment)
        except TypeError:
            attachment._uninstall()
            raise SubjectError(
                f"Nothing can be attached to a {type(subject).__name__}: it is not a live object."
            ) from None
        attachment._attached = True
    return attachment


def attached(subject: Any) -> tuple[Attachment, ...]:
    """The attachments that are on `subject` now, oldest first."""
    with _lock:
        entry = _stacks.get(id(subject))
        return tuple(entry[1]) if entry is not None and entry[0]() is subject else ()


def check_together(methods: Iterable[Any]) -> None:
    """Raise StackingError or AttachmentError if `methods` cannot be on one subject together."""
    _check_stacking([], tuple(method for method in methods if isinstance(method, AttachableLike)))


def _stack(subject: Any) -> list[Attachment]:
    key = id(subject)
    entry = _stacks.get(key)
    if entry is None or entry[0]() is not subject:
        # Bound now: at the end of the process, names of the module are gone before the last subject.
        stacks = _stacks
        entry = (weakref.ref(subject, lambda _: stacks.pop(key, None)), [])
        _stacks[key] = entry
    return entry[1]


def _check_stacking(present: list[AttachableLike], new: tuple[AttachableLike, ...]) -> None:
    on = list(present)
    for method in new:
        for other in on:
            if other.name == method.name and (other is method or type(other) is type(method)) and method.holds:
                raise AttachmentError(f"{method.name} is already attached; detach it first, or use the one that is on.")
            if shared := [held for held in method.holds if held in other.holds]:
                raise StackingError(
                    f"{other.name} and {method.name} cannot be attached together: {_reason(other, method, shared)}; "
                    "choose one."
                )
            if other is method or (type(other) is type(method) and other.name == method.name):
                raise AttachmentError(f"{method.name} is already attached; detach it first, or use the one that is on.")
        on.append(method)


def _reason(one: AttachableLike, other: AttachableLike, shared: list[str]) -> str:
    """What both do with what only one can have; of several such things, that of which a card says most."""

    def told(method: AttachableLike) -> Mapping[str, str]:
        words: Mapping[str, str] = getattr(getattr(method, "card", None), "why", {})
        return words

    held = max(shared, key=lambda held: (held in told(one)) + (held in told(other)))
    first, second = (told(method).get(held, HELD.get(held, f"needs the {held}")) for method in (one, other))
    return f"{one.name} {first}, and {other.name} {second if second != first else 'does so too'}"
