"""What starts and ends workers: as processes of this machine, or as the jobs of a cluster.

A job is one call of our executor for that cluster. So it is submitted, followed and cancelled as every job of
ours: an array per launch, through the cluster's own commands, with its words where it refuses one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.adapters.daskpool.host import run_worker
from fractal_runner.executors.adapters.daskpool.loops import LoopThread
from fractal_runner.executors.adapters.daskpool.terms import PoolTerms, Shape, WorkerEnd, WorkerTerms
from fractal_runner.executors.batch import verdicts
from fractal_runner.executors.batch.base import BatchExecutor

Told = Callable[[str, WorkerEnd], None]
MakeTerms = Callable[[str], WorkerTerms]

_LEAVE_S = 60.0  # for the end of jobs, once they have been cancelled
_CANCEL_EVERY_S = 10.0
_logger = logging.getLogger("fractal_runner")
_UNKNOWN = frozenset({verdicts.LOST, verdicts.NO_EVIDENCE})  # it may still run where nobody reaches it
_REFUSED = frozenset({verdicts.REFUSED, verdicts.NOT_SUBMITTED})  # another worker would meet the same


class LocalHosts:
    """Workers as processes of this machine; a thread each sees to its end.

    The loop's thread owns `_stops` and `_threads`.

    Args:
        thread: the loop's.
        make_terms: how the worker of a name is started.
        told: is told of each one's end, in the loop's thread.
    """

    grace_s = 0.5

    def __init__(self, thread: LoopThread, make_terms: MakeTerms, told: Told) -> None:
        self._loop = thread
        self._make_terms = make_terms
        self._told = told
        self._stops: dict[str, threading.Event] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._none_left = asyncio.Event()
        self._none_left.set()

    def launch(self, names: Sequence[str]) -> None:
        for name in names:
            self._stops[name] = threading.Event()
            thread = threading.Thread(
                target=self._run, args=(name, self._stops[name]), name=name, daemon=True
            )
            self._threads[name] = thread
            self._none_left.clear()
            thread.start()

    def has_started(self, name: str) -> bool:
        return name in self._stops

    def end(self, name: str) -> None:
        if (stop := self._stops.get(name)) is not None:
            stop.set()

    async def close(self) -> None:
        await self._none_left.wait()

    def _run(self, name: str, stop: threading.Event) -> None:
        try:
            end = run_worker(self._make_terms(name), stop)
        except Exception as error:  # whatever it is, this worker will not come, and the next one may not
            end = WorkerEnd(f"could not be started: {error}")
        self._loop.soon(self._ended, name, end)

    def _ended(self, name: str, end: WorkerEnd) -> None:
        del self._stops[name]
        self._threads.pop(name).join()
        self._told(name, end)
        if not self._stops:
            self._none_left.set()


class ClusterHosts:
    """Workers as the jobs of a cluster: each is a call of its executor.

    The loop's thread owns `_futures`.

    Args:
        thread: the loop's.
        executor: of the cluster, for these jobs alone.
        terms: the pool's.
        make_terms: how the worker of a name is started.
        told: is told of each one's end, in the loop's thread.
    """

    grace_s = 5.0  # its job's records may come late

    def __init__(
        self,
        thread: LoopThread,
        executor: BatchExecutor,
        terms: PoolTerms,
        make_terms: MakeTerms,
        told: Told,
    ) -> None:
        self._loop = thread
        self._executor = executor
        self._make_terms = make_terms
        self._told = told
        self._futures: dict[str, Future[Any]] = {}
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._view = executor.options(**worker_options(terms.shape))

    def launch(self, names: Sequence[str]) -> None:
        for name in names:  # the executor puts those that come together into one array
            future = self._view.submit_as(name, None, run_worker, self._make_terms(name))
            self._futures[name] = future
            self._none_left.clear()
            future.add_done_callback(partial(self._heard, name))

    def has_started(self, name: str) -> bool:
        future = self._futures.get(name)
        return future is not None and future.running()

    def end(self, name: str) -> None:
        if (future := self._futures.get(name)) is not None:
            self._executor.stop(future)

    async def close(self) -> None:
        deadline = self._loop.loop.time() + _LEAVE_S
        while self._futures and self._loop.loop.time() < deadline:
            try:
                await asyncio.wait_for(self._none_left.wait(), _CANCEL_EVERY_S)
            except TimeoutError:
                for name in list(self._futures):
                    self.end(name)
        await asyncio.to_thread(self._executor.shutdown)
        left = await asyncio.to_thread(self._executor.wait_for_jobs, _LEAVE_S)
        for job, words in left.items():
            _logger.warning("job %s of a pool's worker is still in its cluster: %s", job, words)

    def _heard(self, name: str, future: Future[Any]) -> None:
        self._loop.soon(self._ended, name, _end_of(future))

    def _ended(self, name: str, end: WorkerEnd) -> None:
        del self._futures[name]
        self._told(name, end)
        if not self._futures:
            self._none_left.set()


def worker_options(shape: Shape) -> dict[str, Any]:
    """What the job of a worker of this shape asks for, as options of its call."""
    options: dict[str, Any] = {"cpus": shape.cpus or 1, "gpus": shape.gpus or 0}
    return options if shape.memory is None else {**options, "memory": f"{shape.memory}B"}


def _end_of(future: Future[Any]) -> WorkerEnd:
    """How a worker's job has ended, by its future."""
    if future.cancelled():
        return WorkerEnd("was cancelled before it had started", reason="CANCELLED")
    error = future.exception()
    if error is None:
        end: WorkerEnd = future.result()
        return end
    if isinstance(error, JobExecutionError):
        # The executor has seen its records end, or its scheduler has said that the job is over.
        text = f"has gone with its job {error.job_id or ''}".rstrip() + f": {error}"
        return WorkerEnd(
            text,
            error.returncode,
            error.reason,
            refused=error.reason in _REFUSED,
            clean=error.reason not in _UNKNOWN,
        )
    return WorkerEnd(f"could not be started: {error}", refused=True)
