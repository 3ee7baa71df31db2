"""The tests of executors, again and again: what fails only now and then, and what a run leaves behind.

Not a measurement, but like one it takes long and its outcome is a table. Threads and descriptors that a
test leaves are the tests' own affair (`tests/executors/conftest.py`); here it is looked, from outside and
after each run, for processes that it has left and for files in the TMPDIR that it was given. CPython's
own tests are not among them: another interpreter runs those.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import psutil

from benchmarks._report import Report, say, seconds
from benchmarks._scratch import Scratch

COUNT_VARIABLE = "FRACTAL_RUNNER_REPEATS"
COUNT = 20
LIMIT_S = 3600.0  # for one run
GRACE_S = 15.0  # for what ends by itself once its parent has, as loky's resource tracker does
TEXT_LIMIT = 10_000
TESTS, NOT_THESE = "tests/executors", "tests/executors/cpython"

_TOP = Path(__file__).resolve().parent.parent
_MARK = "FRACTAL_RUNNER_REPEAT_MARK"


@dataclass(slots=True)
class Run:
    """One run of the tests.

    Attributes:
        returncode: pytest's; None if the run had to be ended.
        failed: the tests that failed, and why: a line, and what pytest tells of it.
        processes, files: what it has left.
    """

    seconds: float = 0.0
    returncode: int | None = None
    tests: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    processes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def run(report: Report, scratch: Scratch) -> None:
    """Run the tests so many times; $FRACTAL_RUNNER_REPEATS says how many, 20 if it is not set."""
    count = int(os.environ.get(COUNT_VARIABLE, COUNT))
    if count < 1:
        raise ValueError(f"{COUNT_VARIABLE}={count} is not at least 1")
    runs = []
    for number in range(1, count + 1):
        last = run_once(scratch.fast())
        runs.append(last)
        say(
            f"repeat, {number}/{count}: {last.seconds:.0f} s, {last.tests} tests, {len(last.failed)} failed, "
            f"{len(last.processes)} processes and {len(last.files)} files left"
        )
    report.figures["runs"] = [asdict(one) for one in runs]
    _tell(report, runs)


def run_once(directory: Path) -> Run:
    """Run the tests with a TMPDIR of their own below `directory`, and look what is left of it."""
    temporary, results = directory / "tmp", directory / "results.xml"
    temporary.mkdir(parents=True)
    # pytest keeps the directories that it gives to tests: they are not what is looked for.
    words = [
        "--quiet",
        f"--basetemp={directory / 'pytest'}",
        f"--junit-xml={results}",
        "-p",
        "no:cacheprovider",
    ]
    mark = str(directory)
    outcome = Run()
    began = time.monotonic()
    with (directory / "output").open("wb") as output:
        pytest = subprocess.Popen(
            [sys.executable, "-m", "pytest", TESTS, f"--ignore={NOT_THESE}", *words],
            cwd=_TOP,
            env=os.environ | {"TMPDIR": str(temporary), _MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            outcome.returncode = pytest.wait(LIMIT_S)
        outcome.seconds = time.monotonic() - began
    finally:
        if outcome.returncode is None:
            pytest.kill()
            pytest.wait()
        outcome.processes = end_rest(pytest.pid, mark)
    outcome.files = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*"))
    shutil.rmtree(directory / "pytest", ignore_errors=True)
    if results.exists():
        outcome.tests, outcome.failed = _outcomes(results)
    if not outcome.failed and outcome.returncode != 0:
        outcome.failed["(the run itself)"] = _last_line(directory / "output")
    return outcome


def end_rest(session: int, mark: str) -> list[str]:
    """Kill what is left of a run's processes after a moment; what that was."""
    deadline = time.monotonic() + GRACE_S
    while (left := list(_rest(session, mark))) and time.monotonic() < deadline:
        time.sleep(0.1)  # between two looks, until the deadline
    told = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            told.append(f"{process.pid} {' '.join(process.cmdline()) or process.name()}")
            process.kill()
    return told


def _rest(session: int, mark: str) -> Iterator[psutil.Process]:
    """Processes of the run's session, and those that left it but still have the mark."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:  # its new parent has not looked at it yet
                continue
            if os.getsid(process.pid) == session or process.environ().get(_MARK) == mark:
                yield process


def _outcomes(results: Path) -> tuple[int, dict[str, str]]:
    """How many tests ran, and those that failed, by name: of a JUnit file."""
    cases = list(ElementTree.parse(results).iter("testcase"))
    failed = {}
    for case in cases:
        for outcome in (*case.findall("failure"), *case.findall("error")):
            name = f"{case.get('classname', '')}::{case.get('name')}"
            text = f"{outcome.get('message') or outcome.tag}\n\n{outcome.text or ''}"
            failed.setdefault(name, text.strip()[:TEXT_LIMIT])
    return len(cases), failed


def _last_line(output: Path) -> str:
    lines = output.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"


def _tell(report: Report, runs: list[Run]) -> None:
    count = len(runs)
    report.table(
        f"{count} runs of {TESTS}",
        ["run", "time", "exit code", "tests", "failed", "processes left", "files left"],
        [
            [
                str(number),
                seconds(one.seconds),
                "ended" if one.returncode is None else str(one.returncode),
                *map(str, (one.tests, len(one.failed), len(one.processes), len(one.files))),
            ]
            for number, one in enumerate(runs, 1)
        ],
    )
    by_test: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for number, one in enumerate(runs, 1):
        for name, why in one.failed.items():
            by_test[name].append((number, why))
    if by_test:
        report.table(
            "What failed",
            ["test", f"of {count}", "in runs", "the first time"],
            [
                [
                    name,
                    str(len(times)),
                    ", ".join(str(number) for number, _ in times),
                    times[0][1].splitlines()[0][:200],
                ]
                for name, times in sorted(by_test.items(), key=lambda item: -len(item[1]))
            ],
        )
    left = [("process", text, number) for number, one in enumerate(runs, 1) for text in one.processes]
    left += [("file", text, number) for number, one in enumerate(runs, 1) for text in one.files]
    if left:
        report.table(
            "What was left", ["what", "in run", ""], [[a, str(n), text] for a, text, n in left[:100]]
        )
    report.at_most(f"tests that failed at least once in {count} runs", 0, len(by_test))
    report.at_most(f"processes left by {count} runs", 0, sum(len(one.processes) for one in runs))
    report.at_most(f"temporary files left by {count} runs", 0, sum(len(one.files) for one in runs))
