"""From a run's directory to its record, and to whoever is at work on it.

All commands about runs begin here. They only read: a coordinator that works, on this host or another one,
is not disturbed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Row

from fractal_runner.errors import HistoryError
from fractal_runner.history.directory import RUN_FILE, read_run_file
from fractal_runner.history.reading import HistoryReader
from fractal_runner.history.schema import State
from fractal_runner.history.store import FILE_NAME, History
from fractal_runner.history.writing import SILENT_S
from fractal_runner.worker.processes import Identity, host_name, is_same_process

INTERRUPTED = "interrupted"  # recorded as running, but nobody is at work on it


@dataclass(frozen=True, slots=True)
class Condition:
    """How a run is, as far as can be told from here.

    Attributes:
        run: its record, without the dataset.
        state: as it is recorded, or INTERRUPTED.
        coordinator: who is at work on it, None if nobody is.
        epoch: which of its coordinators that is; 0 for none.
        seconds: from its first start to its end, or to the last sign of life.
    """

    run: Row[Any]
    state: str
    coordinator: Identity | None
    epoch: int
    seconds: float

    @property
    def is_running(self) -> bool:
        return self.coordinator is not None

    @property
    def can_go_on(self) -> bool:
        """Whether to resume it would do something."""
        return self.state in (INTERRUPTED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True, slots=True)
class LocatedRun:
    """A run whose history is open.

    Attributes:
        directory: its directory, as it was given.
        history: its history, to read from.
        run_id: the run.
    """

    directory: Path
    history: History
    run_id: str

    @property
    def reader(self) -> HistoryReader:
        return self.history.read

    def condition(self) -> Condition:
        """How the run is now.

        Raises:
            HistoryError: if it cannot be told.
        """
        return condition_of(self.reader, _outline(self.reader, self.run_id))


def holds_run(directory: Path) -> bool:
    """Whether there is a run in this directory, or what is left of one."""
    return (directory / RUN_FILE).exists() or (directory / FILE_NAME).exists()


@contextmanager
def open_run(directory: Path, url: str | None = None) -> Iterator[LocatedRun]:
    """The run of a directory, until the end of the context.

    Args:
        directory: the run's directory.
        url: where its history is, if not where the directory says.

    Raises:
        HistoryError: if there is none, or it cannot be read.
    """
    run_id, where = whereabouts(directory, url)
    with open_history(where) as history:
        yield LocatedRun(directory, history, expect_run(history.read, directory, run_id, history.name))


def whereabouts(directory: Path, url: str | None = None) -> tuple[str | None, str]:
    """Which run a directory holds, if it says, and where the history of that is.

    Raises:
        HistoryError: if it holds none.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise HistoryError(f"{directory} {what}; a run's directory is asked for.")
    said = read_run_file(directory)
    if said is not None:
        return said.run_id, url or said.history_in(directory)
    if url is None and not (directory / FILE_NAME).exists():
        raise HistoryError(f"{directory} holds no run: there is no {RUN_FILE} in it.")
    return None, url or str(directory / FILE_NAME)


def open_history(url: str) -> History:
    """A history, to read from.

    Raises:
        HistoryError: if it cannot be.
    """
    try:
        return History(url, read_only=True)
    except ValueError as error:  # of a URL that somebody typed, or that a run's directory contains
        raise HistoryError(str(error)) from None


def expect_run(reader: HistoryReader, directory: Path, run_id: str | None, name: str) -> str:
    """The run of a directory, which its history must know.

    Args:
        reader: reads the history.
        directory: the run's.
        run_id: the run, if the directory names it.
        name: what messages call the history.

    Raises:
        HistoryError: if it does not know it.
    """
    if run_id is not None:
        if reader.outline(run_id) is None:
            raise HistoryError(
                f"The history {name} does not know the run {run_id} of {directory}: give the one that it "
                "was begun with (--db, or FRACTAL_RUNNER_DB)."
            )
        return run_id
    # Its coordinator died before it could write which run this is.
    absolute = Path(os.path.abspath(directory))  # noqa: PTH100 - links are kept
    found = reader.runs() if name == str(absolute / FILE_NAME) else reader.runs_in(absolute)
    if not found:
        raise HistoryError(f"{directory} holds no run: there is no {RUN_FILE} in it, and none in {name}.")
    run_id = found[0].id
    return str(run_id)


def condition_of(reader: HistoryReader, run: Row[Any], clock: Callable[[], float] = time.time) -> Condition:
    """How a run is now.

    Args:
        reader: reads its history.
        run: its record, as it was just read.
        clock: seconds since the epoch.

    Raises:
        HistoryError: if its record is gone, or cannot be read.
    """
    if run.state != State.RUNNING:
        return _ended(run)
    owner = reader.owner(run.id)
    if owner is not None:
        who = Identity(owner.host, owner.boot_id, owner.pid, owner.start_ticks)
        silent_s = clock() - owner.heartbeat
        if is_same_process(who) if who.host == host_name() else silent_s < SILENT_S:
            return Condition(run, run.state, who, owner.epoch, clock() - run.started)
    run = _outline(reader, run.id)  # again: it may have ended between the first look and the second
    if run.state != State.RUNNING:
        return _ended(run)
    last = run.started if owner is None else owner.heartbeat
    return Condition(run, INTERRUPTED, None, 0, last - run.started)


def _ended(run: Row[Any]) -> Condition:
    return Condition(run, run.state, None, 0, (run.ended or run.started) - run.started)


def _outline(reader: HistoryReader, run_id: str) -> Row[Any]:
    run = reader.outline(run_id)
    if run is None:
        raise HistoryError(f"The run {run_id} is not in its history any more: somebody has removed it.")
    return run
