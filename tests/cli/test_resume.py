"""`fractal-runner resume`: everything comes from the history, unless it is said otherwise."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fractal_runner import History
from tests.history.noted import sql

PROGRAM = str(Path(sys.executable).parent / "fractal-runner")
# Fails while there is no file "mended"; notes that it was run.
COMMAND = shlex.join(["sh", "-c", "echo ran >> notes; test -e mended || ! grep -q /d/2 $2", "unit"])
Cli = Callable[..., subprocess.CompletedProcess[str]]


def workflow(*commands: str) -> str:
    tasks = [{"task": {"name": f"T{n}", "command_parallel": command}} for n, command in enumerate(commands)]
    return json.dumps({"name": "w", "task_list": tasks})


@pytest.fixture
def failed(cli: Cli, tmp_path: Path) -> Path:
    """The directory of a run whose first task failed for one of its three images."""
    (tmp_path / "workflow.json").write_text(workflow(COMMAND, "true"))
    images = [{"zarr_url": f"/d/{n}", "attributes": {}, "types": {}} for n in (1, 2, 3)]
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))
    words = ("--workflow-dir", "r", "--executor", "process", "--max-workers", "1")
    ran = cli("run", "workflow.json", "--dataset", "dataset.json", *words)
    assert ran.returncode == 1
    assert f"{PROGRAM} resume r" in ran.stderr
    return tmp_path / "r"


def test_only_what_failed_is_run_again(cli: Cli, failed: Path, tmp_path: Path) -> None:
    (tmp_path / "mended").touch()

    resumed = cli("resume", failed, "--output", "after.json")

    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "notes").read_text() == "ran\n" * 4
    assert (tmp_path / "after.json").read_text() == (failed / "dataset.json").read_text()
    again = cli("resume", failed)
    assert again.returncode == 0
    assert (tmp_path / "notes").read_text() == "ran\n" * 4


def test_tasks_that_are_not_done_may_have_changed(cli: Cli, failed: Path, tmp_path: Path) -> None:
    (tmp_path / "workflow.json").write_text(workflow("true", "true"))

    resumed = cli("resume", failed, "--workflow", "workflow.json", "--executor", "thread")

    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "notes").read_text() == "ran\n" * 3


def settings_of(directory: Path) -> dict[str, object]:
    """What the history says of how a run goes about what it does."""
    with History(directory / "history.sqlite", read_only=True) as history:
        [run] = history.read.runs()
    return json.loads(run.settings)  # type: ignore[no-any-return]


@pytest.fixture
def cold(cli: Cli, tmp_path: Path) -> Path:
    """The directory of a run that failed before a task whose units could start warm, and should not."""
    script = tmp_path / "script.py"
    script.write_text("print('hello')\n")
    (tmp_path / "workflow.json").write_text(workflow(COMMAND, shlex.join([sys.executable, str(script)])))
    images = [{"zarr_url": f"/d/{n}", "attributes": {}, "types": {}} for n in (1, 2, 3)]
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))
    words = ("--workflow-dir", "r", "--max-workers", "1")
    warm = ("--warm-start", "never", "--warm-start-timeout", "2m", "--max-servers", "2")
    assert cli("run", "workflow.json", "--dataset", "dataset.json", *words, *warm).returncode == 1
    (tmp_path / "mended").touch()
    return tmp_path / "r"


def starts_of(cli: Cli, directory: Path) -> dict[str, int]:
    """How the units of the second task were started."""
    tasks = json.loads(cli("status", directory, "--json").stdout)["tasks"]
    return tasks[1]["starts"]  # type: ignore[no-any-return]


def test_what_was_said_of_warm_starts_holds_in_the_resume(cli: Cli, cold: Path) -> None:
    said = {"warm_start": "never", "warm_start_timeout": 120, "max_servers": 2}
    assert settings_of(cold) == said

    resumed = cli("resume", cold)

    assert resumed.returncode == 0, resumed.stderr
    assert starts_of(cli, cold) == {"warm": 0, "cold": 3}
    assert settings_of(cold) == said


def test_options_of_the_resume_take_the_place_of_what_was_said_of_warm_starts(cli: Cli, cold: Path) -> None:
    resumed = cli("resume", cold, "--warm-start", "auto", "--max-servers", "1")

    assert resumed.returncode == 0, resumed.stderr
    assert starts_of(cli, cold) == {"warm": 3, "cold": 0}
    assert settings_of(cold) == {"warm_start": "auto", "warm_start_timeout": 120, "max_servers": 1}


@pytest.mark.parametrize("settings", ["{", "[]", '{"warm_start": "sometimes"}', '{"max_servers": "many"}'])
def test_settings_that_are_damaged_are_refused_and_nothing_is_run(
    cli: Cli, failed: Path, tmp_path: Path, settings: str
) -> None:
    sql(failed / "history.sqlite", "UPDATE fractal_runner_runs SET settings = ?", settings)

    answer = cli("resume", failed)

    assert answer.returncode == 2
    assert f"error: The settings of {failed} cannot be taken from its history: " in answer.stderr
    assert "Traceback" not in answer.stderr
    assert (tmp_path / "notes").read_text() == "ran\n" * 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["resume", "nowhere"], "nowhere does not exist"),
        (["resume", "r", "--executor", "thraed"], "did you mean 'thread'"),
        (["resume", "r", "--executor-opt", "max_worker=2"], "did you mean 'max_workers'"),
        (["resume", "r", "--output", "no/such/place.json"], "its directory does not exist"),
        (["resume", "r", "--db", "other.sqlite"], "There is no history"),
        (["resume", "r", "--last", "7"], "out of range"),
        (["run", "workflow.json", "--dataset", "dataset.json", "--workflow-dir", "r"], "already holds a run"),
    ],
)
def test_mistakes_are_named_and_nothing_is_run(
    cli: Cli, failed: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    answer = cli(*words)

    assert answer.returncode == 2
    assert said in " ".join(answer.stderr.replace("│", " ").split())
    assert "Traceback" not in answer.stderr
    assert (tmp_path / "notes").read_text() == "ran\n" * 3
    assert failed.exists()


def test_a_password_that_was_typed_is_warned_of_and_not_repeated(cli: Cli, failed: Path) -> None:
    answer = cli("status", failed, "--db", "postgresql+psycopg://user:s3cret@localhost:1/name")

    assert answer.returncode == 2
    assert "a password on the command line is seen by everybody" in answer.stderr
    assert "s3cret" not in answer.stderr + answer.stdout
