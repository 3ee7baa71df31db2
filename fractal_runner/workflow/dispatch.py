"""Units on their way through an executor: submitted in a window, taken back in batches.

One thread, the run's own, owns everything here. Executors only touch the queue of ended futures, so
neither the caller's event loop nor a worker ever waits for the coordinator's bookkeeping.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from fractal_runner.worker.spec import UnitResult
from fractal_runner.workflow.units import Unit

DEFAULT_WINDOW = 1000
_BATCH = 256
_TICK_S = 0.2
_BREATHER = 64
_MANY = 64
_GATHER_S = 0.005


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
        self._refused: list[Ended] = []
        self._ended: queue.SimpleQueue[Future[UnitResult] | None] = queue.SimpleQueue()

    def batches(self) -> Iterator[list[Ended]]:
        """Units as they end, until all have; an empty batch now and then, to look at other things."""
        while True:
            self._fill()
            if self._refused:
                yield self._refused
                self._refused = []
            if self._in_flight:
                yield self._collect()
            elif self._units is None:
                return

    def running(self) -> int:
        """How many units have started and not ended, as far as their futures tell."""
        return sum(future.running() for future in self._in_flight)

    def wake(self) -> None:
        """Make `batches` yield now. The one method for other threads."""
        self._ended.put(None)

    def submit_no_more(self) -> None:
        """Leave out the units that have not been submitted, and take back those that have not started."""
        self._units = None
        for future in list(self._in_flight) if self._takes_back else ():
            if future.cancel():
                del self._in_flight[future]

    def abandon(self) -> list[Unit]:
        """Wait for nothing more; the units that were still in flight."""
        left = list(self._in_flight.values())
        self._units = None
        self._in_flight.clear()
        return left

    def _fill(self) -> None:
        submitted = 0
        while self._units is not None and len(self._in_flight) < self._window:
            unit = next(self._units, None)
            if unit is None:
                self._units = None
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

    def _collect(self) -> list[Ended]:
        batch: list[Ended] = []
        try:
            future = self._ended.get(timeout=_TICK_S)
            if len(self._in_flight) > _MANY:
                # Each time this thread wakes, a worker waits for the interpreter: a few units together
                # cost the workers half of what they cost one by one, and the window keeps them busy.
                time.sleep(_GATHER_S)
            while True:
                if future is not None and (unit := self._in_flight.pop(future, None)) is not None:
                    batch.append(_ended(unit, future))
                if len(batch) >= _BATCH:
                    break
                future = self._ended.get_nowait()
        except queue.Empty:
            pass
        return batch


def _ended(unit: Unit, future: Future[UnitResult]) -> Ended:
    try:
        result: object = future.result()
    except BaseException as error:  # the executor's own, CancelledError among them
        return Ended(unit, None, error)
    if isinstance(result, UnitResult):
        return Ended(unit, result, None)
    return Ended(unit, None, TypeError(f"the executor returned {result!r:.200} instead of the unit's result"))
