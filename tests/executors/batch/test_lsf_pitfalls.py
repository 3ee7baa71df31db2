"""What sites, users and slow daemons can have LSF's scheduler stumble over."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.executors.batch.lsf_options import OPTIONS, requirement
from fractal_runner.executors.batch.lsf_scheduler import LsfScheduler
from fractal_runner.executors.batch.lsf_submission import UNITS, MemoryTerms, bsub_words
from fractal_runner.executors.batch.lsf_words import Dialect
from fractal_runner.executors.batch.scheduler import (
    Cause,
    JobState,
    PartlyExplainedError,
    SchedulerError,
    SubmissionRefusedError,
)
from tests.executors.batch.lsf_recorded import (
    DOWN,
    IBM,
    OPEN,
    SUBMITTED,
    Recorded,
    array_request,
    fields,
    long,
    row,
    rows,
)
from tests.executors.batch.test_lsf_jobs import CODE_3, CODE_130, KILLED, named
from tests.executors.batch.test_lsf_options import balances
from tests.executors.batch.test_lsf_script import Site

LOST = JobState.LOST


def words_for(extra: Any, **request: Any) -> list[str]:
    terms = MemoryTerms(UNITS["MB"], UNITS["MB"], "host")
    return bsub_words(
        array_request(Path("/x"), **request),
        OPTIONS.parse(extra),
        dialect=Dialect.IBM,
        memory=terms,
        rerunnable=False,
    )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path)
    monkeypatch.chdir(site.workplace)
    return site


# What would give wrong results.


@pytest.mark.parametrize("own", [["span[ptile=1]", "span[hosts=1]"], ["span[ptile=1]", "span[ptile=8]"]])
def test_the_hosts_are_those_of_the_span_that_counts(own: list[str]) -> None:
    words = words_for({"resource_requirements": own}, cpus=8, memory=8 * 1024**3)
    assert words[words.index("-M") + 1] == "8192"  # one host has it all


@pytest.mark.parametrize("dialect", [OPEN, IBM])
def test_an_id_that_has_gone_to_a_smaller_array_is_lost(dialect: Any) -> None:
    said = rows(row(12, "other[1]")) if dialect is OPEN else (0, fields(12, 1, "other"), "")
    states = LsfScheduler(run=Recorded(lsid=dialect, bjobs=said)).states(named("12[1]", "12[2]"))
    assert [states[job].state for job in ("12[1]", "12[2]") if job in states] == [LOST, LOST]


def test_nothing_of_an_array_is_ended_whose_id_is_anothers() -> None:
    run = Recorded(bjobs=rows(row(12, "other[1]")), bkill=KILLED)
    LsfScheduler(run=run).cancel(named("12[2]"))
    assert "bkill" not in run.kinds


def test_an_id_that_was_ours_is_not_ended_when_it_is_seen_to_be_anothers(tmp_path: Path) -> None:
    run = Recorded(bsub=SUBMITTED, bjobs=rows(row(12, "other[1]")), bkill=KILLED)
    scheduler = LsfScheduler(run=run)
    scheduler.submit(array_request(tmp_path))
    assert scheduler.states(named("12[1]"))["12[1]"].state is LOST
    scheduler.cancel(named("12[1]"))
    assert "bkill" not in run.kinds


def test_a_memory_limit_is_not_guessed_where_the_family_is_not_known(tmp_path: Path) -> None:
    run = Recorded(lsid=DOWN, bjobs_version=DOWN, bsub=SUBMITTED)
    with pytest.raises(SchedulerError):  # to be tried again; 4 (MB) would be 4 KB on IBM's
        LsfScheduler(run=run).submit(array_request(tmp_path, memory=4 * 1024**2))


def test_an_array_with_gpus_is_not_refused_for_a_family_that_is_not_known(tmp_path: Path) -> None:
    run = Recorded(lsid=DOWN, bjobs_version=DOWN, bsub=SUBMITTED)
    try:
        LsfScheduler(run=run).submit(array_request(tmp_path, gpus=1))
    except SubmissionRefusedError:
        raise
    except SchedulerError:
        pass


def test_one_question_is_read_as_it_was_asked() -> None:
    answers = iter([DOWN, IBM])
    run = Recorded(lsid=lambda _: next(answers), bjobs_version=None, bjobs=rows(row(12, "fr-1[1]")))
    assert LsfScheduler(run=run).states(named("12[1]"))["12[1]"].state is JobState.RUNNING


@pytest.mark.parametrize("variables", [{"number": "7"}, {"LSB_JOBINDEX": "9"}, {"LSB_JOBID": "7"}])
def test_no_variable_of_a_user_changes_which_job_it_is(variables: dict[str, str], site: Site) -> None:
    site.submit(env=variables)
    assert site.run() == 0
    assert site.seen["words"][5:7] == ["2", "12[3]"]


@pytest.mark.parametrize("option", ["setup", "teardown"])
@pytest.mark.parametrize("line", ["number=7", "code=0"])
def test_no_variable_of_the_setup_changes_a_job(line: str, option: str, site: Site) -> None:
    site.submit(**{option: [line]})
    assert site.run(WORKER_CODE="5") == 5
    assert site.seen["words"][5] == "2"


def test_commands_may_have_words_of_their_own() -> None:
    run = Recorded(bjobs=rows(row(12, "fr-1[1]")))
    LsfScheduler(run=run, bjobs_cmd="/opt/bjobs -u me").states(named("12[1]"))
    assert run.commands[0] == ["/opt/lsid"]


@pytest.mark.parametrize("bhist", [subprocess.TimeoutExpired("bhist", 60), DOWN, (0, "", "")])
def test_what_bjobs_has_explained_is_kept_if_bhist_does_not_answer(bhist: Any) -> None:
    said = long("12[1]", "fr-1", CODE_3) + long("12[2]", "fr-1", CODE_130)
    run = Recorded(bjobs_long=(0, said, ""), bhist=bhist)
    with pytest.raises(PartlyExplainedError) as caught:
        LsfScheduler(run=run).explain(named("12[1]", "12[2]"))
    assert caught.value.answers["12[1]"].returncode == 3


@pytest.mark.parametrize("answer", [None, (255, "", "Permission denied (publickey).\n")])
def test_no_answer_explains_nothing(answer: Any) -> None:
    with pytest.raises(SchedulerError):
        LsfScheduler(run=Recorded(bjobs_long=answer, bhist=answer)).explain(named("12[1]"))


def test_one_refused_command_does_not_keep_the_other_jobs_alive(tmp_path: Path) -> None:
    denied = (255, "", "Job <12[2]>: User permission denied\n")
    run = Recorded(bsub=SUBMITTED, bkill=denied)
    scheduler = LsfScheduler(run=run)
    scheduler.submit(array_request(tmp_path, count=9000))
    with pytest.raises(SchedulerError):
        scheduler.cancel(named(*(f"12[{2 * n}]" for n in range(1, 4500))))
    assert len(run.of("bkill")) == 2


def test_a_row_of_ours_that_cannot_be_read_is_not_no_array(tmp_path: Path) -> None:
    cut = row(12, "fr-1[1]").replace(" Nov 21 00:08", "")
    run = Recorded(bjobs=rows(row(11, "other"), cut))
    with pytest.raises(SchedulerError):  # [] would have it submitted again
        LsfScheduler(run=run).find(array_request(tmp_path))


def test_an_answer_that_breaks_off_is_not_no_array(tmp_path: Path) -> None:
    run = Recorded(bjobs=(255, rows(row(11, "other"))[1], DOWN[2]))
    with pytest.raises(SchedulerError):
        LsfScheduler(run=run).find(array_request(tmp_path))


@pytest.mark.parametrize("said", ["No job found\n", "No matching job found\n"])
def test_jobs_that_lsf_finds_none_of_are_lost(said: str) -> None:
    states = LsfScheduler(run=Recorded(bjobs=(255, "", said))).states(named("12[1]"))
    assert [status.state for status in states.values()] == [LOST]


def test_the_settings_of_our_commands_are_not_those_of_jobs(tmp_path: Path) -> None:
    """bsub copies its environment into the job: LC_ALL=C and LSB_NTRIES=1 reach each task."""
    run = Recorded(bsub=SUBMITTED)
    LsfScheduler(run=run).submit(array_request(tmp_path))
    script = (tmp_path / "job.sh").read_text()
    assert "LC_ALL" not in run.options[-1]["env"] or "LC_ALL" in script


# What must not be let through.


@pytest.mark.parametrize("word", ["-Jx", "-qlong", "-W10", "-n4", "-M100", "-oX", "-Rselect[a]", "-Pp"])
def test_what_is_the_executors_own_is_so_in_one_word_too(word: str) -> None:
    with pytest.raises(ValueError, match="is the executor's own"):
        OPTIONS.parse({"bsub_extra": [word]})


@pytest.mark.parametrize("word", ["-", "--"])
def test_nothing_ends_the_options(word: str) -> None:
    with pytest.raises(ValueError):
        OPTIONS.parse({"bsub_extra": ["-x", word, "rm"]})


@pytest.mark.parametrize("text", ["]x[", "select[a]]x["])
def test_brackets_have_an_order(text: str) -> None:
    with pytest.raises(ValueError):
        OPTIONS.parse({"resource_requirements": text})


@pytest.mark.parametrize("host", ["n[1", "n[1,3]", "n[1-3]", "a'b", "n1']"])
def test_a_host_to_avoid_is_a_hosts_name(host: str) -> None:
    with pytest.raises(ValueError):
        made = requirement([], excluded=OPTIONS.parse({"exclude": host})["exclude"])
        assert balances(made), made


def test_an_empty_command_is_an_error_at_once() -> None:
    with pytest.raises(ValueError):
        LsfScheduler(bjobs_cmd="")


@pytest.mark.parametrize(
    "extra", [{"bsub_extra": ["-app", "gpuapp"]}, {"resource_requirements": "select[!nogpu]"}]
)
def test_gpus_are_asked_for_whatever_else_has_gpu_in_its_name(extra: Any) -> None:
    assert "-gpu" in words_for(extra, gpus=2)


# What is said of it.


@pytest.mark.parametrize(("unit", "near"), [("mb", "MB"), ("Mb", "MB"), ("gb", "GB"), ("G", "GB")])
def test_the_nearest_unit_is_named(unit: Any, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        LsfScheduler(memory_unit=unit)


def test_a_command_that_is_not_there_is_said_at_once_whatever_an_array_asks_for(tmp_path: Path) -> None:
    run = Recorded(lsid=None, bjobs_version=None, bsub=None)
    with pytest.raises(SubmissionRefusedError, match="bjobs was not found: is this a login node"):
        LsfScheduler(run=run).submit(array_request(tmp_path, memory=4 * 1024**2))


def test_a_job_that_was_removed_by_force_was_ended_by_people() -> None:
    """bkill -r: bjobs has no more to say of it than of one whose host was lost."""
    forced = "Signal <KILL> requested by user or administrator <ada>;"
    said = long("12[1]", "fr-1", "Exited")
    bhist = long("12[1]", "fr-1", forced, "Exited", status=None)
    states = LsfScheduler(run=Recorded(bjobs_long=(0, said, ""), bhist=(0, bhist, ""))).explain(
        named("12[1]")
    )
    assert states["12[1]"].reason == "TERM_OWNER"


def test_an_lsf_of_ibms_that_has_no_fields_is_asked_as_the_others_are() -> None:
    usage = (255, "", "bjobs: illegal option -- o\nUsage: bjobs [-h] [-V] [-w |-l] [-a]\n")
    answers = iter([usage, rows(row(12, "fr-1[1]")), rows(row(12, "fr-1[1]"))])
    run = Recorded(lsid=(0, "Platform LSF 8.0.1.0, Jun 15 2011\n", ""), bjobs=lambda _: next(answers))
    scheduler = LsfScheduler(run=run)
    for _ in range(2):
        assert scheduler.states(named("12[1]"))["12[1]"].state is JobState.RUNNING
    assert [words[1] for words in run.of("bjobs")] == ["-noheader", "-w", "-w"]


def test_an_array_that_was_taken_as_a_job_is_ended(tmp_path: Path) -> None:
    run = Recorded(bsub=SUBMITTED, bjobs=rows(row(12, "fr-1[1-3]")), bkill=KILLED)
    scheduler = LsfScheduler(run=run)
    ids = scheduler.submit(array_request(tmp_path, count=3))
    states = scheduler.states(named(*ids))
    assert {(status.reason, status.cause) for status in states.values()} == {("NOT_AN_ARRAY", Cause.REFUSED)}
    assert run.of("bkill") == [["bkill", "12"]]
