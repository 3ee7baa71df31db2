"""The one writer of a run's record: its owner, until another takes over.

Every transaction first asks whether this process still owns the run, and bears a number: one that was
committed, though its answer was lost, is not done twice. Units are many, so what happens to them is
gathered and written together.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Update, bindparam, delete, insert, select, update

from fractal_runner.errors import HistoryError, RunBusyError
from fractal_runner.history.database import Database, Upsert
from fractal_runner.history.schema import State, image_statuses, owners, runs, tasks, units
from fractal_runner.worker.processes import Identity, host_name, identify

GATHER_S = 0.05
HEARTBEAT_S = 10.0
SILENT_S = 60.0  # an owner on another host that was not heard of for so long is taken for dead

_MANY = 2000  # rows that are written without waiting for more
_logger = logging.getLogger("fractal_runner")


class OwnershipLostError(HistoryError):
    """Another coordinator has taken over this run; this one may not write any more."""


class UnitKey(NamedTuple):
    """Which attempt at which unit of a run."""

    position: int
    stage: str
    number: int
    attempt: int


class RunWriter:
    """Writes what happens to one run.

    Methods are for one thread. What `flush` and the methods that write at once raise is a HistoryError;
    after one, the run cannot go on, and what was not written is told by the workers' own records.

    Args:
        database: where.
        run_id: which run.
        give_up: asked while a database that has gone away is waited for.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        database: Database,
        run_id: str,
        *,
        give_up: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run_id = run_id
        self._database = database
        self._give_up = give_up
        self._clock = clock
        self._epoch = 0
        self._writes = 0
        self._has_failed = False
        self._open: dict[UnitKey, dict[str, Any]] = {}  # rows of units that have not ended
        self._changed: dict[UnitKey, dict[str, Any]] = {}  # rows to be written
        self._superseded: list[UnitKey] = []
        self._due = float("inf")
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

    @property
    def epoch(self) -> int:
        """Which owner of the run this is: 1 for the first."""
        return self._epoch

    def begin(self, run: Mapping[str, Any]) -> None:
        """Record a new run, which this process owns.

        Args:
            run: the columns of `runs` but its state, host and times.
        """
        now = self._clock()
        self._epoch = 1
        row = {**run, "id": self.run_id, "state": State.RUNNING, "host": host_name(), "started": now}

        def work(connection: Connection) -> None:
            if connection.execute(select(runs.c.id).where(runs.c.id == self.run_id)).first() is not None:
                return  # this very transaction was committed before, and its answer lost
            connection.execute(insert(runs).values(**row, resumed=0))
            connection.execute(insert(owners).values(run_id=self.run_id, **self._ownership()))

        self._database.write(work, give_up=self._give_up)
        self._start_heart()

    def take_over(self) -> None:
        """Become the owner of a run that is there, and whose directory this process has locked.

        Raises:
            RunBusyError: if its owner, on another host, still shows signs of life.
        """

        me = identify(os.getpid())

        def work(connection: Connection) -> int:
            owner = connection.execute(_owner_of(self.run_id)).one()
            known = Identity(owner.host, owner.boot_id, owner.pid, owner.start_ticks)
            if self._epoch and owner.epoch == self._epoch and known == me:
                return self._epoch  # this very transaction was committed before, and its answer lost
            silent = self._clock() - owner.heartbeat
            state = connection.execute(select(runs.c.state).where(runs.c.id == self.run_id)).scalar_one()
            # On this host the lock has told that the one before is gone.
            if state == State.RUNNING and owner.host != host_name() and silent < SILENT_S:
                raise RunBusyError(
                    f"The run {self.run_id} belongs to process {owner.pid} on {owner.host}, which was heard "
                    f"of {max(0.0, silent):.0f} s ago: wait for its end, cancel it there, or come back "
                    f"once it has been silent for {SILENT_S:.0f} s.",
                    host=owner.host,
                    pid=owner.pid,
                )
            epoch: int = owner.epoch + 1
            self._epoch = epoch
            connection.execute(
                update(owners).where(owners.c.run_id == self.run_id).values(**self._ownership())
            )
            connection.execute(
                update(runs)
                .where(runs.c.id == self.run_id)
                .values(state=State.RUNNING, ended=None, error=None, resumed=runs.c.resumed + 1)
            )
            return epoch

        self._epoch = self._database.write(work, give_up=self._give_up)
        self._start_heart()

    def change_run(self, **columns: Any) -> None:
        """Record what a resume has changed."""
        self._write(lambda connection: self._update_run(connection, columns))

    def begin_task(self, task: Mapping[str, Any], images: Iterable[str], dataset_key: str) -> None:
        """Record that a task begins, or begins again.

        Args:
            task: the columns of `tasks` but its state and times.
            images: the zarr_urls that it is going to work on.
            dataset_key: the dataset that they are of.
        """
        row = {**task, "run_id": self.run_id, "state": State.RUNNING, "started": self._clock()}
        here = (tasks.c.run_id == self.run_id) & (tasks.c.position == task["position"])
        submitted = [self._status(dataset_key, task["task_key"], url, State.SUBMITTED) for url in images]

        def work(connection: Connection) -> None:
            connection.execute(delete(tasks).where(here))
            connection.execute(insert(tasks).values(**row))
            # Those of images that it has not any more, if it begins again: they come to nothing.
            connection.execute(
                delete(image_statuses).where(*self._own_statuses(dataset_key, task["task_key"]))
            )
            _STATUSES.execute(connection, submitted)

        self._write(work)

    def change_task(self, position: int, **columns: Any) -> None:
        """Record what has become known of a task that runs."""
        self._write(lambda connection: self._update_task(connection, position, columns))

    def end_task(
        self,
        position: int,
        state: State,
        *,
        images: Mapping[str, bool],
        keys: tuple[str, str],
        dataset: bytes | None = None,
        error: str | None = None,
    ) -> None:
        """Record how a task has ended, in one transaction with what it left.

        Args:
            position: which task.
            state: how.
            images: whether it is done with each of them, by zarr_url.
            keys: those of the dataset and of the task, which their statuses are filed under.
            dataset: the dataset after it, compressed, if it is done.
            error: why it is not.
        """
        most = 2 * sum(images.values()) > len(images)
        rows = [
            self._status(*keys, url, _STATUS[is_done]) for url, is_done in images.items() if is_done != most
        ]
        columns = {"state": state, "ended": self._clock(), "dataset": dataset, "error": storable(error)}

        def work(connection: Connection) -> None:
            self._write_units(connection)
            connection.execute(self._all_statuses(*keys, _STATUS[most]))
            _STATUSES.execute(connection, rows)
            self._update_task(connection, position, columns)

        self._write(work)
        self._forget()

    def end_run(self, state: State, error: str | None = None) -> None:
        """Record how the run has ended."""
        columns = {"state": state, "ended": self._clock(), "error": storable(error)}
        self._write(lambda connection: self._update_run(connection, columns))

    def submitted(
        self, key: UnitKey, *, zarr_url: str | None, digest: str, log: str, when: float | None = None
    ) -> None:
        """A unit has been given to its executor: now, or when an earlier coordinator did that."""
        row = _NEW.copy()
        row["run_id"] = self.run_id
        row["position"], row["stage"], row["number"], row["attempt"] = key
        row["is_last"] = True
        row["state"] = State.SUBMITTED.value
        row["zarr_url"] = storable(zarr_url)
        row["digest"] = digest
        row["log"] = log
        row["submitted"] = self._clock() if when is None else when
        self._open[key] = self._changed[key] = row
        if key.attempt > 1:
            self._superseded.append(key)
        self._gather()

    def running(self, key: UnitKey, columns: Mapping[str, Any]) -> None:
        """A unit that was submitted has started: started, host, pid, job_id."""
        row = self._changed[key] = self._open[key]
        row.update(columns)
        row["state"] = State.RUNNING.value
        self._gather()

    def ended(self, key: UnitKey, state: State, columns: Mapping[str, Any]) -> None:
        """A unit that was submitted has ended: how, and all that is known of it."""
        row = self._changed[key] = self._open.pop(key)
        row.update(columns)
        row["message"] = storable(row["message"])
        row["reason"] = storable(row["reason"])
        row["state"] = state.value
        self._gather()

    def left_out(self, position: int, stage: str, first: int) -> None:
        """A resume has left a stage with fewer units: those from number `first` on count no more."""
        beyond = (
            (units.c.run_id == self.run_id)
            & (units.c.position == position)
            & (units.c.stage == stage)
            & (units.c.number >= first)
        )
        never_ended = beyond & units.c.state.in_([State.SUBMITTED.value, State.RUNNING.value])

        def work(connection: Connection) -> None:
            ended = {"state": State.CANCELLED.value, "ended": self._clock(), "message": _LEFT_OUT}
            connection.execute(update(units).where(never_ended).values(**ended))
            connection.execute(update(units).where(beyond).values(is_last=False))

        self._write(work)

    def due_in(self) -> float:
        """Seconds until `flush` is to be called; infinite while there is nothing to write."""
        if len(self._changed) >= _MANY:
            return 0.0
        return max(0.0, self._due - time.monotonic())

    def flush(self) -> None:
        """Write what was gathered."""
        if self._due == float("inf"):
            return
        self._write(self._write_units)
        self._forget()

    def close(self) -> None:
        """End the signs of life."""
        self._closed.set()
        if self._heart is not None:
            self._heart.join(timeout=30)

    def _gather(self) -> None:
        if self._due == float("inf"):
            self._due = time.monotonic() + GATHER_S

    def _forget(self) -> None:
        for gathered in (self._changed, self._superseded):
            gathered.clear()
        self._due = float("inf")

    def _write(self, work: Callable[[Connection], None]) -> None:
        """Do `work` in a transaction that is this owner's, once."""
        self._writes += 1
        number = self._writes
        own = owners.c.run_id == self.run_id

        def transaction(connection: Connection) -> None:
            owner = connection.execute(_owner_of(self.run_id)).one_or_none()
            if owner is None or owner.epoch != self._epoch:
                raise OwnershipLostError(_lost(self.run_id, owner))
            if owner.writes == number:
                return
            work(connection)
            connection.execute(update(owners).where(own).values(writes=number, heartbeat=self._clock()))

        # Once it has been waited for in vain, what ends the run need not wait as long again.
        patience_s = 0.0 if self._has_failed else None
        try:
            self._database.write(transaction, patience_s=patience_s, give_up=self._give_up)
        except HistoryError:
            self._has_failed = True
            raise

    def _write_units(self, connection: Connection) -> None:
        _UNITS.execute(connection, list(self._changed.values()))
        if self._superseded:  # afterwards: the attempts before are often among these very rows
            connection.execute(_SUPERSEDE, [self._where(key) for key in self._superseded])

    def _where(self, key: UnitKey) -> dict[str, Any]:
        return {
            "in_run": self.run_id,
            "at_position": key.position,
            "of_stage": key.stage,
            "of_number": key.number,
            "at_attempt": key.attempt,
        }

    def _all_statuses(self, dataset_key: str, task_key: str, status: State) -> Update:
        """Sets the statuses of all images that this run's task was given."""
        here = self._own_statuses(dataset_key, task_key)
        return update(image_statuses).where(*here).values(status=status.value)

    def _own_statuses(self, dataset_key: str, task_key: str) -> tuple[ColumnElement[bool], ...]:
        """Where the statuses are that this run has set for one of its tasks."""
        return (
            image_statuses.c.dataset_key == dataset_key,
            image_statuses.c.task_key == task_key,
            image_statuses.c.run_id == self.run_id,
        )

    def _status(self, dataset_key: str, task_key: str, zarr_url: str, status: str) -> dict[str, str | None]:
        return {
            "dataset_key": dataset_key,
            "task_key": task_key,
            "zarr_url": storable(zarr_url),
            "status": str(status),
            "run_id": self.run_id,
        }

    def _update_run(self, connection: Connection, columns: Mapping[str, Any]) -> None:
        connection.execute(update(runs).where(runs.c.id == self.run_id).values(**columns))

    def _update_task(self, connection: Connection, position: int, columns: Mapping[str, Any]) -> None:
        here = (tasks.c.run_id == self.run_id) & (tasks.c.position == position)
        connection.execute(update(tasks).where(here).values(**columns))

    def _ownership(self) -> dict[str, Any]:
        me = identify(os.getpid())
        return {
            "epoch": self._epoch,
            "writes": 0,
            "host": me.host,
            "boot_id": me.boot_id,
            "pid": me.pid,
            "start_ticks": me.start_ticks,
            "heartbeat": self._clock(),
        }

    def _start_heart(self) -> None:
        self._heart = threading.Thread(
            target=self._beat, name=f"run {self.run_id[:8]}: heartbeat", daemon=True
        )
        self._heart.start()

    def _beat(self) -> None:
        """Show that the owner lives, however long the coordinator's thread is busy with other things."""
        own = (owners.c.run_id == self.run_id) & (owners.c.epoch == self._epoch)
        while not self._closed.wait(HEARTBEAT_S):
            try:
                self._database.write(
                    lambda connection: connection.execute(
                        update(owners).where(own).values(heartbeat=self._clock())
                    ),
                    patience_s=0,
                )
            except Exception as error:  # whatever it is, the owner lives
                # The coordinator meets the same when it next writes, and decides what that means.
                _logger.debug("no sign of life of run %s could be left: %s", self.run_id, error)


def storable(text: str | None) -> str | None:
    """Text as every database takes it: what is no character (file names may have such), and NUL, escaped."""
    if text is None or (text.isascii() and "\0" not in text):
        return text
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _owner_of(run_id: str) -> Any:
    return select(owners).where(owners.c.run_id == run_id).with_for_update()


def _lost(run_id: str, owner: Row[Any] | None) -> str:
    if owner is None:
        return f"The run {run_id} is not in its history any more: somebody has removed it."
    return (
        f"Process {owner.pid} on {owner.host} has taken over the run {run_id}, as this one was taken for "
        "dead; it stops here."
    )


_LEFT_OUT = "The run was resumed without this unit."
_NEW: dict[str, Any] = dict.fromkeys(column.name for column in units.columns)
_SUPERSEDE = (
    update(units)
    .where(
        units.c.run_id == bindparam("in_run"),
        units.c.position == bindparam("at_position"),
        units.c.stage == bindparam("of_stage"),
        units.c.number == bindparam("of_number"),
        units.c.attempt < bindparam("at_attempt"),
    )
    .values(is_last=False)
)
_STATUS = {True: State.DONE, False: State.FAILED}
_UNITS = Upsert(units)
_STATUSES = Upsert(image_statuses)
