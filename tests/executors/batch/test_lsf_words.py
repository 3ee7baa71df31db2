"""What LSF's commands say is understood, and nothing ends a job that has not ended.

The recorded answers are those of a scheduler of the openlava family; IBM's forms are the documented ones.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

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
