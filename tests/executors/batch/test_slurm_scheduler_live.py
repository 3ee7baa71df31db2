"""Slurm itself does what the scheduler expects of it, with accounting and without."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.executors.batch.scheduler import (
    ArrayRequest,
    JobState,
    JobStatus,
    SchedulerError,
    SubmissionRefusedError,
)
from fractal_runner.executors.batch.slurm_scheduler import SlurmScheduler
from fractal_runner.testing import wait_until
from tests.clusters.slurm import SlurmCluster
from tests.clusters.slurm.fixtures import slurm_accounting_cluster, slurm_cluster  # noqa: F401

QUEUED, RUNNING, LOST, ENDED = JobState.QUEUED, JobState.RUNNING, JobState.LOST, JobState.ENDED

# In the place of a job's own module, on the nodes: it writes down where it is, and waits to be let go.
JOB = """\
import sys, types

job = types.ModuleType("fractal_runner.executors.batch.job")

def run_job(directory, number, place):
    import json, os, pathlib, time
    directory = pathlib.Path(directory)
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    place = {"id": place.id, "restart": restart, "node": place.node}
    (directory / f"place-{number}.new").write_text(json.dumps(place))
    (directory / f"place-{number}.new").rename(directory / f"place-{number}")
    while not (directory / "go").exists():
        time.sleep(0.02)

job.run_job = run_job
sys.modules[job.__name__] = job
"""
# In the place of Python, on the nodes: it writes down which signals it gets.
WORKER = """\
#!/usr/bin/env python3
import signal, time
told = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, frame: (print("signal", number, flush=True), told.append(number)))
print("ready", flush=True)
while 15 not in told:
    time.sleep(0.05)
"""


@pytest.fixture(scope="session", autouse=True)
def clusters(
    slurm_cluster: SlurmCluster,  # noqa: F811
    slurm_accounting_cluster: SlurmCluster,  # noqa: F811
) -> Mapping[str, SlurmCluster]:
    """Both, from before what looks for things that a module of tests leaves behind: they stay."""
    return {"no accounting": slurm_cluster, "accounting": slurm_accounting_cluster}


@pytest.fixture(params=["no accounting", "accounting"])
def cluster(
    request: pytest.FixtureRequest, clusters: Mapping[str, SlurmCluster], monkeypatch: pytest.MonkeyPatch
) -> Iterator[SlurmCluster]:
    cluster = clusters[request.param]
    cluster.reset()
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.reset()


@pytest.fixture
def make_request(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., ArrayRequest]:
    def make(count: int = 1, **options: Any) -> ArrayRequest:
        directory = options.pop("directory", tmp_path)
        values = {"memory": 20 * 2**20, "seen_as": str(directory), **options}
        return ArrayRequest(name=tmp_path.name, directory=directory, count=count, cpus=1, **values)

    return make


@pytest.fixture
def scheduler(tmp_path: Path) -> SlurmScheduler:
    (tmp_path / "sitecustomize.py").write_text(JOB)
    return SlurmScheduler(env={"PYTHONPATH": str(tmp_path)})


def wait_for(
    scheduler: SlurmScheduler, ids: Sequence[str], *states: JobState, seconds: float = 60
) -> list[JobStatus]:
    """Until all these jobs are in one of these states: what is said of them then."""
    found: list[JobStatus] = []

    def there() -> bool:
        said = scheduler.states(ids)
        found[:] = [said[job] for job in ids]
        return all(status.state in states for status in found)

    try:
        wait_until(there, f"{ids} are {states}", seconds=seconds)
    except AssertionError:
        pytest.fail(f"{ids} are not {states} but {found}")
    return found


def places(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("place-?"))]


def worker_in(directory: Path) -> str:
    path = directory / "worker"
    path.write_text(WORKER)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("count", [1, 3])
def test_an_array_is_followed_from_its_submission_to_its_end(
    count: int,
    cluster: SlurmCluster,
    scheduler: SlurmScheduler,
    make_request: Callable[..., ArrayRequest],
    tmp_path: Path,
) -> None:
    request = make_request(count, time=600)
    ids = scheduler.submit(request)
    assert len(ids) == count
    assert scheduler.find(request) == [ids]
    running = wait_for(scheduler, ids, RUNNING)
    wait_until(lambda: len(places(tmp_path)) == count, "the jobs run")
    nodes = [status.node for status in running]
    assert places(tmp_path) == [
        {"id": job, "restart": 0, "node": node} for job, node in zip(ids, nodes, strict=True)
    ]
    (tmp_path / "go").touch()
    ended = wait_for(scheduler, ids, ENDED)
    assert {(status.reason, status.returncode) for status in ended} == {("COMPLETED", 0)}
    assert [status.node for status in ended] == nodes
    assert scheduler.find(request) == [ids]
    assert all((tmp_path / f"job-{number}.log").exists() for number in range(count))


def test_each_end_has_its_reason(
    cluster: SlurmCluster, make_request: Callable[..., ArrayRequest], tmp_path: Path
) -> None:
    hog = "python3 -c 'import time; x = bytearray(200 << 20); time.sleep(30)'"
    cases = f"case $SLURM_ARRAY_TASK_ID in 0) exit 3;; 1) kill -9 $$;; 2) {hog}; exit;; *) sleep 100;; esac"
    scheduler = SlurmScheduler(setup=[cases], requeue=False)
    ids = scheduler.submit(make_request(5, time=600))
    wait_for(scheduler, ids[3:], RUNNING)
    scheduler.cancel([ids[3]])
    cluster.run("scontrol", "update", f"JobId={ids[4]}", "EndTime=now+3")
    ended = wait_for(scheduler, ids, ENDED)
    assert [status.reason for status in ended[:2]] == ["FAILED", "FAILED"]
    assert [status.returncode for status in ended[:2]] == [3, -9]
    if cluster.limits_memory_with == "cgroup":
        assert ended[2].reason == "OUT_OF_MEMORY"
    assert [status.reason for status in ended[3:]] == ["CANCELLED", "TIMEOUT"]
    assert all(status.node for status in ended)


def test_sacct_says_who_has_cancelled_a_job(
    clusters: Mapping[str, SlurmCluster],
    make_request: Callable[..., ArrayRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_CONF", clusters["accounting"].env["SLURM_CONF"])
    scheduler = SlurmScheduler(setup=["sleep 100"])
    ids = scheduler.submit(make_request())
    wait_for(scheduler, ids, RUNNING)
    scheduler.cancel(ids)
    wait_for(scheduler, ids, ENDED)
    wait_until(lambda: "CANCELLED by " in scheduler.states(ids)[ids[0]].detail, "sacct has heard of it")


def test_jobs_are_cancelled_whether_they_wait_or_run(
    cluster: SlurmCluster, scheduler: SlurmScheduler, make_request: Callable[..., ArrayRequest]
) -> None:
    ids = scheduler.submit(make_request(6, extra=scheduler.check({"nodelist": "n1"})))
    wait_for(scheduler, ids[:4], RUNNING)
    assert wait_for(scheduler, ids[4:], QUEUED)[0].can_start
    scheduler.cancel(ids[:2])
    # One that had not started is forgotten at once, if it is not the last one of its array.
    scheduler.cancel([ids[5]])
    assert {status.state for status in wait_for(scheduler, [ids[5]], ENDED, LOST)} <= {ENDED, LOST}
    scheduler.cancel(ids)
    ended = wait_for(scheduler, ids[:5], ENDED)
    assert {status.reason for status in ended} == {"CANCELLED"}
    scheduler.cancel(ids)
    scheduler.cancel(["99999_0", "99999_1"])


def test_an_array_that_is_cancelled_before_it_starts_has_ended(
    cluster: SlurmCluster, scheduler: SlurmScheduler, make_request: Callable[..., ArrayRequest]
) -> None:
    ids = scheduler.submit(make_request(3, extra=scheduler.check({"extra_lines": ["--hold"]})))
    [status, *_] = wait_for(scheduler, ids, QUEUED)
    assert (status.reason, status.can_start) == ("JobHeldUser", False)
    scheduler.cancel(ids)
    assert {status.reason for status in wait_for(scheduler, ids, ENDED)} == {"CANCELLED"}


def test_a_job_that_nothing_can_run_does_not_start(
    cluster: SlurmCluster, scheduler: SlurmScheduler, make_request: Callable[..., ArrayRequest]
) -> None:
    ids = scheduler.submit(make_request(extra=scheduler.check({"nodes": 50})))
    wait_until(lambda: not scheduler.states(ids)[ids[0]].can_start, "Slurm has seen that")
    assert scheduler.states(ids)[ids[0]].reason in ("PartitionConfig", "PartitionNodeLimit")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queue": "nosuch"}, "Invalid partition name specified"),
        ({"queue": "closed"}, "Required partition not available"),
        ({"memory": 2**45}, "Requested node configuration is not available"),
        ({"extra": {"constraint": "nosuch"}}, "Invalid feature specification"),
        ({"extra": {"extra_lines": ("#SBATCH --nosuch=1",)}}, "unrecognized option"),
        ({"extra": {"extra_lines": ("#SBATCH --begin=never",)}}, "never"),
        ({"gpus": 99}, "Requested node configuration is not available"),
        ({"count": 5000}, "Invalid job array specification"),
    ],
)
def test_slurm_refuses_what_there_is_not(
    options: dict[str, Any],
    words: str,
    cluster: SlurmCluster,
    scheduler: SlurmScheduler,
    make_request: Callable[..., ArrayRequest],
) -> None:
    request = make_request(**options)
    with pytest.raises(SubmissionRefusedError, match=words):
        scheduler.submit(request)
    assert scheduler.find(request) == []


def test_an_array_may_be_as_large_as_it_is_said_to_be(
    cluster: SlurmCluster, scheduler: SlurmScheduler, make_request: Callable[..., ArrayRequest]
) -> None:
    held = scheduler.check({"extra_lines": ["--hold"]})
    ids = scheduler.submit(make_request(scheduler.max_array, extra=held))
    assert len(wait_for(scheduler, ids, QUEUED)) == 1001
    scheduler.cancel(ids)


@pytest.mark.parametrize("cluster", ["no accounting"], indirect=True)  # which has no part in it
@pytest.mark.parametrize("teardown", [[], ["echo torn down"]], ids=["plain", "with teardown"])
def test_a_job_is_told_that_its_time_is_nearly_up_and_that_it_is_cancelled(
    teardown: list[str], cluster: SlurmCluster, make_request: Callable[..., ArrayRequest], tmp_path: Path
) -> None:
    scheduler = SlurmScheduler(python=worker_in(tmp_path), teardown=teardown)
    log = tmp_path / "job-0.log"
    [job] = scheduler.submit(make_request(time=3600))
    wait_until(lambda: log.exists() and "ready" in log.read_text(), "the worker is there", seconds=60)
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+80")  # it wants to know 90 s before
    wait_until(lambda: "signal 12" in log.read_text(), "the worker is told", seconds=60)
    assert scheduler.states([job])[job].state is RUNNING
    scheduler.cancel([job])
    wait_until(lambda: "signal 15" in log.read_text(), "the worker is told", seconds=60)
    [status] = wait_for(scheduler, [job], ENDED)
    assert status.reason == "CANCELLED"
    assert ("torn down" in log.read_text()) == bool(teardown)


def test_a_requeued_job_runs_again_under_its_id(
    cluster: SlurmCluster,
    scheduler: SlurmScheduler,
    make_request: Callable[..., ArrayRequest],
    tmp_path: Path,
) -> None:
    ids = scheduler.submit(make_request(2))
    wait_until(lambda: len(places(tmp_path)) == 2, "the jobs run", seconds=60)
    cluster.run("scontrol", "requeue", ids[1])
    for _ in range(5):
        assert scheduler.states(ids)[ids[1]].state in (QUEUED, RUNNING)
    wait_until(lambda: places(tmp_path)[1]["restart"] == 1, "it runs again", seconds=60)
    (tmp_path / "go").touch()
    ended = wait_for(scheduler, ids, ENDED)
    assert {(status.reason, status.returncode) for status in ended} == {("COMPLETED", 0)}
    assert places(tmp_path)[1]["id"] == ids[1]


@pytest.mark.parametrize("cluster", ["no accounting"], indirect=True)  # which has no part in it
def test_a_job_whose_node_is_lost_is_never_said_to_have_ended(
    cluster: SlurmCluster,
    scheduler: SlurmScheduler,
    make_request: Callable[..., ArrayRequest],
    tmp_path: Path,
) -> None:
    ids = scheduler.submit(make_request(extra=scheduler.check({"nodelist": "n2"})))
    wait_until(lambda: len(places(tmp_path)) == 1, "the job runs", seconds=60)
    cluster.crash_node("n2")
    wait_for(scheduler, ids, QUEUED)
    cluster.restart_node("n2")
    wait_until(lambda: places(tmp_path)[0]["restart"] == 1, "it runs again", seconds=60)


@pytest.mark.parametrize("cluster", ["no accounting"], indirect=True)  # which has no part in it
def test_a_controller_that_hangs_is_no_answer(
    cluster: SlurmCluster, make_request: Callable[..., ArrayRequest], tmp_path: Path
) -> None:
    scheduler = SlurmScheduler(setup=["sleep 100"], command_timeout=2)
    ids = scheduler.submit(make_request())
    cluster.pause_controller()
    try:
        with pytest.raises(SchedulerError, match="squeue did not answer within 2 s"):
            scheduler.states(ids)
        with pytest.raises(SchedulerError, match="scancel did not answer"):
            scheduler.cancel(ids)
        with pytest.raises(SchedulerError, match="sbatch did not answer") as caught:
            scheduler.submit(make_request())
        assert not isinstance(caught.value, SubmissionRefusedError)
    finally:
        cluster.resume_controller()
    # What was submitted meanwhile may be there now, under the same name.
    found = SlurmScheduler().find(make_request())
    assert ids in found


@pytest.mark.parametrize("cluster", ["no accounting"], indirect=True)  # which has no part in it
def test_names_are_quoted_all_the_way(
    cluster: SlurmCluster,
    scheduler: SlurmScheduler,
    make_request: Callable[..., ArrayRequest],
    tmp_path: Path,
) -> None:
    directory = tmp_path / "we ird'50% \"$(x)é"
    directory.mkdir()
    (directory / "go").touch()
    ids = scheduler.submit(make_request(2, directory=directory))
    assert {status.returncode for status in wait_for(scheduler, ids, ENDED)} == {0}
    assert {path.name for path in directory.glob("job-*")} == {"job-0.log", "job-1.log"}


@pytest.mark.parametrize("cluster", ["no accounting"], indirect=True)  # which has no part in it
def test_commands_go_through_ssh(
    cluster: SlurmCluster, make_request: Callable[..., ArrayRequest], tmp_path: Path
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')  # as ssh does it: joined, and taken apart again
    ssh.chmod(0o755)
    (tmp_path / "sitecustomize.py").write_text(JOB)
    (tmp_path / "go").touch()
    scheduler = SlurmScheduler(command_prefix=[str(ssh), "login1"], env={"PYTHONPATH": str(tmp_path)})
    request = make_request(2)
    ids = scheduler.submit(request)
    assert scheduler.find(request) == [ids]
    assert {status.reason for status in wait_for(scheduler, ids, ENDED)} == {"COMPLETED"}
    scheduler.cancel(ids[:1])
    assert scheduler.max_array == 1001
