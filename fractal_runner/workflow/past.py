"""What earlier coordinators of a run have left of a task's units.

Two witnesses are heard: the history, which may lag behind by what a kill left unwritten, and the workers'
own records of what they started and what ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row

from fractal_runner.history.schema import State
from fractal_runner.worker.aftermath import Trace
from fractal_runner.workflow.units import unit_of_key


@dataclass(slots=True)
class Attempt:
    """One attempt at a unit.

    Attributes:
        number: from 1.
        counts: whether it is the latest recorded attempt at a unit that the task still has.
        state: as it is recorded; None if the history does not know of it.
        digest: of what it ran; "" if that is not known.
        output: what it returned, as JSON text, if it is recorded as done.
        submitted: when, in seconds since the epoch; None if that is not known.
        trace: what its worker tells of it; None if it has not started.
    """

    number: int
    counts: bool = False
    state: State | None = None
    digest: str = ""
    output: str | None = None
    submitted: float | None = None
    trace: Trace | None = None

    @property
    def is_open(self) -> bool:
        """Whether the history does not know how it ended."""
        return self.state is None or not self.state.is_end


@dataclass(slots=True)
class UnitPast:
    """The attempts at one unit, the first one first."""

    attempts: dict[int, Attempt] = field(default_factory=dict)

    def attempt(self, number: int) -> Attempt:
        """This attempt, which may be news."""
        return self.attempts.setdefault(number, Attempt(number))

    def recorded(self, digest: str) -> Attempt | None:
        """The recorded success of a unit that does just this, if there is one."""
        for attempt in self.attempts.values():
            if attempt.counts and attempt.state is State.DONE and attempt.digest == digest:
                return attempt
        return None

    def open(self) -> list[Attempt]:
        """The attempts of which the history does not know the end."""
        return [self.attempts[number] for number in sorted(self.attempts) if self.attempts[number].is_open]

    @property
    def last(self) -> int:
        """The number of the latest attempt."""
        return max(self.attempts, default=0)


class TaskPast:
    """The attempts at all units of one task.

    Args:
        rows: what is recorded of them.
    """

    def __init__(self, rows: Iterable[Row[Any]]) -> None:
        self._units: dict[tuple[str, int], UnitPast] = {}
        for row in rows:
            attempt = self._unit(row.stage, row.number).attempt(row.attempt)
            attempt.counts = row.is_last
            attempt.state = State(row.state)
            attempt.digest = row.digest
            attempt.output = row.output
            attempt.submitted = row.submitted

    def of(self, stage: str, index: int) -> UnitPast:
        """What is known of this unit; for one that is new, nothing."""
        return self._units.get((stage, index)) or UnitPast()

    def hear(self, traces: Mapping[str, Trace]) -> None:
        """Add what the workers tell, by the units' keys."""
        for key, trace in traces.items():
            stage, index, number = unit_of_key(key)
            attempt = self._unit(stage, index).attempt(number)
            attempt.trace = trace
            attempt.digest = attempt.digest or trace.digest

    def beyond(self, stage: str, count: int) -> list[tuple[int, UnitPast]]:
        """The units of a stage that has no more than `count` of them now, by their indices."""
        return [
            (index, unit)
            for (of_stage, index), unit in self._units.items()
            if of_stage == stage and index >= count
        ]

    @property
    def stages(self) -> set[str]:
        """The stages of which units are known."""
        return {stage for stage, _ in self._units}

    def open_attempts(self, stage: str | None = None) -> Iterator[Attempt]:
        """The attempts, of all stages or of one, of which the history does not know the end."""
        for (of_stage, _), unit in self._units.items():
            if stage is None or of_stage == stage:
                yield from unit.open()

    def _unit(self, stage: str, index: int) -> UnitPast:
        return self._units.setdefault((stage, index), UnitPast())
