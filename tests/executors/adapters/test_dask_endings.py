"""How a program ends that has a pool of Dask's workers: by itself, by Ctrl-C once and twice, by kill -9."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil

from fractal_runner.testing import PATIENCE_S, Gate
from tests.executors.test_endings import assert_gone, done, gate, start  # noqa: F401

KIND = "from fractal_runner.executors.adapters.dask import DaskExecutor as Kind\n"
HELD = "\nwith Kind(2) as executor:\n    for number in range(4):\n        executor.submit(hold, number)\n"


def begin(start: Any, body: str) -> Any:  # noqa: F811
    return start("ProcessExecutor", KIND + body)


def family_of(script: Any) -> list[psutil.Process]:
    return psutil.Process(script.pid).children(recursive=True)


def test_what_was_submitted_finishes_before_the_interpreter_ends(
    start: Any,  # noqa: F811
    tmp_path: Path,
    gate: Gate,  # noqa: F811
) -> None:
    script = begin(start, "executor = Kind(2)\nfor number in range(5): executor.submit(hold, number)\n")
    gate.await_arrivals(2)
    family = family_of(script)
    gate.open()

    out, err = script.communicate(timeout=PATIENCE_S)

    assert (script.returncode, out, err) == (0, "", "")
    assert done(tmp_path) == [0, 1, 2, 3, 4]
    assert_gone(family)


def test_ctrl_c_cancels_what_has_not_started_and_lets_the_rest_finish(
    start: Any,  # noqa: F811
    tmp_path: Path,
    gate: Gate,  # noqa: F811
) -> None:
    script = begin(start, HELD)
    gate.await_arrivals(2)
    family = family_of(script)

    os.killpg(script.pid, signal.SIGINT)
    line = script.stderr.readline()
    gate.open()
    _, err = script.communicate(timeout=PATIENCE_S)

    assert "2 call(s) that had not started are cancelled, 2 may finish." in line
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert script.returncode == -signal.SIGINT
    assert done(tmp_path) == [0, 1]
    assert_gone(family)


def test_a_second_ctrl_c_ends_what_runs(
    start: Any,  # noqa: F811
    tmp_path: Path,
    gate: Gate,  # noqa: F811
) -> None:
    script = begin(start, HELD)
    gate.await_arrivals(2)
    family = family_of(script)

    os.killpg(script.pid, signal.SIGINT)
    assert "Interrupt again to end them." in script.stderr.readline()
    os.killpg(script.pid, signal.SIGINT)
    _, err = script.communicate(timeout=PATIENCE_S)

    assert "interrupted again: ending what runs." in err
    assert script.returncode == -signal.SIGINT
    assert done(tmp_path) == []
    assert_gone(family)


def test_workers_and_what_runs_there_end_with_a_program_that_is_killed(
    start: Any,  # noqa: F811
    tmp_path: Path,
    gate: Gate,  # noqa: F811
) -> None:
    # What it has put down it cannot remove: not into the folder for temporary files, which is looked through.
    script = begin(start, HELD.replace("Kind(2)", f"Kind(2, folder={str(tmp_path / 'pool')!r})"))
    gate.await_arrivals(2)
    family = family_of(script)

    script.kill()
    script.wait()

    assert_gone(family)
    assert done(tmp_path) == []
