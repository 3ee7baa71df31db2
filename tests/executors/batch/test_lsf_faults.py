"""While LSF says nothing of jobs, or nonsense, nothing is given up: calls go on, and end as they do.

How jobs end has a module of its own, and so have submissions, requeued jobs, and what is stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest

from fractal_runner.testing import wait_until
from tests.clusters.lsf import LsfCluster
from tests.executors.batch.lsf_calls import (
    LOST_S,
    NAMES,
    Site,
    both_clusters,  # noqa: F401  a fixture, by another name
    error_of,
    in_both_dialects,
    results,
    site_of_tests,  # noqa: F401  likewise
    task,
)

# What befalls those who ask, by its name; until faults are cleared and the daemons are back.
SILENCE: dict[str, Callable[[LsfCluster], None]] = {
    "the daemon is down": LsfCluster.crash,
    "all daemons are down": lambda cluster: cluster.crash("all"),
    "the daemon hangs": LsfCluster.hang,
    "too many ask": lambda cluster: cluster.switch("query_limit"),
    "bjobs is empty": lambda cluster: cluster.switch("bjobs_empty"),
    "bjobs has a header alone": lambda cluster: cluster.switch("bjobs_empty", header=True),
}
NONSENSE: dict[str, Callable[[LsfCluster], None]] = {
    "asks for patience before it answers": lambda cluster: cluster.switch("please_wait"),
    "exit codes say the opposite": lambda cluster: cluster.switch("wrong_exit_codes"),
    "columns are shifted": lambda cluster: cluster.switch("shifted_columns"),
    "the host is silent": lambda cluster: cluster.switch("unknown"),
}


def await_more_than_patience(site: Site) -> None:
    """Until bjobs was called for longer than a job may be unknown."""
    site.await_more("bjobs", 1)
    until = time.monotonic() + 1.5 * LOST_S
    wait_until(lambda: time.monotonic() > until, "it went on for long")
    site.await_more("bjobs", 1)


# Each dialect has its own words for it, which the other's parsers would not miss; and only one has a header.
@pytest.mark.parametrize(
    ("site", "what"),
    [
        ("openlava", "the daemon is down"),
        ("ibm", "all daemons are down"),
        ("openlava", "the daemon hangs"),
        ("ibm", "too many ask"),
        ("openlava", "bjobs is empty"),
        ("ibm", "bjobs is empty"),
        ("openlava", "bjobs has a header alone"),
    ],
    indirect=["site"],
)
def test_as_long_as_lsf_does_not_answer_nothing_is_given_up_and_results_arrive(what: str, site: Site) -> None:
    later = site.executor()
    last = later.options(name="last").submit(site.gate.wait, "last")
    executor = site.executor()
    submitted = site.three(executor)
    results(*submitted)
    task(later, "last")
    site.cluster.configure(reply_timeout_s=0.5)

    SILENCE[what](site.cluster)
    await_more_than_patience(site)
    assert not last.done()
    site.gate.open()

    assert results(last, *submitted) == ["last", *NAMES]
    site.cluster.clear_faults()
    site.cluster.resume()
    assert site.ran() == list(NAMES)
    assert site.asked("bsub") == 2


@pytest.mark.parametrize(
    ("site", "what"),
    [
        ("ibm", "asks for patience before it answers"),
        ("openlava", "exit codes say the opposite"),
        ("ibm", "exit codes say the opposite"),
        ("openlava", "columns are shifted"),
        ("openlava", "the host is silent"),
    ],
    indirect=["site"],
)
def test_what_bjobs_says_besides_or_wrongly_ends_nothing(what: str, site: Site) -> None:
    NONSENSE[what](site.cluster)
    executor = site.executor()
    submitted = site.three(executor, site.gate.wait)
    site.held(executor)

    await_more_than_patience(site)
    assert not any(future.done() for future in submitted[1:])
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert site.asked("bsub") == 1
    assert site.asked("bkill") == 0


@in_both_dialects
def test_a_silent_host_that_comes_back_has_run_on(site: Site) -> None:
    executor = site.executor()
    submitted = site.three(executor, site.gate.wait)
    site.held(executor)
    site.cluster.switch("unknown")
    site.await_more("bjobs", 2)

    site.cluster.clear_faults()
    site.await_more("bjobs", 2)
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)


def test_that_lsf_does_not_answer_is_told_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    executor = site.executor()
    submitted = site.three(executor, site.gate.wait)
    site.held(executor)
    site.cluster.crash()

    with caplog.at_level(logging.WARNING, "fractal_runner"):
        site.await_more("bjobs", 4)
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    said = [record.getMessage() for record in caplog.records if "refused by server" in record.getMessage()]
    assert len(said) == 1


def test_all_jobs_are_asked_about_together(site: Site) -> None:
    executor = site.executor(calls_per_job=1, max_array=2)
    submitted = [executor.submit(site.gate.wait, number) for number in range(6)]
    site.gate.await_arrivals(6)

    site.await_more("bjobs", 2)
    site.gate.open()

    assert results(*submitted) == list(range(6))
    assert {call.argv[-3:] for call in site.cluster.calls("bjobs")[-2:]} == {("1", "2", "3")}


# Jobs that are held


@in_both_dialects
def test_a_suspended_job_is_waited_for(site: Site) -> None:
    """Also while it waits until LSF lets it go on."""
    site.cluster.configure(resume_s=1.0)
    executor = site.executor()
    submitted = site.three(executor, site.gate.wait)
    job_id = str(site.held(executor).job_id)
    site.cluster.run("bstop", job_id)
    site.gate.open()
    await_more_than_patience(site)
    assert [job.state for job in site.cluster.jobs()] == ["USUSP"]
    assert not submitted[1].done()

    site.cluster.run("bresume", job_id)

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert site.asked("bkill") == 0


@in_both_dialects
def test_a_job_that_is_held_before_it_starts_is_given_up_if_so_asked_for(site: Site) -> None:
    executor = site.executor(bsub_extra=["-H"], pending_timeout=1)

    errors = [error_of(each) for each in site.three(executor)]

    assert {(error.reason, error.job_id) for error in errors} == {("PSUSP", "1[1]")}
    assert all("It was cancelled" in str(error) for error in errors)
    [job] = site.await_ended()
    assert (job.state, job.starts) == ("EXIT", 0)
    assert site.ran() == []


@in_both_dialects
def test_a_job_that_is_held_before_it_starts_is_waited_for_otherwise(site: Site) -> None:
    submitted = site.three(site.executor(bsub_extra=["-H"]))
    site.await_jobs()
    await_more_than_patience(site)
    assert not any(future.done() for future in submitted)

    site.cluster.run("bresume", "1")

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)


def test_a_job_that_waits_for_its_turn_is_waited_for_however_long(site: Site) -> None:
    site.cluster.switch("no_dispatch")
    submitted = site.three(site.executor(pending_timeout=1))
    site.await_jobs()
    await_more_than_patience(site)
    assert not any(future.done() for future in submitted)

    site.cluster.clear_faults()

    assert results(*submitted) == list(NAMES)


# All at once


def test_many_calls_in_many_jobs_run_once_each_whatever_bjobs_says_meanwhile(site: Site) -> None:
    for fault in ("please_wait", "wrong_exit_codes", "shifted_columns", "noise", "unknown"):
        site.cluster.switch(fault)
    submitted = site.many(site.executor(calls_per_job=10, parallel_calls_per_job=2), 100)

    assert results(*submitted) == list(range(100))
    assert sorted(map(int, site.ran())) == list(range(100))
    assert site.asked("bsub") == 1
