"""Who has which worker: the pool's one place where workers are started, lent and ended.

A client says how many workers it could use, and is lent some, each for as long as it likes but for a recall.
How many there are follows from what all clients could use. All of it belongs to the loop's thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from distributed import Scheduler
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

from fractal_runner.executors.adapters.daskpool.loops import LoopThread
from fractal_runner.executors.adapters.daskpool.streams import Stream
from fractal_runner.executors.adapters.daskpool.terms import JOIN_HANDLER, PoolTerms, WorkerEnd

_FAILURES = 3  # so many workers in succession that end before they have come: no more will
_CLOSE_GRACE_S = 5.0
_numbers = itertools.count(1)
_logger = logging.getLogger("fractal_runner")


class Hosts(Protocol):
    """What starts and ends workers. The desk is told of each one's end, once, in the loop's thread.

    Attributes:
        grace_s: seconds within which it tells by itself how a worker has ended that is lost, and better than
            if it was told to end it.
    """

    grace_s: float

    def launch(self, names: Sequence[str]) -> None:
        """Start a worker of each of these names. What goes wrong with it is its end."""

    def has_started(self, name: str) -> bool:
        """Whether this worker runs, as far as is known; a job that waits for its node does not."""

    def end(self, name: str) -> None:
        """End a worker, whether it has started or not. Its end is told as every other."""

    async def close(self) -> None:
        """Return once nothing is left of any worker."""


class Member:
    """A worker, from its launch to its end."""

    __slots__ = ("address", "client", "ending", "idle_since", "launched", "name", "started", "users")

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.address: str | None = None  # once it has come
        self.client: Client | None = None  # who has it
        self.users: set[Client] = set()  # who have had it, and may have something that ran there
        self.launched = self.idle_since = now
        self.started: float | None = None
        self.ending = False

    @property
    def is_free(self) -> bool:
        return self.address is not None and self.client is None and not self.ending


class Client:
    """Somebody who uses the pool."""

    __slots__ = ("has", "recalled", "stream", "wants")

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.wants = 0  # how many workers it could use
        self.has: set[str] = set()
        self.recalled = 0  # how many of them it was asked to give back

    @property
    def lacks(self) -> int:
        return self.wants - len(self.has)


class Desk(SchedulerPlugin):
    """See the module.

    Args:
        thread: the loop's.
        terms: the pool's.
        name: the pool's, which no other one has or had: what its workers are named after.
        hosts: makes what starts workers, given what is to be told of their ends.
        on_end: is called when a client says that the pool is to end; None if that is not for clients to say.
        clock: seconds, which never go back.
    """

    name = "fractal-runner-desk"

    def __init__(
        self,
        thread: LoopThread,
        terms: PoolTerms,
        name: str,
        hosts: Callable[[Callable[[str, WorkerEnd], None]], Hosts],
        *,
        on_end: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_end = on_end
        self._thread = thread
        self._terms = terms
        self._pool = name
        self._clock = clock
        self._hosts = hosts(self.ended)
        self._scheduler: Scheduler
        self._members: dict[str, Member] = {}
        self._clients: list[Client] = []
        self._failures = 0
        self._launches: tuple[float, int] = (-1e9, 0)  # when this interval began, and how many since
        self._surplus_since: float | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self, scheduler: Scheduler) -> None:
        """Begin to serve."""
        self._scheduler = scheduler
        scheduler.add_plugin(self)
        scheduler.handlers[JOIN_HANDLER] = self.serve
        self._ticking = self._thread.spawn(self._tick())

    async def close(self) -> None:
        """End all workers; return once nothing is left of them."""
        if self._closed:
            return
        self._closed = True
        if self._ticking is not None:
            self._ticking.cancel()
        for member in list(self._members.values()):
            self._end(member)
        for client in list(self._clients):
            client.stream.abort()
        await self._hosts.close()

    def status(self) -> dict[str, Any]:
        """How things are, in plain values."""
        members = list(self._members.values())
        return {
            "workers": self._terms.workers,
            "min_workers": self._terms.min_workers,
            "max_workers": self._terms.max_workers,
            "launched": sum(member.address is None for member in members),
            "present": sum(member.address is not None for member in members),
            "lent": sum(member.client is not None for member in members),
            "clients": len(self._clients),
            "wanted": sum(client.wants for client in self._clients),
        }

    # Clients

    async def serve(self, comm: Any) -> Status:
        """Serve a client until it goes."""
        client = Client(Stream(comm))
        self._clients.append(client)
        shape = asdict(self._terms.shape)
        client.stream.send(("terms", shape, self._terms.max_workers, self._terms.workers))
        try:
            while True:
                for kind, *said in await client.stream.read():
                    self._heed(client, kind, *said)
                self._scale()
                self._lend()
        except OSError:
            return Status.dont_reply
        finally:
            client.stream.abort()
            self._clients.remove(client)
            for name in list(client.has):
                self._take_back(client, name)
            for member in self._members.values():
                member.users.discard(client)
            self._lend()

    def _heed(self, client: Client, kind: str, *said: Any) -> None:
        if kind == "want":
            (client.wants,) = said
        elif kind == "return":
            self._take_back(client, *said)
        elif kind == "lost":  # it does not answer, or does not do what it is told
            (name,) = said
            member = self._members.get(name)
            if member is None:
                client.stream.send(("gone", name, "has gone", None, None, True))
                return
            member.users.add(client)
            self._take_back(client, name)
            self._end(member, gently=False)
        elif kind == "end" and self._on_end is not None:
            client.stream.send(("end", {}))
            self._on_end()
        elif kind == "status":
            client.stream.send(("status", self.status()))
        else:
            raise ConnectionAbortedError(f"{kind!r} is no message that a pool knows")

    def _take_back(self, client: Client, name: str) -> None:
        client.has.discard(name)
        client.recalled = max(0, client.recalled - 1)
        member = self._members.get(name)
        if member is not None and member.client is client:
            member.client = None
            member.idle_since = self._clock()

    def _lend(self) -> None:
        """Lend free workers to those who have fewest; without any, ask who has more than its part."""
        free = [member for member in self._members.values() if member.is_free]
        while free and (needy := [client for client in self._clients if client.lacks > 0]):
            client, member = min(needy, key=lambda one: len(one.has)), free.pop()
            member.client = client
            member.users.add(client)
            client.has.add(member.name)
            client.stream.send(("lend", member.name, member.address))
        needy = [client for client in self._clients if client.lacks > 0]
        present = sum(member.address is not None for member in self._members.values())
        users = sum(client.wants > 0 or bool(client.has) for client in self._clients)
        if not needy or users < 2:
            return
        part = max(1, present // users)
        short = sum(max(0, min(client.wants, part) - len(client.has)) for client in needy)
        for client in sorted(self._clients, key=lambda one: -len(one.has)):
            more = min(short, len(client.has) - client.recalled - part)
            if more > 0:
                client.recalled += more
                short -= more
                client.stream.send(("recall", more))

    # Workers

    async def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Dask's scheduler has a new worker."""
        member = self._members.get(str(scheduler.workers[worker].name))
        if member is None or member.ending:
            return  # somebody else's, or told to end when it had not come yet
        member.address = worker
        member.idle_since = self._clock()
        self._failures = 0
        self._lend()

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Dask's scheduler has lost a worker: it, or the way to it."""
        for member in self._members.values():
            if member.address == worker:
                self._end(member, gently=False)

    def ended(self, name: str, end: WorkerEnd) -> None:
        """A worker has ended, and what it had started."""
        member = self._members.pop(name, None)
        if member is None:
            return
        for client in member.users:
            client.stream.send(("gone", name, end.text, end.returncode, end.reason, end.clean))
            client.has.discard(name)
        if member.address is None and not member.ending:
            self._failures = _FAILURES if end.refused else self._failures + 1
            _logger.warning("a worker of pool %s %s", self._pool, end.text)
            if self._failures >= _FAILURES and not any(one.address for one in self._members.values()):
                self._failures = 0
                for client in self._clients:
                    client.wants = 0  # what it wants hereafter, it will say
                    client.stream.send(("failed", end.text, end.reason))
        if not self._closed:
            self._scale()

    def _end(self, member: Member, *, gently: bool = True) -> None:
        """End a worker. Dask's own word leaves it time to close what it has; the host sees to the rest."""
        if member.ending:
            return
        member.ending = True
        if member.address is not None and not gently and self._hosts.grace_s:
            self._thread.loop.call_later(self._hosts.grace_s, self._end_overdue, member)
            return
        if not gently or member.address is None or member.address not in self._scheduler.workers:
            self._hosts.end(member.name)
            return
        self._thread.spawn(
            self._scheduler.remove_worker(
                address=member.address, stimulus_id=f"fractal-runner-{member.name}", expected=True
            )
        )
        self._thread.loop.call_later(_CLOSE_GRACE_S, self._end_overdue, member)

    def _end_overdue(self, member: Member) -> None:
        if self._members.get(member.name) is member:
            self._hosts.end(member.name)

    async def _tick(self) -> None:
        while True:
            self._scale()
            await asyncio.sleep(min(1.0, self._terms.launch_interval))  # what it does is due by the clock

    def _scale(self) -> None:
        """Start what is missing, a batch per interval; end what has had no work for long."""
        if self._closed:
            return
        now, terms = self._clock(), self._terms
        wanted = sum(client.wants for client in self._clients)
        target = max(terms.min_workers, min(terms.max_workers, wanted))
        there = [member for member in self._members.values() if not member.ending]
        if (missing := target - len(there)) > 0:
            self._launch(missing, now)
        self._surplus_since = None if len(there) <= target else (self._surplus_since or now)
        if self._surplus_since is not None and now - self._surplus_since >= terms.idle_timeout:
            # Those that have not come yet go first: nothing was done there that might be done again.
            idle = [member for member in there if member.client is None]
            idle.sort(key=lambda member: (member.address is not None, member.idle_since))
            for member in idle[: len(there) - target]:
                if now - member.idle_since >= terms.idle_timeout:
                    self._end(member)
        for member in there:
            self._check_start(member, now)

    def _launch(self, missing: int, now: float) -> None:
        began, count = self._launches
        if now - began >= self._terms.launch_interval:
            began, count = now, 0
        # Workers that end at once are not replaced at once.
        number = min(missing, self._terms.launch_batch_size - count)
        if number <= 0:
            return
        self._launches = began, count + number
        names = [f"{self._pool}-{next(_numbers)}" for _ in range(number)]
        for name in names:
            self._members[name] = Member(name, now)
        self._hosts.launch(names)

    def _check_start(self, member: Member, now: float) -> None:
        """A worker that runs has to come in time."""
        if member.address is not None:
            return
        if member.started is None and self._hosts.has_started(member.name):
            member.started = now
        if member.started is not None and now - member.started > self._terms.start_timeout:
            member.started = now  # its end is told; should that fail, this is said again
            _logger.warning("worker %s runs and has not come to its pool", member.name)
            self._hosts.end(member.name)
