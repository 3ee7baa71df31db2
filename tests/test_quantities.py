"""An error about a value names the argument that the value was given for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fractal_runner.quantities import argument, optional, parse_count, parse_size, parse_time

OF_ARGUMENTS = pytest.mark.parametrize("parsed", [argument, optional])
WRONG = pytest.mark.parametrize(
    ("name", "parse", "value"),
    [
        ("max_jobs", parse_count, 0),
        ("max_memory", parse_size, "4 apples"),
        ("poll_interval", parse_time, "soon"),
    ],
)


@OF_ARGUMENTS
@pytest.mark.parametrize(
    ("parse", "value", "meant"),
    [(parse_count, 3, 3), (parse_size, "4G", 4 * 10**9), (parse_time, "01:30:00", 5400.0)],
)
def test_a_value_is_what_its_parser_makes_of_it(
    parsed: Callable[..., Any], parse: Callable[[Any], Any], value: Any, meant: Any
) -> None:
    assert parsed("it", parse, value) == meant


@OF_ARGUMENTS
@WRONG
def test_an_error_is_the_parsers_behind_the_arguments_name(
    parsed: Callable[..., Any], name: str, parse: Callable[[Any], Any], value: Any
) -> None:
    with pytest.raises(ValueError) as by_parser:
        parse(value)
    with pytest.raises(ValueError) as error:
        parsed(name, parse, value)
    assert str(error.value) == f"{name}: {by_parser.value}"
    assert error.value.__suppress_context__  # one error is shown, and not two of the same


@OF_ARGUMENTS
def test_a_value_that_is_false_is_a_value(parsed: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="idle_timeout: 0 is not a time"):
        parsed("idle_timeout", parse_time, 0)


@OF_ARGUMENTS
def test_other_errors_are_left_as_they_are(parsed: Callable[..., Any]) -> None:
    def parse(value: Any) -> Any:
        raise TypeError("a mistake of the parser")

    with pytest.raises(TypeError, match=r"^a mistake of the parser$"):
        parsed("it", parse, 1)


@pytest.mark.parametrize("parse", [parse_count, parse_size, parse_time])
def test_nothing_is_a_value_only_where_it_may_be(parse: Callable[[Any], Any]) -> None:
    assert optional("it", parse, None) is None
    with pytest.raises(ValueError, match=r"^it: None is not a "):
        argument("it", parse, None)
