"""The hosts: how many of their slots are free, and what happens when one is not heard of any more."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.clusters.lsf import processes
from tests.clusters.lsf.jobs import STARTED, Job, State

if TYPE_CHECKING:
    from tests.clusters.lsf.scheduler import Scheduler


@dataclass(slots=True)
class _Loss:
    """When a host is missed, and when its jobs are given up; None: never, of itself."""

    processes_live: bool
    noticed: float
    given_up: float | None


class Hosts:
    """All hosts of a cluster."""

    def __init__(self, scheduler: Scheduler, names: tuple[str, ...], slots: int) -> None:
        self._scheduler = scheduler
        self._names = names
        self._slots = slots
        self._lost: dict[str, _Loss] = {}
        self._abandoned: dict[str, list[int]] = {}  # sessions of given up jobs that may live on

    def is_lost(self, host: str | None) -> bool:
        return host in self._lost

    def restore_all(self) -> None:
        """All are there; nothing is told of it, as there are no jobs."""
        self._lost.clear()
        self._abandoned.clear()

    def free(self, unfinished: Iterable[Job]) -> dict[str, int]:
        """How many slots each host has left."""
        free = {name: self._slots for name in self._names if name not in self._lost}
        for job in unfinished:
            if job.state in STARTED and job.host in free:
                free[job.host] -= job.submission.slots
        return free

    def lose(self, host: str, *, processes_live: bool, noticed_s: float, given_up_s: float | None) -> None:
        """A host goes away, with its jobs or only out of sight."""
        if host not in self._names:
            raise ValueError(f"no host {host!r}: there are {', '.join(self._names)}")
        now = self._scheduler.now()
        given_up = None if given_up_s is None else now + noticed_s + given_up_s
        self._lost[host] = _Loss(processes_live, now + noticed_s, given_up)
        if not processes_live:
            for job in self._jobs(host):
                self._scheduler.signal(job, signal.SIGKILL)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Notice, and give up, what is due."""
        for host, loss in list(self._lost.items()):
            if self._scheduler.frozen:
                return
            if now >= loss.noticed:
                for job in self._jobs(host):
                    if job.state is not State.UNKWN:
                        job.enter(State.UNKWN, now)
                        job.tell(now, "Unknown; unable to reach the execution host;")
            if loss.given_up is not None and now >= loss.given_up:
                loss.given_up = None
                self.give_up(host)

    def give_up(self, host: str) -> None:
        """Its jobs have ended, as far as the scheduler is concerned; those of `bsub -r` wait again."""
        now = self._scheduler.now()
        for job in self._jobs(host):
            if job.pid is not None:
                self._abandoned.setdefault(host, []).append(job.pid)
            self._write_off(job, now)

    def restore(self, host: str) -> None:
        """It is back. Jobs whose processes are there run; others have ended, nobody knows how."""
        scheduler, now = self._scheduler, self._scheduler.now()
        loss = self._lost.pop(host, None)
        if loss is None:
            return
        for session in self._abandoned.pop(host, []):
            mark = scheduler.marks.get(session)
            if mark is not None:
                processes.send(processes.find({session: mark})[session], signal.SIGKILL)
        for job in self._jobs(host):
            if not loss.processes_live:
                self._write_off(job, now)
            elif job.unreported is not None:
                scheduler.end(job, *job.unreported, now)
            elif job.state is State.UNKWN:
                job.enter(State.RUN, now)
                job.tell(now, "Running;")
                if job.requeues:
                    scheduler.requeue(job, now)
                elif job.killing:  # asked for while nobody could be told
                    scheduler.kill(job, job.reason, now)
        scheduler.tick()

    def _write_off(self, job: Job, now: float) -> None:
        scheduler = self._scheduler
        job.ended_run = None
        if job.pid is not None:
            scheduler.owners.pop(job.pid, None)
        if job.requeues or (job.submission.rerunnable and not job.killing):
            job.tell(now, "Pending: Requeued job is waiting for rescheduling;")
            scheduler.pend_again(job, now)
            return
        job.pid = None
        scheduler.close(job, State.EXIT, now)
        scheduler.texts.tell_end(job, now)

    def _jobs(self, host: str) -> list[Job]:
        return [job for job in self._scheduler.all_jobs() if job.host == host and job.state in STARTED]
