"""What the executor over Ray has of its own: resources, refusals, a store, its connection, deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.adapters.ray import RayExecutor
from fractal_runner.executors.adapters.rayengine.ends import error_of, is_of_the_place
from fractal_runner.executors.adapters.rayengine.instance import _TOKEN, Node, possible_nodes, short_folder
from fractal_runner.executors.calls import current_context
from fractal_runner.testing import PATIENCE_S, Gate, is_alive, wait_until
from tests.executors.adapters.knowing import assert_calls_know_what_they_are
from tests.executors.adapters.resuming import assert_resumed_over_the_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


@pytest.fixture(scope="session", autouse=True)
def settled(first_ray: list[RayExecutor]) -> None:
    """Before what looks for things that a module of tests leaves behind."""


@pytest.fixture
def instance(ray_instance: RayExecutor) -> RayExecutor:
    """Keeps the instance, whose calls nobody else's are."""
    return ray_instance


@pytest.fixture
def executor(instance: RayExecutor) -> Iterator[RayExecutor]:
    """Over the instance of two CPUs and 1 GB that the module has."""
    with RayExecutor(2, name="lab") as executor:
        yield executor
        executor.stop()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def test_calls_know_what_they_are(executor: RayExecutor) -> None:
    assert_calls_know_what_they_are(executor)


def test_a_run_is_resumed_over_ray(
    instance: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert_resumed_over_the_same(tmp_path, "ray", "object_store_memory=100MB")

    for number in range(2):
        assert "ray::" in (tmp_path / f"seen{number}").read_text()


# Resources


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 3}, r"cpus=3 exceeds what any node of lab has: 2 at most, of 1 node\(s\)"),
        ({"gpus": 1}, r"gpus=1 exceeds what any node of lab has: 0 at most"),
        ({"memory": "2GB"}, r"memory=2 GB exceeds what any node of lab has: 1 GB at most"),
        ({"extra": {"resources": {"microscope": 1}}}, r"microscope=1 exceeds .*: 0 at most"),
        ({"extra": {"resources": {"CPU": 1}}}, r"extra: resources: 'CPU' is the option 'cpus'"),
        ({"extra": {"resources": {"microscope": -1}}}, "is not a mapping of resources' names to positive"),
        ({"extra": {"resourses": {}}}, "no option 'resourses' here: did you mean 'resources'"),
        ({"extra": {"label_selector": "x"}}, "extra: label_selector: 'x' is not a mapping"),
    ],
)
def test_a_call_that_no_node_could_hold_is_refused_with_the_numbers(
    executor: RayExecutor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        executor.options(**options)


def test_what_no_single_node_holds_together_is_refused_as_well(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [Node("a", {"CPU": 8, "memory": 10**9}), Node("b", {"CPU": 1, "memory": 8 * 10**9})]
    monkeypatch.setattr(executor._instance, "nodes", lambda: nodes)

    executor.options(cpus=8)
    executor.options(memory="8GB")
    with pytest.raises(
        ValueError,
        match=r"cpus=8, memory=8 GB together exceed .*: a has cpus=8, memory=1 GB; b has cpus=1, memory=8 GB",
    ):
        executor.options(cpus=8, memory="8GB")


def test_what_the_autoscaler_can_start_counts_as_well() -> None:
    groups = [
        SimpleNamespace(name="small", resources={"CPU": 4}, max_count=3),
        SimpleNamespace(name="none", resources={"CPU": 64}, max_count=0),
        SimpleNamespace(name="unbounded", resources={"CPU": 8, "GPU": 1}, max_count=-1),
    ]

    nodes = possible_nodes(SimpleNamespace(node_group_configs=groups))

    assert [(node.name, node.cpus, node.gpus) for node in nodes] == [("small", 4, 0), ("unbounded", 8, 1)]
    assert possible_nodes(None) == []


def test_what_exceeds_the_largest_node_is_reduced_to_it_where_that_is_asked_for(
    executor: RayExecutor,
) -> None:
    view, told = executor.fitting(cpus=64, memory="64GB", gpus=2, extra={"constraint": "x"})

    assert told == [
        "constraint means nothing to Ray",
        "cpus=64 is more than the 2 of the largest node of lab",
        "gpus=2 is more than the 0 of the largest node of lab",
        "memory=64 GB is more than the 1 GB of the largest node of lab",
    ]
    assert view.submit(pow, 2, 3).result(PATIENCE_S) == 8


@pytest.mark.parametrize("needs", [{"cpus": 2}, {"memory": "600MB"}])
def test_calls_that_do_not_fit_together_do_not_run_together(
    executor: RayExecutor, gate: Gate, needs: dict[str, Any]
) -> None:
    view = executor.options(**needs)
    first, second = (view.submit(gate.wait, number) for number in range(2))
    gate.await_arrivals(1)
    wait_until(lambda: first.running() or second.running(), "one is known to run")

    time.sleep(1)  # for the second one to start, if it were to

    assert len(gate.arrived()) == 1
    assert first.running() != second.running()
    gate.open()
    assert [future.result(PATIENCE_S) for future in (first, second)] == [0, 1]


def test_a_call_keeps_its_libraries_to_its_cpus(executor: RayExecutor) -> None:
    def threads() -> list[str]:
        return [os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]

    assert executor.options(cpus=2).submit(threads).result(PATIENCE_S) == ["2", "2"]
    assert executor.submit(threads).result(PATIENCE_S) == ["1", "1"]


def test_one_executor_does_not_hold_another_one_up_for_long(instance: RayExecutor) -> None:
    with RayExecutor(2) as busy, RayExecutor(2) as other:
        many = [busy.submit(time.sleep, 0.05) for _ in range(400)]
        wait_until(many[0].done, "the first one is busy")

        assert other.submit(pow, 2, 3).result(PATIENCE_S) == 8

        assert not many[-1].done()
        busy.stop()


def test_calls_for_which_there_is_no_place_yet_can_be_cancelled(
    instance: RayExecutor, gate: Gate, tmp_path: Path
) -> None:
    with RayExecutor(2) as executor:
        held = executor.submit(gate.wait, 1)
        gate.await_arrivals(1)
        wide = executor.options(cpus=2)
        waiting = [wide.submit((tmp_path / "ran").touch) for _ in range(5)]
        wait_until(lambda: len(executor._manager._visits) > 1, "Ray is asked for a place")

        assert [future.cancel() for future in waiting] == [True] * 5
        assert executor.pending_count() == 1
        wait_until(lambda: len(executor._manager._visits) == 1, "Ray is not asked any more")
        gate.open()
        assert held.result(PATIENCE_S) == 1
        assert wide.submit(pow, 2, 3).result(PATIENCE_S) == 8
    assert not (tmp_path / "ran").exists()


# The object store


def test_a_context_is_put_into_the_object_store_once(
    instance: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RayExecutor(2, context={"table": list(range(1000)), "name": "x"}) as executor:
        put: list[int] = []
        ray = executor._instance.ray
        monkeypatch.setattr(ray, "put", lambda value, put_=ray.put: put.append(len(value)) or put_(value))

        sums = [executor.submit(lambda: sum(current_context()["table"])) for _ in range(20)]
        names = [
            executor.options(context_filter=["name"]).submit(lambda: list(current_context())) for _ in "ab"
        ]

        assert {future.result(PATIENCE_S) for future in sums} == {499500}
        assert [future.result(PATIENCE_S) for future in names] == [["name"]] * 2
        assert len(put) == 2


# Deaths


def test_a_dying_ray_worker_fails_its_call_alone_and_takes_all_of_it_along(
    executor: RayExecutor, tmp_path: Path, gate: Gate
) -> None:
    def start_and_wait() -> None:
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        (tmp_path / "new").write_text(f"{os.getppid()} {os.getpid()} {child.pid}")
        (tmp_path / "new").rename(tmp_path / "pids")
        time.sleep(1000)  # until it is ended

    held, killed = executor.submit(gate.wait, 1), executor.submit(start_and_wait)
    waiting = [executor.submit(pow, 2, 3) for _ in range(5)]
    wait_until((tmp_path / "pids").exists, "the call runs")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]

    os.kill(pids[0], signal.SIGKILL)

    with pytest.raises(JobExecutionError, match=r"was running on .* given to has died") as caught:
        killed.result(PATIENCE_S)
    assert caught.value.reason == "WORKER_DIED"
    assert caught.value.node == os.uname().nodename
    assert [future.result(PATIENCE_S) for future in waiting] == [8] * 5
    wait_until(lambda: not any(map(is_alive, pids)), "what it had started is gone")
    gate.open()
    assert held.result(PATIENCE_S) == 1


def test_a_ray_worker_that_cannot_end_a_call_is_ended_itself(
    executor: RayExecutor, gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fractal_runner.executors.adapters.rayengine.calls._FORCE_S", 0.0)
    future = executor.submit(gate.wait)
    [pid] = gate.await_arrivals(1)
    wait_until(future.running, "it is known to run")

    executor.stop(future)

    assert isinstance(future.exception(PATIENCE_S), JobExecutionError)
    wait_until(lambda: not is_alive(pid), "it is gone")
    assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8


def test_the_ends_that_ray_reports_are_told_in_words() -> None:
    class WorkerCrashedError(Exception):
        pass

    class RayTaskError(Exception):
        pass

    class Unheard(Exception):
        pass

    died = error_of("unit 3", WorkerCrashedError("unexpectedly"), "node7")
    unheard = error_of("unit 3", Unheard("of"), None)
    missing = error_of("unit 3", RayTaskError("No module named 'fractal_runner'"), None)
    lost = error_of("unit 3", None, "node7")

    assert isinstance(died, JobExecutionError)
    assert (died.reason, died.node, died.info) == ("WORKER_DIED", "node7", "unexpectedly")
    assert "The call 'unit 3' was running on node7 when it failed" in str(died)
    assert isinstance(unheard, JobExecutionError)
    assert (unheard.reason, unheard.info) == ("RAY", "of")
    assert "had not begun" in str(unheard)
    assert isinstance(missing, ExecutorError)
    assert "installed there" in str(missing)
    assert isinstance(lost, JobExecutionError)
    assert lost.reason == "CONNECTION_LOST"
    assert is_of_the_place(WorkerCrashedError())
    assert not is_of_the_place(RayTaskError())


def test_calls_whose_visits_never_get_going_fail_after_some_tries(
    instance: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RayExecutor(1) as executor:
        home = executor._manager.home
        monkeypatch.setattr(executor._manager, "home", type(home)(("127.0.0.1", 9), home.token))

        error = executor.submit(pow, 2, 3).exception(PATIENCE_S)

    assert isinstance(error, JobExecutionError)
    assert error.reason == "UNREACHABLE"
    assert "cannot reach the process that submits its calls, at 127.0.0.1:9" in str(error)


def test_a_stranger_on_the_socket_is_not_listened_to(executor: RayExecutor) -> None:
    script = (
        "import pickle, sys\n"
        "from multiprocessing.connection import Client\n"
        "class Touch:\n"
        "    def __reduce__(self): return open, (sys.argv[2], 'w')\n"
        "with Client(sys.argv[1], family='AF_UNIX') as connection:\n"
        "    connection.send_bytes(b'H' + bytes(8) + b'guessed')\n"
        "    connection.send_bytes(b'R' + bytes(8) + pickle.dumps(Touch()))\n"
        "    connection.poll(30) and connection.recv_bytes()\n"
    )
    address = str(executor._manager.home.address)

    stranger = subprocess.run(
        [sys.executable, "-c", script, address, f"{address}.touched"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert (
        stranger.stderr.rstrip().splitlines()[-1].startswith(("EOFError", "ConnectionResetError", "Broken"))
    )
    assert not Path(f"{address}.touched").exists()
    assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8


# The connection


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_workers": 0}, "max_workers must be greater than 0"),
        ({"max_cpus": 0}, "max_cpus: 0 is not a whole number"),
        ({"max_memory": "much"}, "max_memory: 'much' is not a size"),
        ({"address": "ray://head:10001"}, "is one for Ray's client"),
        ({"address": "head:6379", "max_cpus": 2}, "max_cpus is for an instance that is started here"),
        ({"address": "head:6379"}, "connected to Ray already, to a local instance"),
        ({"max_cpus": 4}, "max_cpus=4 is more than the 2 of the local Ray instance"),
        ({"max_memory": "2GB"}, "max_memory=2 GB is more than the 1 GB of the local Ray instance"),
        ({"runtime_env": {"env_vars": {"A": "b"}}}, "with another runtime_env"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    instance: RayExecutor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RayExecutor(**arguments)


def test_the_environment_is_as_before_and_there_is_no_dashboard(instance: RayExecutor) -> None:
    assert not {"RAY_USAGE_STATS_ENABLED", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"} & os.environ.keys()
    assert instance._instance.ray._private.worker._global_node.webui_url == ""
    daemons = [one for one in psutil.Process().children() if "gcs_server" in one.name()]
    assert [one.environ()["RAY_USAGE_STATS_ENABLED"] for one in daemons] == ["0"]


FOREIGN = """
import json, os, sys
from fractal_runner.executors.adapters.ray import RayExecutor

def where():
    return os.getpid()

with RayExecutor(address=sys.argv[1], context={"a": 1}) as executor:
    results = list(executor.map(pow, range(50), [2] * 50))
    known = [executor.is_remote, executor.max_workers, type(executor._manager.home.address).__name__]
    dead = executor.submit(os._exit, 3).exception()
print(json.dumps([results[-1], known, str(dead)]))
"""


def test_it_joins_a_cluster_by_its_address_and_leaves_it_running(
    instance: RayExecutor, tmp_path: Path
) -> None:
    address = instance._instance.ray.get_runtime_context().gcs_address

    out = run_script(tmp_path, FOREIGN, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_TOKEN)

    result, known, dead = json.loads(out)
    assert result == 49**2
    assert known == [True, 2, "tuple"]
    assert "exit code 3" in dead
    assert instance.submit(pow, 2, 3).result(PATIENCE_S) == 8


def test_a_cluster_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    out = run_script(
        tmp_path,
        "import sys\n"
        "from fractal_runner.executors.adapters.ray import RayExecutor\n"
        "for address in sys.argv[1:]:\n"
        "    try: RayExecutor(address=address)\n"
        "    except Exception as error: print(type(error).__name__, error)\n",
        *("127.0.0.1:9", "head"),
    )

    dead, wrong = out.splitlines()
    assert dead.startswith("ExecutorError Ray cannot be reached at address='127.0.0.1:9': ConnectionRefused")
    assert wrong == "ValueError 'head' is neither 'host:port' nor 'auto'"


def test_a_fork_cannot_have_a_connection_of_its_own(instance: RayExecutor) -> None:
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            RayExecutor(1)
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        assert b"a fork of one that is connected to Ray" in told.read()
    os.waitpid(pid, 0)


BORROWED = """
import json, os, sys, time
import ray
from fractal_runner.executors.adapters.ray import RayExecutor

def devices(seconds=0):
    time.sleep(seconds)
    return os.environ.get("CUDA_VISIBLE_DEVICES")

ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, _temp_dir=sys.argv[1],
         object_store_memory=100 * 2**20, log_to_driver=False)
try:
    RayExecutor(runtime_env={})
except ValueError as error:
    refused = str(error)
with RayExecutor() as executor:
    view = executor.options(gpus=1)
    both = [view.submit(devices, 1) for _ in range(2)]
    known = [executor.max_workers, executor.is_remote]
    result = [sorted(future.result() for future in both), executor.submit(devices).result() or ""]
still = ray.is_initialized()
with RayExecutor() as executor:
    ray.shutdown()
    closed = str(executor.submit(devices).exception(30))
    assert executor.options(cpus=1).max_workers == 2
print(json.dumps([result, known, refused, still, closed, ray.is_initialized()]))
"""


def test_a_connection_that_the_caller_has_made_is_used_and_left_open(tmp_path: Path) -> None:
    folder = short_folder() / f"fr-borrowed-{os.getpid()}"
    try:
        out = run_script(
            tmp_path, BORROWED, str(folder), RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0"
        )
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True, timeout=PATIENCE_S)

    (devices, without), known, refused, still, closed, again = json.loads(out.splitlines()[-1])
    assert devices == ["0", "1"]
    assert without not in ("0", "1")
    assert known == [2, True]
    assert "give it to ray.init" in refused
    assert still
    assert "connection to Ray has been closed" in closed
    assert not again


def run_script(tmp_path: Path, text: str, *arguments: str, **environment: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
