"""Places that executors share, with each other and with GNU make; the make is the real one."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import ForkExecutor, ProcessExecutor, SlotPool, SpawnExecutor, ThreadExecutor
from fractal_runner.executors import slots


class Gauge:
    """How many calls run at a time, counted in files, so that processes can be counted, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def call(self, name: str) -> int:
        mine = self.folder / name
        mine.touch()
        try:
            deadline = time.monotonic() + 0.15
            most = 0
            while time.monotonic() < deadline:
                most = max(most, len(list(self.folder.iterdir())))
                time.sleep(0.01)
            return most
        finally:
            mine.unlink()


@pytest.fixture
def gauge(tmp_path: Path) -> Gauge:
    folder = tmp_path / "running"
    folder.mkdir()
    return Gauge(folder)


@pytest.fixture(params=["by descriptors", "by a named pipe"])
def pool_of(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], SlotPool]]:
    """Makes pools of both forms of the jobserver, whatever the installed make knows."""
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    monkeypatch.setattr(slots, "_make_knows_fifos", lambda: request.param == "by a named pipe")
    pools: list[SlotPool] = []

    def make(size: int) -> SlotPool:
        pools.append(SlotPool(size))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_place_is_taken_once_and_comes_back(pool_of: Any) -> None:
    pool = pool_of(2)

    assert [pool.acquire(timeout=0) for _ in range(3)] == [True, True, False]
    pool.release()
    assert pool.acquire(timeout=0)
    pool.release()
    pool.release()
    with pytest.raises(ValueError, match="not taken"):
        pool.release()


def test_who_waits_gets_the_place_that_comes_free(pool_of: Any) -> None:
    pool = pool_of(1)
    pool.acquire()
    got = threading.Event()
    threading.Thread(target=lambda: (pool.acquire(), got.set())).start()

    assert not got.wait(0.2)
    pool.release()

    assert got.wait(30)


async def test_an_event_loop_waits_without_standing_still(pool_of: Any) -> None:
    pool = pool_of(1)
    await pool.acquire_slot()
    waiting = [asyncio.ensure_future(pool.acquire_slot()) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in waiting)

    waiting[0].cancel()
    for _ in range(2):
        await pool.release_slot()
        await asyncio.wait(waiting[1:], timeout=30, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait(waiting, timeout=30)

    assert [task.cancelled() for task in waiting] == [True, False, False]
    await pool.release_slot()


@pytest.mark.parametrize("kinds", [(ThreadExecutor, ThreadExecutor), (ThreadExecutor, ForkExecutor)])
def test_a_pool_bounds_several_executors_together(pool_of: Any, gauge: Gauge, kinds: Any) -> None:
    pool = pool_of(2)
    with kinds[0](3, slots=pool) as first, kinds[1](3, slots=pool) as second:
        calls = [
            executor.submit(gauge.call, f"{name}{number}")
            for number in range(6)
            for name, executor in (("a", first), ("b", second))
        ]
        most = max(call.result(60) for call in calls)

    assert most == 2


def test_a_nested_call_runs_at_its_parents_place(pool_of: Any) -> None:
    with ThreadExecutor(1, slots=pool_of(1)) as executor:
        outer = executor.submit(lambda: executor.submit(lambda: executor.submit(int, "7").result()).result())
        assert outer.result(30) == 7


def test_what_waits_for_a_place_can_be_cancelled_and_shut_down(pool_of: Any) -> None:
    pool = pool_of(1)
    pool.acquire()
    with ThreadExecutor(1, slots=pool) as executor:
        call = executor.submit(int)
        assert call.cancel()
        executor.submit(int)
        executor.shutdown(cancel_futures=True)
    pool.release()


def test_tokens_that_a_killed_make_took_are_replaced(pool_of: Any) -> None:
    pool = pool_of(3)
    pool.acquire()
    os.read(pool._read, 2)  # what a make takes that then cannot give back

    pool.release()

    assert [pool.acquire(timeout=0) for _ in range(4)] == [True, True, True, False]


MAKEFILE = """
jobs := $(foreach number,1 2 3 4 5 6,job$(number))
all: $(jobs)
job%:
	@touch {folder}/$@; ls {folder} | wc -l >> {counts}; sleep 0.2; rm {folder}/$@
"""


def run_make(makefile: str, *, close_fds: bool = False) -> str:
    done = subprocess.run(
        ["make", "-f", makefile],  # without -j: one given here would be make's own affair
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        close_fds=close_fds,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("kind", [ThreadExecutor, ProcessExecutor, ForkExecutor, SpawnExecutor])
def test_a_make_in_a_call_shares_its_executors_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    (tmp_path / "running").mkdir()
    makefile = tmp_path / "Makefile"
    makefile.write_text(MAKEFILE.format(folder=tmp_path / "running", counts=tmp_path / "counts"))
    with SlotPool(3) as pool, kind(2, slots=pool) as executor:
        calls = [executor.submit(run_make, str(makefile)) for _ in range(1)]
        warnings = [call.result(120) for call in calls]
        assert pool.acquire(timeout=30)  # they are all there again
        pool.release()

    counts = [int(line) for line in (tmp_path / "counts").read_text().split()]
    assert warnings == [""]
    assert len(counts) == 6
    # Its own place and the two that are free: more than the one it would have without them.
    assert 2 <= max(counts) <= 3


JOB = """
import sys
sys.path.insert(0, sys.argv[1])
from fractal_runner import SlotPool, ThreadExecutor
from tests.executors.test_slots import Gauge
import pathlib
with SlotPool() as pool, ThreadExecutor(8, slots=pool) as executor:
    gauge = Gauge(pathlib.Path(sys.argv[2]))
    print(max(executor.map(gauge.call, [f"{sys.argv[3]}-{n}" for n in range(8)])))
"""


def test_places_come_from_the_make_that_started_us(tmp_path: Path, top: Path, gauge: Gauge) -> None:
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "Makefile").write_text(
        f"all: a b\na b:\n\t+@{sys.executable} job.py {top} {gauge.folder} $@\n"
    )
    # A make of its own, also where the tests themselves were started by one.
    of_make = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in of_make}
    done = subprocess.run(
        ["make", "-j3"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    most = [int(line) for line in done.stdout.split()]
    assert len(most) == 2
    assert 2 <= max(most) <= 3  # of 16 calls that could run at a time


def test_a_jobserver_that_is_not_there_is_an_error_that_says_what_to_do() -> None:
    flags = " -j4 --jobserver-auth=997,998"

    with pytest.raises(OSError, match=re.escape("begin with '+'")):
        SlotPool(makeflags=flags)
    with pytest.raises(OSError, match="nowhere/fifo"):
        SlotPool(makeflags=" -j4 --jobserver-auth=fifo:/nowhere/fifo")


def test_make_without_a_jobserver_means_places_of_our_own() -> None:
    with SlotPool(2, makeflags=" -j1 --jobserver-auth=-2,-2") as pool:
        assert pool.size == 2
        assert pool.acquire(timeout=0)
        pool.release()


def test_size_bounds_what_is_taken_of_makes_places(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    fd = os.open(fifo, os.O_RDWR)
    os.write(fd, b"abc")
    try:
        with SlotPool(2, makeflags=f" -j4 --jobserver-auth=fifo:{fifo}") as pool:
            assert [pool.acquire(timeout=0) for _ in range(3)] == [True, True, False]
        assert sorted(os.read(fd, 10)) == sorted(b"abc")  # given back as they were
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [0, -1, True, "2", 1.5])
def test_a_size_is_a_positive_whole_number(size: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"size: {size!r} is not a whole number")):
        SlotPool(size)


def test_waiting_ends_with_the_place_and_not_before(pool_of: Any) -> None:
    pool = pool_of(1)
    pool.acquire()
    with ThreadExecutor(2, slots=pool) as executor:
        calls = [executor.submit(int) for _ in range(5)]
        assert not wait(calls, timeout=1.2).done  # longer than the turns in which it looks
        pool.release()
        assert len(wait(calls, timeout=30).done) == 5
