"""What can be asked of a history: its runs, their tasks, their units, and images by status."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Row, func, select

from fractal_runner.history.database import Database
from fractal_runner.history.schema import State, image_statuses, owners, runs, tasks, units

UNSET = "unset"  # the status of an image that a workflow task has never been given

_WITHOUT_BULK = [column for column in runs.columns if column.name not in ("workflow", "dataset")]
_TASKS_WITHOUT_BULK = [column for column in tasks.columns if column.name not in ("selected", "dataset")]
_CHUNK = 1000


class HistoryReader:
    """Reads from a database. Each method is one consistent look."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def run(self, run_id: str) -> Row[Any] | None:
        """A run with everything that is known of it."""
        with self._database.reading() as connection:
            return connection.execute(select(runs).where(runs.c.id == run_id)).one_or_none()

    def runs(self) -> Sequence[Row[Any]]:
        """All runs, the latest first, without workflow and dataset."""
        with self._database.reading() as connection:
            return connection.execute(select(*_WITHOUT_BULK).order_by(runs.c.started.desc())).all()

    def runs_in(self, directory: str | os.PathLike[str]) -> Sequence[Row[Any]]:
        """The runs of a directory, the latest first."""
        with self._database.reading() as connection:
            return connection.execute(
                select(*_WITHOUT_BULK)
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
            return connection.execute(
                select(*_TASKS_WITHOUT_BULK).where(tasks.c.run_id == run_id).order_by(tasks.c.position)
            ).all()

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
        found: dict[tuple[int, str], dict[State, int]] = {}
        with self._database.reading() as connection:
            for position, stage, state, count in connection.execute(
                select(units.c.position, units.c.stage, units.c.state, func.count())
                .where(units.c.run_id == run_id, units.c.is_last)
                .group_by(units.c.position, units.c.stage, units.c.state)
            ):
                found.setdefault((position, stage), {})[State(state)] = count
        return found

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
        query = select(units).where(units.c.run_id == run_id)
        if position is not None:
            query = query.where(units.c.position == position)
        if number is not None:
            query = query.where(units.c.number == number)
        if states:
            query = query.where(units.c.state.in_(list(states)))
        if last_only:
            query = query.where(units.c.is_last)
        place = (units.c.position, units.c.stage, units.c.number, units.c.attempt)
        query = query.order_by(*place).limit(limit)
        with self._database.reading() as connection:
            yield from connection.execution_options(yield_per=_CHUNK).execute(query)

    def image_statuses(self, dataset_key: str, task_key: str) -> dict[str, str]:
        """The latest status of each image that a workflow task was ever given: by zarr_url."""
        with self._database.reading() as connection:
            rows = connection.execute(
                select(image_statuses.c.zarr_url, image_statuses.c.status).where(
                    image_statuses.c.dataset_key == dataset_key, image_statuses.c.task_key == task_key
                )
            )
            return {row.zarr_url: row.status for row in rows}
