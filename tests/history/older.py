"""Makes a history one of an older version, as the program of that version left it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# What a history of version 1 lacks. Written out, so that it stays what that version was.
_LACKING = (("units", "start"), ("runs", "settings"))


def as_version_1(do: Callable[[str], Any]) -> None:
    """Take away from a history what version 1 did not have.

    Args:
        do: executes a statement in the database.
    """
    for table, column in _LACKING:
        do(f"ALTER TABLE fractal_runner_{table} DROP COLUMN {column}")
    do("UPDATE fractal_runner_history SET version = 1")
