from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from qsharded.config.options import AT_LEAST_1, check_values, has_kind, option, options


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example."""

    prog: ClassVar[str] = "example"
    rows: int = option("Rows.", 1, group="Numbers", check=AT_LEAST_1)
    rate: float = option("Rate.", 0.5, group="Numbers")
    steps: int | None = option("Steps.", None, group="Numbers")
    packing: bool = option("Packing.", False, group="Switches")
    shape: Literal["round", "square"] = option("Shape.", "round", group="Texts")
    names: list[str] = option("Names.", [], group="Texts")
    targets: str | list[str] = option("Targets.", "all", group="Texts")
    ranks: dict[str, int] = option("Ranks.", {}, group="Texts")

    def __post_init__(self) -> None:
        check_values(self)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        (float("nan"), float, False),
        (float("inf"), float, False),
        (True, bool, True),
        (1, bool, False),
        ("a", str, True),
        (["a"], list[str], True),
        (["a", 1], list[str], False),
        ("a", list[str], False),
        ("a", str | list[str], True),
        (["a"], str | list[str], True),
        ([1], str | list[str], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": True}, dict[str, int], False),
        ({"a": 1.5}, dict[str, float], True),
        ([], dict[str, int], False),
    ],
)
def test_has_kind(value: Any, kind: Any, expected: bool) -> None:
    assert has_kind(value, kind) is expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", 0, "--rows must be at least 1, got 0"),
        ("rows", "x", "--rows must be a whole number, got 'x'"),
        ("rows", None, "--rows must be a whole number, got None"),
        ("rate", float("nan"), "--rate must be a finite number, got nan"),
        ("steps", 1.5, "--steps must be a whole number, got 1.5"),
        ("packing", "yes", "--packing must be true or false, got 'yes'"),
        ("shape", "oval", "--shape must be one of round, square, got 'oval'"),
        ("names", "a", "--names must be a list of names, got 'a'"),
        ("ranks", {"a": 0.5}, "--ranks must be KEY=VALUE pairs, each value a whole number, got {'a': 0.5}"),
    ],
)
def test_errors_name_the_flag_the_value_and_what_is_allowed(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        Example(**{field: value})
    assert str(raised.value) == message


def test_defaults_are_valid_and_not_shared() -> None:
    assert Example() == Example()
    assert Example().names is not Example().names
    assert Example().ranks is not Example().ranks


def test_options_describe_the_fields() -> None:
    by_key = {item.key: item for item in options(Example)}
    assert list(by_key) == ["rows", "rate", "steps", "packing", "shape", "names", "targets", "ranks"]
    assert by_key["steps"].optional
    assert by_key["steps"].kind is int
    assert by_key["shape"].choices == ("round", "square")
    assert [key for key, item in by_key.items() if item.many] == ["names", "targets", "ranks"]
