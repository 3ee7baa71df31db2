"""Calls of a process that has died are taken on by the next one, and no job of others is taken for theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import JobExecutionError, LsfExecutor
from fractal_runner.executors.batch import adoption, stopping
from fractal_runner.testing import wait_until
from tests.executors.batch import submitter
from tests.executors.batch.lsf_calls import (
    PATIENCE_S,
    Site,
    both_clusters,  # noqa: F401  a fixture, by another name
    error_of,
    in_both_dialects,
    results,
    script,
    site_of_tests,  # noqa: F401  likewise
)
from tests.executors.batch.submitter import HASTY, key_of, ran

FEW = HASTY + 2  # the last two of them wait
PROGRAM = """
from fractal_runner import LsfExecutor
from tests.executors.batch import submitter

def executor_over(folder, **options):
    return LsfExecutor(folder, **{"poll_interval": 1, **options})

submitter.executor_over = executor_over
submitter.main()
"""
# In the place of bsub, for a process that dies around it. They find bsub behind themselves on the PATH.
ELSEWHERE = 'PATH="${PATH#*:}"; input=$0.$$; cat >$input'
DIES_BEFORE = ("kill -9 $PPID",)
DIES_AFTER = (ELSEWHERE, 'bsub "$@" <$input', "kill -9 $PPID")
DIES_AFTER_TWO = (ELSEWHERE, 'bsub "$@" <$input', 'bsub "$@" <$input', "kill -9 $PPID")


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "notes"
    place.mkdir()
    yield place
    (place / "may").touch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


@pytest.fixture
def start(
    site: Site, folder: Path, notes: Path, top: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that submits calls, or attaches to them; kills what is left of it."""
    started: list[subprocess.Popen[bytes]] = []

    def start(what: str, *more: object, bsub: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        path = os.environ["PATH"]
        if bsub:
            path = f"{script(site.folder / 'bin' / 'bsub', *bsub).parent}:{path}"
        words = [sys.executable, "-c", PROGRAM, what, str(folder), str(notes), *map(str, more)]
        started.append(
            subprocess.Popen(
                words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(top), "PATH": path}
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def submitted(start: Any, notes: Path) -> Callable[[], None]:
    """A process that has submitted calls is killed, when all have ended that do not wait."""

    def submit() -> None:
        process = start("submit", FEW)
        wait_until(lambda: len(ran(notes)) == FEW, "calls run", seconds=PATIENCE_S)
        process.kill()
        process.wait()

    return submit


def attached(executor: LsfExecutor, *numbers: int) -> list[Future[int]]:
    futures = [executor.attach(key_of(number)) for number in numbers]
    assert None not in futures
    return futures  # type: ignore[return-value]


@in_both_dialects
def test_of_calls_in_flight_none_is_lost_and_none_runs_twice(
    submitted: Any, start: Any, site: Site, folder: Path, notes: Path
) -> None:
    submitted()
    first = start("attach", FEW)  # is killed as well
    wait_until((notes / "attached").exists, "it has attached", seconds=PATIENCE_S)
    first.kill()

    futures = attached(site.executor(folder), *range(FEW))
    wait_until(lambda: all(future.done() for future in futures[:HASTY]), "what has ended has its result")
    assert not any(future.done() for future in futures[HASTY:])
    (notes / "may").touch()

    assert results(*futures) == [number * 2 for number in range(FEW)]
    assert ran(notes) == list(range(FEW))
    assert site.asked("bsub") == 1


@in_both_dialects
def test_a_job_that_has_ended_meanwhile_and_is_forgotten_has_left_its_results(
    submitted: Any, site: Site, folder: Path, notes: Path
) -> None:
    submitted()
    (notes / "may").touch()
    site.await_ended()
    site.cluster.switch("forget", history=True)

    futures = attached(site.executor(folder), *range(FEW))

    assert results(*futures) == [number * 2 for number in range(FEW)]
    assert ran(notes) == list(range(FEW))


def test_a_call_whose_process_died_before_it_had_submitted_it_is_nowhere_and_runs_once(
    start: Any, site: Site, folder: Path, notes: Path
) -> None:
    start("submit", 1, bsub=DIES_BEFORE).wait(PATIENCE_S)
    executor = site.executor(folder)

    assert executor.attach(key_of(0)) is None
    again = executor.options(key=key_of(0)).submit(submitter.noting(notes), 0)

    assert results(again) == [0]
    assert ran(notes) == [0]


@pytest.mark.parametrize("bsub", [DIES_AFTER, DIES_AFTER_TWO], ids=["once", "twice"])
def test_a_call_whose_process_died_before_it_knew_the_jobs_id_is_found_by_name(
    bsub: tuple[str, ...], start: Any, site: Site, folder: Path, notes: Path
) -> None:
    count = sum(line.startswith("bsub") for line in bsub)
    site.cluster.switch("no_dispatch")
    start("submit", 1, bsub=bsub).wait(PATIENCE_S)
    site.await_jobs(count)

    futures = attached(site.executor(folder), 0)
    wait_until(lambda: [job.state for job in site.cluster.jobs()].count("PEND") == 1, "one of them is left")
    site.cluster.clear_faults()

    assert results(*futures) == [0]
    assert ran(notes) == [0]
    assert [job.starts for job in site.await_ended()] == [1, 0][:count]


def test_whether_a_call_was_submitted_cannot_be_known_without_an_answer(
    start: Any, site: Site, folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(adoption, "_AGAIN_S", 0.2)
    start("submit", 1, bsub=DIES_AFTER).wait(PATIENCE_S)
    site.cluster.crash()
    executor = site.executor(folder)

    with pytest.raises(JobExecutionError, match=r"cannot be known: .*refused by server") as caught:
        executor.attach(key_of(0))
    site.cluster.resume()

    assert caught.value.reason == "UNKNOWN_OUTCOME"
    assert results(*attached(executor, 0)) == [0]
    assert ran(notes) == [0]


# Ids that others have by now


def give_the_id_to_others(site: Site) -> None:
    """The job has ended, LSF has forgotten it, and its ids begin anew."""
    site.cluster.run("bkill", "1[1]")
    site.await_ended()
    site.cluster.configure(clean_period_s=0.0)
    wait_until(lambda: all(job.is_forgotten for job in site.cluster.jobs()), "it is forgotten")
    site.cluster.configure(clean_period_s=3600.0)
    site.cluster.set_next_id(1)
    assert site.cluster.submit("sleep 1000", "-J", "theirs[1-3]") == 1
    site.cluster.wait_for(1, "RUN")


@in_both_dialects
def test_what_becomes_of_others_jobs_with_the_same_id_is_not_believed(
    submitted: Any, site: Site, folder: Path, notes: Path
) -> None:
    submitted()
    give_the_id_to_others(site)

    *ended, second, third = attached(site.executor(folder), *range(FEW))

    assert results(*ended) == [number * 2 for number in range(HASTY)]
    errors = [error_of(each) for each in (second, third)]
    assert {(error.reason, error.job_id) for error in errors} == {("LOST", "1[1]")}
    assert all("LSF has given its id to 'theirs'" in str(error) for error in errors)
    assert {job.state for job in site.cluster.jobs(1)} == {"RUN"}
    assert ran(notes) == list(range(FEW))


@in_both_dialects
def test_others_jobs_with_the_same_id_are_not_killed(
    submitted: Any, site: Site, folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_STOP_S", 0.0)  # the scheduler is told before the job is given up
    submitted()
    give_the_id_to_others(site)
    before = site.asked("bkill")
    executor = site.executor(folder)
    futures = attached(executor, *range(FEW))

    executor.stop()
    executor.shutdown()

    assert all(future.done() for future in futures)
    assert {job.state for job in site.cluster.jobs(1)} == {"RUN"}
    assert site.asked("bkill") == before
    assert ran(notes) == list(range(FEW))
