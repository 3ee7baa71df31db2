"""What a Dask executor with workers of its own does beyond the contract: who dies, who goes on, who hears."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import psutil
import pytest

from fractal_runner import CallInfo, current_call
from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.adapters.dask import DaskExecutor
from fractal_runner.executors.adapters.daskpool.tls import TlsFiles
from fractal_runner.testing import PATIENCE_S, Gate, is_alive, wait_until
from tests.executors.adapters.knowing import assert_calls_know_what_they_are


@pytest.fixture
def make() -> Iterator[Callable[..., DaskExecutor]]:
    made: list[DaskExecutor] = []

    def make(max_workers: int = 2, **options: Any) -> DaskExecutor:
        made.append(DaskExecutor(max_workers, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.stop()
        executor.shutdown()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def dask_workers() -> list[psutil.Process]:
    """Dask's workers, of all executors of this process."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "distributed.cli.dask_worker" in child.cmdline()
    ]


def worker_of(pid: int) -> psutil.Process:
    """Dask's worker that the call in this process belongs to."""
    (found,) = [worker for worker in dask_workers() if pid in {one.pid for one in worker.children()}]
    return found


# The death of a worker


def test_a_worker_that_is_killed_takes_its_own_call_and_no_other(
    make: Callable[..., DaskExecutor], gate: Gate
) -> None:
    executor = make(2)
    submitted = [executor.submit(gate.wait, number) for number in range(6)]
    pids = gate.await_arrivals(2)

    worker_of(pids[0]).kill()

    failed = futures.wait(submitted, PATIENCE_S, return_when=futures.FIRST_EXCEPTION).done
    gate.open()
    futures.wait(submitted, PATIENCE_S)
    (error,) = [error for future in submitted if (error := future.exception()) is not None]
    assert len(failed) == 1
    assert isinstance(error, JobExecutionError)
    assert "was killed by SIGKILL" in str(error)
    assert "while it ran '_waiting.<locals>.wait'" in str(error)
    assert (error.returncode, error.reason) == (-9, "SIGKILL")
    assert not is_alive(pids[0])


def test_what_a_killed_worker_leaves_behind_is_ended_before_its_call_ends(
    make: Callable[..., DaskExecutor], gate: Gate, tmp_path: Path
) -> None:
    executor = make(1)
    wait = gate.wait

    def start_and_wait() -> None:
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        (tmp_path / "child").write_text(str(child.pid))
        wait()

    future = executor.submit(start_and_wait)
    (pid,) = gate.await_arrivals(1)
    left = [pid, int((tmp_path / "child").read_text())]

    worker_of(pid).kill()

    assert isinstance(future.exception(PATIENCE_S), JobExecutionError)
    assert not any(map(is_alive, left))


def test_a_call_that_had_not_started_on_a_lost_worker_goes_to_another(
    make: Callable[..., DaskExecutor], tmp_path: Path
) -> None:
    executor = make(1)
    executor.submit(abs, -1).result(PATIENCE_S)
    (worker,) = dask_workers()
    worker.suspend()  # so that it takes nothing more, and does not say so

    future = executor.submit((tmp_path / "ran").touch)
    time.sleep(0.3)  # until it has been sent there, which nothing tells
    assert not future.running()
    worker.kill()

    assert future.result(PATIENCE_S) is None
    assert (tmp_path / "ran").exists()


def test_a_call_that_had_started_runs_again_elsewhere_if_its_retries_allow(
    make: Callable[..., DaskExecutor], gate: Gate
) -> None:
    executor = make(1)
    future = executor.options(extra={"retries": 1}).submit(gate.wait, "done")
    (pid,) = gate.await_arrivals(1)

    worker_of(pid).kill()
    _, again = gate.await_arrivals(2) if gate.arrived()[0] == pid else reversed(gate.await_arrivals(2))
    gate.open()

    assert future.result(PATIENCE_S) == "done"
    assert again != pid


def test_a_call_whose_process_dies_is_tried_as_often_as_it_may_and_kills_no_worker(
    make: Callable[..., DaskExecutor], tmp_path: Path
) -> None:
    executor = make(2, retries=2)
    executor.submit(abs, -1).result(PATIENCE_S)
    before = {worker.pid for worker in dask_workers()}
    tries = tmp_path / "tries"

    def die() -> None:
        with tries.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    error = executor.submit(die).exception(PATIENCE_S)

    assert isinstance(error, JobExecutionError)
    assert tries.read_text() == "xxx"
    assert before <= {worker.pid for worker in dask_workers()}
    assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8


def test_without_retries_what_dies_runs_once(make: Callable[..., DaskExecutor], tmp_path: Path) -> None:
    tries = tmp_path / "tries"

    def die() -> None:
        with tries.open("a") as file:
            file.write("x")
        os._exit(1)

    assert isinstance(make(1).submit(die).exception(PATIENCE_S), JobExecutionError)
    assert tries.read_text() == "x"


def test_what_raises_is_not_tried_again(make: Callable[..., DaskExecutor], tmp_path: Path) -> None:
    tries = tmp_path / "tries"

    def fail() -> None:
        with tries.open("a") as file:
            file.write("x")
        raise ValueError("no")

    assert isinstance(make(1, retries=5).submit(fail).exception(PATIENCE_S), ValueError)
    assert tries.read_text() == "x"


def test_a_worker_that_does_not_end_its_call_is_ended_itself(
    make: Callable[..., DaskExecutor], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fractal_runner.executors.adapters.daskpool.crew._STOP_S", 0.5)
    executor = make(1)
    future = executor.submit(gate.wait)
    (pid,) = gate.await_arrivals(1)
    wait_until(future.running, "it is known to run")
    worker_of(pid).suspend()

    executor.stop(future)

    error = future.exception(PATIENCE_S)
    assert isinstance(error, JobExecutionError)
    assert error.reason == "CANCELLED"
    assert not is_alive(pid)
    assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8


# What calls know of themselves


def test_calls_know_what_they_are(make: Callable[..., DaskExecutor]) -> None:
    assert_calls_know_what_they_are(make(1))


def test_a_call_that_runs_again_knows_which_start_of_it_that_is(
    make: Callable[..., DaskExecutor], tmp_path: Path
) -> None:
    executor = make(1, retries=2)
    tries = tmp_path / "tries"

    def die_twice() -> CallInfo:
        with tries.open("a") as file:
            file.write(str(current_call().attempt))
        if len(tries.read_text()) < 3:
            os._exit(1)
        return current_call()

    assert executor.options(key="run/7").submit(die_twice).result(PATIENCE_S).attempt == 3
    assert tries.read_text() == "123"
    assert executor.submit(current_call).result(PATIENCE_S).attempt == 1


# How many workers there are


def test_workers_come_with_the_work_and_go_without(make: Callable[..., DaskExecutor], gate: Gate) -> None:
    executor = make(3, pool={"min_workers": 1, "idle_timeout": 0.5})
    submitted = [executor.submit(gate.wait) for _ in range(3)]
    gate.await_arrivals(3)
    assert len(dask_workers()) == 3

    gate.open()
    futures.wait(submitted, PATIENCE_S)

    wait_until(lambda: len(dask_workers()) == 1, "the least number of workers is left")
    assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8


def test_nothing_is_started_before_there_is_work(make: Callable[..., DaskExecutor]) -> None:
    make(2, pool={"min_workers": 1})

    assert dask_workers() == []


def test_workers_that_do_not_come_fail_the_calls_with_what_they_said(
    make: Callable[..., DaskExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION", "no time")
    executor = make(1, pool={"launch_interval": 0.1})

    error = executor.submit(abs, -1).exception(PATIENCE_S)

    assert isinstance(error, JobExecutionError)
    assert "No worker comes for the call 'abs'" in str(error)
    assert "Invalid time unit" in str(error)


# What workers have


def test_a_call_that_no_worker_can_hold_is_refused_with_the_numbers(
    make: Callable[..., DaskExecutor],
) -> None:
    executor = make(1, pool={"cpus": 2, "memory": "4GB", "gpus": 0}, name="pool")

    for options, message in (
        ({"cpus": 3}, "cpus=3 exceeds the 2 of a worker"),
        ({"memory": "5GB"}, "memory=5 GB exceeds the 4 GB of a worker"),
        ({"gpus": 1}, "gpus=1 exceeds the 0 of a worker"),
    ):
        with pytest.raises(ValueError, match=message):
            executor.options(**options)
    view, reduced = executor.fitting(cpus=3, memory="1GB", extra={"constraint": "fast"})
    assert view._options.cpus == 2
    assert reduced == [
        "constraint means nothing to Dask",
        "cpus=3 exceeds the 2 of a worker of pool",
    ]


def test_what_workers_do_not_declare_is_not_measured(make: Callable[..., DaskExecutor]) -> None:
    view = make(1).options(cpus=3, memory="1TB", gpus=2)

    assert view.submit(os.environ.get, "OMP_NUM_THREADS").result(PATIENCE_S) in {
        "3",
        os.environ.get("OMP_NUM_THREADS"),
    }


# Who may connect


def test_the_key_of_a_pool_is_its_owners_and_gone_with_it(tmp_path: Path) -> None:
    with DaskExecutor(1, folder=tmp_path / "pool") as executor:
        executor.submit(abs, -1).result(PATIENCE_S)
        (folder,) = (tmp_path / "pool").iterdir()
        tls = TlsFiles.below(folder)
        modes = [Path(path).stat().st_mode & 0o777 for path in (tls.cert, tls.key, folder)]

    assert modes == [0o600, 0o600, 0o700]
    assert list((tmp_path / "pool").iterdir()) == []


def test_who_has_another_key_is_not_let_in(tmp_path: Path) -> None:
    with DaskExecutor(1, folder=tmp_path / "pool") as executor:
        executor.submit(abs, -1).result(PATIENCE_S)
        address = executor._engine._pool.address  # type: ignore[attr-defined]
        (tmp_path / "other").mkdir()
        other = TlsFiles.below(tmp_path / "other")
        other.make()
        program = textwrap.dedent(f"""
            from distributed import Client
            from fractal_runner.executors.adapters.daskpool.tls import TlsFiles
            tls = TlsFiles({other.cert!r}, {other.key!r})
            Client({address!r}, security=tls.security(), timeout=3)
        """)
        refused = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )

    assert address.startswith("tls://127.0.0.1:")
    assert refused.returncode == 1
    assert "Timed out" in refused.stderr or "CERTIFICATE" in refused.stderr


# What is wrong is said at once


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pool": {"worker": "local"}}, TypeError, "no option 'worker': did you mean 'workers'?"),
        ({"pool": {"workers": "slrum"}}, ValueError, "workers: 'slrum' is not one of local, slurm, lsf"),
        ({"pool": {"min_workers": 3}}, ValueError, "min_workers=3 exceeds max_workers=2"),
        ({"pool": {"idle_timeout": "soon"}}, ValueError, "idle_timeout: 'soon' is not a time"),
        ({"pool": {"max_workers": 0}}, ValueError, "max_workers: 0 is not a whole number"),
        ({"pool": {"host": "a", "interface": "b"}}, ValueError, "both say where to listen"),
        ({"pool": {"slurm": {}}}, ValueError, "slurm has options, and nothing says that workers is 'slurm'"),
        ({"pool": {"workers": "slurm"}}, ValueError, "have to reach this host: name its address"),
        ({"pool": {"workers": "lsf", "host": "a"}}, ValueError, "folder is missing"),
        ({"address": "a", "join": "x"}, ValueError, "join and address each say whose workers to use"),
        ({"retries": -1}, ValueError, "retries: -1 is not a whole number"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        DaskExecutor(2, **options)

    assert message in str(caught.value)


def test_an_option_of_a_cluster_that_is_the_pools_to_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cpus_per_task is not to be said of a pool's jobs"):
        DaskExecutor(
            2, folder=tmp_path, pool={"workers": "slurm", "host": "a", "slurm": {"cpus_per_task": 2}}
        )
