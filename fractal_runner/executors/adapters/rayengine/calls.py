"""Calls on their way through Ray: they wait here, and are given to workers that Ray has found a place for.

Ray is asked for places: a task each, which stays for a while and serves calls that need the same, a
*visit*. A call is given to a visit once that is there, so what waits is cancelled at no cost, a visit that
never gets going takes no call along, and a call that has begun is known to run.
"""

from __future__ import annotations

import itertools
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
from functools import partial
from pathlib import Path
from typing import Any

from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.adapters.rayengine import worker
from fractal_runner.executors.adapters.rayengine.channel import Channel
from fractal_runner.executors.adapters.rayengine.ends import error_of, is_of_the_place
from fractal_runner.executors.adapters.rayengine.instance import Instance, release
from fractal_runner.executors.adapters.rayengine.visits import Item, Needs, Queue, State, Visit
from fractal_runner.executors.adapters.rayengine.worker import END_HEAD, Home
from fractal_runner.executors.base import stopped_error
from fractal_runner.executors.calls import Call
from fractal_runner.executors.local.reports import handle_record, report_end

_VISIT_S = 2.0  # after which a visit takes no more calls: others may wait for the place
_PARKED_S = 0.05  # for which a visit waits for a call that may come
_SURPLUS_S = 1.0  # after which Ray is not asked any more for places that nothing waits for
_TRIES = 3  # how many visits may die one after another before any gets going
_FORCE_S = 8.0  # after which a worker that is to end its call is ended itself
_LAST_WORDS_S = 5.0  # for what a worker has said before it died
_LINGER_S = 20.0  # for Ray to end visits that nobody waits for any more
_LOOK_S = 0.5
_BACKLOG = 128
_logger = logging.getLogger("fractal_runner")


class Manager:
    """Sees calls through Ray, in a thread of its own, which owns all state but the inbox.

    Args:
        instance: the connection to Ray, which it lets go of in the end.
        calls: the executor's calls that have not ended: some may wait for others, and come later.
        max_workers: how many calls run at a time.
        host: by which name or address the workers reach this process; by default, as Ray knows it.
        name: the executor's.
    """

    def __init__(
        self, instance: Instance, calls: Sized, *, max_workers: int, host: str | None, name: str
    ) -> None:
        self._instance = instance
        self._calls = calls
        self._max_workers = max_workers
        self._name = name
        self._inbox: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()  # any thread appends
        self._asleep = False
        self._queues: dict[Needs, Queue] = {}
        self._visits: dict[int, Visit] = {}  # those that Ray has not said to be over
        self._running: dict[int, Visit] = {}  # by the number of the call that they serve
        self._due: dict[int, Visit] = {}  # visits that are looked at again after a time
        self._ended: deque[tuple[Item, str, bool, memoryview]] = deque()
        self._numbers = itertools.count(1)
        self._closing = False
        self._broken: BaseException | None = None  # why nothing goes on any more
        self._linger_at: float | None = None
        self._remote = instance.ray.remote(max_retries=0, max_calls=0)(worker.serve)
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
        self._note(self._take_in, item)
        if self._broken is not None:
            item.call.fail(self._broken)

    def cancelled(self) -> None:
        """A call was cancelled: there may be nothing left to do."""
        if not len(self._calls) or self._closing:
            self._note(_nothing)

    def stop(self, calls: Sequence[Call]) -> None:
        """End calls that run: their futures at once, their processes soon."""
        for call in calls:
            number = call.id
            if call.fail(stopped_error(call)):
                self._note(self._tell_to_end, number)

    def place_of(self, number: int) -> tuple[str | None, int | None]:
        """Node and process of a call that runs."""
        visit = self._running.get(number)
        return (None, None) if visit is None else (visit.host, visit.pid)

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
        return self._asleep and not (self._queues or self._visits or self._inbox)

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
        except BaseException as error:  # a defect, or Ray's own: the calls must end all the same
            _logger.exception("%s: calls cannot be seen through Ray any more", self._name)
            self._broken = error
            running = [visit.item for visit in self._running.values() if visit.item is not None]
            waiting = [item for queue in self._queues.values() for item in queue.items]
            new = [args[0] for _, args in self._inbox if args and isinstance(args[0], Item)]
            for item in (*running, *waiting, *new):
                item.call.fail(error)
        finally:
            self._shut()

    def _turn(self) -> None:
        self._asleep = True
        ready = self._selector.select(0 if self._inbox else self._until_due())
        self._asleep = False
        for key, events in ready:
            key.data(events)
        while self._inbox:
            do, args = self._inbox.popleft()
            do(*args)
            del do, args
        self._look_at_due()
        self._ask_for_places()
        while self._ended:
            _end(*self._ended.popleft())

    def _is_done(self) -> bool:
        if not self._closing or len(self._calls) or self._queues or self._inbox or self._ended:
            return False
        if not self._visits:
            return True
        if self._linger_at is None:
            self._linger_at = time.monotonic() + _LINGER_S
        return time.monotonic() > self._linger_at

    def _until_due(self) -> float | None:
        if self._due:
            return _PARKED_S
        return _LOOK_S if self._closing or self._visits else None

    def _take_in(self, item: Item) -> None:
        queue = self._queues.get(item.needs)
        if queue is None:
            task = self._remote.options(name=self._name, **item.needs.options())
            queue = self._queues[item.needs] = Queue(item.needs, item.reference, task)
        queue.items.append(item)
        for visit in list(self._due.values()):
            if visit.state == State.PARKED and visit.queue is queue:
                del self._due[visit.number]
                self._give(visit)
                break

    def _ask_for_places(self) -> None:
        """Ask Ray for as many places as there are calls that may run."""
        free = self._max_workers - len(self._running)
        for queue in list(self._queues.values()):
            queue.drop_ended()
            wanted = min(len(queue.items), free)
            # A visit that leaves is replaced once Ray has its place back: else Ray would keep that for us,
            # while others wait for it.
            for _ in range(wanted - len(queue.asked_for) - queue.leaving):
                if not self._ask_for_place(queue):
                    break
            if not queue.items and not queue.visits:
                del self._queues[queue.needs]
            elif len(queue.asked_for) <= len(queue.items):
                queue.surplus_at = None
            elif queue.surplus_at is None:
                queue.surplus_at = time.monotonic()
            elif self._closing or time.monotonic() > queue.surplus_at + _SURPLUS_S:
                for visit in list(queue.asked_for.values())[len(queue.items) :]:
                    del queue.asked_for[visit.number]
                    visit.leave()
                    self._instance.ray.cancel(visit.ref)

    def _ask_for_place(self, queue: Queue) -> bool:
        if not self._instance.is_open():  # Ray would start an instance of its own to be asked
            closed = "this process's connection to Ray has been closed"
            self._fail_all(queue, JobExecutionError(closed, reason="CONNECTION_CLOSED"))
            return False
        number = next(self._numbers)
        visit = Visit(number, queue)
        needs = queue.needs
        try:
            visit.ref = queue.task.remote(
                worker.Visit(number, needs.cpus, needs.gpus, queue.context, self.home)
            )
        except Exception as error:  # Ray's own, of many types
            self._fail_all(queue, error)
            return False
        self._visits[number] = queue.asked_for[number] = visit
        queue.visits += 1
        visit.ref.future().add_done_callback(partial(self._hear_of, number))
        return True

    def _give(self, visit: Visit) -> None:
        """Give a visit its next call, if there is one."""
        now = time.monotonic()
        queue, channel = visit.queue, visit.channel
        assert channel is not None
        item = None
        if len(self._running) < self._max_workers and now < visit.until:
            item = queue.next()
        if item is not None:
            visit.item, visit.state = item, State.HERE
            self._running[item.number] = visit
            channel.give(
                item.number,
                name=item.name,
                key=item.call.key,
                timeout=item.timeout,
                levels=item.levels,
                message=item.message,
            )
            item.message = b""
        elif self._closing or queue.items or now >= visit.until:
            visit.leave()
        else:
            visit.state = State.PARKED
            visit.until = min(visit.until, now + _PARKED_S)
            self._due[visit.number] = visit

    # What workers say

    def _heard(self, channel: Channel, word: bytes, number: int, body: memoryview) -> None:
        if word == worker.READY:
            self._arrived(channel, number, body)
            return
        visit = self._running.get(number)
        if visit is None or visit.channel is not channel or visit.item is None:
            return
        if word == worker.LOG:
            if not visit.item.call.future.done():  # what was stopped has nothing to say any more
                handle_record(body)
        elif word == worker.PID:
            visit.pid = pickle.loads(body)
        elif word == worker.ENDED:
            del self._running[number]
            self._due.pop(visit.number, None)
            visit.force_at = None
            is_report, size = END_HEAD.unpack_from(body)
            start = END_HEAD.size
            printed = bytes(body[start : start + size]).decode() if size else ""
            self._ended.append((visit.item, printed, is_report, body[start + size :]))
            visit.item = None
            self._give(visit)

    def _arrived(self, channel: Channel, number: int, body: memoryview) -> None:
        visit = self._visits.get(number)
        if visit is None or visit.state != State.ASKED_FOR:
            channel.say(worker.NO, 0)
            return
        visit.host, visit.pid = pickle.loads(body)
        visit.channel = channel
        visit.until = time.monotonic() + _VISIT_S
        visit.queue.failed = 0
        del visit.queue.asked_for[number]
        self._give(visit)

    def _lost(self, channel: Channel) -> None:
        """A worker's connection has ended: Ray will tell why, or has."""
        for visit in list(self._visits.values()):
            if visit.channel is channel:
                visit.channel = None
                if visit.over_at is not None:
                    self._finish(visit)

    # What Ray says

    def _hear_of(self, number: int, future: Any) -> None:
        """A visit is over: in a thread of Ray's."""
        error = future.exception()
        self._note(self._over, number, None if error is not None else future.result(), error)

    def _over(self, number: int, failure: bytes | None, error: BaseException | None) -> None:
        visit = self._visits[number]
        visit.error = error if failure is None else pickle.loads(failure)
        if visit.item is not None and visit.channel is not None:
            visit.over_at = time.monotonic()  # what it has said may still be on its way
            self._due[number] = visit
        else:
            self._finish(visit)

    def _finish(self, visit: Visit) -> None:
        del self._visits[visit.number]
        self._due.pop(visit.number, None)
        queue, item, error = visit.queue, visit.item, visit.error
        queue.visits -= 1
        queue.leaving -= visit.state == State.LEAVING
        visit.ref = None
        if queue.asked_for.pop(visit.number, None) is not None and visit.state == State.ASKED_FOR:
            queue.failed += 1
            if error is not None and (queue.failed >= _TRIES or not is_of_the_place(error)):
                self._fail_all(queue, error)
        if item is not None:
            visit.item = None
            del self._running[item.number]
            item.call.fail(error_of(item.name, error, visit.host))

    def _fail_all(self, queue: Queue, error: BaseException) -> None:
        """There is no place for these calls."""
        while queue.items:
            item = queue.items.popleft()
            item.call.fail(error_of(item.name, error, None))

    # What takes time

    def _tell_to_end(self, number: int) -> None:
        visit = self._running.get(number)
        if visit is None:
            return
        if visit.channel is not None:
            visit.channel.say(worker.STOP, number)
        visit.force_at = time.monotonic() + _FORCE_S
        self._due[visit.number] = visit

    def _look_at_due(self) -> None:
        if not self._due:
            return
        now = time.monotonic()
        for visit in list(self._due.values()):
            if visit.state == State.PARKED and (now > visit.until or self._closing):
                del self._due[visit.number]
                visit.leave()
            elif visit.over_at is not None and now > visit.over_at + _LAST_WORDS_S:
                self._finish(visit)
            elif visit.force_at is not None and now > visit.force_at:
                visit.force_at = None
                _logger.warning(
                    "%s: a Ray worker on %s has not ended a call in %.0f s that was stopped, and is ended",
                    *(self._name, visit.host, _FORCE_S),
                )
                self._instance.ray.cancel(visit.ref, force=True)

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

    def _accept(self, _: int) -> None:
        try:
            joined, _ = self._listener.accept()
        except OSError:
            return  # whoever it was has gone again
        joined.setblocking(True)
        channel = Channel(joined, self.home.token, self._selector)
        self._selector.register(channel.fd, selectors.EVENT_READ, partial(self._talk, channel))

    def _talk(self, channel: Channel, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            channel.flush()
        if events & selectors.EVENT_READ and not channel.read(self._heard):
            self._selector.unregister(channel.fd)
            self._lost(channel)
            channel.close()

    def _wake(self, _: int) -> None:
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
        self._visits.clear()
        self._queues.clear()
        release(self._instance)


def _end(item: Item, printed: str, is_report: bool, body: memoryview) -> None:
    """End the future as the worker says; if it was stopped, that is dropped."""
    call = item.call
    future = call.future
    if future.done():
        return
    future.output = printed
    try:
        if is_report:
            report_end(call, body)
        else:
            call.fail(pickle.loads(body))
    except BaseException as error:  # a callback that ends its thread: others need this one
        _logger.exception("the end of the call %r cannot be told", item.name)
        call.fail(error)
    finally:
        del future


def _nothing() -> None:
    """For who only wakes the manager."""
