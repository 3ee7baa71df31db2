"""Whose a run is: another coordinator takes over, here or from another host."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.pool import NullPool

from fractal_runner import History, JobExecutionError, RunBusyError
from fractal_runner.history import schema
from fractal_runner.history.writing import OwnershipLostError, RunWriter
from fractal_runner.worker.processes import host_name
from fractal_runner.worker.stop import raise_fence
from tests.history.noted import NotedRun, until


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty history, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shared.sqlite"
    return request.getfixturevalue("database").url


def ask(url: str, statement: Any, **values: Any) -> list[Any]:
    """Do this in the database, past all that knows better."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        result = connection.execute(text(statement) if isinstance(statement, str) else statement, values)
        return list(result.all()) if result.returns_rows else []


def everything(url: str) -> dict[str, list[Any]]:
    """All rows of all tables."""
    return {table.name: sorted(map(repr, ask(url, select(table)))) for table in schema.metadata.sorted_tables}


async def test_an_owner_that_has_lost_the_run_stops_and_writes_nothing_more(tmp_path: Path, url: str) -> None:
    run = NotedRun(tmp_path / "run", units=6)
    held, also_held = run.hold("second", 3), run.hold("second", 5)
    call = asyncio.ensure_future(run.go(history=url))
    await until(lambda: run.started()["second", 5] > 0 and len(run.recorded(url)) == 10)
    with History(url) as history:
        successor = history.writer(run.run_id)
        successor.take_over()
        successor.close()
    raise_fence(str(run.directory), successor.epoch, [])
    before = everything(url)
    files = {
        name: (run.directory / name).read_bytes() for name in ("dataset.json", "filters.json", "run.json")
    }
    held.unlink()

    with pytest.raises(JobExecutionError) as caught:
        await call

    assert f"Process {os.getpid()} on {host_name()} has taken over the run {run.run_id}" in str(caught.value)
    assert everything(url) == before
    assert not (run.directory / "shutdown").exists(), "it would stop the new owner's units"
    assert {name: (run.directory / name).read_bytes() for name in files} == files
    run.expect_nothing_left()
    also_held.unlink()
    await run.finish(run.recorded(url) | run.evidenced(), url)


async def test_an_owner_whose_run_was_removed_from_the_history_stops(tmp_path: Path, url: str) -> None:
    run = NotedRun(tmp_path / "run", units=4)
    held = run.hold("first", 3)
    call = asyncio.ensure_future(run.go(history=url))
    await until(lambda: run.started()["first", 3] > 0)
    for table in ("owners", "units", "tasks", "runs"):  # in this order nothing is written in between
        ask(url, f"DELETE FROM fractal_runner_{table}")
    held.unlink()

    with pytest.raises(JobExecutionError, match=f"{run.run_id} is not in its history any more: somebody has"):
        await call

    assert ask(url, select(schema.units)) == []
    run.expect_nothing_left()


async def interrupt(run: NotedRun, url: str) -> None:
    """Leave the run as if its coordinator had died in the second task, on another host."""
    held = run.hold("second", 3)
    call = asyncio.ensure_future(run.go(history=url))
    await until(lambda: run.started()["second", 3] > 0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    held.unlink()
    ask(url, "UPDATE fractal_runner_runs SET state = 'running', ended = NULL")
    ask(url, "UPDATE fractal_runner_owners SET host = 'far-away', pid = 4711")


async def test_an_owner_on_another_host_that_shows_signs_of_life_keeps_the_run(
    tmp_path: Path, url: str
) -> None:
    run = NotedRun(tmp_path / "run", units=6)
    await interrupt(run, url)
    ask(url, "UPDATE fractal_runner_owners SET heartbeat = :now", now=time.time() - 20)
    before, started = everything(url), run.started()

    with pytest.raises(
        RunBusyError, match=r"belongs to process 4711 on far-away, which was heard of 2\d s ago"
    ) as busy:
        await run.go(resume=True, history=url)

    assert (busy.value.host, busy.value.pid) == ("far-away", 4711)
    assert "cancel it there, or come back once it has been silent for 60 s" in str(busy.value)
    assert everything(url) == before
    assert run.started() == started
    run.expect_nothing_left()


async def test_an_owner_on_another_host_that_has_long_been_silent_is_replaced(
    tmp_path: Path, url: str
) -> None:
    run = NotedRun(tmp_path / "run", units=6)
    await interrupt(run, url)
    ask(url, "UPDATE fractal_runner_owners SET heartbeat = :then", then=time.time() - 61)

    await run.finish(run.recorded(url) | run.evidenced(), url)

    owner = ask(url, select(schema.owners))[0]
    assert (owner.epoch, owner.host, owner.pid) == (2, host_name(), os.getpid())
    assert ask(url, "SELECT resumed FROM fractal_runner_runs") == [(1,)]


async def test_an_owner_on_another_host_that_has_ended_the_run_is_no_hindrance(
    tmp_path: Path, url: str
) -> None:
    run = NotedRun(tmp_path / "run", units=6)
    await interrupt(run, url)
    ask(url, "UPDATE fractal_runner_runs SET state = 'failed'")

    await run.finish(run.recorded(url) | run.evidenced(), url)


async def test_of_two_owners_only_the_latest_can_write(tmp_path: Path, url: str) -> None:
    run = NotedRun(tmp_path / "run", units=2)
    await run.go(history=url)
    with History(url) as one, History(url) as other:
        first, second = one.writer(run.run_id), other.writer(run.run_id)
        first.take_over()
        first.change_run(executor="first")
        second.take_over()
        assert (first.epoch, second.epoch) == (2, 3)

        with pytest.raises(OwnershipLostError, match="has taken over the run"):
            first.change_run(executor="late")
        second.change_run(executor="second")
        with pytest.raises(OwnershipLostError, match="has taken over the run"):
            first.end_run(schema.State.FAILED, "late")
        close(first, second)

    assert ask(url, "SELECT executor, state FROM fractal_runner_runs") == [("second", "running")]


def close(*writers: RunWriter) -> None:
    for writer in writers:
        writer.close()
