"""How a job has ended, as the long texts of bjobs and bhist tell, in the words of both families."""

from __future__ import annotations

from typing import Any

import pytest

from fractal_runner.executors.batch import lsf_words as words
from fractal_runner.executors.batch.lsf_long import read_long
from fractal_runner.executors.batch.scheduler import Cause, JobState

QUEUED, RUNNING, ENDED = JobState.QUEUED, JobState.RUNNING, JobState.ENDED

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


@pytest.mark.parametrize("word", sorted(words.STATES))
def test_each_state_is_read_in_the_header(word: str) -> None:
    [row] = read_long(bjobs_long(status=word))
    assert row.status.state is words.STATES[word]
