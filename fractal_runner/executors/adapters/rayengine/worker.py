"""What runs in Ray's own worker processes: calls, one at a time, in a child process that is kept.

The child is a local executor's: so a call over Ray prints, logs, dies and exceeds its timeout as it does
here, and ends without taking Ray's process along. Ray decides where and when there is a place for a call;
what is called there is asked for, and answered, on a connection of our own. So one task of Ray serves a
number of short calls one after another, which costs a fraction of as many tasks.
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
from collections import deque
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

# A message is one of these, the number of its call (READY: of its visit), and what there is to say.
HEAD = struct.Struct("!cQ")
HELLO, READY, PID, LOG, ENDED = b"H", b"R", b"P", b"L", b"E"  # from here
CALL, NO, STOP = b"C", b"N", b"S"  # to here
# What the bodies of CALL and ENDED begin with: whether it is a report, and how long the rest of the head is.
CALL_HEAD = struct.Struct("!I")
END_HEAD = struct.Struct("!?I")

_START_S = 60.0  # a fresh interpreter, with what it imports from a slow file system
_CONNECT_S = 20.0
_CONTEXT_S = 600.0  # for what may be large, from another node
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
class Visit:
    """What a task of Ray is: to serve calls that need the same.

    Attributes:
        number: its own, among those of the process that submits the calls.
        cpus, gpus: see `CallOptions`.
        context: a number for what the calls see of the context, and Ray's reference of its pickle; a
            reference within a tuple is not looked up before somebody needs it.
        home: who submits the calls.
    """

    number: int
    cpus: int
    gpus: int
    context: tuple[int, Any] | None
    home: Home


@dataclass(frozen=True, slots=True)
class Order:
    """What is told of a call, beside the pickle of the call itself.

    Attributes:
        name, key, timeout: see `CallOptions`.
        levels: the loggers' levels, pickled; None if they are as before.
    """

    name: str
    key: str | None
    timeout: float | None
    levels: bytes | None


def serve(visit: Visit) -> bytes | None:
    """Serve calls until there are no more for this visit: what Ray runs as a task.

    Returns:
        A pickled exception, if it could not.
    """
    try:
        return _Place.here().serve(visit)
    except KeyboardInterrupt:  # how Ray cancels a task that has just started
        _Place.clear()
        raise


def keep_alive(joined: socket.socket) -> None:
    """Let a connection over the network be prompt, and end when the other side's machine has gone."""
    joined.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    joined.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):  # not all systems have them
            joined.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


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
            keep_alive(joined)
        joined.settimeout(None)
        self._connection = Connection(joined.detach())
        self._line = Line(self._connection)
        self._stopped: set[int] = set()
        self._answers: deque[memoryview] = deque()
        self.lost = False
        self.say(HELLO, 0, home.token)

    def say(self, word: bytes, number: int, *body: bytes | memoryview) -> None:
        try:
            self._connection.send_bytes(b"".join((HEAD.pack(word, number), *body)))
        except OSError:
            self.lost = True

    def answer(self) -> tuple[int, Order, memoryview] | None:
        """The next call: its number, and its message; None if there is none for this visit."""
        poll = select.poll()
        poll.register(self._line.fd, select.POLLIN)
        while not self._answers:
            poll.poll()  # an answer, or the end of the connection: the system looks after that
            self._hear()
            if self.lost and not self._answers:
                return None
        message = self._answers.popleft()
        word, number = HEAD.unpack_from(message)
        if word == NO:
            return None
        start = HEAD.size + CALL_HEAD.size
        [size] = CALL_HEAD.unpack_from(message, HEAD.size)
        self._stopped.clear()
        return number, Order(*pickle.loads(message[start : start + size])), message[start + size :]

    def is_stopped(self, number: int) -> bool:
        """Whether the call is to be ended: whoever has submitted it says so, or has gone."""
        self._hear()
        return self.lost or number in self._stopped

    def _hear(self) -> None:
        try:
            while self._line.fetch():
                while (message := self._line.next()) is not None:
                    word, number = HEAD.unpack_from(message)
                    if word == STOP:
                        self._stopped.add(number)
                    else:
                        self._answers.append(message)
        except (EOFError, OSError):
            self.lost = True

    def close(self) -> None:
        self._line.close()
        self._connection.close()


class _Worker(KeptProcessWorker):
    """The child process of this Ray worker. The task's thread owns it."""

    def __init__(self) -> None:
        super().__init__(Surroundings({}))
        self._visit: Visit
        self._link: _Link
        self._number = 0  # of the call
        self._message: bytes | memoryview = b""
        self._announced: int | None = None
        self._wanted_levels: bytes | None = None
        self._pickled_levels: bytes | None = None  # what the child has
        self._ended: tuple[bool, bytes | memoryview] = False, b""

    def serve(self, visit: Visit, link: _Link) -> None:
        """Do the calls of a visit."""
        self._visit, self._link = visit, link
        self._announced = self.pid
        link.say(READY, visit.number, pickle.dumps((processes.host_name(), self.pid)))
        while (answer := link.answer()) is not None:
            self._number, order, self._message = answer
            del answer
            if order.levels is not None:
                self._wanted_levels = order.levels
            options = CallOptions(name=order.name, cpus=visit.cpus, timeout=order.timeout)
            call = Call(len, (), {}, options=options, key=order.key)
            call.begin()
            future = call.future
            self.run(call)
            is_report, body = self._ended
            printed = future.output.encode()
            self._message, self._ended = b"", (False, b"")
            link.say(ENDED, self._number, END_HEAD.pack(is_report, len(printed)), printed, body)
            del body

    def _is_stopped(self, call: Call) -> bool:
        return self._link.is_stopped(self._number)

    def _announce(self, call: Call) -> None:
        if self.pid != self._announced:
            self._announced = self.pid
            self._link.say(PID, self._number, pickle.dumps(self.pid))

    def _start_fresh(self, environment: dict[str, str]) -> Peer:
        self._pickled_levels = None
        serve = partial(_serve, os.getpid())
        return self._start(fresh_processes(), serve, environment=environment, start_timeout=_START_S)

    def _dump(self, call: Call) -> bytes | memoryview:
        return self._message

    def _dump_context(self, call: Call) -> bytes:
        if self._visit.context is None:
            return _NO_CONTEXT
        import ray  # this module is imported by the child as well, which has no need of it

        [reference] = self._visit.context[1]
        try:
            pickled: bytes = ray.get(reference, timeout=_CONTEXT_S)
        except ray.exceptions.RayError as error:
            raise ExecutorError(
                f"The context of the call {call.name!r} could not be had from Ray's object store: {error}"
            ) from error
        return pickled

    def _filter(self, call: Call) -> Hashable:
        context = self._visit.context
        return None if context is None else (self._visit.home.token, context[0])

    def _changed_levels(self) -> dict[str, int] | None:
        if self._wanted_levels is None or self._wanted_levels == self._pickled_levels:
            return None
        self._pickled_levels = self._wanted_levels
        levels: dict[str, int] = pickle.loads(self._wanted_levels)
        return levels

    def _record(self, pickled: memoryview) -> None:
        self._link.say(LOG, self._number, pickled)

    def _report(self, call: Call, message: memoryview) -> None:
        self._ended = True, message
        call.succeed(None)

    def _fail(self, call: Call, error: BaseException) -> None:
        self._ended = False, cloudpickle.dumps(error)
        call.fail(error)


class _Place:
    """What a Ray worker keeps from one visit to the next: its child, and its connections.

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

    def serve(self, visit: Visit) -> bytes | None:
        try:
            link = self._link(visit.home)
        except OSError as error:
            where = visit.home.address
            if not isinstance(where, str):
                where = f"{where[0]}:{where[1]}"
            told: bytes = cloudpickle.dumps(
                JobExecutionError(
                    f"A Ray worker on {processes.host_name()} cannot reach the process that submits its "
                    f"calls, at {where}: {error}. That one's `host` says by which name or address it is "
                    "reached.",
                    reason="UNREACHABLE",
                    node=processes.host_name(),
                )
            )
            return told
        shares = tuple(map(os.environ.get, _SHARES))
        if shares != self._shares:
            self._worker.close()
            self._shares = shares
        try:
            self._worker.serve(visit, link)
        finally:
            if visit.gpus:
                self._worker.close()  # what it holds of a GPU's memory is not its own any more
        return None

    def close(self) -> None:
        self._worker.close()
        for link in self._links.values():
            link.close()

    def _link(self, home: Home) -> _Link:
        link = self._links.get(home)
        if link is None or link.is_stopped(0):
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
