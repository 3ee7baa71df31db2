"""How a program that uses an executor ends: by itself, by Ctrl-C once and twice, by kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fractal_runner.testing import PATIENCE_S, Gate, wait_until

KINDS = ["ThreadExecutor", "ProcessExecutor", "ForkExecutor", "SpawnExecutor"]
PROCESSES = KINDS[1:]

of_every_kind = pytest.mark.parametrize("kind", KINDS)

PREAMBLE = """
import os, signal, sys, time, uuid
from pathlib import Path
from fractal_runner.executors.local.executors import *
from fractal_runner.executors.local.executors import {kind} as Kind

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
folder = {folder!r}

def hold(number):
    Path(folder, f"here-{{os.getpid()}}-{{number}}").touch()
    while not Path(folder, "open").exists():
        time.sleep(0.005)
    return done(number)

def done(number):
    Path(folder, f"done-{{number}}").touch()
    return number
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script in a session of its own; whatever is left of it is killed after the test."""
    started: list[subprocess.Popen[str]] = []
    folder = tmp_path / "gate"
    folder.mkdir()

    def start(kind: str, body: str) -> subprocess.Popen[str]:
        script = tmp_path / "script.py"
        script.write_text(PREAMBLE.format(kind=kind, folder=str(folder)) + body)
        started.append(
            subprocess.Popen(
                [sys.executable, str(script)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        for child in _family(process):
            child.kill()
        process.kill()
        process.communicate()


@pytest.fixture
def gate(tmp_path: Path, start: Any) -> Iterator[Gate]:
    """Where the script's calls wait."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def done(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "gate").glob("done-*"))


def assert_gone(family: list[psutil.Process]) -> None:
    wait_until(
        lambda: not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE],
        "no child process has survived",
    )


INTERRUPTED = """
with Kind(2) as executor:
    for number in range(4):
        executor.submit(hold, number)
    {then}
"""


@of_every_kind
def test_what_was_submitted_finishes_before_the_interpreter_ends(
    start: Any, tmp_path: Path, gate: Gate, kind: str
) -> None:
    script = start(kind, "executor = Kind(2)\nfor number in range(5): executor.submit(hold, number)\n")
    gate.await_arrivals(2)
    gate.open()

    out, err = script.communicate(timeout=PATIENCE_S)

    assert (script.returncode, out, err) == (0, "", "")
    assert done(tmp_path) == [0, 1, 2, 3, 4]


@of_every_kind
def test_what_waits_for_another_executors_result_finishes_as_well(
    start: Any, tmp_path: Path, gate: Gate, kind: str
) -> None:
    script = start(
        kind,
        "first, second = ThreadExecutor(1), Kind(1)\n"
        "second.submit(done, first.submit(done, second.submit(done, first.submit(hold, 7))))\n",
    )
    gate.await_arrivals(1)
    gate.open()

    out, err = script.communicate(timeout=PATIENCE_S)

    assert (script.returncode, out, err) == (0, "", "")
    assert done(tmp_path) == [7]


@of_every_kind
def test_an_exception_that_ends_the_program_does_not_hang_it(start: Any, tmp_path: Path, kind: str) -> None:
    script = start(kind, "executor = Kind(2)\nexecutor.submit(done, 1)\nraise SystemExit(5)\n")

    _, err = script.communicate(timeout=PATIENCE_S)

    assert (script.returncode, err) == (5, "")
    assert done(tmp_path) == [1]


@of_every_kind
@pytest.mark.parametrize("then", ["pass", "time.sleep(1000)"])
def test_ctrl_c_cancels_what_has_not_started_and_lets_the_rest_finish(
    start: Any, tmp_path: Path, gate: Gate, kind: str, then: str
) -> None:
    script = start(kind, INTERRUPTED.format(then=then))
    gate.await_arrivals(2)
    family = _family(script)

    os.killpg(script.pid, signal.SIGINT)
    line = script.stderr.readline()
    gate.open()
    _, err = script.communicate(timeout=PATIENCE_S)

    assert f"{kind}: interrupted: 2 call(s) that had not started are cancelled, 2 may finish." in line
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert script.returncode == -signal.SIGINT
    assert done(tmp_path) == [0, 1]
    assert_gone(family)


@of_every_kind
def test_a_second_ctrl_c_ends_what_runs(start: Any, tmp_path: Path, gate: Gate, kind: str) -> None:
    script = start(kind, INTERRUPTED.format(then="pass"))
    gate.await_arrivals(2)
    family = _family(script)
    assert bool(family) == (kind in PROCESSES)

    os.killpg(script.pid, signal.SIGINT)
    assert "Interrupt again to end them." in script.stderr.readline()
    os.killpg(script.pid, signal.SIGINT)
    _, err = script.communicate(timeout=PATIENCE_S)

    assert f"{kind}: interrupted again: ending what runs." in err
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert script.returncode == -signal.SIGINT
    assert done(tmp_path) == []
    assert_gone(family)


def test_ctrl_c_in_a_serial_executor_is_the_callers(start: Any, tmp_path: Path, gate: Gate) -> None:
    script = start("SerialExecutor", INTERRUPTED.format(then="pass"))
    gate.await_arrivals(1)

    os.killpg(script.pid, signal.SIGINT)
    _, err = script.communicate(timeout=PATIENCE_S)

    assert err.rstrip().endswith("KeyboardInterrupt")
    assert script.returncode == -signal.SIGINT
    assert done(tmp_path) == []


def test_workers_end_with_a_program_that_is_killed(start: Any, tmp_path: Path, gate: Gate) -> None:
    script = start(
        "ProcessExecutor",
        "executor = Kind(2)\nexecutor.submit(done, 1).result()\nprint('ready', flush=True)\ntime.sleep(1000)",
    )
    assert script.stdout.readline() == "ready\n"
    family = _family(script)
    assert family

    script.kill()
    script.wait()

    assert_gone(family)


def test_a_fork_that_does_not_start_is_killed_and_forked_once_more(
    start: Any, tmp_path: Path, gate: Gate
) -> None:
    script = start(
        "ForkExecutor",
        "from fractal_runner.executors.local import workers\n"
        "workers._FORK_START_S = 0.3\n"
        "first = Path(folder, 'first')\n"
        "def hang():\n"
        "    try: first.touch(exist_ok=False)\n"
        "    except FileExistsError: return\n"
        "    time.sleep(1000)\n"
        "os.register_at_fork(after_in_child=hang)\n"
        "with Kind(1) as executor:\n"
        "    print(executor.submit(done, 3).result())\n",
    )

    out, err = script.communicate(timeout=PATIENCE_S)

    assert (script.returncode, out) == (0, "3\n")
    assert "has not started in 0.3 s" in err


def test_a_fork_that_never_starts_is_an_error_in_its_future(start: Any, tmp_path: Path, gate: Gate) -> None:
    script = start(
        "ForkExecutor",
        "from fractal_runner.executors.local import workers\n"
        "workers._FORK_START_S = 0.2\n"
        "os.register_at_fork(after_in_child=lambda: time.sleep(1000))\n"
        "with Kind(1) as executor:\n"
        "    print(executor.submit(done, 3).exception())\n",
    )

    out, _ = script.communicate(timeout=PATIENCE_S)

    assert script.returncode == 0
    assert "has not started in 0.2 s, and neither had the one before it." in out
