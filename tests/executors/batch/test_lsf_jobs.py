"""LSF is asked about jobs and told to end them: the right ones, by few commands, and never others."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_runner.executors.batch import lsf_words as words
from fractal_runner.executors.batch.lsf_scheduler import LsfScheduler
from fractal_runner.executors.batch.scheduler import Cause, JobState, SchedulerError
from tests.executors.batch.lsf_recorded import (
    DOWN,
    HEADER,
    IBM,
    NONE_FOUND,
    OPEN,
    SUBMITTED,
    Answer,
    Given,
    Recorded,
    array_request,
    fields,
    long,
    row,
    rows,
)

QUEUED, RUNNING, LOST, ENDED = JobState.QUEUED, JobState.RUNNING, JobState.LOST, JobState.ENDED
KILLED = (0, "Job <12[1]> is being terminated\n", "")
CODE_3 = "Exited with exit code 3. The CPU time used is 0.0 seconds."
CODE_130 = "Exited with exit code 130. The CPU time used is 0.0 seconds."
BY_ADA = "Signal <KILL> requested by user or administrator <ada>;"


def named(*jobs: str, name: str = "fr-1") -> dict[str, str]:
    return dict.fromkeys(jobs, name)


def unknown(*arrays: str) -> str:
    return "".join(f"Job <{array}> is not found\n" for array in arrays)


def indices(word: str) -> list[int]:
    """What "12[1-3,7]" means."""
    spans = [span.partition("-") for span in word.partition("[")[2].rstrip("]").split(",")]
    return [index for first, _, last in spans for index in range(int(first), int(last or first) + 1)]


# Where jobs are.


def test_one_command_tells_of_all_jobs() -> None:
    run = Recorded(
        bjobs=rows(
            row(12, "fr-1[1]", "DONE"),
            row(12, "fr-1[2]", "PEND", "-"),
            row(12, "fr-1[3]", "EXIT"),
            row(13, "fr-2[1]", "USUSP"),
            row(13, "fr-2[2]", "PSUSP", "-"),
            row(13, "fr-2[3]", "UNKWN"),
        )
    )
    jobs = {**named("12[1]", "12[2]", "12[3]"), **named("13[1]", "13[2]", "13[3]", name="fr-2")}
    states = LsfScheduler(run=run).states(jobs)
    assert [states[job].state for job in jobs] == [ENDED, QUEUED, ENDED, RUNNING, QUEUED, RUNNING]
    assert [states[job].returncode for job in ("12[1]", "12[3]")] == [0, None]
    assert not states["13[2]"].can_start
    assert (states["13[1]"].node, states["13[2]"].node) == ("vm", None)
    assert run.of("bjobs") == [["bjobs", "-w", "12", "13"]]


def test_ibms_lsf_tells_more_by_its_fields() -> None:
    said = fields(
        12, 1, "fr-1", "EXIT", exit_code="137", exit_reason="TERM_MEMLIMIT: job killed", max_mem="9 Mbytes"
    )
    run = Recorded(lsid=IBM, bjobs=(0, said + fields(12, 2, "fr-1", exec_host="n1:n2"), ""))
    states = LsfScheduler(run=run).states(named("12[1]", "12[2]"))
    ended = states["12[1]"]
    assert (ended.state, ended.reason, ended.cause) == (ENDED, "TERM_MEMLIMIT", Cause.MEMORY)
    assert "9 Mbytes" in ended.detail
    assert (states["12[2]"].state, states["12[2]"].node) == (RUNNING, "n1")
    assert run.of("bjobs") == [["bjobs", "-noheader", "-o", words.FIELDS, "12"]]


@pytest.mark.parametrize("code", [0, 1, 99, 254, 255])
def test_the_exit_code_of_bjobs_says_nothing(code: int) -> None:
    answer = code, rows(row(12, "fr-1[1]"))[1], unknown("13")
    states = LsfScheduler(run=Recorded(bjobs=answer)).states({**named("12[1]"), **named("13[1]", name="x")})
    assert [status.state for status in states.values()] == [RUNNING, LOST]


def test_very_many_arrays_take_several_commands() -> None:
    def answer(said: list[str]) -> Given:
        return rows(*(row(array, f"fr-{array}[1]") for array in said[2:]))

    run = Recorded(bjobs=answer)
    jobs = {f"{array}[1]": f"fr-{array}" for array in range(1, 1202)}
    states = LsfScheduler(run=run).states(jobs)
    assert states.keys() == jobs.keys()
    assert [len(command) - 2 for command in run.of("bjobs")] == [500, 500, 201]


def test_of_a_job_that_is_not_in_the_answer_nothing_was_said() -> None:
    run = Recorded(bjobs=rows(row(12, "fr-1[1]"), row(99, "fr-9[1]")))
    jobs = {**named("12[1]", "12[2]"), **named("13[1]", name="fr-3")}
    assert LsfScheduler(run=run).states(jobs).keys() == {"12[1]"}


@pytest.mark.parametrize("lsid", [OPEN, IBM], ids=["open", "IBM"])
@pytest.mark.parametrize(("said", "lost"), [("12", ["12[1]", "12[2]"]), ("12[2]", ["12[2]"])])
def test_what_lsf_does_not_know_is_lost(lsid: Given, said: str, lost: list[str]) -> None:
    run = Recorded(lsid=lsid, bjobs=(255, "", unknown(said)))
    states = LsfScheduler(run=run).states(named("12[1]", "12[2]"))
    assert list(states) == lost
    assert {status.state for status in states.values()} == {LOST}


@pytest.mark.parametrize(
    ("lsid", "answer"),
    [
        (OPEN, rows(row(12, "other[1]"), row(12, "other[2]", "DONE"))),
        (OPEN, rows(row(12, "fr-10[1]"), row(12, "fr-10[2]"))),
        (OPEN, rows(row(12, "other"))),
        (IBM, (0, fields(12, 1, "other") + fields(12, 2, "other"), "")),
        (IBM, (0, "12^0^RUN^-^-^vm^-^other\n", "")),
    ],
)
def test_an_id_that_has_gone_to_another_job_is_lost(lsid: Given, answer: Given) -> None:
    states = LsfScheduler(run=Recorded(lsid=lsid, bjobs=answer)).states(named("12[1]", "12[2]"))
    assert [status.state for status in states.values()] == [LOST, LOST]
    assert "LSF has given its id to" in states["12[1]"].detail


@pytest.mark.parametrize("state", ["PEND", "RUN", "DONE", "EXIT"])
def test_an_array_that_was_taken_as_one_plain_job_has_ended(state: str) -> None:
    run = Recorded(bjobs=rows(row(12, "fr-1[1-2000]", state, "-")))
    states = LsfScheduler(run=run).states(named("12[1]", "12[2000]"))
    assert [(said.state, said.reason) for said in states.values()] == [(ENDED, "NOT_AN_ARRAY")] * 2
    assert "MAX_JOB_ARRAY_SIZE" in states["12[1]"].detail
    assert "`max_array`" in states["12[1]"].detail


@pytest.mark.parametrize("lsid", [OPEN, IBM], ids=["open", "IBM"])
def test_a_busy_daemon_says_nothing_about_jobs(lsid: Given) -> None:
    for stderr in ("LSF is processing your request. Please wait...\n", DOWN[2]):
        run = Recorded(lsid=lsid, bjobs=(255, "", stderr))
        with pytest.raises(
            SchedulerError, match=re.escape(f"bjobs gave no answer, but said: {stderr.strip()}")
        ):
            LsfScheduler(run=run).states(named("12[1]"))


def test_a_daemon_that_was_busy_at_first_has_answered() -> None:
    run = Recorded(bjobs=(0, rows(row(12, "fr-1[1]"))[1], "LSF is processing your request. Please wait...\n"))
    assert LsfScheduler(run=run).states(named("12[1]"))["12[1]"].state is RUNNING


# How jobs have ended.


def test_bjobs_explains_what_it_can_and_bhist_is_asked_of_the_others() -> None:
    run = Recorded(
        bjobs_long=(0, long("12[1]", "fr-1", CODE_3) + long("12[2]", "fr-1", CODE_130), ""),
        bhist=(0, long("12[2]", "fr-1", BY_ADA, CODE_130, status=None), ""),
    )
    found = LsfScheduler(run=run).explain(named("12[1]", "12[2]"))
    assert found["12[1]"].returncode == 3
    assert (found["12[2]"].reason, found["12[2]"].cause) == ("TERM_OWNER", Cause.CANCELLED)
    assert run.commands == [["bjobs", "-l", "12[1-2]"], ["bhist", "-l", "12[2]"]]


def test_bhist_is_not_asked_of_what_is_clear() -> None:
    run = Recorded(bjobs_long=(0, long("12[1]", "fr-1", CODE_3), ""))
    assert LsfScheduler(run=run).explain(named("12[1]")).keys() == {"12[1]"}
    assert run.kinds == ["bjobs_long"]


def test_bhist_tells_of_jobs_that_bjobs_has_forgotten() -> None:
    run = Recorded(
        bjobs_long=(255, "", unknown("12")), bhist=(0, long("12[1]", "fr-1", CODE_3, status=None), "")
    )
    assert LsfScheduler(run=run).explain(named("12[1]", "12[2]")).keys() == {"12[1]"}


@pytest.mark.parametrize(
    "bhist",
    [
        (255, "No matching job found\n", ""),
        (0, long("12[1]", "fr-1", CODE_3, status=None), ""),  # of a run before, it may be
        None,
    ],
)
def test_what_bjobs_has_told_stays_if_bhist_tells_no_more(bhist: Answer) -> None:
    run = Recorded(bjobs_long=(0, long("12[1]", "fr-1", CODE_130), ""), bhist=bhist)
    assert LsfScheduler(run=run).explain(named("12[1]"))["12[1]"].returncode == -2


def test_what_is_said_of_others_jobs_explains_nothing() -> None:
    text = (
        long("12[1]", "other", CODE_3)
        + "\n"
        + long("13[1]", "fr-1", CODE_3)
        + "\n"
        + long("12", "fr-1", CODE_3)
    )
    run = Recorded(bjobs_long=(0, text, ""), bhist=(0, long("12[1]", "fr-10", CODE_3, status=None), ""))
    assert LsfScheduler(run=run).explain(named("12[1]")) == {}


@pytest.mark.parametrize("status", ["RUN", "PEND", "UNKWN", "SSUSP"])
def test_a_job_that_has_not_ended_is_told_to_be_there(status: str) -> None:
    run = Recorded(bjobs_long=(0, long("12[1]", "fr-1", status=status), ""), bhist=NONE_FOUND)
    assert LsfScheduler(run=run).explain(named("12[1]"))["12[1]"].state is not ENDED
    assert "bhist" not in run.kinds


@pytest.mark.parametrize("kind", ["bjobs_long", "bhist"])
def test_a_busy_daemon_explains_nothing(kind: str) -> None:
    run = Recorded(**{"bjobs_long": NONE_FOUND, "bhist": NONE_FOUND, kind: DOWN})
    with pytest.raises(SchedulerError, match=r"gave no answer, but said: Failed in an LSF library call"):
        LsfScheduler(run=run).explain(named("12[1]"))


def test_nothing_is_explained_of_no_jobs() -> None:
    run = Recorded()
    assert LsfScheduler(run=run).explain({}) == {}
    assert run.commands == []


# Ending jobs.


@pytest.fixture
def known(tmp_path: Path) -> Callable[[Recorded], LsfScheduler]:
    """A scheduler that has submitted array 12, "fr-1", of 5,000 jobs."""

    def submit(run: Recorded) -> LsfScheduler:
        run.answers["bsub"] = SUBMITTED
        scheduler = LsfScheduler(run=run)
        scheduler.submit(array_request(tmp_path, count=5000))
        run.commands.clear()
        return scheduler

    return submit


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        (["12[1]"], ["12[1]"]),
        (["12[1]", "12[2]", "12[3]"], ["12[1-3]"]),
        (["12[7]", "12[1]", "12[3]", "12[2]", "12[4]"], ["12[1-4,7]"]),
        ([f"12[{index}]" for index in range(1, 4999)], ["12[1-4998]"]),
        (
            [f"12[{2 * n}]" for n in range(1, 22)],
            [f"12[{','.join(str(2 * n) for n in range(1, 21))}]", "12[42]"],
        ),
    ],
)
def test_jobs_are_named_by_their_spans(
    jobs: list[str], said: list[str], known: Callable[[Recorded], LsfScheduler]
) -> None:
    run = Recorded(bkill=KILLED, bjobs_long=NONE_FOUND, bhist=NONE_FOUND)
    scheduler = known(run)
    scheduler.cancel(named(*jobs))
    assert run.commands == [["bkill", *said]]
    scheduler.explain(named(*jobs))
    assert [command[1:] for command in run.commands[1:]] == [["-l", *said]] * 2


def test_ending_very_many_jobs_takes_several_commands(known: Callable[[Recorded], LsfScheduler]) -> None:
    run = Recorded(bkill=KILLED)
    jobs = [f"12[{2 * number}]" for number in range(1, 20 * 450 + 1)]
    known(run).cancel(named(*jobs))
    assert [len(command) - 1 for command in run.commands] == [200, 200, 50]
    assert [index for command in run.commands for word in command[1:] for index in indices(word)] == [
        2 * number for number in range(1, 20 * 450 + 1)
    ]


def test_arrays_go_together(known: Callable[[Recorded], LsfScheduler]) -> None:
    run = Recorded(bkill=KILLED, bjobs=rows(row(13, "fr-2[1]"), row(13, "fr-2[2]")))
    known(run).cancel({"12[1]": "fr-1", "13[1]": "fr-2", "12[2]": "fr-1", "13[2]": "fr-2"})
    assert run.of("bkill") == [["bkill", "12[1-2]", "13[1-2]"]]


def test_bkill_is_never_run_without_a_job() -> None:
    run = Recorded(bjobs=rows(row(12, "other[1]")), bkill=KILLED)
    scheduler = LsfScheduler(run=run)
    scheduler.cancel({})
    assert run.commands == []
    scheduler.cancel(named("12[1]"))
    assert "bkill" not in run.kinds


@pytest.mark.parametrize("job", ["", "12", "12[]", "12[x]", "0 ; id", "-1[1]", "12[1]\n", "12[1-3]", "[1]"])
def test_what_is_no_job_of_an_array_is_not_ended(job: str) -> None:
    run = Recorded(bjobs=NONE_FOUND, bkill=KILLED)
    LsfScheduler(run=run).cancel({job: "fr-1"})
    assert "bkill" not in run.kinds


@pytest.mark.parametrize(
    ("bjobs", "ends"),
    [
        (rows(row(12, "fr-1[1]")), True),
        (rows(row(12, "fr-1[1]", "DONE")), True),
        (rows(row(12, "other[1]")), False),
        (rows(row(12, "other")), False),
        ((255, "", unknown("12")), False),
    ],
)
def test_an_id_that_comes_from_elsewhere_is_checked_first(bjobs: Given, ends: bool) -> None:
    run = Recorded(bjobs=bjobs, bkill=KILLED)
    LsfScheduler(run=run).cancel(named("12[1]"))
    assert run.kinds == ["lsid", "bjobs", *(["bkill"] if ends else [])]


def test_an_id_is_checked_once() -> None:
    run = Recorded(bjobs=rows(row(12, "fr-1[1]"), row(12, "fr-1[2]")), bkill=KILLED)
    scheduler = LsfScheduler(run=run)
    for job in ("12[1]", "12[2]", "12[1]"):
        scheduler.cancel(named(job))
    assert run.kinds == ["lsid", "bjobs", "bkill", "bkill", "bkill"]


def test_an_id_of_an_array_with_another_name_is_not_known(known: Callable[[Recorded], LsfScheduler]) -> None:
    run = Recorded(bjobs=rows(row(12, "fr-1[1]")), bkill=KILLED)
    known(run).cancel(named("12[1]", name="fr-0"))
    assert run.kinds == ["bjobs"]


def test_nothing_is_ended_of_which_it_is_not_known_whose_it_is() -> None:
    run = Recorded(bjobs=DOWN, bkill=KILLED)
    with pytest.raises(SchedulerError, match="bjobs gave no answer"):
        LsfScheduler(run=run).cancel(named("12[1]"))
    assert "bkill" not in run.kinds


@pytest.mark.parametrize(
    "stderr",
    [
        "Job <12[1]>: Job has already finished\n",
        "Job <12>: No matching job found\n",
        "Job <12>: Operation is in progress\n",
        "Job <12[1]>: Job has already finished\nJob <12[2]>: No matching job found\n",
        "LSF is processing your request. Please wait...\nJob <12[1]>: Job has already finished\n",
    ],
)
def test_jobs_that_have_ended_are_no_mistake(stderr: str, known: Callable[[Recorded], LsfScheduler]) -> None:
    known(Recorded(bkill=(255, "", stderr))).cancel(named("12[1]"))


@pytest.mark.parametrize(
    "stderr",
    [
        "Job <12[1]>: User permission denied\n",
        "Job <12[1]>: Job has already finished\nJob <12[2]>: User permission denied\n",
        "Failed in an LSF library call: LIM is down; try later\n",
        "LSF is processing your request. Please wait...\n",
        "12[1]: Illegal job ID.\n",
        "",
    ],
)
def test_what_could_not_be_ended_is_an_error(stderr: str, known: Callable[[Recorded], LsfScheduler]) -> None:
    said = re.escape(stderr.strip() or "It says nothing.")
    with pytest.raises(SchedulerError, match=f"bkill failed with exit code 255: {said}"):
        known(Recorded(bkill=(255, "", stderr))).cancel(named("12[1]"))


def test_a_missing_bkill_is_an_error_that_says_what_to_do(known: Callable[[Recorded], LsfScheduler]) -> None:
    with pytest.raises(SchedulerError, match=r"bkill was not found: .*login node.*bkill_cmd"):
        known(Recorded()).cancel(named("12[1]"))


# Whatever is asked, and whatever is said.

_JOBS = st.sets(st.tuples(st.integers(1, 4), st.integers(1, 30)))


@given(_JOBS, st.sets(st.integers(1, 4)))
def test_exactly_the_jobs_that_are_ours_are_ended(jobs: set[tuple[int, int]], others: set[int]) -> None:
    def answer(said: list[str]) -> Given:
        asked = sorted(job for job in jobs if str(job[0]) in said)
        return rows(*(row(n, f"{'other' if n in others else 'fr-1'}[{index}]") for n, index in asked))

    run = Recorded(bjobs=answer, bkill=KILLED)
    LsfScheduler(run=run).cancel(named(*(f"{array}[{index}]" for array, index in jobs)))
    said = [word for command in run.of("bkill") for word in command[1:]]
    ended = {(int(word.partition("[")[0]), index) for word in said for index in indices(word)}
    assert ended == {job for job in jobs if job[0] not in others}
    assert all(len(command) > 1 for command in run.of("bkill"))


_KNOWN_WORDS = [*words.STATES, "12", "12[1]", "fr-1[1]", "-", "vm", "^"]
_WORDS = st.one_of(st.text(max_size=12), st.sampled_from(_KNOWN_WORDS))
_SAID = st.lists(st.lists(_WORDS, max_size=9).map(" ".join), max_size=4).map("\n".join)


@given(_SAID, _SAID, st.sampled_from([OPEN, IBM]))
def test_no_answer_is_too_strange(stdout: str, stderr: str, lsid: Given) -> None:
    answer = 0, HEADER + stdout, stderr
    scheduler = LsfScheduler(run=Recorded(lsid=lsid, bjobs=answer, bjobs_long=answer, bhist=answer))
    for ask in (scheduler.states, scheduler.explain):
        try:
            found = ask(named("12[1]"))
        except SchedulerError:
            continue
        assert found.keys() <= {"12[1]"}
        if lsid == IBM and found:
            assert "^" in stdout or "Job <" in stdout + stderr
