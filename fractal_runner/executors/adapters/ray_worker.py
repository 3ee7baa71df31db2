"""What runs in Ray's own worker processes: a call each, in a child process that is kept for the next one.

The child is a local executor's: so a call over Ray prints, logs, dies and exceeds its timeout as it does
here, and ends without taking Ray's process along. Whoever submitted the call is asked before it starts, and
hears of its end, over a connection of our own; what it returns goes by Ray.
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.calls import Call, CallOptions
from fractal_runner.executors.local import child
from fractal_runner.executors.local.line import Line
from fractal_runner.executors.local.peers import Peer
from fractal_runner.executors.local.workers import KeptProcessWorker, Surroundings, fresh_processes
from fractal_runner.worker import processes

# A message is one of these, the number of its call, and what there is to say.
HEAD = struct.Struct("!cQ")
HELLO, ASK, PID, LOG, ENDED = b"H", b"A", b"P", b"L", b"E"  # from here
GO, NO, STOP = b"G", b"N", b"S"  # to here

_START_S = 60.0  # a fresh interpreter, with what it imports from a slow file system
_CONNECT_S = 20.0
_CONTEXT_S = 600.0  # for what may be large, from another node
_ANSWER_S = 60.0  # an answer takes a moment; whoever gives none has hung
_PARENT_LOOK_S = 1.0  # where the system does not tell when a process ends
_NO_CONTEXT = pickle.dumps({})
# What Ray sets in its worker's environment for a call's share of the node: a child must be born with it.
_SHARES = (
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR"),
    *("ASCEND_RT_VISIBLE_DEVICES", "NEURON_RT_VISIBLE_CORES", "TPU_VISIBLE_CHIPS", "HABANA_VISIBLE_MODULES"),
)


@dataclass(frozen=True, slots=True)
class Home:
    """Where the process is that has submitted a call.

    Attributes:
        address: the path of a socket on this machine, or host and port.
        token: what it knows its workers by.
    """

    address: str | tuple[str, int]
    token: bytes


@dataclass(frozen=True, slots=True)
class Order:
    """What a Ray worker is to do, beside the pickle of the call itself.

    Attributes:
        number: the call's, among those of the process that has submitted it.
        name, cpus, gpus, timeout: see `CallOptions`.
        levels: the loggers' levels, pickled.
        context: a number for what it sees of the context, and Ray's reference of its pickle; a reference
            within a tuple is not looked up before somebody needs it.
        home: who has submitted it.
    """

    number: int
    name: str
    cpus: int
    gpus: int
    timeout: float | None
    levels: bytes
    context: tuple[int, Any] | None
    home: Home


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of a call.

    Attributes:
        ran: whether it was begun; if not, it was not wanted any more, or not yet.
        report: the child's last message about it, if that has come.
        failure: the pickled exception, if something else has happened.
        output: what it has printed.
    """

    ran: bool
    report: bytes | None = None
    failure: bytes | None = None
    output: str = ""


def run_call(order: Order, message: bytes) -> Outcome:
    """Run a call, if it is still wanted: what Ray runs as a task."""
    try:
        return _Place.here().run(order, message)
    except KeyboardInterrupt:  # how Ray cancels a task that has just started
        _Place.clear()
        raise


class _Link:
    """The connection to a process that submits calls. It is the task's thread that speaks and hears."""

    def __init__(self, home: Home) -> None:
        if isinstance(home.address, str):
            joined = socket.socket(socket.AF_UNIX)
            try:
                joined.settimeout(_CONNECT_S)
                joined.connect(home.address)
            except OSError:
                joined.close()
                raise
        else:
            joined = socket.create_connection(home.address, _CONNECT_S)
            joined.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            joined.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        joined.settimeout(None)
        self._connection = Connection(joined.detach())
        self._line = Line(self._connection)
        self._stopped: set[int] = set()
        self._answers: dict[int, bool] = {}
        self.lost = False
        self.say(HELLO, 0, home.token)

    def say(self, word: bytes, number: int, body: bytes | memoryview = b"") -> None:
        try:
            self._connection.send_bytes(HEAD.pack(word, number) + body)
        except OSError:
            self.lost = True

    def ask(self, number: int, pid: int | None) -> bool:
        """Whether the call is to be run, here and now."""
        self.say(ASK, number, pickle.dumps((processes.host_name(), pid)))
        deadline = time.monotonic() + _ANSWER_S
        poll = select.poll()
        poll.register(self._line.fd, select.POLLIN)
        while number not in self._answers and not self.lost:
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            self._hear()
            if time.monotonic() > deadline:
                self.lost = True
        return self._answers.pop(number, False) and not self.lost

    def is_stopped(self, number: int) -> bool:
        """Whether the call is to be ended: whoever has submitted it says so, or has gone."""
        self._hear()
        return self.lost or number in self._stopped

    def forget(self, number: int) -> None:
        self._stopped.discard(number)

    def _hear(self) -> None:
        try:
            while self._line.fetch():
                while (message := self._line.next()) is not None:
                    word, number = HEAD.unpack_from(message)
                    if word == STOP:
                        self._stopped.add(number)
                    else:
                        self._answers[number] = word == GO
        except (EOFError, OSError):
            self.lost = True

    def close(self) -> None:
        self._line.close()
        self._connection.close()


class _Worker(KeptProcessWorker):
    """The child process of this Ray worker. The task's thread owns it."""

    def __init__(self) -> None:
        super().__init__(Surroundings({}))
        self._order: Order
        self._message = b""
        self._link: _Link
        self._announced: int | None = None
        self._pickled_levels = b""
        self.ended: dict[str, Any] = {}

    def do(self, order: Order, message: bytes, link: _Link) -> Outcome:
        self._order, self._message, self._link = order, message, link
        self._announced = self.pid
        self.ended = {}
        options = CallOptions(name=order.name, cpus=order.cpus, timeout=order.timeout)
        call = Call(len, (), {}, options=options)
        call.begin()
        future = call.future
        self.run(call)
        self._message = b""
        return Outcome(True, output=future.output, **self.ended)

    def _is_stopped(self, call: Call) -> bool:
        return self._link.is_stopped(self._order.number)

    def _announce(self, call: Call) -> None:
        if self.pid != self._announced:
            self._announced = self.pid
            self._link.say(PID, self._order.number, pickle.dumps(self.pid))

    def _start_fresh(self, environment: dict[str, str]) -> Peer:
        self._pickled_levels = b""
        serve = partial(_serve, os.getpid())
        return self._start(fresh_processes(), serve, environment=environment, start_timeout=_START_S)

    def _dump(self, call: Call) -> bytes | memoryview:
        return self._message

    def _dump_context(self, call: Call) -> bytes:
        if self._order.context is None:
            return _NO_CONTEXT
        import ray  # this module is imported by the child as well, which has no need of it

        [reference] = self._order.context[1]
        try:
            pickled: bytes = ray.get(reference, timeout=_CONTEXT_S)
        except ray.exceptions.RayError as error:
            raise ExecutorError(
                f"The context of the call {call.name!r} could not be had from Ray's object store: {error}"
            ) from error
        return pickled

    def _filter(self, call: Call) -> Hashable:
        context = self._order.context
        return None if context is None else (self._order.home.token, context[0])

    def _changed_levels(self) -> dict[str, int] | None:
        if self._order.levels == self._pickled_levels:
            return None
        self._pickled_levels = self._order.levels
        levels: dict[str, int] = pickle.loads(self._order.levels)
        return levels

    def _record(self, pickled: memoryview) -> None:
        self._link.say(LOG, self._order.number, pickled)

    def _report(self, call: Call, message: memoryview) -> None:
        self.ended = {"report": bytes(message)}
        call.succeed(None)

    def _fail(self, call: Call, error: BaseException) -> None:
        self.ended = {"failure": cloudpickle.dumps(error)}
        call.fail(error)


class _Place:
    """What a Ray worker keeps from one call to the next: its child, and its connections.

    There is one per process; the thread in which Ray runs tasks owns it.
    """

    _here: _Place | None = None

    @classmethod
    def here(cls) -> _Place:
        if cls._here is None:
            # Inherited from Ray's own daemon it would keep us from knowing how the child has ended.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            cls._here = cls()
            atexit.register(cls.clear)
        return cls._here

    @classmethod
    def clear(cls) -> None:
        place, cls._here = cls._here, None
        if place is not None:
            place.close()

    def __init__(self) -> None:
        self._links: dict[Home, _Link] = {}
        self._worker = _Worker()
        self._shares: tuple[str | None, ...] = ()

    def run(self, order: Order, message: bytes) -> Outcome:
        try:
            link = self._link(order.home)
        except OSError as error:
            where = order.home.address
            if not isinstance(where, str):
                where = f"{where[0]}:{where[1]}"
            told = JobExecutionError(
                f"The call {order.name!r} has not run: a Ray worker on {processes.host_name()} cannot reach "
                f"the process that submitted it, at {where}: "
                f"{error}. Its `host` says by which name or address the nodes reach it.",
                reason="UNREACHABLE",
                node=processes.host_name(),
            )
            return Outcome(False, failure=cloudpickle.dumps(told))
        shares = tuple(map(os.environ.get, _SHARES))
        if shares != self._shares:
            self._worker.close()
            self._shares = shares
        if not link.ask(order.number, self._worker.pid):
            return Outcome(False)
        try:
            return self._worker.do(order, message, link)
        finally:
            if order.gpus:
                self._worker.close()  # what it holds of a GPU's memory is not its own any more
            link.say(ENDED, order.number)
            link.forget(order.number)

    def close(self) -> None:
        self._worker.close()
        for link in self._links.values():
            link.close()

    def _link(self, home: Home) -> _Link:
        link = self._links.get(home)
        if link is None or link.lost or link.is_stopped(0):
            for other in [other for other, one in self._links.items() if one.is_stopped(0)]:
                self._links.pop(other).close()
            link = self._links[home] = _Link(home)
        return link


def _serve(parent: int, connection: Connection, setup: child.Setup) -> None:
    """As `child.serve`, but not longer than `parent` lives."""
    threading.Thread(target=_end_with, args=(parent,), name="end with parent", daemon=True).start()
    child.serve(connection, setup)


def _end_with(parent: int) -> None:
    """Wait for the end of the parent process; then end this one, and all that it has started."""
    wait = _waiter(parent)
    while os.getppid() == parent and not wait():
        continue
    processes.end_descendants(os.getpid(), 0)
    os.kill(os.getpid(), signal.SIGKILL)


def _waiter(pid: int) -> Callable[[], bool]:
    with suppress(AttributeError, OSError):
        fd = os.pidfd_open(pid)
        return lambda: bool(select.select([fd], [], [], _PARENT_LOOK_S)[0])
    never = threading.Event()
    return lambda: never.wait(_PARENT_LOOK_S)  # no pidfd here: who asks looks at its parent
