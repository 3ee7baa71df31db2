"""What can be asked of a history: its runs, their tasks, their units, and images by status."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Row, case, func, select, tuple_

from fractal_runner.history import schema
from fractal_runner.history.database import Database
from fractal_runner.history.schema import State, image_statuses, owners, runs, tasks, units
from fractal_runner.worker.spec import COLD, WARM

STARTS = (WARM, COLD)
UNSET = "unset"  # the status of an image that a workflow task has never been given

_WITHOUT_BULK = [column for column in runs.columns if column.name not in ("workflow", "dataset")]
_TASKS_WITHOUT_BULK = [column for column in tasks.columns if column.name not in ("selected", "dataset")]
_WITHOUT_DATASET = [column for column in runs.columns if column.name != "dataset"]
_PLACE = (units.c.position, units.c.stage, units.c.number, units.c.attempt)
_CHUNK = 1000


class HistoryReader:
    """Reads from a database. Each method is one consistent look.

    In a history of an older version, columns that came later are None.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def _there(self, columns: Iterable[Column[Any]]) -> list[ColumnElement[Any]]:
        """These columns, as far as the database has them."""
        return schema.as_of(self._database.version, columns)

    def run(self, run_id: str) -> Row[Any] | None:
        """A run with everything that is known of it."""
        with self._database.reading() as connection:
            query = select(*self._there(runs.columns)).where(runs.c.id == run_id)
            return connection.execute(query).one_or_none()

    def outline(self, run_id: str) -> Row[Any] | None:
        """A run without its dataset, which may be large."""
        with self._database.reading() as connection:
            query = select(*self._there(_WITHOUT_DATASET)).where(runs.c.id == run_id)
            return connection.execute(query).one_or_none()

    def runs(self) -> Sequence[Row[Any]]:
        """All runs, the latest first, without workflow and dataset."""
        with self._database.reading() as connection:
            query = select(*self._there(_WITHOUT_BULK)).order_by(runs.c.started.desc())
            return connection.execute(query).all()

    def runs_in(self, directory: str | os.PathLike[str]) -> Sequence[Row[Any]]:
        """The runs of a directory, the latest first."""
        with self._database.reading() as connection:
            return connection.execute(
                select(*self._there(_WITHOUT_BULK))
                .where(runs.c.directory == os.fspath(directory))
                .order_by(runs.c.started.desc())
            ).all()

    def owner(self, run_id: str) -> Row[Any] | None:
        """Who writes, or was the last to write, of a run."""
        with self._database.reading() as connection:
            return connection.execute(select(owners).where(owners.c.run_id == run_id)).one_or_none()

    def tasks(self, run_id: str) -> Sequence[Row[Any]]:
        """The tasks that have begun, in order, without datasets."""
        with self._database.reading() as connection:
            query = select(*self._there(_TASKS_WITHOUT_BULK)).where(tasks.c.run_id == run_id)
            return connection.execute(query.order_by(tasks.c.position)).all()

    def tasks_done(self, run_id: str | None = None) -> dict[str, int]:
        """How many tasks are done, of each run or of one; runs without any are left out."""
        query = select(tasks.c.run_id, func.count().label("tasks")).where(tasks.c.state == State.DONE)
        if run_id is not None:
            query = query.where(tasks.c.run_id == run_id)
        with self._database.reading() as connection:
            rows = connection.execute(query.group_by(tasks.c.run_id)).all()
        return {row.run_id: row.tasks for row in rows}

    def task_data(self, run_id: str, position: int) -> tuple[bytes | None, bytes | None]:
        """The dataset after a task, and the images that it was given, as far as they are recorded."""
        with self._database.reading() as connection:
            row = connection.execute(
                select(tasks.c.dataset, tasks.c.selected).where(
                    tasks.c.run_id == run_id, tasks.c.position == position
                )
            ).one_or_none()
        return (None, None) if row is None else (row.dataset, row.selected)

    def counts(self, run_id: str) -> dict[tuple[int, str], dict[State, int]]:
        """How many units of each task and stage are in each state; of attempts only the last."""
        # A group is a range of the primary key, and is counted without being sorted: one by state is not.
        counts = [func.count(case((units.c.state == state.value, 1))) for state in State]
        query = (
            select(units.c.position, units.c.stage, *counts)
            .where(units.c.run_id == run_id, units.c.is_last)
            .group_by(units.c.position, units.c.stage)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return {
            (position, stage): {state: n for state, n in zip(State, numbers, strict=True) if n}
            for position, stage, *numbers in rows
        }

    def starts(self, run_id: str) -> dict[int, dict[str, int]]:
        """How many commands of each task were started warm, and cold; of attempts only the last."""
        [noted] = self._there([units.c.start])
        counts = [func.count(case((noted == start, 1))) for start in STARTS]
        query = (
            select(units.c.position, *counts)
            .where(units.c.run_id == run_id, units.c.is_last)
            .group_by(units.c.position)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return {
            position: {start: n for start, n in zip(STARTS, numbers, strict=True) if n}
            for position, *numbers in rows
        }

    def units(
        self,
        run_id: str,
        *,
        position: int | None = None,
        number: int | None = None,
        states: Sequence[State] = (),
        last_only: bool = True,
        limit: int | None = None,
    ) -> Iterator[Row[Any]]:
        """Units in order, one row an attempt.

        Args:
            run_id: the run.
            position: only of this task.
            number: only this unit of each stage.
            states: only in one of these.
            last_only: of the attempts at a unit, only the last one.
            limit: how many at most.
        """
        chosen = _chosen(run_id, position, number, states, last_only=last_only)
        query = select(*self._there(units.columns)).where(*chosen).order_by(*_PLACE).limit(limit)
        with self._database.reading() as connection:
            yield from connection.execution_options(yield_per=_CHUNK).execute(query)

    def unit_logs(
        self,
        run_id: str,
        *,
        position: int | None = None,
        number: int | None = None,
        states: Sequence[State] = (),
        last_only: bool = True,
    ) -> Iterator[Row[Any]]:
        """Where the logs of units are, in order, one row an attempt.

        They are read a thousand at a time, and in between the database is left alone: whoever prints what
        is in the logs may take his time. So this is not one consistent look.

        Args:
            run_id: the run.
            position: only of this task.
            number: only this unit of each stage.
            states: only in one of these.
            last_only: of the attempts at a unit, only the last one.
        """
        about = units.c.is_last, units.c.state, units.c.zarr_url, units.c.started, units.c.start, units.c.log
        columns = self._there([*_PLACE, *about])
        chosen = _chosen(run_id, position, number, states, last_only=last_only)
        query = select(*columns).where(*chosen).order_by(*_PLACE).limit(_CHUNK)
        page = query
        while True:
            with self._database.reading() as connection:
                rows = connection.execute(page).all()
            yield from rows
            if len(rows) < _CHUNK:
                return
            page = query.where(tuple_(*_PLACE) > tuple_(*rows[-1][: len(_PLACE)]))

    def image_statuses(self, dataset_key: str, task_key: str) -> dict[str, str]:
        """The latest status of each image that a workflow task was ever given: by zarr_url.

        A task's images get their statuses when it ends. Of one that has not ended, or never will, its
        units tell, where each image is one unit's.
        """
        with self._database.reading() as connection:
            rows = connection.execute(
                select(image_statuses.c.zarr_url, image_statuses.c.status, image_statuses.c.run_id).where(
                    image_statuses.c.dataset_key == dataset_key, image_statuses.c.task_key == task_key
                )
            ).all()
            found = {row.zarr_url: row.status for row in rows}
            open_runs = {row.zarr_url: row.run_id for row in rows if row.status == State.SUBMITTED}
            if not open_runs:
                return found
            ended = connection.execute(
                select(units.c.run_id, units.c.zarr_url, units.c.state)
                .join(tasks, (tasks.c.run_id == units.c.run_id) & (tasks.c.position == units.c.position))
                .where(
                    tasks.c.task_key == task_key,
                    tasks.c.type == "parallel",
                    tasks.c.run_id.in_(set(open_runs.values())),
                    units.c.is_last,
                    units.c.state.in_([State.DONE, State.FAILED]),
                )
            )
            for unit in ended:
                if open_runs.get(unit.zarr_url) == unit.run_id:
                    found[unit.zarr_url] = unit.state
        return found


def _chosen(
    run_id: str, position: int | None, number: int | None, states: Sequence[State], *, last_only: bool
) -> list[ColumnElement[bool]]:
    """Which units are asked for."""
    conditions: list[ColumnElement[bool]] = [units.c.run_id == run_id]
    if position is not None:
        conditions.append(units.c.position == position)
    if number is not None:
        conditions.append(units.c.number == number)
    if states:
        conditions.append(units.c.state.in_(list(states)))
    if last_only:
        conditions.append(units.c.is_last)
    return conditions
