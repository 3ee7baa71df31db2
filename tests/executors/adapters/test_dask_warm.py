"""Pools that are kept between runs: another process has them, and whoever knows their name may join."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.adapters.dask import DaskExecutor
from fractal_runner.executors.adapters.daskpool.warm import (
    PoolRecord,
    find_pool,
    list_pools,
    pool_status,
    start_pool,
    stop_pool,
)
from fractal_runner.testing import PATIENCE_S, Gate, is_alive, wait_until
from tests.executors.adapters.knowing import assert_calls_know_what_they_are


@pytest.fixture(scope="session", autouse=True)
def kept(kept_pool: tuple[PoolRecord, Path]) -> None:
    """From before what looks for things that a module of tests leaves behind: it stays."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., PoolRecord]]:
    names = []

    def start(name: str, **terms: Any) -> PoolRecord:
        names.append(name)
        return start_pool(name, {"max_workers": 1, **terms}, state=tmp_path)

    yield start
    for name in names:
        if any(record.name == name for record in list_pools(tmp_path)):
            stop_pool(name, tmp_path)


def test_a_pool_outlives_those_who_use_it_and_keeps_its_workers(pool: PoolRecord) -> None:
    def worker() -> int:
        return os.getppid()

    with DaskExecutor(1, join="shared") as executor:
        first = executor.submit(worker).result(PATIENCE_S)
    with DaskExecutor(2, join="shared") as executor:
        seen = {executor.submit(worker).result(PATIENCE_S) for _ in range(20)}

    assert is_alive(first)
    assert seen & {first} or len(seen) == 1
    status = pool_status(pool)
    assert (status["present"], status["max_workers"], status["wanted"]) == (2, 2, 0)


def test_two_who_use_it_at_a_time_share_its_workers(pool: PoolRecord, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with DaskExecutor(2, join="shared") as one, DaskExecutor(2, join="shared") as other:
        held = [one.submit(gate.wait, number) for number in range(4)]
        gate.await_arrivals(2)
        late = other.submit(pow, 2, 3)
        assert not late.running()

        gate.open()

        assert late.result(PATIENCE_S) == 8
        assert [future.result(PATIENCE_S) for future in held] == [0, 1, 2, 3]


def test_the_process_of_those_who_have_left_is_nobody_elses(
    start: Callable[..., PoolRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "fractal-runner").symlink_to(tmp_path)
    start("one-worker")

    with DaskExecutor(1, join="one-worker") as executor:
        first, worker = executor.submit(_process_and_parent).result(PATIENCE_S)
    with DaskExecutor(1, join="one-worker") as executor:
        second, same_worker = executor.submit(_process_and_parent).result(PATIENCE_S)
        wait_until(lambda: not is_alive(first), "the process of who has left has ended")

    assert worker == same_worker
    assert first != second


def _process_and_parent() -> tuple[int, int]:
    return os.getpid(), os.getppid()


def test_calls_know_what_they_are(pool: PoolRecord) -> None:
    with DaskExecutor(1, join="shared") as executor:
        assert_calls_know_what_they_are(executor)


def test_its_files_are_its_owners(start: Callable[..., PoolRecord], tmp_path: Path) -> None:
    record = start("mine")

    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "pools").iterdir()}
    assert modes == {"mine.json": 0o600, "mine.lock": 0o600, "mine.log": 0o600, "mine.d": 0o700}
    assert (tmp_path / "pools").stat().st_mode & 0o777 == 0o700
    assert Path(record.tls.key).stat().st_mode & 0o777 == 0o600
    assert list_pools(tmp_path) == [record]
    assert record.life == "running"


def test_one_that_is_stopped_leaves_nothing(start: Callable[..., PoolRecord], tmp_path: Path) -> None:
    record = start("mine", min_workers=1)
    keeper = psutil.Process(record.keeper.pid)
    wait_until(lambda: pool_status(record)["present"] == 1, "its worker has come")
    family = [keeper.pid, *(child.pid for child in keeper.children(recursive=True))]

    stop_pool("mine", tmp_path)

    wait_until(lambda: not any(map(is_alive, family)), "all of its processes have gone")
    assert list_pools(tmp_path) == []
    assert not (tmp_path / "pools" / "mine.d").exists()
    with pytest.raises(ExecutorError, match="There is no pool 'mine'"):
        find_pool("mine", tmp_path)


def test_a_dead_one_is_recognised_and_may_be_started_anew(
    start: Callable[..., PoolRecord], tmp_path: Path
) -> None:
    record = start("mine", min_workers=1)
    wait_until(lambda: pool_status(record)["present"] == 1, "its worker has come")
    workers = psutil.Process(record.keeper.pid).children(recursive=True)
    os.kill(record.keeper.pid, signal.SIGKILL)
    wait_until(lambda: list_pools(tmp_path)[0].life == "dead", "it is seen to be dead")

    with pytest.raises(ExecutorError, match=rf"process {record.keeper.pid} on .* is dead"):
        find_pool("mine", tmp_path)
    wait_until(lambda: not any(is_alive(one.pid) for one in workers), "its workers have ended by themselves")
    again = start("mine")

    assert again.keeper.pid != record.keeper.pid
    assert find_pool("mine", tmp_path) == again


def test_the_record_of_a_dead_one_can_be_removed(start: Callable[..., PoolRecord], tmp_path: Path) -> None:
    record = start("mine")
    os.kill(record.keeper.pid, signal.SIGKILL)
    wait_until(lambda: list_pools(tmp_path)[0].life == "dead", "it is seen to be dead")

    stop_pool("mine", tmp_path)

    assert list_pools(tmp_path) == []


def test_the_calls_of_a_pool_that_dies_end_with_that(
    start: Callable[..., PoolRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "fractal-runner").symlink_to(tmp_path)
    record = start("mine")
    gate = Gate(tmp_path / "gate")
    with DaskExecutor(join="mine") as executor:
        submitted = [executor.submit(gate.wait) for _ in range(2)]
        gate.await_arrivals(1)

        os.kill(record.keeper.pid, signal.SIGKILL)

        for future in submitted:
            assert isinstance(future.exception(PATIENCE_S), (ExecutorError, JobExecutionError))
            assert "has gone" in str(future.exception())


def test_there_is_one_of_a_name(start: Callable[..., PoolRecord], tmp_path: Path) -> None:
    record = start("mine")

    with pytest.raises(ExecutorError, match=rf"There is a pool 'mine' \(process {record.keeper.pid}"):
        start_pool("mine", state=tmp_path)


def test_one_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match="has not started"):
        start_pool("mine", {"max_workers": 1, "interface": "nowhere0"}, state=tmp_path)

    assert list_pools(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "terms", "error", "message"),
    [
        ("../mine", {}, ValueError, "'../mine' is not a name for a pool"),
        ("mine", {"workers": "slurm", "host": "a"}, ValueError, "folder is missing"),
        ("mine", {"min_workers": 9, "max_workers": 1}, ValueError, "min_workers=9 exceeds max_workers=1"),
    ],
)
def test_what_cannot_be_started_is_refused(
    tmp_path: Path, name: str, terms: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message.replace(".", r"\.")):
        start_pool(name, terms, state=tmp_path)


def test_an_unknown_name_is_answered_with_the_nearest_one(
    start: Callable[..., PoolRecord], tmp_path: Path
) -> None:
    start("plates")

    with pytest.raises(ExecutorError, match=r"There is no pool 'plate'.*plates"):
        find_pool("plate", tmp_path)
