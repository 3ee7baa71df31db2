"""A batch system that has no nodes: what its jobs would write is written by one process, which runs nothing.

So all that a batch executor does is done as ever, and what it costs stands alone in its own process. The jobs
of all arrays run at the same time, one record each in turns; what ends is told by a file, as a scheduler's
command tells it.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._child import TOP
from fractal_runner.executors.batch.files import ArrayFiles
from fractal_runner.executors.batch.payload import Payload
from fractal_runner.executors.batch.records import Kind, RecordLog
from fractal_runner.executors.batch.scheduler import ArrayRequest, JobState, JobStatus, Scheduler
from fractal_runner.executors.local import child
from fractal_runner.executors.local.pickling import dump
from fractal_runner.worker.spec import UnitResult

_RUNNING, _ENDED = JobStatus(JobState.RUNNING), JobStatus(JobState.ENDED, returncode=0)


class SimulatedScheduler(Scheduler):
    """A batch system whose jobs only write what jobs write.

    Args:
        ended: a file of its own, for what has ended.
        seconds: how long each job takes, whatever is in it; 0 for as fast as it can be written.
        result: what calls return: "number" or "unit".

    Attributes:
        submissions: how many arrays were submitted.
        jobs: how many jobs that were.
        questions: how many times it was asked about jobs.
    """

    name = "simulated"
    max_array = 1000

    def __init__(self, ended: Path, *, seconds: float, result: str) -> None:
        self.submissions = self.jobs = self.questions = 0
        self._ended_file = ended
        self._ended: set[str] = set()
        self._read = 0
        ended.touch()
        self._writer = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._simulated", str(ended), str(seconds), result],
            cwd=TOP,
            stdin=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process that writes.

        Raises:
            RuntimeError: if it has failed.
        """
        assert self._writer.stdin is not None
        self._writer.stdin.close()
        if code := self._writer.wait(60):
            raise RuntimeError(f"the simulated jobs ended with exit code {code}")

    def check(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        return extra

    def submit(self, request: ArrayRequest) -> Sequence[str]:
        assert self._writer.stdin is not None
        self.submissions += 1
        ids = [f"{self.submissions}_{number}" for number in range(request.count)]
        self.jobs += len(ids)
        print(json.dumps({"directory": request.seen_as, "ids": ids}), file=self._writer.stdin, flush=True)
        return ids

    def find(self, request: ArrayRequest) -> Sequence[Sequence[str]]:
        return []

    def states(self, jobs: Collection[str]) -> Mapping[str, JobStatus]:
        self.questions += 1
        with self._ended_file.open() as file:
            file.seek(self._read)
            while (line := file.readline()).endswith("\n"):
                self._read += len(line)
                self._ended.add(line.strip())
        return {job: _ENDED if job in self._ended else _RUNNING for job in jobs}

    def cancel(self, jobs: Collection[str]) -> None:
        """What is to be cancelled has ended, or soon will have."""


def _main(ended: str, seconds: float, result: str) -> None:
    """The process that writes: arrays come on stdin."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a file per job that runs
    arrays: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(arrays,), daemon=True).start()
    jobs: list[tuple[float, int, Iterator[float]]] = []
    counter = itertools.count()
    ended_fd = os.open(ended, os.O_WRONLY | os.O_APPEND)
    while True:
        while not jobs or not arrays.empty():
            array = arrays.get()
            if array is None:
                return
            files, payload = ArrayFiles(array["directory"]), Payload(f"{array['directory']}/payload")
            for number, id in enumerate(array["ids"]):
                job = _job(files, payload, number, id, seconds, result)
                jobs.append((time.monotonic(), next(counter), job))
            heapq.heapify(jobs)
        due, _, job = heapq.heappop(jobs)
        time.sleep(max(0.0, due - time.monotonic()))
        pause = next(job, None)
        if pause is None:
            os.write(ended_fd, f"{array['ids'][0].partition('_')[0]}".encode() and job_id(job))
        else:
            heapq.heappush(jobs, (due + pause, next(counter), job))


if __name__ == "__main__":
    _main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
