from __future__ import annotations

from typing import Literal

import pytest

from gratis.contract.errors import ParameterError
from gratis.contract.parameters import Declared, param


class Example(Declared):
    budget: int = param(1024, above=0, at_most=4096, unit="tokens", help="entries kept")
    scale: float = param(1.0, at_least=0.0, help="strength")
    pattern: Literal["released", "contiguous"] = param("released", help="order")
    weights: tuple[float, ...] | None = param(None, help="one per model", above=0)
    exact: bool = param(False, help="whether")

    def check_parameters(self) -> None:
        if self.exact and self.scale == 0:
            raise ParameterError("Example: exact needs a scale above 0.")


class Needy(Declared):
    rank: int = param(help="columns kept", at_least=1)


def test_defaults_and_values_are_stored_verbatim():
    example = Example(weights=[1.0, 2], scale=2)
    assert example.parameters() == {
        "budget": 1024, "scale": 2, "pattern": "released", "weights": (1.0, 2), "exact": False,
    }  # fmt: skip
    assert Example(**example.parameters()) == example
    assert hash(Example(**example.parameters())) == hash(example)
    assert repr(Example(budget=7)) == "Example(budget=7)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 0}, "budget must be int > 0 and <= 4096, not 0"),
        ({"budget": 5000}, "not 5000"),
        ({"budget": 3.5}, "budget must be int"),
        ({"budget": True}, "budget must be int"),
        ({"budget": "12"}, "not '12'"),
        ({"budget": None}, "not None"),
        ({"scale": float("nan")}, "scale must be float >= 0"),
        ({"scale": -1}, "not -1"),
        ({"pattern": "other"}, "one of 'released', 'contiguous'"),
        ({"weights": [1.0, -1.0]}, "weights"),
        ({"weights": "1,2"}, "weights"),
        ({"exact": 1}, "exact must be bool"),
        ({"bugdet": 1}, "did you mean 'budget'"),
        ({"exact": True, "scale": 0}, "scale above 0"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(values, message):
    with pytest.raises(ParameterError, match="Example") as caught:
        Example(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_required_parameter():
    with pytest.raises(ParameterError, match="Needy needs rank: columns kept"):
        Needy()
    assert Needy(rank=3).rank == 3


def test_immutable_and_replace():
    example = Example()
    with pytest.raises(AttributeError, match="immutable"):
        example.budget = 3
    with pytest.raises(AttributeError):
        del example.budget
    assert example.replace(budget=8).budget == 8
    with pytest.raises(ParameterError):
        example.replace(budget=-8)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("budget", "12", 12),
        ("scale", "0.5", 0.5),
        ("pattern", "contiguous", "contiguous"),
        ("weights", "1,2.5", (1.0, 2.5)),
        ("weights", "none", None),
        ("exact", "true", True),
    ],
)
def test_command_line_text(name, text, value):
    assert Example.declared()[name].parse("Example", text) == value


@pytest.mark.parametrize(
    ("name", "text"), [("budget", "many"), ("budget", "1.5"), ("exact", "maybe"), ("weights", "a,b")]
)
def test_bad_command_line_text(name, text):
    with pytest.raises(ParameterError):
        Example.declared()[name].parse("Example", text)


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError):
        Example(3)
