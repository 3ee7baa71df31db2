"""A history in PostgreSQL: shared by runs, away for a while, away for good, and closed to strangers."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fractal_runner import History, HistoryError, JobExecutionError, UnitFinished
from fractal_runner.history import schema
from tests.history.noted import TASKS, NotedRun, until
from tests.history.postgres import PASSWORD, Database, Server

OUTAGE_S = 10.0


async def interrupt(run: NotedRun, **more: Any) -> None:
    """Cancel it in its second task."""
    held = run.hold("second", 3)
    call = asyncio.ensure_future(run.go(**more))
    await until(lambda: run.started()["second", 3] > 0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    held.unlink()


def rows_of(database: Database, table: str, what: str = "*") -> list[Any]:
    return database.ask(f"SELECT {what} FROM fractal_runner_{table}")  # type: ignore[no-any-return]


async def test_a_run_is_recorded_and_resumed_there(tmp_path: Path, database: Database) -> None:
    run = NotedRun(tmp_path, units=8)
    await interrupt(run, history=database.url, job_id=17)
    known = run.recorded(database.url) | run.evidenced()
    assert {task for task, _ in known} == set(TASKS)

    await run.finish(known, database.url)

    assert rows_of(database, "runs", "state, resumed, job_id, directory") == [
        ("done", 1, "17", str(run.directory))
    ]
    assert {path.name for path in run.directory.glob("history*")} == set()


async def test_a_run_that_is_killed_is_resumed_there(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = NotedRun(tmp_path, units=6)
    await interrupt(run, history=database.url)  # from here on run.json says where it is
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    held = run.hold("second", 3)
    program = Path(__file__).with_name("noted.py")
    process = await asyncio.create_subprocess_exec(sys.executable, str(program), str(tmp_path))
    await until(lambda: run.started()["second", 3] > 1)
    process.kill()
    await asyncio.wait_for(process.wait(), 60)
    held.unlink()

    known, before = run.recorded(database.url) | run.evidenced(), run.started()
    run.check(await run.go(resume=True), database.url)

    assert {unit for unit in known if run.started()[unit] != before[unit]} == set()
    assert rows_of(database, "runs", "state, resumed") == [("done", 2)]


async def test_processes_that_make_the_tables_at_once_all_succeed(server: Server) -> None:
    for _ in range(3):
        url = server.database().url
        opened = await asyncio.gather(*(asyncio.to_thread(History, url) for _ in range(8)))
        for history in opened:
            assert history.read.runs() == []
            history.close()


@pytest.mark.parametrize("shared", [True, False], ids=["one History", "URLs"])
async def test_several_runs_at_once_share_a_database(
    tmp_path: Path, database: Database, shared: bool
) -> None:
    runs = [NotedRun(tmp_path / str(n), units=10) for n in range(4)]
    with History(database.url) as history:
        datasets = await asyncio.gather(
            *(run.go(history=history if shared else database.url) for run in runs)
        )

        assert len({row.id for row in history.read.runs()}) == 4
    for run, dataset in zip(runs, datasets, strict=True):
        run.check(dataset, database.url)
    assert rows_of(database, "units", "count(*), min(attempt), max(attempt)") == [(80, 1, 1)]


async def test_a_run_waits_for_a_database_that_has_gone_away_while_its_units_go_on(
    tmp_path: Path, own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    database = own_server.database()
    run = NotedRun(tmp_path, units=40)
    held = run.hold("first", 5)
    call = asyncio.ensure_future(run.go(history=database.url))
    await until(
        lambda: len(run.recorded(database.url) if run.directory.joinpath("run.json").exists() else ()) > 1
    )

    await asyncio.to_thread(own_server.stop)
    back_at = time.monotonic() + OUTAGE_S
    held.unlink()
    await until(lambda: sum(run.ended().values()) == run.units)
    assert not any(isinstance(event, UnitFinished) and event.order == 1 for event in run.events)
    await asyncio.sleep(back_at - time.monotonic())
    assert not call.done()
    await asyncio.to_thread(own_server.start)

    run.check(await call, database.url)
    assert set(run.started().values()) == {1}
    assert rows_of(database, "units", "count(*), min(attempt), max(attempt)") == [(80, 1, 1)]
    said = caplog.text
    assert f"the history {database.shown} cannot be reached: " in said
    assert f"the history {database.shown} is back" in said


async def test_a_run_whose_database_comes_and_goes_ends_as_an_undisturbed_one(
    tmp_path: Path, database: Database
) -> None:
    run = NotedRun(tmp_path, units=20)
    ends = itertools.count()

    def cut_all_connections(event: Any) -> None:
        if isinstance(event, UnitFinished) and next(ends) % 4 == 0:
            database.ask(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> "
                "pg_backend_pid()",
                [database.name],
            )

    run.check(await run.go(history=database.url, on_event=cut_all_connections), database.url)

    assert set(run.started().values()) == {1}


async def test_a_transaction_whose_answer_was_lost_is_not_done_twice(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = NotedRun(tmp_path, units=6)
    with History(database.url) as history:
        database.ask("CREATE TABLE done (what TEXT)")
        database.ask(
            "CREATE FUNCTION note() RETURNS trigger SECURITY DEFINER AS $$ BEGIN "
            "INSERT INTO public.done VALUES (TG_OP || ' ' || TG_TABLE_NAME); RETURN NEW; END $$ "
            "LANGUAGE plpgsql"
        )
        for table in ("runs", "tasks"):
            database.ask(
                f"CREATE TRIGGER note_{table} AFTER INSERT OR UPDATE ON fractal_runner_{table} "
                "FOR EACH ROW EXECUTE FUNCTION note()"
            )
        lost = lose_every_answer_once(monkeypatch)

        await interrupt(run, history=history)

        database.ask("DELETE FROM done WHERE what = 'UPDATE fractal_runner_tasks'")
        assert sorted(row[0] for row in database.ask("SELECT what FROM done")) == [
            "INSERT fractal_runner_runs",
            *["INSERT fractal_runner_tasks"] * 2,
            "UPDATE fractal_runner_runs",
        ]
        database.ask("DELETE FROM done")
        run.check(await run.go(resume=True, history=history), database.url)

    done = [row[0] for row in database.ask("SELECT what FROM done")]
    # It is taken over, changed, and ended; the second task begins anew, and ends.
    assert done.count("UPDATE fractal_runner_runs") == 3
    assert done.count("INSERT fractal_runner_tasks") == 1
    assert done.count("UPDATE fractal_runner_tasks") == 1
    assert lost() > 10
    assert rows_of(database, "runs", "resumed") == [(1,)]
    assert rows_of(database, "owners", "epoch") == [(2,)]


def lose_every_answer_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Have every second commit work and yet raise, with a broken connection; how many did is returned."""
    commit = psycopg.Connection.commit
    losses = 0
    answered = True

    def commit_and_lose(self: psycopg.Connection[Any]) -> None:
        nonlocal losses, answered
        commit(self)
        if self.info.user == "admin":
            return
        answered = not answered
        if not answered:
            losses += 1
            self.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(psycopg.Connection, "commit", commit_and_lose)
    return lambda: losses


async def test_a_database_that_stays_away_ends_the_run_which_goes_on_later(
    tmp_path: Path, own_server: Server
) -> None:
    database = own_server.database()
    run = NotedRun(tmp_path, units=12)
    held = run.hold("second", 4)
    with History(database.url, patience_s=2) as history:
        call = asyncio.ensure_future(run.go(history=history))
        await until(lambda: run.started()["second", 4] > 0)
        known = run.recorded(database.url)
        await asyncio.to_thread(own_server.stop)
        held.unlink()
        began = time.monotonic()

        with pytest.raises(JobExecutionError) as caught:
            await call

    assert time.monotonic() - began < 5, "it waits once, not for each thing that it has to say"
    said = str(caught.value)
    assert f"The run cannot go on: The history {database.shown} cannot be written: " in said
    assert "Connection refused" in said
    assert "(it was tried for 2 s)" in said
    assert caught.value.task_name == "second"
    run.expect_nothing_left()
    with pytest.raises(HistoryError, match="Connection refused"):  # at the beginning it is not waited for
        await run.go(resume=True, history=database.url)
    await asyncio.to_thread(own_server.start)
    await run.finish(known | run.recorded(database.url) | run.evidenced(), database.url)


async def test_a_run_that_waits_for_its_database_can_be_cancelled(tmp_path: Path, own_server: Server) -> None:
    database = own_server.database()
    run = NotedRun(tmp_path, units=6)
    held = run.hold("first", 4)
    call = asyncio.ensure_future(run.go(history=database.url))
    await until(lambda: run.started()["first", 4] > 0)
    await asyncio.to_thread(own_server.stop)
    held.unlink()
    await until(lambda: sum(run.ended().values()) == run.units)
    began = time.monotonic()

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert time.monotonic() - began < 10
    run.expect_nothing_left()
    await asyncio.to_thread(own_server.start)
    await run.finish(run.recorded(database.url) | run.evidenced(), database.url)


async def test_the_password_is_nowhere_to_be_read(
    tmp_path: Path, own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    database = own_server.database()
    in_query = f"{database.shown}?password={PASSWORD}"
    problems: list[BaseException] = []
    run = NotedRun(tmp_path, units=6)
    await interrupt(run, history=database.url)
    for url in (
        database.url.replace("127.0.0.1", "127.0.0.1:x"),
        database.url.replace("+psycopg", "+nothing"),
    ):
        with pytest.raises(ValueError, match="is not the URL of a database") as refused:
            await run.go(resume=True, history=url)
        problems.append(refused.value)
    with History(in_query, patience_s=0.1) as history:
        assert history.name == history.url == database.shown
        held = run.hold("second", 3)
        call = asyncio.ensure_future(run.go(resume=True, history=history))
        await until(lambda: run.started()["second", 3] > 1)
        await asyncio.to_thread(own_server.stop)
        held.unlink()
        with pytest.raises(JobExecutionError) as failed:
            await call
        problems.append(failed.value)
    for url in (database.url, in_query):
        with pytest.raises(HistoryError) as away:
            History(url)
        problems.append(away.value)

    told = [caplog.text, repr(run.events), *map(str, problems), *map(repr, problems)]
    told += ["".join(traceback.format_exception(problem)) for problem in problems]
    told += [path.read_text(errors="replace") for path in run.directory.rglob("*") if path.is_file()]

    for secret in (PASSWORD, "s3cret", "passw:rd", "passw%3Ard"):
        assert not any(secret in text for text in told)
    assert json.loads((run.directory / "run.json").read_text())["history"] == database.shown


async def test_a_password_that_is_wrong_or_missing_is_asked_for(tmp_path: Path, database: Database) -> None:
    run = NotedRun(tmp_path, units=4)
    await interrupt(run, history=database.url)

    with pytest.raises(HistoryError, match=r"it wants a password: give its whole URL, or set PGPASSWORD or"):
        await run.go(resume=True)
    with pytest.raises(HistoryError, match="it does not take this password"):
        await run.go(resume=True, history=database.url.replace("s3cret", "guess"))

    run.expect_nothing_left()


async def test_a_role_without_rights_is_refused_before_anything_runs(
    tmp_path: Path, database: Database
) -> None:
    stranger = f"{database.name}_s"
    database.add_role(stranger)
    url = database.url_of(stranger)
    run = NotedRun(tmp_path, units=2)
    shown = database.shown.replace(f"//{database.name}@", f"//{stranger}@")

    with pytest.raises(
        HistoryError, match="cannot be written: permission denied for schema public"
    ) as caught:
        await run.go(history=url)
    assert shown in str(caught.value)
    with pytest.raises(HistoryError, match="holds no history: it has no table 'fractal_runner_history'"):
        History(url, read_only=True)

    History(database.url).close()
    with pytest.raises(HistoryError, match="permission denied for table fractal_runner_history"):
        History(url, read_only=True)
    for table in schema.metadata.sorted_tables:
        database.ask(f'GRANT SELECT ON {table.name} TO "{stranger}"')
    with History(url, read_only=True) as history:
        assert history.read.runs() == []
    with pytest.raises(
        HistoryError, match="cannot be written: permission denied for table fractal_runner_ru"
    ):
        await run.go(history=url)

    assert not run.started()
    assert not (run.directory / "run.json").exists()
    run.expect_nothing_left()


async def test_an_older_and_a_newer_history_are_met_as_in_a_file(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, newer = schema.VERSION, schema.VERSION + 1
    History(database.url).close()
    with monkeypatch.context() as patched:
        patched.setattr(schema, "VERSION", newer)
        patched.setitem(schema.MIGRATIONS, known, lambda connection: connection.exec_driver_sql("nonsense"))
        with pytest.raises(HistoryError, match=f"{database.name} cannot be written: syntax error at or near"):
            History(database.url)
        assert rows_of(database, "history") == [(known,)]
        migration = "ALTER TABLE fractal_runner_units ADD colour TEXT"
        patched.setitem(schema.MIGRATIONS, known, lambda connection: connection.exec_driver_sql(migration))
        History(database.url).close()
        assert rows_of(database, "history") == [(newer,)]
        assert rows_of(database, "units", "colour") == []

    with pytest.raises(
        HistoryError, match=f"{database.name} is a history of version {newer}, and this .* up to {known}"
    ):
        History(database.url)
