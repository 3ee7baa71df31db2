"""Which calls of an executor are under way, and which have finished and not been asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from fractal_runner.executors.calls import Call, CallFuture

UNASKED_LIMIT = 10_000
_LOOK_S = 0.5  # how often who waits looks whether there was a Ctrl-C


class Calls:
    """The calls of an executor that have not ended, and those that ended and were not asked.

    A future that has ended is kept only until somebody has its result, so that nothing is held for a
    caller that has let go of it.

    One per executor, and the `Keeper` of its futures.

    Every call passes here several times, from several threads, so there is no lock on its way: each step
    is one operation on a dictionary, which is atomic, and their order makes up for the rest. (A lock that
    two busy threads share makes each of them wait for the interpreter at every turn.) Who waits is looked
    for last by whoever changes something.
    """

    def __init__(self) -> None:
        # A lock per thread that waits, released by who takes it from here. Not a condition: a Ctrl-C within
        # its Python code comes out as a RuntimeError about a lock, and nobody takes that for a Ctrl-C.
        self._waiting: dict[Any, None] = {}
        self._open = [True]  # emptied by who closes it
        self._pending: dict[Future[Any], Call] = {}
        self._ending: dict[Future[Any], int] = {}  # on their way out of `_pending` -> by which thread
        self._unasked: dict[CallFuture, None] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def all(self) -> list[Call]:
        return list(self._pending.values())

    def of(self, chosen: Iterable[Future[Any]]) -> list[Call]:
        return [call for future in chosen if (call := self._pending.get(future)) is not None]

    def add(self, call: Call) -> bool:
        """Take in a call; False if no more are taken."""
        self._pending[call.future] = call
        if not self._open:
            self._pending.pop(call.future, None)  # unless it was cancelled in this very moment
            return False
        return True

    def close(self) -> bool:
        """Take no more calls; whether it is the first time that it is said."""
        try:
            return self._open.pop()
        except IndexError:
            return False

    def ending(self, future: CallFuture) -> None:
        """Before anybody can see the future's end: whoever sees it does not find it pending."""
        self._ending[future] = threading.get_ident()
        if (call := self._pending.pop(future, None)) is not None:  # None: `add` took it back
            call.release()

    def ended(self, future: CallFuture) -> None:
        """Once the future has ended."""
        if not future.cancelled():
            self._unasked[future] = None
            if future.asked:
                self._unasked.pop(future, None)
            elif len(self._unasked) > UNASKED_LIMIT:
                self._first_unasked()
        del self._ending[future]
        while self._waiting:
            try:
                waiter, _ = self._waiting.popitem()
            except KeyError:
                break  # another thread was faster
            waiter.release()

    def asked(self, future: CallFuture) -> None:
        """Somebody has the future's result."""
        future.asked = True
        self._unasked.pop(future, None)

    def completed(self, timeout: float | None) -> Iterator[Future[Any]]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (future := self._next_finished(deadline)) is not None:
            yield future
            del future

    def is_ending_one(self) -> bool:
        """Whether this very thread is about to end a future: it calls back."""
        return threading.get_ident() in list(self._ending.values())

    def wait_until_empty(self) -> None:
        while self._pending or self._ending:
            self._wait(lambda: bool(self._pending or self._ending), None)

    def _next_finished(self, deadline: float | None) -> CallFuture | None:
        while (future := self._first_unasked()) is None:
            if not self._pending and not self._ending:
                return self._first_unasked()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"{len(self._pending)} call(s) are still pending")
            self._wait(lambda: not self._unasked and bool(self._pending or self._ending), left)
        return future

    def _first_unasked(self) -> CallFuture | None:
        """Take the future that finished first."""
        while True:
            try:
                future = next(iter(self._unasked))
                del self._unasked[future]
            except StopIteration:
                return None
            except (KeyError, RuntimeError):
                continue  # another thread was faster
            return future

    def _wait(self, still: Callable[[], bool], seconds: float | None) -> None:
        """Wait for a change, if there is `still` something to wait for, but not for long.

        A Ctrl-C that comes between a thread's last look at signals and its going to sleep does not wake
        it, so it has to look now and then.
        """
        waiter = threading.Lock()
        waiter.acquire()
        self._waiting[waiter] = None
        try:
            if still():
                waiter.acquire(timeout=_LOOK_S if seconds is None else min(seconds, _LOOK_S))
        finally:
            self._waiting.pop(waiter, None)
