"""Calls whose arguments are futures: they start once these have ended, and no thread waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fractal_runner.executors.calls import Call


class Arguments:
    """The futures among a call's arguments. `_lock` guards `_missing`.

    Args:
        call: the call; it gets their results for arguments, or ends with the error of one.
        start: is called with it once it has them.
    """

    def __init__(self, call: Call, start: Callable[[Call], None]) -> None:
        self._call = call
        self._start = start
        self._lock = threading.Lock()
        given = [*call.args, *call.kwargs.values()]
        self._futures = [value for value in given if isinstance(value, Future)]
        self._missing = len(self._futures)

    def wait(self) -> None:
        for future in self._futures:
            future.add_done_callback(self._arrived)

    def _arrived(self, _: Future[Any]) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing:
                return
        call = self._call
        if call.future.done():  # cancelled meanwhile
            return
        try:
            call.args = tuple(map(_value_of, call.args))
            call.kwargs = {name: _value_of(value) for name, value in call.kwargs.items()}
        except BaseException as error:  # the argument's own: a CancelledError, a SystemExit
            call.fail(error)
        else:
            self._start(call)


def _value_of(argument: Any) -> Any:
    return argument.result() if isinstance(argument, Future) else argument
