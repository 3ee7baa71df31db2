"""What is particular to the executors of this machine: budgets, what is shared, what workers are."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors import leaving
from fractal_runner.executors.base import View
from fractal_runner.executors.calls import current_context
from fractal_runner.executors.cpus import THREAD_VARIABLES
from fractal_runner.executors.local.executors import (
    ForkExecutor,
    LocalExecutor,
    ProcessExecutor,
    SerialExecutor,
    SpawnExecutor,
    ThreadExecutor,
)
from fractal_runner.executors.local.line import Line
from fractal_runner.testing import PATIENCE_S, Gate, is_alive, wait_until

PROCESSES = [ProcessExecutor, ForkExecutor, SpawnExecutor]
KINDS = [ThreadExecutor, *PROCESSES]

of_every_kind = pytest.mark.parametrize("kind", KINDS)
of_processes = pytest.mark.parametrize("kind", PROCESSES)


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Makes executors, which are stopped and shut down after the test."""
    made: list[LocalExecutor] = []

    def make(kind: type[LocalExecutor], *args: Any, **options: Any) -> LocalExecutor:
        made.append(kind(*args, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.stop()
        executor.shutdown()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Where calls wait; opened after the test."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def alone(path: str) -> bool:
    """A closure that tells whether no other call is in it at the same time."""

    def enter() -> bool:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        time.sleep(0.02)
        os.unlink(path)  # noqa: PTH108
        return True

    return enter  # type: ignore[return-value]


# Budgets


@of_every_kind
@pytest.mark.parametrize(
    ("bound", "asked"),
    [
        ({"max_cpus": 2}, {"cpus": 2}),
        ({"max_cpus": 3}, {"cpus": 2}),
        ({"max_memory": "4GB"}, {"memory": "3GB"}),
    ],
)
def test_calls_that_exceed_the_budget_together_never_overlap(
    make: Any, tmp_path: Path, kind: Any, bound: Any, asked: Any
) -> None:
    executor = make(kind, 3, **bound)
    enter = alone(str(tmp_path / "taken"))

    together = [executor.options(**asked).submit(enter) for _ in range(4)]

    assert [future.result(PATIENCE_S) for future in together] == [True] * 4


@of_every_kind
def test_calls_that_fit_run_together(make: Any, gate: Gate, kind: Any) -> None:
    executor = make(kind, 3, max_cpus=3, max_memory="4GB")

    submitted = [
        executor.options(cpus=2, memory="1GB").submit(gate.wait, 1),
        executor.options(cpus=1, memory="3GB").submit(gate.wait, 2),
    ]

    gate.await_arrivals(2)
    gate.open()
    assert [future.result(PATIENCE_S) for future in submitted] == [1, 2]


def test_a_big_call_is_overtaken_by_a_bounded_number_of_small_ones(make: Any, gate: Gate) -> None:
    executor = make(ThreadExecutor, 2, max_cpus=2)
    order: list[Any] = []
    executor.submit(gate.wait)
    gate.await_arrivals(1)

    executor.options(cpus=2).submit(order.append, "big")
    for number in range(300):
        executor.submit(order.append, number)
    wait_until(lambda: len(order) == 100, "small calls have overtaken the big one")
    gate.open()
    executor.shutdown()

    assert order.index("big") == 100
    assert len(order) == 301


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 3}, "cpus=3 exceeds max_cpus=2 of mine"),
        ({"memory": "5GB"}, "memory=5 GB exceeds max_memory=4 GB of mine"),
    ],
)
def test_a_call_that_can_never_run_is_refused(make: Any, kind: Any, options: Any, message: str) -> None:
    executor = make(kind, 1, max_cpus=2, max_memory="4GB", name="mine")

    with pytest.raises(ValueError, match=message):
        executor.options(**options)
    with pytest.raises(ValueError, match=message):
        executor.options(name="a").options(**options)


def test_what_exceeds_the_budget_can_be_reduced_to_it(make: Any) -> None:
    executor = make(ThreadExecutor, 1, max_cpus=2, max_memory="4GB", name="mine")

    view, reduced = executor.fitting(cpus=8, memory="16GB", name="unit")

    assert reduced == [
        "8 CPUs are more than the 2 of mine",
        "16 GB of memory are more than the 4 GB of mine",
    ]
    assert view.submit(pow, 2, 3).result(PATIENCE_S) == 8
    assert executor.fitting(cpus=2, memory="4GB")[1] == []


@pytest.mark.parametrize(
    "options",
    [{"max_cpus": 0}, {"max_cpus": "2"}, {"max_memory": "much"}, {"idle_timeout": -1}, {"max_workers": True}],
)
def test_wrong_arguments_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}|{next(iter(options.values()))}"):
        ThreadExecutor(**options)


# What workers are


@of_processes
def test_numerical_libraries_are_told_how_many_cpus_there_are_for_a_call(
    make: Any, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    names = list(THREAD_VARIABLES)
    executor = make(kind, 1, max_cpus=4)

    def told() -> list[str | None]:
        return [os.environ.get(name) for name in names]

    expected = ["7" if name == "MKL_NUM_THREADS" else "1" for name in names]
    assert executor.submit(told).result(PATIENCE_S) == expected
    expected = ["7" if name == "MKL_NUM_THREADS" else "3" for name in names]
    assert executor.options(cpus=3).submit(told).result(PATIENCE_S) == expected
    assert os.environ.get("OMP_NUM_THREADS") is None


def test_a_process_is_kept_for_the_next_call(make: Any) -> None:
    executor = make(ProcessExecutor, 1)

    assert len({executor.submit(os.getpid).result(PATIENCE_S) for _ in range(3)}) == 1


@pytest.mark.parametrize("kind", [ForkExecutor, SpawnExecutor])
def test_each_call_has_a_process_of_its_own(make: Any, kind: Any) -> None:
    executor = make(kind, 1)

    pids = {executor.submit(os.getpid).result(PATIENCE_S) for _ in range(3)}

    assert len(pids) == 3
    assert os.getpid() not in pids


def test_an_idle_process_ends_and_the_next_call_has_a_new_one(make: Any) -> None:
    executor = make(ProcessExecutor, 1, idle_timeout=0.1)
    pid = executor.submit(os.getpid).result(PATIENCE_S)

    wait_until(lambda: not is_alive(pid), "the idle process has ended")

    assert executor.submit(os.getpid).result(PATIENCE_S) != pid


def test_an_idle_process_that_was_killed_is_replaced(make: Any) -> None:
    executor = make(ProcessExecutor, 1)
    pid = executor.submit(os.getpid).result(PATIENCE_S)

    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the process has ended")

    assert executor.submit(os.getpid).result(PATIENCE_S) != pid


@of_processes
def test_a_worker_is_not_moved_by_ctrl_c_and_what_it_starts_is(make: Any, gate: Gate, kind: Any) -> None:
    executor = make(kind, 1)

    def go_on(wait: Callable[[], None]) -> int:
        wait()
        return subprocess.run(["sh", "-c", "kill -INT $$; sleep 60"], check=False).returncode

    future = executor.submit(go_on, gate.wait)
    [pid] = gate.await_arrivals(1)
    os.kill(pid, signal.SIGINT)
    gate.open()

    assert future.result(PATIENCE_S) == -signal.SIGINT


@of_processes
def test_a_process_bears_the_name_of_its_call(make: Any, kind: Any) -> None:
    executor = make(kind, 1)

    def name() -> tuple[str, str]:
        return multiprocessing.current_process().name, Path("/proc/self/comm").read_text().strip()

    names = executor.options(name="the unit of a plate").submit(name).result(PATIENCE_S)

    assert names == ("the unit of a plate", "the unit of a plate"[:15])
    assert executor.options(name="b").submit(name).result(PATIENCE_S) == ("b", "b")


def test_a_thread_has_its_own_name_back_after_the_call(make: Any) -> None:
    executor = make(ThreadExecutor, 1, name="mine")
    executor.options(name="unit 7").submit(abs, 1).result(PATIENCE_S)

    def names() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    wait_until(lambda: "mine_1" in names() and "unit 7" not in names(), "the thread has its name back")


def test_threads_leave_standard_output_alone(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    future = make(ThreadExecutor, 1).submit(print, "said in a thread")
    future.result(PATIENCE_S)

    assert capsys.readouterr().out == "said in a thread\n"
    assert future.output == ""


@of_processes
def test_tasks_measure_processes_with_their_children(make: Any, gate: Gate, kind: Any) -> None:
    executor = make(kind, 1)

    def with_a_child(wait: Callable[[], None]) -> None:
        with subprocess.Popen(["sleep", "1000"]) as child:
            wait()
            child.kill()

    executor.submit(with_a_child, gate.wait)
    [pid] = gate.await_arrivals(1)

    [info] = executor.tasks()

    assert (info.pid, info.children, info.state) == (pid, 1, "running")
    assert info.host == os.uname().nodename
    assert (info.rss or 0) > 2**20
    assert (info.threads or 0) >= 2
    assert (info.cpu or 0.0) >= 0.0


def test_tasks_tell_of_threads(make: Any, gate: Gate) -> None:
    executor = make(ThreadExecutor, 1)
    executor.submit(gate.wait)
    gate.await_arrivals(1)

    [info] = executor.tasks()

    assert (info.pid, info.state) == (os.getpid(), "running")
    assert (info.rss or 0) > 0


# What cannot be ended


@pytest.mark.parametrize("how", ["stop", "timeout"])
def test_a_thread_that_cannot_be_ended_is_left_running_and_told_of(make: Any, gate: Gate, how: str) -> None:
    executor = make(ThreadExecutor, 1)
    future = executor.options(timeout=0.1 if how == "timeout" else None, name="stuck").submit(gate.wait)
    gate.await_arrivals(1)
    if how == "stop":
        executor.stop(future)

    error = future.exception(PATIENCE_S)

    assert isinstance(error, TimeoutError if how == "timeout" else JobExecutionError)
    assert "was left running" in str(error)
    [info] = executor.tasks()
    assert (info.name, info.state) == ("stuck", "left running")
    assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8  # another thread has taken its place
    gate.open()
    wait_until(lambda: not executor.tasks(), "the thread has ended")


def test_shutdown_does_not_wait_for_threads_that_were_left_running(make: Any, gate: Gate) -> None:
    for _ in range(20):
        with make(ThreadExecutor, 1) as executor:
            future = executor.options(timeout=0.005).submit(gate.wait)
            assert isinstance(future.exception(PATIENCE_S), TimeoutError)

    assert not (gate._folder / "open").exists()


@of_every_kind
def test_an_executor_that_nobody_holds_ends_its_workers(kind: Any) -> None:
    executor = kind(1, name="unheld")
    pid = executor.submit(os.getpid).result(PATIENCE_S)
    gone = weakref.ref(executor)

    del executor

    wait_until(lambda: gc.collect() is not None and gone() is None, "the executor is collected")
    wait_until(
        lambda: not any(thread.name.startswith("unheld") for thread in threading.enumerate()),
        "its threads have ended",
    )
    if kind is not ThreadExecutor:
        wait_until(lambda: not is_alive(pid), "its process has ended")


@of_processes
def test_after_shutdown_no_process_is_left(kind: Any) -> None:
    for _ in range(5):
        with kind(2) as executor:
            pids = {executor.submit(os.getpid).result(PATIENCE_S) for _ in range(2)}

        assert not any(map(is_alive, pids))


@of_every_kind
@pytest.mark.parametrize("where", ["call", "callback"])
def test_shutting_down_from_within_raises_instead_of_waiting_for_itself(
    make: Any, gate: Gate, kind: Any, where: str
) -> None:
    if where == "call" and kind is not ThreadExecutor:
        kind = ThreadExecutor  # the others' calls cannot have it
    executor = make(kind, 1)
    caught: list[BaseException] = []

    def shut_down(_: object = None) -> None:
        try:
            executor.shutdown()
        except RuntimeError as error:
            caught.append(error)

    if where == "call":
        executor.submit(shut_down).result(PATIENCE_S)
    else:
        future = executor.submit(gate.wait)
        future.add_done_callback(shut_down)
        gate.open()

    wait_until(lambda: caught, "it was refused")
    assert "cannot be shut down, waiting, from within" in str(caught[0])
    assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8


def test_a_process_that_dies_in_the_midst_of_a_message_is_dead_whoever_holds_its_connection(
    make: Any, tmp_path: Path
) -> None:
    noted = tmp_path / "pid"

    def die() -> None:
        if (pid := os.fork()) == 0:
            time.sleep(1000)
        noted.write_text(str(pid))
        frame = sys._getframe()
        while "connection" not in frame.f_locals:
            assert frame.f_back is not None
            frame = frame.f_back
        os.write(frame.f_locals["connection"].fileno(), struct.pack("!i", 1000) + b"R and no more")
        os.kill(os.getpid(), signal.SIGKILL)

    executor = make(ForkExecutor, 1)

    error = executor.submit(die).exception(PATIENCE_S)

    assert isinstance(error, JobExecutionError)
    assert error.returncode == -9
    wait_until(lambda: not is_alive(int(noted.read_text())), "the process that it has forked is gone")
    assert executor.submit(abs, -1).result(PATIENCE_S) == 1


def test_a_message_is_sent_piece_by_piece_and_never_waited_with() -> None:
    ours, theirs = multiprocessing.Pipe()
    line = Line(ours)
    long = os.urandom(3_000_000)
    with ours, theirs:
        pieces = line.framed(long)
        assert not line.push(pieces)  # it is more than the system takes at once, and nobody reads
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(theirs.recv_bytes()))
        reader.start()
        wait_until(lambda: line.push(pieces), "all of it has been sent")
        reader.join(PATIENCE_S)
        assert received == [long]
        theirs.close()
        with pytest.raises(OSError):
            line.push(line.framed(b"nobody is there"))
        line.close()


@pytest.mark.parametrize("how", ["timeout", "stop"])
def test_a_call_can_be_ended_while_its_arguments_are_on_their_way(how: str) -> None:
    with ProcessExecutor(1) as executor:
        pid = executor.submit(os.getpid).result(PATIENCE_S)
        os.kill(pid, signal.SIGSTOP)  # it reads no more than the system keeps for it
        call = executor.options(timeout=0.5 if how == "timeout" else None).submit(len, bytes(50_000_000))
        if how == "stop":
            wait_until(call.running, "it has begun")
            executor.stop(call)
        error = call.exception(PATIENCE_S)

        assert isinstance(error, TimeoutError if how == "timeout" else JobExecutionError)
        assert not is_alive(pid)
        assert executor.submit(abs, -1).result(PATIENCE_S) == 1


def test_a_context_filter_need_not_be_hashable() -> None:
    class Filter:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, context: Any) -> Any:
            return {name: value for name, value in context.items() if name == "a"}

    with ProcessExecutor(1, context={"a": 1, "b": 2}) as executor:
        calls = [
            executor.options(context_filter=Filter()).submit(lambda: dict(current_context())) for _ in "12"
        ]
        assert [call.result(PATIENCE_S) for call in calls] == [{"a": 1}, {"a": 1}]


def read(line: Line) -> memoryview | None:
    """The next message, if it is there; it may have come together with the one before."""
    message = line.next()
    while message is None and line.fetch():
        message = line.next()
    return message


def test_messages_of_any_size_arrive_whole() -> None:
    ours, theirs = multiprocessing.Pipe()
    incoming = Line(ours)
    long = b"body" * 50_000

    with ours, theirs:
        assert read(incoming) is None
        theirs.send_bytes(b"one")
        theirs.send_bytes(b"two")
        assert [bytes(read(incoming) or b""), bytes(read(incoming) or b"")] == [b"one", b"two"]
        for part in (
            struct.pack("!i", -1),
            struct.pack("!Q", len(long))[:3],
            struct.pack("!Q", len(long))[3:],
        ):
            os.write(theirs.fileno(), part)
            assert read(incoming) is None
        sender = threading.Thread(target=os.write, args=(theirs.fileno(), long))
        sender.start()
        messages: list[bytes] = []
        wait_until(lambda: messages.extend(filter(None, [read(incoming)])) or messages, "it has arrived")
        sender.join()
        assert messages == [long]
        theirs.close()
        with pytest.raises(EOFError):
            read(incoming)
        incoming.close()


def test_ever_new_filters_of_the_context_are_no_burden(make: Any) -> None:
    executor = make(ProcessExecutor, 1, context={"a": 1})

    def read() -> tuple[int, int]:
        return os.getpid(), current_context()["a"]

    answers = [
        executor.options(context_filter=lambda context, n=n: {"a": n}).submit(read).result(PATIENCE_S)
        for n in range(40)
    ]

    assert [value for _, value in answers] == list(range(40))
    assert len({pid for pid, _ in answers}) == 2


# What is shared


@pytest.mark.parametrize("kind", [SerialExecutor, ThreadExecutor])
def test_threads_share_the_very_context(kind: Any) -> None:
    context: dict[str, Any] = {"seen": []}
    with kind(1, context=context) as executor:
        executor.submit(lambda: current_context()["seen"].append(1)).result(PATIENCE_S)

        assert executor.submit(current_context).result(PATIENCE_S) is context
    assert context == {"seen": [1]}


def test_forks_see_memory_as_of_the_calls_start_and_leave_nothing(make: Any) -> None:
    seen = [1]
    context: dict[str, Any] = {"seen": seen}
    executor = make(ForkExecutor, 1, context=context)

    def add() -> tuple[list[int], list[int]]:
        seen.append(len(seen) + 1)
        return seen, current_context()["seen"]

    assert executor.submit(add).result(PATIENCE_S) == ([1, 2], [1, 2])
    assert executor.submit(add).result(PATIENCE_S) == ([1, 2], [1, 2])
    seen.append(7)
    assert executor.submit(add).result(PATIENCE_S) == ([1, 7, 3], [1, 7, 3])
    assert seen == [1, 7]


def test_forks_need_no_pickling_but_of_results(make: Any) -> None:
    lock = threading.Lock()
    executor = make(ForkExecutor, 1, context={"lock": lock})

    assert executor.submit(lambda given: given.locked(), lock).result(PATIENCE_S) is False
    assert executor.submit(lambda: bool(current_context()["lock"].locked())).result(PATIENCE_S) is False


@pytest.mark.parametrize(("kind", "second"), [(ProcessExecutor, [1, 2, 2]), (SpawnExecutor, [1, 2])])
def test_processes_have_copies_of_the_context(make: Any, kind: Any, second: list[int]) -> None:
    context: dict[str, Any] = {"seen": [1]}
    executor = make(kind, 1, context=context)

    def add() -> list[int]:
        current_context()["seen"].append(2)
        return list(current_context()["seen"])

    assert executor.submit(add).result(PATIENCE_S) == [1, 2]
    assert executor.submit(add).result(PATIENCE_S) == second  # one copy per worker
    assert context == {"seen": [1]}


@pytest.mark.parametrize("kind", [ProcessExecutor, SpawnExecutor])
def test_what_cannot_be_pickled_is_named(make: Any, kind: Any) -> None:
    executor = make(kind, 1, context={"lock": threading.Lock()})
    bad = threading.Lock()

    for args, kwargs, name in [((1, bad), {}, "argument 1"), ((), {"key": bad}, "argument 'key'")]:
        error = executor.options(context_filter=()).submit(print, *args, **kwargs).exception(PATIENCE_S)
        assert isinstance(error, ExecutorError)
        assert f"{name}" in str(error)
        assert "lock" in error.type_name
    error = executor.options(context_filter=()).submit(lambda: bad).exception(PATIENCE_S)
    assert isinstance(error, ExecutorError)
    assert "the function" in str(error)
    error = executor.submit(abs, 1).exception(PATIENCE_S)
    assert isinstance(error, ExecutorError)
    assert "A context_filter leaves out what cannot" in str(error)


def test_a_fork_cannot_submit_to_the_executor_that_runs_it(make: Any) -> None:
    executor = make(ForkExecutor, 1)

    error = executor.submit(lambda: executor.submit(abs, 1)).exception(PATIENCE_S)

    assert isinstance(error, RuntimeError)
    assert "a forked child of it cannot submit to it" in str(error)


@pytest.mark.parametrize("kind", [ProcessExecutor, SpawnExecutor])
def test_an_executor_cannot_be_sent_to_its_own_workers(make: Any, kind: Any) -> None:
    executor = make(kind, 1)

    error = executor.submit(lambda: executor.submit(abs, 1)).exception(PATIENCE_S)

    assert isinstance(error, ExecutorError)
    assert "cannot be pickled" in str(error)


def test_calls_nest_as_deep_as_they_like_in_one_thread(make: Any) -> None:
    executor = make(ThreadExecutor, 1)

    def nest(depth: int) -> int:
        if not depth:
            return 0
        inner = [executor.submit(nest, depth - 1) for _ in range(2)]
        futures.wait(inner)
        return 1 + max(future.result() for future in inner)

    assert executor.submit(nest, 6).result(PATIENCE_S) == 6
    assert [future.result(PATIENCE_S) for future in [executor.submit(nest, 3) for _ in range(5)]] == [3] * 5


@of_every_kind
def test_futures_of_other_executors_are_arguments_as_well(make: Any, kind: Any) -> None:
    executor = make(kind, 1)
    with ThreadExecutor(1) as other, futures.ThreadPoolExecutor(1) as third:
        future = executor.submit(pow, other.submit(abs, -2), exp=third.submit(abs, -3))

        assert future.result(PATIENCE_S) == 8


# Forks of a busy process


def test_forks_start_whatever_other_threads_are_doing(make: Any) -> None:
    executor = make(ForkExecutor, 2)
    busy = threading.Event()
    logger = logging.getLogger("busy")
    logger.addHandler(logging.NullHandler())

    def be_busy() -> None:
        while not busy.is_set():
            logger.warning("busy")
            multiprocessing.current_process()
            print("", end="", flush=True)

    threads = [threading.Thread(target=be_busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert list(executor.map(abs, range(60))) == list(range(60))
    finally:
        busy.set()
        for thread in threads:
            thread.join()


def test_a_fork_does_not_wait_for_its_parents_executors_when_it_ends(make: Any) -> None:
    make(ThreadExecutor, 1).submit(abs, 1).result(PATIENCE_S)
    executor = make(ForkExecutor, 1)

    assert executor.submit(lambda: len(leaving._Known.holders)).result(PATIENCE_S) == 0


# Logs that cannot be


@of_processes
def test_a_log_record_that_cannot_be_read_loses_itself_alone(
    make: Any, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            return int, ("not a number",)

    def talk() -> str:
        logging.getLogger("odd").warning("with an odd extra", extra={"odd": Odd()})
        logging.getLogger("odd").warning("with a lock", extra={"lock": threading.Lock()})
        return "said"

    executor = make(kind, 1)

    assert executor.submit(talk).result(PATIENCE_S) == "said"
    assert executor.submit(abs, -1).result(PATIENCE_S) == 1
    assert [record.getMessage() for record in caplog.records if record.name == "odd"] == ["with a lock"]
    assert "a log record of a worker process, that cannot be unpickled, is lost" in caplog.text


@of_processes
def test_a_log_handler_that_raises_fails_no_call(
    make: Any, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the disk is full")

    handler = Raising()
    logging.getLogger("raising").addHandler(handler)
    try:
        executor = make(kind, 1)

        def talk() -> str:
            logging.getLogger("raising").warning("hello")
            return "said"

        assert executor.submit(talk).result(PATIENCE_S) == "said"
        assert executor.submit(abs, -1).result(PATIENCE_S) == 1
    finally:
        logging.getLogger("raising").removeHandler(handler)
    assert "'hello', is lost: OSError('the disk is full')" in caplog.text


def test_a_view_keeps_its_own_options_when_others_are_fitted() -> None:
    with ThreadExecutor(2) as executor:
        view, reduced = executor.options(queue="gpu", timeout="5s").fitting(cpus=1)

        assert isinstance(view, View)
        assert (view._options.queue, view._options.timeout, view._options.cpus) == ("gpu", 5, 1)
    assert reduced == []
