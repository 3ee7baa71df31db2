"""Calls on their way through Ray: handed to it, begun when a worker asks, ended when Ray has the outcome.

A few more calls than run are handed to Ray at a time, so that its workers need not wait for us, and no more:
what is not with Ray yet is cancelled at no cost. A worker asks before it starts a call, on a connection of
ours, and is told whether it is still wanted: so what was cancelled never runs.
"""

from __future__ import annotations

import hmac
import logging
import pickle
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fractal_runner.executors.adapters import ray_worker
from fractal_runner.executors.adapters.ray_ends import error_of, is_of_the_place
from fractal_runner.executors.adapters.ray_instance import Instance, release
from fractal_runner.executors.adapters.ray_worker import HEAD, Home, Order, Outcome
from fractal_runner.executors.base import stopped_error
from fractal_runner.executors.calls import Call
from fractal_runner.executors.local.line import Line
from fractal_runner.executors.local.reports import handle_record, report_end

_AHEAD = 6  # calls that are with Ray beyond those that run, at least
_TRIES = 3  # how often a call is handed to Ray whose worker dies before it has begun
_FORCE_S = 8.0  # after which a worker that is to end its call is ended itself
_LAST_WORDS_S = 10.0  # for what a worker has said about a call whose outcome is there
_LINGER_S = 20.0  # for Ray to give up tasks that nobody waits for any more
_LOOK_S = 0.5
_SHAPES_KEPT = 256
_BACKLOG = 128
_logger = logging.getLogger("fractal_runner")


@dataclass(frozen=True, slots=True)
class Shape:
    """What Ray is asked for a call, so that calls with the same share what is prepared for it.

    Attributes:
        name: the call's.
        cpus, gpus, memory: see `CallOptions`.
        extra: further options of Ray's, as (name, value).
    """

    name: str
    cpus: int
    gpus: int
    memory: int | None
    extra: tuple[tuple[str, Any], ...] = ()

    def options(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_cpus": self.cpus,
            "num_gpus": self.gpus or None,
            "memory": self.memory,
            **{name: dict(value) if isinstance(value, tuple) else value for name, value in self.extra},
        }


class Item:
    """A call and what is known of it. The manager's thread owns all that changes."""

    __slots__ = (
        *("begun", "call", "channel", "error", "force_at", "host", "is_over", "message", "number"),
        *("order", "outcome", "over_at", "pid", "ref", "shape", "tries"),
    )

    def __init__(self, call: Call, order: Order, message: bytes, shape: Shape) -> None:
        self.call = call
        self.number = order.number
        self.order = order
        self.message = message
        self.shape = shape
        self.tries = 0
        self.ref: Any = None
        self.reset()

    def reset(self) -> None:
        self.begun = False
        self.channel: _Channel | None = None  # of the worker that runs it
        self.host: str | None = None
        self.pid: int | None = None
        self.is_over = False  # the worker has said its last word about it
        self.over_at: float | None = None  # when Ray had its outcome
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.force_at: float | None = None


class Manager:
    """Sees calls through Ray, in a thread of its own, which owns all state but the inbox.

    Args:
        instance: the connection to Ray, which it lets go of in the end.
        calls: the executor's calls that have not ended: some may wait for others, and come later.
        max_workers: how many calls run at a time.
        host: by which name or address the workers reach this process; by default, as Ray knows it.
        name: of the thread.
    """

    def __init__(
        self, instance: Instance, calls: Sized, *, max_workers: int, host: str | None, name: str
    ) -> None:
        self._instance = instance
        self._calls = calls
        self._max_workers = max_workers
        self._name = name
        capacity = sum(node.cpus for node in instance.nodes())
        # Where Ray has room for more than may run, what is handed ahead would take it for nothing.
        self._ahead = max(_AHEAD, max_workers) if capacity <= max_workers else 0
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()  # any thread appends
        self._asleep = False
        self._queue: deque[Item] = deque()
        self._items: dict[int, Item] = {}  # those that Ray has, by number
        self._running: dict[int, Item] = {}  # those of them that have begun, and of which no end is known
        self._due: list[Item] = []  # those that have been told to end, or whose outcome waits for last words
        self._asked: list[tuple[_Channel, int, str, int | None]] = []
        self._ended: list[Item] = []
        self._shapes: dict[Shape, Any] = {}
        self._closing = False
        self._linger_at: float | None = None
        self._remote = instance.ray.remote(max_retries=0, max_calls=0)(ray_worker.run_call)
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._wake)
        self._listener, address = self._listen(host)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self.home = Home(address, secrets.token_bytes(32))
        self._thread = threading.Thread(target=self._serve, name=f"{name}_ray", daemon=True)
        self._thread.start()

    # From any thread

    def put(self, item: Item) -> None:
        """See a call through."""
        self._note(self._queue.append, item)

    def cancelled(self, number: int) -> None:
        """Its future was cancelled."""
        self._note(self._withdraw, number)

    def stop(self, calls: Sequence[Call]) -> None:
        """End calls that run: their futures at once, their processes soon."""
        for call in calls:
            if call.fail(stopped_error(call)):
                self._note(self._tell_to_end, call.id)

    def place_of(self, number: int) -> tuple[str | None, int | None]:
        """Node and process of a call that runs."""
        item = self._items.get(number)
        return (None, None) if item is None else (item.host, item.pid)

    def close(self, wait: bool) -> bool:
        """Let go of Ray once there is nothing left to do; whether there was something to wait for."""
        self._note(self._close)
        waited = False
        while wait and self._thread.is_alive() and not (self._is_idle and len(self._calls)):
            waited = True
            self._thread.join(_LOOK_S)  # in turns: a Ctrl-C does not wake a thread that just goes to sleep
        return waited

    @property
    def _is_idle(self) -> bool:
        """Whether there is nothing for it to do at the moment."""
        return self._asleep and not (self._queue or self._items or self._inbox)

    def _note(self, do: Callable[..., Any], *args: Any) -> None:
        self._inbox.append((do, args))
        if self._asleep:
            self._asleep = False
            with suppress(OSError):  # it is awake, or has ended
                self._waker.send(b".")

    # From here on: the manager's thread

    def _serve(self) -> None:
        try:
            while not self._is_done():
                self._turn()
        except BaseException as error:
            # A defect, or Ray's own: the calls must end all the same.
            _logger.exception("%s: calls cannot be seen through Ray any more", self._name)
            for item in (*self._queue, *self._items.values()):
                item.call.fail(error)
        finally:
            self._shut()

    def _turn(self) -> None:
        self._asleep = True
        ready = self._selector.select(0 if self._inbox else self._until_due())
        self._asleep = False
        for key, _ in ready:
            key.data()
        while self._inbox:
            do, args = self._inbox.popleft()
            do(*args)
            del do, args
        # Only now: that a call has ended was said before the next one was asked for, by whomever.
        asked, self._asked = self._asked, []
        for channel, number, host, pid in asked:
            self._answer(channel, number, host, pid)
        self._look_at_due()
        self._hand()
        ended, self._ended = self._ended, []
        while ended:
            _end(ended.pop(0))

    def _is_done(self) -> bool:
        if not self._closing or len(self._calls) or self._queue or self._inbox or self._ended:
            return False
        if not self._items:
            return True
        if self._linger_at is None:
            self._linger_at = time.monotonic() + _LINGER_S
        return time.monotonic() > self._linger_at

    def _until_due(self) -> float | None:
        return _LOOK_S if self._due or self._closing else None

    def _hand(self) -> None:
        """Hand calls to Ray, as many as it may have."""
        while self._queue and len(self._items) < self._max_workers + self._ahead:
            item = self._queue.popleft()
            if item.call.future.done():  # cancelled
                continue
            try:
                item.ref = self._task(item.shape).remote(item.order, item.message)
            except Exception as error:  # Ray's own, of many types
                item.call.fail(error_of(item.order.name, error, None))
                continue
            item.tries += 1
            self._items[item.number] = item
            item.ref.future().add_done_callback(partial(self._hear_of, item.number, item.tries))

    def _task(self, shape: Shape) -> Any:
        task = self._shapes.get(shape)
        if task is None:
            if len(self._shapes) >= _SHAPES_KEPT:
                self._shapes.clear()
            task = self._shapes[shape] = self._remote.options(**shape.options())
        return task

    def _hear_of(self, number: int, tries: int, future: Any) -> None:
        """Ray has the outcome, or an error: in a thread of Ray's."""
        error = future.exception()
        self._note(self._arrive, number, tries, None if error is not None else future.result(), error)

    def _arrive(self, number: int, tries: int, outcome: Outcome | None, error: BaseException | None) -> None:
        item = self._items.get(number)
        if item is None or item.tries != tries:
            return
        if item.call.future.done() or (item.begun and error is not None):
            self._finish(item, outcome, error)
        elif item.begun and outcome is not None and not item.is_over:
            item.outcome, item.over_at = outcome, time.monotonic()
            self._due.append(item)  # its last words come over another way
        elif item.begun or (outcome is not None and outcome.failure is not None):
            self._finish(item, outcome, error)
        elif error is None or (is_of_the_place(error) and item.tries < _TRIES):
            # It was refused for now, or its worker died before it asked.
            del self._items[number]
            item.ref = None
            item.reset()
            self._queue.appendleft(item)
        else:
            self._finish(item, outcome, error)

    def _finish(self, item: Item, outcome: Outcome | None, error: BaseException | None) -> None:
        self._items.pop(item.number, None)
        self._running.pop(item.number, None)
        item.outcome, item.error, item.ref = outcome, error, None
        self._ended.append(item)

    def _answer(self, channel: _Channel, number: int, host: str, pid: int | None) -> None:
        """A worker asks whether it is to run a call."""
        item = self._items.get(number)
        if item is None or (item.begun and item.channel is not channel):
            channel.say(ray_worker.NO, number)
            return
        if len(self._running) >= self._max_workers:
            self._ahead = 0  # there is room for more than may run: it is not taken again
            channel.say(ray_worker.NO, number)
            return
        if not item.call.begin():
            channel.say(ray_worker.NO, number)
            return
        item.begun, item.channel, item.host, item.pid = True, channel, host, pid
        self._running[number] = item
        channel.say(ray_worker.GO, number)

    def heard(self, channel: _Channel, word: bytes, number: int, body: memoryview) -> None:
        """What a worker says."""
        if word == ray_worker.ASK:
            host, pid = pickle.loads(body)
            self._asked.append((channel, number, host, pid))
            return
        item = self._items.get(number)
        if item is None or item.channel is not channel:
            return
        if word == ray_worker.LOG:
            if not item.call.future.done():  # what was stopped has nothing to say any more
                handle_record(body)
        elif word == ray_worker.PID:
            item.pid = pickle.loads(body)
        elif word == ray_worker.ENDED:
            item.is_over = True
            self._running.pop(number, None)

    def lost(self, channel: _Channel) -> None:
        """A worker's connection has ended."""
        for item in self._items.values():
            if item.channel is channel:
                item.is_over = True  # Ray will tell why
                self._running.pop(item.number, None)

    def _tell_to_end(self, number: int) -> None:
        item = self._items.get(number)
        if item is None:
            return
        if item.channel is not None:
            item.channel.say(ray_worker.STOP, number)
        item.force_at = time.monotonic() + _FORCE_S
        self._due.append(item)

    def _withdraw(self, number: int) -> None:
        item = self._items.get(number)
        if item is not None and not item.begun and item.ref is not None:
            self._instance.ray.cancel(item.ref)

    def _look_at_due(self) -> None:
        if not self._due:
            return
        now = time.monotonic()
        due, self._due = self._due, []
        for item in due:
            if self._items.get(item.number) is not item:
                continue
            if item.over_at is not None and (item.is_over or now > item.over_at + _LAST_WORDS_S):
                self._finish(item, item.outcome, None)
            elif item.force_at is not None and now > item.force_at:
                item.force_at = None
                _logger.warning(
                    "%s: the Ray worker of the call %r has not ended it in %.0f s, and is ended itself",
                    *(self._name, item.order.name, _FORCE_S),
                )
                self._instance.ray.cancel(item.ref, force=True)
            else:
                self._due.append(item)

    def _close(self) -> None:
        self._closing = True

    # The workers' connections

    def _listen(self, host: str | None) -> tuple[socket.socket, str | tuple[str, int]]:
        folder = self._instance.folder
        address: str | tuple[str, int]
        if folder is not None:
            listener = socket.socket(socket.AF_UNIX)
            address = str(folder / secrets.token_hex(4))
            listener.bind(address)  # the folder is ours alone
            listener.listen(_BACKLOG)
        else:
            name = host or self._instance.node_address()
            family = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((name, 0), family=family, backlog=_BACKLOG)
            address = (name, listener.getsockname()[1])
        listener.setblocking(False)
        return listener, address

    def _accept(self) -> None:
        try:
            joined, _ = self._listener.accept()
        except OSError:
            return  # whoever it was has gone again
        joined.setblocking(True)
        channel = _Channel(joined, self.home.token)
        self._selector.register(channel.fd, selectors.EVENT_READ, partial(self._read, channel))

    def _read(self, channel: _Channel) -> None:
        if not channel.read(self.heard):
            self._selector.unregister(channel.fd)
            self.lost(channel)
            channel.close()

    def _wake(self) -> None:
        self._woken.recv(4096)

    def _shut(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, partial):
                key.data.args[0].close()
        self._selector.close()
        self._listener.close()
        self._woken.close()
        self._waker.close()
        if isinstance(self.home.address, str):
            Path(self.home.address).unlink(missing_ok=True)
        self._shapes.clear()
        self._items.clear()
        release(self._instance)


class _Channel:
    """The connection of a worker, as the manager's thread has it."""

    def __init__(self, joined: socket.socket, token: bytes) -> None:
        if joined.family != socket.AF_UNIX:
            joined.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            joined.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection = Connection(joined.detach())
        self._line = Line(self._connection)
        self._token = token
        self._is_known = False
        self._waiting: deque[memoryview] = deque()
        self.fd = self._line.fd

    def read(self, heard: Callable[[_Channel, bytes, int, memoryview], None]) -> bool:
        """Pass on what has arrived; False once nothing more can come."""
        try:
            arrived = self._line.fetch()
            while (message := self._line.next()) is not None:
                word, number = HEAD.unpack_from(message)
                body = message[HEAD.size :]
                if self._is_known:
                    heard(self, word, number, body)
                elif word == ray_worker.HELLO and hmac.compare_digest(bytes(body), self._token):
                    self._is_known = True
                else:
                    return False  # a stranger: nothing that it says is unpickled
        except (EOFError, OSError, ValueError):
            return False
        return arrived or True

    def say(self, word: bytes, number: int) -> None:
        """Tell the worker something; it is short, and the worker reads it at once, or has gone."""
        self._waiting.extend(self._line.framed(HEAD.pack(word, number)))
        try:
            self._line.push(self._waiting)
        except OSError:
            self._waiting.clear()  # the end of the connection is seen by whoever reads

    def close(self) -> None:
        self._line.close()
        self._connection.close()


def _end(item: Item) -> None:
    """End the future as the outcome says."""
    call, outcome, error = item.call, item.outcome, item.error
    item.outcome = item.error = None
    future = call.future
    if future.done():
        return  # stopped: what comes later is dropped
    if error is not None or outcome is None:
        call.fail(error_of(item.order.name, error, item.host))
        return
    future.output = outcome.output
    if outcome.report is not None:
        report_end(call, memoryview(outcome.report))
    elif outcome.failure is not None:
        call.fail(pickle.loads(outcome.failure))
    else:
        call.fail(RuntimeError(f"the Ray worker of {item.order.name!r} has begun and not ended it"))
