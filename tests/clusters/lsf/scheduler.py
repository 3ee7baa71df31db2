"""The scheduler: which jobs there are, when and where each is started, and how it ends.

All of it happens in one thread, driven by `Scheduler.tick`, by ended children, and by the commands, which
`commands.py` has. What lost hosts do is in `hosts.py`.
"""

from __future__ import annotations

import asyncio
import fnmatch
import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.clusters.lsf import processes
from tests.clusters.lsf.answers import Texts
from tests.clusters.lsf.dialects import DIALECTS
from tests.clusters.lsf.faults import Faults
from tests.clusters.lsf.hosts import Hosts
from tests.clusters.lsf.jobs import ENDED, STARTED, Job, State, Submission
from tests.clusters.lsf.options import QUEUES, REQUEUE_EXIT_VALUES, Refused, check_resources
from tests.clusters.lsf.output import JobFiles
from tests.clusters.lsf.settings import Settings

_DEADLINE_S = 5.0
_PASSES = 3  # of a kill: processes may fork while they are being looked for
_LADDER = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


class Scheduler:
    """Jobs and hosts, and the time that passes for them.

    Attributes:
        jobs: by id, the elements by index; the latest of an id.
        forgotten: what bjobs does not tell any more, and bhist does.
        frozen: the scheduler's part of it stands still, as its daemon is down or hangs. Jobs go on.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self.dialect = DIALECTS[settings.dialect]
        self.now = clock
        self.faults = Faults()
        self.texts = Texts(self.dialect, settings)
        self.hosts = Hosts(self, settings.hosts, settings.slots)
        self.files = JobFiles(settings, self.texts)
        self.loop = asyncio.get_running_loop()
        self.reset()

    def reset(self) -> None:
        """No jobs, no faults, all hosts; what is left of jobs' processes is killed."""
        deadline = self.now() + _DEADLINE_S
        while pids := processes.find_all():
            processes.send(pids, signal.SIGKILL)
            if self.now() > deadline:
                raise RuntimeError(f"not to be killed: {pids}")
            time.sleep(0.001)  # they are about to go, and what they forked meanwhile is found next time
        self.jobs: dict[int, dict[int, Job]] = {}
        self.history: dict[int, dict[int, Job]] = {}
        self.next_id = self.settings.next_id
        self.max_id = self.settings.max_id
        self.frozen = False
        self.faults.clear()
        self.hosts.restore_all()
        self.marks: dict[int, str] = {}  # of the sessions of all runs that may have processes
        self.owners: dict[int, Job] = {}  # of the sessions whose first process runs
        self._unfinished: dict[tuple[int, int], Job] = {}
        self._doomed: dict[int, str] = {}
        self._sampled = 0.0
        self._cleaned = 0.0

    # Jobs come.

    def new_id(self) -> int:
        """An id that no job has of which bjobs knows."""
        for _ in range(self.max_id):
            if self.next_id > self.max_id:
                self.next_id = 1
            found, self.next_id = self.next_id, self.next_id + 1
            if found not in self.jobs:
                return found
        raise Refused("Too many jobs")

    def submit(self, submission: Submission) -> int:
        """Take a job, or an array. Raises `Refused`, for which an id is spent as well."""
        job_id = self.new_id()
        if submission.queue not in QUEUES:
            raise Refused(f"{submission.queue}: No such queue")
        if submission.queue == "closed":
            raise Refused(f"{submission.queue}: Queue has been closed")
        if submission.slots > self.settings.slots * len(self.settings.hosts):
            raise Refused("Too many processors requested")
        if submission.host is not None and submission.host not in self.settings.hosts:
            raise Refused(f"{submission.host}: Bad host name, host group name or cluster name")
        check_resources(submission.resources)
        for _, what in self._conditions(submission.dependency):
            if not self.named(what):
                raise Refused(f"{what}: No matching job found")
        now = self.now()
        elements = {}
        for index in submission.indices or (0,):
            state = State.PSUSP if submission.held else State.PEND
            job = Job(job_id, index, submission, now, state, not_before=now + self.settings.dispatch_s)
            job.enter(state, now)
            elements[index] = job
            self._unfinished[job_id, index] = job
        self.jobs[job_id] = elements
        self.history[job_id] = elements
        return job_id

    @property
    def is_busy(self) -> bool:
        """Whether there are jobs that have not ended."""
        return bool(self._unfinished)

    def all_jobs(self) -> Iterable[Job]:
        """All that bjobs may tell."""
        for elements in self.jobs.values():
            yield from elements.values()

    def named(self, what: str) -> list[Job]:
        """The jobs of an id, or of a name, which may have a * in it: "sim", "sim[3]"."""
        if what.isdecimal():
            return list(self.jobs.get(int(what), {}).values())
        found = []
        for job in self.all_jobs():
            names = (job.submission.name or "", (job.submission.name or "").split("[")[0], job.name)
            if any(name == what or fnmatch.fnmatchcase(name, what.replace("[", "[[]")) for name in names):
                found.append(job)
        return found

    # Jobs start.

    def tick(self) -> None:
        """Do what is due."""
        now = self.now()
        self.hosts.tick(now)
        self._limit(now)
        if self.frozen:
            return
        self._clean(now)
        for job in list(self._unfinished.values()):
            if job.state is State.SSUSP and now >= job.not_before:
                self._go_on(job, now)
        if not self.faults.strikes("no_dispatch", now):
            self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        free = self.hosts.free(self._unfinished.values())
        if not any(free.values()):
            return
        running: dict[int, int] = {}
        for job in self._unfinished.values():
            if job.state in STARTED:
                running[job.id] = running.get(job.id, 0) + 1
        for job in list(self._unfinished.values()):
            wanted = job.submission
            if job.state is not State.PEND or now < job.not_before or job.pid is not None:
                continue
            if wanted.at_once and running.get(job.id, 0) >= wanted.at_once:
                continue
            if not self._is_free(wanted.dependency):
                continue
            host = next(
                (
                    host
                    for host, slots in free.items()
                    if slots >= wanted.slots and wanted.host in (None, host)
                ),
                None,
            )
            if host is None:
                continue
            free[host] -= wanted.slots
            running[job.id] = running.get(job.id, 0) + 1
            self._start(job, host, now)
            if not any(free.values()):
                return

    def _start(self, job: Job, host: str, now: float) -> None:
        job.host, job.begun, job.ended = host, now, None
        job.starts += 1
        job.ended_run = job.unreported = job.reason = None
        job.requeues = job.signalled_at_limit = job.killing = False
        job.memory.clear()
        cwd = job.submission.cwd
        if self.faults.strikes("no_directory", now):
            cwd = "/nonexistent"
        mark = f"{self.settings.directory}:{job.id}.{job.index}.{job.starts}.{time.time_ns()}"
        with self.files.open(job, now) as opened:
            env = {**self.files.environment(job, host, now), processes.MARK: mark}
            job.pid, job.execution_cwd = processes.start(job.file, cwd, env, opened.output, opened.errors)
        job.enter(State.RUN, now)
        job.pids = (job.pid,)
        self.marks[job.pid] = mark
        self.owners[job.pid] = job
        self.texts.tell_start(job, now)

    # Jobs end.

    def reap(self) -> None:
        """Hear of the children that have ended."""
        now = self.now()
        for ended in processes.reap():
            job = self.owners.pop(ended.pid, None)
            if job is None or job.pid != ended.pid:
                continue
            job.cpu_s += ended.cpu_s
            code, signalled = ended.code, ended.signalled
            shells = (Path(job.file).name[:15], "sh")
            if signalled and self.dialect.exec_hides_signals and ended.program not in shells:
                code, signalled = 0, False  # the shell that was to report it is not there any more
            if self.hosts.is_lost(job.host):
                job.unreported = (code, signalled)
            else:
                self.end(job, code, signalled, now)
        self.tick()

    def end(self, job: Job, code: int, signalled: bool, now: float) -> None:
        """A run of a job has ended by itself or was ended: code, or the signal's number."""
        job.pid = None
        shown = 128 + code if signalled else code
        job.ended_run = (code, signalled)
        if job.requeues:
            self.pend_again(job, now)
            return
        if job.reason is None and shown in REQUEUE_EXIT_VALUES.get(job.submission.queue, ()):
            job.requeued_by_code = True
            job.tell(now, f"Pending: Requeued job is waiting for rescheduling: 1 host;(exit code {shown})")
            self.pend_again(job, now)
            return
        if shown and self.faults.strikes("false_done", now):
            job.ended_run, job.reason, shown = (0, False), None, 0
        self.close(job, State.EXIT if shown else State.DONE, now)
        self.texts.tell_end(job, now)
        self.files.report(job, now)

    def close(self, job: Job, state: State, now: float) -> None:
        """It has ended."""
        job.enter(state, now)
        job.ended, job.pids = now, ()
        self._unfinished.pop((job.id, job.index), None)

    def pend_again(self, job: Job, now: float) -> None:
        """Put it back to where it waits, with the same id."""
        job.enter(State.PEND, now)
        job.pid, job.host, job.requeues, job.killing = None, None, False, False
        job.pids = ()
        job.not_before = now + self.settings.requeue_s

    def _limit(self, now: float) -> None:
        """Look at run limits and memory, and take samples of it."""
        started = [job for job in self.owners.values() if job.pid and job.state in STARTED]
        for job in started:
            limit = job.submission.run_limit
            if limit is None or job.begun is None or self.hosts.is_lost(job.host):
                continue
            over = now - job.begun - limit * self.settings.minute_s
            if over >= 0 and not job.signalled_at_limit:
                job.signalled_at_limit = True
                job.reason = job.reason or "TERM_RUNLIMIT"
                self.signal(job, signal.SIGUSR2)
            elif over >= self.settings.kill_after_s and self.dialect.kills_at_run_limit and not job.killing:
                job.killing = True
                self.signal(job, signal.SIGKILL)
        if not started or now < self._sampled + self.settings.sample_s:
            return
        self._sampled = now
        found = processes.find(self.marks)
        for session in [session for session, pids in found.items() if not pids]:
            if session not in self.owners:
                del self.marks[session]
        for job in started:
            if job.pid not in found:
                continue
            job.pids = tuple(found[job.pid])
            job.memory.append(processes.memory(found[job.pid]))
            limit = job.submission.memory_limit
            if limit is not None and job.memory[-1] > limit and not job.killing:
                self.kill(job, "TERM_MEMLIMIT", now)

    def _clean(self, now: float) -> None:
        """Forget what ended long ago."""
        if now < self._cleaned + min(1.0, self.settings.clean_period_s / 4):
            return
        self._cleaned = now
        for job_id, elements in list(self.jobs.items()):
            if all(
                job.ended is not None and now > job.ended + self.settings.clean_period_s
                for job in elements.values()
            ):
                del self.jobs[job_id]

    # What commands do to jobs.

    def signal(self, job: Job, number: int) -> None:
        """Signal all processes of a job."""
        if job.pid is None or job.pid not in self.marks:
            return
        for _ in range(_PASSES if number == signal.SIGKILL else 1):
            pids = processes.find({job.pid: self.marks[job.pid]})[job.pid]
            if not pids:
                return
            processes.send(pids, number)

    def kill(self, job: Job, reason: str | None, now: float) -> None:
        """End a job: at once if it waits; INT, TERM and KILL to all its processes otherwise."""
        if job.state in (State.PEND, State.PSUSP):
            job.reason = reason
            self.close(job, State.EXIT, now)
            self.texts.tell_end(job, now)
            return
        job.reason = job.reason or reason
        job.killing = True
        if self.hosts.is_lost(job.host) or job.pid is None:
            return
        if not self._doomed:  # all that one command ends is looked for at once
            self.loop.call_soon(self._begin_to_kill)
        self._doomed[job.pid] = self.marks[job.pid]

    def _begin_to_kill(self) -> None:
        doomed, self._doomed = self._doomed, {}
        self._climb(doomed, 0)

    def _climb(self, runs: dict[int, str], rung: int) -> None:
        """The ladder goes on until nothing is left of a run, also after its first process has ended."""
        there = {session: mark for session, mark in runs.items() if self.marks.get(session) == mark}
        found = processes.find(there)
        left = {session: there[session] for session, pids in found.items() if pids}
        for session in left:
            processes.send(found[session], _LADDER[rung])
        if left and rung + 1 < len(_LADDER):
            self.loop.call_later(self.settings.kill_interval_s, self._climb, left, rung + 1)

    def forget_run(self, job: Job) -> None:
        """Do not wait for what its processes come to."""
        if job.pid is not None:
            self.owners.pop(job.pid, None)
            job.pid = None

    def requeue(self, job: Job, now: float, reason: str = "TERM_REQUEUE_OWNER") -> None:
        """Kill a started job, and have it wait again."""
        job.requeues, job.reason = True, reason
        if not self.hosts.is_lost(job.host):
            self.signal(job, signal.SIGKILL)

    def stop(self, job: Job, now: float) -> None:
        """Hold a job: one that waits, or one that runs."""
        if job.state is State.PEND:
            job.enter(State.PSUSP, now)
        elif job.state in (State.RUN, State.SSUSP):
            self.signal(job, signal.SIGSTOP)
            job.enter(State.USUSP, now)
        job.tell(now, "Suspended by the user or administrator;")

    def resume(self, job: Job, now: float) -> None:
        """Let go of a job."""
        if job.state is State.PSUSP:
            job.enter(State.PEND, now)
            job.tell(now, "Pending: Waiting for scheduling after resumed by user;")
        elif job.state is State.USUSP:
            job.enter(State.SSUSP, now)
            job.not_before = now + self.settings.resume_s
            job.tell(now, "Suspended:  Waiting for re-scheduling after being resumed by user;")

    def _go_on(self, job: Job, now: float) -> None:
        self.signal(job, signal.SIGCONT)
        job.enter(State.RUN, now)
        job.tell(now, "Running;")

    # Dependencies: done(17), ended("name"), joined by && or ||.

    def _conditions(self, text: str | None) -> list[tuple[str, str]]:
        found = re.findall(r"(done|ended|exit|started)\(\s*\"?([^\")]+?)\"?\s*\)", text or "")
        if text and not found:
            raise Refused("Bad dependency condition")
        return [(verb, what) for verb, what in found]

    def _is_free(self, dependency: str | None) -> bool:
        if dependency is None:
            return True
        return any(
            all(self._is_met(verb, what) for verb, what in self._conditions(either))
            for either in dependency.split("||")
        )

    def _is_met(self, verb: str, what: str) -> bool:
        states = {
            "done": (State.DONE,),
            "exit": (State.EXIT,),
            "ended": ENDED,
            "started": (*STARTED, *ENDED),
        }[verb]
        return all(job.state in states for job in self.named(what))
