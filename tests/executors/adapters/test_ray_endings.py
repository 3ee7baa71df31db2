"""How a program that uses Ray ends: by itself, by Ctrl-C once and twice, by kill -9. Nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fractal_runner.executors.adapters.ray import RayExecutor
from fractal_runner.executors.adapters.rayengine.instance import PREFIX, short_folder, sweep
from fractal_runner.testing import PATIENCE_S, Gate, wait_until

PREAMBLE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from fractal_runner.executors.adapters.ray import RayExecutor

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
folder = {folder!r}

def make(workers):
    executor = RayExecutor(workers, object_store_memory="100MB")
    Path(folder, "instance").write_text(str(executor._instance.folder))
    return executor

def hold(number):
    started = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(folder, f"here-{{os.getpid()}}-{{number}}").touch()
    while not Path(folder, "open").exists():
        time.sleep(0.005)
    started.kill()
    started.wait()
    return done(number)

def done(number):
    Path(folder, f"done-{{number}}").touch()
    return number
"""

INTERRUPTED = """
with make(2) as executor:
    futures = [executor.submit(hold, number) for number in range(4)]
    while not all(future.running() for future in futures[:2]):
        time.sleep(0.005)
    Path(folder, "known").touch()
    {then}
"""

# Ray's own: it waits for its daemons by their pids, and leaves files and processes to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture(scope="session", autouse=True)
def settled(first_ray: list[RayExecutor]) -> None:
    """Before what looks for things that a module of tests leaves behind."""


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Where the script's calls wait."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def start(tmp_path: Path, gate: Gate) -> Iterator[Start]:
    """Starts a script in a session of its own; whatever is left of it is killed after the test."""
    started: list[subprocess.Popen[str]] = []
    script = tmp_path / "script.py"

    def start(body: str) -> subprocess.Popen[str]:
        script.write_text(PREAMBLE.format(folder=str(tmp_path / "gate")) + body)
        started.append(
            subprocess.Popen(
                [sys.executable, str(script)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "HOME": str(tmp_path)},
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        for child in family_of(process):
            child.kill()
        process.kill()
        process.communicate()


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def instance_of(folder: Path) -> Path:
    return Path((folder / "gate" / "instance").read_text())


def done(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "gate").glob("done-*"))


def assert_gone(family: list[psutil.Process]) -> None:
    wait_until(
        lambda: not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE],
        "no child process has survived",
    )


def test_what_was_submitted_finishes_before_the_interpreter_ends_by_an_exception(
    start: Start, tmp_path: Path, gate: Gate
) -> None:
    script = start(
        "executor = make(2)\nfor number in range(4): executor.submit(hold, number)\nraise SystemExit(5)\n"
    )
    gate.await_arrivals(2)
    family = family_of(script)
    gate.open()

    out, err = script.communicate(timeout=PATIENCE_S)

    assert (script.returncode, out, err) == (5, "", "")
    assert done(tmp_path) == [0, 1, 2, 3]
    assert not (tmp_path / ".ray").exists()  # where Ray would put a password
    assert_gone(family)
    assert not instance_of(tmp_path).exists()


def test_ctrl_c_cancels_what_has_not_started_and_lets_the_rest_finish(
    start: Start, tmp_path: Path, gate: Gate
) -> None:
    script = start(INTERRUPTED.format(then="time.sleep(1000)"))
    wait_until((tmp_path / "gate" / "known").exists, "two calls are known to run")
    family = family_of(script)

    os.killpg(script.pid, signal.SIGINT)
    assert script.stderr is not None
    line = script.stderr.readline()
    gate.open()
    _, err = script.communicate(timeout=PATIENCE_S)

    assert "RayExecutor: interrupted: 2 call(s) that had not started are cancelled, 2 may finish." in line
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert script.returncode == -signal.SIGINT
    assert done(tmp_path) == [0, 1]
    assert_gone(family)
    assert not instance_of(tmp_path).exists()


def test_a_second_ctrl_c_ends_what_runs(start: Start, tmp_path: Path, gate: Gate) -> None:
    script = start(INTERRUPTED.format(then="pass"))
    wait_until((tmp_path / "gate" / "known").exists, "two calls are known to run")
    family = family_of(script)

    os.killpg(script.pid, signal.SIGINT)
    assert script.stderr is not None
    assert "Interrupt again to end them." in script.stderr.readline()
    os.killpg(script.pid, signal.SIGINT)
    _, err = script.communicate(timeout=PATIENCE_S)

    assert "RayExecutor: interrupted again: ending what runs." in err
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert script.returncode == -signal.SIGINT
    assert done(tmp_path) == []
    assert_gone(family)
    assert not instance_of(tmp_path).exists()


def test_all_ends_with_a_program_that_is_killed(start: Start, tmp_path: Path, gate: Gate) -> None:
    script = start("executor = make(2)\nfor n in range(2): executor.submit(hold, n)\ntime.sleep(1000)")
    gate.await_arrivals(2)
    family = family_of(script)
    assert [one for one in family if one.name() == "sleep"]

    script.kill()
    script.wait()

    assert_gone(family)
    wait_until(lambda: not instance_of(tmp_path).exists(), "its directory is gone")


def test_what_a_killed_guardian_leaves_goes_with_the_next_start_and_nothing_else(
    start: Start, tmp_path: Path, gate: Gate, ray_instance: RayExecutor
) -> None:
    script = start("executor = make(1)\nexecutor.submit(hold, 1)\ntime.sleep(1000)")
    gate.await_arrivals(1)
    family = family_of(script)
    left = instance_of(tmp_path)
    assert left.parent == short_folder()
    assert left.name.startswith(PREFIX)
    assert left.stat().st_mode & 0o777 == 0o700
    [guardian] = [one for one in family if "rayengine.guardian" in " ".join(one.cmdline())]

    guardian.kill()
    script.kill()
    script.wait()
    wait_until(lambda: not guardian.is_running(), "its guardian is gone")
    assert left.exists()
    sweep(left.parent)

    assert not left.exists()
    assert_gone(family)
    assert ray_instance.submit(pow, 2, 3).result(PATIENCE_S) == 8
