"""What runs the calls of an executor on somebody else's Dask: as Dask's tasks, where its scheduler puts them.

No more of them are handed over than may run, so that the rest can be cancelled, and nothing is promised a
worker that is busy. What has been handed over is Dask's: a worker that dies there, and how often its tasks
are tried again, is for its scheduler to settle.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import distributed
from distributed.scheduler import KilledWorker

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.adapters.daskpool import guest, items
from fractal_runner.executors.adapters.daskpool.contexts import Contexts, forget_given
from fractal_runner.executors.adapters.daskpool.items import Item
from fractal_runner.executors.adapters.daskpool.loops import Deliverer, LoopThread
from fractal_runner.executors.adapters.daskpool.terms import Shape
from fractal_runner.executors.calls import Call
from fractal_runner.executors.local import child
from fractal_runner.executors.local.reports import dump_call, handle_record

if TYPE_CHECKING:
    from distributed.security import Security

_CONNECT_S = 30.0
_ANSWER_S = 30.0
_ATTEMPTS = 5
_LOOK_S = 0.5
_SHAPES_S = 5.0  # for which what the workers have is remembered
_SCATTER_BYTES = 2**20  # what is larger goes by Dask's store, not with the task
# How people call what a worker has. Dask knows no names of its own ("GPU", "MEMORY" are its documentation's).
_RESOURCES: dict[str, tuple[str, ...]] = {
    "cpus": ("cpus", "CPUS", "cpu", "CPU"),
    "memory": ("memory", "MEMORY", "mem", "MEM"),  # in bytes
    "gpus": ("gpus", "GPUS", "gpu", "GPU"),
}


class ForeignEngine:
    """See the module. The loop's thread owns all that changes, but for what says otherwise.

    Args:
        address: the scheduler's.
        scheduler_file: where it has written that down.
        cluster: a cluster object.
        security: for its TLS.
        max_workers: how many calls are handed over at a time; by default as many as there are threads.
        name: the executor's.

    Raises:
        ExecutorError: if there is no scheduler there.
    """

    def __init__(
        self,
        *,
        address: str | None,
        scheduler_file: str | os.PathLike[str] | None,
        cluster: Any,
        security: Security | None,
        max_workers: int | None,
        name: str | None,
    ) -> None:
        self._name = name or "DaskExecutor"
        self._pid = os.getpid()
        if cluster is not None:
            address, security = cluster.scheduler_address, security or cluster.security
        self._given: dict[str, Any] = {"address": address}
        if scheduler_file is not None:
            self._given = {"scheduler_file": os.fspath(scheduler_file)}
        if security is not None:
            self._given["security"] = security
        self._where = address or self._given.get("scheduler_file")
        self._topic = f"fractal-runner-{uuid.uuid4().hex}"
        self._home = guest.this_process()
        self._closing = threading.Lock()  # taken by who closes it first, and kept
        self._ender = threading.Thread(target=self._end, name=f"{self._name}-end", daemon=True)
        self._contexts = Contexts()
        self._incoming: deque[Item] = deque()  # put by any thread
        self._told = False  # set by any thread
        self._queue: deque[Item] = deque()
        self._items: dict[int, Item] = {}  # read by any thread in single steps
        self._handed_over: dict[int, Any] = {}  # id of a call -> Dask's future
        self._empty = asyncio.Event()
        self._scattered: dict[int, Any] = {}  # number of a context -> Dask's future of it
        self._declared: tuple[float, list[Mapping[str, float]]] = (-1e9, [])
        self._thread = LoopThread(f"{self._name}-loop")
        self._deliverer = Deliverer(f"{self._name}-ends")
        self._client: Any
        try:
            threads = self._thread.begin(self._open()).result(_CONNECT_S + _ANSWER_S)
        except Exception as error:  # whatever Dask raises: there are threads to be ended
            self._thread.stop()
            self._deliverer.stop()
            raise ExecutorError(f"There is no Dask scheduler at {self._where}: {error}") from error
        self.max_workers = max_workers or max(1, threads)

    # From any thread

    def put(self, call: Call, retries: int) -> None:
        data = bytes(dump_call(call, child.about_call(call)))
        item = Item(call, data, self._contexts.number_of(call), retries)
        forget_given(call)
        self._items[item.id] = item
        self._incoming.append(item)
        call.future.add_done_callback(lambda _: self._thread.soon(self._over, item))
        if not self._told:
            self._told = True
            self._thread.soon(self._turn)

    def stop(self, calls: Sequence[Call]) -> None:
        """Nothing: what a thread of somebody else's worker does, it goes on with."""

    def place_of(self, call: Call) -> dict[str, Any]:
        item = self._items.get(call.id)
        return {} if item is None else {"host": item.host, "pid": item.pid}

    def shapes(self) -> list[Shape]:
        return [_shape_of(one) for one in self._thread.begin(self._resources()).result(_ANSWER_S)]

    def close(self, wait: bool) -> bool:
        if os.getpid() != self._pid:
            return False  # a forked child's copy
        first = self._closing.acquire(blocking=False)
        if first:
            self._ender.start()
        while wait and self._ender.is_alive():
            self._ender.join(_LOOK_S)  # in turns: a Ctrl-C does not wake a thread that just goes to sleep
        return first

    # In the loop's thread

    async def _open(self) -> int:
        for attempt in range(1, _ATTEMPTS + 1):
            client: Any = distributed.Client(  # type: ignore[no-untyped-call]
                **self._given,
                asynchronous=True,
                set_as_default=False,
                timeout=_CONNECT_S,
                name="fractal-runner",
            )
            try:
                await client
                break
            except AssertionError:
                # Dask's client cannot do with the scheduler's first word coming together with another one,
                # as it does when somebody cancels something in this very moment.
                await client.close()
                if attempt == _ATTEMPTS:
                    raise
            except BaseException:  # being cancelled, too, must leave no connection behind
                await client.close()
                raise
        self._client = client
        client.subscribe_topic(self._topic, self._heard)
        return sum(worker["nthreads"] for worker in (await client.scheduler.identity())["workers"].values())

    async def _resources(self) -> list[Mapping[str, float]]:
        """What each of the workers declares that there are."""
        looked, found = self._declared
        if self._thread.loop.time() - looked > _SHAPES_S:
            workers = (await self._client.scheduler.identity())["workers"]
            found = [worker["resources"] for worker in workers.values()]
            self._declared = self._thread.loop.time(), found
        return found

    def _turn(self) -> None:
        self._told = False
        while self._incoming:
            self._queue.append(self._incoming.popleft())
        while self._queue and len(self._handed_over) < self.max_workers:
            item = self._queue.popleft()
            if not item.is_over:
                self._handed_over[item.id] = None
                self._thread.spawn(self._see_through(item))

    def _over(self, item: Item) -> None:
        """A call's future has ended, whatever the call does: another one may be handed over."""
        self._items.pop(item.id, None)
        future = self._handed_over.pop(item.id, None)
        if future is not None:
            self._thread.spawn(future.cancel())  # it lets go of what it had, too
        if not self._items:
            self._empty.set()
        self._turn()

    async def _see_through(self, item: Item) -> None:
        """Hand a call over, and wait for its end."""
        try:
            future = await self._hand_over(item)
            if item.id not in self._handed_over:  # it was cancelled meanwhile
                await future.cancel()
                return
            self._handed_over[item.id] = future
            message = await future
        except asyncio.CancelledError:
            if not item.is_over:
                error: BaseException = JobExecutionError(
                    f"The call {item.name!r} was cancelled in Dask's scheduler, by somebody else.",
                    reason="CANCELLED",
                )
                self._deliverer.put(item.call.fail, error)
        except KilledWorker as killed:
            error = JobExecutionError(f"The call {item.name!r} was ended with its worker: {killed}")
            self._deliverer.put(item.call.fail, error)
        except Exception as problem:  # of Dask's, or of a worker that lacks what ours needs
            text = f"The call {item.name!r} could not be carried out by Dask: {problem!r}"
            self._deliverer.put(item.call.fail, ExecutorError(text, type_name=type(problem).__qualname__))
        else:
            self._deliverer.put(items.end, item.call, message, "")

    async def _hand_over(self, item: Item) -> Any:
        options = item.call.options
        need = {"cpus": options.cpus, "memory": options.memory or 0, "gpus": options.gpus}
        declared = await self._resources()
        lacking = [
            _shape_of(one).lacks(cpus=options.cpus, memory=options.memory, gpus=options.gpus)
            for one in declared
        ]
        closest = min(lacking, key=len, default=[])
        if closest:  # those that there were when it was submitted have gone
            raise ValueError(f"{'; '.join(closest)}, and no other one has more")
        order = guest.Order(item.id, item.name, self._topic, self._home, child.levels_in_force())
        data: Any = item.data
        if len(data) > _SCATTER_BYTES:
            data = await self._client.scatter(data, hash=False)
        return self._client.submit(
            *(guest.run_order, order, data, await self._context(item.context)),
            key=f"{item.name}-{uuid.uuid4().hex}",
            pure=False,
            resources=_as_declared(need, declared),
        )

    async def _context(self, number: int) -> Any:
        """A context, in Dask's store."""
        if number not in self._scattered:
            data = self._contexts.data(number)
            small = len(data) <= _SCATTER_BYTES
            self._scattered[number] = data if small else await self._client.scatter(data, hash=True)
        return self._scattered[number]

    def _heard(self, event: tuple[float, Any]) -> None:
        kind, number, *said = event[1]
        if kind == guest.LOG:
            self._deliverer.put(handle_record, memoryview(said[0]))
        elif kind == guest.STARTED and (item := self._items.get(number)) is not None:
            item.host, item.pid = said
            item.begin()

    async def _leave(self) -> None:
        while self._items:
            self._empty.clear()
            await self._empty.wait()
        self._scattered.clear()
        await self._client.close()

    def _end(self) -> None:
        try:
            self._thread.begin(self._leave()).result()
        finally:
            self._deliverer.stop()
            self._deliverer.join()
            self._thread.stop()
            self._thread.join()


def _shape_of(declared: Mapping[str, float]) -> Shape:
    found = {
        ours: int(declared[name]) for ours, names in _RESOURCES.items() for name in names if name in declared
    }
    return Shape(**found)


def _as_declared(need: Mapping[str, int], declared: Sequence[Mapping[str, float]]) -> dict[str, int] | None:
    """What a call needs, by the names that workers have for it; without what none of them declares."""
    said = {name for one in declared for name in one}
    found = {
        name: need[ours]
        for ours, names in _RESOURCES.items()
        for name in names
        if name in said and need[ours]
    }
    return found or None
