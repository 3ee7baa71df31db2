"""What is cancelled or stopped ends, on the hosts as well, and nothing else does.

That no bkill comes without the ids of jobs, or with 0, is looked at by the cluster after each test.
"""

from __future__ import annotations

import os
import subprocess
import time
from concurrent import futures

import pytest

from fractal_runner.testing import is_alive, wait_until
from tests.executors.batch.lsf_calls import (
    PATIENCE_S,
    Site,
    both_clusters,  # noqa: F401  a fixture, by another name
    error_of,
    in_both_dialects,
    noting,
    results,
    script,
    site_of_tests,  # noqa: F401  likewise
)

MANY = 300


def killed(site: Site) -> list[str]:
    """The words of all calls of bkill."""
    return [word for call in site.cluster.calls("bkill") for word in call.argv]


@in_both_dialects
def test_a_job_none_of_whose_calls_is_wanted_any_more_is_killed_before_it_starts(site: Site) -> None:
    site.cluster.switch("no_dispatch")
    submitted = site.three(site.executor())
    site.await_jobs()

    assert all(future.cancel() for future in submitted)

    [job] = site.await_ended()
    assert (job.state, job.starts, job.reason) == ("EXIT", 0, "TERM_OWNER")
    assert killed(site) == ["1[1]"]
    assert all(future.cancelled() for future in submitted)


@in_both_dialects
def test_of_an_array_those_jobs_are_killed_that_nobody_wants(site: Site) -> None:
    site.cluster.switch("no_dispatch")
    submitted = site.many(site.executor(calls_per_job=1), 6)
    site.await_jobs(6)

    for number in (1, 2, 4):
        assert submitted[number].cancel()
    wait_until(lambda: [job.state for job in site.cluster.jobs()].count("EXIT") == 3, "they are killed")
    site.cluster.clear_faults()

    assert results(*(submitted[number] for number in (0, 3, 5))) == [0, 3, 5]
    assert sorted(site.ran()) == ["0", "3", "5"]
    assert [job.starts for job in site.cluster.jobs()] == [1, 0, 0, 1, 0, 1]


@in_both_dialects
def test_a_call_that_is_stopped_is_gone_with_all_that_it_has_started_and_its_neighbours_go_on(
    site: Site,
) -> None:
    executor = site.executor(parallel_calls_per_job=3)
    noted = site.folder / "pids"

    def start_and_wait() -> None:
        child = subprocess.Popen(["sleep", "1000"])
        lost = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        noted.with_suffix(".new").write_text(f"{os.getpid()} {child.pid} {lost.pid}")
        noted.with_suffix(".new").rename(noted)
        time.sleep(1000)  # until it is ended

    neighbours = [executor.submit(site.gate.wait, number) for number in range(2)]
    stopped = executor.submit(start_and_wait)
    wait_until(noted.exists, "it has started its children", seconds=PATIENCE_S)
    wait_until(stopped.running, "it is known to run", seconds=PATIENCE_S)

    assert executor.stop(stopped) == 1

    assert error_of(stopped).reason == "CANCELLED"
    pids = [int(pid) for pid in noted.read_text().split()]
    wait_until(lambda: not any(map(is_alive, pids)), "the processes are gone")
    site.gate.open()
    assert results(*neighbours) == [0, 1]
    assert killed(site) == []


def test_a_call_that_is_cancelled_before_its_neighbour_is_stopped_never_runs(site: Site) -> None:
    executor = site.executor(calls_per_job=4)
    first, second, third = site.three(executor, site.gate.wait)
    last = executor.submit(noting(site.folder / "runs"), "last")
    site.held(executor)

    assert third.cancel()
    assert executor.stop(second) == 1

    assert error_of(second).reason == "CANCELLED"
    assert results(first, last) == ["first", "last"]
    assert site.ran() == ["first", "second", "last"]


@in_both_dialects
def test_when_all_is_stopped_no_job_is_left(site: Site) -> None:
    executor = site.executor()
    running = site.three(executor, site.gate.wait)
    held = [executor.options(extra={"bsub_extra": ["-H"]}).submit(abs, number) for number in range(9)]
    site.held(executor)
    site.await_jobs(4)

    executor.stop()

    assert futures.wait([*running, *held], PATIENCE_S).not_done == set()
    assert all(future.cancelled() for future in held)
    assert {job.starts for job in site.await_ended()} == {0, 1}
    assert site.ran() == ["first", "second"]


@in_both_dialects
def test_hundreds_of_jobs_are_stopped_by_a_few_commands(site: Site) -> None:
    site.cluster.switch("no_dispatch")
    executor = site.executor(calls_per_job=1, max_array=100)
    submitted = site.many(executor, MANY)
    site.await_jobs(MANY)

    executor.stop()

    assert futures.wait(submitted, PATIENCE_S).not_done == set()
    assert {(job.state, job.starts) for job in site.await_ended()} == {("EXIT", 0)}
    assert site.asked("bkill") <= 3
    assert site.ran() == []


def test_what_waits_is_cancelled_at_the_end_if_so_asked_for_and_what_runs_is_not(site: Site) -> None:
    executor = site.executor(calls_per_job=1)
    running = executor.submit(site.gate.wait, 1)
    site.gate.await_arrivals(1)
    site.cluster.switch("no_dispatch")
    waiting = site.many(executor, 3)
    site.await_jobs(4)

    executor.shutdown(wait=False, cancel_futures=True)
    site.gate.open()

    assert running.result(PATIENCE_S) == 1
    assert all(future.cancelled() for future in waiting)
    assert [job.starts for job in site.await_ended()] == [1, 0, 0, 0]
    assert site.ran() == []


def test_leaving_the_with_block_on_an_exception_cancels_what_waits(site: Site) -> None:
    site.cluster.switch("no_dispatch")
    executor = site.executor()

    with pytest.raises(LookupError, match="mine"), executor:
        submitted = site.many(executor, 9)
        site.await_jobs(3)
        raise LookupError("mine")

    assert all(future.cancelled() for future in submitted)
    assert {job.state for job in site.await_ended()} == {"EXIT"}


# What bkill says of it


@pytest.mark.parametrize(
    "said", ["Job <1>: Operation is in progress", "Job <1[1]>: Job has already finished"]
)
def test_a_refusal_by_which_the_job_is_ending_is_none(said: str, site: Site) -> None:
    bkill = script(site.folder / "bin" / "end", 'bkill "$@" >/dev/null 2>&1', f"echo '{said}' >&2; exit 255")
    site.cluster.switch("no_dispatch")
    submitted = site.three(executor := site.executor(bkill_cmd=str(bkill)))
    site.await_jobs()

    executor.stop()

    assert all(future.cancelled() for future in submitted)
    assert {job.state for job in site.await_ended()} == {"EXIT"}
    executor.shutdown()
    assert site.asked("bkill") == 1


@in_both_dialects
def test_jobs_are_killed_once_the_daemon_is_back(site: Site) -> None:
    site.cluster.switch("no_dispatch")
    submitted = site.three(executor := site.executor())
    site.await_jobs()
    site.cluster.crash()

    executor.stop()
    assert all(future.cancelled() for future in submitted)
    site.await_more("bkill", 2)
    site.cluster.resume()

    assert {(job.state, job.starts) for job in site.await_ended()} == {("EXIT", 0)}


def test_calls_that_are_stopped_while_the_daemon_is_away_end_on_their_host(site: Site) -> None:
    executor = site.executor()
    first, second, third = site.three(executor, site.gate.wait)
    pid = site.held(executor).pid
    assert pid is not None
    site.cluster.crash()

    executor.stop()

    assert error_of(second).reason == "CANCELLED"
    assert third.cancelled()
    assert first.result() == "first"
    wait_until(lambda: not is_alive(pid), "its process is gone")


def test_jobs_of_a_submission_that_is_under_way_are_killed_as_soon_as_they_are_known(site: Site) -> None:
    site.cluster.switch("slow", seconds=1.5, programs=("bsub",))
    site.cluster.switch("no_dispatch")
    submitted = site.three(executor := site.executor())
    site.await_jobs()

    executor.stop()

    assert all(future.cancelled() for future in submitted)
    assert {(job.state, job.starts) for job in site.await_ended()} == {("EXIT", 0)}
    assert site.ran() == []
