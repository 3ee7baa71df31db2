"""A history's tables: made once, brought up to date in one step, and left alone where they are newer."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect, text

from fractal_runner import History, HistoryError
from fractal_runner.history import schema
from tests.history.noted import NotedRun, sql, until
from tests.history.older import as_version_1

TABLES = {f"fractal_runner_{name}" for name in ("history", "runs", "owners", "tasks", "units")} | {
    "fractal_runner_image_statuses"
}
_OPEN_AT_ONCE = """
import sys
from fractal_runner import History
print("ready", flush=True)
sys.stdin.readline()
with History(sys.argv[1]) as history:
    assert history.read.runs() == []
"""


def tables_of(path: Path) -> set[str]:
    return {row[0] for row in sql(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}


def version_of(path: Path) -> int:
    return sql(path, "SELECT version FROM fractal_runner_history")[0][0]


def set_version(path: Path, version: int) -> None:
    sql(path, "UPDATE fractal_runner_history SET version = ?", version)


@pytest.fixture
def migrated(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Connection], None]], None]:
    """Makes this program one of the next version, which comes to be by this migration."""

    def register(migration: Callable[[Connection], None]) -> None:
        monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
        monkeypatch.setitem(schema.MIGRATIONS, schema.VERSION - 1, migration)

    return register


def test_tables_are_made_once_and_then_found(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    History(path).close()
    assert tables_of(path) == TABLES
    assert version_of(path) == schema.VERSION

    before = sql(path, "SELECT * FROM sqlite_master")
    with History(f"sqlite:///{path}") as history:
        assert history.read.runs() == []

    assert sql(path, "SELECT * FROM sqlite_master") == before


def test_they_lie_beside_the_tables_of_a_server(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    sql(path, "CREATE TABLE jobs (id INTEGER)")
    sql(path, "INSERT INTO jobs VALUES (7)")

    History(path).close()

    assert tables_of(path) == TABLES | {"jobs"}
    assert sql(path, "SELECT id FROM jobs") == [(7,)]


def test_processes_that_make_the_tables_at_once_all_succeed(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _OPEN_AT_ONCE, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    answers = [process.communicate(timeout=60) for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0, 0], answers
    assert version_of(path) == schema.VERSION


async def test_an_older_history_is_brought_up_to_date_and_keeps_what_it_holds(
    tmp_path: Path, migrated: Any
) -> None:
    run = NotedRun(tmp_path, units=3)
    dataset = await run.go()

    def add_column(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE fractal_runner_units ADD COLUMN colour TEXT DEFAULT 'red'"))

    migrated(add_column)
    path = run.directory / "history.sqlite"
    with History(path) as history:
        assert history.read.run(run.run_id).state == "done"

    assert version_of(path) == schema.VERSION
    assert sql(path, "SELECT count(*), min(colour) FROM fractal_runner_units") == [(6, "red")]
    run.check(dataset)
    History(path).close()  # and it is not done again


async def test_a_migration_that_fails_leaves_the_older_history_as_it_was(
    tmp_path: Path, migrated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = NotedRun(tmp_path, units=3)
    dataset = await run.go()
    path = run.directory / "history.sqlite"

    def fail_half_way(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE fractal_runner_more (a INTEGER)"))
        connection.execute(text("DELETE FROM fractal_runner_units"))
        assert "fractal_runner_more" in inspect(connection).get_table_names()
        raise RuntimeError("the migration is wrong")

    with monkeypatch.context() as patched:
        patched.setattr(schema, "VERSION", schema.VERSION + 1)
        patched.setitem(schema.MIGRATIONS, schema.VERSION - 1, fail_half_way)
        with pytest.raises(RuntimeError, match="the migration is wrong"):
            History(path)

    assert tables_of(path) == TABLES
    assert version_of(path) == schema.VERSION
    run.check(dataset)


async def test_a_reader_reads_an_older_history_as_it_is_and_leaves_it_so(
    tmp_path: Path, migrated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = NotedRun(tmp_path, units=2)
    await run.go()
    path = run.directory / "history.sqlite"
    sql(path, "ALTER TABLE fractal_runner_tasks DROP COLUMN error")  # as if it were to come tomorrow
    before = schema.VERSION
    migrated(lambda connection: None)
    monkeypatch.setitem(schema.BROUGHT, schema.VERSION, (schema.tasks.c.error,))

    with History(path, read_only=True) as history:
        rows = history.read.tasks(run.run_id)

    assert [(row.name, row.state, row.error) for row in rows] == [
        ("first", "done", None),
        ("second", "done", None),
    ]
    assert version_of(path) == before


def test_a_reader_of_one_that_is_older_than_it_can_read_says_what_brings_it_up_to_date(
    tmp_path: Path, migrated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "h.sqlite"
    History(path).close()
    before = schema.VERSION
    migrated(lambda connection: None)
    monkeypatch.setattr(schema, "READABLE_SINCE", schema.VERSION)

    with pytest.raises(HistoryError) as caught:
        History(path, read_only=True)

    assert str(caught.value) == (
        f"{path} is a history of version {before}; it becomes one of version {before + 1} when a run in it "
        "is resumed, or begun."
    )
    assert version_of(path) == before


def test_one_of_version_1_that_was_brought_up_to_date_has_the_columns_of_a_new_one(tmp_path: Path) -> None:
    older, new = tmp_path / "older.sqlite", tmp_path / "new.sqlite"
    History(older).close()
    History(new).close()
    expected = columns_of(new)
    as_version_1(lambda statement: sql(older, statement))
    assert columns_of(older) < expected

    History(older).close()

    assert columns_of(older) == expected
    assert version_of(older) == schema.VERSION


def columns_of(path: Path) -> set[tuple[Any, ...]]:
    """The columns of all tables: table, name, type, whether it may be NULL, default, place in the key."""
    return {
        (table, *column[1:])
        for table in tables_of(path)
        for column in sql(path, f"PRAGMA table_info({table})")
    }


def test_columns_that_a_version_has_brought_may_be_null() -> None:
    for version, columns in schema.BROUGHT.items():
        assert schema.READABLE_SINCE < version <= schema.VERSION
        assert all(column.nullable and not column.primary_key for column in columns)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_history_is_refused_with_both_versions_and_what_to_do(
    tmp_path: Path, read_only: bool
) -> None:
    path = tmp_path / "h.sqlite"
    History(path).close()
    set_version(path, 99)

    with pytest.raises(HistoryError) as caught:
        History(path, read_only=read_only)

    assert str(caught.value) == (
        f"{path} is a history of version 99, and this fractal_runner knows versions up to {schema.VERSION}: "
        "use the newer fractal_runner that wrote it."
    )
    assert version_of(path) == 99


async def test_a_run_in_a_newer_history_does_not_begin(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    History(path).close()
    set_version(path, 99)
    run = NotedRun(tmp_path / "place")

    with pytest.raises(
        HistoryError, match=f"{path} is a history of version 99, and .* up to {schema.VERSION}: use the newer"
    ):
        await run.go(history=path)

    assert not run.started()
    assert not run.events
    assert {item.name for item in run.directory.iterdir()} == {"run.lock", "evidence"}
    run.expect_nothing_left()
    run.check(await run.go())  # it can still be used with another one


async def test_a_run_whose_history_is_newer_by_now_is_not_resumed_and_left_as_it_is(tmp_path: Path) -> None:
    run = NotedRun(tmp_path, units=4)
    held = run.hold("second", 1)
    call = asyncio.ensure_future(run.go())
    await until(lambda: run.started()["second", 1] > 0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    held.unlink()
    path = run.directory / "history.sqlite"
    set_version(path, 99)
    before = contents(run.directory)
    started = run.started()

    with pytest.raises(
        HistoryError, match=f"{path} is a history of version 99, and .* up to {schema.VERSION}: use the newer"
    ):
        await run.go(resume=True)

    assert contents(run.directory) == before
    assert run.started() == started
    set_version(path, schema.VERSION)
    await run.finish(run.recorded() | run.evidenced())


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the one that says who has looked last."""
    return {
        str(path): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "run.lock"
    }


@pytest.mark.parametrize("url", ["{path}", "sqlite:///{path}"])
def test_a_reader_of_a_missing_file_says_so_and_makes_none(tmp_path: Path, url: str) -> None:
    path = tmp_path / "missing.sqlite"

    with pytest.raises(HistoryError, match=f"There is no history {path}"):
        History(url.format(path=path), read_only=True)

    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_an_empty_file_says_that_it_holds_no_history(tmp_path: Path) -> None:
    path = tmp_path / "empty.sqlite"
    path.touch()

    with pytest.raises(HistoryError, match=f"{path} holds no history: it has no table 'fractal_runner_his"):
        History(path, read_only=True)

    assert path.stat().st_size == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_somebody_elses_database_says_that_it_holds_no_history(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    sql(path, "CREATE TABLE jobs (id INTEGER)")

    with pytest.raises(HistoryError, match=f"{path} holds no history: it has no table 'fractal_runner_his"):
        History(path, read_only=True)

    assert tables_of(path) == {"jobs"}


def test_a_history_whose_version_is_missing_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    History(path).close()
    sql(path, "DELETE FROM fractal_runner_history")

    for read_only in (True, False):
        with pytest.raises(
            HistoryError, match=f"{path} is damaged: its table 'fractal_runner_history' is em"
        ):
            History(path, read_only=read_only)


@pytest.mark.parametrize("place", ["nowhere/h.sqlite", "file/h.sqlite"])
def test_a_history_in_a_place_that_is_no_directory_is_refused_by_its_path(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(HistoryError, match=f"{tmp_path}/{place} cannot be written: it cannot be opened"):
        History(tmp_path / place)


def test_a_url_that_is_none_is_refused_without_its_password() -> None:
    for url in ("postgrs://me:geheim@host/name", "postgrs://host/name?user=me&password=geheim&port=1"):
        with pytest.raises(ValueError, match="is not the URL of a database, such as postgresql") as caught:
            History(url)
        assert "geheim" not in str(caught.value)
    with pytest.raises(ValueError, match="would be lost with the process"):
        History("sqlite://")


def test_a_driver_that_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)

    with pytest.raises(ValueError, match=r"needs a driver .*install fractal-runner\[postgresql\]") as caught:
        History("postgresql+psycopg2://me:geheim@host/name")

    assert "geheim" not in str(caught.value)


def test_what_a_run_file_says_is_checked(tmp_path: Path) -> None:
    for content in ("", "{", "[]", "{}", json.dumps({"run_id": 7, "history": None}), "\x00" * 40):
        (tmp_path / "run.json").write_text(content)
        run = NotedRun(tmp_path / "place", directory=tmp_path)

        with pytest.raises(HistoryError, match=f"{tmp_path}/run.json is damaged: it does not say which run"):
            asyncio.run(run.go(resume=True))

        assert not run.started()
