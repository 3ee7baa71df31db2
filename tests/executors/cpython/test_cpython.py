"""CPython's own tests of executors pass over each of our asynchronous classes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
LIMIT_S = 240
GRACE_S = 10.0  # for processes that end by themselves once their parent has, as loky's tracker does


@pytest.fixture(scope="session")
def cpython(top: Path) -> Path:
    """A Python that ships these tests, with fractal_runner installed, as `make test` sets it up."""
    venv = top / ".venv-cpython"
    if not (venv / ".ready").exists():
        note = venv / "not-found"
        why = note.read_text().strip() if note.exists() else "`make .venv-cpython/.ready` sets it up"
        pytest.skip(f"no Python that ships CPython's tests of executors: {why}")
    return venv / "bin" / "python"


@pytest.mark.parametrize("executor", ["ThreadExecutor", "ProcessExecutor", "ForkExecutor", "SpawnExecutor"])
def test_cpythons_own_tests_pass_over(executor: str, cpython: Path, tmp_path: Path) -> None:
    output, errors = tmp_path / "stdout", tmp_path / "stderr"
    with output.open("w") as stdout, errors.open("w") as stderr:
        run = subprocess.Popen(
            [cpython, HERE, "--show", executor],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # by which what it leaves is found
        )
    try:
        run.wait(LIMIT_S)
    finally:
        run.kill()
        run.wait()
        left = end_session(run.pid)
    if not output.stat().st_size:  # it has died, or one test took so long that it was ended
        pytest.fail(f"exit code {run.returncode}:\n{errors.read_text()[-10_000:]}", pytrace=False)
    report = json.loads(output.read_text())

    assert len(report["passed"]) + len(report["failed"]) > 25
    assert not report["skipped"], "each test that does not run stands in exclusions.py"
    assert not left, "processes that were still there after the last test"
    assert not report["excluded_but_unknown"], "there are no such tests (any more)"
    if report["failed"]:
        texts = [f"--- {name}\n{text.strip()}" for name, text in report["failed"].items()]
        again = f"{cpython} {HERE} --show {executor} {' '.join(report['failed'])}"
        pytest.fail("\n\n".join([*texts, f"These alone: {again}"]), pytrace=False)


def end_session(leader: int) -> list[str]:
    """Kill what is left of the session of a process that has ended; what that was."""
    deadline = time.monotonic() + GRACE_S
    while (left := _session(leader)) and time.monotonic() < deadline:
        time.sleep(0.05)
    told = []
    for process in left:
        told.append(str(process))
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return told


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
