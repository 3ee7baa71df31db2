"""What calls see of their executor's context, and how they let go of what has travelled."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Hashable
from typing import Any

from fractal_runner.executors.calls import Call
from fractal_runner.executors.local.workers import dump_context

_FILTERS_LIMIT = 32


class Contexts:
    """What calls see of their executor's context, by number; each is pickled once. `_lock` guards it all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A function that filters is only ever itself, and is kept so that no other one gets its id.
        self._filters: dict[Hashable, tuple[int, object]] = {}
        self._numbers: dict[bytes, int] = {}  # by digest
        self._data: dict[int, bytes] = {}

    def number_of(self, call: Call) -> int:
        """The number of what this call sees.

        Raises:
            ExecutorError: if it cannot be pickled.
        """
        chosen = call.options.context_filter
        key: Hashable = chosen if chosen is None or isinstance(chosen, frozenset) else id(chosen)
        with self._lock:
            if (known := self._filters.get(key)) is not None:
                return known[0]
        data = dump_context(call)  # which runs others' code
        with self._lock:
            number = self._numbers.setdefault(hashlib.sha256(data).digest(), len(self._numbers) + 1)
            self._data[number] = data
            if len(self._filters) >= _FILTERS_LIMIT:
                self._filters.clear()
            self._filters[key] = number, chosen
        return number

    def data(self, number: int) -> bytes:
        """What has this number, pickled."""
        return self._data[number]


def forget_given(call: Call) -> None:
    """Let go of what a call was given, once that is pickled: it may wait for long."""
    call.fn, call.args, call.kwargs = _travelled, (), {}


def _travelled(*_: Any, **__: Any) -> None:
    raise AssertionError("a call that has travelled is run here")
