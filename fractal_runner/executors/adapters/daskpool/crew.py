"""Who uses a pool: borrows workers, gives each of them one call at a time, and sees all calls to their ends.

A call is sent to a worker that is there, and has nothing else to do. So a worker that is lost takes with it
the call that it has started, if it has, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from distributed.security import Security

import fractal_runner
from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.adapters.daskpool import items
from fractal_runner.executors.adapters.daskpool.items import Item
from fractal_runner.executors.adapters.daskpool.loops import Deliverer, LoopThread
from fractal_runner.executors.adapters.daskpool.streams import CONNECT_TIMEOUT_S, Message, Stream
from fractal_runner.executors.adapters.daskpool.terms import (
    CALLS_HANDLER,
    JOIN_HANDLER,
    Shape,
)
from fractal_runner.executors.base import stopped_error
from fractal_runner.executors.batch.payload import PYTHON, own_search_path
from fractal_runner.executors.calls import Call
from fractal_runner.executors.local import child
from fractal_runner.executors.local.reports import handle_record

_KEEP_S = 1.0  # for which a worker without work is kept, as the next call may come soon
_STOP_S = 10.0  # within which a worker has to end a call that it is told to
_GONE_S = 90.0  # within which it must be known that nothing is left of a worker
_LEVELS_EVERY_S = 0.05
_LOOK_AHEAD = 100
_CONTEXTS_LIMIT = 64  # that a worker is given before it is told to forget them
_BACKLOG_LIMIT = 10_000  # of what was received and is still to be delivered
_BACKLOG_S = 0.02
_logger = logging.getLogger("fractal_runner")


class Loan:
    """A worker that is ours for now."""

    __slots__ = ("contexts", "host", "idle", "item", "levels", "name", "ready", "returning", "stream")

    def __init__(self, name: str) -> None:
        self.name = name
        self.stream: Stream | None = None
        self.ready = False
        self.item: Item | None = None
        self.host: str | None = None
        self.levels: dict[str, int] | None = None
        self.contexts: set[int] = set()
        self.idle: asyncio.TimerHandle | None = None
        self.returning = False


class Crew:
    """See the module. All of it belongs to the loop's thread, but for what says otherwise.

    Args:
        thread: the loop's.
        deliverer: what ends calls.
        max_workers: how many workers are borrowed at most.
        contexts: what has a number that calls are sent with.
    """

    def __init__(
        self,
        thread: LoopThread,
        deliverer: Deliverer,
        *,
        max_workers: int,
        contexts: Callable[[int], bytes],
    ) -> None:
        self._thread = thread
        self._deliverer = deliverer
        self._max_workers = max_workers
        self._id = uuid.uuid4().hex
        self._incoming: deque[Item] = deque()  # put by any thread
        self._told = False  # whether the loop's thread is about to look there; set by any thread
        self._queue: deque[Item] = deque()
        self._items: dict[int, Item] = {}  # all that have not ended; read by any thread in single steps
        self._loans: dict[str, Loan] = {}
        self._serving: set[asyncio.Task[Any]] = set()  # one for each of them
        self._lost: dict[str, Item] = {}  # what had started on workers that are being ended
        self._contexts = contexts
        self._levels: dict[str, int] = {}
        self._levels_at = 0.0
        self._wants = 0  # as the desk knows it
        self._to_return = 0
        self._desk: Stream | None = None
        self._security: Security
        self._broken: str | None = None  # why no call can be done any more
        self._empty = asyncio.Event()
        self.shape = Shape()

    # From any thread

    def put(self, item: Item) -> None:
        """Take a call."""
        self._incoming.append(item)
        self._items[item.id] = item
        if not self._told:
            self._told = True
            self._thread.soon(self._turn)

    def cancelled(self, item: Item) -> None:
        """A call has ended that was not seen to its end here: it was cancelled."""
        self._thread.soon(self._withdraw, item)

    def stop(self, calls: Sequence[Call]) -> None:
        """End calls that run."""
        for call in calls:
            if (item := self._items.get(call.id)) is not None:
                self._thread.soon(self._stop, item)

    def running(self, call_id: int) -> Item | None:
        """A call that has not ended."""
        return self._items.get(call_id)

    # In the loop's thread

    async def join(self, address: str, security: Security) -> None:
        """Begin to use the pool of the scheduler at this address.

        Raises:
            OSError: if there is none.
        """
        self._security = security
        self._desk = await Stream.open(address, security, JOIN_HANDLER)
        (_, shape, most, _), *others = await self._desk.read()
        self.shape = Shape(**shape)
        self._max_workers = min(self._max_workers, most)
        for kind, *said in others:
            self._hear(kind, *said)
        self._thread.spawn(self._listen(self._desk))
        self._turn()

    def fail_all(self, why: str) -> None:
        """There is no pool any more, or never was: no call can be done."""
        if self._broken is None:
            self._broken = why
        for item in list(self._items.values()):
            self._fail(item, ExecutorError(f"The call {item.name!r} cannot be done: {self._broken}"))

    async def leave(self) -> None:
        """Give back what there is, once all calls have ended."""
        while self._items:
            self._empty.clear()
            await self._empty.wait()
        streams = [loan.stream for loan in self._loans.values() if loan.stream is not None]
        self._loans.clear()
        desk, self._desk = self._desk, None
        self._broken = "its executor is shut down"
        await asyncio.gather(*(stream.close() for stream in (*streams, *([desk] if desk else []))))
        if self._serving:  # a connection that is cancelled while it is made is never closed
            await asyncio.wait(self._serving, timeout=CONNECT_TIMEOUT_S)

    def _turn(self) -> None:
        self._told = False
        while self._incoming:
            self._queue.append(self._incoming.popleft())
        if self._broken is not None:
            self.fail_all(self._broken)
            return
        self._assign()
        self._tell_wants()

    def _tell_wants(self) -> None:
        """Tell the desk how many workers there is work for."""
        if self._desk is None:
            return
        wants = min(self._max_workers, len(self._items))
        if wants != self._wants:
            self._wants = wants
            self._desk.send(("want", wants))

    def _assign(self) -> None:
        """Give a call to each worker that has none; give back those for which there is none."""
        for loan in list(self._loans.values()):
            if not loan.ready or loan.item is not None:
                continue
            item = None if self._to_return else self._next(loan)
            if item is not None:
                self._send(loan, item)
            elif self._to_return:
                self._to_return -= 1
                self._return(loan)
            elif loan.idle is None:
                loan.idle = self._thread.loop.call_later(_KEEP_S, self._return, loan)

    def _next(self, loan: Loan) -> Item | None:
        """The first call that is to run there, taken off the queue."""
        queue = self._queue
        while queue and queue[0].is_over:
            self._forget(queue.popleft())
        for place in range(min(len(queue), _LOOK_AHEAD)):
            item = queue[place]
            if not item.is_over and (loan.name not in item.avoids or self._is_last_resort(item)):
                del queue[place]
                return item
        return None

    def _is_last_resort(self, item: Item) -> bool:
        """Whether there is no worker but such as something has happened to it on."""
        return item.avoids >= self._loans.keys()

    def _send(self, loan: Loan, item: Item) -> None:
        assert loan.stream is not None
        if loan.idle is not None:
            loan.idle.cancel()
            loan.idle = None
        loan.item, item.worker, item.started = item, loan.name, False
        item.host = loan.host
        messages: list[Message] = []
        levels = self._current_levels()
        if loan.levels is not levels:
            loan.levels = levels
            messages.append(("levels", levels))
        if item.context not in loan.contexts:
            if len(loan.contexts) >= _CONTEXTS_LIMIT:
                loan.contexts.clear()
                messages.append(("forget",))
            loan.contexts.add(item.context)
            messages.append(("context", item.context, self._contexts(item.context)))
        options = item.call.options
        asked = options.cpus, options.timeout
        order = (item.id, item.name, item.call.key, item.attempt, item.data, item.context, *asked)
        loan.stream.send(*messages, ("call", *order))

    def _current_levels(self) -> dict[str, int]:
        """The levels of loggers; those other than root's are looked at now and then."""
        now = self._thread.loop.time()
        if now >= self._levels_at + _LEVELS_EVERY_S or logging.root.level != self._levels.get(""):
            levels = child.levels_in_force()
            self._levels_at = now
            if levels != self._levels:
                self._levels = levels
        return self._levels

    # What the desk says

    async def _listen(self, desk: Stream) -> None:
        try:
            while True:
                for kind, *said in await desk.read():
                    self._hear(kind, *said)
        except OSError as error:
            if self._desk is desk:
                self._desk = None
                for loan in list(self._loans.values()):
                    if loan.stream is not None:
                        loan.stream.abort()
                self.fail_all(f"the pool at {desk.peer} has gone ({str(error) or type(error).__name__})")

    def _hear(self, kind: str, *said: Any) -> None:
        if kind == "lend":
            name, address = said
            loan = self._loans[name] = Loan(name)
            task = self._thread.spawn(self._serve(loan, address))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        elif kind == "recall":
            self._to_return += said[0]
            self._assign()
        elif kind == "gone":
            self._gone(*said)
        elif kind == "failed":
            self._wants = 0
            text, reason = said
            for item in list(self._items.values()):
                if item.worker is None:
                    error = JobExecutionError(
                        f"No worker comes for the call {item.name!r}: the last one {text}.", reason=reason
                    )
                    self._fail(item, error)
            self._queue = deque(item for item in self._queue if not item.is_over)
            self._tell_wants()

    # Workers

    async def _serve(self, loan: Loan, address: str) -> None:
        """Have a worker, from its loan to its return or its end."""
        why = "its connection has ended"
        try:
            loan.stream = await Stream.open(
                address, self._security, CALLS_HANDLER, owner=self._id, search=own_search_path()
            )
            while self._loans.get(loan.name) is loan:
                for kind, *said in await loan.stream.read():
                    self._hear_worker(loan, kind, *said)
                # Log handlers are slower than who logs: the worker has to wait, and what it writes with it.
                while self._deliverer.backlog > _BACKLOG_LIMIT:  # noqa: ASYNC110  nobody tells that it is less
                    await asyncio.sleep(_BACKLOG_S)
        except OSError as error:
            why = str(error) or type(error).__name__
        finally:
            if loan.stream is not None:
                loan.stream.abort()
            if not loan.returning and self._loans.get(loan.name) is loan:
                self._lose(loan, why)

    def _hear_worker(self, loan: Loan, kind: str, *said: Any) -> None:
        if kind == "log":
            self._deliverer.put(handle_record, memoryview(said[0]))
            return
        if kind == "welcome":
            self._welcome(loan, *said)
            return
        if kind == "busy":
            raise ConnectionAbortedError("somebody else has it")
        item = loan.item
        if item is None or item.id != said[0]:
            raise ConnectionAbortedError(f"it has told of a call that it does not have: {kind} {said[0]}")
        if kind == "started":
            item.pid = said[1]
            if not item.begin() and loan.stream is not None:
                self._end_there(loan, item)
            return
        loan.item = None
        if kind == "ended":
            self._forget(item)
            self._deliverer.put(items.end, item.call, *said[1:])
        elif kind == "dropped":
            self._fail(item, stopped_error(item.call))
        else:
            _, died, pickled, output = said
            if died and item.again(loan.name):
                item.worker = None
                self._queue.append(item)
            else:
                self._forget(item)
                self._deliverer.put(items.fail_as_told, item.call, pickled, output)
        self._assign()
        self._tell_wants()

    def _welcome(self, loan: Loan, python: str, package: str, host: str) -> None:
        if python.split(".")[:2] != PYTHON.split(".")[:2] or package != fractal_runner.__version__:
            self.fail_all(
                f"the worker {loan.name} on {host} runs Python {python} and fractal_runner {package}, and "
                f"this is Python {PYTHON} and fractal_runner {fractal_runner.__version__}: what one has "
                "pickled, the other may not be able to read"
            )
            return
        loan.host = host
        loan.ready = True
        self._assign()

    def _return(self, loan: Loan) -> None:
        """Give a worker back that has nothing to do."""
        if loan.item is not None or self._loans.get(loan.name) is not loan:
            return
        loan.returning = True
        del self._loans[loan.name]
        self._thread.spawn(self._give_back(loan))

    async def _give_back(self, loan: Loan) -> None:
        if loan.stream is not None:
            await loan.stream.close()
        if self._desk is not None:
            self._desk.send(("return", loan.name))

    def _lose(self, loan: Loan, why: str) -> None:
        """A worker does not answer. What had not started there goes elsewhere; the rest waits for its end."""
        del self._loans[loan.name]
        if loan.idle is not None:
            loan.idle.cancel()
        item, loan.item = loan.item, None
        if self._desk is not None:
            self._desk.send(("lost", loan.name))
        if item is None:
            return
        if item.is_over:
            self._forget(item)
        elif item.started:
            self._lost[loan.name] = item
            self._thread.loop.call_later(_GONE_S, self._gone_overdue, loan.name, item, why)
        else:
            item.not_started += 1
            item.worker = None
            if item.not_started > items.NOT_STARTED_LIMIT:
                self._fail(item, items.never_started_error(item, loan.name))
            else:
                self._queue.appendleft(item)
        self._assign()

    def _gone(self, name: str, text: str, returncode: int | None, reason: str | None, clean: bool) -> None:
        """A worker has ended; if `clean`, with all that it had started."""
        loan = self._loans.get(name)
        if loan is not None:  # whose end its stream has not heard of yet
            if loan.stream is not None:
                loan.stream.abort()
            self._lose(loan, text)
        item = self._lost.pop(name, None)
        if item is None:
            return
        if clean and item.again(name):
            item.worker = None
            self._queue.append(item)
        else:
            self._fail(item, items.lost_error(item, name, text, returncode, reason))
        self._assign()
        self._tell_wants()

    def _gone_overdue(self, name: str, item: Item, why: str) -> None:
        if self._lost.get(name) is item:
            self._gone(name, f"was lost ({why}), and nobody knows what has become of it", None, "LOST", False)

    # Calls

    def _stop(self, item: Item) -> None:
        item.stopped = True
        loan = self._loans.get(item.worker or "")
        if loan is not None and loan.item is item:
            self._end_there(loan, item)
        elif item.worker is None and item.begun:  # it waits to run again
            self._fail(item, stopped_error(item.call))

    def _withdraw(self, item: Item) -> None:
        """A call was cancelled: it is not to start where it may have been sent to."""
        loan = self._loans.get(item.worker or "")
        if loan is not None and loan.item is item:
            self._end_there(loan, item)
        elif item.worker is None:
            self._forget(item)
            self._tell_wants()

    def _end_there(self, loan: Loan, item: Item) -> None:
        """Have a worker end a call; if it does not, end the worker."""
        assert loan.stream is not None
        item.stopped = True
        loan.stream.send(("stop", item.id))
        self._thread.loop.call_later(_STOP_S, self._stop_overdue, loan, item)

    def _stop_overdue(self, loan: Loan, item: Item) -> None:
        if loan.item is item and self._loans.get(loan.name) is loan and loan.stream is not None:
            _logger.warning("worker %s has not ended %r in %g s: it is ended", loan.name, item.name, _STOP_S)
            loan.stream.abort()

    def _fail(self, item: Item, error: BaseException) -> None:
        self._forget(item)
        self._deliverer.put(item.call.fail, error)

    def _forget(self, item: Item) -> None:
        """A call has ended, but for its future."""
        self._items.pop(item.id, None)
        if not self._items:
            self._queue.clear()  # of those that were cancelled
            self._empty.set()
