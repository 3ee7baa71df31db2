"""Units on their way through an executor: submitted in a window, taken back in batches.

One thread, the run's own, owns everything here. Executors only touch the queue of ended futures, so
neither the caller's event loop nor a worker ever waits for the coordinator's bookkeeping.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from fractal_runner.worker.spec import UnitResult
from fractal_runner.workflow.units import Unit

DEFAULT_WINDOW = 1000
PACKING_WINDOW = 20_000  # of what is not submitted by then, a cluster would get many small arrays
LOCAL_WINDOW = 128  # a deeper queue gains nothing there, and each unit in it is recorded twice
_BATCH = 256
_TICK_S = 0.2
_BREATHER = 64
_MANY = 64
_GATHER_S = 0.005, 0.02  # the shortest and the longest time for which units are gathered
_GATHERED_SHARE = 1 / 8  # of what is in flight


@dataclass(frozen=True, slots=True)
class Ended:
    """A unit whose future has ended: with a result, or with what went wrong around it."""

    unit: Unit
    result: UnitResult | None
    error: BaseException | None


class Dispatch:
    """The units of one stage, going through an executor.

    Args:
        submit: gives a unit to the executor.
        units: what is to run; asked for one by one.
        window: how many may be in flight.
        takes_back: whether the executor stands it that futures of its own are cancelled.
    """

    def __init__(
        self,
        submit: Callable[[Unit], Future[UnitResult]],
        units: Iterator[Unit],
        window: int,
        *,
        takes_back: bool = True,
    ) -> None:
        self._submit = submit
        self._units: Iterator[Unit] | None = units
        self._window = window
        self._takes_back = takes_back
        self._in_flight: dict[Future[UnitResult], Unit] = {}
        self._again: deque[Unit] = deque()
        self._refused: list[Ended] = []
        self._ended: queue.SimpleQueue[Future[UnitResult] | None] = queue.SimpleQueue()
        self._gather_s = _GATHER_S[0]

    def batches(self, due_in: Callable[[], float] = lambda: _TICK_S) -> Iterator[list[Ended]]:
        """Units as they end, until all have; an empty batch now and then, to look at other things.

        Args:
            due_in: seconds after which an empty batch is wanted.
        """
        while True:
            self._fill()
            if self._refused:
                yield self._refused
                self._refused = []
            if self._in_flight:
                yield self._collect(min(_TICK_S, due_in()))
            elif self._units is None and not self._again:
                return

    def again(self, unit: Unit) -> None:
        """Submit another attempt at a unit, before those that have not been submitted yet."""
        self._again.append(unit)

    def adopt(self, unit: Unit, future: Future[UnitResult]) -> None:
        """Take on a unit that an earlier coordinator has submitted."""
        self._in_flight[future] = unit
        future.add_done_callback(self._ended.put)

    def in_flight(self) -> list[Unit]:
        """The units that have been submitted and not ended."""
        return list(self._in_flight.values())

    def running(self) -> list[Unit]:
        """The units that have started and not ended, as far as their futures tell."""
        return [unit for future, unit in self._in_flight.items() if future.running()]

    def wake(self) -> None:
        """Make `batches` yield now. The one method for other threads."""
        self._ended.put(None)

    def submit_no_more(self) -> list[Unit]:
        """Leave out the units that have not been submitted, and take back those that have not started.

        Returns:
            Those that were taken back.
        """
        self._units = None
        self._again.clear()  # whoever wanted these tried again knows them
        futures = list(self._in_flight) if self._takes_back else []
        return [self._in_flight.pop(future) for future in futures if future.cancel()]

    def abandon(self) -> list[Unit]:
        """Wait for nothing more; the units that were still in flight."""
        left = list(self._in_flight.values())
        self._units = None
        self._in_flight.clear()
        return left

    def _fill(self) -> None:
        submitted = 0
        while len(self._in_flight) < self._window:
            unit = self._next()
            if unit is None:
                return
            try:
                future = self._submit(unit)
            except Exception as error:
                # A broken or closed executor, an unpicklable unit: this unit's failure, and the next
                # one will tell whether it is everybody's.
                self._refused.append(Ended(unit, None, error))
                if len(self._refused) >= _BATCH:
                    return
                continue
            self._in_flight[future] = unit
            future.add_done_callback(self._ended.put)
            submitted += 1
            if submitted % _BREATHER == 0:
                time.sleep(0)  # a long window is filled in turns with the other threads
                if not self._ended.empty():
                    return

    def _next(self) -> Unit | None:
        if self._again:
            return self._again.popleft()
        unit = None if self._units is None else next(self._units, None)
        if unit is None:
            self._units = None
        return unit

    def _collect(self, timeout: float) -> list[Ended]:
        batch: list[Ended] = []
        in_flight = len(self._in_flight)
        try:
            future = self._ended.get(timeout=timeout)
            if in_flight > _MANY:
                # Each time this thread wakes, a worker waits for the interpreter: a few units together
                # cost the workers half of what they cost one by one.
                time.sleep(self._gather_s)  # the window keeps the workers busy meanwhile
            while True:
                if future is not None and (unit := self._in_flight.pop(future, None)) is not None:
                    batch.append(_ended(unit, future))
                if len(batch) >= _BATCH:
                    break
                future = self._ended.get_nowait()
        except queue.Empty:
            pass
        if in_flight > _MANY:
            self._gather_s = _next_gather_s(self._gather_s, len(batch) / min(in_flight, _BATCH))
        return batch


def _next_gather_s(last: float, share: float) -> float:
    """How long to gather units next time, if this share of those in flight has ended in the last one.

    So long that a good many come together, and so short that the window never runs empty.
    """
    shortest, longest = _GATHER_S
    return max(shortest, last / 2) if share > _GATHERED_SHARE else min(longest, last * 1.5)


def _ended(unit: Unit, future: Future[UnitResult]) -> Ended:
    try:
        result: object = future.result()
    except BaseException as error:  # the executor's own, CancelledError among them
        return Ended(unit, None, error)
    if isinstance(result, UnitResult):
        return Ended(unit, result, None)
    return Ended(unit, None, TypeError(f"the executor returned {result!r:.200} instead of the unit's result"))
