"""However a call on a SLURM cluster ends, its future does, and says what has happened.

What takes long (SLURM looks at time limits twice in a minute, and misses a node after some 18 s) happens at
the same time, to jobs of one `Story` per cluster. All else happens alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

from fractal_runner import SlurmExecutor
from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.calls import TaskInfo
from fractal_runner.testing import Gate, is_alive, wait_until
from tests.clusters.slurm import SlurmCluster

PATIENCE_S = 90.0  # nothing takes that long but what SLURM itself takes its time for
OUTAGE_S = 20.0  # longer than a job may be unknown to SLURM before it is given up
NOBODY = 65534
NAMES = ("first", "second", "third")


@pytest.fixture(scope="session", autouse=True)
def clusters(
    slurm_cluster: SlurmCluster, slurm_accounting_cluster: SlurmCluster
) -> Mapping[str, SlurmCluster]:
    """Both, from before what looks for things that a module of tests leaves behind: they stay."""
    return {"no accounting": slurm_cluster, "accounting": slurm_accounting_cluster}


@pytest.fixture
def cluster(clusters: Mapping[str, SlurmCluster], monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    cluster = clusters["no accounting"]
    cluster.reset()
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.reset()


@pytest.fixture
def make(cluster: SlurmCluster, tmp_path: Path) -> Iterator[Callable[..., SlurmExecutor]]:
    """Makes executors, each with a folder of its own, whose jobs do one call after the other."""
    made: list[SlurmExecutor] = []

    def make(folder: Path | None = None, **options: Any) -> SlurmExecutor:
        made.append(executor_in(folder or tmp_path / f"jobs{len(made)}", **options))
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


def executor_in(folder: Path, **options: Any) -> SlurmExecutor:
    given = {"mem": 200, "calls_per_job": 3, "parallel_calls_per_job": 1, "poll_interval": 2.0}
    return SlurmExecutor(folder, **given | options)


def noting(path: Path) -> Callable[..., Any]:
    """A function for calls that says in a file that it runs, and returns what it was given."""
    noted = str(path)

    def run(value: Any, then: Callable[[Any], Any] | None = None) -> Any:
        with Path(noted).open("a") as file:
            file.write(f"{value}\n")
        return value if then is None else then(value)

    return run


def submit_three(
    executor: SlurmExecutor, runs: Path, second: Callable[[Any], Any], **options: Any
) -> list[Future[Any]]:
    """Three calls for one job: one that ends, one that does `second`, one that comes after it."""
    run = noting(runs)
    return [
        executor.options(name=name, **options).submit(run, name, second if name == "second" else None)
        for name in NAMES
    ]


def task(executor: SlurmExecutor, name: str = "second") -> TaskInfo:
    """A call that is known to run."""
    found: list[TaskInfo] = []

    def runs() -> bool:
        found[:] = [task for task in executor.tasks() if (task.name, task.state) == (name, "running")]
        return bool(found)

    wait_until(runs, f"{name} runs", seconds=PATIENCE_S)
    return found[0]


def error_of(future: Future[Any]) -> JobExecutionError:
    error = future.exception(PATIENCE_S)
    assert isinstance(error, JobExecutionError), f"{error!r}"
    return error


def results(*submitted: Future[Any]) -> list[Any]:
    return [future.result(PATIENCE_S) for future in submitted]


def jobs(cluster: SlurmCluster) -> list[str]:
    return cluster.run("squeue", "-h", "-o", "%F").stdout.split()


def hog(_: Any) -> list[bytes]:
    """Three times the memory that its job has; not more, as SLURM may take a second to look."""
    held = [b"x" * 10_000_000 for _ in range(60)]
    time.sleep(1000)
    return held


def program_of(pid: int) -> psutil.Process:
    """The worker program of the job that a call's process belongs to."""
    return next(each for each in psutil.Process(pid).parents() if "submitit.core._submit" in each.cmdline())


def records_of(folder: Path) -> Path:
    [path] = folder.glob("fr-*/records-0.0")
    return path


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return path


# What SLURM ends


class Story:
    """What befalls jobs of one cluster at the same time, each of them another thing.

    Where a call is waited for that will be ended, its gate is never opened.

    Attributes:
        submitted: the futures of each job's calls, by what befalls it.
        runs: what has run of those, as often as it ran.
        others: futures of calls that have to do with it.
    """

    def __init__(self, cluster: SlurmCluster, folder: Path, *, noticed: bool) -> None:
        self._cluster = cluster
        self._folder = folder
        self._noticed = noticed
        self._executors: dict[str, SlurmExecutor] = {}
        self._gate, self._closed = Gate(folder / "gate"), Gate(folder / "closed")
        self._broken = folder / "squeue is broken"
        self.submitted: dict[str, list[Future[Any]]] = {}
        self.others: dict[str, Future[Any]] = {}

    def happen(self) -> None:
        self._begin()
        self._befall()
        everything = [*self.others.values(), *(each for three in self.submitted.values() for each in three)]
        futures.wait(everything, PATIENCE_S)
        for executor in self._executors.values():
            executor.shutdown()
        self._cluster.wait_until_idle()  # nothing of all these jobs is left

    def end(self) -> None:
        self._gate.open()
        self._closed.open()
        for executor in self._executors.values():
            executor.stop()
            executor.shutdown()
        self._cluster.reset()

    def runs(self, what: str) -> list[str]:
        return (self._folder / f"{what}.runs").read_text().split()

    def _begin(self) -> None:
        path = f"{self._broken.parent}/bin:{os.environ['PATH']}"
        script(
            self._broken.parent / "bin" / "squeue",
            f"[ ! -e '{self._broken}' ] || {{ echo 'slurm_load_jobs error: no luck' >&2; exit 1; }}",
            'PATH="${PATH#*:}" exec squeue "$@"',
        )
        wait, wait_for_ever = self._gate.wait, self._closed.wait
        self._submit("out of time", wait_for_ever, nodelist="n2", time=600)
        self._submit("cancelled", wait_for_ever, nodelist="n2")
        self._submit("unanswered", wait, nodelist="n2", command_prefix=["env", f"PATH={path}"])
        self._submit("held", wait_for_ever, extra_lines=["--hold"])
        # n1, and if there is no room n3.
        self._submit("requeued", wait, exclude="n2,n4")
        self._submit("lost", wait_for_ever, exclude="n2,n4", requeue=False)
        self._submit("preempted", wait, partition="low", cpus_per_task=4)
        self._submit("call out of memory", hog, nodelist="n2")

        def lose_the_job(value: Any) -> Any:
            for process in psutil.Process().parents()[:-1]:
                if "submitit.core._submit" in process.cmdline():
                    Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
            return hog(value)

        self._submit("job out of memory", lose_the_job, nodelist="n2")

    def _submit(self, what: str, second: Callable[[Any], Any], **options: Any) -> None:
        executor = self._executors[what] = executor_in(self._folder / what, **options)
        self.submitted[what] = submit_three(executor, self._folder / f"{what}.runs", second)

    def _befall(self) -> None:
        run = self._cluster.run
        execs = self._executors
        self._cluster.set_end_time(self._number("out of time"), 1)
        task(execs["unanswered"])
        self._broken.touch()
        mended_at = time.monotonic() + OUTAGE_S
        run("scancel", self._id("cancelled"))
        held = [""]
        wait_until(lambda: held.__setitem__(0, self._held()) or held[0], "it is held", seconds=PATIENCE_S)
        run("scancel", held[0])
        hosts = {task(execs[what]).host for what in ("requeued", "lost")}
        for host in hosts:
            self._cluster.crash_node(str(host), noticed=self._noticed)
        task(execs["preempted"])
        high = execs["high"] = executor_in(self._folder / "high", partition="high", cpus_per_task=4)
        self.others["high"] = high.submit(pow, 2, 3)
        futures.wait(self.others.values(), PATIENCE_S)
        self._gate.open()
        if len(hosts) > 1:
            for host in hosts:
                self._cluster.restart_node(str(host))
        wait_until(lambda: time.monotonic() > mended_at, "it was broken for long", seconds=PATIENCE_S)
        self._broken.unlink()

    def _id(self, what: str) -> str:
        return str(task(self._executors[what]).job_id)

    def _number(self, what: str) -> int:
        return int(self._id(what).partition("_")[0])

    def _held(self) -> str:
        rows = self._cluster.run("squeue", "-h", "-t", "PD", "-o", "%F %r").stdout.splitlines()
        return next((row.split()[0] for row in rows if "JobHeldUser" in row), "")


@pytest.fixture(scope="module", params=["no accounting", "accounting"])
def story(
    request: pytest.FixtureRequest,
    clusters: Mapping[str, SlurmCluster],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:
    cluster = clusters[request.param]
    cluster.reset()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.env.items():
            patch.setenv(name, value)
        # By itself SLURM notices after some 18 s that a node is lost: once is enough.
        story = Story(cluster, tmp_path_factory.mktemp("story"), noticed=request.param == "accounting")
        try:
            story.happen()
            yield story
        finally:
            story.end()


def test_what_was_running_when_its_jobs_time_was_up_is_out_of_time(story: Story) -> None:
    first, second, third = story.submitted["out of time"]

    assert results(first, third) == ["first", "third"]
    error = error_of(second)
    assert error.reason == "TIMEOUT"
    assert "Ask for more time" in str(error)
    assert error.node == "n2"
    assert story.runs("out of time") == ["first", "second", "third"]


def test_calls_of_a_running_job_that_somebody_cancels_are_cancelled(story: Story) -> None:
    first, second, third = story.submitted["cancelled"]

    assert first.result() == "first"
    assert [error_of(each).reason for each in (second, third)] == ["CANCELLED"] * 2
    assert "CANCELLED" in str(error_of(second).info)
    assert story.runs("cancelled") == ["first", "second"]


def test_calls_of_a_waiting_job_that_somebody_cancels_are_cancelled(story: Story) -> None:
    errors = [error_of(each) for each in story.submitted["held"]]

    assert [error.reason for error in errors] == ["CANCELLED"] * 3
    assert all("CANCELLED" in str(error.info) for error in errors)


def test_a_job_whose_node_is_lost_goes_on_elsewhere_with_what_has_not_ended(story: Story) -> None:
    assert results(*story.submitted["requeued"]) == list(NAMES)
    assert story.runs("requeued") == ["first", "second", "second", "third"]


def test_where_jobs_are_not_requeued_what_ran_on_a_lost_node_has_failed(story: Story) -> None:
    first, second, third = story.submitted["lost"]

    assert results(first, third) == ["first", "third"]
    error = error_of(second)
    assert error.reason == "NODE_FAIL"
    assert "another node" in str(error)
    assert story.runs("lost") == ["first", "second", "third"]


def test_a_preempted_job_goes_on_later_with_what_has_not_ended(story: Story) -> None:
    assert story.others["high"].result() == 8
    assert results(*story.submitted["preempted"]) == list(NAMES)
    assert story.runs("preempted") == ["first", "second", "second", "third"]


def test_a_scheduler_that_does_not_answer_ends_nothing(story: Story) -> None:
    assert results(*story.submitted["unanswered"]) == list(NAMES)
    assert story.runs("unanswered") == list(NAMES)


def test_a_call_that_takes_more_memory_than_there_is_says_so(
    story: Story, clusters: Mapping[str, SlurmCluster]
) -> None:
    first, second, third = story.submitted["call out of memory"]

    assert results(first, third) == ["first", "third"]
    if clusters["accounting"].limits_memory_with == "cgroup":
        assert error_of(second).reason == "OUT_OF_MEMORY"
        assert "ask for more memory" in str(error_of(second)).lower()
    assert story.runs("call out of memory") == list(NAMES)


def test_a_job_that_dies_for_want_of_memory_says_so(
    story: Story, clusters: Mapping[str, SlurmCluster]
) -> None:
    first, second, third = story.submitted["job out of memory"]

    assert results(first, third) == ["first", "third"]
    if clusters["accounting"].limits_memory_with == "cgroup":
        assert error_of(second).reason == "OUT_OF_MEMORY"
        assert "ask for more memory" in str(error_of(second)).lower()
    assert story.runs("job out of memory") == list(NAMES)


def test_accounting_says_who_has_cancelled_a_job(
    clusters: Mapping[str, SlurmCluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = clusters["accounting"]
    cluster.reset()
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    gate = Gate(tmp_path / "gate")
    with executor_in(tmp_path / "jobs") as executor:
        submitted = submit_three(executor, tmp_path / "runs", gate.wait)
        cluster.run("scancel", str(task(executor).job_id))

        error = error_of(submitted[1])

    assert "by root (uid 0)" in str(error.info)
    assert str(error.info) in str(error)


# What calls do to themselves, and what is done to them


def test_each_call_of_a_job_ends_in_its_own_way(make: Callable[..., SlurmExecutor], gate: Gate) -> None:
    executor = make(calls_per_job=5, parallel_calls_per_job=2)

    def fail() -> None:
        raise ValueError("no")

    neighbour = executor.options(name="neighbour").submit(gate.wait, 1)
    raised = executor.submit(fail)
    locked = executor.submit(threading.Lock)
    left = executor.submit(sys.exit, 3)
    killed = executor.submit(lambda: os.kill(os.getpid(), signal.SIGKILL))

    assert repr(raised.exception(PATIENCE_S)) == "ValueError('no')"
    assert "in fail" in str(raised.exception().__cause__)  # type: ignore[union-attr]
    unpicklable = locked.exception(PATIENCE_S)
    assert isinstance(unpicklable, ExecutorError)
    assert "lock" in str(unpicklable)
    assert repr(left.exception(PATIENCE_S)) == "SystemExit(3)"
    error = error_of(killed)
    assert (error.returncode, error.node) == (-9, "n1")
    assert error.job_id == task(executor, "neighbour").job_id
    assert "SIGKILL" in str(error)
    assert not neighbour.done()
    gate.open()
    assert neighbour.result(PATIENCE_S) == 1


def test_what_ran_when_a_jobs_own_program_was_killed_has_failed(
    make: Callable[..., SlurmExecutor], gate: Gate, tmp_path: Path
) -> None:
    executor = make()
    first, second, third = submit_three(executor, tmp_path / "runs", gate.wait)
    pid = task(executor).pid
    assert pid is not None

    program_of(pid).kill()

    error = error_of(second)
    assert (error.reason, error.returncode, error.node) == ("FAILED", -9, "n1")
    assert results(first, third) == ["first", "third"]
    assert (tmp_path / "runs").read_text().split() == list(NAMES)
    wait_until(lambda: not is_alive(pid), "its process is gone")


def test_a_call_that_is_stopped_is_gone_and_its_neighbours_go_on(
    make: Callable[..., SlurmExecutor], gate: Gate, tmp_path: Path
) -> None:
    executor = make(parallel_calls_per_job=3)
    noted = tmp_path / "pids"

    def start_and_wait() -> None:
        child = subprocess.Popen(["sleep", "1000"])
        lost = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        noted.with_suffix(".new").write_text(f"{os.getpid()} {child.pid} {lost.pid}")
        noted.with_suffix(".new").rename(noted)
        time.sleep(1000)

    neighbours = [executor.submit(gate.wait, number) for number in range(2)]
    stopped = executor.options(name="second").submit(start_and_wait)
    wait_until(noted.exists, "it has started its children")
    task(executor)

    assert executor.stop(stopped) == 1

    assert error_of(stopped).reason == "CANCELLED"
    pids = [int(pid) for pid in noted.read_text().split()]
    wait_until(lambda: not any(map(is_alive, pids)), "the processes are gone")
    gate.open()
    assert results(*neighbours) == [0, 1]


def test_a_call_that_is_cancelled_before_its_neighbour_is_stopped_never_runs(
    make: Callable[..., SlurmExecutor], gate: Gate, tmp_path: Path
) -> None:
    executor = make(calls_per_job=4)
    first, second, third = submit_three(executor, tmp_path / "runs", gate.wait)
    last = executor.submit(noting(tmp_path / "runs"), "last")
    task(executor)

    assert third.cancel()
    assert executor.stop(second) == 1

    assert error_of(second).reason == "CANCELLED"
    assert results(first, last) == ["first", "last"]
    assert (tmp_path / "runs").read_text().split() == ["first", "second", "last"]


def test_when_all_is_stopped_no_job_is_left(
    make: Callable[..., SlurmExecutor], cluster: SlurmCluster, gate: Gate, tmp_path: Path
) -> None:
    executor = make()
    running = submit_three(executor, tmp_path / "runs", gate.wait)
    held = [executor.options(extra={"extra_lines": ["--hold"]}).submit(abs, n) for n in range(9)]
    task(executor)
    wait_until(lambda: len(set(jobs(cluster))) == 2, "all are submitted", seconds=PATIENCE_S)

    executor.stop()

    assert futures.wait([*running, *held], PATIENCE_S).not_done == set()
    assert all(future.cancelled() for future in held)
    wait_until(lambda: jobs(cluster) == [], "there is no job any more", seconds=PATIENCE_S)


def test_leaving_the_with_block_on_an_exception_cancels_what_waits(
    make: Callable[..., SlurmExecutor], cluster: SlurmCluster, tmp_path: Path
) -> None:
    executor = make(extra_lines=["--hold"])

    with pytest.raises(LookupError, match="mine"), executor:
        submitted = [executor.submit(abs, number) for number in range(9)]
        wait_until(lambda: jobs(cluster), "they are submitted")
        raise LookupError("mine")

    assert all(future.cancelled() for future in submitted)
    wait_until(lambda: jobs(cluster) == [], "there is no job any more", seconds=PATIENCE_S)


# What SLURM refuses, and what it does not say


def test_calls_that_slurm_refuses_fail_at_once_in_its_words_and_no_others(
    make: Callable[..., SlurmExecutor],
) -> None:
    executor = make()
    refused = [executor.options(queue="closed").submit(abs, number) for number in range(4)]
    taken = executor.submit(pow, 2, 3)

    errors = [error_of(future) for future in refused]

    assert {error.reason for error in errors} == {"REFUSED"}
    assert all("Required partition not available" in str(error.info) for error in errors)
    assert all("Required partition not available" in str(error) for error in errors)
    assert taken.result(PATIENCE_S) == 8


def test_a_job_that_can_never_start_is_given_up(
    make: Callable[..., SlurmExecutor], cluster: SlurmCluster
) -> None:
    executor = make(pending_timeout=1)
    never = executor.options(extra={"nodes": 50}).submit(abs, -1)
    other = executor.submit(pow, 2, 3)

    error = error_of(never)

    assert error.reason in ("PartitionConfig", "PartitionNodeLimit")
    assert "It was cancelled" in str(error)
    assert other.result(PATIENCE_S) == 8
    wait_until(lambda: jobs(cluster) == [], "there is no job any more", seconds=PATIENCE_S)


def test_calls_end_while_the_controller_is_away_and_jobs_go_on(
    make: Callable[..., SlurmExecutor], cluster: SlurmCluster, gate: Gate, tmp_path: Path
) -> None:
    executor, other = make(command_timeout=5), make(command_timeout=5)
    first, second, third = submit_three(executor, tmp_path / "runs", gate.wait)
    later = Gate(tmp_path / "later")
    last = other.options(name="last").submit(later.wait, "last")
    task(executor)
    task(other, "last")

    cluster.stop_controller()
    since = time.monotonic()
    gate.open()

    assert results(first, second, third) == list(NAMES)
    late = executor.submit(pow, 2, 3)
    wait_until(lambda: time.monotonic() > since + OUTAGE_S, "it was away for long")
    assert not last.done()
    cluster.start_controller()
    later.open()
    assert last.result(PATIENCE_S) == "last"
    assert late.result(PATIENCE_S) == 8


def test_each_command_has_the_words_in_front_that_were_asked_for(
    make: Callable[..., SlurmExecutor], cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, path = tmp_path / "commands", os.environ["PATH"]
    prefix = script(tmp_path / "prefix", f'echo "$@" >>{log}', 'exec "$@"')
    for name in ("sbatch", "squeue", "scancel", "scontrol", "sacct"):
        script(tmp_path / "bin" / name, f'echo "{name} without" >>{log}', "exit 1")
    executor = make(command_prefix=[str(prefix), "env", f"PATH={path}"], extra_lines=["--hold"])
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}/bin:{path}")
        future = executor.submit(abs, 1)
        wait_until(lambda: log.exists() and " squeue " in log.read_text(), "it was asked for")
        future.cancel()
        executor.shutdown()

    said = log.read_text()
    assert [name for name in ("sbatch", "squeue", "scancel", "scontrol") if f" {name} " not in said] == []
    assert "without" not in said
    wait_until(lambda: jobs(cluster) == [], "there is no job any more", seconds=PATIENCE_S)


# What befalls files


def test_nobody_knows_how_calls_ended_whose_records_were_cut_off(
    make: Callable[..., SlurmExecutor], gate: Gate, tmp_path: Path
) -> None:
    executor = make(tmp_path / "jobs")
    first, second, third = submit_three(executor, tmp_path / "runs", gate.wait)
    task(executor)

    os.truncate(records_of(tmp_path / "jobs"), 20)
    gate.open()

    assert first.result(PATIENCE_S) == "first"
    assert [error_of(each).reason for each in (second, third)] == ["DAMAGED_RECORDS"] * 2
    assert (tmp_path / "runs").read_text().split() == list(NAMES)


def test_nobody_knows_how_the_call_ended_whose_record_is_damaged(
    make: Callable[..., SlurmExecutor], gate: Gate, tmp_path: Path
) -> None:
    executor, later = make(tmp_path / "jobs"), Gate(tmp_path / "later")
    marker = b"to be damaged" * 9

    def damage(_: Any) -> None:  # before it is read: a callback is called by whoever reads
        gate.await_arrivals(1)
        gate.open()
        later.await_arrivals(1)
        path = records_of(tmp_path / "jobs")
        place = path.read_bytes().index(marker)
        with path.open("r+b") as file:
            file.seek(place + 20)
            file.write(b"!")

    first = executor.submit(abs, -1)
    first.add_done_callback(damage)
    second, third = executor.submit(gate.wait, marker), executor.submit(later.wait, "third")
    assert first.result(PATIENCE_S) == 1
    later.await_arrivals(1)
    later.open()

    assert third.result(PATIENCE_S) == "third"
    error = error_of(second)
    assert error.reason == "DAMAGED_RECORDS"
    assert "is damaged between bytes" in str(error)


def test_calls_whose_payload_was_removed_are_sent_again_but_not_for_ever(
    make: Callable[..., SlurmExecutor], tmp_path: Path
) -> None:
    once = f"[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; rm {tmp_path}/once-jobs/fr-*/payload; }}"
    lucky = make(tmp_path / "once-jobs", setup=[once]).submit(pow, 2, 3)
    unlucky = make(tmp_path / "jobs", setup=[f"rm -f {tmp_path}/jobs/fr-*/payload"]).submit(pow, 2, 3)

    error = error_of(unlucky)

    assert error.reason == "REFUSED"
    assert "given to 3 jobs" in str(error)
    assert "the payload is missing" in str(error)
    assert lucky.result(PATIENCE_S) == 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k,mode=700", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_a_full_disk_fails_what_cannot_be_submitted_and_delays_what_ends(
    small_disk: Path, make: Callable[..., SlurmExecutor], gate: Gate, tmp_path: Path
) -> None:
    executor = make(small_disk / "jobs")
    first, second, third = submit_three(executor, tmp_path / "runs", lambda name: gate.wait(name * 2000))
    task(executor)

    fill(small_disk / "full")
    gate.open()
    error = error_of(executor.submit(len, os.urandom(20_000)))

    assert error.reason == "NOT_SUBMITTED"
    assert "No space left on device" in str(error)
    assert not second.done()
    (small_disk / "full").unlink()
    assert results(first, second, third) == ["first", "second" * 2000, "third"]


def test_a_folder_of_somebody_elses_is_refused(make: Callable[..., SlurmExecutor], tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)

    error = error_of(make(tmp_path / "theirs").submit(abs, -1))

    assert error.reason == "NOT_SUBMITTED"
    assert "belongs to user 65534" in str(error)
    assert list((tmp_path / "theirs").iterdir()) == []


def test_results_of_somebody_elses_are_not_read(
    make: Callable[..., SlurmExecutor], gate: Gate, tmp_path: Path
) -> None:
    executor = make(tmp_path / "jobs")
    first, second, third = submit_three(executor, tmp_path / "runs", gate.wait)
    task(executor)

    os.chown(records_of(tmp_path / "jobs"), NOBODY, NOBODY)
    gate.open()

    assert first.result(PATIENCE_S) == "first"
    for each in (second, third):
        assert error_of(each).reason == "DAMAGED_RECORDS"
        assert "belongs to user 65534" in str(error_of(each))


# What runs on the nodes


def test_a_python_that_cannot_do_it_is_named(make: Callable[..., SlurmExecutor], tmp_path: Path) -> None:
    bare = script(tmp_path / "bare", "echo 'No module named submitit' >&2", "exit 1")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sitecustomize.py").write_text(
        "import platform\n"
        "platform.python_version = lambda: '3.8.1'\n"
        "platform.python_version_tuple = lambda: ('3', '8', '1')\n"
    )
    old = script(tmp_path / "python3.8", f'PYTHONPATH={tmp_path}/old exec {sys.executable} "$@"')
    executors = [make(python=str(each)) for each in (bare, old, tmp_path / "missing")]

    submitted = [executor.submit(abs, -1) for executor in executors]
    without, older, missing = map(error_of, submitted)

    assert older.reason == "REFUSED"
    assert "the job runs Python 3.8.1" in str(older)
    assert "No module named submitit" in str(without)
    assert "given to 3 jobs" in str(without)
    assert f"{tmp_path}/missing" in str(missing)
