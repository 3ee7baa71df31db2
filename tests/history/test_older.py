"""Histories of version 1: all commands read them as they are, and a resume brings them up to date."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import History, HistoryError
from fractal_runner.history import schema
from tests.history.noted import sql
from tests.history.older import as_version_1
from tests.history.postgres import PASSWORD, Database

PROGRAM = str(Path(sys.executable).parent / "fractal-runner")
# Prints that it runs, and notes it; fails for the second image while there is no file "mended".
COMMAND = shlex.join(
    ["sh", "-c", "echo working; echo ran >> notes; test -e mended || ! grep -q /d/2 $2", "unit"]
)


@dataclass
class Older:
    """A run, one of whose units failed, in a history of version 1.

    Attributes:
        place: where the program is run.
        directory: the run's.
        url: of its history.
        ask: executes a statement in the history; the rows.
        env: of the program.
    """

    place: Path
    directory: Path
    url: str
    ask: Callable[[str], list[Any]]
    env: dict[str, str]

    def __call__(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the program with these words."""
        return subprocess.run(
            [PROGRAM, *map(str, words)],
            cwd=self.place,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=self.env,
        )

    @property
    def version(self) -> int:
        return self.ask("SELECT version FROM fractal_runner_history")[0][0]  # type: ignore[no-any-return]

    @property
    def notes(self) -> int:
        """How many times units were executed."""
        return len((self.place / "notes").read_text().splitlines())


@pytest.fixture(params=["sqlite", "postgresql"])
def older(request: pytest.FixtureRequest, tmp_path: Path) -> Older:
    """The run, begun by the program, and its history made an older one."""
    directory, env, words = tmp_path / "r", dict(os.environ), ()
    if request.param == "sqlite":
        url = str(directory / "history.sqlite")
        found = Older(tmp_path, directory, url, lambda text: sql(url, text), env)
    else:
        database: Database = request.getfixturevalue("database")
        words = ("--db", database.shown)
        env["PGPASSWORD"] = PASSWORD
        found = Older(tmp_path, directory, database.url, database.ask, env)
    tasks = [{"task": {"name": name, "command_parallel": COMMAND}} for name in ("Look", "Again")]
    (tmp_path / "workflow.json").write_text(json.dumps({"name": "looking", "task_list": tasks}))
    images = [{"zarr_url": f"/d/{n}", "attributes": {}, "types": {}} for n in (1, 2, 3)]
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))
    begun = found("run", "workflow.json", "--dataset", "dataset.json", "--workflow-dir", "r", *words)
    assert begun.returncode == 1, begun.stderr
    as_version_1(found.ask)
    return found


def test_the_commands_show_it_and_leave_it_as_it_is(older: Older) -> None:
    status = older("status", "r")
    assert status.returncode == 0, status.stderr
    assert "looking over d: failed" in status.stdout
    in_json = older("status", "r", "--json")
    assert in_json.returncode == 0, in_json.stderr
    [failure], [task, _] = (json.loads(in_json.stdout)[key] for key in ("failures", "tasks"))
    assert (failure["unit"], failure["start"]) == (1, None)
    assert (task["done"], task["failed"], task["starts"]) == (2, 1, {"warm": 0, "cold": 0})

    logs = older("logs", "r")
    assert logs.returncode == 0, logs.stderr
    assert logs.stdout.count("working\n") == 3
    assert "==> 0 Look, unit 1 (/d/2), failed, attempt 1: " in logs.stdout
    listed = older("list", "r")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "unreadable" not in listed.stdout
    assert older("clean", "r", "--dry-run").returncode == 0
    assert "is at work" in older("cancel", "r").stderr

    assert older.version == 1


def test_all_that_a_reader_is_asked_is_answered_with_null_for_what_came_later(older: Older) -> None:
    with History(older.url, read_only=True) as history:
        [run] = history.read.runs()
        assert run.settings is None
        assert history.read.run(run.id).settings is None
        assert history.read.outline(run.id).settings is None
        assert [found.id for found in history.read.runs_in(older.directory)] == [run.id]
        assert [unit.start for unit in history.read.units(run.id)] == [None] * 3
        assert [unit.start for unit in history.read.unit_logs(run.id)] == [None] * 3
        assert history.read.starts(run.id) == {0: {}}
        assert history.read.counts(run.id) == {(0, "par"): {"done": 2, "failed": 1}}

    assert older.version == 1


def test_a_reader_goes_on_while_somebody_else_brings_it_up_to_date(older: Older) -> None:
    with History(older.url, read_only=True) as history:
        [run] = history.read.runs()
        History(older.url).close()

        assert older.version == schema.VERSION
        assert [unit.start for unit in history.read.units(run.id)] == [None] * 3


def test_a_resume_brings_it_up_to_date_and_does_only_what_is_not_done(older: Older) -> None:
    (older.place / "mended").touch()
    before = older.notes

    resumed = older("resume", "r")

    assert resumed.returncode == 0, resumed.stderr
    assert older.version == schema.VERSION
    assert older.notes == before + 1 + 3
    [(settings,)] = older.ask("SELECT settings FROM fractal_runner_runs")
    assert json.loads(settings)["warm_start"] == "auto"
    tasks = json.loads(older("status", "r", "--json").stdout)["tasks"]
    assert [task["state"] for task in tasks] == ["done", "done"]
    assert [task["starts"] for task in tasks] == [{"warm": 0, "cold": 1}, {"warm": 0, "cold": 3}]


def test_one_that_is_too_old_to_be_read_as_it_is_is_refused_until_a_run_in_it_goes_on(
    older: Older, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "READABLE_SINCE", 2)
    becomes = f"it becomes one of version {schema.VERSION} when a run in it is resumed, or begun"

    with pytest.raises(HistoryError, match=f"is a history of version 1; {becomes}"):
        History(older.url, read_only=True)

    assert older.version == 1
    with History(older.url) as history:
        assert [run.state for run in history.read.runs()] == ["failed"]
    assert older.version == schema.VERSION
