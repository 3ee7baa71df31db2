"""How calls end that did not end by themselves: the errors of a batch executor's calls, in words."""

from __future__ import annotations

import os
import pickle

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.batch.jobs import Array, Item, Job
from fractal_runner.executors.batch.records import Record
from fractal_runner.executors.batch.scheduler import Cause, JobState, JobStatus
from fractal_runner.executors.local.reports import has_output, report_end

LOST, NO_EVIDENCE, REFUSED, NOT_SUBMITTED = "LOST", "NO_EVIDENCE", "REFUSED", "NOT_SUBMITTED"
NEVER_STARTS, DAMAGED = "NEVER_STARTS", "DAMAGED_RECORDS"

# What people can do about it.
_REMEDIES: dict[Cause | None, str] = {
    Cause.DEADLINE: "Ask for less time, or for a later deadline.",
    Cause.MEMORY: "Ask for more memory, or let fewer calls run at a time.",
    Cause.NODE: "It may succeed on another node.",
    Cause.PREEMPTED: "It may succeed another time.",
    Cause.TIME: "Ask for more time, or put fewer calls into a job.",
}

_ENDS = {
    LOST: "is not known to the scheduler any more, and nothing more was heard of it",
    NO_EVIDENCE: "has ended well, as the scheduler says, and left no record of that call",
}


def end(item: Item, record: Record) -> None:
    """End a call as its job has recorded."""
    printed, body = record.data[: record.fields["out"]], record.data[record.fields["out"] :]
    if has_output(body) or printed:
        item.call.future.output = bytes(printed).decode(errors="replace")
    report_end(item.call, body)


def fail(item: Item, record: Record) -> None:
    """End a call with what, as its job has recorded, has happened to its worker process."""
    out = record.fields["out"]
    item.call.future.output = bytes(record.data[:out]).decode(errors="replace")
    try:
        error = pickle.loads(record.data[out:])
    except Exception as unpickling:  # it runs the classes' own code
        error = ExecutorError(f"The error of {item.call.name!r} could not be unpickled: {unpickling}")
    job = item.job
    if isinstance(error, JobExecutionError) and job is not None:
        error.job_id, error.node = job.id, job.node
        error.stderr_file = error.stdout_file = job.log
    item.call.fail(error)


def of_job(job: Job, item: Item, what: str, *, reason: str, status: JobStatus | None) -> JobExecutionError:
    """The error of a call whose job has ended, or was lost, before the call did."""
    node = job.node or (status.node if status is not None else None)
    tail = job.log_tail()
    parts = [f"The call {item.call.name!r} {what}: {job.says}"]
    parts[0] += f" is {reason}." if reason not in (LOST, NO_EVIDENCE) else f" {_ENDS[reason]}."
    if status is not None and (remedy := _REMEDIES.get(status.cause)):
        parts.append(remedy)
    if status is not None and status.detail:
        parts.append(f"The scheduler says: {status.detail}")
    if tail:
        parts.append(f"The end of {job.log}:\n{tail}")
    return JobExecutionError(
        "\n".join(parts),
        reason=reason,
        info=status.detail if status is not None and status.detail else None,
        returncode=None if status is None else status.returncode,
        job_id=job.id,
        node=node,
        stdout_file=job.log,
        stderr_file=job.log,
    )


def reason_of(job: Job) -> str:
    """In one word, why a job is over."""
    status = job.status
    if status is None or status.state is not JobState.ENDED:
        return LOST
    return status.reason or NO_EVIDENCE


def unsubmitted(item: Item, array: Array, error: Exception, *, reason: str) -> JobExecutionError:
    """The error of a call whose array the scheduler does not take, or which could not be written."""
    return JobExecutionError(
        f"The call {item.call.name!r} could not be submitted: {error}",
        reason=reason,
        info=str(error),
        cmd_file=None if reason == NOT_SUBMITTED else array.files.payload,
    )


def never_started(item: Item, job: Job, tries: int) -> JobExecutionError:
    """The error of a call that one job after the other was to start, and did not."""
    what = f"was given to {tries} jobs, and none of them started it"
    if job.closed is not None:
        return _said(item, job, f"{what}. The last one, {job.says}, says: {job.closed}")
    error = of_job(job, item, f"{what}; the last one", reason=reason_of(job), status=job.status)
    if not job.log_tail():
        what = f"do its nodes see {job.array.files.directory}, and can they run the executor's `python`?"
        if os.path.exists(job.log):
            what = "its script has begun: has a line of `setup` ended it?"
        error.args = (f"{error.args[0]}\nIt has printed nothing: {what}",)
    return error


def refused(item: Item, job: Job) -> JobExecutionError:
    """The error of a call whose job did none of its calls, as no other job would."""
    return _said(item, job, f"was not run: {job.refused}")


def _said(item: Item, job: Job, what: str) -> JobExecutionError:
    return JobExecutionError(
        f"The call {item.call.name!r} {what}",
        reason=REFUSED,
        job_id=job.id,
        node=job.node,
        stdout_file=job.log,
        stderr_file=job.log,
    )


def damaged(item: Item, job: Job) -> JobExecutionError:
    """The error of a call of which nobody knows any more how it ended."""
    return JobExecutionError(
        f"Nobody knows how the call {item.call.name!r} ended, or whether it ran: {job.damage}.",
        reason=DAMAGED,
        info=job.damage,
        job_id=job.id,
        node=job.node,
        stdout_file=job.log,
        stderr_file=job.log,
    )


def waits_for_ever(item: Item, job: Job, status: JobStatus) -> JobExecutionError:
    """The error of a call whose job waits for something that will not come."""
    return JobExecutionError(
        f"The call {item.call.name!r} cannot start: {job.says} waits, and the scheduler's reason is "
        f"{status.reason}. It was cancelled.",
        reason=status.reason or NEVER_STARTS,
        info=status.detail or None,
        job_id=job.id,
    )
