"""Sizes, times and counts as people write them, parsed in one place.

Every layer that takes a memory size or a duration (a task's meta, an executor's options, a
configuration file) calls these functions; what does not parse is an error, never a default. By `argument`
and `optional` such an error names the argument that it is about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_UNITS = {
    "": 10**6,  # a bare number is in MB, as in Fractal's meta and in sbatch --mem
    "B": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?I?)(B?)", re.IGNORECASE)

_SECONDS = {"S": 1, "M": 60, "H": 3600, "D": 86400}
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d)(?::([0-5]?\d(?:\.\d+)?))?")
_SPANS = re.compile(r"(?:(?:\d+(?:\.\d*)?|\.\d+)\s*[smhd]\s*)+", re.IGNORECASE)
_SPAN = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([smhd])", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")


def parse_size(value: int | float | str) -> int:
    """The number of bytes that `value` means.

    Args:
        value: "4GB", "4G" (decimal: 4,000 MB), "1.5G", "512 MiB" (binary), "100B"; a number, or text
            that is one, is in MB.

    Raises:
        ValueError: if it is not a positive size. The message shows what would be.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(_not_a_size(value))
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError(_not_a_size(value))
        number, prefix, byte = match.groups()
        unit = "B" if byte and not prefix else prefix.upper()
        if unit not in _UNITS:
            raise ValueError(_not_a_size(value))
        size = float(number) * _UNITS[unit]
    else:
        size = float(value) * _UNITS[""]
    if not math.isfinite(size) or size < 1:
        raise ValueError(_not_a_size(value))
    return round(size)


def parse_time(value: int | float | str) -> float:
    """The number of seconds that `value` means.

    Args:
        value: "01:30:00" (hours, minutes, seconds), "2-12:00:00" (with days), "12:30" (minutes,
            seconds; after days: hours, minutes), "90m", "1h 30m", "45s"; a number, or text that is
            one, is in seconds.

    Raises:
        ValueError: if it is not a positive time. The message shows what would be.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(_not_a_time(value))
    seconds = float(value) if isinstance(value, (int, float)) else _seconds(value.strip())
    if seconds is None or not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(_not_a_time(value))
    return seconds


def parse_count(value: object, least: int = 1) -> int:
    """`value`, which is to be a whole number of at least `least`; True and False are none.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{value!r} is not a whole number of at least {least}")
    return value


def argument(name: str, parse: Callable[[Any], T], value: object) -> T:
    """The value of an argument, parsed.

    Args:
        name: of the argument, for the message.
        parse: makes of the value what is meant by it, or raises ValueError.
        value: as it was given, whatever that is: a parser has to look at it.

    Raises:
        ValueError: if it is not what it should be, naming the argument.
    """
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def optional(name: str, parse: Callable[[Any], T], value: object) -> T | None:
    """As `argument`; None for None.

    Raises:
        ValueError: if it is neither None nor what it should be, naming the argument.
    """
    return None if value is None else argument(name, parse, value)


def format_size(size: int) -> str:
    """`size` bytes for people: "4 GB", "1.5 GB", "250 MB"."""
    for name, unit in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"


def format_time(seconds: float) -> str:
    """`seconds` for people: "0.4 s", "12 s", "3:05 min", "2:00:10 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02} h"


def _seconds(text: str) -> float | None:
    if _NUMBER.fullmatch(text):
        return float(text)
    if match := _CLOCK.fullmatch(text):
        days, first, second, third = match.groups()
        if days is None and third is None:  # sbatch --time: "minutes:seconds"
            return int(first) * 60 + float(second)
        return int(days or 0) * 86400 + int(first) * 3600 + int(second) * 60 + float(third or 0)
    if _SPANS.fullmatch(text):
        return sum(float(number) * _SECONDS[unit.upper()] for number, unit in _SPAN.findall(text))
    return None


def _not_a_size(value: object) -> str:
    return f"{value!r} is not a size: write '4GB', '1.5G', '512MiB', or a number of MB"


def _not_a_time(value: object) -> str:
    return f"{value!r} is not a time: write '01:30:00', '90m', '1h 30m', or a number of seconds"
