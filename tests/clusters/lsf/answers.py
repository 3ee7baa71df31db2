"""What commands say of jobs: rows, long forms and histories, and the report in a job's output file."""

from __future__ import annotations

import time
from collections.abc import Iterable

from tests.clusters.lsf.dialects import REASONS, Dialect
from tests.clusters.lsf.jobs import ENDED, STARTED, WAITING, Job, State
from tests.clusters.lsf.settings import Settings

_INDENT = " " * 21
_SUMMARY = ("PEND", "PSUSP", "RUN", "USUSP", "SSUSP", "UNKWN")
_PARAMETERS = """\
 SCHEDULING PARAMETERS:
           r15s   r1m  r15m   ut      pg    io   ls    it    tmp    swp    mem
 loadSched   -     -     -     -       -     -    -     -     -      -      -  
 loadStop    -     -     -     -       -     -    -     -     -      -      -  

 RESOURCE REQUIREMENT DETAILS:
 Combined: {combined}
 Effective: {effective}

"""
HEADER = "JOBID   USER    STAT  QUEUE      FROM_HOST   EXEC_HOST   JOB_NAME   SUBMIT_TIME\n"
_REPORT = """\
Sender: LSF System <admin@{host}>
Subject: Job {label}: <{name}> {cluster}{verdict}

Job <{name}> was submitted from host <{master}> by user <{user}>{cluster_then}.
Job was executed on host(s) <{host}>, in queue <{queue}>, as user <{user}>{cluster_then}.
<{home}> was used as the home directory.
<{cwd}> was used as the working directory.
Started at {begun}
{terminated}Results reported at {now}

Your job looked like:

------------------------------------------------------------
# LSBATCH: User input
{script}
------------------------------------------------------------

{ending}

Resource usage summary:

    CPU time   : {cpu:9.2f} sec.

The output (if any) follows:

"""


class Texts:
    """Texts of one cluster."""

    def __init__(self, dialect: Dialect, settings: Settings) -> None:
        self._dialect = dialect
        self._settings = settings

    # Rows.

    def row(self, job: Job, state: State, *, wide: bool, blank: bool = False) -> str:
        """A line of bjobs.

        Args:
            state: what the job is said to be.
            wide: nothing is cut, as -w has it.
            blank: an empty field is blank all the same.
        """
        name, queue, host = job.name, job.submission.queue, job.exec_host
        if wide and not host and not blank:
            host = "   -     "
        job_id = str(job.id)
        if not wide:
            name, host = cut(name, 10), cut(host, 11)
            queue = queue[:10]
        if self._dialect.is_ibm:
            job_id = cut(job_id, 7)
        submitted = _time("%b %e %H:%M", job.submitted)
        return (
            f"{job_id:<7} {self._settings.user[:7]:<7} {state.value:<5} {queue:<10} "
            f"{self._settings.master:<11} {host:<11} {name:<10} {submitted}\n"
        )

    # Long forms.

    def long(self, job: Job, state: State) -> str:
        """`bjobs -l`."""
        submission, ibm = job.submission, self._dialect.is_ibm
        head = (
            f"Job <{job.label}>, {self._job_name(job)}User <{self._settings.user}>, "
            f"Project <{submission.project}>, Status <{state.value}>, Queue <{submission.queue}>, "
            f"Command <{submission.command}>"
        )
        lines = ["\n", self._wrapped(head)]
        lines.append(self._wrapped(f"{_long(job.submitted)}: {self._submitted(job, '')};"))
        lines.append(self._limits(job))
        if job.starts and job.begun is not None and job.host:
            begun = f"[{job.index}] started" if job.index else "Started"
            where = self._tasks(job) if ibm else f"on <{job.exec_host}>"
            home = submission.env.get("HOME", "/")
            lines.append(
                self._wrapped(
                    f"{_long(job.begun)}: {begun} {where}, Execution Home <{home}>, "
                    f"Execution CWD <{job.execution_cwd}>;"
                )
            )
        now = time.time()
        if state is State.UNKWN:
            lines.append(self._wrapped(f"{_long(now)}: Unknown; unable to reach the execution host;"))
        if job.state in STARTED and job.memory:
            size = _mbytes(job.memory[-1])
            lines.append(f"{_long(now)}: Resource usage collected.\n")
            lines.append(f"{_INDENT}MEM: {size} Mbytes;  SWAP: {2 * size} Mbytes\n")
            lines.append(f"{_INDENT}PGID: {job.pid};  PIDs: {' '.join(map(str, job.pids))} \n")
        if job.ended is not None and job.state in ENDED:
            stop = "" if job.ended_run is None and not ibm else "."
            lines.append(self._wrapped(f"{_long(job.ended)}: {self._ending(job)}{stop}"))
            if ibm and job.state is State.EXIT:
                lines.append(self._wrapped(f"{_long(job.ended)}: {self._completed(job)}."))
        if job.state in WAITING:
            reason = "The job was suspended by user" if job.state is State.PSUSP else _PENDING
            lines.append(f" PENDING REASONS:\n {reason};\n")
        if job.memory:
            most, mean = _mbytes(max(job.memory)), _mbytes(sum(job.memory) // len(job.memory))
            lines.append(f"\n MEMORY USAGE:\n MAX MEM: {most} Mbytes;  AVG MEM: {mean} Mbytes\n")
        combined = "select[type == local] order[r15s:pg]"
        lines.append("\n" + _PARAMETERS.format(combined=combined, effective=combined if job.starts else "-"))
        return "".join(lines)

    def history(self, job: Job, now: float) -> str:
        """`bhist -l`."""
        submission = job.submission
        head = (
            f"Job <{job.label}>, {self._job_name(job)}User <{self._settings.user}>, "
            f"Project <{submission.project}>, Command <{submission.command}>"
        )
        queue = f", to Queue <{submission.queue}>"
        lines = ["\n", self._wrapped(head)]
        lines.append(self._wrapped(f"{_long(job.submitted)}: {self._submitted(job, queue)};"))
        lines.append(self._limits(job))
        lines += [self._event(when, text) for when, text in job.events]
        end = job.ended if job.state in ENDED and job.ended is not None else now
        times = self.spent(job, end)
        lines.append(
            f"\nSummary of time in seconds spent in various states by  {_long(end)}\n"
            "  PEND     PSUSP    RUN      USUSP    SSUSP    UNKWN    TOTAL\n"
            f"  {''.join(f'{times[state]:<9}' for state in _SUMMARY)}{sum(times.values()):<12}\n\n"
        )
        return "".join(lines)

    def summary(self, jobs: Iterable[Job], now: float) -> str:
        """`bhist` without -l."""
        lines = [
            "Summary of time in seconds spent in various states:\n"
            "JOBID   USER    JOB_NAME  PEND    PSUSP   RUN     USUSP   SSUSP   UNKWN   TOTAL\n"
        ]
        for job in jobs:
            times = self.spent(job, job.ended if job.state in ENDED and job.ended is not None else now)
            columns = [times[state] for state in _SUMMARY] + [sum(times.values())]
            lines.append(
                f"{job.label:<7} {self._settings.user[:7]:<7} {cut(job.name, 9):<9} "
                + " ".join(f"{seconds:<7}" for seconds in columns).rstrip()
                + "\n"
            )
        return "".join(lines)

    @staticmethod
    def spent(job: Job, end: float) -> dict[str, int]:
        """Seconds in each state, until then."""
        times = dict.fromkeys(_SUMMARY, 0)
        following = [*(when for when, _ in job.changes[1:]), end]
        for (began, state), stopped in zip(job.changes, following, strict=True):
            if state.value in times:
                times[state.value] += max(0, int(stopped) - int(began))
        return times

    # What bhist tells, as it happens.

    def tell_start(self, job: Job, now: float) -> None:
        home = job.submission.env.get("HOME", "/")
        if self._dialect.is_ibm:
            dispatched = f"[{job.index}] dispatched" if job.index else "Dispatched"
            requirement = "Effective RES_REQ <select[type == local] order[r15s:pg] >"
            job.tell(now, f"{dispatched} {self._tasks(job)}, {requirement};")
        else:
            job.tell(now, f"Dispatched to <{job.exec_host}>;")
        job.tell(now, f"Starting (Pid {job.pid});")
        job.tell(
            now,
            f"Running with execution home <{home}>, Execution CWD <{job.execution_cwd}>, "
            f"Execution Pid <{job.pid}>;",
        )

    def tell_end(self, job: Job, now: float) -> None:
        job.tell(now, f"{self._ending(job)};")
        if self._dialect.is_ibm and job.state is State.EXIT:
            job.tell(now, f"{self._completed(job)};")
        if job.state is State.DONE:
            if self._dialect.is_ibm:
                job.tell(now, "Post job process done successfully;")
            elif job.requeued_by_code:
                job.tell(now, "Post job process failed;")

    def reason(self, job: Job) -> str | None:
        """ "TERM_OWNER: job killed by owner", of a job that has ended so, where there is such a thing."""
        if not self._dialect.tells_reasons or job.state is not State.EXIT or job.reason is None:
            return None
        return f"{job.reason}: {REASONS[job.reason]}"

    def exit_code(self, job: Job) -> int | None:
        """None for a job that did well, or of which it is not known."""
        if job.state is not State.EXIT or job.ended_run is None:
            return None
        code, signalled = job.ended_run
        return 128 + code if signalled else code

    # A job's output file.

    def report(self, job: Job, now: float) -> str:
        """What stands above a job's output."""
        settings, submission = self._settings, job.submission
        ending = "Successfully completed."
        if job.state is State.EXIT:
            ending = f"{self._plain_ending(job)}."
            if reason := self.reason(job):
                ending = f"{reason}.\n{ending}"
        ibm = self._dialect.is_ibm
        return _REPORT.format(
            host=job.host,
            label=job.label,
            name=job.name,
            cluster=f"in cluster <{settings.cluster}> " if ibm else "",
            cluster_then=f" in cluster <{settings.cluster}>" if ibm else "",
            verdict="Done" if job.state is State.DONE else "Exited",
            master=settings.master,
            user=settings.user,
            queue=submission.queue,
            home=submission.env.get("HOME", "/"),
            cwd=job.execution_cwd,
            begun=_time("%a %b %e %H:%M:%S %Y", job.begun or now),
            terminated=f"Terminated at {_time('%a %b %e %H:%M:%S %Y', now)}\n" if ibm else "",
            now=_time("%a %b %e %H:%M:%S %Y", now),
            script=submission.script,
            ending=ending,
            cpu=job.cpu_s,
        )

    # Parts of them.

    def _job_name(self, job: Job) -> str:
        return "" if job.submission.name is None else f"Job Name <{job.name}>, "

    def _submitted(self, job: Job, queue: str) -> str:
        submission = job.submission
        home = submission.env.get("HOME", "").rstrip("/")
        cwd = submission.cwd
        if home and (cwd == home or cwd.startswith(f"{home}/")):
            cwd = f"$HOME{cwd[len(home) :]}"
        parts = [f"Submitted from host <{self._settings.master}>{' with hold' if submission.held else ''}"]
        parts[0] += queue
        parts.append(f"CWD <{cwd}>")
        if submission.output is not None:
            parts.append(f"Output File <{submission.output}>")
        if submission.errors is not None:
            parts.append(f"Error File <{submission.errors}>")
        if submission.rerunnable:
            parts.append("Re-runnable")
        if submission.slots > 1:
            parts.append(
                f"{submission.slots} {'Task(s)' if self._dialect.is_ibm else 'Processors Requested'}"
            )
        if submission.resources is not None:
            parts.append(f"Requested Resources <{submission.resources}>")
        if submission.dependency is not None:
            parts.append(f"Dependency Condition <{submission.dependency}>")
        return ", ".join(parts)

    def _limits(self, job: Job) -> str:
        text = ""
        if job.submission.run_limit is not None:
            text += f"\n {'RUNLIMIT':<24}\n {f'{job.submission.run_limit:.1f} min':<24}\n"
        if job.submission.memory_limit is not None:
            text += f"\n {'MEMLIMIT':<24}\n {f'{job.submission.memory_limit / 2**20:.0f} M':<24}\n"
        return text

    def _tasks(self, job: Job) -> str:
        slots = job.submission.slots
        return (
            f"{slots} Task(s) on Host(s) <{job.exec_host}>, "
            f"Allocated {slots} Slot(s) on Host(s) <{job.exec_host}>"
        )

    def _plain_ending(self, job: Job) -> str:
        if job.ended_run is None:
            return "Exited"
        code, signalled = job.ended_run
        if signalled and self._dialect.is_ibm:
            return f"Exited by signal {code}"
        return f"Exited with exit code {128 + code if signalled else code}"

    def _ending(self, job: Job) -> str:
        if job.ended_run is None:
            return "Exited"
        ending = "Done successfully" if job.state is State.DONE else self._plain_ending(job)
        return f"{ending}. The CPU time used is {job.cpu_s:.1f} seconds"

    def _completed(self, job: Job) -> str:
        reason = self.reason(job)
        return f"Completed <exit>; {reason}" if reason else "Completed <exit>"

    def _event(self, when: float, text: str) -> str:
        """A line of a history, whose continuations stand below its text."""
        if self._dialect.wraps_at is not None:
            return self._wrapped(f"{_long(when)}: {text}")
        width = 79 - len(_INDENT)
        chunks = [text[start : start + width] for start in range(0, len(text), width)]
        if len(chunks[-1]) == width:
            chunks.append("")
        return f"{_long(when)}: " + f"\n{_INDENT}".join(chunks) + "\n"

    def _wrapped(self, text: str) -> str:
        width = self._dialect.wraps_at
        if width is None or len(text) <= width:
            return text + "\n"
        more = width - len(_INDENT)
        rest = text[width:]
        chunks = [rest[start : start + more] for start in range(0, len(rest), more)]
        return text[:width] + "".join(f"\n{_INDENT}{chunk}" for chunk in chunks) + "\n"


_PENDING = "New job is waiting for scheduling"


def cut(text: str, width: int) -> str:
    """What fits, its end."""
    return text if len(text) <= width else f"*{text[1 - width :]}"


def _mbytes(size: int) -> int:
    return max(1, round(size / 2**20))


def _long(when: float) -> str:
    return _time("%a %b %e %H:%M:%S", when)


def _time(form: str, when: float) -> str:
    return time.strftime(form, time.localtime(when))
