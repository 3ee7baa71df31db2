"""Calls of a process that has died are taken on by the next one, whatever moment it died at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

from fractal_runner import JobExecutionError, SlurmExecutor
from fractal_runner.testing import wait_until
from tests.clusters.slurm import SlurmCluster
from tests.executors.batch import submitter
from tests.executors.batch.submitter import HASTY, key_of, ran

COUNT = 200
FEW = HASTY + 2  # the last two of them wait
MOST_STEPS = 36  # more than there are
PATIENCE_S = 120

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session", autouse=True)
def clusters(
    slurm_cluster: SlurmCluster, slurm_accounting_cluster: SlurmCluster
) -> Mapping[str, SlurmCluster]:
    """Both, from before what looks for things that a module of tests leaves behind: they stay."""
    return {"no accounting": slurm_cluster, "accounting": slurm_accounting_cluster}


@pytest.fixture(params=["no accounting"])
def cluster(
    request: pytest.FixtureRequest, clusters: Mapping[str, SlurmCluster], monkeypatch: pytest.MonkeyPatch
) -> Iterator[SlurmCluster]:
    cluster = clusters[request.param]
    cluster.reset()
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.reset()


with_accounting_and_without = pytest.mark.parametrize(
    "cluster", ["no accounting", "accounting"], indirect=True
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    place = tmp_path / "notes"
    place.mkdir()
    return place


@pytest.fixture
def start(
    cluster: SlurmCluster, folder: Path, notes: Path, top: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process of `submitter`; kills what is left of them."""
    started: list[subprocess.Popen[str]] = []

    def start(what: str, *more: object, **variables: str) -> subprocess.Popen[str]:
        words = [sys.executable, submitter.__file__, what, folder, notes, *more]
        started.append(
            subprocess.Popen(
                [str(word) for word in words],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(top), **variables},
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def make(cluster: SlurmCluster, folder: Path) -> Iterator[Callable[..., SlurmExecutor]]:
    """Makes executors over the folder, as one process after the other would."""
    made: list[SlurmExecutor] = []

    def make(place: Path = folder, **options: Any) -> SlurmExecutor:
        made.append(submitter.executor_over(place, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.stop()
    for executor in made:
        executor.shutdown()


@pytest.fixture
def submitted(start: Any, notes: Path) -> Callable[..., None]:
    """A process that has submitted calls is killed, when all have ended that do not wait."""

    def submit(count: int = FEW, *more: int, until: int = HASTY + 1) -> None:
        process = start("submit", count, *more)
        wait_until(lambda: len(ran(notes)) >= until, "calls run", seconds=PATIENCE_S)
        process.kill()
        process.wait()

    return submit


def array_of(folder: Path) -> Path:
    """The directory of the one array that there is."""
    (found,) = folder.glob("fr-*")
    return found


def doubled(futures: list[Future[int]]) -> list[int]:
    return [future.result(PATIENCE_S) for future in futures]


def attached(executor: SlurmExecutor, count: int) -> list[Future[int]]:
    futures = [executor.attach(key_of(number)) for number in range(count)]
    assert None not in futures
    return futures  # type: ignore[return-value]


def test_of_calls_in_flight_none_is_lost_and_none_runs_twice(
    submitted: Any, start: Any, folder: Path, notes: Path
) -> None:
    submitted(COUNT)
    before = len(ran(notes))
    first = start("attach", COUNT)  # is killed as well
    wait_until((notes / "attached").exists, "it has attached", seconds=PATIENCE_S)
    first.kill()
    (notes / "attached").unlink()

    second = start("attach", COUNT)
    wait_until((notes / "attached").exists, "it has attached", seconds=PATIENCE_S)
    (notes / "may").touch()
    told = json.loads(second.communicate(timeout=PATIENCE_S)[0])

    assert told["results"] == [number * 2 for number in range(COUNT)]
    assert before < COUNT
    assert ran(notes) == list(range(COUNT))
    assert len(list(folder.glob("fr-*"))) == 1  # nothing was submitted again


@with_accounting_and_without
def test_whatever_step_of_a_submission_is_the_last_the_call_runs_once(
    cluster: SlurmCluster, start: Any, make: Any, folder: Path, notes: Path
) -> None:
    steps = start("die-at-each-step").communicate(timeout=300)[0].splitlines()
    (to_submit,) = (number for number, step in enumerate(steps) if "sbatch /" in step)
    count = len(steps) + 1  # the last one did not die of it
    executors = [make(folder / str(number)) for number in range(count)]
    (notes / "may").touch()

    found = [executor.attach(key_of(number)) for number, executor in enumerate(executors)]

    assert [number for number in range(count) if found[number] is None] == list(range(to_submit + 1))
    assert set(ran(notes)).isdisjoint(range(to_submit + 1))
    for number in range(to_submit + 1):
        call = executors[number].options(key=key_of(number))
        found[number] = call.submit(submitter.noting(notes), number)
    assert doubled(found) == [number * 2 for number in range(count)]
    cluster.wait_until_idle()
    assert ran(notes) == list(range(count))
    assert any(step.startswith("os.rename") and step.endswith("/payload") for step in steps)
    assert any(step.startswith("os.rename") and step.endswith("/jobs") for step in steps)


def test_whatever_step_of_submitting_it_again_is_the_last_a_call_is_taken_on_and_runs_once(
    start: Any, make: Any, folder: Path, notes: Path
) -> None:
    """Its first job has ended without starting it."""
    process = start("die-giving-back", MOST_STEPS)
    steps = process.communicate(timeout=300)[0].splitlines()
    (notes / "may").touch()
    executors = [make(folder / str(number)) for number in range(MOST_STEPS)]

    found = [executor.attach(key_of(number)) for number, executor in enumerate(executors)]

    assert None not in found
    assert doubled(found) == [number * 2 for number in range(MOST_STEPS)]
    assert ran(notes) == list(range(MOST_STEPS))
    assert process.returncode == 0
    assert len(steps) < MOST_STEPS  # those after the last step did not die
    assert any("sbatch /" in step for step in steps)


@pytest.fixture
def late_sbatch(start: Any, tmp_path: Path) -> Callable[[], Callable[[], None]]:
    """A process is killed while its sbatch runs; what is returned lets that go on, and waits for its end."""

    def die() -> Callable[[], None]:
        place = tmp_path / "bin"
        place.mkdir()
        began, may, over = (tmp_path / name for name in ("began", "may-go-on", "over"))
        real = shutil.which("sbatch")
        (place / "sbatch").write_text(
            f'#!/bin/sh\ntouch {began}\nwhile [ ! -e {may} ]; do sleep 0.1; done\n{real} "$@"\ntouch {over}\n'
        )
        (place / "sbatch").chmod(0o755)
        process = start("submit", 1, PATH=f"{place}:{os.environ['PATH']}")
        wait_until(began.exists, "sbatch runs", seconds=PATIENCE_S)
        process.kill()
        process.wait()

        def go_on() -> None:
            may.touch()
            wait_until(over.exists, "sbatch has ended", seconds=PATIENCE_S)

        return go_on

    return die


@with_accounting_and_without
@pytest.mark.parametrize("when", ["before it is submitted again", "afterwards"])
def test_a_submission_that_goes_through_when_it_is_given_up_does_nothing(
    cluster: SlurmCluster, late_sbatch: Any, make: Any, notes: Path, when: str
) -> None:
    go_on = late_sbatch()
    executor = make()
    assert executor.attach(key_of(0)) is None
    if when == "afterwards":
        future = executor.options(key=key_of(0)).submit(submitter.noting(notes), 0)
        assert future.result(PATIENCE_S) == 0
    else:
        assert ran(notes) == []

    go_on()
    cluster.wait_until_idle()
    if when != "afterwards":
        assert ran(notes) == []
        (future,) = attached(make(), 1)  # a third process, which finds it among the scheduler's
        assert future.result(PATIENCE_S) == 0

    cluster.wait_until_idle()
    assert ran(notes) == [0]


@pytest.fixture
def full(cluster: SlurmCluster) -> Callable[[], int]:
    """Takes all nodes, so that what is submitted then has to wait: the job that does."""

    def fill() -> int:
        blocker = cluster.submit("sleep 600", f"--nodes={len(cluster.nodes)}", "--exclusive")
        cluster.wait_for(blocker, "RUNNING")
        return blocker

    return fill


@pytest.fixture
def queued(start: Any, folder: Path, notes: Path) -> Callable[[int], None]:
    """A process that has submitted calls, none of which has started, is killed."""

    def submit(count: int) -> None:
        process = start("submit", count)
        wait_until(lambda: list(folder.glob("fr-*/jobs")), "they are submitted", seconds=PATIENCE_S)
        process.kill()
        process.wait()
        assert ran(notes) == []

    return submit


@pytest.mark.parametrize("which", ["first", "second"])
def test_of_an_array_that_was_submitted_twice_one_does_the_work_and_the_other_is_cancelled(
    *, cluster: SlurmCluster, full: Any, queued: Any, make: Any, folder: Path, notes: Path, which: str
) -> None:
    blocker = full()
    queued(FEW)
    directory = array_of(folder)
    (first,) = {id.split("_")[0] for id in json.loads((directory / "jobs").read_text())}
    (directory / "jobs").unlink()
    (script,) = directory.glob("submitit/*_submission.sh")
    second = cluster.run("sbatch", "--parsable", script).stdout.strip()
    cluster.run("scontrol", "hold", second if which == "first" else first)
    cluster.run("scancel", str(blocker))
    wait_until(lambda: len(ran(notes)) == FEW, "all calls have started", seconds=PATIENCE_S)

    futures = attached(make(), FEW)

    wait_until(lambda: arrays_queued(cluster) == 1, "the other one is cancelled", seconds=PATIENCE_S)
    (notes / "may").touch()
    assert doubled(futures) == [number * 2 for number in range(FEW)]
    assert ran(notes) == list(range(FEW))


def arrays_queued(cluster: SlurmCluster) -> int:
    return len(set(cluster.run("squeue", "-h", "-o", "%A").stdout.split()))


def test_what_ended_while_nobody_was_there_is_known(
    cluster: SlurmCluster, submitted: Any, make: Any, notes: Path
) -> None:
    submitted()
    (notes / "may").touch()
    cluster.wait_until_idle()

    assert doubled(attached(make(), FEW)) == [number * 2 for number in range(FEW)]
    assert ran(notes) == list(range(FEW))


def test_a_key_has_one_future(submitted: Any, make: Any, notes: Path) -> None:
    submitted()
    executor = make()
    first = executor.attach(key_of(FEW - 1))

    assert executor.attach(key_of(FEW - 1)) is first
    (notes / "may").touch()
    assert first.result(PATIENCE_S) == 2 * (FEW - 1)
    assert executor.attach(key_of(FEW - 1)) is first
    assert executor.attach("another") is None


@with_accounting_and_without
def test_a_call_whose_job_was_ended_while_nobody_was_there_fails_if_it_had_started(
    cluster: SlurmCluster, submitted: Any, make: Any, folder: Path, notes: Path
) -> None:
    submitted()
    cluster.cancel_all()

    futures = attached(make(), FEW)

    assert doubled(futures[:HASTY]) == [number * 2 for number in range(HASTY)]
    for future in futures[HASTY:]:
        with pytest.raises(JobExecutionError, match="had started and not ended") as caught:
            future.result(PATIENCE_S)
        assert caught.value.reason == "CANCELLED"
        assert caught.value.job_id
    assert ran(notes) == list(range(FEW))


def test_calls_that_a_lost_job_has_not_started_run_in_another_one(
    cluster: SlurmCluster, full: Any, queued: Any, make: Any, notes: Path
) -> None:
    full()
    queued(2)
    forget_jobs(cluster)

    assert doubled(attached(make(), 2)) == [0, 2]

    assert ran(notes) == [0, 1]


@pytest.mark.parametrize(
    ("jobs", "known"),
    [("jobs are gone", "ids are not known"), ("jobs go on for a while", "ids are known")],
)
def test_of_an_array_that_the_scheduler_has_lost_no_call_runs_twice(
    *, cluster: SlurmCluster, submitted: Any, make: Any, folder: Path, notes: Path, known: str, jobs: str
) -> None:
    count = 40
    submitted(count, 5, until=20)  # eight jobs, of which four run
    if known == "ids are not known":
        (array_of(folder) / "jobs").unlink()
    forget_jobs(cluster)
    if jobs == "jobs are gone":
        end_processes(folder)
    before = ran(notes)
    (notes / "may").touch()
    executor = make()

    futures = [executor.attach(key_of(number)) for number in range(count)]
    for number, future in enumerate(futures):
        if future is None:  # of a job that never was
            call = executor.options(key=key_of(number))
            futures[number] = call.submit(submitter.noting(notes), number)
    errors = {number for number, future in enumerate(futures) if future.exception(PATIENCE_S)}

    if jobs == "jobs are gone":
        assert errors == {number for number in before if number >= HASTY}
    assert ran(notes) == list(range(count))


def end_processes(folder: Path) -> None:
    """End the jobs over this folder, as if their nodes had lost their power."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            process.kill()


def forget_jobs(cluster: SlurmCluster) -> None:
    """The controller loses all that it knows of jobs."""
    cluster.stop_controller(crash=True)
    for path in (cluster.directory / "state").glob("job_state*"):
        path.unlink()
    cluster.start_controller()
    cluster.wait_for_nodes()


@pytest.mark.parametrize("known", ["ids are known", "ids are not known"])
def test_results_arrive_when_the_scheduler_has_forgotten_all(
    *, cluster: SlurmCluster, submitted: Any, make: Any, folder: Path, notes: Path, known: str
) -> None:
    submitted()
    (notes / "may").touch()
    cluster.wait_until_idle()
    forget_jobs(cluster)
    if known == "ids are not known":
        (array_of(folder) / "jobs").unlink()

    assert doubled(attached(make(), FEW)) == [number * 2 for number in range(FEW)]
    assert ran(notes) == list(range(FEW))


@pytest.mark.parametrize("how", ["stopped", "paused"])
def test_a_controller_that_is_away_is_waited_for(
    *, cluster: SlurmCluster, submitted: Any, make: Any, folder: Path, notes: Path, how: str
) -> None:
    submitted()
    (array_of(folder) / "jobs").unlink()  # so that it has to be asked
    (cluster.stop_controller if how == "stopped" else cluster.pause_controller)()
    executor, found = make(), []
    thread = threading.Thread(target=lambda: found.append(attached(executor, FEW)))
    thread.start()
    thread.join(8)
    assert thread.is_alive()

    (cluster.start_controller if how == "stopped" else cluster.resume_controller)()
    thread.join(PATIENCE_S)

    (notes / "may").touch()
    assert doubled(found[0]) == [number * 2 for number in range(FEW)]
    assert ran(notes) == list(range(FEW))


def test_results_arrive_without_a_controller(
    cluster: SlurmCluster, submitted: Any, make: Any, notes: Path
) -> None:
    submitted()
    cluster.stop_controller()

    futures = attached(make(), FEW)

    (notes / "may").touch()
    assert doubled(futures) == [number * 2 for number in range(FEW)]
    cluster.start_controller()
