"""What runs the calls of an executor that has a pool, its own or one that it joins.

The loop's thread, the deliverer's and the pool begin with the first call, and end with `close`. One lock
guards that: all else belongs to the loop's thread.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fractal_runner.errors import ExecutorError
from fractal_runner.executors.adapters.daskpool.contexts import Contexts, forget_given
from fractal_runner.executors.adapters.daskpool.crew import Crew
from fractal_runner.executors.adapters.daskpool.items import Item
from fractal_runner.executors.adapters.daskpool.loops import Deliverer, LoopThread
from fractal_runner.executors.adapters.daskpool.pool import Pool
from fractal_runner.executors.adapters.daskpool.terms import LARGEST_MESSAGE, PoolTerms, Shape
from fractal_runner.executors.adapters.daskpool.warm import PoolRecord
from fractal_runner.executors.calls import Call
from fractal_runner.executors.local import child
from fractal_runner.executors.local.reports import dump_call
from fractal_runner.quantities import format_size

if TYPE_CHECKING:
    from fractal_runner.executors.batch.base import BatchExecutor

_LOOK_S = 0.5
_logger = logging.getLogger("fractal_runner")


class PoolEngine:
    """See the module.

    Args:
        terms: of a pool of its own.
        joined: another pool's record, in the place of these.
        folder: for its own pool; a temporary one if None.
        max_workers: how many workers it uses at a time.
        name: the executor's.
    """

    def __init__(
        self,
        *,
        max_workers: int,
        name: str,
        terms: PoolTerms | None = None,
        joined: PoolRecord | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._terms = terms
        self._joined = joined
        self._given_folder = folder
        self._max_workers = max_workers
        self._name = name
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards the beginning and the end, and the next four
        self._crew: Crew | None = None
        self._thread: LoopThread
        self._deliverer: Deliverer
        self._closing = False
        self._pool: Pool | None = None  # set by the loop's thread, once
        self._contexts = Contexts()

    def put(self, call: Call, retries: int) -> None:
        crew = self._crew or self._begin()
        data = bytes(dump_call(call, child.about_call(call)))
        if len(data) > LARGEST_MESSAGE:
            raise ExecutorError(
                f"The call {call.name!r} cannot be sent to a worker: its arguments are "
                f"{format_size(len(data))}, and a message holds {format_size(LARGEST_MESSAGE)}"
            )
        item = Item(call, data, self._contexts.number_of(call), retries)
        forget_given(call)
        call.future.add_done_callback(partial(_tell_cancelled, crew, item))
        crew.put(item)

    def stop(self, calls: Sequence[Call]) -> None:
        if self._crew is not None:
            self._crew.stop(calls)

    def place_of(self, call: Call) -> dict[str, Any]:
        item = None if self._crew is None else self._crew.running(call.id)
        return {} if item is None else {"host": item.host, "pid": item.pid}

    def shapes(self) -> list[Shape]:
        if self._terms is not None:
            return [self._terms.shape]
        return [] if self._joined is None else [self._joined.shape]

    @property
    def cluster(self) -> BatchExecutor | None:
        """The executor whose jobs the workers of its own pool are, once there is such a pool."""
        pool = self._pool
        return None if pool is None else pool.cluster

    def close(self, wait: bool) -> bool:
        if os.getpid() != self._pid:
            return False  # a forked child's copy: its lock may be held, and nobody lets go of it
        with self._lock:
            first, self._closing = not self._closing, True
            crew = self._crew
        if crew is None:
            return False
        if first:
            # It waits for calls, and for workers: not in the loop, whose end it is.
            self._ender.start()
        if wait:
            while self._ender.is_alive():
                self._ender.join(_LOOK_S)  # in turns: a Ctrl-C does not wake a thread that just goes to sleep
        return first

    def _begin(self) -> Crew:
        with self._lock:
            if self._crew is None:
                self._thread = LoopThread(f"{self._name}-loop")
                self._deliverer = Deliverer(f"{self._name}-ends")
                crew = Crew(
                    self._thread, self._deliverer, max_workers=self._max_workers, contexts=self._contexts.data
                )
                self._ender = threading.Thread(target=self._end, name=f"{self._name}-end", daemon=True)
                self._opening = self._thread.begin(self._open(crew))
                self._crew = crew
            return self._crew

    async def _open(self, crew: Crew) -> None:
        """Make the pool, or find it. Calls wait for that in the crew; what goes wrong is their end."""
        self._temporary: str | None = None
        try:
            if self._joined is not None:
                await crew.join(self._joined.address, self._joined.tls.security())
                return
            assert self._terms is not None
            if self._given_folder is None:
                self._temporary = tempfile.mkdtemp(prefix="fractal-runner-dask-")
            self._pool = Pool(self._thread, self._terms, self._given_folder or self._temporary or "")
            await self._pool.open()
            await crew.join(self._pool.address, self._pool.security)
        except Exception as error:  # whatever it is, there are calls that wait
            _logger.debug("%s: no pool", self._name, exc_info=True)
            what = "the pool cannot be started" if self._joined is None else "the pool cannot be joined"
            crew.fail_all(f"{what}: {error}")

    async def _leave(self) -> None:
        assert self._crew is not None
        await self._crew.leave()
        if self._pool is not None:
            await self._pool.close()

    def _end(self) -> None:
        try:
            self._opening.result()
            self._thread.begin(self._leave()).result()
        except BaseException:  # whatever is left of a pool, its threads must end
            _logger.exception("%s: its pool has not ended as it should", self._name)
        finally:
            self._deliverer.stop()
            self._deliverer.join()
            self._thread.stop()
            self._thread.join()
            if self._pool is not None:
                shutil.rmtree(self._pool.folder, ignore_errors=True)
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)


def _tell_cancelled(crew: Crew, item: Item, future: Any) -> None:
    if future.cancelled():
        crew.cancelled(item)
