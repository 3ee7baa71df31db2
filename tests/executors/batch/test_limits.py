"""What sites allow, read from what their commands say: recorded from SLURM 22.05, and as LSF documents it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from fractal_runner.executors.batch.limits import Bound, MemoryUnits, Queue, least
from fractal_runner.executors.batch.lsf_limits import (
    read_max_array,
    read_queues,
    read_reasons,
    read_shares,
    read_unit,
)
from fractal_runner.executors.batch.lsf_scheduler import LsfScheduler
from fractal_runner.executors.batch.slurm_limits import read_config, read_partitions
from fractal_runner.executors.batch.slurm_scheduler import SlurmScheduler

CONFIG = """\
Configuration data as of 2026-03-04T10:15:02
AccountingStorageEnforce = associations,limits,qos
MaxArraySize            = 1001
MaxJobCount             = 10000
SchedulerParameters     = batch_sched_delay=0,sched_interval=1
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""
PARTITIONS = (
    "PartitionName=main AllowGroups=ALL AllowQos=ALL Default=YES QoS=N/A MaxNodes=UNLIMITED "
    "MaxTime=UNLIMITED State=UP TotalCPUs=8 DefMemPerNode=UNLIMITED TRES=cpu=8,mem=4000M\n"
    "PartitionName=short AllowGroups=ALL Default=NO QoS=N/A MaxTime=1-12:00:00 State=UP TotalCPUs=8\n"
    "PartitionName=closed AllowGroups=ALL Default=NO MaxTime=02:00:00 State=INACTIVE TotalCPUs=8\n"
)
ASSOCIATIONS = "lab|lab||normal|20|500\nlab|lab|gpu|normal||40\nlab|root||normal|7|70\n"
QOS = "normal||300\nlong|5|50\n"

Answers = Mapping[str, tuple[int, str, str]]


def run_of(answers: Answers, asked: list[list[str]]) -> Callable[..., Any]:
    """In the place of `subprocess.run`: answers a command by the first key that its words begin with."""

    def run(words: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(list(words))
        for beginning, (code, stdout, stderr) in answers.items():
            if " ".join(words).startswith(beginning):
                return subprocess.CompletedProcess(words, code, stdout, stderr)
        raise FileNotFoundError(words[0])

    return run


SLURM: Answers = {
    "scontrol show config": (0, CONFIG, ""),
    "scontrol show partition": (0, PARTITIONS, ""),
    "id -un": (0, "mona\n", ""),
    "sacctmgr --noheader --parsable2 show user mona": (0, ASSOCIATIONS, ""),
    "sacctmgr --noheader --parsable2 show qos": (0, QOS, ""),
}


def slurm(answers: Answers = SLURM, **options: Any) -> tuple[SlurmScheduler, list[list[str]]]:
    asked: list[list[str]] = []
    return SlurmScheduler(run=run_of(answers, asked), **options), asked


def test_slurm_says_what_it_allows() -> None:
    scheduler, asked = slurm()

    found = scheduler.limits()

    assert found.max_array == Bound(1001, "MaxArraySize", "scontrol show config")
    assert found.max_submitted == Bound(300, "MaxSubmitJobsPerUser of QOS normal", "sacctmgr")
    assert found.max_running == Bound(20, "MaxJobs of account lab", "sacctmgr")
    assert found.queues == (
        Queue("main", "UP", is_default=True),
        Queue("short", "UP", max_time=129600.0),
        Queue("closed", "INACTIVE", is_open=False, max_time=7200.0),
    )
    assert found.names_default
    assert "SLURM_VERSION = 22.05.8" in found.facts
    assert found.unknown == ()
    assert scheduler.max_array == 1001
    assert sum(words[:3] == ["scontrol", "show", "config"] for words in asked) == 1


@pytest.mark.parametrize(
    ("asked_for", "qos", "expected"),
    [
        ({"queue": "gpu"}, None, Bound(40, "MaxSubmitJobs of account lab", "sacctmgr")),
        ({"account": "root"}, None, Bound(70, "MaxSubmitJobs of account root", "sacctmgr")),
        ({}, "long", Bound(50, "MaxSubmitJobsPerUser of QOS long", "sacctmgr")),
        ({"account": "nobody"}, None, None),
    ],
)
def test_the_bounds_are_those_of_the_account_the_partition_and_the_qos(
    asked_for: dict[str, str], qos: str | None, expected: Bound | None
) -> None:
    scheduler, _ = slurm(qos=qos)

    assert scheduler.limits(**asked_for).max_submitted == expected


def test_bounds_to_which_nobody_is_held_are_none() -> None:
    config = CONFIG.replace("associations,limits,qos", "none")
    scheduler, asked = slurm({**SLURM, "scontrol show config": (0, config, "")})

    assert scheduler.limits().max_submitted is None
    assert not [words for words in asked if words[0] == "sacctmgr"]


def test_a_slurm_without_accounting_has_no_such_bounds_and_no_complaint() -> None:
    said = "You are not running a supported accounting_storage plugin\nOnly 'slurmdbd' is supported.\n"
    answers = {name: answer for name, answer in SLURM.items() if not name.startswith("sacctmgr")}
    scheduler, _ = slurm({**answers, "sacctmgr": (1, "", said)})

    assert (scheduler.limits().max_submitted, scheduler.limits().unknown) == (None, ())


def test_what_slurm_does_not_answer_is_told() -> None:
    scheduler, _ = slurm({"scontrol": (1, "", "slurm_load_ctl_conf error: Unable to contact controller\n")})

    found = scheduler.limits()

    assert found.max_array is None
    assert found.unknown[0] == (
        "`scontrol show config` gave no answer: scontrol failed with exit code 1: slurm_load_ctl_conf error: "
        "Unable to contact controller"
    )
    assert scheduler.max_array == 1000


def test_texts_that_are_none_of_slurm_s_say_nothing() -> None:
    assert read_config("no such thing\n") == {}
    assert read_partitions("slurm_load_partitions error: Invalid partition name specified\n") == []


# LSF.

BPARAMS = """\
            LSB_SYNC_HOST_STAT_LIM = Y
            MAX_JOB_ARRAY_SIZE = 10000
            DEFAULT_QUEUE = normal night
"""
BUSERS = """\
USER/GROUP          JL/P    MAX  NJOBS   PEND    RUN  SSUSP  USUSP    RSV  MPEND  PJOBS MPJOBS   PRIO
mona                   -   2400      0      0      0      0      0      0      -      0  25000      0
"""
OLDER_BUSERS = """\
USER/GROUP          JL/P    MAX  NJOBS   PEND    RUN  SSUSP  USUSP    RSV
mona                   -      -      2      0      2      0      0      0
"""
BQUEUES = """\
QUEUE_NAME      PRIO STATUS          MAX JL/U JL/P JL/H NJOBS  PEND   RUN  SUSP
normal           30  Open:Active       -    -    -    -     0     0     0     0
closed           20  Closed:Active     -    -    -    -     0     0     0     0
"""
LSID = "IBM Spectrum LSF Standard 10.1.0.14, Jul 12 2023\n"
SHOWCONF = "MBD configuration at Tue Mar  4 10:15:02 2026\n\tLSF_UNIT_FOR_LIMITS = MB\n\tLSF_VERSION = 10.1\n"


def lsf(answers: Answers, **options: Any) -> LsfScheduler:
    return LsfScheduler(run=run_of(answers, []), **options)


def test_lsf_says_what_it_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LSF_ENVDIR", raising=False)
    found = lsf(
        {
            "lsid": (0, LSID, ""),
            "bparams -a": (0, BPARAMS, ""),
            "bqueues -w": (0, BQUEUES, ""),
            "busers -w": (0, BUSERS, ""),
            "badmin showconf": (0, SHOWCONF, ""),
        }
    ).limits()

    assert found.max_array == Bound(10000, "MAX_JOB_ARRAY_SIZE", "bparams")
    assert found.max_submitted == Bound(25000, "MPJOBS of mona", "busers")
    assert found.max_running == Bound(2400, "MAX of mona", "busers")
    assert found.queues == (
        Queue("normal", "Open:Active", is_default=True),
        Queue("closed", "Closed:Active", is_open=False),
    )
    assert found.memory == MemoryUnits("KB and MB", "what is usual", False, "MB", "badmin showconf mbd all")
    assert found.unknown == ()


def test_an_older_lsf_is_asked_in_older_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LSF_ENVDIR", raising=False)
    usage = (255, "", "bparams: illegal option -- a\nUsage: bparams [-h] [-V] [-l]\n")
    found = lsf(
        {
            "lsid": (0, "volclava project 2.2\n", ""),
            "bparams -a": usage,
            "bparams -l": (0, BPARAMS, ""),
            "bqueues -w": usage,
            "bqueues": (0, BQUEUES, ""),
            "busers -w": usage,
            "busers": (0, OLDER_BUSERS, ""),
        },
        memory_unit="GB",
    ).limits()

    assert found.max_array == Bound(10000, "MAX_JOB_ARRAY_SIZE", "bparams")
    assert (found.max_submitted, found.max_running) == (None, None)
    assert [queue.name for queue in found.queues] == ["normal", "closed"]
    assert found.memory == MemoryUnits("GB", "memory_unit", True, None, "lsf.conf")
    assert found.unknown == ()


def test_what_lsf_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LSF_ENVDIR", raising=False)
    down = (255, "", "Failed in an LSF library call: LIM is down; try later\n")

    found = lsf({"bparams": down, "busers": down}).limits()

    assert found.max_array is None
    assert found.unknown == (
        "`bparams -a` gave no answer: Failed in an LSF library call: LIM is down; try later",
        "`bqueues -w` gave no answer: bqueues was not found",
        "`busers -w` gave no answer: Failed in an LSF library call: LIM is down; try later",
    )


def test_texts_that_are_none_of_lsf_s_say_nothing() -> None:
    assert read_max_array("MAX_JOB_ARRAY_SIZE is not set\n") is None
    assert read_queues("No such queue\n", "") == []
    assert read_shares("mona: No such user/group\n") == (None, None)
    assert read_unit("# LSF_UNIT_FOR_LIMITS = MB\n") is None


def test_a_pending_reason_is_read_of_bjobs_long_text() -> None:
    text = (
        "\nJob <7[1]>, Job Name <fr>, User <mona>, Status <PEND>, Queue <normal>\n"
        " PENDING REASONS:\n Job's requirements for resource reservation not satisfied: 2 hosts;\n"
        " Load information unavailable: 1 host;\n\n SCHEDULING PARAMETERS:\n"
    )

    assert read_reasons(text) == (
        "Job's requirements for resource reservation not satisfied: 2 hosts; Load information unavailable: 1 "
        "host;"
    )
    assert read_reasons("Job <7> is not found\n") is None


def test_the_least_of_bounds_is_reached_first() -> None:
    assert least([None, Bound(5, "a", "b"), Bound(3, "c", "d")]) == Bound(3, "c", "d")
    assert least([None]) is None
