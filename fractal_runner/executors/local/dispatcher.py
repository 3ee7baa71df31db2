"""The queue of a local executor and the slots that serve it.

A slot is a thread that takes one call at a time to its worker and sees it to its end. It takes a call
only when it can run it: nothing is fetched ahead, so all that does not run can be cancelled.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fractal_runner.executors.calls import Call
from fractal_runner.executors.slots import SlotPool

_LOOK_S = 0.5  # how often who waits looks whether it is still needed
_OVERTAKEN_LIMIT = 100  # calls that may start before one that stands in front of them but does not fit
_LOOK_AHEAD = 100
_logger = logging.getLogger("fractal_runner")


class Worker(ABC):
    """What a slot runs its calls in. Its slot's thread calls all but `stop`."""

    @abstractmethod
    def run(self, call: Call) -> None:
        """Do a call that has begun, and end it. Must not raise."""

    def stop(self, call: Call) -> None:  # noqa: B027  a thread cannot do it
        """Ask for the end of `call`, if it is the one that runs here; the slot's thread sees to it."""

    def rest(self) -> None:  # noqa: B027  not every worker has something to do then
        """There is no call for it at the moment."""

    def close(self) -> None:  # noqa: B027  not every worker holds something
        """Let go of what the worker holds: no more calls come."""

    @property
    def pid(self) -> int | None:
        """The process that runs the call, if it has one of its own."""
        return None


@dataclass(frozen=True, slots=True)
class Budget:
    """What the calls of an executor may take together.

    Attributes:
        cpus: CPUs.
        memory: bytes; None for no bound.
    """

    cpus: int
    memory: int | None = None


class Slot:
    """A thread and its worker. The dispatcher's lock guards all that changes."""

    __slots__ = ("abandoned", "call", "place", "thread", "wake", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.thread: threading.Thread
        self.wake = threading.Lock()
        self.wake.acquire()  # whoever wants the slot to look again releases it
        self.call: Call | None = None
        self.place = False  # whether it holds one of the shared places
        self.abandoned = False


class Dispatcher:
    """Calls in, slots to run them. `_lock` guards all of its state.

    Calls start in the order in which they came; one that does not fit into what is left of the budget
    may be overtaken by such as do, a bounded number of times.

    A call that has submitted others to its own executor lends them its place until they have ended: it
    may be waiting for them, and if all slots did that, nothing would ever go on.

    Args:
        make_worker: makes the worker of a new slot.
        max_workers: how many slots there may be.
        budget: what their calls may take together.
        places: bounds several executors together; each call that runs takes one.
        idle_timeout: seconds after which a slot without work ends; None for never.
        name: of the threads.
    """

    def __init__(
        self,
        make_worker: Callable[[Dispatcher], Worker],
        *,
        max_workers: int,
        budget: Budget,
        places: SlotPool | None,
        idle_timeout: float | None,
        name: str,
    ) -> None:
        self._make_worker = make_worker
        self._max_workers = max_workers
        self._places = places
        self._idle_timeout = idle_timeout
        self._name = name
        self._lock = threading.RLock()  # a future that has ended calls back at once
        self._queue: deque[Call] = deque()
        self._nested: deque[Call] = deque()  # calls from within calls of ours: they go first
        self._slots: list[Slot] = []
        self._leaving: list[Slot] = []  # no longer among the slots; their workers are being closed
        self._idle: list[Slot] = []
        self._lent: dict[int, int] = {}  # id of a running call -> how many of its own have not ended
        self._running: dict[int, Slot] = {}  # id of a call -> where it runs
        self._left: dict[int, Slot] = {}  # the same, for calls whose futures have ended
        self._free_cpus = budget.cpus
        self._free_memory = budget.memory
        self._overtaken = 0
        self._number = 0
        self._closed = False

    def put(self, call: Call) -> None:
        """Queue a call."""
        if call.parent is None:
            self._queue.append(call)
            if not self._idle and len(self._slots) >= self._max_workers:
                return  # no lock while all are busy: a slot that parks looks at the queue once more
        with self._lock:
            if call.parent is not None and call.parent.id in self._running:
                self._lend(call.parent, call.future)
                self._nested.append(call)
            elif call.parent is not None:
                self._queue.append(call)
            self._wake_one()

    def slots_of(self, calls: Sequence[Call]) -> list[tuple[Call, Slot]]:
        """Where these calls run, as far as they do."""
        with self._lock:
            return [(call, slot) for call in calls if (slot := self._running.get(call.id)) is not None]

    def left_running(self) -> list[tuple[Call, Slot]]:
        """Calls whose futures have ended and which go on running."""
        with self._lock:
            return [(slot.call, slot) for slot in self._left.values() if slot.call is not None]

    def abandon(self, call: Call) -> None:
        """Leave a call that cannot be ended to itself: another slot takes the place of the one it has."""
        with self._lock:
            slot = self._running.pop(call.id, None)
            if slot is None:
                return
            slot.abandoned = True
            self._left[call.id] = slot
            self._slots.remove(slot)
            self._refund(call)
            self._return_place(slot)
            self._wake_one()

    def close(self, wait: bool) -> bool:
        """End the slots once there is nothing left to do.

        Args:
            wait: return only then; not for calls that were left running.

        Returns:
            Whether there were slots to wait for.
        """
        waited = False
        with self._lock:
            self._closed = True
            for slot in self._idle:
                slot.wake.release()
            self._idle.clear()
        while wait:
            with self._lock:
                threads = [slot.thread for slot in (*self._slots, *self._leaving)]
            if not threads:
                break
            waited = True
            for thread in threads:
                thread.join(_LOOK_S)  # in turns: a Ctrl-C does not wake a thread that just goes to sleep
        return waited

    def _serve(self, slot: Slot) -> None:
        try:
            while self._take(slot):
                self._run(slot)
        finally:
            slot.worker.close()
            with self._lock:
                if slot in self._leaving:
                    self._leaving.remove(slot)

    def _run(self, slot: Slot) -> None:
        call = slot.call
        assert call is not None
        try:
            if call.begin():
                slot.worker.run(call)
        except BaseException as error:
            # A defect of a worker: the call must end all the same, and the slot go on.
            _logger.exception("%s: the worker of call %r failed", self._name, call.name)
            call.fail(error)

    def _take(self, slot: Slot) -> bool:
        """Give back what the slot had and take the next call, as soon as there is one; False to end."""
        while True:
            with self._lock:
                self._give_back(slot)
                if slot.abandoned:
                    return False
                if len(self._slots) > self._max_workers + len(self._lent):
                    return self._leave(slot)
                if self._next(slot):
                    self._wake_one()  # what is left may be enough for another one
                    return True
                if not (needs_place := not slot.place and self._first_that_fits() is not None):
                    self._return_place(slot)
                    if self._closed:
                        return self._leave(slot)
                    self._idle.append(slot)
                    # What was queued without the lock a moment ago was meant for this slot.
                    if self._first_that_fits() is not None:
                        self._idle.remove(slot)
                        continue
            slot.worker.rest()
            if needs_place:
                assert self._places is not None
                slot.place = self._places.acquire(timeout=_LOOK_S)
            elif not slot.wake.acquire(timeout=-1 if self._idle_timeout is None else self._idle_timeout):
                with self._lock:
                    if slot in self._idle:
                        self._idle.remove(slot)
                        return self._leave(slot)
                slot.wake.acquire()  # it was woken in this very moment

    def _leave(self, slot: Slot) -> bool:
        self._return_place(slot)
        self._slots.remove(slot)
        self._leaving.append(slot)
        self._wake_one()  # somebody else, if something was queued a moment ago
        return False

    def _next(self, slot: Slot) -> bool:
        """Give `slot` the next call that it can run, and its share of the budget; False if there is none.

        A nested one runs at its parent's place; any other one needs a place of its own.
        """
        while self._nested and self._nested[0].future.done():
            self._nested.popleft()
        if self._nested and self._fits(self._nested[0]):
            call = self._nested.popleft()
        else:
            index = self._first_that_fits() if slot.place or self._places is None else None
            if index is None:
                return False
            call = self._queue[index]
            del self._queue[index]
            self._overtaken = self._overtaken + 1 if index else 0
        self._budget(call, -1)
        slot.call = call
        self._running[call.id] = slot
        return True

    def _first_that_fits(self) -> int | None:
        """Where in the queue the next call stands that can run now."""
        queue = self._queue
        while queue and queue[0].future.done():  # cancelled
            queue.popleft()
        if not queue or self._free_cpus < 1:
            return None
        if self._fits(queue[0]):
            return 0
        if self._overtaken >= _OVERTAKEN_LIMIT:
            return None
        for place in range(1, min(len(queue), _LOOK_AHEAD)):
            if not queue[place].future.done() and self._fits(queue[place]):
                return place
        return None

    def _fits(self, call: Call) -> bool:
        if call.options.cpus > self._free_cpus:
            return False
        return self._free_memory is None or (call.options.memory or 0) <= self._free_memory

    def _wake_one(self) -> None:
        """See that somebody takes the next call, if there is one that can run."""
        if not self._idle and len(self._slots) >= self._max_workers + len(self._lent):
            return
        nested = bool(self._nested) and self._fits(self._nested[0])
        if not nested and self._first_that_fits() is None:
            return
        if self._idle:
            self._idle.pop().wake.release()
        else:
            slot = Slot(self._make_worker(self))
            self._number += 1
            slot.thread = threading.Thread(
                target=self._serve, args=(slot,), name=f"{self._name}_{self._number}", daemon=True
            )
            self._slots.append(slot)
            try:
                slot.thread.start()
            except RuntimeError:  # no more threads: those that there are will do
                self._slots.remove(slot)
                if not self._slots:
                    raise

    def _give_back(self, slot: Slot) -> None:
        call, slot.call = slot.call, None
        if call is None:
            return
        if slot.abandoned:
            del self._left[call.id]
        else:
            del self._running[call.id]
            self._refund(call)
        self._return_place(slot)

    def _return_place(self, slot: Slot) -> None:
        if slot.place:
            assert self._places is not None
            slot.place = False
            self._places.release()

    def _refund(self, call: Call) -> None:
        if self._lent.pop(call.id, None) is None:
            self._budget(call, 1)

    def _budget(self, call: Call, sign: int) -> None:
        self._free_cpus += sign * call.options.cpus
        if self._free_memory is not None:
            self._free_memory += sign * (call.options.memory or 0)

    def _lend(self, parent: Call, future: Future[Any]) -> None:
        if parent.id not in self._lent:
            self._lent[parent.id] = 0
            self._budget(parent, 1)
        self._lent[parent.id] += 1

        def take_back(_: Future[Any]) -> None:
            with self._lock:
                if parent.id not in self._lent:
                    return  # the parent ended first
                self._lent[parent.id] -= 1
                if not self._lent[parent.id]:
                    del self._lent[parent.id]
                    self._budget(parent, -1)

        future.add_done_callback(take_back)
