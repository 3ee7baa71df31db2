"""A batch system of one host, in memory: its jobs are real processes that do the real work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fractal_runner.executors.batch.base import BatchExecutor
from fractal_runner.executors.batch.scheduler import ArrayRequest, Cause, JobState, JobStatus, Scheduler

JOB_PROGRAM = """
import sys
from fractal_runner.executors.batch.job import run_job
from fractal_runner.executors.batch.scheduler import JobPlace
directory, number, job = sys.argv[1:]
run_job(directory, int(number), JobPlace(job, "here"))
"""


CAUSES = {
    "CANCELLED": Cause.CANCELLED,
    "NODE_FAIL": Cause.NODE,
    "OUT_OF_MEMORY": Cause.MEMORY,
    "TIMEOUT": Cause.TIME,
}


class ProcessScheduler(Scheduler):
    """Runs each job as a process of a session of its own; as many at a time as there are places.

    Attributes:
        asked: what was asked of it, in order.
        reasons: the word for how a job ended, by its id, where it is not its exit code's.
    """

    name = "PROCESSES"
    keeps_waiting = True
    max_array = 100  # type: ignore[assignment]

    def __init__(self, places: int = 4) -> None:
        self._lock = threading.Lock()
        self._places = places
        self._jobs: dict[str, tuple[ArrayRequest, int]] = {}
        self._queue: list[str] = []
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: dict[str, JobStatus] = {}
        self._number = 0
        self.asked: list[str] = []
        self.reasons: dict[str, str] = {}
        self.requests: list[ArrayRequest] = []

    def check(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        if unknown := extra.keys() - {"exclude"}:
            raise TypeError(f"there is no option {sorted(unknown)[0]!r}")
        return extra

    def submit(self, request: ArrayRequest) -> Sequence[str]:
        with self._lock:
            self.asked.append("submit")
            self.requests.append(request)
            self._number += 1
            ids = [f"{self._number}_{index}" for index in range(request.count)]
            for index, id in enumerate(ids):
                self._jobs[id] = request, index
            self._queue += ids
            self._start_some()
        return ids

    def find(self, request: ArrayRequest) -> Sequence[Sequence[str]]:
        self.asked.append("find")
        with self._lock:
            ids = [id for id, (known, _) in self._jobs.items() if known.name == request.name]
        return [ids] if ids else []

    def states(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        self.asked.append("states")
        with self._lock:
            return {id: self._status(id) for id in jobs}

    def cancel(self, jobs: Mapping[str, str]) -> None:
        self.asked.append("cancel")
        with self._lock:
            for id in jobs:
                if id in self._queue:
                    self._queue.remove(id)
                    self._ended[id] = JobStatus(JobState.ENDED, "CANCELLED", cause=Cause.CANCELLED)
                elif (process := self._running.get(id)) is not None:
                    self.reasons.setdefault(id, "CANCELLED")
                    os.killpg(process.pid, signal.SIGTERM)

    def processes(self) -> dict[str, int]:
        """The jobs that run, and their processes."""
        with self._lock:
            return {id: process.pid for id, process in self._running.items()}

    def kill(self, id: str, reason: str) -> None:
        """End a job and all that it has started, for a reason that the scheduler will tell."""
        with self._lock:
            self.reasons[id] = reason
            end_session(self._running[id].pid)

    def close(self) -> None:
        with self._lock:
            self._queue.clear()
            running = list(self._running.values())
        for process in running:
            end_session(process.pid)
            process.wait(10)

    def _status(self, id: str) -> JobStatus:
        if id in self._queue:
            return JobStatus(JobState.QUEUED)
        if id in self._running:
            return JobStatus(JobState.RUNNING, node="here")
        return self._ended.get(id, JobStatus(JobState.LOST))

    def _start_some(self) -> None:
        while self._queue and len(self._running) < self._places:
            id = self._queue.pop(0)
            request, number = self._jobs[id]
            with (request.directory / f"job-{number}.log").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", JOB_PROGRAM, request.seen_as, str(number), id],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._running[id] = process
            threading.Thread(target=self._await, args=(id, process), daemon=True).start()

    def _await(self, id: str, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        with self._lock:
            del self._running[id]
            reason = self.reasons.get(id, "FAILED" if code else None)
            detail = f"{id} ended with {code}"
            self._ended[id] = JobStatus(
                JobState.ENDED, reason, code, "here", detail, cause=CAUSES.get(reason or "")
            )
            self._start_some()


class ProcessBatchExecutor(BatchExecutor):
    """A batch executor over such a scheduler of its own."""

    def __init__(self, folder: Any, **options: Any) -> None:
        super().__init__(ProcessScheduler(), folder, **options)


def end_session(leader: int) -> None:
    """Kill all processes of a session."""
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with suppress(ProcessLookupError):
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)
