"""What LSF says to a submission is understood, and an array whose submission had no answer is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal_runner.executors.batch import lsf_words as words
from fractal_runner.executors.batch.lsf_scheduler import LsfScheduler
from fractal_runner.executors.batch.scheduler import SchedulerError, SubmissionRefusedError
from tests.executors.batch.lsf_recorded import (
    DOWN,
    IBM,
    NONE_FOUND,
    OPEN,
    SUBMITTED,
    Answer,
    Given,
    Recorded,
    array_request,
    fields,
    row,
    rows,
)

IDS = ["12[1]", "12[2]", "12[3]"]

# What becomes of a submission.


@pytest.mark.parametrize(
    "answer",
    [
        SUBMITTED,
        (0, "Job <12> is submitted to default queue <normal>.\n", ""),
        (0, "", "Job <12> is submitted to queue <normal>.\n"),
        (0, "** Welcome! Job <x> **\nYour project: <7>\nJob <12> is submitted to queue <q>.\nBye 99.\n", ""),
        (0, "Job <12> is submitted to queue <q>.", "LSF is processing your request. Please wait...\n"),
        (255, "Job <12> is submitted to queue <q>.\n", ""),
        (127, "Job <12> is submitted to queue <q>.\n", "post-submission hook: not found\n"),
        (0, "Job <12> is submitted to queue <q>.\nJob <12> is submitted to queue <q>.\n", ""),
    ],
)
def test_an_array_that_was_submitted_has_its_id_in_the_answer(answer: Given, tmp_path: Path) -> None:
    assert LsfScheduler(run=Recorded(bsub=answer)).submit(array_request(tmp_path)) == IDS


REFUSALS = [
    "nosuch: No such queue. Job not submitted.",
    "Too many processors requested. Job not submitted.",
    "Bad resource requirement syntax. Job not submitted.",
    "Bad job name. Job not submitted.",
    "User permission denied. Job not submitted.",
    "No command is specified. Job not submitted.",
    "LSF is processing your request. Please wait...\nnosuch: No such queue. Job not submitted.",
    "bsub: illegal option -- g\nUsage: bsub [-h] [-V] [-x]",
]
NO_REFUSALS = [
    "Failed in an LSF library call: Communication time out. Job not submitted.",
    "Failed in an LSF library call: LIM is down; try later. Job not submitted.",
    "Connection refused by server. Job not submitted.",
    "LSF is down. Please wait...",
    "Batch system concurrent query limit exceeded",
    "Request from a non-LSF host rejected",
    "ssh: connect to host login1 port 22: Connection refused",
    "Permission denied (publickey).",
    "",
]


@pytest.mark.parametrize("stderr", REFUSALS)
def test_a_refused_array_is_an_error_with_bsubs_words(stderr: str, tmp_path: Path) -> None:
    run = Recorded(bsub=(255, "", f"{stderr}\n"))
    with pytest.raises(SubmissionRefusedError, match=r"^LSF has refused array fr-1: ") as caught:
        LsfScheduler(run=run).submit(array_request(tmp_path))
    assert stderr.splitlines()[-1] in str(caught.value)
    assert "Please wait" not in str(caught.value)


@pytest.mark.parametrize("stderr", NO_REFUSALS)
@pytest.mark.parametrize("code", [0, 255])
def test_a_submission_of_which_nobody_knows_is_no_refusal(code: int, stderr: str, tmp_path: Path) -> None:
    run = Recorded(bsub=(code, "", stderr))
    said = stderr or "bsub says nothing"
    with pytest.raises(
        SchedulerError, match=rf"not known whether LSF has array fr-1: {re.escape(said)}"
    ) as caught:
        LsfScheduler(run=run).submit(array_request(tmp_path))
    assert not isinstance(caught.value, SubmissionRefusedError)


def test_two_ids_are_none_as_only_the_name_tells_which_is_which(tmp_path: Path) -> None:
    said = "Job <11> is submitted to queue <q>.\nJob <12> is submitted to queue <q>.\n"
    with pytest.raises(SchedulerError, match="It is not known whether LSF has array") as caught:
        LsfScheduler(run=Recorded(bsub=(0, said, ""))).submit(array_request(tmp_path))
    assert not isinstance(caught.value, SubmissionRefusedError)


@pytest.mark.parametrize("prefix", [(), ["env"], ["ssh", "login1"]])
def test_without_bsub_nothing_is_submitted_however_long_one_waits(prefix: Any, tmp_path: Path) -> None:
    run = Recorded(bsub=None)
    with pytest.raises(
        SubmissionRefusedError, match=r"was not found: is this a login node.*profile\.lsf.*bsub_cmd"
    ):
        LsfScheduler(run=run, command_prefix=prefix).submit(array_request(tmp_path))


def test_nothing_is_submitted_that_cannot_be_written(tmp_path: Path) -> None:
    run = Recorded(bsub=SUBMITTED)
    with pytest.raises(SchedulerError, match=r"missing cannot be written to: ") as caught:
        LsfScheduler(run=run).submit(array_request(tmp_path / "missing"))
    assert not isinstance(caught.value, SubmissionRefusedError)
    assert "bsub" not in run.kinds


def test_a_calls_own_options_go_with_the_schedulers(tmp_path: Path) -> None:
    run = Recorded(bsub=SUBMITTED)
    scheduler = LsfScheduler(
        run=run,
        resource_requirements="select[a]",
        bsub_extra=["-app", "a"],
        setup=["echo all"],
        teardown=["echo end"],
        env={"A": "1"},
        rerunnable=True,
        python="/opt/py thon",
    )
    extra = scheduler.check(
        {"resource_requirements": "select[b]", "bsub_extra": ["-G", "g"], "setup": ["echo own"]}
    )
    scheduler.submit(array_request(tmp_path, extra=extra))
    [bsub] = run.of("bsub")
    assert bsub[-5:] == ["-r", "-app", "a", "-G", "g"]
    assert "select[(a) && (b)] span[hosts=1]" in bsub
    script = (tmp_path / "job.sh").read_text()
    places = [
        script.index(part) for part in ("export A=1", "echo all", "echo own", "'/opt/py thon' -u", "echo end")
    ]
    assert places == sorted(places)


# Finding an array whose submission had no answer.


@pytest.mark.parametrize(
    ("lsid", "answer", "form"),
    [
        (
            OPEN,
            rows(
                row(31, "fr-1[1]"),
                row(31, "fr-1[2]", "PEND", "-"),
                row(9, "fr-1[3]", "DONE"),
                row(7, "fr-10[1]"),
                row(6, "my-fr-1[1]"),
                row(5, "other"),
            ),
            ["bjobs", "-w", "-a"],
        ),
        (
            IBM,
            (
                0,
                fields(31, 1, "fr-1")
                + fields(31, 2, "fr-1", "PEND", exec_host="-")
                + fields(9, 3, "fr-1", "DONE")
                + fields(7, 1, "fr-10"),
                "",
            ),
            ["bjobs", "-noheader", "-o", words.FIELDS, "-a"],
        ),
    ],
    ids=["open", "IBM"],
)
def test_arrays_are_found_by_name(lsid: Given, answer: Given, form: list[str], tmp_path: Path) -> None:
    run = Recorded(lsid=lsid, bjobs=answer)
    found = LsfScheduler(run=run).find(array_request(tmp_path, count=2))
    assert found == [["9[1]", "9[2]"], ["31[1]", "31[2]"]]
    assert run.of("bjobs") == [form]


def test_an_array_that_was_taken_as_a_plain_job_is_found(tmp_path: Path) -> None:
    run = Recorded(bjobs=rows(row(31, "fr-1[1-3]")))
    assert LsfScheduler(run=run).find(array_request(tmp_path)) == [["31[1]", "31[2]", "31[3]"]]


@pytest.mark.parametrize(
    "answer",
    [
        NONE_FOUND,
        (0, "No job found\n", ""),
        (0, "", "No unfinished job found\n"),
        (254, "", "No matching job found\n"),
        rows(row(5, "other"), row(6, "fr-2[1]")),
    ],
)
def test_it_is_an_answer_that_there_is_no_such_array(answer: Given, tmp_path: Path) -> None:
    assert LsfScheduler(run=Recorded(bjobs=answer)).find(array_request(tmp_path)) == []


@pytest.mark.parametrize("lsid", [OPEN, IBM], ids=["open", "IBM"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((0, "", ""), "bjobs gave no answer, but said: nothing at all"),
        (DOWN, "gave no answer, but said: Failed in an LSF library call: LIM is down; try later"),
        ((255, "", "LSF is down. Please wait...\n"), "but said: LSF is down. Please wait"),
        ((0, "Batch system concurrent query limit exceeded\n", ""), "query limit exceeded"),
        ((0, "JOBID   USER    STAT  QUEUE\n", ""), "but said: JOBID"),
        (None, "bjobs was not found: is this a login node of LSF"),
    ],
)
def test_no_answer_is_not_the_same_as_no_array(
    lsid: Given, answer: Answer, said: str, tmp_path: Path
) -> None:
    scheduler = LsfScheduler(run=Recorded(lsid=lsid, bjobs=answer))
    with pytest.raises(SchedulerError, match=said):
        scheduler.find(array_request(tmp_path))
    with pytest.raises(SchedulerError, match=said):
        scheduler.states({"12[1]": "fr-1"})


# Whatever bsub says.


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Given], Any]:
    directory = tmp_path_factory.mktemp("array")
    return lambda answer: LsfScheduler(run=Recorded(bsub=answer)).submit(array_request(directory))


@settings(max_examples=40)  # each of them writes a script
@given(
    said=st.text(max_size=60),
    more=st.one_of(st.just(""), st.sampled_from([*REFUSALS, *NO_REFUSALS])),
    code=st.sampled_from([0, 1, 255]),
)
def test_no_answer_without_an_id_is_an_array(
    said: str, more: str, code: int, submitted: Callable[[Given], Any]
) -> None:
    with pytest.raises(SchedulerError):
        submitted((code, said, more))
