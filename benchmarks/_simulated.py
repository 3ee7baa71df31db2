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
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def states(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        self.questions += 1
        with self._ended_file.open() as file:
            file.seek(self._read)
            while (line := file.readline()).endswith("\n"):
                self._read += len(line)
                self._ended.add(line.strip())
        return {job: _ENDED if job in self._ended else _RUNNING for job in jobs}

    def cancel(self, jobs: Mapping[str, str]) -> None:
        """What is to be cancelled has ended, or soon will have."""


class _Job:
    """A job that is being written.

    Args:
        directory: its array's.
        number: which one of the array it is.
        id: the scheduler's.
        seconds: how long it is to take.
    """

    def __init__(self, payload: Payload, directory: str, number: int, id: str, seconds: float) -> None:
        files = ArrayFiles(directory)
        self.id = id
        self._log = RecordLog(files.records(number), sync=False)
        self._size = payload.size(number)
        self._pause = seconds / self._size
        files.claim_for(number, id, node="n1", t=time.time())
        self._log.write(Kind.JOB, id=id, node="n1", host="n1", pid=os.getpid(), t=time.time())

    def run(self, values: Callable[[int], Any]) -> Iterator[float]:
        """Write what it writes; each number is how many seconds it pauses."""
        for place in range(self._size):
            self._log.write(Kind.START, pid=os.getpid(), t=time.time(), c=place)
            yield self._pause
            message = dump(child.RESULT + child.SILENT, values(place))
            self._log.write(Kind.END, message, out=0, t=time.time(), c=place)
        self._log.write(Kind.CLOSE, why="done")
        self._log.close()


def _number(place: int) -> int:
    return place


def _unit(place: int) -> UnitResult:
    now = time.time()
    return UnitResult(
        key=f"0190b0c5/0/unit/{place}/0",
        digest="sha256:" + "5" * 64,
        returncode=0,
        output={"image_list_updates": [{"zarr_url": f"/data/plate.zarr/B/03/{place}", "types": {"a": True}}]},
        host="n1",
        pid=os.getpid(),
        started=now,
        ended=now,
        cpu_s=0.01,
        peak_bytes=50_000_000,
    )


_VALUES: dict[str, Callable[[int], Any]] = {"number": _number, "unit": _unit}


def _write(ended: str, seconds: float, values: Callable[[int], Any]) -> None:
    """The process that writes. Arrays come on stdin; it ends with it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a file per job that runs
    arrays: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(arrays,), daemon=True).start()
    ended_fd = os.open(ended, os.O_WRONLY | os.O_APPEND)
    numbers = itertools.count()  # what is due at the same time is done in turns
    due: list[tuple[float, int, str, Iterator[float]]] = []
    while True:
        while not due or not arrays.empty():
            array = arrays.get()
            if array is None:
                return
            directory, now = array["directory"], time.monotonic()
            payload = Payload(f"{directory}/payload")
            for number, id in enumerate(array["ids"]):
                job = _Job(payload, directory, number, id, seconds)
                heapq.heappush(due, (now, next(numbers), id, job.run(values)))
        at, _, id, running = heapq.heappop(due)
        time.sleep(max(0.0, at - time.monotonic()))  # the job's own pace
        if (pause := next(running, None)) is None:
            os.write(ended_fd, f"{id}\n".encode())
        else:
            heapq.heappush(due, (at + pause, next(numbers), id, running))


def _receive(arrays: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        arrays.put(json.loads(line))
    arrays.put(None)


if __name__ == "__main__":
    _write(sys.argv[1], float(sys.argv[2]), _VALUES[sys.argv[3]])
