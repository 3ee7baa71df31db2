"""However LSF ends a job, what was running there says so, and the rest runs elsewhere, once.

In most of these tests a job has three calls: one has ended, one is held up at a gate, and one comes after it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fractal_runner.errors import JobExecutionError
from fractal_runner.testing import is_alive, wait_until
from tests.executors.batch.lsf_calls import (
    NAMES,
    Site,
    both_clusters,  # noqa: F401  a fixture, by another name
    error_of,
    in_both_dialects,
    in_ibms,
    program_of,
    results,
    site_of_tests,  # noqa: F401  likewise
    task,
)

FOR_LONG_S = 10_000.0


def facts(error: JobExecutionError) -> tuple[str | None, int | None]:
    return error.reason, error.returncode


def deaf(wait: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function for calls that ignores signals, and waits."""

    def ignore_and_wait(value: Any) -> Any:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        return wait(value)

    return ignore_and_wait


def hungry(wait: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function for calls that takes twice the memory that its job has, and waits."""

    def take_and_wait(_: Any) -> Any:
        return wait([b"x" * 10_000_000 for _ in range(60)])

    return take_and_wait


def let_time_be_up(site: Site) -> None:
    """For the jobs that run, not for those that come later."""
    site.cluster.configure(minute_s=1e-3)
    wait_until(lambda: any(job.reason for job in site.cluster.jobs()), "LSF has noticed")
    site.cluster.configure(minute_s=FOR_LONG_S)


# Limits


@in_both_dialects
def test_what_was_running_when_its_jobs_time_was_up_is_out_of_time(site: Site) -> None:
    site.cluster.configure(minute_s=FOR_LONG_S)
    executor = site.executor(walltime="00:01:00")
    first, second, third = site.three(executor, site.gate.wait)
    running = site.held(executor)

    let_time_be_up(site)

    error = error_of(second)
    assert facts(error) == ("TERM_RUNLIMIT", -signal.SIGUSR2)
    assert (error.job_id, error.node) == (running.job_id, "h1")
    assert "Ask for more time" in str(error)
    assert ("TERM_RUNLIMIT" if site.is_ibms else "Exited with exit code 140") in str(error.info)
    assert str(error.info) in str(error)
    assert results(first, third) == ["first", "third"]
    assert site.ran() == list(NAMES)


@in_both_dialects
def test_a_call_that_ignores_signals_ends_with_its_job_all_the_same(site: Site) -> None:
    site.cluster.configure(minute_s=FOR_LONG_S)
    executor = site.executor(walltime="00:01:00")
    first, second, third = site.three(executor, deaf(site.gate.wait))
    pid = site.held(executor).pid

    let_time_be_up(site)

    assert error_of(second).reason == "TERM_RUNLIMIT"
    assert results(first, third) == ["first", "third"]
    assert pid is not None
    wait_until(lambda: not is_alive(pid), "its process is gone")
    assert site.ran() == list(NAMES)


@in_ibms
def test_a_job_that_does_not_heed_the_warning_of_its_time_is_killed_and_out_of_time(site: Site) -> None:
    site.cluster.configure(minute_s=FOR_LONG_S, kill_after_s=0.2)
    executor = site.executor(walltime="00:01:00")
    first, second, third = site.three(executor, site.gate.wait)
    pid = site.held(executor).pid
    assert pid is not None
    program_of(pid).suspend()

    site.cluster.switch("no_dispatch")

    site.cluster.configure(minute_s=1e-3)

    error = error_of(second)
    assert error.reason == "TERM_RUNLIMIT"
    assert "TERM_RUNLIMIT" in str(error.info)
    site.cluster.configure(minute_s=FOR_LONG_S)
    site.cluster.clear_faults()
    assert results(first, third) == ["first", "third"]
    assert site.ran() == list(NAMES)


@in_both_dialects
def test_what_takes_more_memory_than_was_asked_for_says_so(site: Site) -> None:
    executor = site.executor(memory="300M")
    first, second, third = site.three(executor, hungry(site.gate.wait))

    error = error_of(second)

    assert error.reason == "TERM_MEMLIMIT"
    assert "Ask for more memory" in str(error)
    assert str(error.info) in str(error)
    assert results(first, third) == ["first", "third"]
    assert site.ran() == list(NAMES)


# bkill


@in_both_dialects
def test_the_calls_of_a_running_job_that_its_owner_kills_are_cancelled(site: Site) -> None:
    executor = site.executor()
    first, second, third = site.three(executor, site.gate.wait)
    running = site.held(executor)

    site.cluster.run("bkill", str(running.job_id))

    errors = [error_of(each) for each in (second, third)]
    assert {error.reason for error in errors} == {"TERM_OWNER"}
    assert {error.returncode for error in errors} <= {-signal.SIGINT, -signal.SIGTERM}
    assert {(error.job_id, error.node) for error in errors} == {(running.job_id, "h1")}
    assert all(str(error.info) in str(error) for error in errors)
    assert first.result() == "first"
    assert site.ran() == ["first", "second"]
    assert site.asked("bsub") == 1


@in_both_dialects
def test_the_calls_of_a_waiting_job_that_its_owner_kills_are_cancelled(site: Site) -> None:
    site.cluster.switch("no_dispatch")
    submitted = site.three(site.executor())
    [job] = site.await_jobs()

    site.cluster.run("bkill", f"{job.id}[1]")

    errors = [error_of(each) for each in submitted]
    assert {error.reason for error in errors} == {"TERM_OWNER" if site.is_ibms else "EXIT"}
    assert {error.job_id for error in errors} == {f"{job.id}[1]"}
    assert all("Exited" in str(error) for error in errors)
    assert site.ran() == []
    assert site.asked("bsub") == 1


@in_ibms
def test_the_word_that_lsf_has_for_a_kill_is_in_the_error(site: Site) -> None:
    executor = site.executor()
    _, second, third = site.three(executor, site.gate.wait)
    running = site.held(executor)

    site.cluster.run("bkill", "-r", str(running.job_id))

    errors = [error_of(each) for each in (second, third)]
    assert [error.reason for error in errors] == ["TERM_FORCE_OWNER"] * 2
    assert all("TERM_FORCE_OWNER: job killed by owner without time for cleanup" in str(e) for e in errors)
    assert site.ran() == ["first", "second"]


# What processes come to


@in_both_dialects
def test_what_ran_when_a_jobs_own_program_was_killed_has_failed(site: Site) -> None:
    executor = site.executor()
    first, second, third = site.three(executor, site.gate.wait)
    running = site.held(executor)
    assert running.pid is not None

    program_of(running.pid).kill()

    error = error_of(second)
    assert facts(error) == ("SIGKILL", -signal.SIGKILL)
    assert (error.job_id, error.node) == (running.job_id, "h1")
    assert "137" in str(error.info)
    assert str(error.info) in str(error)
    assert results(first, third) == ["first", "third"]
    assert site.ran() == list(NAMES)


def test_a_call_whose_process_is_killed_fails_at_once_and_alone(site: Site) -> None:
    executor = site.executor(parallel_calls_per_job=2)
    neighbour = executor.options(name="neighbour").submit(site.gate.wait, 1)
    killed = executor.submit(lambda: os.kill(os.getpid(), signal.SIGKILL))
    last = executor.submit(abs, -2)

    error = error_of(killed)

    assert facts(error) == ("SIGKILL", -signal.SIGKILL)
    assert (error.job_id, error.node) == (task(executor, "neighbour").job_id, "h1")
    assert not neighbour.done()
    site.gate.open()
    assert results(neighbour, last) == [1, 2]


@in_both_dialects
def test_a_job_that_leaves_before_it_begins_is_tried_three_times_and_its_exit_code_told(site: Site) -> None:
    submitted = site.three(site.executor(setup=["echo no luck here", "exit 3"]))

    errors = [error_of(each) for each in submitted]

    assert {facts(error) for error in errors} == {("EXIT", 3)}
    assert all("given to 3 jobs" in str(error) and "no luck here" in str(error) for error in errors)
    assert {error.job_id for error in errors} == {f"{site.cluster.jobs()[-1].id}[1]"}
    assert site.asked("bsub") == 3


# Hosts


@in_both_dialects
def test_what_ran_on_a_lost_host_has_failed_and_the_rest_runs_elsewhere(site: Site) -> None:
    executor = site.executor()
    first, second, third = site.three(executor, site.gate.wait)
    host = site.held(executor).host

    site.cluster.lose_host(str(host), given_up_s=0.2)

    error = error_of(second)
    assert facts(error) == ("HOST_LOST", None)
    assert error.node == host
    assert "another node" in str(error)
    assert results(first, third) == ["first", "third"]
    assert site.ran() == list(NAMES)
    assert [job.host for job in site.cluster.jobs()] == [host, "h2"]


@in_both_dialects
def test_a_host_that_is_silent_for_a_while_ends_nothing(site: Site) -> None:
    executor = site.executor()
    submitted = site.three(executor, site.gate.wait)
    host = str(site.held(executor).host)
    site.cluster.lose_host(host, processes="live", given_up_s=None)
    site.await_more("bjobs", 4)

    site.cluster.restore_host(host)
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)


def test_a_job_that_lsf_may_start_again_goes_on_after_its_host_was_lost(site: Site) -> None:
    executor = site.executor(rerunnable=True)
    submitted = site.three(executor, site.gate.wait)
    host = site.held(executor).host

    site.cluster.lose_host(str(host), given_up_s=0.2)
    site.gate.await_arrivals(2)
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == ["first", "second", "second", "third"]
    assert [(job.starts, job.host) for job in site.await_ended()] == [(2, "h2")]
    assert site.asked("bsub") == 1


def test_what_lives_on_where_a_host_was_given_up_does_nothing_more(site: Site) -> None:
    executor = site.executor()
    first, second, third = site.three(executor, site.gate.wait)
    running = site.held(executor)

    site.cluster.lose_host(str(running.host), processes="live", given_up_s=0.2)

    assert error_of(second).reason == "HOST_LOST"
    assert results(first, third) == ["first", "third"]
    pid = running.pid
    assert pid is not None
    wait_until(lambda: not is_alive(pid), "its process is gone")
    assert site.ran() == list(NAMES)


def test_calls_of_a_job_that_runs_twice_at_a_time_as_its_host_was_only_out_of_sight_end_once(
    site: Site,
) -> None:
    executor = site.executor(rerunnable=True)
    submitted = site.three(executor, site.gate.wait)
    host = str(site.held(executor).host)
    ended = [0, 0, 0]
    for place, future in enumerate(submitted):
        future.add_done_callback(lambda _, place=place: ended.__setitem__(place, ended[place] + 1))

    site.cluster.lose_host(host, processes="live", given_up_s=0.2)
    site.gate.await_arrivals(2)
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    executor.shutdown()
    site.await_ended()
    assert ended == [1, 1, 1]
    assert site.ran()[:3] == ["first", "second", "second"]
    assert site.asked("bsub") == 1


# What LSF says though it is not so, and what it does not say


@in_both_dialects
def test_a_killed_job_that_reads_done_has_not_done_its_calls(site: Site) -> None:
    executor = site.executor()
    first, second, third = site.three(executor, site.gate.wait)
    pid = site.held(executor).pid
    assert pid is not None
    site.cluster.switch("false_done", count=1)

    program_of(pid).kill()

    error = error_of(second)
    assert error.reason == "NO_EVIDENCE"
    assert "ended well" in str(error)
    assert results(first, third) == ["first", "third"]
    assert site.ran() == list(NAMES)


def test_a_job_that_reads_done_and_has_not_begun_is_not_taken_for_done(site: Site) -> None:
    once = site.folder / "once"
    site.cluster.switch("false_done", count=1)

    submitted = site.three(site.executor(setup=[f"[ -e {once} ] || {{ touch {once}; exit 3; }}"]))

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert site.asked("bsub") == 2


@in_both_dialects
def test_how_a_job_ended_that_bjobs_has_forgotten_its_history_tells(site: Site) -> None:
    executor = site.executor()
    first, second, third = site.three(executor, site.gate.wait)
    pid = site.held(executor).pid
    assert pid is not None
    site.cluster.switch("forget")

    program_of(pid).kill()

    error = error_of(second)
    assert facts(error) == ("SIGKILL", -signal.SIGKILL)
    assert "137" in str(error.info)
    site.cluster.clear_faults()
    assert results(first, third) == ["first", "third"]
    assert site.ran() == list(NAMES)


@in_both_dialects
def test_a_job_of_which_nobody_knows_anything_is_lost(site: Site) -> None:
    executor = site.executor()
    first, second, third = site.three(executor, site.gate.wait)
    running = site.held(executor)
    assert running.pid is not None
    site.cluster.switch("forget", history=True)

    program_of(running.pid).kill()

    error = error_of(second)
    assert facts(error) == ("LOST", None)
    assert (error.job_id, error.node) == (running.job_id, "h1")
    assert "not known to the scheduler any more" in str(error)
    site.cluster.clear_faults()
    assert results(first, third) == ["first", "third"]
    assert site.ran() == list(NAMES)


def test_who_has_killed_a_job_is_asked_until_there_is_an_answer(site: Site) -> None:
    executor = site.executor()
    _, second, third = site.three(executor, site.gate.wait)
    job_id = str(site.held(executor).job_id)
    site.cluster.switch("query_limit", programs=("bhist",), count=2)

    site.cluster.run("bkill", job_id)

    assert [error_of(each).reason for each in (second, third)] == ["TERM_OWNER"] * 2
    assert site.asked("bhist") == 3


def test_what_the_log_says_is_in_the_error(site: Site) -> None:
    executor = site.executor(setup=["echo an interesting message"])
    _, second, _ = site.three(executor, site.gate.wait)
    pid = site.held(executor).pid
    assert pid is not None

    program_of(pid).kill()

    error = error_of(second)
    assert "an interesting message" in str(error)
    assert "an interesting message" in Path(str(error.stdout_file)).read_text()
