"""Who is given calls by `benchmarks.engines`: our executors, and Dask's and Ray's own interfaces.

Each is a context, entered where nothing is measured yet, which gives a function that does calls: it takes
what is called and an argument for each call, and returns their results in order.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Function = Callable[[int], Any]
DoCalls = Callable[[Function, Sequence[int]], list[Any]]

SLOTS = 2
STORE_BYTES = 100_000_000  # of Ray's object store, on both sides: nothing that is measured needs it


def by_futures(executor: Executor) -> DoCalls:
    """Calls of anything that has the standard library's interface."""

    def do(function: Function, numbers: Sequence[int]) -> list[Any]:
        return [future.result() for future in [executor.submit(function, number) for number in numbers]]

    return do


@contextmanager
def threads() -> Iterator[DoCalls]:
    from fractal_runner.executors.local.executors import ThreadExecutor

    with ThreadExecutor(SLOTS) as executor:
        yield by_futures(executor)


@contextmanager
def processes() -> Iterator[DoCalls]:
    from fractal_runner.executors.local.executors import ProcessExecutor

    with ProcessExecutor(SLOTS) as executor:
        yield by_futures(executor)


@contextmanager
def our_dask() -> Iterator[DoCalls]:
    """A pool of its own, of as many workers on this machine."""
    from fractal_runner.executors.adapters.dask import DaskExecutor

    with DaskExecutor(SLOTS) as executor:
        yield by_futures(executor)


@contextmanager
def _dask_client() -> Iterator[Any]:
    """Dask's own: as many worker processes of one thread each."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=SLOTS,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",  # it cannot do without, and another one may have its port
            silence_logs=logging.CRITICAL,  # its workers complain of being closed
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def dask_get_executor() -> Iterator[DoCalls]:
    # Not `pure`: Dask would take equal calls for one, and would look at the arguments to find that out.
    with _dask_client() as client, client.get_executor(pure=False) as executor:
        yield by_futures(executor)


@contextmanager
def dask_submit() -> Iterator[DoCalls]:
    with _dask_client() as client:

        def do(function: Function, numbers: Sequence[int]) -> list[Any]:
            results: list[Any] = client.gather(
                [client.submit(function, number, pure=False) for number in numbers]
            )
            return results

        yield do


@contextmanager
def our_ray() -> Iterator[DoCalls]:
    """An instance of its own, of as many CPUs."""
    from fractal_runner.executors.adapters.ray import RayExecutor

    with RayExecutor(SLOTS, object_store_memory=f"{STORE_BYTES}B") as executor:
        yield by_futures(executor)


@contextmanager
def ray_remote() -> Iterator[DoCalls]:
    # As ours does: nothing is reported, and nothing is left in /tmp/ray or in the home directory.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this process and what it starts
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    folder = tempfile.mkdtemp(prefix="fr-bench-", dir="/tmp")  # its sockets' paths have to be short
    ray.init(
        num_cpus=SLOTS,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=folder,
    )
    try:
        tasks: dict[Function, Any] = {}  # one for each function, as it is sent to the workers once

        def do(function: Function, numbers: Sequence[int]) -> list[Any]:
            task = tasks.get(function) or tasks.setdefault(function, ray.remote(function))
            results: list[Any] = ray.get([task.remote(number) for number in numbers])
            return results

        yield do
    finally:
        ray.shutdown(wait_for_processes=True)
        shutil.rmtree(folder, ignore_errors=True)


THREAD, PROCESS = "ThreadExecutor", "ProcessExecutor"
OUR_DASK, GET_EXECUTOR, SUBMIT = "DaskExecutor", "Dask's get_executor", "Dask's submit and gather"
OUR_RAY, REMOTE = "RayExecutor", "Ray's remote and get"

CONTENDERS: dict[str, Callable[[], AbstractContextManager[DoCalls]]] = {
    THREAD: threads,
    PROCESS: processes,
    OUR_DASK: our_dask,
    GET_EXECUTOR: dask_get_executor,
    SUBMIT: dask_submit,
    OUR_RAY: our_ray,
    REMOTE: ray_remote,
}
