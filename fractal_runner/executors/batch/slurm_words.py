"""What Slurm's commands say, in our words: tables, and what reads an answer by them.

Apart from `slurm_scheduler` because nothing here runs anything: text goes in, `JobStatus` comes out, and
what does not look like an answer is passed over. Recorded answers of Slurm 22.05 are among the tests.
"""

from __future__ import annotations

import functools
import logging
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from fractal_runner.executors.batch.scheduler import Cause, JobState, JobStatus

_logger = logging.getLogger("fractal_runner")

# squeue(1), JOB STATE CODES; sacct(1), JOB STATE CODES. The words of both commands.
STATES: dict[str, JobState] = {
    "PENDING": JobState.QUEUED,
    "REQUEUED": JobState.QUEUED,  # it ends where it ran, and will be pending
    "REQUEUE_FED": JobState.QUEUED,  # the same, by a federation of clusters
    "REQUEUE_HOLD": JobState.QUEUED,  # the same, and held
    "RESV_DEL_HOLD": JobState.QUEUED,  # held, as its reservation was deleted
    "SPECIAL_EXIT": JobState.QUEUED,  # requeued and held, with a flag that people asked for
    "CONFIGURING": JobState.RUNNING,  # has nodes, which are being booted
    "RUNNING": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,  # about to change size
    "SIGNALING": JobState.RUNNING,  # being signalled
    "STOPPED": JobState.RUNNING,  # by SIGSTOP; keeps its CPUs
    "SUSPENDED": JobState.RUNNING,  # stopped, its CPUs lent to others
    "COMPLETING": JobState.RUNNING,  # some process of it may still be there; it may even be requeued
    "STAGE_OUT": JobState.RUNNING,  # its files are being copied from a burst buffer
    "REVOKED": JobState.RUNNING,  # runs on another cluster of the federation
    "BOOT_FAIL": JobState.ENDED,  # its node did not come up
    "CANCELLED": JobState.ENDED,  # by its user or an administrator, whether or not it had started
    "COMPLETED": JobState.ENDED,  # with exit code 0
    "DEADLINE": JobState.ENDED,  # its deadline had come
    "FAILED": JobState.ENDED,  # with another exit code, by a signal, or it could not be launched
    "NODE_FAIL": JobState.ENDED,  # its node was lost, and it was not to be requeued
    "OUT_OF_MEMORY": JobState.ENDED,
    "PREEMPTED": JobState.ENDED,  # made room for another, and was not to be requeued
    "TIMEOUT": JobState.ENDED,  # its time was up
}
# What the words for an end mean, where that is something in particular.
CAUSES: dict[str, Cause] = {
    "BOOT_FAIL": Cause.NODE,
    "CANCELLED": Cause.CANCELLED,
    "DEADLINE": Cause.DEADLINE,
    "NODE_FAIL": Cause.NODE,
    "OUT_OF_MEMORY": Cause.MEMORY,
    "PREEMPTED": Cause.PREEMPTED,
    "TIMEOUT": Cause.TIME,
}
# In these a job waits for people.
_HELD_STATES = {"REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}

# squeue(1), JOB REASON CODES, and resource_limits.html: what does not pass of itself. Not here: limits of a
# user, an account or a QOS, which others' jobs make room for; nodes and partitions that are down, which come
# back. Slurm has said "PartitionNodeLimit" and "PartitionConfig" of too large jobs alone, also when all
# nodes were drained.
NEVER_STARTS: dict[str, str] = {
    "AccountNotAllowed": "the partition or QOS is not for its account",
    "BadConstraints": "no nodes can ever satisfy it",
    "DependencyNeverSatisfied": "what it depends on has ended otherwise",
    "InvalidAccount": "there is no such account any more",
    "InvalidQOS": "there is no such QOS any more",
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "its user holds it",
    "JobHoldMaxRequeue": "requeued too often, and held",
    "PartitionConfig": "asks for more than the partition's nodes have",
    "PartitionNodeLimit": "asks for more nodes than the partition has or gives",
    "PartitionTimeLimit": "asks for more time than the partition gives",
    "QOSNotAllowed": "the partition is not for its QOS",
    "ReservationDeleted": "its reservation is gone",
    "job requeued in held state": "somebody has requeued and held it",
    "launch failed requeued held": "could not be launched, and is held",
}

# Failed submissions that say nothing of the array itself: it may be there, or be taken another time.
NOT_REFUSED = re.compile(
    "|".join(
        (
            # A limit on how many jobs there may be at a time: see also `is_refusal`.
            r"Max\w*SubmitJob\w*",
            r"Grp\w*SubmitJob\w*",
            # The controller is not there, does not answer, or is busy.
            r"Socket timed out",
            r"Unable to contact slurm controller",
            r"Unable to create job record, try again",
            r"[Tt]emporarily unable to accept job",
            r"Slurm controller not responding",
            r"Slurm backup controller in standby mode",
            r"Controller is in standby mode",
            r"System submissions disabled",
            r"Resource temporarily unavailable",
            r"Connection (?:refused|timed out|reset)",
            r"Zero Bytes were transmitted or received",
            r"Message (?:send|receive) failure",
            r"Unexpected message received",
            r"Communication (?:connection|shutdown) failure",
            r"Transport endpoint is not connected",
            r"I/O error writing script/environment to file",
            # Its own configuration, its libraries or munge.
            r"[Cc]ould not establish a configuration source",
            r"cannot stat file .*slurm\.conf",
            r"Protocol authentication error",
            r"[Ii]nvalid authentication credential",
            r"Failed to connect to authentication agent",
            r"Munge (?:encode|decode) failed",
            r"[Uu]nable to (?:resolve|connect)",
        )
    )
)

# What scancel says of jobs that are not there any more.
NOTHING_TO_CANCEL = re.compile(
    r"Invalid job id specified|Job/step already completing or completed|Job has already finished"
    r"|Job is not pending nor running|[Nn]o (?:such )?jobs?\b"
)
UNKNOWN_JOB = re.compile(r"Invalid job id specified")
NO_ACCOUNTING = re.compile(r"Slurm accounting storage is disabled")

# squeue --Format: the fields of a row, each with its end. The last one is free text.
SQUEUE_FIELDS = "ArrayJobID:|,ArrayTaskID:|,State:|,exit_code:|,BatchHost:|,Reason:|"
SACCT_FIELDS = "JobID,State,ExitCode,NodeList"

_NO_NODE = {"", "n/a", "N/A", "(null)", "None", "None assigned"}
_NO_REASON = {"", "None", "(null)"}
_SQUEUE_ROW = re.compile(r"(\d+)\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|(.*?)\|?")
_SACCT_ROW = re.compile(r"(\d+)(?:_(?:(\d+)|\[([^\]|]*)\]))?(?:\.([^|]*))?\|([^|]*)\|([^|]*)\|([^|]*)")
_ARRAY_ID = re.compile(r"\s*(\d+)(?=[_|]|$)", re.ASCII)
_SPAN = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?", re.ASCII)
_OLDEST_SIGNAL, _NEWEST_SIGNAL = 1, 64  # above it are numbers that Slurm has made up: 125 for lack of memory


@dataclass(slots=True)
class Answer:
    """What a command has said of jobs, by element, by group of elements, and by array.

    An array that was cancelled before any of it was asked for keeps one row for all of its elements.
    """

    elements: dict[str, JobStatus] = field(default_factory=dict)
    groups: list[tuple[str, tuple[range, ...], JobStatus]] = field(default_factory=list)
    arrays: dict[str, JobStatus] = field(default_factory=dict)

    def of(self, job: str) -> JobStatus | None:
        """What it says of an element, "12_3"; None if nothing."""
        if status := self.elements.get(job):
            return status
        array, _, number = job.partition("_")
        for group, spans, status in self.groups:
            if group == array and number.isdecimal() and any(int(number) in span for span in spans):
                return status
        return self.arrays.get(array)

    def add(self, array: str, tasks: str, status: JobStatus) -> None:
        """Take note of a row; `tasks` is "3", "2-5,8%2", or no number at all for the whole array."""
        if tasks.isdecimal() and tasks.isascii():
            self.elements[f"{array}_{int(tasks)}"] = status
        elif spans := tuple(_spans(tasks)):
            self.groups.append((array, spans, status))
        else:
            self.arrays[array] = status


def read_squeue(text: str) -> Answer:
    """What squeue says in the format `SQUEUE_FIELDS`."""
    answer = Answer()
    for line in text.splitlines():
        if match := _SQUEUE_ROW.fullmatch(line.strip()):
            array, tasks, word, code, node, reason = match.groups()
            answer.add(array, tasks, _status(word, code, node, reason, "squeue"))
    return answer


def read_sacct(text: str) -> Answer:
    """What sacct says in the format `SACCT_FIELDS`, with a job's steps after it.

    A step may have died for want of memory, and its job failed in consequence: that is the job's reason then.
    """
    answer = Answer()
    for line in text.splitlines():
        match = _SACCT_ROW.fullmatch(line.strip())
        if match is None:
            continue
        array, task, tasks, step, word, code, node = match.groups()
        if step is None:
            answer.add(array, task or tasks or "", _status(word, code, node, "", "sacct"))
        elif (
            word.startswith("OUT_OF_MEMORY")
            and (job := answer.elements.get(f"{array}_{task}"))
            and job.reason == "FAILED"
        ):
            detail = f"{job.detail}, its step {step} OUT_OF_MEMORY"
            answer.elements[f"{array}_{task}"] = replace(
                job, reason="OUT_OF_MEMORY", detail=detail, cause=Cause.MEMORY
            )
    return answer


def read_array_ids(text: str) -> set[str]:
    """The ids of the arrays whose rows these are, of either command."""
    return {match[1] for line in text.splitlines() if (match := _ARRAY_ID.match(line))}


def read_refused_arrays(text: str) -> set[str]:
    """The ids of arrays that squeue shows though sbatch has refused them, if `text` is what squeue says.

    Slurm makes a record of an array before it finds that no nodes could have it, and leaves it there. None of
    the other jobs that cannot be satisfied has failed: they wait.
    """
    refused: set[str] = set()
    others: set[str] = set()
    for line in text.splitlines():
        if match := _SQUEUE_ROW.fullmatch(line.strip()):
            array, _, word, _, node, reason = match.groups()
            is_refused = (word, reason) == ("FAILED", "BadConstraints") and node in _NO_NODE
            (refused if is_refused else others).add(array)
    return refused - others


def read_returncode(text: str) -> int | None:
    """An exit code: "3:0", "0:9", or the number that wait(2) gives, as squeue has it.

    Returns:
        As subprocess reports it; None for what is no exit code, and for signals that there are not.
    """
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text.strip(), re.ASCII)
    if match is None:
        return None
    if match[2] is None:
        code, number = int(match[1]) >> 8 & 0xFF, int(match[1]) & 0x7F
    else:
        code, number = int(match[1]), int(match[2])
    if number == 0:
        return code
    return -number if _OLDEST_SIGNAL <= number <= _NEWEST_SIGNAL else None


def read_max_array(text: str) -> int | None:
    """How many jobs an array may have, by `scontrol show config`; None if it does not say.

    slurm.conf(5): the largest index is one less than MaxArraySize; max_array_tasks may allow less.
    """
    found = re.findall(r"^\s*MaxArraySize\s*=\s*(\d{1,9})\s*$", text, re.MULTILINE)
    found += re.findall(r"\bmax_array_tasks=(\d{1,9})", text)
    return min(map(int, found)) if found else None


def is_refusal(stderr: str) -> bool:
    """Whether sbatch, having failed with these words, would fail the same way another time."""
    if NOT_REFUSED.search(stderr):
        return False
    # One text for all policies, above which there may be a line with the limit's name: then it is not one of
    # those that others' jobs make room for.
    if "Job violates accounting/QOS policy" in stderr and not re.search(
        r"\b(?:Assoc|QOS|Max)[A-Z]\w+", stderr
    ):
        return False
    lines = stderr.splitlines()
    return any(line.startswith("sbatch: ") and not line.startswith("sbatch: warning") for line in lines)


def _status(word: str, code: str, node: str, reason: str, who: str) -> JobStatus:
    name, _, by = word.strip().partition(" ")
    name = name.rstrip("+")  # sacct cuts a word that is too long for its column
    state = STATES.get(name)
    if state is None:
        _note_unknown(name)
        state = JobState.RUNNING
    reason = reason.strip()
    why = None if reason in _NO_REASON else reason
    where = None if node.strip() in _NO_NODE else node.strip()
    parts = [f"{who} says {name}{_by_whom(by)}"]
    if why is not None:
        parts.append(f"reason {why}")
    if state is not JobState.ENDED:
        can_start = name not in _HELD_STATES and (state is not JobState.QUEUED or not _is_final(why))
        return JobStatus(state, why, node=where, detail=", ".join(parts), can_start=can_start)
    parts += [f"exit code {shown}" for shown in [_shown_code(code)] if shown]
    parts += [f"node {where}"] if where else []
    returncode = read_returncode(code)
    if returncode == 0 and name != "COMPLETED":  # of a job that was cancelled, or could not be launched
        returncode = None
    return JobStatus(state, name, returncode, where, ", ".join(parts), cause=CAUSES.get(name))


def _is_final(reason: str | None) -> bool:
    # Older versions write the words of a reason with underscores in between.
    return reason is not None and (reason in NEVER_STARTS or reason.replace("_", " ") in NEVER_STARTS)


def _shown_code(text: str) -> str:
    """An exit code as sacct writes it, whoever has written it."""
    text = text.strip()
    if not (text.isdecimal() and text.isascii()):
        return text
    return f"{int(text) >> 8 & 0xFF}:{int(text) & 0x7F}"


def _by_whom(by: str) -> str:
    match = re.fullmatch(r"by (\d{1,10})", by)
    if match is None:
        return f" {by}" if by else ""
    try:
        return f" by {pwd.getpwuid(int(match[1])).pw_name} (uid {match[1]})"
    except (KeyError, OverflowError):
        return f" by uid {match[1]}"


def _spans(text: str) -> Iterator[range]:
    """Array indices as Slurm writes them: "2-5,8,10-20:5%2"."""
    for part in text.strip("[]").partition("%")[0].split(","):
        if match := _SPAN.fullmatch(part):
            first, last, step = match.groups()
            yield range(int(first), int(last or first) + 1, int(step or 0) or 1)


@functools.cache
def _note_unknown(word: str) -> None:
    _logger.warning("Slurm says of a job that it is %r, which is not known here: it counts as running", word)
