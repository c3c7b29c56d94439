"""One declaration per parameter: it validates, and feeds the command line, the docs and the search space."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from gratis.contract.errors import ParameterError, suggestion


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What is known about one parameter: its default, bounds, unit and meaning.

    `name` and `type` are filled in from the class that declares it.
    """

    default: Any
    help: str
    unit: str = ""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[Any, ...] = ()
    search: tuple[Any, ...] = ()
    name: str = ""
    type: Any = None

    @property
    def required(self) -> bool:
        """Whether the parameter has no default."""
        return self.default is REQUIRED

    @property
    def optional(self) -> bool:
        """Whether None is among the values."""
        return type(None) in typing.get_args(self.type)

    @property
    def inner_type(self) -> Any:
        """The type without None."""
        if isinstance(self.type, types.UnionType) or typing.get_origin(self.type) is typing.Union:
            rest = [t for t in typing.get_args(self.type) if t is not type(None)]
            return rest[0] if len(rest) == 1 else typing.Union[tuple(rest)]
        return self.type

    @property
    def allowed(self) -> tuple[Any, ...]:
        """The values of a choice, empty when the parameter is not one."""
        if self.choices:
            return self.choices
        inner = self.inner_type
        return typing.get_args(inner) if typing.get_origin(inner) is typing.Literal else ()

    @property
    def type_name(self) -> str:
        """The type as docs and error messages spell it."""
        inner = self.inner_type
        if self.allowed:
            text = " or ".join(repr(v) for v in self.allowed)
        elif isinstance(inner, type) and typing.get_origin(inner) is None:
            text = inner.__name__
        else:
            text = str(inner).replace("typing.", "")
        return f"{text} or None" if self.optional else text

    @property
    def bounds(self) -> str:
        """The valid range in mathematical notation, empty when unbounded."""
        signs = ((">", self.above), (">=", self.at_least), ("<", self.below), ("<=", self.at_most))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)

    @property
    def valid(self) -> str:
        """Type and bounds as docs and error messages spell them: `int > 0 or None`."""
        text = " ".join(part for part in (self.type_name.removesuffix(" or None"), self.bounds) if part)
        return f"{text} or None" if self.optional else text

    def validate(self, owner: str, value: Any) -> Any:
        """`value`, checked against type and bounds (a list becomes a tuple where one is declared).

        Raises ParameterError naming the parameter, the value and what is valid.
        """
        if value is None:
            if self.optional:
                return None
            raise ParameterError(f"{owner}: {self.name} must be {self._expected()}, not None.")
        inner = self.inner_type
        if self.allowed:
            if not any(value == v and type(value) is type(v) for v in self.allowed):
                options = ", ".join(repr(v) for v in self.allowed)
                raise ParameterError(f"{owner}: {self.name} must be one of {options}, not {value!r}.")
            return value
        value = self._typed(owner, inner, value)
        for item in value if isinstance(value, tuple) else (value,):
            self._within(owner, item)
        return value

    def parse(self, owner: str, text: str) -> Any:
        """The value that `text`, as typed on a command line, stands for. Raises ParameterError."""
        if self.optional and text.lower() in {"none", "null"}:
            return None
        inner = self.inner_type
        for value in self.allowed:
            if str(value) == text:
                return value
        if inner is bool and text.lower() in {"true", "yes", "on", "1", "false", "no", "off", "0"}:
            return text.lower() in {"true", "yes", "on", "1"}
        if typing.get_origin(inner) is tuple:
            item = typing.get_args(inner)[0]
            return self.validate(owner, tuple(_number(part, item) for part in text.split(",") if part.strip()))
        return self.validate(owner, _number(text, inner))

    def _typed(self, owner: str, inner: Any, value: Any) -> Any:
        if typing.get_origin(inner) is tuple:
            if not isinstance(value, (tuple, list)):
                raise ParameterError(
                    f"{owner}: {self.name} must be a list of values ({self._expected()}), not {value!r}."
                )
            item = typing.get_args(inner)[0]
            if not all(_matches(item, v) for v in value):
                raise ParameterError(f"{owner}: {self.name} must be {self._expected()}, not {value!r}.")
            return tuple(value)
        if not _matches(inner, value):
            raise ParameterError(f"{owner}: {self.name} must be {self._expected()}, not {value!r}.")
        return value

    def _within(self, owner: str, value: Any) -> None:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return
        number = float(value)
        outside = (
            math.isnan(number)
            or (self.above is not None and not number > self.above)
            or (self.at_least is not None and not number >= self.at_least)
            or (self.below is not None and not number < self.below)
            or (self.at_most is not None and not number <= self.at_most)
        )
        if outside:
            raise ParameterError(f"{owner}: {self.name} must be {self._expected()}, not {value!r}.")

    def _expected(self) -> str:
        return self.valid


def param(
    default: Any = REQUIRED,
    *,
    help: str,
    unit: str = "",
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[Any, ...] = (),
    search: tuple[Any, ...] = (),
) -> Any:
    """Declare a parameter in a class body: `budget: int = param(1024, above=0, unit="tokens", help="…")`.

    `search` holds values worth trying, or a (low, high) pair for numbers.
    """
    return Parameter(
        default=default, help=help, unit=unit, above=above, at_least=at_least, below=below, at_most=at_most,
        choices=choices, search=search,
    )  # fmt: skip


def _number(text: str, kind: Any) -> Any:
    if kind in (int, float) and isinstance(kind, type):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _matches(kind: Any, value: Any) -> bool:
    if kind is Any:
        return True
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is typing.Union or isinstance(kind, types.UnionType):
        return any(_matches(k, value) for k in typing.get_args(kind))
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    origin = typing.get_origin(kind) or kind
    if origin is tuple:
        return isinstance(value, (tuple, list))
    if isinstance(origin, type):
        return isinstance(value, origin)
    return callable(value)


class Declared:
    """A small immutable object whose constructor arguments are its declared parameters.

    Parameters are keyword-only, validated when constructed and stored verbatim. Equality, hash, repr and
    `parameters()` follow from them, so that the arguments rebuild the object.
    """

    _declared: ClassVar[dict[str, Parameter]] = {}
    _resolved: ClassVar[dict[str, Parameter] | None] = None

    def __init__(self, **values: Any) -> None:
        self._construct(values)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = dict(cls._declared)
        for name in list(vars(cls).get("__annotations__", {})):
            if isinstance(value := vars(cls).get(name), Parameter):
                declared[name] = dataclasses.replace(value, name=name)
                delattr(cls, name)
        cls._declared = declared
        cls._resolved = None

        def __init__(self: Declared, **values: Any) -> None:
            self._construct(values)

        __init__.__doc__ = None
        __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
            + [
                inspect.Parameter(
                    p.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if p.required else p.default,
                )
                for p in declared.values()
            ]
        )
        if "__init__" not in vars(cls):
            cls.__init__ = __init__  # type: ignore[assignment,method-assign]

    @classmethod
    def declared(cls) -> Mapping[str, Parameter]:
        """The parameters by name, in the order in which they are declared."""
        if cls._resolved is None:
            hints: dict[str, Any] = {}
            for base in reversed(cls.__mro__):
                own = {n for n in vars(base).get("__annotations__", {}) if n in cls._declared}
                if own:
                    namespace = vars(__import__("sys").modules[base.__module__])
                    for name in own:
                        hint = base.__annotations__[name]
                        hints[name] = eval(hint, namespace) if isinstance(hint, str) else hint
            cls._resolved = {n: dataclasses.replace(p, type=hints[n]) for n, p in cls._declared.items()}
        return cls._resolved

    def _construct(self, values: dict[str, Any]) -> None:
        owner = type(self).__name__
        declared = self.declared()
        for name in values:
            if name not in declared:
                raise ParameterError(f"{owner} has no parameter {name!r}{suggestion(name, declared)}.")
        for name, parameter in declared.items():
            if name not in values and parameter.required:
                raise ParameterError(f"{owner} needs {name}: {parameter.help}.")
            object.__setattr__(self, name, parameter.validate(owner, values.get(name, parameter.default)))
        self.check_parameters()

    def check_parameters(self) -> None:
        """Raise ParameterError where parameters contradict one another. Overridden where bounds do not suffice."""

    def parameters(self) -> dict[str, Any]:
        """The constructor arguments that rebuild this object."""
        return {name: getattr(self, name) for name in self._declared}

    def replace(self, **changes: Any) -> Self:
        """The same object with some parameters changed, validated again."""
        return type(self)(**{**self.parameters(), **changes})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable; use .replace({name}=…) for a changed copy.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable.")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.parameters() == self.parameters()

    def __hash__(self) -> int:
        return hash((type(self), tuple(repr(v) for v in self.parameters().values())))

    def __repr__(self) -> str:
        shown = ", ".join(f"{n}={v!r}" for n, v in self.parameters().items() if v != self._declared[n].default)
        return f"{type(self).__name__}({shown})"
