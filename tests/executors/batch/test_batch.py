"""Whatever a batch system does or fails to do, each call ends once, and by what became of it."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.batch import following, stopping, submitting
from fractal_runner.executors.batch.base import BatchExecutor
from fractal_runner.executors.batch.files import ArrayFiles
from fractal_runner.executors.batch.scheduler import JobState, JobStatus
from fractal_runner.testing import Gate, wait_until
from fractal_runner.testing._tools import await_running
from tests.executors.batch.faults import FaultyScheduler, executor_over

pytestmark = pytest.mark.timeout(120)

PATIENCE_S = 40.0


@pytest.fixture
def scheduler() -> FaultyScheduler:
    return FaultyScheduler()


@pytest.fixture
def make(tmp_path: Path, scheduler: FaultyScheduler) -> Iterator[Callable[..., BatchExecutor]]:
    made: list[BatchExecutor] = []

    def make(**options: Any) -> BatchExecutor:
        made.append(executor_over(scheduler, tmp_path / "jobs", **options))
        return made[-1]

    yield make
    scheduler.is_away = scheduler.cancels_nothing = False
    scheduler.gate.set()
    scheduler.statuses.clear()
    scheduler.close()
    for executor in made:
        executor.stop()
        executor.shutdown()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes its time at a real scheduler does not, here."""
    monkeypatch.setattr(following, "_LOST_S", 1.5)
    monkeypatch.setattr(submitting, "_FIND_S", 0.05)
    monkeypatch.setattr(submitting, "_FIND_LIMIT_S", 0.2)


def error_of(future: Future[Any]) -> JobExecutionError:
    error = future.exception(PATIENCE_S)
    assert isinstance(error, JobExecutionError), error
    return error


def noting(file: Path) -> Callable[[], str]:
    """A call that leaves a line each time that it runs."""
    name = str(file)

    def note() -> str:
        with open(name, "a") as lines:  # noqa: PTH123  a function that travels brings no imports with it
            lines.write("ran\n")
        return "ran"

    return note


# Packing


def test_many_calls_make_few_arrays(make: Callable[..., BatchExecutor], scheduler: FaultyScheduler) -> None:
    executor = make(calls_per_job=250, parallel_calls_per_job=2)
    futures = [executor.submit(abs, -number) for number in range(1000)]
    assert [future.result(PATIENCE_S) for future in futures] == list(range(1000))
    assert len(scheduler.requests) <= 3


def test_calls_that_need_different_things_are_in_different_arrays(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    executor = make(calls_per_job=10)
    futures = [executor.options(cpus=cpus).submit(abs, -cpus) for cpus in (1, 2, 1, 2)]
    assert [future.result(PATIENCE_S) for future in futures] == [1, 2, 1, 2]
    assert sorted((request.count, request.cpus) for request in scheduler.requests) == [(1, 1), (1, 2)]


def test_an_array_has_no_more_jobs_than_it_may(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    executor = make(calls_per_job=1, max_array=2)
    assert list(executor.map(abs, [-1, -2, -3, -4, -5])) == [1, 2, 3, 4, 5]
    assert [request.count for request in scheduler.requests] == [2, 2, 1]


def test_a_job_asks_for_what_its_calls_need_one_after_the_other(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    executor = make(calls_per_job=4, parallel_calls_per_job=2, cpus=3, memory="1GB", time=60)
    list(executor.map(abs, [-1, -2, -3, -4]))
    (request,) = scheduler.requests
    assert (request.cpus, request.memory, request.time) == (6, 2 * 10**9, 120)


def test_no_job_asks_for_more_time_than_it_may(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    executor = make(calls_per_job=4, time=60, max_time=90)
    list(executor.map(abs, [-1, -2, -3, -4]))
    assert scheduler.requests[0].time == 90


def test_a_job_asks_for_no_more_than_its_own_calls_can_use(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    executor = make(calls_per_job=8, parallel_calls_per_job=8)
    list(executor.map(abs, range(9)))
    assert [(request.count, request.cpus) for request in scheduler.requests] == [(2, 5)]


def test_no_more_calls_run_at_a_time_than_there_are_workers(
    make: Callable[..., BatchExecutor], tmp_path: Path
) -> None:
    (tmp_path / "running").mkdir()
    folder = str(tmp_path / "running")

    def count() -> int:
        import os
        import tempfile
        import time

        with tempfile.NamedTemporaryFile(dir=folder):
            time.sleep(0.05)  # this is the work
            return len(os.listdir(folder))  # noqa: PTH208  as above

    executor = make(max_workers=3, calls_per_job=2, parallel_calls_per_job=2)
    futures = [executor.submit(count) for _ in range(12)]
    assert max(future.result(PATIENCE_S) for future in futures) <= 3


def test_no_more_jobs_wait_than_may(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, gate: Gate
) -> None:
    executor = make(max_jobs=2, calls_per_job=1)
    scheduler.hold()
    futures = [executor.submit(abs, -1) for _ in range(2)]
    wait_until(lambda: len(scheduler.ids()) == 2, "both jobs wait")
    futures += [executor.submit(abs, -1) for _ in range(4)]
    wait_until(lambda: executor._manager._submitting._waiting, "the others wait")
    assert len(scheduler.ids()) == 2
    scheduler.release()
    assert [future.result(PATIENCE_S) for future in futures] == [1] * 6


def test_two_calls_may_have_the_same_key(make: Callable[..., BatchExecutor]) -> None:
    executor = make().options(key="same")
    first, second = executor.submit(abs, -1), executor.submit(abs, -2)
    assert (first.result(PATIENCE_S), second.result(PATIENCE_S)) == (1, 2)


# Submitting


def test_a_refused_array_fails_its_own_calls_alone(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    scheduler.refuses.add("nowhere")
    executor = make()
    refused, taken = executor.options(queue="nowhere").submit(abs, -1), executor.submit(abs, -2)
    error = error_of(refused)
    assert error.reason == "REFUSED"
    assert "invalid queue: nowhere" in str(error)
    assert taken.result(PATIENCE_S) == 2


def test_a_folder_that_is_not_ours_fails_calls_and_nothing_is_submitted(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, tmp_path: Path
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs").chmod(0o777)
    error = error_of(make().submit(abs, -1))
    assert error.reason == "NOT_SUBMITTED"
    assert "can be written by others" in str(error)
    assert not scheduler.requests


def test_jobs_whose_ids_were_lost_are_found(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, quick: None, tmp_path: Path
) -> None:
    scheduler.loses = 1
    executor = make(calls_per_job=1)
    futures = [executor.submit(noting(tmp_path / "runs")) for _ in range(3)]
    assert [future.result(PATIENCE_S) for future in futures] == ["ran"] * 3
    assert (tmp_path / "runs").read_text() == "ran\n" * 3
    assert len(scheduler.requests) == 1


def test_jobs_that_are_not_found_are_submitted_anew_and_do_nothing_when_they_come_late(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, quick: None, tmp_path: Path
) -> None:
    scheduler.drops = 1
    future = make().submit(noting(tmp_path / "runs"))
    assert future.result(PATIENCE_S) == "ran"
    assert len(scheduler.requests) == 1
    (lost,) = scheduler.late
    assert not lost.directory.exists()
    lost.directory.mkdir()  # the late job has a place for what it prints, and nothing else
    scheduler.come_late()
    scheduler.await_job(scheduler.ids()[-1])
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_jobs_that_began_before_they_were_found_are_followed(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, quick: None, gate: Gate
) -> None:
    scheduler.gate.clear()
    scheduler.loses, scheduler.hides = 1, True
    future = make().submit(gate.wait, "done")
    wait_until(lambda: "submission" in scheduler.asked, "it is being submitted")
    find = scheduler.find
    scheduler.find = lambda request: (gate.await_arrivals(1), find(request))[1]  # type: ignore[method-assign]
    scheduler.gate.set()
    wait_until(lambda: "find" in scheduler.asked, "the array was looked for")
    gate.open()
    assert future.result(PATIENCE_S) == "done"
    assert len(gate.arrived()) == 1


def test_of_jobs_that_are_there_twice_those_stay_that_have_begun(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, quick: None, gate: Gate
) -> None:
    scheduler.hold()
    scheduler.doubles = 1
    find = scheduler.find

    def find_once_the_second_runs(request: Any) -> Any:
        with scheduler._lock:
            scheduler._queue.sort(key=lambda id: id.startswith("1_"))
        scheduler.release(1)
        gate.await_arrivals(1)
        return find(request)

    scheduler.find = find_once_the_second_runs  # type: ignore[method-assign]
    future = make().submit(gate.wait, "done")
    wait_until(lambda: scheduler.cancelled, "one of them is cancelled")
    gate.open()
    assert scheduler.cancelled == ["1_0"]
    assert future.result(PATIENCE_S) == "done"
    assert len(gate.arrived()) == 1


def test_of_jobs_that_are_there_twice_one_does_the_work(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, quick: None, tmp_path: Path
) -> None:
    scheduler.hold()
    scheduler.doubles = 1
    futures = [make(calls_per_job=1).submit(noting(tmp_path / "runs")) for _ in range(2)]
    wait_until(lambda: scheduler.cancelled, "the others are cancelled")
    scheduler.release()
    assert [future.result(PATIENCE_S) for future in futures] == ["ran"] * 2
    assert (tmp_path / "runs").read_text() == "ran\n" * 2


def test_a_submission_that_nobody_answers_fails_in_time_and_is_not_done_later(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, quick: None, tmp_path: Path
) -> None:
    scheduler.hold()
    scheduler.is_away, scheduler.loses = True, 1
    error = error_of(make(submission_timeout=0.5).submit(noting(tmp_path / "runs")))
    assert error.reason == "NOT_SUBMITTED"
    assert "the controller is away" in str(error)
    (scheduler.requests[0].directory).mkdir(exist_ok=True)
    scheduler.release()
    scheduler.await_job("1_0")
    assert not (tmp_path / "runs").exists()


def test_a_reply_with_too_few_ids_is_none(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, quick: None
) -> None:
    submit = scheduler.submit
    scheduler.submit = lambda request: submit(request)[1:]  # type: ignore[method-assign]
    assert make().submit(abs, -1).result(PATIENCE_S) == 1
    assert "find" in scheduler.asked


# Following


def test_a_scheduler_that_is_away_ends_nothing_and_is_told_of_once(
    make: Callable[..., BatchExecutor],
    scheduler: FaultyScheduler,
    gate: Gate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    future = make().submit(gate.wait, "done")
    gate.await_arrivals(1)
    scheduler.is_away = True
    asked = len(scheduler.asked)
    wait_until(lambda: len(scheduler.asked) >= asked + 3, "it was asked three times")
    assert not future.done()
    gate.open()
    assert future.result(PATIENCE_S) == "done"
    assert sum("does not answer" in record.message for record in caplog.records) == 1


def test_a_job_that_is_unknown_for_a_moment_is_not_lost(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, gate: Gate
) -> None:
    executor = make()
    future = executor.submit(gate.wait, "done")
    gate.await_arrivals(1)
    scheduler.forget("1_0")
    polls = executor._manager.polls
    wait_until(lambda: executor._manager.polls >= polls + 3, "it was asked for three times")
    scheduler.statuses.clear()
    gate.open()
    assert future.result(PATIENCE_S) == "done"


def test_a_job_that_stays_unknown_is_lost_with_what_it_had_started_and_others_run_elsewhere(
    make: Callable[..., BatchExecutor],
    scheduler: FaultyScheduler,
    quick: None,
    gate: Gate,
    tmp_path: Path,
) -> None:
    executor = make(calls_per_job=2)
    started, waiting = executor.submit(gate.wait), executor.submit(noting(tmp_path / "runs"))
    gate.await_arrivals(1)
    await_running(started)
    scheduler.forget("1_0")
    error = error_of(started)
    assert (error.reason, error.job_id, error.node) == ("LOST", "1_0", "here")
    assert waiting.result(PATIENCE_S) == "ran"
    gate.open()  # the job is there, whatever the scheduler says, and does not go on
    scheduler.await_job("1_0")
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_a_job_that_is_heard_of_is_not_lost_whatever_the_scheduler_says(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, quick: None
) -> None:
    def work() -> None:
        import time

        time.sleep(0.4)

    executor = make(calls_per_job=10)
    scheduler.forget("1_0")
    futures = [executor.submit(work) for _ in range(10)]
    assert [future.result(PATIENCE_S) for future in futures] == [None] * 10
    assert len(scheduler.requests) == 1


def test_a_call_whose_job_was_ended_has_the_schedulers_reason_and_all_that_is_known(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, gate: Gate
) -> None:
    executor = make(calls_per_job=2)
    started, waiting = executor.submit(gate.wait), executor.submit(abs, -1)
    gate.await_arrivals(1)
    await_running(started)
    with (scheduler.requests[0].directory / "job-0.log").open("a") as log:
        log.write("slurmstepd: killed\n")
    scheduler.kill("1_0", "TIMEOUT")
    error = error_of(started)
    assert (error.reason, error.job_id, error.node) == ("TIMEOUT", "1_0", "here")
    assert error.returncode == -signal.SIGKILL
    assert error.stdout_file == error.stderr_file == str(scheduler.requests[0].directory / "job-0.log")
    for part in ("job 1_0 on here is TIMEOUT", "Ask for more time", "slurmstepd: killed"):
        assert part in str(error)
    assert waiting.result(PATIENCE_S) == 1


def test_a_call_that_no_job_starts_is_given_to_three_of_them(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    executor = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tests.executors.batch.processes.JOB_PROGRAM", "print('no such module'); raise SystemExit(1)"
        )
        error = error_of(executor.submit(abs, -1))
    assert len(scheduler.requests) == 3
    assert error.reason == "FAILED"
    assert "was given to 3 jobs, and none of them started it" in str(error)
    assert "no such module" in str(error)


def test_a_job_that_dies_between_its_claim_and_its_first_word_leaves_its_calls_to_another_one(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    scheduler.hold()
    future = make().submit(abs, -1)
    wait_until(lambda: scheduler.ids() == ["1_0"], "its job waits")
    ArrayFiles(scheduler.requests[0].directory).claim_for(0, "1_0")
    with scheduler._lock:
        scheduler._queue.clear()
    scheduler.statuses["1_0"] = JobStatus(JobState.ENDED, "NODE_FAIL")
    scheduler.release()
    assert future.result(PATIENCE_S) == 1
    assert len(scheduler.requests) == 2


def test_a_job_that_ends_well_and_says_nothing_leaves_its_calls_to_another_one(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    scheduler.hold()
    future = make().submit(abs, -1)
    wait_until(lambda: scheduler.ids() == ["1_0"], "its job waits")
    with scheduler._lock:
        scheduler._queue.clear()
    scheduler.statuses["1_0"] = JobStatus(JobState.ENDED)
    scheduler.release()
    assert future.result(PATIENCE_S) == 1


def test_calls_of_a_job_that_ran_out_of_time_go_to_as_many_others_as_it_takes(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    def hurry(number: int) -> int:
        import os
        import signal
        import time

        os.kill(os.getppid(), signal.SIGUSR2)
        time.sleep(0.3)  # its work: longer than the job takes to notice
        return number

    executor = make(calls_per_job=8)
    futures = [executor.submit(hurry, number) for number in range(8)]
    assert [future.result(PATIENCE_S) for future in futures] == list(range(8))
    assert len(scheduler.requests) > 3


def test_calls_behind_others_that_take_their_jobs_with_them_run_in_the_end(
    make: Callable[..., BatchExecutor],
) -> None:
    def kill() -> None:
        import os
        import signal

        os.kill(os.getppid(), signal.SIGKILL)

    executor = make(calls_per_job=5)
    killing, innocent = [executor.submit(kill) for _ in range(4)], executor.submit(abs, -1)
    assert [error_of(future).reason for future in killing] == ["FAILED"] * 4
    assert innocent.result(PATIENCE_S) == 1


def test_a_disk_that_is_full_when_a_job_is_over_leaves_no_call_without_an_end(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.hold()
    future = make().submit(abs, -1)
    wait_until(lambda: scheduler.ids() == ["1_0"], "its job waits")
    failures = [OSError(28, "No space left on device")] * 2
    claim_for = ArrayFiles.claim_for

    def full(self: ArrayFiles, number: int, job: str | None, **more: Any) -> bool:
        if failures:
            raise failures.pop()
        return claim_for(self, number, job, **more)

    monkeypatch.setattr(ArrayFiles, "claim_for", full)
    with scheduler._lock:
        scheduler._queue.clear()
    scheduler.statuses["1_0"] = JobStatus(JobState.ENDED, "NODE_FAIL")
    scheduler.release()
    assert future.result(PATIENCE_S) == 1


def test_a_directory_that_was_removed_leaves_no_call_without_an_end(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, gate: Gate
) -> None:
    executor = make(calls_per_job=2)
    started, waiting = executor.submit(gate.wait), executor.submit(abs, -1)
    await_running(started)
    shutil.rmtree(scheduler.requests[0].directory)
    scheduler.kill("1_0", "NODE_FAIL")
    assert error_of(started).reason == "NODE_FAIL"
    assert waiting.result(PATIENCE_S) == 1


def test_a_job_that_waits_for_what_will_not_come_is_given_up(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, tmp_path: Path
) -> None:
    scheduler.hold()
    scheduler.cancels_nothing = True
    future = make(pending_timeout=0.5).submit(noting(tmp_path / "runs"))
    scheduler.statuses["1_0"] = JobStatus(JobState.QUEUED, "PartitionDown", can_start=False)
    error = error_of(future)
    assert error.reason == "PartitionDown"
    assert "job 1_0 waits" in str(error)
    scheduler.cancels_nothing = False
    scheduler.release()  # it starts all the same, and there is nothing to do any more
    wait_until(lambda: "1_0" in scheduler._ended, "the job has ended")
    assert not (tmp_path / "runs").exists()


def test_a_callback_that_ends_its_thread_keeps_no_other_call_from_ending(
    make: Callable[..., BatchExecutor],
) -> None:
    def leave(_: Future[Any]) -> None:
        raise SystemExit("a callback")

    executor = make(calls_per_job=4)
    futures = [executor.submit(abs, -number) for number in range(4)]
    for future in futures:
        future.add_done_callback(leave)
    assert [future.result(PATIENCE_S) for future in futures] == [0, 1, 2, 3]
    assert executor.submit(abs, -1).result(PATIENCE_S) == 1


def test_a_callback_that_ends_its_thread_keeps_no_other_call_from_failing(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    def leave(_: Future[Any]) -> None:
        raise SystemExit("a callback")

    scheduler.refuses.add("nowhere")
    executor = make(calls_per_job=2, queue="nowhere")
    futures = [executor.submit(abs, -number) for number in range(4)]
    for future in futures:
        future.add_done_callback(leave)
    assert [error_of(future).reason for future in futures] == ["REFUSED"] * 4


# Stopping


def test_a_call_that_is_cancelled_at_once_is_not_submitted(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    executor = make()
    future = executor.submit(abs, -1)
    assert future.cancel()
    executor.shutdown()
    assert not scheduler.requests


def test_a_job_whose_calls_are_all_cancelled_while_it_waits_is_cancelled(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    scheduler.hold()
    executor = make(calls_per_job=2)
    futures = [executor.submit(abs, -1) for _ in range(2)]
    wait_until(scheduler.ids, "their job waits")
    assert futures[0].cancel()
    assert not scheduler.cancelled
    assert futures[1].cancel()
    wait_until(lambda: scheduler.cancelled == ["1_0"], "it is cancelled")


def test_a_call_that_is_cancelled_in_a_job_that_runs_is_not_run(
    make: Callable[..., BatchExecutor], gate: Gate, tmp_path: Path
) -> None:
    executor = make(calls_per_job=3)
    running, waiting, last = (
        executor.submit(gate.wait),
        executor.submit(noting(tmp_path / "runs")),
        executor.submit(abs, -1),
    )
    await_running(running)
    assert waiting.cancel()
    wait_until(lambda: executor._manager._stopping.is_idle, "the job was told")
    wait_until(lambda: not executor._manager._notes, "nothing is left to be told")
    gate.open()
    assert last.result(PATIENCE_S) == 1


def test_a_call_that_is_cancelled_while_it_is_being_submitted_is_not_run(
    make: Callable[..., BatchExecutor],
    scheduler: FaultyScheduler,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheduler.gate.clear()
    scheduler.hold()
    executor = make(calls_per_job=2)
    first, second = executor.submit(noting(tmp_path / "runs")), executor.submit(abs, -1)
    wait_until(lambda: "submission" in scheduler.asked, "they are being submitted")
    assert first.cancel()
    scheduler.gate.set()
    wait_until(lambda: scheduler.ids() and executor._manager._stopping.is_idle, "they are submitted")
    control = lambda: (scheduler.requests[0].directory / "control").stat().st_size  # noqa: E731
    wait_until(control, "the job was told")
    scheduler.release()
    assert second.result(PATIENCE_S) == 1
    assert not (tmp_path / "runs").exists()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_job_that_is_not_wanted_any_more_when_its_id_comes_is_cancelled(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    scheduler.gate.clear()
    scheduler.hold()
    future = make().submit(abs, -1)
    wait_until(lambda: "submission" in scheduler.asked, "it is being submitted")
    assert future.cancel()
    scheduler.gate.set()
    wait_until(lambda: scheduler.cancelled == ["1_0"], "it is cancelled")


def test_what_runs_and_is_stopped_ends_and_the_others_of_its_job_go_on(
    make: Callable[..., BatchExecutor], gate: Gate
) -> None:
    executor = make(calls_per_job=2)
    stopped, other = executor.submit(gate.wait), executor.submit(abs, -1)
    await_running(stopped)
    executor.stop(stopped)
    assert error_of(stopped).reason == "CANCELLED"
    assert other.result(PATIENCE_S) == 1


def test_what_runs_and_is_stopped_ends_also_if_its_job_does_not_listen(
    make: Callable[..., BatchExecutor],
    scheduler: FaultyScheduler,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopping, "_STOP_S", 0.5)
    executor = make()
    future = executor.submit(gate.wait)
    await_running(future)
    os.kill(scheduler.processes()["1_0"], signal.SIGSTOP)
    executor.stop()
    wait_until(lambda: scheduler.cancelled == ["1_0"], "its job is cancelled")
    scheduler.kill("1_0", "CANCELLED")
    assert error_of(future).reason == "CANCELLED"


def test_stop_ends_what_waits_and_what_runs(make: Callable[..., BatchExecutor], gate: Gate) -> None:
    executor = make(calls_per_job=2)
    futures = [executor.submit(gate.wait) for _ in range(6)]
    gate.await_arrivals(3)
    executor.stop()
    for future in futures:
        assert future.cancelled() or error_of(future).reason == "CANCELLED"


# The executor's own life


def test_a_call_whose_argument_comes_after_the_shutdown_is_done_all_the_same(
    make: Callable[..., BatchExecutor],
) -> None:
    executor, argument = make(), Future[int]()
    first, late = executor.submit(abs, -1), executor.submit(abs, argument)
    assert first.result(PATIENCE_S) == 1
    executor.shutdown(wait=False)
    wait_until(lambda: executor._manager._thread is None, "the manager has nothing to do")
    argument.set_result(-2)
    assert late.result(PATIENCE_S) == 2


def test_an_executor_that_nobody_has_any_more_ends_its_threads(
    scheduler: FaultyScheduler, tmp_path: Path
) -> None:
    executor = executor_over(scheduler, tmp_path / "jobs")
    assert executor.submit(abs, -1).result(PATIENCE_S) == 1
    manager, gone = executor._manager, weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None
    wait_until(lambda: manager._thread is None, "its thread has ended")


CHILD = """
import sys
from pathlib import Path
{first}
from tests.executors.batch.processes import ProcessBatchExecutor

def work():
    import time
    time.sleep(0.2)
    return "result"

executor = ProcessBatchExecutor(Path(sys.argv[1]), poll_interval=1, grace=0.2)
future = executor.submit(work)
future.add_done_callback(lambda future: print(future.result(), flush=True))
executor.shutdown(wait=False)
"""


@pytest.mark.parametrize(
    "first", ["", "import fractal_runner.executors.local.executors"], ids=["alone", "after the local one"]
)
def test_the_interpreter_waits_for_results(tmp_path: Path, top: Path, first: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CHILD.format(first=first), str(tmp_path / "jobs")],
        env={**os.environ, "PYTHONPATH": str(top)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "result\n"), ran.stderr


def test_a_forked_child_cannot_submit_and_ends(make: Callable[..., BatchExecutor], gate: Gate) -> None:
    executor = make()
    future = executor.submit(gate.wait)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            executor.submit(abs, -1)
        except RuntimeError as error:
            code = 0 if "forked child" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open()
    future.result(PATIENCE_S)


def test_nothing_of_many_calls_is_held(make: Callable[..., BatchExecutor]) -> None:
    executor = make(calls_per_job=250, parallel_calls_per_job=2)
    made: list[weakref.ref[Any]] = []
    futures = []
    for number in range(2000):
        argument = Thing(number)
        made.append(weakref.ref(argument))
        futures.append(executor.submit(Thing.same, argument))
        del argument
    for future in futures:
        made.append(weakref.ref(future.result(PATIENCE_S)))
    items = executor._manager._roster.running
    del future, futures
    wait_until(lambda: not executor._manager._roster.jobs, "all jobs have ended")
    gc.collect()
    assert not [ref for ref in made if ref() is not None]
    assert not items


def test_a_future_that_is_kept_keeps_nothing_of_what_its_call_was_given(
    make: Callable[..., BatchExecutor],
) -> None:
    executor = make()
    future = executor.submit(len, b"x" * 1_000_000)
    assert future.result(PATIENCE_S) == 1_000_000
    wait_until(lambda: not executor._manager._roster.jobs, "its job has ended")
    gc.collect()
    assert not [one for one in gc.get_referrers(future) if type(one).__name__ == "Item"]


class Thing:
    def __init__(self, number: int) -> None:
        self.number = number

    def same(self) -> Thing:
        return Thing(self.number)


# Taking on what another process has submitted


def test_another_executor_takes_on_a_call_that_runs(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, gate: Gate
) -> None:
    first = make().options(key="one").submit(gate.wait, "done")
    await_running(first)
    second = make().attach("one")
    assert second is not None
    gate.open()
    assert second.result(PATIENCE_S) == first.result(PATIENCE_S) == "done"
    assert len(gate.arrived()) == 1


def test_another_executor_takes_on_what_has_ended_and_knows_no_others(
    make: Callable[..., BatchExecutor],
) -> None:
    executor = make(calls_per_job=2)
    futures = [executor.options(key=f"key-{number}").submit(abs, -number) for number in range(2)]
    assert [future.result(PATIENCE_S) for future in futures] == [0, 1]
    other = make()
    for number in range(2):
        attached = other.attach(f"key-{number}")
        assert attached is not None
        assert attached.result(PATIENCE_S) == number
    assert other.attach("key-2") is None


def test_calls_of_a_dead_job_end_also_when_they_are_taken_on_one_after_the_other(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler, gate: Gate
) -> None:
    executor = make(calls_per_job=2, parallel_calls_per_job=2)
    futures = [executor.options(key=f"key-{number}").submit(gate.wait) for number in range(2)]
    await_running(*futures)
    scheduler.kill("1_0", "NODE_FAIL")
    assert [error_of(future).reason for future in futures] == ["NODE_FAIL"] * 2
    other = make()
    for number in range(2):
        attached = other.attach(f"key-{number}")
        assert attached is not None
        assert error_of(attached).reason == "NODE_FAIL"


def test_what_calls_have_logged_is_logged_once_though_others_are_taken_on_later(
    make: Callable[..., BatchExecutor], gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    wait = gate.wait

    def speak() -> None:
        import logging

        logging.getLogger("speaker").warning("spoken")
        wait()

    executor = make(calls_per_job=3, parallel_calls_per_job=3)
    spoken = executor.options(key="speaks").submit(speak)
    others = [executor.options(key=f"key-{number}").submit(wait) for number in range(2)]
    await_running(spoken, *others)
    wait_until(lambda: "spoken" in caplog.messages, "it has spoken")
    caplog.clear()
    other = make()
    attached = [other.attach("speaks")]
    wait_until(lambda: "spoken" in caplog.messages, "it is heard again")
    for number in range(2):
        attached.append(other.attach(f"key-{number}"))
        await_running(attached[-1])  # type: ignore[arg-type]
    gate.open()
    for future in attached:
        assert future is not None
        future.result(PATIENCE_S)
    assert caplog.messages.count("spoken") == 1


def test_a_call_whose_process_died_before_its_submission_is_unknown(
    make: Callable[..., BatchExecutor], scheduler: FaultyScheduler
) -> None:
    executor = make()
    executor.options(key="one").submit(abs, -1).result(PATIENCE_S)
    directory = scheduler.requests[0].directory
    executor.shutdown()
    for name in ("jobs", "claim-0", "records-0.0"):
        (directory / name).unlink()
    scheduler.hides = True
    assert make().attach("one") is None
    assert json.loads((directory / "claim-0").read_text())["job"] is None


def test_submitters_in_many_threads_are_all_served(make: Callable[..., BatchExecutor]) -> None:
    executor = make(calls_per_job=50)
    barrier = threading.Barrier(4)

    def submit(start: int) -> list[int]:
        barrier.wait(PATIENCE_S)
        return [future.result(PATIENCE_S) for future in [executor.submit(abs, -start - n) for n in range(25)]]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(submit, (0, 100, 200, 300)))
    assert results == [[start + n for n in range(25)] for start in (0, 100, 200, 300)]
