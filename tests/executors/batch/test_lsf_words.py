"""What LSF's commands say is understood, and nothing ends a job that has not ended.

The recorded answers are those of a scheduler of the openlava family; IBM's forms are the documented ones.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fractal_runner.executors.batch import lsf_words as words
from fractal_runner.executors.batch.lsf_long import read_long
from fractal_runner.executors.batch.lsf_words import Dialect, Row
from fractal_runner.executors.batch.scheduler import Cause, JobState

QUEUED, RUNNING, ENDED = JobState.QUEUED, JobState.RUNNING, JobState.ENDED
RECORDED = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "clusters/lsf/transcripts/openlava.jsonl")
    .read_text()
    .splitlines()
]

# How a row reads in short: the job, its name, where it is, why, its exit code, its host, the cause.
Short = tuple[str, str, JobState, str | None, int | None, str | None, Cause | None]


def short(row: Row) -> Short:
    job = row.array if row.index is None else f"{row.array}[{row.index}]"
    status = row.status
    return job, row.name, status.state, status.reason, status.returncode, status.node, status.cause


def queued(job: str, name: str, reason: str | None = None) -> Short:
    return job, name, QUEUED, reason, None, None, None


def running(job: str, name: str) -> Short:
    return job, name, RUNNING, None, None, "vm", None


def done(job: str, name: str) -> Short:
    return job, name, ENDED, None, 0, "vm", None


def failed(
    job: str, name: str, code: int | None = None, reason: str = "EXIT", cause: Cause | None = None
) -> Short:
    return job, name, ENDED, reason, code, "vm", cause


ARRAY = [running("9[1]", "arr"), running("9[2]", "arr"), *(queued(f"9[{n}]", "arr") for n in (3, 4, 5))]

# By the number of the exchange: what there is to be read from it.
BJOBS: dict[int, list[Short]] = {
    1: [],
    16: ARRAY,
    17: ARRAY,
    18: [],
    19: [],
    20: [],
    21: [running("9[2]", "arr"), queued("9[3]", "arr")],
    23: [done("9[1]", "arr"), *(failed(f"9[{n}]", "arr") for n in (2, 3, 4, 5))],
    **{29 + 3 * n: [failed(f"{12 + n}", "k")] for n in range(6)},
    48: [running("18", "long")],
    50: [running("18", "long")],
    52: [running("18", "long")],
    54: [failed("18", "long")],
    63: [failed(f"19[{n}]", "many") for n in range(1, 7)],
    65: [queued("20", "held", "PSUSP")],
    67: [("20", "held", ENDED, "EXIT", None, None, None)],
    69: [],
    70: [done("1", "tok-1")],
    71: [],
    72: [],
    73: [done("1", "tok-1")],
    74: [],
    75: [queued("11", "big[1-2000]", "PSUSP")],
    79: [done("21", "rq")],
    84: [failed("23", "lim")],
    89: [done(str(n), "dup") for n in (24, 25, 26, 27)],
    91: [],
}
LONG: dict[int, list[Short]] = {
    22: [running("9[1]", "arr")],
    24: [failed("9[4]", "arr", 3)],
    25: [done("9[1]", "arr")],
    26: [failed("9[4]", "arr", 3)],
    **{n: [failed("12", "k", 3)] for n in (30, 31)},
    **{n: [failed("13", "k", -9, "SIGKILL")] for n in (33, 34)},
    **{n: [failed("14", "k", -9, "SIGKILL")] for n in (36, 37)},
    **{n: [failed("15", "k", -9, "SIGKILL")] for n in (39, 40)},
    **{n: [failed("16", "k", 127)] for n in (42, 43)},
    **{n: [failed("17", "k", 98)] for n in (45, 46)},
    55: [failed("18", "long", -2, "SIGINT")],  # who has sent it stands in bhist's answer alone
    56: [failed("18", "long", -2, "TERM_OWNER", Cause.CANCELLED)],
    68: [("20", "held", ENDED, "EXIT", None, None, Cause.CANCELLED)],
    76: [],
    80: [done("21", "rq")],
    **{n: [failed("23", "lim", -12, "TERM_RUNLIMIT", Cause.TIME)] for n in (85, 86)},
}
REFUSED, UNCERTAIN = True, False
BSUB: dict[int, str | bool] = {
    2: UNCERTAIN,
    3: "1",
    4: "2",
    5: UNCERTAIN,
    **dict.fromkeys((*range(6, 13), 14), REFUSED),
    13: "8",
    15: "9",
    27: "10",
    28: "11",
    47: "18",
    60: "19",
    64: "20",
    78: "21",
    81: "22",
    83: "23",
    **dict.fromkeys((87, 88, 90, 92), UNCERTAIN),
}
IS_HARMLESS = {53: True, 57: True, 58: True, 59: False, 61: True, 62: True, 66: True, 77: True}  # bkill's
UNKNOWN = {69: {"999999"}, 70: {"999999"}}
IS_BUSY = {87, 88, 90, 91, 92}

LONG_ENDS = [n for n, rows in LONG.items() if rows and rows[0][2] is ENDED]


def test_all_that_was_recorded_is_looked_at() -> None:
    asked = {
        n for n, each in enumerate(RECORDED) if each["argv"][0] in ("bjobs", "bhist", "bsub", "bkill", "lsid")
    }
    assert asked - {0} == {*BJOBS, *LONG, *BSUB, *IS_HARMLESS}


@pytest.mark.parametrize("number", sorted(BJOBS))
def test_recorded_rows_of_bjobs(number: int) -> None:
    assert list(map(short, words.read_bjobs(RECORDED[number]["stdout"]))) == BJOBS[number]


@pytest.mark.parametrize("number", sorted(LONG))
def test_recorded_long_texts(number: int) -> None:
    assert list(map(short, read_long(RECORDED[number]["stdout"]))) == LONG[number]


@pytest.mark.parametrize("number", sorted(BSUB))
def test_recorded_submissions(number: int) -> None:
    said = RECORDED[number]["stdout"] + RECORDED[number]["stderr"]
    expected = BSUB[number]
    assert words.read_submission(said) == (expected if isinstance(expected, str) else None)
    assert words.is_refusal(said) is (expected is REFUSED)


@pytest.mark.parametrize("number", sorted(IS_HARMLESS))
def test_recorded_answers_of_bkill(number: int) -> None:
    said = RECORDED[number]["stderr"] + RECORDED[number]["stdout"]
    assert (
        all(map(words.NOTHING_TO_KILL.search, words.without_patience(said).splitlines()))
        is IS_HARMLESS[number]
    )


def test_recorded_jobs_that_are_not_there() -> None:
    found = {n: words.read_unknown(each["stderr"] + each["stdout"]) for n, each in enumerate(RECORDED)}
    assert {n: ids for n, ids in found.items() if ids} == UNKNOWN


def test_recorded_daemons_that_are_down() -> None:
    assert {n for n, each in enumerate(RECORDED) if words.BUSY.search(each["stderr"])} == IS_BUSY


def test_the_recorded_dialect() -> None:
    assert [words.read_dialect(each["stdout"]) for each in RECORDED[:2]] == [Dialect.OPENLAVA] * 2


@pytest.mark.parametrize(
    ("text", "dialect"),
    [
        (
            "IBM Spectrum LSF Standard 10.1.0.12, Jun 08 2021\nCopyright\n\nMy cluster name is c\n",
            Dialect.IBM,
        ),
        ("warning: module loaded\n  IBM Platform LSF Express 9.1.3.0\n", Dialect.IBM),
        ("Platform LSF HPC 7.0.6\n", Dialect.IBM),
        ("openlava project 4.0\n", Dialect.OPENLAVA),
        ("IBM Spectrum LSF 10.1\nMy cluster name is\nopenlava\n", Dialect.IBM),
        ("My cluster name is openlava\n", None),
        ("Cannot connect to LSF. Please wait...\nLSF is down. Please wait...\n", None),
        ("", None),
    ],
)
def test_the_product_names_itself_at_the_beginning_of_a_line(text: str, dialect: Dialect | None) -> None:
    assert words.read_dialect(text) is dialect


@pytest.mark.parametrize(
    ("text", "job"),
    [
        ("esub: 5 hints\nnote: Job <12> is submitted to default queue <normal>. Bye\nquota: 3%\n", "12"),
        ("Job <12>\n  is submitted to\nqueue <q>.", "12"),
        ("Job <12> is submitted to queue <q>.\nJob <12> is submitted to queue <q>.\n", "12"),
        ("Job <12> is submitted to queue <q>.\nJob <13> is submitted to queue <q>.\n", None),
        ("Job <big> is submitted to queue <q>.", None),
        ("Job <0> is submitted to queue <q>.", None),
        ("Job <12> is not found", None),
    ],
)
def test_an_id_is_found_wherever_it_stands_if_there_is_but_one(text: str, job: str | None) -> None:
    assert words.read_submission(text) == job


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        ("User permission denied. Job not submitted.", True),
        ("some text nobody knows. Job not submitted.", True),
        ("Job array index too large. Job not submitted.", True),
        ("Request aborted by esub. Job not submitted.", True),
        ("quota: try later\nRequest aborted by esub. Job not submitted.", False),
        ("batch system daemon not responding ... still trying\nq: No such queue. Job not submitted.", True),
        ("LSF is processing your request. Please wait...\n", False),
        ("Failed in an LSF library call: LIM is down; try later. Job not submitted.", False),
        ("Connection refused by server. Job not submitted.", False),
        ("Pending job threshold reached. Retrying in 60 seconds...\n", False),
        ("ada: Pending job threshold reached. Job not submitted.", False),
        ("The destination queue has reached its job limit. Job not submitted.", False),
        ("Batch system concurrent query limit exceeded. Job not submitted.", False),
        ("Usage:  bsub [-h | -V]\n", True),
        ("usage: bsub [options]\n", True),
        ("Segmentation fault", False),
        ("bsub: command not found", False),
        ("", False),
    ],
)
def test_a_refusal_is_what_would_be_said_again(text: str, is_refusal: bool) -> None:
    assert words.is_refusal(text) is is_refusal


@pytest.mark.parametrize("word", sorted(words.STATES))
def test_each_state_is_read_wherever_it_stands(word: str) -> None:
    expected = words.STATES[word]
    assert words.read_bjobs(f"7 ada {word} q h x k[2] Nov 21 00:08")[0].status.state is expected
    assert words.read_fields(f"7^2^{word}^-^-^x^-^k[2]\n")[0].status.state is expected
    [row] = read_long(bjobs_long(status=word))
    assert row.status.state is expected


def test_a_job_on_hold_waits_for_people_and_one_that_was_stopped_comes_back() -> None:
    held, stopped, silent = words.read_bjobs(
        "1 ada PSUSP q h - a Nov 21 00:08\n"
        "2 ada SSUSP q h x a Nov 21 00:08\n"
        "3 ada UNKWN q h x a Nov 21 00:08\n"
    )
    assert not held.status.can_start and held.status.reason == "PSUSP"
    assert stopped.status.can_start and silent.status.can_start


def test_an_unknown_state_is_no_end_and_is_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, words.__name__):
        states = [words.read_bjobs("7 ada DREAM q h x k Nov 21 00:08")[0].status.state for _ in range(3)]
    assert states == [RUNNING] * 3
    assert [record.getMessage().count("DREAM") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("7 ada RUN q h 4*a:2*b k Nov 21 00:08", ("7", "k", RUNNING, "a")),
        ("7 ada RUN q h a:b k[12] Nov  1 00:08", ("7[12]", "k", RUNNING, "a")),
        ("7[12] ada RUN q h a k Nov 21 00:08:30 2026", ("7[12]", "k", RUNNING, "a")),
        ("7 ada RUN q h a Nov 21 00:08 EXIT Nov 21 00:08", ("7", "Nov 21 00:08 EXIT", RUNNING, "a")),
        ("7       ada     EXIT  q          h" + " " * 24 + "two words  Nov 21 00:08",
         ("7", "two words", ENDED, None)),
        ("7 ada RUN q h a *g-name[3] Nov 21 00:08\r", ("7[3]", "*g-name", RUNNING, "a")),
        ("7 ada RUN q h a k[0] Nov 21 00:08", ("7", "k[0]", RUNNING, "a")),
    ],
)  # fmt: skip
def test_a_row_is_read_though_its_columns_have_shifted(line: str, expected: tuple[Any, ...]) -> None:
    [row] = words.read_bjobs(line)
    job, name, state, _, _, node, _ = short(row)
    assert (job, name, state, node) == expected


@pytest.mark.parametrize(
    "line",
    [
        "Job <7> is not found",
        "LSF is processing your request. Please wait...",
        "                                             4*b",
        "7 ada EXIT q h x",
        "7 ada EXIT q h x k",
        "7 ada EXIT q h x k Nov 21",
        "3 jobs of yours have DONE: Nov 21 00:08",
        "abc ada EXIT q h x k Nov 21 00:08",
    ],
)
def test_what_is_no_row_is_passed_over(line: str) -> None:
    assert words.read_bjobs(line) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("7^0^DONE^-^-^a^4 Mbytes^k", ("7", "k", ENDED, None, 0, "a", None)),
        ("7^3^DONE^^^4*a:b^-^k[3]", ("7[3]", "k", ENDED, None, 0, "a", None)),
        ("7^-^EXIT^3^-^a^-^x^y[1-2000]", ("7", "x^y[1-2000]", ENDED, "EXIT", 3, "a", None)),
        ("7^1^EXIT^137^-^a^-^k", ("7[1]", "k", ENDED, "SIGKILL", -9, "a", None)),
        ("7^1^EXIT^255^-^a^-^k", ("7[1]", "k", ENDED, "EXIT", 255, "a", None)),
        ("7^1^EXIT^-^-^-^-^k", ("7[1]", "k", ENDED, "EXIT", None, None, None)),
        ("7^1^EXIT^0^-^-^-^k", ("7[1]", "k", ENDED, "EXIT", None, None, None)),
        (
            "7^1^EXIT^130^TERM_MEMLIMIT: job killed after reaching LSF memory usage limit^a^9 Gbytes^k",
            ("7[1]", "k", ENDED, "TERM_MEMLIMIT", -2, "a", Cause.MEMORY),
        ),
        ("7^1^EXIT^1^TERM_UNKNOWN: unknown^a^-^k", ("7[1]", "k", ENDED, "EXIT", 1, "a", None)),
        ("7^1^EXIT^1^TERM_NEWS: x^a^-^k", ("7[1]", "k", ENDED, "TERM_NEWS", 1, "a", None)),
        ("7^1^PEND^-^-^-^-^k[1]", ("7[1]", "k", QUEUED, None, None, None, None)),
        ("7^1^RUN^-^-^a^-^k[1]", ("7[1]", "k", RUNNING, None, None, "a", None)),
    ],
)
def test_ibm_fields(line: str, expected: Short) -> None:
    assert [short(row) for row in words.read_fields(f"{line}\nPlease wait...\n7^1^EXIT^^\n")] == [expected]


def test_the_fields_that_are_read_are_those_asked_for() -> None:
    names = re.sub(r":\d+", "", words.FIELDS.partition(" delimiter")[0])
    assert names.split()[:3] == ["jobid", "jobindex", "stat"] and names.split()[-1] == "job_name"
    line = "^".join({"jobid": "7", "jobindex": "0", "stat": "RUN"}.get(name, "-") for name in names.split())
    assert len(words.read_fields(line)) == 1


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        *((1, ("EXIT", 1)), (128, ("EXIT", 128)), (129, ("SIGHUP", -1)), (140, ("SIGUSR2", -12))),
        *((159, ("SIGSYS", -31)), (160, ("EXIT", 160)), (255, ("EXIT", 255)), (0, ("EXIT", None))),
        (None, ("EXIT", None)),
    ],
)
def test_exit_codes(code: int | None, expected: tuple[str, int | None]) -> None:
    assert words.read_code(code) == expected


def test_the_documented_reasons_are_all_known() -> None:
    documented = """OWNER ADMIN FORCE_OWNER FORCE_ADMIN RUNLIMIT CPULIMIT MEMLIMIT SWAP PROCESSLIMIT
        THREADLIMIT DEADLINE WINDOW LOAD PREEMPT REQUEUE_OWNER REQUEUE_ADMIN EXTERNAL_SIGNAL ZOMBIE
        BUCKET_KILL CWD_NOTEXIST REMOVE_HUNG_JOB ORPHAN_SYSTEM PRE_EXEC_FAIL DATA"""
    assert {f"TERM_{word}" for word in documented.split()} <= set(words.TERMS)


def test_jobs_that_are_not_found() -> None:
    said = (
        "Job <12> is not found\nJob <13[4]> is not found\r\nJob <name> is not found\nNo matching job found\n"
    )
    assert words.read_unknown(said) == {"12", "13[4]"}
    assert words.read_unknown("7 ada RUN q h a Job <5> is not found Nov 21 00:08") == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\nLSF is down. Please wait...\n\n q: No such queue. Sorry.\n", "q: No such queue. Sorry."),
        ("LIM is down; try later\n", "LIM is down; try later"),
        ("daemon not responding ... still trying\n" * 9, "daemon not responding ... still trying"),
        ("\n \n", ""),
    ],
)
def test_an_error_message_has_what_is_to_be_said(text: str, expected: str) -> None:
    assert words.without_patience(text) == expected


# The long texts.

SUBMITTED = "Sat Nov 21 00:08:18: Submitted from host <vm>, CWD <$HOME>, Output File </dev/null>;"
SUBMITTED_TO = "Sat Nov 21 00:08:18: Submitted from host <vm>, to Queue <normal>, CWD <$HOME>;"
SECTIONS = "\n SCHEDULING PARAMETERS:\n           r15s   r1m\n loadSched   -     - \n\n"
SUMMARY = """
Summary of time in seconds spent in various states by  Sat Nov 21 00:09:57
  PEND     PSUSP    RUN      USUSP    SSUSP    UNKWN    TOTAL
  2        0        61       0        0        0        63

"""


def at(event: str) -> str:
    return f"Sat Nov 21 00:08:27: {event}"


def wrapped(line: str, width: int) -> str:
    rest = [line[start : start + width] for start in range(0, len(line), width)]
    return ("\n" + " " * 21).join(rest)


def bjobs_long(
    *events: str,
    status: str = "EXIT",
    job: str = "7",
    name: str = "k",
    command: str = "true",
    sections: str = SECTIONS,
) -> str:
    head = (
        f"Job <{job}>, Job Name <{name}>, User <ada>, Project <default>, Status <{status}>, "
        f"Queue <normal>, Command <{command}>"
    )
    return "\n".join(["", head, SUBMITTED, *map(at, events), sections])


def bhist_long(
    *events: str,
    job: str = "7",
    name: str = "k",
    command: str = "true",
    between: str = "",
    rest: str = SUMMARY,
) -> str:
    head = f"Job <{job}>, Job Name <{name}>, User <ada>, Project <default>, Command <{command}>"
    return "\n".join(["", head, SUBMITTED_TO, *([between] if between else []), *map(at, events), rest])


STARTED = "Started 1 Task(s) on Host(s) <4*vm>, Allocated 4 Slot(s) on Host(s) <4*vm>;"
DISPATCHED = "Dispatched 1 Task(s) on Host(s) <vm>, Allocated 1 Slot(s) on Host(s) <vm>;"
STARTING = "Starting (Pid 27205);"
KILL = "Signal <KILL> requested by user or administrator <{}>;"
REQUEUED = "Pending: Requeued job is waiting for rescheduling: 1 host;"
SILENT = "Unknown; unable to reach the execution host;"
LIMITS = "\n RUNLIMIT\n 1.0 min of vm\n"
CODE = "Exited with exit code {}. The CPU time used is 0.1 seconds;"


@pytest.mark.parametrize(
    ("events", "between", "expected"),
    [
        ([DISPATCHED, CODE.format(143)], "", ("SIGTERM", -15, None)),
        ([DISPATCHED, "Exited by signal 2. The CPU time used is 0.1 seconds;"], "", ("SIGINT", -2, None)),
        ([DISPATCHED, "Exited by signal 40. The CPU time used is 0.1 seconds;"], "", ("EXIT", -40, None)),
        ([DISPATCHED, "Exited by signal 900."], "", ("EXIT", None, None)),
        ([DISPATCHED, CODE.format(9)], "", ("EXIT", 9, None)),
        ([DISPATCHED, KILL.format("ada"), CODE.format(130)], "", ("TERM_OWNER", -2, Cause.CANCELLED)),
        ([DISPATCHED, KILL.format("root"), CODE.format(130)], "", ("TERM_ADMIN", -2, Cause.CANCELLED)),
        ([KILL.format("ada"), "Exited"], "", ("TERM_OWNER", None, Cause.CANCELLED)),
        (["Exited"], "", ("EXIT", None, Cause.CANCELLED)),
        ([DISPATCHED, STARTING, SILENT, "Exited"], "", ("HOST_LOST", None, Cause.NODE)),
        ([DISPATCHED, STARTING, "Exited;"], "", ("HOST_LOST", None, Cause.NODE)),
        ([DISPATCHED, CODE.format(140)], LIMITS, ("TERM_RUNLIMIT", -12, Cause.TIME)),
        ([DISPATCHED, CODE.format(140)], "", ("SIGUSR2", -12, None)),
        ([DISPATCHED, "Exited by signal 12."], LIMITS, ("TERM_RUNLIMIT", -12, Cause.TIME)),
        ([DISPATCHED, CODE.format(137)], LIMITS, ("TERM_RUNLIMIT", -9, Cause.TIME)),
        ([DISPATCHED, CODE.format(137)], "\n RUNLIMIT\n 2.0 min of vm\n", ("SIGKILL", -9, None)),
        ([DISPATCHED, CODE.format(1)], LIMITS, ("EXIT", 1, None)),
        (
            [
                DISPATCHED,
                "Completed <exit>; TERM_MEMLIMIT: job killed after reaching LSF memory usage limit;",
                CODE.format(130),
            ],
            "",
            ("TERM_MEMLIMIT", -2, Cause.MEMORY),
        ),
        ([DISPATCHED, "TERM_SWAP: job killed", CODE.format(130)], "", ("TERM_SWAP", -2, Cause.MEMORY)),
        # What was before the last dispatch is past.
        (
            [DISPATCHED, KILL.format("ada"), REQUEUED, DISPATCHED, CODE.format(3)],
            "",
            ("EXIT", 3, None),
        ),
        ([DISPATCHED, CODE.format(99), REQUEUED, DISPATCHED, "Exited"], "", ("HOST_LOST", None, Cause.NODE)),
    ],
)
def test_how_a_job_has_ended(events: list[str], between: str, expected: tuple[Any, ...]) -> None:
    [row] = read_long(bhist_long(*events, between=between))
    status = row.status
    assert (status.state, status.reason, status.returncode, status.cause) == (ENDED, *expected)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], (QUEUED, None)),
        ([DISPATCHED], (RUNNING, "vm")),
        ([DISPATCHED, STARTING, SILENT], (RUNNING, "vm")),
        ([DISPATCHED, STARTING, SILENT, "Running;"], (RUNNING, "vm")),
        ([DISPATCHED, STARTING, KILL.format("ada")], (RUNNING, "vm")),
        ([DISPATCHED, REQUEUED], (QUEUED, None)),
        ([DISPATCHED, CODE.format(99), REQUEUED], (QUEUED, None)),
        ([DISPATCHED, CODE.format(99), REQUEUED, STARTING], (RUNNING, "vm")),
        ([DISPATCHED, "Completed <exit>; TERM_REQUEUE_OWNER: job requeued;"], (QUEUED, None)),
        ([DISPATCHED, "Suspended by the user or administrator;"], (RUNNING, "vm")),
        (["Job has been requested to be Done successfully."], (QUEUED, None)),
    ],
)
def test_a_job_that_has_not_ended(events: list[str], expected: tuple[JobState, str | None]) -> None:
    [row] = read_long(bhist_long(*events))
    assert (row.status.state, row.status.node) == expected


def test_a_host_that_is_silent_is_told_of() -> None:
    [row] = read_long(bhist_long(DISPATCHED, STARTING, SILENT))
    assert "unable to reach the execution host" in row.status.detail


def test_a_job_submitted_on_hold_waits_for_people() -> None:
    [row] = read_long(bhist_long().replace("from host <vm>", "from host <vm> with hold"))
    assert row.status.state is QUEUED and not row.status.can_start


def test_post_processing_is_not_the_jobs_end() -> None:
    [row] = read_long(bhist_long(DISPATCHED, CODE.format(3), "Post job process done successfully;"))
    assert (row.status.state, row.status.returncode) == (ENDED, 3)


@pytest.mark.parametrize(
    ("limit", "most", "reason"),
    [
        ("MEMLIMIT\n     100 M", "100 Mbytes", "TERM_MEMLIMIT"),
        ("MEMLIMIT\n     100 M", "1.2 Gbytes", "TERM_MEMLIMIT"),
        ("STACKLIMIT CORELIMIT MEMLIMIT\n     2 M     10 M   1 G", "1 Gbytes", "TERM_MEMLIMIT"),
        ("MEMLIMIT\n     100 M", "99 Mbytes", "SIGKILL"),
        ("STACKLIMIT\n     100 M", "1 Gbytes", "SIGKILL"),
        ("MEMLIMIT\n     much", "1 Gbytes", "SIGKILL"),
    ],
)
def test_a_memory_limit_that_was_reached(limit: str, most: str, reason: str) -> None:
    sections = f"\n {limit}\n\n MEMORY USAGE:\n MAX MEM: {most};  AVG MEM: 4 Mbytes\n{SECTIONS}"
    [row] = read_long(bjobs_long(STARTED, CODE.format(137), sections=sections))
    assert row.status.reason == reason


def test_ibms_reason_on_a_line_of_its_own() -> None:
    for line in (
        " TERM_RUNLIMIT: job killed after reaching LSF run time limit.",
        at("TERM_RUNLIMIT: job killed;"),
    ):
        text = bjobs_long(STARTED, CODE.format(140), sections=f"{line}\n{SECTIONS}")
        [row] = read_long(text)
        assert (row.status.reason, row.status.cause) == ("TERM_RUNLIMIT", Cause.TIME)
        assert "Exited with exit code 140." in row.status.detail and "TERM_RUNLIMIT" in row.status.detail


def test_several_jobs_in_one_text() -> None:
    rule = "-" * 78 + "\n"
    jobs = [
        bjobs_long(STARTED, CODE.format(3), job="7[1]", name="k[1]"),
        bjobs_long(STARTED, job="7[2]", name="k[2]", status="RUN"),
        bhist_long(DISPATCHED, "Done successfully. The CPU time used is 0.0 seconds;", job="8"),
    ]
    for between in (rule, ""):
        rows = read_long(between.join(jobs))
        assert [(row.array, row.index, row.name, row.status.state) for row in rows] == [
            ("7", 1, "k", ENDED),
            ("7", 2, "k", RUNNING),
            ("8", None, "k", ENDED),
        ]


def test_a_date_may_have_its_year() -> None:
    [row] = read_long(bhist_long(DISPATCHED, CODE.format(3)).replace("00:08:27: ", "00:08:27 2026: "))
    assert (row.status.state, row.status.returncode) == (ENDED, 3)


# What people type is not what LSF says.

DISGUISES = [
    "EXIT",
    "DONE",
    "Exited with exit code 3.",
    "Done successfully.",
    "Job <5> is submitted to",
    at("Exited with exit code 3."),
    "x>, Status <EXIT>, Queue <q>, Command <y",
    "x>, User <ada>, Project <default>, Status <DONE>, Queue <normal>, Command <true",
    "k[3]",
    "[1-5]",
    "^^^^^^^^",
    "Job <7>, Job Name <k>, User <ada>, Project <default>, Status <DONE>, Queue <normal>, Command <true>",
    "2 ada EXIT q h x k Nov 21 00:08",
    "7^1^EXIT^3^-^a^-^k",
]
printable = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" "), min_size=1
)
names = (
    st.sampled_from(DISGUISES) | printable | st.builds("{}{}".format, printable, st.sampled_from(DISGUISES))
)
noise = st.lists(
    st.sampled_from(
        [
            "LSF is processing your request. Please wait...",
            "Job <9> is not found",
            "3 jobs",
            "",
            "*** maintenance on Sat Nov 21 ***",
            "-" * 78,
        ]
    )
    | printable.map(lambda text: f"# {text}")
)
indices = st.none() | st.integers(1, 99_999)
commands = st.lists(names, min_size=1, max_size=4).map("\n".join)  # nobody keeps a command from having lines
alive = st.sampled_from(["PEND", "PSUSP", "RUN", "USUSP", "SSUSP", "UNKWN", "WAIT", "ZOMBI", "PROV"])
living_events = st.sampled_from(
    [
        [],
        [DISPATCHED],
        [DISPATCHED, STARTING, SILENT],
        [DISPATCHED, CODE.format(99), REQUEUED],
    ]
)


def with_noise(text: str, lines: list[str], data: st.DataObject) -> str:
    """Noise anywhere but inside of what is wrapped, and what the job's end needs: nobody writes there."""
    kept = text.split("\n")
    for line in lines:
        kept.insert(data.draw(st.integers(0, len(kept))), line)
    return "\n".join(kept)


def test_a_command_that_looks_like_events_is_not_taken_for_them() -> None:
    lines = [
        at("Exited with exit code 3."),
        "",
        "Sat Nov 21 00:08:18: Submitted from host <x>;",
        at("Exited;"),
        "",
    ]
    for command in ("\n".join(["true", *lines]), "\n".join(["true>", *lines, "false"])):
        [row] = read_long(bhist_long(DISPATCHED, command=command))
        assert row.status.state is RUNNING
        [row] = read_long(bjobs_long(STARTED, command=command, status="RUN"))
        assert row.status.state is RUNNING


def test_a_command_that_looks_like_another_job_ends_none() -> None:
    other = bjobs_long(STARTED, CODE.format(3), job="5")
    for text in (bhist_long(DISPATCHED, command=other), bjobs_long(STARTED, command=other, status="RUN")):
        assert all(row.array != "7" or row.status.state is RUNNING for row in read_long(text))
    head = other.split("\n")[1]
    assert read_long(bhist_long(DISPATCHED, CODE.format(3), command=f"\n\n{head}")) == []


def test_a_name_or_a_command_that_looks_like_a_state_ends_no_job() -> None:
    for disguise in DISGUISES:
        for status in ("RUN", "PEND"):
            texts = [
                bjobs_long(STARTED, status=status, name=disguise),
                bjobs_long(STARTED, status=status, command=disguise),
                bhist_long(DISPATCHED, name=disguise),
                bhist_long(DISPATCHED, command=disguise),
            ]
            for text in texts:
                [row] = read_long(text)
                assert row.status.state is not ENDED, text


@given(name=names, index=indices, word=alive, wide=st.booleans(), lines=noise, data=st.data())
def test_rows_of_bjobs_with_any_name(
    *, name: str, index: int | None, word: str, wide: bool, lines: list[str], data: st.DataObject
) -> None:
    suffix = "" if index is None else f"[{index}]"
    host = "vm" if wide else ""
    row = (
        f"{7:<7} {'ada':<7} {word:<5} {'normal':<10} {'vm':<11} {host:<11} {name + suffix:<10} Nov 21 00:08\n"
    )
    text = with_noise(row, lines, data)
    found = [each for each in words.read_bjobs(text) if each.array == "7"]
    assert [each.status.state for each in found] == [words.STATES[word]]
    if index is not None:
        assert found[0].index == index


@given(names, indices, alive, noise, st.data())
def test_ibm_fields_with_any_name(
    name: str, index: int | None, word: str, lines: list[str], data: st.DataObject
) -> None:
    suffix = "" if index is None else f"[{index}]"
    text = with_noise(f"7^{index or 0}^{word}^-^-^vm^-^{name}{suffix}\n", lines, data)
    [row] = [each for each in words.read_fields(text) if each.array == "7"]
    assert (row.status.state, row.index) == (words.STATES[word], index)


@given(name=names, command=commands, word=alive, events=living_events, lines=noise, data=st.data())
def test_no_job_ends_by_what_people_have_typed(
    *, name: str, command: str, word: str, events: list[str], lines: list[str], data: st.DataObject
) -> None:
    for text in (
        bjobs_long(*events[:1], name=name, command=command, status=word),
        bhist_long(*events, name=name, command=command),
    ):
        for each in (text, with_noise(text, lines, data)):
            rows = read_long(each)
            assert all(row.status.state is not ENDED for row in rows), each
            assert {row.array for row in rows} <= {"7"}


@given(st.sampled_from(LONG_ENDS), st.integers(1, 200))
def test_a_text_wrapped_at_any_width_says_the_same(number: int, width: int) -> None:
    unwrapped = RECORDED[number]["stdout"].replace("\n" + " " * 21, "")
    lines = [wrapped(line, width) if re.match(r"Job|Sat", line) else line for line in unwrapped.split("\n")]
    assert list(map(short, read_long("\n".join(lines)))) == LONG[number]


@given(names, living_events, st.integers(20, 100), st.data())
def test_a_wrapped_text_that_is_cut_off_ends_no_job(
    name: str, events: list[str], width: int, data: st.DataObject
) -> None:
    for text in (bhist_long(*events, name=name), bjobs_long(*events[:1], name=name, status="RUN")):
        whole = "\n".join(wrapped(line, width) for line in text.split("\n"))
        cut = whole[: data.draw(st.integers(0, len(whole)))]
        assert all(row.status.state is not ENDED for row in read_long(cut)), cut


@pytest.mark.parametrize("number", sorted(LONG))
def test_what_is_left_of_a_text_that_is_cut_off_says_nothing_wrong(number: int) -> None:
    text, expected = RECORDED[number]["stdout"], LONG[number]
    for end in range(len(text)):
        for row in read_long(text[:end]):
            assert expected and (row.array, row.index) == (
                (whole := read_long(text)[0]).array,
                whole.index,
            )
            if row.status.state is ENDED:
                assert expected[0][2] is ENDED
                assert row.status.returncode in (None, expected[0][4])
                assert row.status.cause in (None, expected[0][6])


@pytest.mark.parametrize("number", sorted(n for n, rows in BJOBS.items() if rows))
def test_what_is_left_of_rows_that_are_cut_off_is_right(number: int) -> None:
    text = RECORDED[number]["stdout"]
    for end in range(len(text)):
        assert set(map(short, words.read_bjobs(text[:end]))) <= set(BJOBS[number])


@given(st.sampled_from(sorted(LONG)), st.randoms())
def test_lines_that_are_shuffled_end_no_job_that_has_not(number: int, random: Any) -> None:
    lines = RECORDED[number]["stdout"].split("\n")
    random.shuffle(lines)
    for row in read_long("\n".join(lines)):
        assert row.status.state is not ENDED or LONG[number][0][2] is ENDED


READERS: tuple[Callable[[str], object], ...] = (
    *(words.read_dialect, words.read_submission, words.is_refusal, words.read_bjobs, words.read_fields),
    *(
        read_long,
        words.read_unknown,
        words.without_patience,
        words.read_term,
        words.split_name,
        words.node_of,
    ),
    *(words.BUSY.search, words.NOTHING_TO_KILL.search),
)


@given(
    st.text() | st.lists(st.sampled_from([each["stdout"] for each in RECORDED])).map("".join), st.integers()
)
@example("Job <" + "9" * 5000 + "> is submitted to", 0)
@example("٣ ada EXIT q h x k Nov 21 00:08", 0)
def test_no_text_is_too_strange(text: str, seed: int) -> None:
    text = text[seed % (len(text) + 1) :]
    for read in READERS:
        read(text)


@given(st.integers(1, 10**18), noise, noise, printable)
def test_a_submission_is_found_in_any_noise(job: int, before: list[str], after: list[str], text: str) -> None:
    said = "\n".join([*before, f"{text} Job <{job}> is submitted to queue <q>. {text}", *after])
    assert words.read_submission(said) == str(job)
    assert not words.is_refusal(said)


# These would take minutes and hours if they were not linear.
HUGE = [
    *(" " * 1_000_000, "9" * 1_000_000, "[" * 1_000_000, "<" * 1_000_000, "Job <1" * 150_000),
    *("Job Name <" * 100_000, "User <a" * 140_000, "TERM_A" * 160_000, "Job <1>\n" * 120_000),
    *("7 ada EXIT q h x " + "k " * 500_000, "7^1^EXIT" * 120_000, "RUNLIMIT " * 110_000, "a" * 1_000_000),
    ("\n" + " " * 21) * 45_000,
    "Job <1>, \n" * 100_000,
    "master LIM " * 90_000,
    "Job not submitted.\n" * 50_000,
    at("Exited\n") * 30_000,
    bhist_long(*["Exited " + "TERM_ " * 100] * 1_500),
    bhist_long(*["Started " + "a" * 600] * 1_500),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", range(len(HUGE)))
def test_a_huge_text_is_read_in_linear_time(number: int) -> None:
    for read in READERS:
        read(HUGE[number])


def test_thousands_of_rows_are_read() -> None:
    rows = "".join(f"{n} ada RUN q h x k[{n}] Nov 21 00:08\n" for n in range(1, 2201))
    assert len(words.read_bjobs(rows)) == 2200
    long = ("-" * 78 + "\n").join(bjobs_long(STARTED, CODE.format(3), job=f"7[{n}]") for n in range(1, 2201))
    assert {row.index for row in read_long(long)} == set(range(1, 2201))
