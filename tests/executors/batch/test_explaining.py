"""How a job has ended is asked at length where somebody needs to know, and only there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.batch import following
from fractal_runner.executors.batch.base import BatchExecutor
from fractal_runner.executors.batch.scheduler import (
    Cause,
    JobState,
    JobStatus,
    PartlyExplainedError,
    SchedulerError,
)
from fractal_runner.testing import Gate, wait_until
from fractal_runner.testing._tools import await_running
from tests.executors.batch.faults import FaultyScheduler, executor_over

pytestmark = pytest.mark.timeout(120)

PATIENCE_S = 40.0
MEMORY = JobStatus(JobState.ENDED, "TERM_MEMLIMIT", -9, "here", "killed: too large", cause=Cause.MEMORY)


class ExplainingScheduler(FaultyScheduler):
    """One that says in passing that a job has ended, and at length why.

    Attributes:
        reasons_by_id: what it says at length.
        asked_why: what it was asked, in order.
        may_explain: is waited for within each of these questions.
        dumb: how many of these questions are not answered.
        silent: whether it says nothing of any job.
        slowness: seconds that each question about jobs takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reasons_by_id: dict[str, JobStatus] = {}
        self.asked_why: list[dict[str, str]] = []
        self.dumb = 0
        self.silent = False
        self.slowness = 0.0
        self.may_explain = threading.Event()
        self.may_explain.set()

    def states(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        time.sleep(self.slowness)  # as a scheduler does
        if self.silent:
            self.asked.append("states")
            return {}
        return super().states(jobs)

    def explain(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        self.asked_why.append(dict(jobs))
        assert self.may_explain.wait(60)
        if self.dumb:
            self.dumb -= 1
            raise SchedulerError("the history is being written")
        return {id: self.reasons_by_id[id] for id in jobs if id in self.reasons_by_id}


@pytest.fixture
def scheduler() -> ExplainingScheduler:
    return ExplainingScheduler()


@pytest.fixture
def executor(tmp_path: Path, scheduler: ExplainingScheduler) -> Iterator[BatchExecutor]:
    executor = executor_over(scheduler, tmp_path / "jobs", calls_per_job=2)
    yield executor
    scheduler.silent = False
    scheduler.may_explain.set()
    scheduler.close()
    executor.stop()
    executor.shutdown()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def error_of(future: Future[Any]) -> JobExecutionError:
    error = future.exception(PATIENCE_S)
    assert isinstance(error, JobExecutionError), error
    return error


def test_what_is_said_at_length_is_the_reason_of_a_call_without_an_end(
    executor: BatchExecutor, scheduler: ExplainingScheduler, gate: Gate
) -> None:
    future = executor.submit(gate.wait)
    await_running(future)
    scheduler.reasons_by_id["1_0"] = MEMORY
    scheduler.kill("1_0", "EXIT")
    error = error_of(future)
    assert (error.reason, error.returncode) == ("TERM_MEMLIMIT", -9)
    assert "Ask for more memory" in str(error)
    assert "killed: too large" in str(error)
    assert scheduler.asked_why == [{"1_0": scheduler.requests[0].name}]


def test_nobody_asks_about_jobs_that_have_said_all_themselves(
    executor: BatchExecutor, scheduler: ExplainingScheduler
) -> None:
    assert executor.submit(abs, -1).result(PATIENCE_S) == 1
    executor.shutdown()
    assert scheduler.asked_why == []


def test_an_answer_that_is_late_is_waited_for(
    executor: BatchExecutor, scheduler: ExplainingScheduler, gate: Gate
) -> None:
    future = executor.submit(gate.wait)
    await_running(future)
    scheduler.reasons_by_id["1_0"] = MEMORY
    scheduler.dumb = 2
    scheduler.kill("1_0", "EXIT")
    assert error_of(future).reason == "TERM_MEMLIMIT"
    assert len(scheduler.asked_why) == 3


def test_an_answer_that_never_comes_is_not_waited_for_for_ever(
    executor: BatchExecutor,
    scheduler: ExplainingScheduler,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(following, "_UNDECIDED_S", 0.5)
    future = executor.submit(gate.wait)
    await_running(future)
    scheduler.dumb = 1000
    scheduler.kill("1_0", "EXIT")
    assert error_of(future).reason == "EXIT"
    assert "the history is being written" in caplog.text


@pytest.mark.parametrize(
    ("cause", "runs"), [(Cause.CANCELLED, False), (Cause.NODE, True), (Cause.MEMORY, True)]
)
def test_calls_that_have_not_started_run_elsewhere_unless_people_have_ended_their_job(
    executor: BatchExecutor, scheduler: ExplainingScheduler, gate: Gate, cause: Cause, runs: bool
) -> None:
    started, waiting = executor.submit(gate.wait), executor.submit(abs, -1)
    await_running(started)
    scheduler.reasons_by_id["1_0"] = JobStatus(JobState.ENDED, "TERM_SOMETHING", cause=cause)
    scheduler.kill("1_0", "EXIT")
    assert error_of(started).reason == "TERM_SOMETHING"
    if runs:
        assert waiting.result(PATIENCE_S) == 1
    else:
        assert error_of(waiting).reason == "TERM_SOMETHING"


def test_jobs_of_which_nothing_is_said_are_followed_on(
    executor: BatchExecutor, scheduler: ExplainingScheduler, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LOST_S", 0.2)
    scheduler.silent = True
    future = executor.submit(gate.wait)
    await_running(future)
    asked = scheduler.asked.count("states")
    wait_until(lambda: scheduler.asked.count("states") > asked + 2, "it was asked again and again")
    assert not future.done()
    gate.open()
    future.result(PATIENCE_S)


def test_a_job_that_is_not_known_any_more_was_taken_out_only_where_that_is_sure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LOST_S", 1.0)
    ends = {}
    for keeps in (True, False):
        scheduler = ExplainingScheduler()
        scheduler.keeps_waiting = keeps
        scheduler.hold()
        executor = executor_over(scheduler, tmp_path / f"jobs-{keeps}", calls_per_job=1)
        futures = [executor.submit(abs, -number) for number in range(2)]
        wait_until(lambda s=scheduler: "states" in s.asked, "they are known to wait")
        wait_until(
            lambda e=executor: all(job.was_waiting for job in list(e._manager._roster.jobs)),
            "they were seen to wait",
        )
        scheduler.forget("1_0")
        ends[keeps] = futures[0]
        if keeps:
            assert error_of(futures[0]).reason == "CANCELLED"
        scheduler.release()
        if not keeps:  # it starts elsewhere, or after all
            assert futures[0].result(PATIENCE_S) == 0
        assert futures[1].result(PATIENCE_S) == 1
        executor.shutdown()
        scheduler.close()


def test_the_manager_asks_with_the_names_of_the_arrays_and_cancels_with_them(
    tmp_path: Path, gate: Callable[[], Any]
) -> None:
    told: list[Mapping[str, str]] = []

    class Noting(ExplainingScheduler):
        def states(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
            told.append(dict(jobs))
            return super().states(jobs)

        def cancel(self, jobs: Mapping[str, str]) -> None:
            told.append(dict(jobs))
            super().cancel(jobs)

    scheduler = Noting()
    scheduler.hold()
    executor = executor_over(scheduler, tmp_path / "jobs")
    executor.submit(abs, -1)
    wait_until(lambda: bool(told), "it has asked")
    executor.stop()
    executor.shutdown()
    assert told
    assert all(jobs == {"1_0": scheduler.requests[0].name} for jobs in told)
    scheduler.close()


def test_a_scheduler_that_is_always_being_asked_is_asked_why_all_the_same(
    executor: BatchExecutor, scheduler: ExplainingScheduler, gate: Gate
) -> None:
    lost, other = executor.submit(gate.wait), executor.options(name="other", cpus=2).submit(gate.wait)
    await_running(lost, other)
    scheduler.slowness = 1.3  # more than there is between two questions
    scheduler.reasons_by_id["1_0"] = MEMORY
    scheduler.kill("1_0", "EXIT")
    assert error_of(lost).reason == "TERM_MEMLIMIT"
    gate.open()
    other.result(PATIENCE_S)


def test_a_job_that_was_not_known_for_a_moment_is_followed_on(
    executor: BatchExecutor, scheduler: ExplainingScheduler, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LOST_S", 0.2)
    future = executor.submit(gate.wait)
    await_running(future)
    scheduler.reasons_by_id["1_0"] = JobStatus(JobState.RUNNING, node="here")
    scheduler.forget("1_0")
    wait_until(lambda: len(scheduler.asked_why) > 1, "it was asked twice")
    assert not future.done()
    gate.open()
    future.result(PATIENCE_S)


def test_a_call_that_is_taken_on_while_its_job_is_asked_about_has_its_reason(
    tmp_path: Path, scheduler: ExplainingScheduler, gate: Gate
) -> None:
    """The job was ended by people: whatever comes when, its calls that have not started run nowhere."""
    submitter = executor_over(scheduler, tmp_path / "jobs", calls_per_job=3)
    started = submitter.options(key="a").submit(gate.wait)
    submitter.options(key="b").submit(abs, -1)
    await_running(started)
    other = executor_over(scheduler, tmp_path / "jobs")
    first = other.attach("a")
    assert first is not None
    scheduler.reasons_by_id["1_0"] = JobStatus(JobState.ENDED, "TERM_OWNER", cause=Cause.CANCELLED)
    scheduler.may_explain.clear()
    scheduler.kill("1_0", "EXIT")
    wait_until(lambda: len(scheduler.asked_why) > 1, "both are asking")
    second = other.attach("b")
    assert second is not None
    scheduler.may_explain.set()
    assert error_of(first).reason == error_of(second).reason == "TERM_OWNER"
    assert len(scheduler.requests) == 1
    submitter.shutdown()
    other.shutdown()
    scheduler.close()


def test_what_is_known_by_then_stays_when_the_rest_never_comes(
    executor: BatchExecutor, scheduler: ExplainingScheduler, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_UNDECIDED_S", 0.5)
    known = {"1_0": JobStatus(JobState.ENDED, "SIGKILL", -9)}
    monkeypatch.setattr(scheduler, "explain", _partly(known))
    future = executor.submit(gate.wait)
    await_running(future)
    scheduler.kill("1_0", "EXIT")
    assert (error_of(future).reason, error_of(future).returncode) == ("SIGKILL", -9)


def _partly(known: Mapping[str, JobStatus]) -> Callable[[Mapping[str, str]], Mapping[str, JobStatus]]:
    def explain(jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        raise PartlyExplainedError("the history is being written", known)

    return explain
