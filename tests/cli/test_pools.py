"""`fractal-runner pool`: pools of Dask's workers that are kept between runs, by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fractal_runner.cli import pools
from fractal_runner.cli.app import app
from fractal_runner.executors.adapters.daskpool.terms import MARK
from fractal_runner.testing import is_alive, wait_until
from fractal_runner.worker import processes

pytest.importorskip("distributed")
pytestmark = pytest.mark.timeout(300)

Pool = Callable[..., Result]
NAME = "kept"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def pool(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Runs the program in this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    return lambda *words: CliRunner().invoke(app, ["pool", *words])


@pytest.fixture(scope="module")
def kept(state: Path) -> Iterator[dict[str, Any]]:
    """The record of one that is there for all tests; in the end it is stopped, and gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        words = ["workers=local", "pool.min_workers=1", "dask.pool.idle_timeout=10m", "max_workers=2"]
        options = [part for word in words for part in ("--executor-opt", word)]
        started = CliRunner().invoke(app, ["pool", "start", NAME, *options])
        assert started.exit_code == 0, started.output
        assert f"The pool '{NAME}' is there: up to 2 worker(s) (local)" in said(started)
        assert f"--executor dask --executor-opt join={NAME}" in said(started)
        record = record_of(state, NAME)
        yield record
        stopped = CliRunner().invoke(app, ["pool", "stop", NAME])
        assert stopped.exit_code == 0, stopped.output
        assert "has ended, with its workers" in said(stopped)
    assert not is_alive(record["keeper"]["pid"])
    assert workers_of(record) == []
    assert not folder_of(state).joinpath(f"{NAME}.json").exists()


def said(answer: Result) -> str:
    return " ".join(answer.output.split())


def folder_of(state: Path) -> Path:
    return state / "fractal-runner" / "pools"


def record_of(state: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder_of(state) / f"{name}.json").read_text())
    return found


def workers_of(record: dict[str, Any]) -> list[int]:
    """The processes of a pool's workers."""
    mark = f"{MARK}={Path(record['tls']['cert']).parent.name}-".encode()
    return [pid for pid in processes.table() if processes.entry_of(pid, mark)]


def test_one_that_is_there_is_listed_and_shown(pool: Pool, kept: dict[str, Any]) -> None:
    wait_until(lambda: "1 present" in said(pool("status", NAME)), "its worker has come")
    shown, listed = pool("status", NAME), pool("list")

    assert shown.exit_code == listed.exit_code == 0
    assert "workers 1 present (1 idle), 0 on their way" in said(shown)
    assert "bounds 1 to 2 (local)" in said(shown)
    assert "in use by 0 executor(s)" in said(shown)
    keeper = f"process {kept['keeper']['pid']} on {kept['keeper']['host']}"
    [row] = [line for line in listed.output.splitlines() if line.startswith(f"{NAME} ")]
    assert row.split()[:5] == [NAME, "running", "1", "of", "2"]
    assert row.strip().endswith(keeper)


def test_a_run_s_executor_joins_it(kept: dict[str, Any], pool: Pool) -> None:
    answer = CliRunner().invoke(app, ["doctor", "--executor", "dask", "--executor-opt", f"join={NAME}"])

    assert answer.exit_code == 0, answer.output
    assert "ok the probe ran on this machine, in process" in said(answer)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("start", NAME), f"there is a pool '{NAME}' already: stop it (fractal-runner pool stop {NAME})"),
        (("start", "a/b"), "'a/b' is not a name for a pool"),
        (
            ("start", "new", "--executor-opt", "pool.wokers=local"),
            "dask.pool.wokers: unknown key: did you mean 'workers'?",
        ),
        (("start", "new", "--executor-opt", "idle_timeout=soon"), "'soon' is not a time"),
        (("start", "new", "--executor-opt", "workers=slurm"), "the workers of slurm have to reach this host"),
        (("start", "new", "--executor-opt", "join=kept"), "dask.join is said ('kept')"),
        (("status", "kepd"), "There is no pool 'kepd': did you mean 'kept'?"),
        (("stop", "kepd"), "There is no pool 'kepd': did you mean 'kept'?"),
    ],
)
def test_mistakes_are_told(pool: Pool, kept: dict[str, Any], words: tuple[str, ...], expected: str) -> None:
    answer = pool(*words)

    assert answer.exit_code == 2
    assert expected in said(answer)


def test_a_dead_one_is_recognised_and_cleared_up(pool: Pool, state: Path) -> None:
    assert pool("start", "dead", "--executor-opt", "min_workers=1").exit_code == 0
    record = record_of(state, "dead")
    wait_until(lambda: workers_of(record), "its worker has started")
    os.kill(record["keeper"]["pid"], signal.SIGKILL)
    wait_until(lambda: not is_alive(record["keeper"]["pid"]), "its keeper has gone")

    listed, shown = pool("list"), pool("status", "dead")
    stopped = pool("stop", "dead")

    [row] = [line for line in listed.output.splitlines() if line.startswith("dead ")]
    assert row.split()[1] == "dead"
    assert shown.exit_code == 3
    assert "is dead: its process has ended without removing its record" in said(shown)
    assert stopped.exit_code == 0, stopped.output
    assert "was dead already: its record is removed, and its workers here ended" in said(stopped)
    assert workers_of(record) == []
    assert {path.name for path in folder_of(state).glob("dead.*")} == {"dead.lock", "dead.log"}


def test_of_one_on_another_host_is_said_that_nobody_knows(
    pool: Pool, kept: dict[str, Any], state: Path
) -> None:
    far = {**kept, "name": "far", "keeper": {**kept["keeper"], "host": "elsewhere"}}
    file = folder_of(state) / "far.json"
    file.write_text(json.dumps(far))
    try:
        assert "far on another host: unknown - of 2 (local)" in said(pool("list"))
    finally:
        file.unlink()


def test_a_start_that_is_broken_off_leaves_nothing(state: Path, tmp_path: Path) -> None:
    folder = folder_of(state)
    starting = subprocess.Popen(
        [sys.executable, "-m", "fractal_runner", "pool", "start", "never"],
        env={**os.environ, "XDG_STATE_HOME": str(state)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((folder / "never.log").exists, "the process that is to have it is started")
    starting.send_signal(signal.SIGINT)
    _, told = starting.communicate(timeout=100)

    assert starting.returncode == 130
    assert "Stopped: the pool 'never' is being ended" in told
    wait_until(lambda: not any(map(is_alive, keepers_of("never"))), "nobody is to have it any more")
    assert not (folder / "never.json").exists()
    assert not (folder / "never.d").exists()


def keepers_of(name: str) -> list[int]:
    """Processes that have the log of a pool's keeper open."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if fd.readlink().name == f"{name}.log":
                found.append(int(fd.parts[2]))
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_without_dask_it_says_what_installs_it(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['distributed'] = None; sys.argv = ['fractal-runner', 'pool', 'list'];"
        "from fractal_runner.cli import main; main()"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )

    assert answer.returncode == 2
    assert "pip install 'fractal-runner[dask]'" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_there_may_be_none(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "empty"))

    answer = pool("list")

    assert answer.exit_code == 0
    assert "There are no pools." in answer.output


def test_what_a_run_s_executor_has_a_pool_s_jobs_have() -> None:
    said = {"pool": {"workers": "lsf", "lsf": {"queue": "long"}}, "path_map": {"/a": "/b"}, "max_workers": 3}

    assert pools._terms_of(said) == {
        "workers": "lsf",
        "max_workers": 3,
        "lsf": {"path_map": {"/a": "/b"}, "queue": "long"},
    }
    assert pools._terms_of({"path_map": {"/a": "/b"}}) == {}
