"""A Dask executor whose workers are the jobs of a cluster: SLURM's and LSF's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import psutil
import pytest

from fractal_runner import Dataset, Image, Task, Workflow, WorkflowTask, process_workflow
from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.adapters.dask import DaskExecutor
from fractal_runner.executors.adapters.daskpool.terms import MARK
from fractal_runner.testing import PATIENCE_S, Gate, is_alive, wait_until

_MEMORY = "200MB"
POLLED = {"memory": _MEMORY, "slurm": {"poll_interval": 1}}


class Site:
    """A cluster, in words that both kinds have."""

    def __init__(self, kind: str, cluster: Any) -> None:
        self.kind = kind
        self.cluster = cluster

    def jobs(self) -> list[str]:
        """The states of the jobs that wait or run."""
        if self.kind == "slurm":
            return str(self.cluster.run("squeue", "-h", "-r", "-o", "%T").stdout).split()
        return [job.state for job in self.cluster.jobs() if job.state in ("PEND", "RUN", "UNKWN", "ZOMBI")]

    def node_of(self, pid: int) -> str:
        """The node whose job this process belongs to, as its scheduler has told the job."""
        environment = psutil.Process(pid).environ()
        return environment["SLURMD_NODENAME"] if self.kind == "slurm" else environment["LSB_HOSTS"].split()[0]

    def crash(self, node: str) -> None:
        """A node fails, with all that runs there, and the cluster notices."""
        if self.kind == "slurm":
            self.cluster.crash_node(node, noticed=True)
        else:
            self.cluster.lose_host(node, given_up_s=0.2)

    def refusing(self) -> dict[str, Any]:
        """Options with which it takes no job."""
        return {"partition": "closed"} if self.kind == "slurm" else {"queue": "closed"}


# One of each kind; both families of LSF differ in what their commands say, which other tests are about.
CLUSTERS = {"slurm": "slurm_cluster", "openlava": "openlava_cluster"}
if "FRACTAL_RUNNER_OWN_POOLS" in os.environ:
    CLUSTERS["ibm"] = "ibm_cluster"


@pytest.fixture(scope="session", autouse=True)
def clusters(request: pytest.FixtureRequest) -> dict[str, Site]:
    """All, from before what looks for things that a module of tests leaves behind: they stay."""
    return {
        name: Site("slurm" if name == "slurm" else "lsf", request.getfixturevalue(fixture))
        for name, fixture in CLUSTERS.items()
    }


@pytest.fixture(params=CLUSTERS)
def site(
    request: pytest.FixtureRequest, clusters: dict[str, Site], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    site = clusters[request.param]
    site.cluster.reset()
    for name, value in site.cluster.env.items():
        monkeypatch.setenv(name, value)
    yield site
    site.cluster.reset()


@pytest.fixture
def make(site: Site, tmp_path: Path) -> Iterator[Callable[..., DaskExecutor]]:
    made: list[DaskExecutor] = []

    def make(max_workers: int, *, options: dict[str, Any] | None = None, **pool: Any) -> DaskExecutor:
        terms = {
            "workers": site.kind,
            "host": "127.0.0.1",
            "memory": _MEMORY,
            site.kind: {"poll_interval": 1, **(options or {})},
            **pool,
        }
        made.append(DaskExecutor(max_workers, folder=tmp_path / "pool", pool=terms))
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


def worker_of(pid: int) -> psutil.Process:
    """Dask's worker that the call in this process belongs to."""
    parent = psutil.Process(pid).parent()
    assert parent is not None
    assert "distributed.cli.dask_worker" in parent.cmdline()
    return parent


def test_workers_come_as_one_array_and_go_and_nothing_is_left_in_the_queue(
    make: Callable[..., DaskExecutor], site: Site, gate: Gate, tmp_path: Path
) -> None:
    executor = make(3, idle_timeout=1)
    submitted = [executor.submit(gate.wait, number) for number in range(6)]
    pids = gate.await_arrivals(3)

    assert len(site.jobs()) == 3
    assert len({psutil.Process(pid).environ()[MARK] for pid in pids}) == 3
    gate.open()
    assert [future.result(PATIENCE_S) for future in submitted] == list(range(6))
    wait_until(lambda: site.jobs() == [], "all workers have gone")

    assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8
    executor.shutdown()
    assert site.jobs() == []
    assert len(list((tmp_path / "pool" / "jobs").glob("*/payload"))) == 2


def test_a_worker_that_is_killed_takes_its_own_call_and_no_other(
    make: Callable[..., DaskExecutor], gate: Gate
) -> None:
    executor = make(2)
    submitted = [executor.submit(gate.wait, number) for number in range(4)]
    pids = gate.await_arrivals(2)

    worker_of(pids[0]).send_signal(signal.SIGKILL)

    futures.wait(submitted, PATIENCE_S, return_when=futures.FIRST_EXCEPTION)
    gate.open()
    futures.wait(submitted, PATIENCE_S)
    (error,) = [error for future in submitted if (error := future.exception()) is not None]
    assert isinstance(error, JobExecutionError)
    assert "was killed by SIGKILL" in str(error)
    assert not is_alive(pids[0])


def test_what_ran_on_a_node_that_fails_runs_again_elsewhere_if_it_may(
    make: Callable[..., DaskExecutor], site: Site, gate: Gate
) -> None:
    executor = make(1)
    future = executor.options(extra={"retries": 1}).submit(gate.wait, "done")
    (pid,) = gate.await_arrivals(1)
    wait_until(future.running, "it is known to run")

    site.crash(site.node_of(pid))

    gate.await_arrivals(2)
    assert not is_alive(pid)
    gate.open()
    assert future.result(PATIENCE_S) == "done"


def test_where_the_cluster_takes_no_jobs_calls_end_with_its_words(
    make: Callable[..., DaskExecutor], site: Site
) -> None:
    executor = make(1, options=site.refusing())

    error = executor.submit(abs, -1).exception(PATIENCE_S)

    assert isinstance(error, JobExecutionError)
    assert error.reason == "REFUSED"
    assert "No worker comes for the call 'abs'" in str(error)
    assert any(word in str(error) for word in ("closed", "Closed", "not available", "State", "unavailable"))


def test_a_job_that_waits_for_its_node_is_taken_back_when_its_call_is_cancelled(
    make: Callable[..., DaskExecutor], site: Site, gate: Gate
) -> None:
    executor = make(5, idle_timeout=1, cpus=4)  # each has a node for itself, and there are four
    submitted = [executor.submit(gate.wait, number) for number in range(5)]
    wait_until(lambda: len(site.jobs()) == 5, "all of them are submitted")
    gate.await_arrivals(1)
    wait_until(lambda: {"PENDING", "PEND"} & set(site.jobs()), "one of them has to wait")

    for future in submitted:
        future.cancel()

    wait_until(lambda: not {"PENDING", "PEND"} & set(site.jobs()), "the one that waits is taken back")
    gate.open()
    futures.wait(submitted, PATIENCE_S)


@pytest.mark.parametrize("site", ["slurm"], indirect=True)
async def test_a_run_gives_it_a_folder_by_its_name(site: Site, tmp_path: Path) -> None:
    task = Task(name="T", command_parallel="true")
    run = process_workflow(
        workflow=Workflow(name="w", task_list=[WorkflowTask(task=task)]),
        dataset=Dataset(name="d", zarr_dir="/d", images=[Image(zarr_url="/d/1")]),
        workflow_dir_local=tmp_path / "run",
        executor=("dask", {"pool": {"workers": "slurm", "host": "127.0.0.1", "max_workers": 1, **POLLED}}),
    )

    await run

    assert list((tmp_path / "run" / "jobs" / "dask").iterdir())
    assert site.jobs() == []
