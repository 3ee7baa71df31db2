"""Jobs run where their calls were submitted, if they can, and leave files in the executor's folder alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.executors.batch.lsf_calls import (
    NAMES,
    Site,
    both_clusters,  # noqa: F401  a fixture, by another name
    error_of,
    in_both_dialects,
    results,
    site_of_tests,  # noqa: F401  likewise
)

# What is around the output of a job, in the reports that LSF writes or sends.
OF_REPORTS = ("Sender: LSF", "Subject: Job", "Your job looked like", "Resource usage summary", "# LSBATCH")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, which this process works in."""
    place = tmp_path / "work ' $HOME"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def logs(site: Site) -> str:
    """What all jobs have printed."""
    return "\n".join(path.read_text() for path in sorted(site.folder.glob("jobs*/fr-*/job-*.log")))


@in_both_dialects
def test_calls_run_where_they_were_submitted(work: Path, site: Site) -> None:
    site.cluster.switch("no_directory")  # of itself, LSF starts them in /tmp then

    [place] = results(site.executor().submit(os.getcwd))

    assert place == str(work)
    assert {job.execution_cwd for job in site.cluster.jobs()} == {"/tmp"}


def test_calls_whose_directory_is_not_there_run_in_their_jobs_and_its_log_says_so(
    work: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.cluster.switch("no_dispatch")
    future = site.executor().submit(os.getcwd)
    site.await_jobs()
    monkeypatch.chdir(site.folder)
    work.rmdir()
    site.cluster.clear_faults()

    [place] = results(future)

    [array] = site.folder.glob("jobs0/fr-*")
    assert place == str(array)
    assert f"{work} is not there on this host: the job runs in {array}" in logs(site)


def test_hosts_that_do_not_see_the_folder_are_named_as_what_may_be_wrong(site: Site) -> None:
    executor = site.executor(path_map={str(site.folder): "/nonexistent"})

    errors = [error_of(each) for each in site.three(executor)]

    assert {(error.reason, error.returncode) for error in errors} <= {("EXIT", 2), ("EXIT", 127)}
    assert all("given to 3 jobs, and none of them started it" in str(error) for error in errors)
    assert all("It has printed nothing: do its nodes see " in str(error) for error in errors)
    assert site.asked("bsub") == 3


def test_a_python_that_is_not_there_is_in_the_error(site: Site) -> None:
    error = error_of(site.executor(python="/nonexistent/python").submit(abs, -1))

    assert (error.reason, error.returncode) == ("EXIT", 127)
    assert "given to 3 jobs" in str(error)
    assert "/nonexistent/python" in str(error)


@in_both_dialects
def test_logs_have_what_jobs_print_and_nothing_of_lsfs(site: Site) -> None:
    executor = site.executor(setup=["echo before"], teardown=["echo after >&2"])
    assert results(*site.three(executor)) == list(NAMES)
    site.await_ended()

    printed = logs(site)

    assert printed.split() == ["before", "after"]
    assert not any(words in printed for words in OF_REPORTS)


@in_both_dialects
def test_nothing_is_left_anywhere_else(
    work: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    there = set(tmp_path.iterdir())
    executor = site.executor(setup=["echo to be printed"])
    assert results(*site.three(executor)) == list(NAMES)
    site.await_ended()

    assert list(home.iterdir()) == []
    assert list(work.iterdir()) == []
    assert {path.name for path in set(tmp_path.iterdir()) - there} == {"jobs0", "runs"}
    [array] = site.folder.glob("jobs0/*")
    assert array.stat().st_mode & 0o077 == 0


def test_a_folder_may_have_any_name(site: Site) -> None:
    folder = site.folder / 'it\'s "my" folder; echo $HOME `id` *'

    assert results(*site.three(site.executor(folder))) == list(NAMES)
    assert site.ran() == list(NAMES)
