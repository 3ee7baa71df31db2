"""A job that LSF starts once more goes on with the calls that have not ended, as the same job."""

from __future__ import annotations

from pathlib import Path

from tests.executors.batch.lsf_calls import (
    NAMES,
    Site,
    both_clusters,  # noqa: F401  a fixture, by another name
    error_of,
    in_both_dialects,
    program_of,
    results,
    site_of_tests,  # noqa: F401  likewise
)


def files(site: Site) -> list[str]:
    """The names of the files of records, and of the claims."""
    [array] = site.folder.glob("jobs0/fr-*")
    return sorted(path.name for path in array.iterdir() if path.name.startswith(("records-", "claim-")))


def line_that_leaves_once(place: Path, code: int) -> str:
    """Of sh."""
    return f"[ -e {place} ] || {{ touch {place}; exit {code}; }}"


@in_both_dialects
def test_a_job_that_somebody_requeues_goes_on_where_it_was(site: Site) -> None:
    executor = site.executor()
    submitted = site.three(executor, site.gate.wait)
    job_id = str(site.held(executor).job_id)

    site.cluster.run("brequeue", job_id)
    site.gate.await_arrivals(2)
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == ["first", "second", "second", "third"]
    assert [(f"{job.id}[{job.index}]", job.starts) for job in site.await_ended()] == [(job_id, 2)]
    assert files(site) == ["claim-0", "records-0.0", "records-0.1"]
    assert site.asked("bsub") == 1


@in_both_dialects
def test_a_job_that_is_requeued_again_and_again_goes_on_each_time(site: Site) -> None:
    executor = site.executor()
    submitted = site.three(executor, site.gate.wait)
    job_id = str(site.held(executor).job_id)
    for starts in (2, 3):
        site.cluster.run("brequeue", job_id)
        site.gate.await_arrivals(starts)

    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == ["first", "second", "second", "second", "third"]
    assert files(site) == ["claim-0", "records-0.0", "records-0.1", "records-0.2"]


def test_a_requeued_job_that_waits_for_its_turn_is_waited_for(site: Site) -> None:
    executor = site.executor(pending_timeout=1)
    submitted = site.three(executor, site.gate.wait)
    job_id = str(site.held(executor).job_id)
    site.cluster.switch("no_dispatch")

    site.cluster.run("brequeue", job_id)
    site.await_more("bjobs", 4)
    assert [job.state for job in site.cluster.jobs()] == ["PEND"]
    assert not any(future.done() for future in submitted[1:])
    site.cluster.clear_faults()
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.asked("bsub") == 1


@in_both_dialects
def test_a_requeued_job_that_is_killed_as_it_waits_ends_its_calls(site: Site) -> None:
    executor = site.executor()
    first, second, third = site.three(executor, site.gate.wait)
    job_id = str(site.held(executor).job_id)
    site.cluster.switch("no_dispatch")
    site.cluster.run("brequeue", job_id)
    site.cluster.wait_for(1, "PEND")

    site.cluster.run("bkill", job_id)

    errors = [error_of(each) for each in (second, third)]
    assert {error.job_id for error in errors} == {job_id}
    assert first.result() == "first"
    assert site.ran() == ["first", "second"]
    assert site.asked("bsub") == 1


def test_a_queue_may_start_jobs_again_for_the_code_that_they_leave_with(site: Site) -> None:
    leave = line_that_leaves_once(site.folder / "once", 99)

    submitted = site.three(site.executor(queue="requeue", setup=[leave]))

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert [job.starts for job in site.await_ended()] == [2]
    assert site.asked("bsub") == 1


def test_a_queue_may_do_so_in_the_middle_of_a_jobs_calls(site: Site) -> None:
    leave = line_that_leaves_once(site.folder / "once", 99)
    executor = site.executor(queue="requeue", teardown=[leave])
    submitted = site.three(executor, site.gate.wait)
    pid = site.held(executor).pid
    assert pid is not None

    program_of(pid).kill()
    site.gate.await_arrivals(2)
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == ["first", "second", "second", "third"]
    assert [job.starts for job in site.await_ended()] == [2]
    assert site.asked("bsub") == 1


def test_a_job_that_is_started_again_after_all_its_calls_have_ended_does_nothing(site: Site) -> None:
    leave = line_that_leaves_once(site.folder / "once", 99)

    assert results(*site.three(site.executor(queue="requeue", teardown=[leave]))) == list(NAMES)

    assert [(job.starts, job.state) for job in site.await_ended()] == [(2, "DONE")]
    assert site.ran() == list(NAMES)
