"""What our calls run in, within a worker of Dask's that loads this module (`--preload`).

A worker serves one stream of calls at a time, and one call of it at a time. The call itself runs in a process
of its own, which a local executor's kind of worker keeps: what it does to itself, it does not do to Dask's
worker, and ending it ends nothing else.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import cloudpickle
from distributed.core import Status
from distributed.worker import Worker as DaskWorker

import fractal_runner
from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.adapters.daskpool.streams import Message, Stream
from fractal_runner.executors.adapters.daskpool.terms import CALLS_HANDLER, LARGEST_MESSAGE
from fractal_runner.executors.base import STOPPED
from fractal_runner.executors.calls import Call, CallOptions
from fractal_runner.executors.local.workers import KeptProcessWorker, Surroundings
from fractal_runner.worker.processes import host_name

PYTHON = ".".join(map(str, sys.version_info[:3]))

_WAITING_LIMIT = 4 * 2**20  # bytes of log records on their way, beyond which their call has to wait
_WAIT_S = 0.02
_FREE_S = 30.0
_LEAVE_S = 10.0


async def dask_setup(worker: DaskWorker) -> None:
    """What Dask calls before the worker tells its scheduler that it is there."""
    seat = Seat(asyncio.get_running_loop())
    worker.handlers[CALLS_HANDLER] = seat.serve
    _seats[id(worker)] = seat


async def dask_teardown(worker: DaskWorker) -> None:
    """What Dask calls when the worker is about to end."""
    if (seat := _seats.pop(id(worker), None)) is not None:
        await asyncio.to_thread(seat.close)


_seats: dict[int, Seat] = {}


@dataclass(frozen=True, slots=True)
class Order:
    """A call, as it comes.

    Attributes:
        id: its number, in whose process it was submitted.
        name, key: its own.
        attempt: which start of it this is, from 1.
        data: its function and arguments, as the message that a worker process takes.
        context: the number of the context that it sees.
        cpus: how many CPUs it keeps busy.
        timeout: seconds after which it is ended; None for never.
    """

    id: int
    name: str
    key: str | None
    attempt: int
    data: bytes
    context: int
    cpus: int
    timeout: float | None


class Seat:
    """Serves streams of calls, one after the other.

    The loop's thread owns `_stream` and `_owner`; `_slot` has a thread of its own.

    Args:
        loop: Dask's worker's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stream: Stream | None = None
        self._free = asyncio.Lock()
        self._owner = ""
        self._own_path = list(sys.path)
        self._slot = _Slot(self._post)

    async def serve(self, comm: Any, *, owner: str, search: list[str]) -> Status:
        """Take calls from a stream until it ends; what still runs then is ended.

        Args:
            comm: the connection.
            owner: whose it is; the process is kept for another stream of the same owner.
            search: where modules are found, besides the installation.
        """
        stream = Stream(comm)
        try:
            # Whoever had it before has given it back, and what ran there may still be ending.
            await asyncio.wait_for(self._free.acquire(), _FREE_S)
        except TimeoutError:
            stream.send(("busy",))
            await stream.close()
            return Status.dont_reply
        self._stream = stream
        try:
            same, self._owner = self._owner == owner, owner
            if not same:
                sys.path[:] = [*self._own_path, *(place for place in search if place not in self._own_path)]
            await asyncio.to_thread(self._slot.forget, not same)
            stream.send(("welcome", PYTHON, fractal_runner.__version__, host_name()))
            while True:
                for message in await stream.read():
                    self._slot.take(*message)
        except OSError:
            return Status.dont_reply  # whoever had it has gone, or does not need it any more
        finally:
            stream.abort()
            await asyncio.to_thread(self._slot.clear)
            self._stream = None
            self._free.release()

    def close(self) -> None:
        """End what runs, and its process."""
        self._slot.close()

    def _post(self, message: Message, size: int, wait: bool) -> None:
        """Send a message, from the slot's thread; if it is told to, slowly, where they are too many."""
        stream = self._stream
        if stream is None:
            return
        try:
            self._loop.call_soon_threadsafe(lambda: stream.send(message, size=size))
        except RuntimeError:  # the loop has ended, and with it whoever would read it
            return
        if wait and stream.bytes_waiting > _WAITING_LIMIT:
            time.sleep(_WAIT_S)  # not for as long as it takes: the call may be over its time meanwhile


class _Slot:
    """A thread and its process: orders in, messages out. `_lock` guards what follows it."""

    def __init__(self, post: Any) -> None:
        self._worker = _SeatWorker(post)
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._lock = threading.Condition()
        self._waiting = 0  # orders that were taken and have not ended
        self._clearing = False  # whether none of them is to run any more
        self._dropped: set[int] = set()
        self._running: _SeatCall | None = None
        self._thread = threading.Thread(target=self._run, name="fractal-runner-seat", daemon=True)
        self._thread.start()

    def take(self, kind: str, *said: Any) -> None:
        """Do what a message says."""
        if kind == "call":
            with self._lock:
                self._waiting += 1
            self._orders.put(Order(*said))
        elif kind == "stop":
            self._stop(*said)
        elif kind == "context":
            number, data = said
            self._worker.contexts[number] = data
        elif kind == "forget":
            self._worker.contexts = {}
        elif kind == "levels":
            self._worker.levels = dict(*said)
        else:
            raise ConnectionAbortedError(f"{kind!r} is no message that a seat knows")

    def clear(self) -> None:
        """End what runs, and wait for it."""
        with self._lock:
            self._clearing = True
            while self._waiting:
                self._drop_running()
                self._lock.wait(1.0)
            self._clearing = False
            self._dropped.clear()

    def forget(self, with_process: bool) -> None:
        """Another stream follows; nothing runs."""
        self._worker.forget(with_process)

    def close(self) -> None:
        self._orders.put(None)
        deadline = time.monotonic() + _LEAVE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            with self._lock:
                self._drop_running()
            self._thread.join(0.1)

    def _drop_running(self) -> None:
        if self._running is not None:
            self._worker.stop(self._running)

    def _stop(self, number: int) -> None:
        with self._lock:
            if self._running is not None and self._running.order.id == number:
                self._worker.stop(self._running)
            else:
                self._dropped.add(number)  # it is about to run, or has ended

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            call = _SeatCall(order)
            with self._lock:
                dropped = self._clearing or order.id in self._dropped
                self._dropped.clear()  # there is one order at a time
                self._running = call
            try:
                if dropped:
                    self._worker.post(("dropped", order.id))
                else:
                    self._worker.run(call)
            except BaseException as error:  # a defect of ours: the call must end all the same
                self._worker.tell_failure(call, error)
            finally:
                with self._lock:
                    self._running = None
                    self._waiting -= 1
                    self._lock.notify_all()
            del call, order
        self._worker.close()


class _SeatCall(Call):
    """A call as its seat has it. Its future is the seat's own."""

    __slots__ = ("order",)

    def __init__(self, order: Order) -> None:
        options = CallOptions(name=order.name, cpus=order.cpus, timeout=order.timeout)
        super().__init__(len, (), {}, options=options, key=order.key, attempt=order.attempt)
        self.order = order


class _SeatWorker(KeptProcessWorker):
    """A worker process whose calls come, and whose reports go, as they are: nothing is unpickled here."""

    def __init__(self, post: Any) -> None:
        super().__init__(Surroundings({}))
        self._send_message = post
        self.contexts: dict[int, bytes] = {}  # set by the loop's thread before a call that needs it
        self.levels: dict[str, int] = {}  # replaced as a whole
        self._order: Order

    def post(self, message: Message, *, size: int = 0, wait: bool = False) -> None:
        self._send_message(message, size, wait)

    def run(self, call: Call) -> None:
        assert isinstance(call, _SeatCall)
        self._order = call.order
        super().run(call)

    def forget(self, with_process: bool) -> None:
        """Forget the contexts; and end the process, if it has seen what is another owner's."""
        self.contexts = {}
        if with_process:
            self.rest()
            self._let_go()  # it ends while the next one starts

    def tell_failure(self, call: Call, error: BaseException) -> None:
        """Tell how a call has ended that has no end of its own."""
        assert isinstance(call, _SeatCall)
        died = isinstance(error, JobExecutionError) and error.reason != STOPPED
        data = cloudpickle.dumps(error)
        self.post(("failed", call.order.id, died, data, call.future.output), size=len(data))
        call.fail(error)

    def _announce(self, call: Call) -> None:
        self.post(("started", self._order.id, self.pid))

    def _dump(self, call: Call) -> bytes | memoryview:
        return self._order.data

    def _dump_context(self, call: Call) -> bytes:
        return self.contexts[self._order.context]

    def _filter(self, call: Call) -> Hashable:
        return self._order.context

    def _changed_levels(self) -> dict[str, int] | None:
        levels = self.levels
        if self._levels == levels:  # None for a fresh process
            return None
        self._levels = levels
        return levels

    def _record(self, pickled: memoryview) -> None:
        self.post(("log", bytes(pickled)), size=len(pickled), wait=True)

    def _report(self, call: Call, message: memoryview) -> None:
        output = call.future.output
        size = len(message) + len(output)
        if size > LARGEST_MESSAGE:
            self.tell_failure(
                call, ExecutorError(f"The result of {call.name!r} is too large to travel: {size} bytes")
            )
            return
        self.post(("ended", self._order.id, bytes(message), output), size=size)
        call.succeed(None)

    def _fail(self, call: Call, error: BaseException) -> None:
        self.tell_failure(call, error)
