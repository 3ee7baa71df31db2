"""`fractal-runner logs`: what units have printed, and what they go on to print."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import typer
from sqlalchemy import Row

from fractal_runner.cli.locate import Condition, LocatedRun
from fractal_runner.cli.logfiles import LogReader, Printer
from fractal_runner.history.schema import State

LOOK_S = 0.25  # between two looks at the logs
_ASK_S = 1.0  # between two looks at the history, or more where these take long
_BEGUN = tuple(state for state in State if state is not State.SUBMITTED)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which units' logs are wanted.

    Attributes:
        position: those of this task; None for the last one that has begun, or all that have for `failed`.
        number: only this unit.
        failed: only units that have failed.
    """

    position: int | None
    number: int | None
    failed: bool


def print_logs(found: LocatedRun, choice: Choice, printer: Printer) -> str:
    """Print the logs of units, as they are; what is to be said about it, "" for nothing.

    Raises:
        typer.BadParameter: if there is no such task or unit.
        HistoryError: if the history cannot be read.
    """
    names = {task.position: task.name for task in found.reader.tasks(found.run_id)}
    positions = _positions(found.condition(), names, choice)
    if not positions:
        return "No task of the run has begun."
    units = chain.from_iterable(_units(found, position, choice) for position in positions)
    first = list(islice(units, 2))
    if not first and choice.number is not None:
        raise _no_unit(positions[0], choice)
    root = _root(found)
    for unit in chain(first, units):
        log = LogReader(root, unit, printer.decoder())
        parts = log.parts()
        text = next(parts, "")
        if len(first) > 1 or log.problem:
            printer.header(unit, names[unit.position], log.problem)
        for part in chain([text], parts):
            printer.text(part)
        printer.text(log.rest())
    printer.end()
    return "" if first else f"No unit {'has failed' if choice.failed else 'was submitted'}."


def follow_logs(
    found: LocatedRun, choice: Choice, printer: Printer, pause: Callable[[float], None] = time.sleep
) -> None:
    """Print the logs of units, and what is added to them, until their task or the run has ended, or Ctrl-C.

    Raises:
        typer.BadParameter: if there is no such task, or was no such unit at its end.
        HistoryError: if the history cannot be read.
    """
    follower = _Follower(found, choice, printer)
    with suppress(KeyboardInterrupt):
        is_over = False
        while not is_over:
            began = time.monotonic()
            is_over = follower.ask()
            pause_s = max(_ASK_S, 4 * (time.monotonic() - began))  # not all day with the database
            until = time.monotonic() + pause_s
            while not is_over and time.monotonic() < until:
                follower.look()
                pause(LOOK_S)
        if choice.number is not None and follower.first is not None and not follower.has_met_any:
            raise _no_unit(follower.first, choice)
    printer.end()


class _Follower:
    """Which logs are being followed, and what of them was printed.

    Attributes:
        first: the first task that is followed; None before any has begun.
    """

    def __init__(self, found: LocatedRun, choice: Choice, printer: Printer) -> None:
        self.first: int | None = None
        self._found = found
        self._choice = choice
        self._printer = printer
        self._root = _root(found)
        self._names: dict[int, str] = {}
        self._closed: set[int] = set()  # tasks that had ended when they were last looked at
        self._met: set[tuple[Any, ...]] = set()
        self._open: dict[tuple[Any, ...], LogReader] = {}  # of units that run
        self._shown: LogReader | None = None  # whose text was printed last
        self._ended_looks = 0

    @property
    def has_met_any(self) -> bool:
        """Whether there was a unit to follow."""
        return bool(self._met)

    def ask(self) -> bool:
        """Look at the history: which units have started, which have ended; whether that was all."""
        found, choice = self._found, self._choice
        # How the run and its tasks are is asked first: what they do until then is seen afterwards.
        condition = found.condition()
        tasks = {task.position: task for task in found.reader.tasks(found.run_id)}
        self._names = {position: task.name for position, task in tasks.items()}
        if self.first is None:
            wanted = _positions(condition, self._names, choice, wait=condition.is_running)
            self.first = wanted[0] if wanted else None
        running = set()
        for position, task in tasks.items():
            if position in self._closed or not self._follows(position):
                continue
            running |= self._ask_units(position)
            if State(task.state).is_end:
                self._closed.add(position)
        for key in [key for key in self._open if key not in running]:
            self._finish(self._open.pop(key))
        self._printer.flush()
        if not condition.is_running:
            self.look()
            return True
        if choice.position is not None or choice.number is not None:
            return self.first in self._closed or self._unit_has_ended(tasks.get(self.first))
        return False

    def look(self) -> None:
        """Print what the logs of units that run have got since."""
        for log in self._open.values():
            self._print(log)
        self._printer.flush()

    def _follows(self, position: int) -> bool:
        if self.first is None:
            return False
        if self._choice.position is not None or self._choice.number is not None:
            return position == self.first
        return position >= self.first

    def _ask_units(self, position: int) -> set[tuple[Any, ...]]:
        """Meet the units that have started since; the keys of those that run."""
        running = set()
        for unit in _units(self._found, position, self._choice, started=True):
            key = tuple(unit[:4])
            if not State(unit.state).is_end:
                running.add(key)
            if key in self._open:
                self._open[key].unit = unit
            if key in self._met:
                continue
            self._met.add(key)
            log = LogReader(self._root, unit, self._printer.decoder())
            if key in running:
                self._open[key] = log
                self._print(log)
            else:
                self._finish(log)
        return running

    def _print(self, log: LogReader) -> None:
        for part in log.parts():
            self._say_whose(log)
            self._printer.text(part)

    def _finish(self, log: LogReader) -> None:
        self._print(log)
        if rest := log.rest():
            self._say_whose(log)
            self._printer.text(rest)
        if log.problem:
            self._printer.header(log.unit, self._names[log.unit.position], log.problem)
            self._shown = None

    def _say_whose(self, log: LogReader) -> None:
        if self._shown is not log:
            self._shown = log
            self._printer.header(log.unit, self._names[log.unit.position])

    def _unit_has_ended(self, task: Row[Any] | None) -> bool:
        """Whether the one unit that is followed has ended, and no other attempt at it was seen to begin."""
        if task is None or self._choice.number is None:
            return False
        expected = 2 if self._choice.number == 0 and "compound" in task.type else 1
        units = list(_units(self._found, task.position, self._choice))
        has_ended = len(units) >= expected and all(State(unit.state).is_end for unit in units)
        self._ended_looks = self._ended_looks + 1 if has_ended else 0
        return self._ended_looks > 1


def _positions(
    condition: Condition, begun: dict[int, str], choice: Choice, *, wait: bool = False
) -> list[int]:
    """The tasks whose units are wanted.

    Raises:
        typer.BadParameter: if that is none of the run's, or has not begun although nobody waits for it.
    """
    run, position = condition.run, choice.position
    if position is None:
        return sorted(begun) if choice.failed else sorted(begun)[-1:]
    if position not in begun and not run.first_task <= position <= run.last_task:
        raise typer.BadParameter(
            f"the run is of tasks {run.first_task} to {run.last_task}, and has no task {position}",
            param_hint="--task",
        )
    if position not in begun and not wait:
        raise typer.BadParameter(f"task {position} has not begun", param_hint="--task")
    return [position]


def _no_unit(position: int, choice: Choice) -> typer.BadParameter:
    return typer.BadParameter(f"task {position} has no unit {choice.number}", param_hint="--unit")


def _units(found: LocatedRun, position: int, choice: Choice, *, started: bool = False) -> Iterator[Row[Any]]:
    states = (State.FAILED,) if choice.failed else _BEGUN if started else ()
    return found.reader.unit_logs(found.run_id, position=position, number=choice.number, states=states)


def _root(found: LocatedRun) -> Path:
    return Path(os.path.realpath(found.directory))
