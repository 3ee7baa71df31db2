"""Whatever bsub says or does not say, an array is submitted once, or what is there twice runs once.

The cluster is told to hang, to be away, to lose replies; what a bsub of people's own scripts may do besides,
small programs in its place do here.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fractal_runner.testing import wait_until
from tests.clusters.lsf.seen import JobSeen
from tests.executors.batch.lsf_calls import (
    NAMES,
    Site,
    both_clusters,  # noqa: F401  a fixture, by another name
    error_of,
    in_both_dialects,
    in_ibms,
    results,
    script,
    site_of_tests,  # noqa: F401  likewise
)

REPLY_S = 0.5  # for which clients wait, where they wait in vain
READ = ("input=$0.$$ && cat >$input", 'try() { bsub "$@" <$input; }')


def names_of(jobs: Sequence[JobSeen]) -> set[str]:
    return {job.name.partition("[")[0] for job in jobs}


# Noise


@in_both_dialects
def test_lines_of_a_sites_own_around_bsubs_answer_do_not_matter(site: Site) -> None:
    site.cluster.switch("noise")

    assert results(*site.three(site.executor())) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert [job.id for job in site.cluster.jobs()] == [1]
    assert site.asked("bsub") == 1


@in_both_dialects
def test_what_people_have_set_for_their_own_eyes_does_not_matter(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"BSUB_QUIET": "Y", "LSB_BJOBS_FORMAT": "stat user", "LSB_NTRIES": "100"}.items():
        monkeypatch.setenv(name, value)
    executor = site.executor()
    submitted = site.three(executor, site.gate.wait)
    site.held(executor)
    site.await_more("bjobs", 2)
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert site.asked("bsub") == 1
    assert all(call.env.get("LSB_NTRIES") == "1" for call in site.cluster.calls())
    assert all({"BSUB_QUIET", "LSB_BJOBS_FORMAT"}.isdisjoint(call.env) for call in site.cluster.calls())


# Replies that are lost


@in_both_dialects
@pytest.mark.parametrize("how", ["killed", "silent"])
def test_an_array_whose_reply_was_lost_is_found_by_its_name(
    how: str, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.cluster.switch("lost_reply", how=how)

    with caplog.at_level(logging.WARNING, "fractal_runner"):
        assert results(*site.three(site.executor())) == list(NAMES)

    assert site.ran() == list(NAMES)
    assert site.asked("bsub") == 1
    assert len(site.cluster.jobs()) == 1
    assert "It is not known whether LSF has array fr-" in caplog.text


@in_both_dialects
def test_an_array_of_which_bsub_says_that_it_is_not_submitted_may_be_there_all_the_same(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.many(warm := site.executor(), 1)[0].result()  # so that what LSF it is, is known
    site.cluster.configure(reply_timeout_s=REPLY_S)
    site.cluster.hang()

    with caplog.at_level(logging.WARNING, "fractal_runner"):
        submitted = site.three(warm)
        wait_until(lambda: "Communication time out. Job not submitted." in caplog.text, "bsub has given up")
        site.cluster.resume()

        assert results(*submitted) == list(NAMES)

    assert site.ran() == ["0", *NAMES]
    assert site.asked("bsub") == 2
    assert len(site.cluster.jobs()) == 2


@pytest.mark.parametrize("starts", ["one after the other", "all at once"])
def test_of_arrays_that_a_hanging_daemon_has_taken_several_times_one_is_kept(site: Site, starts: str) -> None:
    bsub = script(site.folder / "bin" / "submit", *READ, 'try "$@" || try "$@" || try "$@"')
    site.cluster.configure(reply_timeout_s=REPLY_S)
    if starts == "one after the other":
        site.cluster.switch("no_dispatch")
    site.cluster.hang()
    submitted = site.three(site.executor(bsub_cmd=str(bsub)))
    wait_until(
        lambda: sum(call.returncode == 255 for call in site.cluster.calls("bsub")) == 3, "it has given up"
    )

    site.cluster.resume()
    jobs = site.await_jobs(3)
    wait_until(
        lambda: [job.state for job in site.cluster.jobs()].count("EXIT") == 2 or starts == "all at once",
        "the others are killed",
    )
    site.cluster.clear_faults()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert len(jobs) == 3
    assert len(names_of(jobs)) == 1
    if starts == "one after the other":
        assert [job.starts for job in site.await_ended()] == [1, 0, 0]
        [kill] = site.cluster.calls("bkill")
        assert kill.argv == ("2[1]", "3[1]")


def test_what_comes_after_it_was_given_up_does_nothing(site: Site) -> None:
    """A request that was on its way, when the executor found nothing and submitted it once more."""
    late = site.folder / "late"
    keep = f'printf "%s\\n" "$@" >{late}.words; cp $input {late}; exit 255'
    bsub = script(site.folder / "bin" / "submit", *READ, f"[ -e {late} ] || {{ {keep}; }}", 'try "$@"')
    submitted = site.three(site.executor(bsub_cmd=str(bsub)), site.gate.wait)
    site.gate.await_arrivals(1)

    words = Path(f"{late}.words").read_text().splitlines()
    site.cluster.run("bsub", *words, input=late.read_text())
    site.cluster.wait_for(2, "EXIT", "DONE")
    site.gate.open()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert len(names_of(site.cluster.jobs())) == 2  # each submission has its own name
    assert len(list(site.folder.glob("jobs0/fr-*"))) == 1


def test_a_site_that_submits_a_job_of_its_own_besides_is_not_taken_by_its_word(site: Site) -> None:
    other = "echo 'sleep 100' | bsub -o /dev/null -J theirs"
    bsub = script(site.folder / "bin" / "submit", *READ, 'try "$@"', other)
    submitted = site.three(site.executor(bsub_cmd=str(bsub)))

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)
    ours, theirs = site.cluster.jobs()
    assert (ours.starts, theirs.name, theirs.state) == (1, "theirs", "RUN")


# Daemons that are away


@in_both_dialects
@pytest.mark.parametrize("what", ["mbatchd", "all"])
def test_calls_that_come_while_the_daemons_are_away_run_when_they_are_back(what: str, site: Site) -> None:
    site.cluster.crash(what)  # type: ignore[arg-type]
    submitted = site.three(site.executor())
    site.await_more("bjobs", 2)

    site.cluster.resume()

    assert results(*submitted) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert len(site.cluster.jobs()) == 1


@in_both_dialects
def test_calls_of_which_no_daemon_is_told_within_the_time_for_it_are_not_submitted(site: Site) -> None:
    site.cluster.crash()

    errors = [error_of(each) for each in site.three(site.executor(submission_timeout=1))]

    assert {error.reason for error in errors} == {"NOT_SUBMITTED"}
    assert all("Connection refused by server" in str(error) for error in errors)
    assert {error.job_id for error in errors} == {None}
    site.cluster.resume()
    assert site.cluster.jobs() == []
    assert list(site.folder.glob("jobs0/fr-*")) == []


def test_what_a_hanging_daemon_was_asked_for_does_nothing_once_its_calls_have_failed(site: Site) -> None:
    site.cluster.configure(reply_timeout_s=REPLY_S)
    site.cluster.hang()
    errors = [error_of(each) for each in site.three(site.executor(submission_timeout=1))]

    site.cluster.resume()
    [job] = site.await_jobs()
    site.await_ended()

    assert {error.reason for error in errors} == {"NOT_SUBMITTED"}
    assert all("Communication time out" in str(error) for error in errors)
    assert job.id == 1
    assert site.ran() == []


def test_a_command_that_takes_too_long_is_ended_and_the_error_says_so(site: Site) -> None:
    site.cluster.switch("slow", seconds=20.0, programs=("bsub", "bjobs"))
    site.cluster.switch("no_dispatch")
    executor = site.executor(command_timeout=0.5, submission_timeout=1)

    errors = [error_of(each) for each in site.three(executor)]

    assert {error.reason for error in errors} == {"NOT_SUBMITTED"}
    assert all("did not answer within 0.5 s" in str(error) for error in errors)
    site.cluster.clear_faults()
    site.await_ended()
    assert site.ran() == []


def test_an_array_whose_bsub_took_too_long_is_found(site: Site) -> None:
    site.cluster.switch("slow", seconds=20.0, programs=("bsub",))

    assert results(*site.three(site.executor(command_timeout=1))) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert len(site.cluster.jobs()) == 1


# Refusals


@in_both_dialects
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queue": "nosuch"}, "nosuch: No such queue. Job not submitted."),
        ({"queue": "closed"}, "closed: Queue has been closed. Job not submitted."),
        ({"cores": 1000}, "Too many processors requested. Job not submitted."),
        ({"resource_requirements": "nosection[mem]"}, "Bad resource requirement syntax. Job not submitted."),
        ({"bsub_extra": ["-m", "nosuch"]}, "nosuch: Bad host name"),
    ],
    ids=["no such queue", "closed queue", "too many slots", "bad requirement", "no such host"],
)
def test_what_lsf_refuses_fails_at_once_in_its_words(
    options: dict[str, object], said: str, site: Site
) -> None:
    errors = [error_of(each) for each in site.three(site.executor(**options))]

    assert {error.reason for error in errors} == {"REFUSED"}
    assert all(said in str(error.info) and said in str(error) for error in errors)
    assert site.asked("bsub") == 1
    assert site.cluster.jobs() == []


@in_ibms
def test_an_array_that_is_too_large_for_ibms_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # All of them are to be one array, however busy this machine is.
    for name, seconds in {"_GATHER_S": 2.0, "_GATHER_LIMIT_S": 60.0, "_GATHER_BUSY_S": 60.0}.items():
        monkeypatch.setattr(f"fractal_runner.executors.batch.submitting.{name}", seconds)
    executor = site.executor(calls_per_job=1, max_jobs=2000, max_array=2000)

    errors = {error_of(each) for each in site.many(executor, 1001)}

    assert {error.reason for error in errors} == {"REFUSED"}
    assert all("Job array index too large" in str(error) for error in errors)
    assert site.asked("bsub") == 1


def test_a_limit_that_others_jobs_reach_is_waited_for(site: Site) -> None:
    site.cluster.switch("refuse", count=2)

    assert results(*site.three(site.executor())) == list(NAMES)
    assert site.ran() == list(NAMES)
    assert site.asked("bsub") == 3


def test_a_command_that_is_not_there_is_told_with_what_can_be_done(site: Site) -> None:
    missing = f"{site.folder}/nowhere/bsub"

    errors = [error_of(each) for each in site.three(site.executor(bsub_cmd=missing))]

    assert {error.reason for error in errors} == {"REFUSED"}
    assert all(f"{missing} was not found: is this a login node of LSF?" in str(error) for error in errors)
    assert all("`bsub_cmd`" in str(error) for error in errors)


def test_no_lsf_at_all_is_told_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(str(shutil.which("sh"))).parent))
    since = time.monotonic()

    error = error_of(site.executor().submit(abs, -1))

    assert error.reason == "REFUSED"
    assert "login node of LSF" in str(error)
    assert time.monotonic() - since < 30


# Arrays


def test_arrays_have_as_many_jobs_as_the_site_allows(site: Site) -> None:
    submitted = site.many(site.executor(calls_per_job=1, max_array=3), 10)

    assert results(*submitted) == list(range(10))
    assert sorted(site.ran(), key=int) == [str(number) for number in range(10)]
    assert site.asked("bsub") == 4
    assert sorted(job.index for job in site.cluster.jobs()) == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@in_both_dialects
def test_an_array_that_lsf_takes_for_one_plain_job_does_nothing_and_the_error_says_what_to_set(
    site: Site,
) -> None:
    site.cluster.switch("array_as_job")
    executor = site.executor(calls_per_job=1, max_jobs=2000, max_array=2000)

    errors = {error_of(each) for each in site.many(executor, 1001)}

    assert {error.reason for error in errors} == {"NOT_AN_ARRAY"}
    assert all("`max_array`" in str(error) for error in errors)
    assert site.ran() == []
    assert {job.index for job in site.cluster.jobs()} == {0}
