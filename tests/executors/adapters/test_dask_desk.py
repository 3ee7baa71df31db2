"""The desk lends, starts and ends workers as it should: with a scheduler and hosts that only note it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from fractal_runner.executors.adapters.daskpool.desk import Client, Desk
from fractal_runner.executors.adapters.daskpool.terms import PoolTerms, WorkerEnd


class Hosts:
    """Notes what it is told."""

    grace_s = 0.0

    def __init__(self, told: Callable[[str, WorkerEnd], None]) -> None:
        self.told = told
        self.launches: list[list[str]] = []
        self.ended: list[str] = []
        self.running: set[str] = set()

    def launch(self, names: Sequence[str]) -> None:
        self.launches.append(list(names))

    def has_started(self, name: str) -> bool:
        return name in self.running

    def end(self, name: str) -> None:
        self.ended.append(name)

    async def close(self) -> None:
        return None


class Stream:
    """Notes what a client is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def send(self, *messages: tuple[Any, ...]) -> None:
        self.sent += messages

    def abort(self) -> None:
        return None

    def lent(self) -> list[str]:
        return [said[0] for kind, *said in self.sent if kind == "lend"]


class Bench:
    """A desk, and what is around it. Its clock stands still but for `pass_time`."""

    def __init__(self, **terms: Any) -> None:
        self.now = 1000.0
        self.dismissed: list[str] = []  # workers that Dask's scheduler was asked to close
        self.scheduler = SimpleNamespace(workers={}, remove_worker=self._dismiss)
        self.hosts: Hosts
        loop = SimpleNamespace(call_later=lambda *_: None)
        thread: Any = SimpleNamespace(loop=loop, spawn=lambda coroutine: coroutine.close())

        def make(told: Callable[[str, WorkerEnd], None]) -> Hosts:
            self.hosts = Hosts(told)
            return self.hosts

        given = {"max_workers": 10, "idle_timeout": 60, **terms}
        self.desk = Desk(thread, PoolTerms.of(given), "pool", make, clock=lambda: self.now)
        self.desk._scheduler = self.scheduler  # type: ignore[assignment]

    def _dismiss(self, *, address: str, **_: Any) -> Any:
        self.dismissed.append(address.removeprefix("tls://"))

        async def nothing() -> None: ...

        return nothing()

    def client(self, wants: int = 0) -> Client:
        client = Client(Stream())  # type: ignore[arg-type]
        self.desk._clients.append(client)
        self.want(client, wants)
        return client

    def want(self, client: Client, wants: int) -> None:
        self.say(client, "want", wants)

    def say(self, client: Client, *message: Any) -> None:
        self.desk._heed(client, *message)
        self.desk._scale()
        self.desk._lend()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.desk._scale()

    @property
    def launched(self) -> list[str]:
        return [name for names in self.hosts.launches for name in names]

    async def come(self, *names: str) -> None:
        for name in names:
            address = f"tls://{name}"
            self.scheduler.workers[address] = SimpleNamespace(name=name)
            await self.desk.add_worker(self.scheduler, address)  # type: ignore[arg-type]


def stream_of(client: Client) -> Any:
    return client.stream


async def test_as_many_workers_are_started_as_there_is_work_for_within_the_bounds() -> None:
    bench = Bench(min_workers=2, max_workers=5)
    client = bench.client()
    assert len(bench.launched) == 2
    bench.pass_time(2)

    bench.want(client, 4)
    assert len(bench.launched) == 4
    bench.pass_time(2)

    bench.want(client, 100)
    assert len(bench.launched) == 5


async def test_no_more_than_a_batch_is_started_per_interval() -> None:
    bench = Bench(launch_batch_size=3, launch_interval=10)
    bench.client(8)
    assert [len(names) for names in bench.hosts.launches] == [3]

    bench.pass_time(9)
    assert [len(names) for names in bench.hosts.launches] == [3]
    bench.pass_time(1)
    bench.pass_time(10)
    bench.pass_time(10)

    assert [len(names) for names in bench.hosts.launches] == [3, 3, 2]
    assert len(set(bench.launched)) == 8


async def test_a_worker_that_ends_at_once_is_not_replaced_at_once() -> None:
    bench = Bench(launch_batch_size=1, launch_interval=5)
    bench.client(1)

    bench.hosts.told(bench.launched[0], WorkerEnd("ended with exit code 1", 1))
    assert len(bench.launched) == 1

    bench.pass_time(5)
    assert len(bench.launched) == 2


async def test_idle_workers_end_after_their_time_but_for_the_least_number() -> None:
    bench = Bench(min_workers=1, idle_timeout=60)
    client = bench.client(3)
    await bench.come(*bench.launched)
    names = stream_of(client).lent()
    bench.want(client, 0)
    for name in names:
        bench.say(client, "return", name)

    bench.pass_time(59)
    assert bench.desk.status()["present"] == 3
    bench.pass_time(1)

    assert len(bench.dismissed) == 2
    assert set(bench.dismissed) < set(names)


async def test_a_worker_with_work_is_not_ended_however_long_there_are_too_many() -> None:
    bench = Bench(idle_timeout=60)
    client = bench.client(2)
    await bench.come(*bench.launched)
    first, second = stream_of(client).lent()
    bench.want(client, 1)
    bench.pass_time(1000)

    bench.pass_time(1000)
    assert bench.desk.status()["lent"] == 2
    bench.say(client, "return", second)
    bench.pass_time(60)

    assert bench.dismissed == [second]
    assert first in client.has


async def test_jobs_that_still_wait_are_taken_back_when_nobody_needs_them_any_more() -> None:
    bench = Bench(idle_timeout=60)
    client = bench.client(3)

    bench.want(client, 1)
    bench.pass_time(30)
    assert bench.hosts.ended == []
    bench.pass_time(31)

    assert len(bench.hosts.ended) == 2


async def test_a_worker_is_lent_to_one_client_at_a_time_and_to_who_has_fewest() -> None:
    bench = Bench(max_workers=3)
    first, second = bench.client(3), bench.client(3)
    await bench.come(*bench.launched)

    lent = [*stream_of(first).lent(), *stream_of(second).lent()]

    assert sorted(lent) == sorted(bench.launched)
    assert sorted((len(first.has), len(second.has))) == [1, 2]


async def test_who_has_more_than_its_part_is_asked_to_give_back_once() -> None:
    bench = Bench(max_workers=4)
    greedy = bench.client(100)
    await bench.come(*bench.launched)
    assert len(greedy.has) == 4

    late = bench.client(2)
    bench.want(late, 2)

    recalls = [said for kind, *said in stream_of(greedy).sent if kind == "recall"]
    assert recalls == [[2]]
    for name in stream_of(greedy).lent()[:2]:
        bench.say(greedy, "return", name)
    assert sorted(late.has) == sorted(stream_of(greedy).lent()[:2])
    assert len(greedy.has) == 2


async def test_what_is_given_back_goes_to_who_waits() -> None:
    bench = Bench(max_workers=1)
    first = bench.client(1)
    await bench.come(*bench.launched)
    second = bench.client(1)
    assert second.has == set()

    bench.want(first, 0)
    bench.say(first, "return", bench.launched[0])

    assert second.has == {bench.launched[0]}


async def test_whoever_had_a_worker_is_told_how_it_has_ended() -> None:
    bench = Bench(max_workers=1)
    client = bench.client(1)
    await bench.come(*bench.launched)
    (name,) = bench.launched

    bench.hosts.told(name, WorkerEnd("was killed by SIGKILL", -9, "SIGKILL"))

    assert ("gone", name, "was killed by SIGKILL", -9, "SIGKILL", True) in stream_of(client).sent
    assert client.has == set()


async def test_a_worker_that_does_not_answer_its_client_is_ended_and_not_lent_again() -> None:
    bench = Bench(max_workers=1)
    client = bench.client(1)
    await bench.come(*bench.launched)

    bench.say(client, "lost", bench.launched[0])

    assert bench.hosts.ended == bench.launched[:1]
    assert stream_of(client).lent() == bench.launched[:1]


@pytest.mark.parametrize(("end", "times"), [(WorkerEnd("ended with exit code 1", 1), 3)])
async def test_workers_that_end_before_they_come_are_told_of_after_the_third(
    end: WorkerEnd, times: int
) -> None:
    bench = Bench(max_workers=1)
    client = bench.client(1)

    for time in range(times):
        assert not [said for said in stream_of(client).sent if said[0] == "failed"], time
        bench.hosts.told(bench.launched[-1], end)
        bench.pass_time(10)

    assert ("failed", "ended with exit code 1", None) in stream_of(client).sent
    assert client.wants == 0


async def test_what_a_cluster_refuses_is_told_of_at_once() -> None:
    bench = Bench(max_workers=2)
    client = bench.client(1)

    bench.hosts.told(bench.launched[0], WorkerEnd("invalid partition", refused=True, reason="REFUSED"))

    assert ("failed", "invalid partition", "REFUSED") in stream_of(client).sent


async def test_a_job_may_wait_for_its_node_but_a_worker_that_runs_has_to_come() -> None:
    bench = Bench(start_timeout=100)
    bench.client(2)
    waiting, running = bench.launched
    bench.pass_time(1000)
    bench.hosts.running.add(running)

    bench.pass_time(1)
    bench.pass_time(101)

    assert bench.hosts.ended == [running]
    assert waiting not in bench.hosts.ended


async def test_workers_of_others_are_left_alone() -> None:
    bench = Bench()
    client = bench.client(0)

    await bench.come("somebody-elses")
    bench.want(client, 1)

    assert stream_of(client).lent() == []
