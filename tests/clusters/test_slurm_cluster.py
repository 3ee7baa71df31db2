"""The Slurm cluster that tests use does what they rely on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.clusters.slurm import MissingPrograms, SlurmCluster, SlurmFailed

_TAKE_TOO_MUCH = "exec tail /dev/zero"
_OUT_OF_MEMORY = {"cgroup": "OUT_OF_MEMORY", "polling": "FAILED"}
_ENDED = ("COMPLETED", "FAILED", "OUT_OF_MEMORY")


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> SlurmCluster:
    slurm_cluster.reset()
    return slurm_cluster


@pytest.fixture
def installed() -> None:
    try:
        SlurmCluster()
    except MissingPrograms as error:
        pytest.skip(str(error))


def test_a_job_runs_and_writes_its_output(slurm: SlurmCluster, tmp_path: Path) -> None:
    output = tmp_path / "output"

    job = slurm.submit("echo on $SLURMD_NODENAME", "-w", "n2", f"--output={output}")

    assert slurm.wait_for(job, "COMPLETED")["ExitCode"] == "0:0"
    assert output.read_text() == "on n2\n"


def test_a_job_may_ask_for_a_gpu(slurm: SlurmCluster) -> None:
    job = slurm.submit("true", "--gres=gpu:1")

    slurm.wait_for(job, "COMPLETED")


def test_the_closed_partition_refuses_jobs(slurm: SlurmCluster) -> None:
    with pytest.raises(SlurmFailed, match="Required partition not available"):
        slurm.submit("true", "--partition=closed")


def test_there_is_accounting_only_where_it_was_asked_for(slurm: SlurmCluster) -> None:
    with pytest.raises(SlurmFailed, match="accounting storage is disabled"):
        slurm.account(1)


def test_too_much_memory_ends_a_job(slurm: SlurmCluster) -> None:
    job = slurm.submit(_TAKE_TOO_MUCH, "--mem=20")

    assert slurm.wait_for(job, *_ENDED)["JobState"] == _OUT_OF_MEMORY[slurm.limits_memory_with]


def test_too_much_memory_is_in_the_accounts(slurm_accounting_cluster: SlurmCluster) -> None:
    cluster = slurm_accounting_cluster
    job = cluster.submit(_TAKE_TOO_MUCH, "--mem=20")

    _wait(lambda: any(row["State"] in _ENDED for row in cluster.account(job)))

    assert cluster.account(job)[0]["State"] == _OUT_OF_MEMORY[cluster.limits_memory_with]


@pytest.mark.usefixtures("installed")
def test_without_control_groups_too_much_memory_kills_a_job() -> None:
    with SlurmCluster(nodes=1, limits_memory_with="polling") as cluster:
        job = cluster.submit(_TAKE_TOO_MUCH, "--mem=20")

        assert cluster.wait_for(job, *_ENDED)["ExitCode"] == "0:9"


def test_a_job_at_its_end_time_is_timed_out(slurm: SlurmCluster) -> None:
    job = slurm.submit("sleep 300")
    slurm.wait_for(job, "RUNNING")

    slurm.set_end_time(job, 1)

    slurm.wait_for(job, "TIMEOUT")


def test_a_crashed_node_takes_its_jobs_with_it(slurm: SlurmCluster) -> None:
    fails = slurm.submit("setsid -f sleep 300; sleep 300", "-w", "n1", "--no-requeue")
    comes_back = slurm.submit("sleep 300", "-w", "n1")
    for job in (fails, comes_back):
        slurm.wait_for(job, "RUNNING")

    slurm.crash_node("n1", noticed=True)

    slurm.wait_for(fails, "NODE_FAIL")
    assert slurm.wait_for(comes_back, "PENDING")["Restarts"] == "1"
    assert slurm.nodes_up() == ["n2", "n3", "n4"]
    slurm.restart_node("n1")
    slurm.wait_for(comes_back, "RUNNING")


def test_a_reset_makes_the_cluster_whole_again(slurm: SlurmCluster) -> None:
    job = slurm.submit("sleep 300", "-w", "n1")
    slurm.wait_for(job, "RUNNING")
    slurm.crash_node("n1")
    slurm.stop_controller()

    slurm.reset()

    assert slurm.nodes_up() == list(slurm.nodes)
    assert not slurm.run("squeue", "-h").stdout


def test_a_preempted_job_runs_again(slurm: SlurmCluster) -> None:
    low = slurm.submit("sleep 300", "--partition=low", "--cpus-per-task=4")
    slurm.wait_for(low, "RUNNING")

    high = slurm.submit("true", "--partition=high")

    slurm.wait_for(high, "COMPLETED")
    assert slurm.wait_for(low, "RUNNING")["Restarts"] == "1"


@pytest.mark.parametrize("crash", [False, True])
def test_a_controller_that_comes_back_knows_its_jobs(slurm: SlurmCluster, crash: bool) -> None:
    job = slurm.submit("sleep 300")
    slurm.wait_for(job, "RUNNING")
    running = time.time()
    if crash:  # what happened just before is lost
        _wait(lambda: (slurm.directory / "state" / "job_state").stat().st_mtime > running)

    slurm.stop_controller(crash=crash)

    with pytest.raises(SlurmFailed, match="Unable to contact slurm controller"):
        slurm.run("squeue")
    slurm.start_controller()
    slurm.wait_for_nodes()
    assert slurm.show(job)["JobState"] == "RUNNING"


def test_commands_wait_for_a_controller_that_is_paused(slurm: SlurmCluster) -> None:
    slurm.pause_controller()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            slurm.run("squeue", timeout=1)
    finally:
        slurm.resume_controller()

    slurm.run("squeue")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("accounting", [False, True])
def test_nothing_is_left_of_a_cluster_that_was_stopped(accounting: bool) -> None:
    with SlurmCluster(accounting=accounting, nodes=2) as cluster:
        job = cluster.submit("setsid -f sleep 300; trap '' TERM; sleep 300")
        cluster.wait_for(job, "RUNNING")
        _wait(lambda: len(_sleeping(cluster)) == 2)
        there = _processes(cluster)

    assert len(there) > 8
    assert not [process for process in there if process.is_running()]
    assert not [path for path in (cluster.directory, *cluster.control_groups) if path.exists()]


@pytest.mark.usefixtures("installed")
def test_nothing_is_left_of_a_cluster_whose_owner_was_killed() -> None:
    program = """
import sys
from tests.clusters.slurm import SlurmCluster
cluster = SlurmCluster(nodes=1)
cluster.start()
cluster.submit("setsid -f sleep 300; sleep 300")
print(cluster.directory, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip())
        assert directory.exists()
        there = psutil.Process(owner.pid).children(recursive=True)

        owner.send_signal(signal.SIGKILL)

    _wait(lambda: not directory.exists())
    _wait(lambda: not [process for process in there if process.is_running()])


@pytest.mark.usefixtures("installed")
def test_a_directory_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    directory = Path(f"/tmp/fr-used-{os.getpid()}")
    directory.mkdir()
    try:
        (directory / "precious").touch()

        with pytest.raises(ValueError, match="is not empty"):
            SlurmCluster(directory).start()

        assert (directory / "precious").exists()
    finally:
        shutil.rmtree(directory)
    with pytest.raises(ValueError, match="short names"):
        SlurmCluster(tmp_path / ("long" * 20)).start()


@pytest.mark.usefixtures("installed")
def test_a_cluster_can_be_had_by_hand(top: Path) -> None:
    directory = Path(f"/tmp/fr-hand-{os.getpid()}")
    command = [sys.executable, "-m", "tests.clusters.slurm", "--directory", str(directory)]

    def by_hand(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=top, capture_output=True, text=True, timeout=60, check=False
        )

    assert by_hand("start").stdout == f"export SLURM_CONF={directory}/slurm.conf\n"
    try:
        assert "running already" in by_hand("start").stderr
        asked = subprocess.run(
            [*command, "shell"],
            cwd=top,
            input="sinfo -h -p other -o %D",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert asked.stdout == "4\n"
    finally:
        stopped = by_hand("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert not directory.exists()
    assert "not running" in by_hand("stop").stderr
    assert "not running" in by_hand("shell").stderr


def _processes(cluster: SlurmCluster) -> list[psutil.Process]:
    return [
        process for daemon in cluster.daemons.values() for process in (daemon.adopter, *daemon.processes())
    ]


def _sleeping(cluster: SlurmCluster) -> list[psutil.Process]:
    return [process for process in _processes(cluster) if process.name() == "sleep"]


def _wait(condition: Callable[[], bool], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
