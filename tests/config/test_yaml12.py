"""Scalars as YAML 1.2 has them, on a parser of YAML 1.1."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_runner.config.values import Findings, Items, plain
from fractal_runner.config.writing import written
from fractal_runner.config.yaml12 import read_text, scalar

SCALARS: list[tuple[str, Any]] = [
    *((text, None) for text in ("null", "Null", "NULL", "~", "")),
    *((text, True) for text in ("true", "True", "TRUE")),
    *((text, False) for text in ("false", "False", "FALSE")),
    *((text, text) for text in ("yes", "no", "on", "off", "y", "n", "Yes", "NO", "On", "tRUE", "nULL")),
    *((text, text) for text in ("0123", "00", "-01", "01.5", "01e3", "1_000", "1_0.5", "0b11", "0o8", "0xg")),
    *(
        (text, text)
        for text in ("1:30:00", "1:30", "190:20:30", "2024-01-01", "2024-01-01 10:00:00", "=", "<<")
    ),
    *(
        (text, text)
        for text in ("4G", "1e", "e1", "1.2.3", ".", "+", "--1", "0X1F", "inf", "nan", ".Inf.", "-.nan")
    ),
    ("0", 0),
    ("-0", 0),
    ("12", 12),
    ("+12", 12),
    ("-12", -12),
    ("0o14", 12),
    ("0xC", 12),
    ("0x1f", 31),
    ("1.5", 1.5),
    (".5", 0.5),
    ("1.", 1.0),
    ("0.1", 0.1),
    ("-.5", -0.5),
    ("1e3", 1000.0),
    ("1.5E-3", 0.0015),
    ("+1.0e+2", 100.0),
    (".inf", math.inf),
    ("-.INF", -math.inf),
]


@pytest.mark.parametrize(("text", "expected"), SCALARS)
def test_a_plain_scalar_is_what_the_core_schema_says(text: str, expected: Any) -> None:
    findings = Findings()
    table = read_text(f"key: {text}\nlist: [{text or '~'}]", "layer", "file", findings)

    assert findings.mistakes == []
    assert table is not None
    assert plain(table) == {"key": expected, "list": [expected]}
    assert type(plain(table)["key"]) is type(expected)
    assert scalar(text) == expected


def test_not_a_number_is_a_number() -> None:
    value = scalar(".nan")
    assert isinstance(value, float)
    assert math.isnan(value)


@pytest.mark.parametrize("text", ["'12'", '"12"', "!!str 12", "|-\n  12", ">-\n  12"])
def test_what_is_quoted_is_text(text: str) -> None:
    table = read_text(f"key: {text}", "layer", "file", Findings())

    assert table is not None
    assert plain(table) == {"key": "12"}


def test_keys_are_read_the_same_way() -> None:
    table = read_text("on: 1\nno: 2\n0123: 3\n1:30: 4", "layer", "file", Findings())

    assert table is not None
    assert plain(table) == {"on": 1, "no": 2, "0123": 3, "1:30": 4}


def test_every_value_knows_its_line() -> None:
    text = "a: 1\nb:\n  - x\n  -\n    y\n\n  - [p,\n     q]\nc: |\n  text\nd: &d\n  e: !!int\n    5\nf: *d\n"
    table = read_text(text, "layer", "file", Findings())
    assert table is not None
    b, c, d, f = (table.entries[name] for name in "bcdf")
    assert isinstance(b, Items)
    x, y, inner = b.items
    assert isinstance(inner, Items)

    assert table.entries["a"].origin.line == 1
    assert (b.origin.line, x.origin.line, y.origin.line) == (3, 3, 5)
    assert [item.origin.line for item in inner.items] == [7, 8]
    assert c.origin.line == 9
    assert {name: origin.line for name, origin in table.keys.items()} == {
        "a": 1, "b": 2, "c": 9, "d": 11, "f": 14,
    }  # fmt: skip
    # An alias stands for what was written elsewhere, and that is where its value comes from.
    assert f == d
    assert str(x.origin) == "file:3"


printable = st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | printable,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(printable, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(printable, json_values))
def test_what_json_says_yaml_says_too(value: dict[str, Any]) -> None:
    findings = Findings()

    # JSON writes characters beyond 16 bits as two, of which YAML knows nothing: they are left as they are.
    table = read_text(json.dumps(value, ensure_ascii=False), "layer", "file", findings)

    assert findings.mistakes == []
    assert table is not None
    assert plain(table) == value


@given(st.dictionaries(printable, json_values))
def test_what_is_written_reads_as_the_same_again(value: dict[str, Any]) -> None:
    table = read_text(json.dumps(value, ensure_ascii=False), "layer", "file", Findings())
    assert table is not None

    text = "\n".join(line for line, _ in written(table))

    again = read_text(text, "layer", "file", Findings())
    assert again is not None
    assert plain(again) == value
