"""What Slurm's commands say is understood, and what they are given is what was meant.

The recorded answers are those of Slurm 22.05.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from submitit.slurm import slurm as submitit_slurm

from fractal_runner.executors.batch import slurm_words as words
from fractal_runner.executors.batch.scheduler import (
    ArrayRequest,
    JobPlace,
    JobState,
    SchedulerError,
    SubmissionRefusedError,
)
from fractal_runner.executors.batch.slurm_scheduler import SlurmScheduler
from fractal_runner.executors.batch.slurm_submission import Element, Submitter

QUEUED, RUNNING, LOST, ENDED = JobState.QUEUED, JobState.RUNNING, JobState.LOST, JobState.ENDED

SQUEUE = """\
13|9|COMPLETED|0|n1|None|
13|2|FAILED|9|n1|JobLaunchFailure|
13|1|FAILED|768|n1|NonZeroExitCode|
13|3|OUT_OF_MEMORY|253|n1|OutOfMemory|
13|10|PENDING|0|n/a|JobArrayTaskLimit|
13|6|RUNNING|0|n1|None|
13|7|TIMEOUT|15|n1|TimeLimit|
13|8|CANCELLED|15|n2|None|
13|5|COMPLETING|0|n1|None|
11|2|SUSPENDED|0|n1|None|
11|3|PENDING|0|n/a|job requeued in held state|
28|0|PENDING|0|n/a|ReqNodeNotAvail, UnavailableNodes:n[1-4]|
10|N/A|CANCELLED|0|n/a|JobHeldUser|
14|10-12,14-16,18%4|PENDING|0|n/a|JobArrayTaskLimit|
"""
SACCT = """\
13_0|COMPLETED|0:0|n1
13_0.batch|COMPLETED|0:0|n1
13_1|FAILED|3:0|n1
13_1.batch|FAILED|3:0|n1
13_2|FAILED|0:9|n1
13_2.batch|CANCELLED|0:9|n1
13_3|OUT_OF_MEMORY|0:125|n1
13_3.batch|OUT_OF_MEMORY|0:125|n1
13_4|CANCELLED by 0|0:0|n1
13_4.batch|CANCELLED|0:15|n1
13_7|COMPLETED|0:0|n1
13_7.batch|COMPLETED|0:0|n1
13_7.0|FAILED|5:0|n1
13_8|FAILED|1:0|n2
13_8.batch|FAILED|1:0|n2
13_8.0|OUT_OF_MEMORY|0:125|n2
13_9|NODE_FAIL|0:0|n1
13_[10-12,14-16,18-19%4]|CANCELLED by 0|0:0|None assigned
24|CANCELLED by 4294967294|0:0|None assigned
"""


def answered(text: str, job: str, read: Callable[[str], words.Answer] = words.read_squeue) -> tuple[Any, ...]:
    status = read(text).of(job)
    assert status is not None
    return status.state, status.reason, status.returncode, status.node


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("13_9", (ENDED, "COMPLETED", 0, "n1")),
        ("13_1", (ENDED, "FAILED", 3, "n1")),
        ("13_2", (ENDED, "FAILED", -9, "n1")),
        ("13_3", (ENDED, "OUT_OF_MEMORY", None, "n1")),
        ("13_7", (ENDED, "TIMEOUT", -15, "n1")),
        ("13_8", (ENDED, "CANCELLED", -15, "n2")),
        ("13_10", (QUEUED, "JobArrayTaskLimit", None, None)),
        ("13_6", (RUNNING, None, None, "n1")),
        ("13_5", (RUNNING, None, None, "n1")),
        ("11_2", (RUNNING, None, None, "n1")),
        ("10_0", (ENDED, "CANCELLED", None, None)),
        ("14_15", (QUEUED, "JobArrayTaskLimit", None, None)),
    ],
)
def test_rows_of_squeue(job: str, expected: tuple[Any, ...]) -> None:
    assert answered(SQUEUE, job) == expected


def test_jobs_without_a_row_are_unknown_to_squeue() -> None:
    answer = words.read_squeue(SQUEUE)
    assert [answer.of(job) for job in ("13_99", "14_13", "9_0", "nonsense", "")] == [None] * 5


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("13_0", (ENDED, "COMPLETED", 0, "n1")),
        ("13_1", (ENDED, "FAILED", 3, "n1")),
        ("13_2", (ENDED, "FAILED", -9, "n1")),
        ("13_3", (ENDED, "OUT_OF_MEMORY", None, "n1")),
        ("13_4", (ENDED, "CANCELLED", None, "n1")),
        ("13_7", (ENDED, "COMPLETED", 0, "n1")),
        ("13_8", (ENDED, "OUT_OF_MEMORY", 1, "n2")),
        ("13_9", (ENDED, "NODE_FAIL", None, "n1")),
        ("13_16", (ENDED, "CANCELLED", None, None)),
        ("24_0", (ENDED, "CANCELLED", None, None)),
    ],
)
def test_rows_of_sacct(job: str, expected: tuple[Any, ...]) -> None:
    assert answered(SACCT, job, words.read_sacct) == expected


def test_who_cancelled_a_job_is_said() -> None:
    answer = words.read_sacct(SACCT)
    known, unknown = answer.of("13_4"), answer.of("24_0")
    assert known is not None and "CANCELLED by root (uid 0)" in known.detail
    assert unknown is not None and "CANCELLED by uid 4294967294" in unknown.detail


@pytest.mark.parametrize("word", sorted(words.STATES))
def test_each_state_is_read_from_both_commands(word: str) -> None:
    assert answered(f"1|0|{word}|0|n1|None|", "1_0")[0] is words.STATES[word]
    assert answered(f"1_0|{word}|0:0|n1", "1_0", words.read_sacct)[0] is words.STATES[word]


def test_the_states_of_the_manual_are_all_known() -> None:
    manual = """BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY
        PENDING PREEMPTED RUNNING RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED SIGNALING
        SPECIAL_EXIT STAGE_OUT STOPPED SUSPENDED TIMEOUT"""
    assert set(manual.split()) == set(words.STATES)


def test_an_unknown_state_is_no_end_and_is_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, words.__name__):
        states = [answered("1|0|DREAMING|0|n1|None|", "1_0")[0] for _ in range(3)]
    assert states == [RUNNING] * 3
    assert [record.getMessage().count("DREAMING") for record in caplog.records] == [1]


@pytest.mark.parametrize("reason", sorted(words.NEVER_STARTS))
def test_a_job_with_this_reason_does_not_start_of_itself(reason: str) -> None:
    for text in (reason, reason.replace(" ", "_")):
        status = words.read_squeue(f"1|0|PENDING|0|n/a|{text}|").of("1_0")
        assert status is not None and not status.can_start
        assert status.state is QUEUED and text in status.detail


@pytest.mark.parametrize(
    "reason",
    [
        *("None", "Priority", "Resources", "BeginTime", "Dependency", "JobArrayTaskLimit", "PartitionDown"),
        *("AssocMaxJobsLimit", "QOSMaxCpuPerUserLimit", "QOSGrpMemLimit", "Reservation", "Licenses"),
        "ReqNodeNotAvail, UnavailableNodes:n[1-4]",
        "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
    ],
)
def test_a_job_with_this_reason_may_still_start(reason: str) -> None:
    status = words.read_squeue(f"1|0|PENDING|0|n/a|{reason}|").of("1_0")
    assert status is not None and status.can_start


@pytest.mark.parametrize("word", ["REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"])
def test_a_held_job_does_not_start_of_itself(word: str) -> None:
    status = words.read_squeue(f"1|0|{word}|0|n/a|None|").of("1_0")
    assert status is not None and not status.can_start


@pytest.mark.parametrize(
    ("text", "code"),
    [
        *(("0", 0), ("768", 3), ("65280", 255), ("9", -9), ("15", -15), ("137", -9), ("253", None)),
        *(("0:0", 0), ("3:0", 3), ("0:9", -9), ("0:125", None), ("0:53", -53), ("", None), ("x", None)),
    ],
)
def test_exit_codes(text: str, code: int | None) -> None:
    assert words.read_returncode(text) == code


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("MaxArraySize            = 1001\nMaxBatchRequeue         = 5\n", 1001),
        ("MaxArraySize = 1001\nSchedulerParameters     = bf_interval=1,max_array_tasks=20,x=3\n", 20),
        ("nothing of that kind", None),
    ],
)
def test_how_many_jobs_an_array_may_have(text: str, count: int | None) -> None:
    assert words.read_max_array(text) == count


def test_array_ids_are_those_of_either_command() -> None:
    assert words.read_array_ids(SQUEUE) == {"10", "11", "13", "14", "28"}
    assert words.read_array_ids(SACCT) == {"13", "24"}
    assert words.read_array_ids("CLUSTER: tests\n\n12") == {"12"}


def test_arrays_that_were_refused_are_told_from_those_that_failed() -> None:
    refused = "31|0|FAILED|1|n/a|BadConstraints|\n31|1|FAILED|1|n/a|BadConstraints|\n"
    failed = "32|0|FAILED|256|n1|NonZeroExitCode|\n33|0|PENDING|0|n/a|BadConstraints|\n"
    mixed = "34|0|FAILED|1|n/a|BadConstraints|\n34|1|RUNNING|0|n1|None|\n"
    assert words.read_refused_arrays(refused + failed + mixed) == {"31"}


# Whatever a command says.

_ROWS = st.lists(
    st.one_of(
        st.text(max_size=30),
        st.lists(
            st.one_of(
                st.sampled_from(
                    [*words.STATES, "1_0", "1", "0", "1_[0-9%2]", "CANCELLED by 0", "0:9", "n/a"]
                ),
                st.text(alphabet="0123456789_[]-,:%|.NA", max_size=12),
            ),
            min_size=3,
            max_size=8,
        ).map("|".join),
    ),
    max_size=8,
).map("\n".join)


@given(_ROWS)
def test_no_answer_is_too_strange_to_be_read(text: str) -> None:
    for read in (words.read_squeue, words.read_sacct):
        status = read(text).of("1_0")
        assert status is None or status.state is not LOST
    words.read_array_ids(text)
    words.read_refused_arrays(text)
    words.read_max_array(text)
    words.is_refusal(text)


@given(_ROWS)
def test_nothing_has_ended_without_a_word_for_an_end(text: str) -> None:
    ends = {word for word, state in words.STATES.items() if state is ENDED}
    for read in (words.read_squeue, words.read_sacct):
        status = read(text).of("1_0")
        if status is not None and status.state is ENDED:
            assert status.reason in ends
            assert status.reason in text


@given(st.text(max_size=40).filter(lambda text: text.strip().split(" ")[0].rstrip("+") not in words.STATES))
def test_no_other_word_is_an_end(word: str) -> None:
    for read, row in (
        (words.read_squeue, f"1|0|{word}|0|n1|None|"),
        (words.read_sacct, f"1_0|{word}|0:0|n1"),
    ):
        status = read(row).of("1_0")
        assert status is None or status.state is RUNNING


@given(st.integers(0, 255), st.integers(0, 64))
def test_exit_codes_are_the_same_in_both_forms(code: int, number: int) -> None:
    raw = str(number if number else code << 8)
    assert words.read_returncode(raw) == words.read_returncode(f"{0 if number else code}:{number}")
    assert words.read_returncode(raw) == os.waitstatus_to_exitcode(int(raw))


# Refusals.

REFUSALS = [
    "sbatch: error: invalid partition specified: nosuch\n"
    "sbatch: error: Batch job submission failed: Invalid partition name specified",
    "sbatch: error: Memory specification can not be satisfied\n"
    "sbatch: error: Batch job submission failed: Requested node configuration is not available",
    "sbatch: error: Invalid generic resource (gres) specification",
    "sbatch: error: Invalid --time specification",
    "sbatch: unrecognized option '--foo=1'\nTry \"sbatch --help\" for more information",
    "sbatch: error: Batch job submission failed: Invalid feature specification",
    "sbatch: error: Batch job submission failed: Required partition not available (inactive or drain)",
    "sbatch: error: Batch job submission failed: Invalid node name specified",
    "sbatch: error: Batch job submission failed: Invalid job array specification",
    "sbatch: error: Batch job submission failed: Requested reservation is invalid",
    "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
    "sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: Job violates "
    "accounting/QOS policy (job submit limit, user's size and/or time limits)",
    "sbatch: error: something that no Slurm has said before",
]
NO_REFUSALS = [
    "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates "
    "accounting/QOS policy (job submit limit, user's size and/or time limits)",
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
    "accounting/QOS policy (job submit limit, user's size and/or time limits)",
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, "
    "user's size and/or time limits)",
    "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
    "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
    "sbatch: error: s_p_parse_file: cannot stat file /nonexist/slurm.conf: No such file or directory",
    "ssh: connect to host login1 port 22: Connection refused",
    "Permission denied (publickey).",
    "sbatch: warning: can't run 1 processes on 2 nodes, setting nnodes to 1",
    "",
]


@pytest.mark.parametrize("stderr", REFUSALS)
def test_it_is_a_refusal_to_say(stderr: str) -> None:
    assert words.is_refusal(stderr)


@pytest.mark.parametrize("stderr", NO_REFUSALS)
def test_it_is_no_refusal_to_say(stderr: str) -> None:
    assert not words.is_refusal(stderr)


# What the commands are, and how their answers go together.


class Recorded:
    """In the place of Slurm: answers by program, and the commands that there were."""

    def __init__(self, **answers: tuple[int, str, str] | Exception | None) -> None:
        self.answers = answers
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(
        self, command: Sequence[str], *, env: Mapping[str, str], **_: Any
    ) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(command))
        self.environments.append(env)
        answer = self.answers.get(command[0])
        if answer is None:
            raise FileNotFoundError(2, "No such file or directory", command[0])
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, *answer)

    @property
    def programs(self) -> list[str]:
        return [command[0] for command in self.commands]


DISABLED = (1, "", "Slurm accounting storage is disabled\n")
UNKNOWN = (1, "", "slurm_load_jobs error: Invalid job id specified\n")


def test_one_command_tells_of_all_jobs_that_have_not_ended() -> None:
    run = Recorded(squeue=(0, SQUEUE, ""))
    states = SlurmScheduler(run=run).states(["13_6", "13_10", "13_9", "11_2"])
    assert [status.state for status in states.values()] == [RUNNING, QUEUED, ENDED, RUNNING]
    assert run.commands == [
        [
            *("squeue", "--noheader", "--array", "--states=all", "--me", "--jobs=13,11"),
            f"--Format={words.SQUEUE_FIELDS}",
        ]
    ]


def test_nothing_is_asked_of_no_jobs() -> None:
    run = Recorded()
    scheduler = SlurmScheduler(run=run)
    scheduler.cancel([])
    assert scheduler.states([]) == {}
    assert run.commands == []


def test_sacct_tells_of_jobs_that_squeue_has_forgotten() -> None:
    run = Recorded(squeue=UNKNOWN, sacct=(0, SACCT, ""))
    states = SlurmScheduler(run=run).states(["13_1", "13_77"])
    assert (states["13_1"].state, states["13_1"].returncode) == (ENDED, 3)
    assert states["13_77"].state is LOST
    assert run.commands[1][-1] == "--jobs=13"


def test_sacct_explains_an_end_that_squeue_knows() -> None:
    queue = "13|8|FAILED|256|n2|NonZeroExitCode|\n13|4|CANCELLED|15|n1|None|\n"
    states = SlurmScheduler(run=Recorded(squeue=(0, queue, ""), sacct=(0, SACCT, ""))).states(
        ["13_8", "13_4"]
    )
    assert states["13_8"].reason == "OUT_OF_MEMORY"
    assert "by root" in states["13_4"].detail


@pytest.mark.parametrize("word", ["NODE_FAIL", "PREEMPTED", "PENDING", "RUNNING", "COMPLETED"])
def test_sacct_does_not_contradict_squeue(word: str) -> None:
    queue = (0, "13|1|FAILED|768|n1|NonZeroExitCode|\n", "")
    now = [0.0]
    run = Recorded(squeue=queue, sacct=(0, f"13_1|{word}|0:0|n1", ""))
    scheduler = SlurmScheduler(run=run, clock=lambda: now[0])
    status = scheduler.states(["13_1"])["13_1"]
    if word in ("PENDING", "RUNNING"):  # it may be behind, and know more in a moment
        assert status.state == RUNNING
        now[0] = 6.0
        status = scheduler.states(["13_1"])["13_1"]
    assert (status.reason, status.returncode) == ("FAILED", 3)


def test_a_job_that_sacct_alone_still_has_running_is_lost() -> None:
    run = Recorded(squeue=UNKNOWN, sacct=(0, "13_1|RUNNING|0:0|n1", ""))
    status = SlurmScheduler(run=run).states(["13_1"])["13_1"]
    assert (status.state, status.node) == (LOST, "n1")


@pytest.mark.parametrize("sacct", [DISABLED, None], ids=["disabled", "missing"])
def test_without_accounting_it_is_asked_once(sacct: tuple[int, str, str] | None) -> None:
    run = Recorded(squeue=UNKNOWN, sacct=sacct)
    scheduler = SlurmScheduler(run=run)
    assert [scheduler.states(["5_0"])["5_0"].state for _ in range(3)] == [LOST] * 3
    assert run.programs.count("sacct") == 1


def test_a_failing_sacct_is_an_error_only_if_it_is_needed() -> None:
    failing = (1, "", "sacct: error: Problem talking to the database: Connection refused")
    now = iter(range(0, 1000, 10))
    scheduler = SlurmScheduler(run=Recorded(squeue=(0, SQUEUE, ""), sacct=failing), clock=lambda: next(now))
    assert scheduler.states(["13_1"])["13_1"].returncode == 3
    with pytest.raises(SchedulerError, match="Problem talking to the database"):
        scheduler.states(["13_1", "13_99"])


def test_a_failing_squeue_says_nothing_about_jobs() -> None:
    failing = (1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(SchedulerError, match=r"squeue failed with exit code 1: .*connect failure"):
        SlurmScheduler(run=Recorded(squeue=failing, sacct=(0, SACCT, ""))).states(["13_1"])


def test_a_command_that_does_not_end_is_an_error() -> None:
    run = Recorded(squeue=subprocess.TimeoutExpired("squeue", 7))
    with pytest.raises(SchedulerError, match="squeue did not answer within 7 s"):
        SlurmScheduler(run=run, command_timeout=7).states(["1_0"])


def test_a_missing_program_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(SchedulerError, match=r"squeue was not found: .* login node.*command_prefix"):
        SlurmScheduler(run=Recorded()).states(["1_0"])


def test_one_unknown_array_does_not_hide_the_others() -> None:
    class Old(Recorded):
        def __call__(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
            self.answers["squeue"] = UNKNOWN if any("--jobs" in word for word in command) else (0, SQUEUE, "")
            return super().__call__(command, **options)

    states = SlurmScheduler(run=Old(sacct=DISABLED)).states(["13_6", "99_0"])
    assert [status.state for status in states.values()] == [RUNNING, LOST]


def test_many_arrays_are_not_named_one_by_one() -> None:
    run = Recorded(squeue=(0, SQUEUE, ""), sacct=DISABLED)
    SlurmScheduler(run=run).states([f"{array}_0" for array in range(500)])
    assert not any(word.startswith("--jobs") for word in run.commands[0])


def test_arrays_are_found_by_name_in_both_commands(request_for: Callable[..., ArrayRequest]) -> None:
    run = Recorded(
        squeue=(0, "31|1|RUNNING|0|n1|None|\n31|0|RUNNING|0|n1|None|\n", ""), sacct=(0, "9_0|x|y|z", "")
    )
    assert SlurmScheduler(run=run).find(request_for(count=2)) == [["9_0", "9_1"], ["31_0", "31_1"]]
    assert all("--name=fr-1" in command for command in run.commands)


@pytest.mark.parametrize(
    ("squeue", "sacct"),
    [
        ((1, "", "slurm_load_jobs error: Unable to contact slurm controller"), (0, "9_0|x|y|z", "")),
        ((0, "", ""), (1, "", "sacct: error: Problem talking to the database")),
    ],
)
def test_no_answer_is_not_the_same_as_no_array(
    squeue: tuple[int, str, str], sacct: tuple[int, str, str], request_for: Callable[..., ArrayRequest]
) -> None:
    with pytest.raises(SchedulerError):
        SlurmScheduler(run=Recorded(squeue=squeue, sacct=sacct)).find(request_for())


def test_cancelling_names_runs_of_jobs_and_whole_arrays(request_for: Callable[..., ArrayRequest]) -> None:
    run = Recorded(squeue=(0, "31|0|RUNNING|0|n1|None|\n", ""), sacct=DISABLED, scancel=(0, "", ""))
    scheduler = SlurmScheduler(run=run)
    [ids] = scheduler.find(request_for(count=3))
    scheduler.cancel([*ids, "7_4", "7_0", "7_1", "7_2"])
    assert run.commands[-1] == ["scancel", "31", "7_[0-2]", "7_4"]


def test_cancelling_very_many_takes_several_commands() -> None:
    run = Recorded(scancel=(0, "", ""))
    SlurmScheduler(run=run).cancel([f"7_{2 * number}" for number in range(1200)])
    assert [len(command) for command in run.commands] == [501, 501, 201]


@pytest.mark.parametrize(
    "stderr",
    [
        "scancel: error: Kill job error on job id 5_1: Invalid job id specified",
        "scancel: error: Kill job error on job id 5_1: Job/step already completing or completed",
    ],
)
def test_jobs_that_have_ended_are_no_mistake_to_cancel(stderr: str) -> None:
    SlurmScheduler(run=Recorded(scancel=(1, "", stderr))).cancel(["5_1"])


def test_what_could_not_be_cancelled_is_an_error() -> None:
    said = "scancel: error: Kill job error on job id 5_1: Access/permission denied"
    with pytest.raises(SchedulerError, match="permission denied"):
        SlurmScheduler(run=Recorded(scancel=(1, "", said))).cancel(["5_1"])


def test_the_size_of_arrays_is_asked_for_once() -> None:
    run = Recorded(scontrol=(0, "MaxArraySize            = 201\n", ""))
    scheduler = SlurmScheduler(run=run)
    assert [scheduler.max_array, scheduler.max_array] == [201, 201]
    assert run.commands == [["scontrol", "show", "config"]]
    assert SlurmScheduler(run=run, max_array=5).max_array == 5
    assert SlurmScheduler(run=Recorded()).max_array == 1000


def test_slurms_variables_do_not_reach_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SLURM_MEM_PER_CPU", "SLURM_TIME_FORMAT", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/x.conf")
    run = Recorded(squeue=(0, SQUEUE, ""))
    SlurmScheduler(run=run).states(["13_6"])
    slurms = {
        name: value for name, value in run.environments[0].items() if re.match("S(LURM|QUEUE|ACCT)", name)
    }
    assert slurms == {"SLURM_CONF": "/etc/x.conf", "SLURM_BITSTR_LEN": "0"}
    assert run.environments[0]["LC_ALL"] == "C"


def test_a_prefix_is_in_front_of_every_command() -> None:
    run = Recorded(sudo=(0, SQUEUE, ""))
    SlurmScheduler(run=run, command_prefix="sudo -u 'some one'").states(["13_6"])
    assert run.commands[0][:4] == ["sudo", "-u", "some one", "env"]
    assert "squeue" in run.commands[0]


def test_ssh_gets_one_word_that_its_shell_takes_apart_again() -> None:
    run = Recorded(ssh=(0, SQUEUE, ""))
    SlurmScheduler(run=run, command_prefix=["ssh", "login1"]).states(["13_6"])
    prefix, command = run.commands[0][:2], run.commands[0][2:]
    assert prefix == ["ssh", "login1"]
    assert len(command) == 1
    assert f"--Format={words.SQUEUE_FIELDS}" in shlex.split(command[0])


# The script, and how it is submitted.


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[..., ArrayRequest]:
    def make(**changes: Any) -> ArrayRequest:
        values: dict[str, Any] = {"name": "fr-1", "directory": tmp_path, "count": 3, "cpus": 1, **changes}
        return ArrayRequest(**{"seen_as": str(values["directory"]), **values})

    return make


@pytest.fixture
def sbatch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch, that keeps its script and its environment; `answer` there may be another one."""
    place = tmp_path_factory.mktemp("bin")
    (place / "answer").write_text("echo Submitted batch job 12\n")
    program = place / "sbatch"
    program.write_text(f'#!/bin/sh\ncp "$1" {place}/script\nenv >{place}/env\n. {place}/answer\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def options_of(script: str) -> dict[str, str]:
    """What sbatch takes from the script: nothing after its first command."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            for word in shlex.split(line[8:]):
                name, _, value = word.partition("=")
                found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


def test_an_array_is_submitted(
    sbatch: Path, request_for: Callable[..., ArrayRequest], tmp_path: Path
) -> None:
    request = request_for(cpus=4, memory=4 * 10**9, gpus=2, time=61, queue="main", account="me")
    assert SlurmScheduler().submit(request) == ["12_0", "12_1", "12_2"]
    assert options_of((sbatch / "script").read_text()) == {
        "--array": "0-2",
        "--job-name": "fr-1",
        "--cpus-per-task": "4",
        "--nodes": "1",
        "--mem": "3815M",
        "--gres": "gpu:2",
        "--time": "2",
        "--partition": "main",
        "--account": "me",
        "--signal": "B:USR2@12",
        "--output": f"{tmp_path}/job-%a.log",
        "--open-mode": "append",
        "--requeue": "",
    }


def test_an_array_that_says_nothing_leaves_the_rest_to_slurm(
    sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    assert SlurmScheduler(requeue=False).submit(request_for(count=1)) == ["12_0"]
    options = options_of((sbatch / "script").read_text())
    assert options.keys() == {
        *("--array", "--job-name", "--cpus-per-task", "--nodes", "--signal", "--output", "--open-mode"),
        "--no-requeue",
    }
    assert options["--array"] == "0-0"


@pytest.mark.parametrize("memory", [1, 2**20, 2**20 + 1, 10**9, 4 * 10**9, 2**40])
def test_memory_is_never_less_than_asked_for(
    memory: int, sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    SlurmScheduler().submit(request_for(memory=memory))
    given = int(options_of((sbatch / "script").read_text())["--mem"].removesuffix("M"))
    assert given * 2**20 >= memory > (given - 1) * 2**20


@pytest.mark.parametrize(("seconds", "lead"), [(60, 6), (61, 12), (600, 60), (3600, 90), (None, 30)])
def test_a_job_is_told_before_its_time_is_up(
    seconds: float | None, lead: int, sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    SlurmScheduler().submit(request_for(time=seconds))
    assert options_of((sbatch / "script").read_text())["--signal"] == f"B:USR2@{lead}"


def test_defaults_and_a_calls_own_options_go_together(
    sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    scheduler = SlurmScheduler(
        qos="long",
        constraint="avx2",
        exclude="n1",
        extra_lines=["#SBATCH --reservation=course"],
        setup=["module load x"],
        env={"A": "a b", "B": "b"},
    )
    extra = scheduler.check(
        {
            "constraint": "a|b&c",
            "exclude": ["n2", "n[3-4]"],
            "nodelist": "n7",
            "needs_gpu": True,
            "ntasks_per_node": 2,
            "extra_lines": ["--nice=5 --comment='a b'"],
            "pre_submission_commands": ["  source  env.sh"],
            "user_local_exports": {"B": "c'$(d)"},
        }
    )
    scheduler.submit(request_for(extra=extra, cpus=4))
    script = (sbatch / "script").read_text()
    options = options_of(script)
    assert (options["--qos"], options["--constraint"], options["--exclude"]) == (
        "long",
        "a|b&c",
        "n1,n2,n[3-4]",
    )
    assert (options["--nodelist"], options["--gres"], options["--comment"]) == ("n7", "gpu:1", "a b")
    assert (options["--reservation"], options["--nice"]) == ("course", "5")
    assert (options["--ntasks-per-node"], options["--cpus-per-task"]) == ("2", "2")
    places = [script.index(part) for part in ("export A='a b'", "module load x", "  source  env.sh", "exec ")]
    assert places == sorted(places)
    assert "export B=" + shlex.quote("c'$(d)") in script


@pytest.mark.parametrize(
    ("gpus", "extra", "gres"),
    [
        (2, {"gres": "gpu:a100:1"}, "gpu:a100:1"),
        (2, {"gres": "tmp:5G"}, "tmp:5G,gpu:2"),
        (2, {"needs_gpu": True}, "gpu:2"),
        (0, {"needs_gpu": False}, None),
        (0, {"gres": "shard:2,gpu"}, "shard:2,gpu"),
    ],
)
def test_gpus_and_gres(
    gpus: int, extra: Any, gres: str | None, sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    SlurmScheduler().submit(request_for(gpus=gpus, extra=extra))
    assert options_of((sbatch / "script").read_text()).get("--gres") == gres


def test_a_users_variables_count_only_where_the_array_says_nothing(
    sbatch: Path, request_for: Callable[..., ArrayRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "SBATCH_PARTITION",
        "SBATCH_ACCOUNT",
        "SBATCH_WAIT",
        "SBATCH_ARRAY_INX",
        "SLURM_MEM_PER_CPU",
    ):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/x")
    SlurmScheduler().submit(request_for(queue="main"))
    reached = {line.partition("=")[0] for line in (sbatch / "env").read_text().splitlines()}
    assert {name for name in reached if name.startswith(("SBATCH", "SLURM"))} == {
        "SBATCH_ACCOUNT",
        "SLURM_CONF",
    }
    assert "LC_ALL" not in reached - os.environ.keys()  # the job would have it, too


@pytest.mark.parametrize("prefix", [["env", "VIA=1"], "env VIA=1"])
def test_a_script_is_submitted_by_the_name_that_the_nodes_have_for_it(
    prefix: Any, sbatch: Path, request_for: Callable[..., ArrayRequest], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "seen"
    elsewhere.symlink_to(tmp_path)
    (sbatch / "sbatch").write_text(f'#!/bin/sh\necho "$1 $VIA" >{sbatch}/name\necho Submitted batch job 12\n')
    SlurmScheduler(command_prefix=prefix).submit(request_for(seen_as=str(elsewhere)))
    name, via = (sbatch / "name").read_text().split()
    assert via == "1"
    assert name.startswith(f"{elsewhere}/submitit/.submission_file_")
    script = Path(name).read_text()
    assert options_of(script)["--output"] == f"{elsewhere}/job-%a.log"
    assert script.rstrip().endswith(f"-m submitit.core._submit {elsewhere}/submitit")


@pytest.mark.parametrize("stderr", REFUSALS)
def test_a_refused_array_is_an_error_with_sbatchs_words(
    stderr: str, sbatch: Path, request_for: Callable[..., ArrayRequest], capfd: pytest.CaptureFixture[str]
) -> None:
    (sbatch / "words").write_text(stderr)
    (sbatch / "answer").write_text(f"cat {sbatch}/words >&2; exit 1\n")
    with pytest.raises(SubmissionRefusedError) as caught:
        SlurmScheduler().submit(request_for())
    assert stderr in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stderr", NO_REFUSALS)
def test_a_submission_of_which_nobody_knows_is_no_refusal(
    stderr: str, sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    (sbatch / "words").write_text(stderr)
    (sbatch / "answer").write_text(f"cat {sbatch}/words >&2; exit 1\n")
    with pytest.raises(SchedulerError) as caught:
        SlurmScheduler().submit(request_for())
    assert not isinstance(caught.value, SubmissionRefusedError)
    assert stderr in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "words_of_it"),
    [
        ("sleep 60", "did not answer in time"),
        ("exit 0", "It is not known whether SLURM has array fr-1"),
        ("kill -9 $$", "sbatch failed|did not answer"),
    ],
)
def test_other_ends_of_sbatch(
    answer: str, words_of_it: str, sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    (sbatch / "answer").write_text(answer)
    with pytest.raises(SchedulerError, match=words_of_it) as caught:
        SlurmScheduler(command_timeout=1).submit(request_for())
    assert not isinstance(caught.value, SubmissionRefusedError)


def test_without_sbatch_nothing_is_submitted_however_long_one_waits(
    sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    (sbatch / "answer").write_text("exit 127")
    with pytest.raises(SubmissionRefusedError, match="sbatch was not found: is this a SLURM login node"):
        SlurmScheduler().submit(request_for())


def test_a_warning_does_not_stand_in_the_way_of_the_id(
    sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    (sbatch / "answer").write_text("echo 'sbatch: Your job 99 is fine' >&2; echo Submitted batch job 12")
    assert SlurmScheduler().submit(request_for(count=1)) == ["12_0"]


@pytest.mark.parametrize("name", ["a b", "a,b", "a\nb", "", "a;b", "a/b"])
def test_an_array_has_a_name_that_it_can_be_found_by(
    name: str, request_for: Callable[..., ArrayRequest]
) -> None:
    with pytest.raises(ValueError, match="is not a name for an array"):
        SlurmScheduler().submit(request_for(name=name))


def test_a_folder_that_submitit_would_change_is_refused(
    request_for: Callable[..., ArrayRequest], tmp_path: Path
) -> None:
    folder = tmp_path / "50%all"
    folder.mkdir()
    with pytest.raises(ValueError, match="submitit would replace '%a'"):
        SlurmScheduler().submit(request_for(directory=folder))


# What a call may say.


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"constrain": "x"}, TypeError, "no option 'constrain': did you mean 'constraint'"),
        ({"partition": "x"}, TypeError, "a call says it by `queue`"),
        ({"mem": 5}, TypeError, "a call says it by `memory`"),
        ({"constraint": "a\nb"}, ValueError, "constraint: .* is not a line of text"),
        ({"constraint": 5}, ValueError, "is not a line of text"),
        ({"nodes": 0}, ValueError, "nodes: 0 is not a whole number"),
        ({"needs_gpu": "yes"}, ValueError, "needs_gpu: 'yes' is neither True nor False"),
        ({"extra_lines": "--nice=5"}, ValueError, "is not a list of lines"),
        ({"extra_lines": ["rm -rf /"]}, ValueError, "is no line for sbatch"),
        ({"extra_lines": ["#SBATCH--nice"]}, ValueError, "is no line for sbatch"),
        ({"extra_lines": ["--nice=5\nrm -rf /"]}, ValueError, "is not a line of text"),
        ({"extra_lines": ["--comment='x"]}, ValueError, "No closing quotation"),
        *(
            ({"extra_lines": [line]}, ValueError, f"--{name} is the executor's own to say")
            for line, name in [
                ("#SBATCH --array=0-5", "array"),
                ("--nice=5 --output=x", "output"),
                ("--out=x", "output"),
                ("#SBATCH -J x", "job-name"),
                ("-oX", "output"),
                ("--wait", "wait"),
                ("--signal=USR1@5", "signal"),
                ("--clusters=other", "clusters"),
            ]
        ),
        ({"user_local_exports": {"A B": "x"}}, ValueError, "'A B' is not the name of a variable"),
        ({"user_local_exports": ["A"]}, ValueError, "is not a mapping"),
        ({"pre_submission_commands": "x"}, ValueError, "is not a list of lines"),
        ({"pre_submission_commands": ["x", 5]}, ValueError, "5 is not a line of text"),
    ],
)
def test_mistakes_in_options(extra: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SlurmScheduler().check(extra)


def test_options_that_say_nothing_are_left_out() -> None:
    extra = {
        "constraint": None,
        "nodelist": "",
        "extra_lines": [],
        "needs_gpu": False,
        "user_local_exports": {},
    }
    assert SlurmScheduler().check(extra) == {}


def test_checked_options_stay_what_they_are() -> None:
    scheduler = SlurmScheduler()
    extra = scheduler.check(
        {
            "exclude": ["n1", "n2"],
            "extra_lines": ["--nice=5", "#SBATCH   --wait-all-nodes=1", "--hint=x -t 5"],
            "nodes": 2,
            "user_local_exports": {"A": 5},
            "qos": " x ",
        }
    )
    assert scheduler.check(extra) == extra
    assert extra["extra_lines"] == ("#SBATCH --nice=5", "#SBATCH --wait-all-nodes=1", "#SBATCH --hint=x -t 5")
    assert (extra["exclude"], extra["qos"], extra["user_local_exports"]) == ("n1,n2", "x", {"A": "5"})


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_value_becomes_a_line_of_its_own(value: str, other: str) -> None:
    try:
        extra = SlurmScheduler().check({"constraint": value, "user_local_exports": {"A": other}})
    except ValueError:
        return
    for text in (extra.get("constraint", ""), *extra.get("user_local_exports", {}).values()):
        assert len(text.splitlines()) <= 1


# What of submitit's is private, and might change.


def submitter(folder: Path, **changes: Any) -> Submitter:
    values: dict[str, Any] = {
        "seen_as": "/see n",
        "directory": "/",
        "command": lambda script: ["sbatch", script],
        "waits": False,
        "python": "py",
        "named_by_nodes": False,
    }
    return Submitter(folder, **{**values, **changes})


def test_submitit_does_not_look_for_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert submitit_slurm.SlurmExecutor.affinity() == -1
    assert submitter(tmp_path).affinity() > 0


def test_submitit_takes_our_submission_command(tmp_path: Path) -> None:
    theirs = submitit_slurm.SlurmExecutor._make_submission_command(submitter(tmp_path), Path("/x/script"))
    assert theirs == ["sbatch", "/x/script"]
    assert submitter(tmp_path)._make_submission_command(Path("/x/script"))[-2:] == ["sbatch", "/x/script"]
    named = submitter(tmp_path, named_by_nodes=True)._make_submission_command(Path("/x/script"))
    assert named[-1] == "/see n/script"


def test_submitit_takes_our_command_for_the_node(tmp_path: Path) -> None:
    theirs = submitit_slurm.SlurmExecutor._submitit_command_str.fget(submitter(tmp_path))  # type: ignore[attr-defined]
    assert theirs == f"py -u -m submitit.core._submit {tmp_path}"
    assert submitter(tmp_path)._submitit_command_str == "exec py -u -m submitit.core._submit '/see n'"


def test_submitit_has_no_defaults_that_a_site_could_mind(
    sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    known = {
        *(
            "job_name",
            "partition",
            "time",
            "nodes",
            "ntasks_per_node",
            "cpus_per_task",
            "cpus_per_gpu",
            "num_gpus",
        ),
        *("gpus_per_node", "gpus_per_task", "qos", "setup", "teardown", "mem", "mem_per_gpu", "mem_per_cpu"),
        *("signal_delay_s", "comment", "constraint", "exclude", "account", "gres", "mail_type", "mail_user"),
        *("nodelist", "dependency", "exclusive", "array_parallelism", "wckey", "stderr_to_stdout"),
        *("additional_parameters", "srun_args", "use_srun"),
    }
    assert submitit_slurm._get_default_parameters().keys() == known


def test_submitit_never_asks_sacct(sbatch: Path, request_for: Callable[..., ArrayRequest]) -> None:
    assert Submitter.job_class.watcher._make_command() is None
    SlurmScheduler().submit(request_for())
    assert not submitit_slurm.SlurmJob.watcher._registered
    assert not Submitter.job_class.watcher._registered


def test_an_element_takes_its_pickle_where_submitits_worker_looks_for_it(
    sbatch: Path, request_for: Callable[..., ArrayRequest], tmp_path: Path
) -> None:
    folder = tmp_path / "we ird'$x"
    folder.mkdir()
    SlurmScheduler(python="/bin/true").submit(request_for(directory=folder))
    environment = {"PATH": os.environ["PATH"], "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2"}
    subprocess.run(["bash", sbatch / "script"], env=environment, check=True, timeout=30)
    paths = submitit_slurm.utils.JobPaths(folder / "submitit", job_id="12_2")
    delayed = submitit_slurm.utils.DelayedSubmission.load(paths.submitted_pickle)
    assert isinstance(delayed.function, Element)
    assert delayed.function.directory == str(folder)


def test_an_element_runs_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    job = types.ModuleType("fractal_runner.executors.batch.job")
    job.run_job = lambda *arguments: ran.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, job.__name__, job)
    monkeypatch.setattr("fractal_runner.executors.batch.job", job, raising=False)
    for name, value in (("ARRAY_JOB_ID", "12"), ("ARRAY_TASK_ID", "3"), ("RESTART_COUNT", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    pickle.loads(pickle.dumps(Element("/shared/a")))()
    assert ran == [("/shared/a", 3, JobPlace(id="12_3", node="n1"))]


def run_script(sbatch: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(sbatch / "script")],
        env={**os.environ, "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


WORKER = """\
#!/usr/bin/env python3
import signal, sys, time
told = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, _: (print("told", number, flush=True), told.append(number)))
print("ready", flush=True)
while 15 not in told:
    time.sleep(0.01)
sys.exit(3)
"""


@pytest.mark.parametrize("teardown", [[], ["echo torn down"]], ids=["plain", "with teardown"])
def test_the_worker_is_told_what_the_shell_is_told(
    teardown: list[str], sbatch: Path, request_for: Callable[..., ArrayRequest], tmp_path: Path
) -> None:
    worker = tmp_path / "worker"
    worker.write_text(WORKER)
    worker.chmod(0o755)
    SlurmScheduler(python=str(worker), teardown=teardown).submit(request_for())
    with run_script(sbatch) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        shell.send_signal(12)
        assert shell.stdout.readline() == "told 12\n"
        shell.send_signal(15)
        assert shell.stdout.read().split("\n") == ["told 15", *(["torn down"] if teardown else []), ""]
        assert shell.wait(10) == 3


def test_a_signal_before_the_worker_can_take_it_ends_nothing(
    sbatch: Path, request_for: Callable[..., ArrayRequest]
) -> None:
    SlurmScheduler(python="/bin/true", setup=["kill -USR2 $$"]).submit(request_for())
    with run_script(sbatch) as shell:
        assert shell.wait(10) == 0


def test_a_killed_workers_end_is_the_jobs(sbatch: Path, request_for: Callable[..., ArrayRequest]) -> None:
    SlurmScheduler(python="/bin/false", teardown=["true"]).submit(request_for())
    with run_script(sbatch) as shell:
        assert shell.wait(10) == 1
