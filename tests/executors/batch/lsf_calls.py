"""What tests of calls on an LSF cluster share: executors on it, calls that tell of themselves.

Patience is short here, for what is waited for in vain: see `_IMPATIENT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

from fractal_runner import LsfExecutor
from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.batch import following, submitting
from fractal_runner.executors.calls import TaskInfo
from fractal_runner.testing import Gate, wait_until
from tests.clusters.lsf import LsfCluster
from tests.clusters.lsf.seen import JobSeen

PATIENCE_S = 60.0  # nothing takes that long; what does, hangs
NAMES = ("first", "second", "third")
LOST_S = 1.0
_IMPATIENT = ((following, "_LOST_S", LOST_S), (submitting, "_FIND_S", 0.2))
_PROGRAM = "fractal_runner.executors.batch"

in_both_dialects = pytest.mark.parametrize("site", ["openlava", "ibm"], indirect=True)
in_ibms = pytest.mark.parametrize("site", ["ibm"], indirect=True)


class Site:
    """A cluster, and what is done there.

    Attributes:
        cluster: whose commands are found by what runs here.
        folder: where all is written.
        gate: holds calls up until it is opened, which it is at the end at the latest.
    """

    def __init__(self, cluster: LsfCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.gate = Gate(folder / "gate")
        self._runs = folder / "runs"
        self._made: list[LsfExecutor] = []

    @property
    def is_ibms(self) -> bool:
        return self.cluster.dialect == "ibm"

    def executor(self, folder: Path | None = None, **options: Any) -> LsfExecutor:
        """One with a folder of its own, whose jobs do three calls, one after the other."""
        given = {"calls_per_job": 3, "parallel_calls_per_job": 1, "poll_interval": 0.5, "grace": 0.2}
        executor = LsfExecutor(folder or self.folder / f"jobs{len(self._made)}", **given | options)
        self._made.append(executor)
        return executor

    def three(
        self, executor: LsfExecutor, second: Callable[[Any], Any] | None = None, **options: Any
    ) -> list[Future[Any]]:
        """Three calls for one job: one that ends, one that does `second`, one that comes after it."""
        run = noting(self._runs)
        return [
            executor.options(name=name, **options).submit(run, name, second if name == "second" else None)
            for name in NAMES
        ]

    def held(self, executor: LsfExecutor) -> TaskInfo:
        """The second of three calls, once it is held up at the gate."""
        self.gate.await_arrivals(1)
        return task(executor)

    def many(self, executor: LsfExecutor, count: int) -> list[Future[Any]]:
        """Calls that end."""
        run = noting(self._runs)
        return [executor.submit(run, number) for number in range(count)]

    def ran(self) -> list[str]:
        """What has run, in order, as often as it did."""
        return self._runs.read_text().split() if self._runs.exists() else []

    def asked(self, program: str) -> int:
        """How often a command was called."""
        return len(self.cluster.calls(program))

    def await_jobs(self, count: int = 1) -> list[JobSeen]:
        """The jobs, once there are so many."""
        wait_until(lambda: len(self.cluster.jobs()) >= count, f"there are {count} job(s)", seconds=PATIENCE_S)
        return self.cluster.jobs()

    def await_ended(self) -> list[JobSeen]:
        """The jobs, once all of them have ended."""

        def have_ended() -> bool:
            return all(job.state in ("DONE", "EXIT") for job in self.cluster.jobs())

        wait_until(have_ended, "all jobs have ended", seconds=PATIENCE_S)
        return self.cluster.jobs()

    def await_more(self, program: str, count: int) -> None:
        """Until a command was called so many times more, and has answered."""

        def answered() -> int:
            return sum(call.ended is not None for call in self.cluster.calls(program))

        before = answered()
        wait_until(
            lambda: answered() >= before + count, f"{program} is called {count} times", seconds=PATIENCE_S
        )

    def end(self) -> None:
        self.gate.open()
        for executor in self._made:
            executor.stop()
        for executor in self._made:
            executor.shutdown()


@pytest.fixture(name="clusters", scope="session", autouse=True)
def both_clusters(openlava_cluster: LsfCluster, ibm_cluster: LsfCluster) -> Mapping[str, LsfCluster]:
    """Both, from before what looks for things that a module of tests leaves behind: they stay."""
    return {"openlava": openlava_cluster, "ibm": ibm_cluster}


@pytest.fixture(name="site", params=["openlava"])
def site_of_tests(
    request: pytest.FixtureRequest,
    clusters: Mapping[str, LsfCluster],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Site]:
    """A site with no jobs and nothing wrong: of openlava's family, unless the test says otherwise."""
    cluster = clusters[request.param]
    cluster.reset()
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    for module, name, seconds in _IMPATIENT:
        monkeypatch.setattr(module, name, seconds)
    site = Site(cluster, tmp_path)
    yield site
    cluster.resume()
    cluster.clear_faults()
    site.end()
    cluster.reset()


def noting(path: Path) -> Callable[..., Any]:
    """A function for calls that says in a file that it runs, and returns what it was given."""
    noted = str(path)

    def run(value: Any, then: Callable[[Any], Any] | None = None) -> Any:
        with Path(noted).open("a") as file:
            file.write(f"{value}\n")
        return value if then is None else then(value)

    return run


def task(executor: LsfExecutor, name: str = "second") -> TaskInfo:
    """A call that is known to run."""
    found: list[TaskInfo] = []

    def runs() -> bool:
        found[:] = [task for task in executor.tasks() if (task.name, task.state) == (name, "running")]
        return bool(found)

    wait_until(runs, f"{name} runs", seconds=PATIENCE_S)
    return found[0]


def program_of(pid: int) -> psutil.Process:
    """The program of the job that a call's process belongs to."""
    return next(each for each in psutil.Process(pid).parents() if _PROGRAM in each.cmdline())


def error_of(future: Future[Any]) -> JobExecutionError:
    error = future.exception(PATIENCE_S)
    assert isinstance(error, JobExecutionError), f"{error!r}"
    return error


def results(*submitted: Future[Any]) -> list[Any]:
    return [future.result(PATIENCE_S) for future in submitted]


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return path
