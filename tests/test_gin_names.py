"""train/gin_names.py: parameters and their descriptions, and which values fit which types."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pytest

from train import gin_names
from train.gin_names import Name


def example(size: int, name: str | None = None, wide: bool = False) -> None:
    """Does nothing.

    Args:
        size: how large,
            and how much.
        name, wide: two more.

    Returns:
        nothing: at all.
    """


def test_help_names_type_default_and_meaning():
    assert gin_names.describe("example", Name(example)) == [
        "example.size (int; required): how large, and how much.",
        "example.name (str | None; default None): two more.",
        "example.wide (bool; default False): two more.",
    ]


def test_a_default_that_is_made_is_shown_as_it_is():
    @dataclasses.dataclass
    class Made:
        """Two.

        Attributes:
            names: some.
        """

        names: dict[str, str] = dataclasses.field(default_factory=dict)

    assert gin_names.describe("made", Name(Made)) == ["made.names (dict[str, str]; default {}): some."]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (1, float),
        (None, int | None),
        (True, bool),
        (True, Any),
        ("a", Literal["a", "b"]),
        ((1, 2), tuple[int, ...]),
        ({"a": 1.5}, dict[str, float]),
    ],
)
def test_values_that_fit(value, hint):
    assert gin_names.fits(value, hint)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1.0, int),
        (True, int),
        (False, float | None),
        ("1", int),
        (None, int),
        ("c", Literal["a", "b"]),
        ((1, "a"), tuple[int, ...]),
        ([1], tuple[int, ...]),
    ],
)
def test_values_that_do_not_fit(value, hint):
    assert not gin_names.fits(value, hint)


def test_results_of_calls():
    schedule = Callable[[int], float]

    assert gin_names.gives(schedule, float | Callable[[Any], Any])
    assert gin_names.gives(bool, int)
    assert gin_names.gives(str, Any)
    assert not gin_names.gives(schedule, float)
    assert not gin_names.gives(str, int | None)


def test_types_are_shown_as_a_person_reads_them():
    assert gin_names.show_type(int | None) == "int | None"
    assert gin_names.show_type(Literal["a", "b"]) == "'a' or 'b'"
    assert gin_names.show_type(Literal["a", "b"] | None) == "'a' or 'b' or None"
    assert gin_names.show_type(Callable[[int], float]) == "Callable[[int], float]"


def test_hidden_parameters_are_not_offered():
    assert list(Name(example, hidden=frozenset({"name"})).defaults) == ["size", "wide"]
    assert Name(example, hints={"more": int}).defaults["more"] is None
