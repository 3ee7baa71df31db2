"""What runs in the workers of somebody else's Dask: a call, as one of Dask's tasks, in a thread of theirs.

Of what such a worker is, nothing is changed but the levels of loggers, and those only as long as calls of
ours run there. What has started, and what is logged, goes through the scheduler's own events.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distributed import get_worker

from fractal_runner.executors.calls import Call
from fractal_runner.executors.local import child
from fractal_runner.executors.local.pickling import dump
from fractal_runner.worker.processes import Identity, host_name, identify, is_same_process

STARTED, LOG = "started", "log"


@dataclass(frozen=True, slots=True)
class Order:
    """What a task needs to know of its call.

    Attributes:
        id: its number, in whose process it was submitted.
        name: its name.
        topic: of the events that its process listens to.
        home: that process.
        levels: loggers and their levels there.
    """

    id: int
    name: str
    topic: str
    home: Identity
    levels: Mapping[str, int]


def run_order(order: Order, data: bytes, context: bytes) -> bytes:
    """Do a call, in a worker's thread; how it has ended, as a worker process of ours would report it."""
    worker = get_worker()
    worker.log_event(order.topic, (STARTED, order.id, host_name(), os.getpid()))
    report = _Report()
    try:
        fn, args, kwargs, *told = pickle.loads(memoryview(data)[1:])
        seen = _unpickled(context)
    except BaseException as error:  # unpickling runs anybody's code
        report.failed("could not be unpickled in its worker", error)
        return report.message
    call = Call(fn, args, kwargs, options=child.options_told(told, name=order.name), context=seen)
    del fn, args, kwargs
    at_home = is_same_process(order.home) and os.getpid() == order.home.pid
    thread = threading.current_thread()
    before, thread.name = thread.name, order.name
    try:
        if at_home:  # its records are where they belong
            child.do_call(report, call)
        else:
            with _levels.in_force(order.levels), _forwarded(order, worker):
                child.do_call(report, call)
    finally:
        thread.name = before
    return report.message


class _Report:
    """Keeps how a call has ended. What it printed is the worker's."""

    def __init__(self) -> None:
        self.message = b""

    def end(self, kind: bytes, value: Any) -> None:
        self.message = bytes(dump(kind + child.SILENT, value))

    def failed(self, what: str, error: BaseException) -> None:
        self.end(child.FAILED, (what, str(error), type(error).__qualname__, repr(error)))


@contextmanager
def _forwarded(order: Order, worker: Any) -> Iterator[None]:
    """Have this thread's log records sent home."""
    ident = threading.get_ident()

    class Sender:
        def send(self, message: bytes | memoryview) -> None:
            if threading.get_ident() == ident:
                worker.log_event(order.topic, (LOG, order.id, bytes(message[1:])))

    handler = child.Forward(Sender())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


class _Levels:
    """The levels of loggers, as calls need them. `_lock` guards what follows it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: dict[str, int] = {}

    @contextmanager
    def in_force(self, levels: Mapping[str, int]) -> Iterator[None]:
        """Have these levels as long as the first of several calls at a time has not ended."""
        with self._lock:
            if not self._users:
                self._before = child.levels_in_force()
                child.set_levels(levels)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    child.set_levels(self._before)


_levels = _Levels()


@functools.lru_cache(maxsize=8)
def _unpickled(context: bytes) -> Mapping[str, Any]:
    """A context; that of many calls is unpickled once."""
    found: Mapping[str, Any] = pickle.loads(context)
    return found


def this_process() -> Identity:
    """Where calls come from."""
    return identify(os.getpid())
