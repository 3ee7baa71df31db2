"""What every executor has to do, as tests: derive a class, name the executor, and pytest has them all.

    from fractal_runner.testing import ExecutorConformance

    class TestMyExecutor(ExecutorConformance):
        executor_class = MyExecutor

Nothing but pytest is needed. Functions that are sent to workers are closures, which travel by value: a
worker need not have this module's imports.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.base import Executor
from fractal_runner.executors.calls import current_context

Test = TypeVar("Test", bound=Callable[..., Any])

PATIENCE_S = 60.0  # nothing takes that long; what does, hangs
CAPABILITIES = ("additions", "asynchronous", "isolates", "kills")


def needs(*capabilities: str) -> Callable[[Test], Test]:
    """Mark a test as one for executors with these capabilities.

    Args:
        capabilities: of "asynchronous", "isolates" and "kills", which are attributes of
            `fractal_runner.executors.base.Executor`, and "additions": that the executor is one.

    Raises:
        ValueError: for a word that is none of these.
    """
    if unknown := set(capabilities) - set(CAPABILITIES):
        raise ValueError(f"{sorted(unknown)} are no capabilities: known are {CAPABILITIES}")

    def mark(test: Test) -> Test:
        test.needs = frozenset(capabilities)  # type: ignore[attr-defined]
        return test

    return mark


class Gate:
    """Holds calls up until it is opened, and counts those that have come to it.

    It is made of files, so that calls may run anywhere where the folder is seen.

    Attributes:
        wait: a function for calls: it waits, and returns what it was given.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.wait = _waiting(str(folder), PATIENCE_S)

    def open(self) -> None:
        """Let all calls pass, now and from now on."""
        (self._folder / "open").touch()

    def arrived(self) -> list[int]:
        """The processes of the calls that have come, each as often as it came."""
        names = sorted(path.name for path in self._folder.glob("here-*"))
        return [int(name.split("-")[1]) for name in names]

    def await_arrivals(self, count: int) -> list[int]:
        """Wait until that many have come."""
        wait_until(lambda: len(self.arrived()) >= count, f"{count} call(s) have started")
        return self.arrived()


def _waiting(folder: str, patience: float) -> Callable[..., Any]:
    def wait(value: Any = None) -> Any:
        Path(folder, f"here-{os.getpid()}-{uuid.uuid4().hex}").touch()
        deadline = time.monotonic() + patience
        while not Path(folder, "open").exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the gate was not opened")
            time.sleep(0.005)
        return value

    return wait


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = PATIENCE_S) -> None:
    """Look again and again, for up to `seconds`, whether `condition` holds.

    Raises:
        AssertionError: if it does not in the end, saying `what` was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"in {seconds:.0f} s it did not come to be that {what}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether the process runs: one that has ended and was not reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")


class ExecutorConformance:
    """The contract of executors. Tests that an executor cannot pass, as it says itself, are taken out.

    A subclass names its `executor_class`, or says how one is made (`make_executor`) and what it can do
    (`capabilities`).

    Attributes:
        executor_class: a class that takes `max_workers`, and as many of the base's options as are used.
        capabilities: see `needs`; by default those that `executor_class` tells of.
        many: of how many calls tests are made that take many: fewer where a call is expensive.
        left_out: the tests that were taken out, and the capabilities that they need.
    """

    executor_class: ClassVar[Callable[..., futures.Executor] | None] = None
    capabilities: ClassVar[frozenset[str] | None] = None
    many: ClassVar[int] = 100
    left_out: ClassVar[dict[str, list[str]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if (able := cls.capabilities) is None:
            if cls.executor_class is None:
                return  # one to derive others from
            able = _capabilities_of(cls.executor_class)
        cls.left_out = {}
        for name in [name for name in dir(cls) if name.startswith("test_")]:
            needed: frozenset[str] = getattr(getattr(cls, name), "needs", frozenset())
            if missing := needed - able:
                setattr(cls, name, None)  # pytest collects what can be called
                cls.left_out[name] = sorted(missing)

    def make_executor(self, max_workers: int, **options: Any) -> Any:
        """A new executor of that many workers. The tests shut it down."""
        assert self.executor_class is not None, "name the executor_class, or override make_executor"
        return type(self).executor_class(max_workers=max_workers, **options)  # type: ignore[misc]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _tell_what_is_left_out(cls, request: pytest.FixtureRequest) -> None:
        if not cls.left_out:
            return
        tests = "".join(f"\n  {name}: needs {', '.join(words)}" for name, words in cls.left_out.items())
        capture = request.config.pluginmanager.get_plugin("capturemanager")
        assert capture is not None
        with capture.global_and_fixture_disabled():
            print(f"\n{cls.__name__} leaves out {len(cls.left_out)} test(s):{tests}")

    @pytest.fixture
    def make(self) -> Iterator[Callable[..., Any]]:
        """Makes executors, which are stopped and shut down after the test."""
        made: list[Any] = []

        def make(max_workers: int = 2, **options: Any) -> Any:
            made.append(self.make_executor(max_workers, **options))
            return made[-1]

        yield make
        for executor in made:
            if isinstance(executor, Executor):
                executor.stop()
            executor.shutdown()

    @pytest.fixture
    def executor(self, make: Callable[..., Any]) -> Any:
        """One of two workers."""
        return make(2)

    @pytest.fixture
    def gate(self, tmp_path: Path) -> Iterator[Gate]:
        """Where calls wait; opened after the test."""
        gate = Gate(tmp_path / "gate")
        yield gate
        gate.open()

    # Calls and their futures

    def test_the_future_of_a_call_has_its_result(self, executor: Any) -> None:
        future = executor.submit(pow, 2, exp=5)

        assert isinstance(future, Future)
        assert future.result(PATIENCE_S) == 32
        assert future.done()
        assert not future.cancelled()
        assert not future.running()
        assert future.exception() is None

    def test_keyword_arguments_of_any_name_reach_the_call(self, executor: Any) -> None:
        given = {"fn": 1, "self": 2, "timeout": 3, "executor": 4, "call": 5, "args": 6, "kwargs": 7}

        assert executor.submit(lambda **named: named, **given).result(PATIENCE_S) == given

    def test_many_calls_each_have_their_own_result(self, executor: Any) -> None:
        submitted = [executor.submit(lambda number: number * 2, number) for number in range(self.many)]

        assert [future.result(PATIENCE_S) for future in submitted] == [2 * n for n in range(self.many)]

    def test_an_exception_keeps_its_type_and_arguments(self, executor: Any) -> None:
        future = executor.submit(_raiser(KeyError("nothing", 3)))

        with pytest.raises(KeyError) as caught:
            future.result(PATIENCE_S)
        assert type(caught.value) is KeyError
        assert caught.value.args == ("nothing", 3)
        assert isinstance(future.exception(), KeyError)

    def test_a_call_that_raises_harms_no_other(self, executor: Any) -> None:
        failing = [executor.submit(_raiser(ValueError(number))) for number in range(3)]

        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8
        assert [future.exception(PATIENCE_S).args for future in failing] == [(0,), (1,), (2,)]

    def test_system_exit_in_a_call_is_that_futures_alone(self, executor: Any) -> None:
        future = executor.submit(sys.exit, 3)

        assert isinstance(future.exception(PATIENCE_S), SystemExit)
        assert future.exception().code == 3
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("asynchronous")
    def test_a_keyboard_interrupt_that_a_call_raises_is_that_futures_alone(self, executor: Any) -> None:
        future = executor.submit(_raiser(KeyboardInterrupt()))

        assert isinstance(future.exception(PATIENCE_S), KeyboardInterrupt)
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("asynchronous")
    def test_submit_does_not_wait_for_the_work(self, executor: Any, gate: Gate) -> None:
        submitted = [executor.submit(gate.wait, number) for number in range(4)]

        gate.await_arrivals(2)
        assert not any(future.done() for future in submitted)
        assert [future.running() for future in submitted[2:]] == [False, False]
        gate.open()
        assert [future.result(PATIENCE_S) for future in submitted] == [0, 1, 2, 3]

    @needs("asynchronous")
    def test_a_result_that_is_not_there_in_time_is_a_timeout_error(self, executor: Any, gate: Gate) -> None:
        future = executor.submit(gate.wait, 1)

        with pytest.raises(TimeoutError):
            future.result(0.01)
        gate.open()
        assert future.result(PATIENCE_S) == 1

    def test_callbacks_are_called_once_with_the_future(self, executor: Any) -> None:
        called: list[Any] = []
        future = executor.submit(pow, 2, 5)

        future.add_done_callback(called.append)
        future.result(PATIENCE_S)
        wait_until(lambda: called, "the callback was called")
        future.add_done_callback(called.append)

        assert called == [future, future]

    def test_a_callback_that_raises_harms_nothing(
        self, executor: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL, "concurrent.futures")  # which tells of it
        called: list[Any] = []
        future = executor.submit(pow, 2, 5)
        future.add_done_callback(lambda _: 1 / 0)
        future.add_done_callback(called.append)

        assert executor.submit(pow, 2, 6).result(PATIENCE_S) == 64
        assert future.result(PATIENCE_S) == 32
        wait_until(lambda: called, "the second callback was called")

    def test_wait_and_as_completed_give_every_future(self, executor: Any) -> None:
        submitted = {executor.submit(pow, 2, number) for number in range(5)}

        assert set(futures.as_completed(submitted, PATIENCE_S)) == submitted
        assert futures.wait(submitted, PATIENCE_S, return_when=ALL_COMPLETED).done == submitted

    @needs("asynchronous")
    def test_wait_returns_at_the_first_one(self, executor: Any, gate: Gate) -> None:
        held, free = executor.submit(gate.wait), executor.submit(pow, 2, 3)

        done, others = futures.wait({held, free}, PATIENCE_S, return_when=FIRST_COMPLETED)

        assert (done, others) == ({free}, {held})

    def test_arguments_and_results_are_let_go_of(self, executor: Any) -> None:
        class Thing:
            pass

        thing = Thing()
        future = executor.submit(lambda given: Thing(), thing)
        result = future.result(PATIENCE_S)
        left = [weakref.ref(thing), weakref.ref(result), weakref.ref(future)]

        del thing, result, future

        wait_until(
            lambda: gc.collect() is not None and not any(ref() for ref in left),
            "nothing keeps argument, result and future",
        )

    def test_an_exception_is_let_go_of(self, executor: Any) -> None:
        class Odd(Exception):
            pass

        future = executor.submit(_raiser(Odd()))
        left = [weakref.ref(future.exception(PATIENCE_S)), weakref.ref(future)]

        del future

        wait_until(
            lambda: gc.collect() is not None and not any(ref() for ref in left),
            "nothing keeps exception and future",
        )

    def test_calls_may_come_from_several_threads(self, executor: Any) -> None:
        def submit(number: int, results: list[Any]) -> None:
            results.extend(executor.submit(pow, number, 2).result(PATIENCE_S) for _ in range(3))

        results: list[list[Any]] = [[] for _ in range(4)]
        threads = [threading.Thread(target=submit, args=(n, results[n])) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)

        assert results == [[0] * 3, [1] * 3, [4] * 3, [9] * 3]

    def test_another_thread_may_make_it_use_it_and_shut_it_down(self, make: Callable[..., Any]) -> None:
        results: list[Any] = []

        def use() -> None:
            with make(2) as executor:
                results.extend(executor.map(pow, (2, 3), (2, 2)))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join(PATIENCE_S)

        assert results == [4, 9]

    def test_it_serves_an_event_loop(self, executor: Any) -> None:
        async def use() -> list[Any]:
            loop = asyncio.get_running_loop()
            calls = [loop.run_in_executor(executor, pow, 2, number) for number in range(4)]
            return await asyncio.gather(*calls)

        assert asyncio.run(use()) == [1, 2, 4, 8]

    # map

    def test_map_gives_results_in_order(self, executor: Any) -> None:
        def square(number: int) -> int:
            time.sleep(0.02 * (number % 2))  # the odd ones come later
            return number**2

        assert list(executor.map(square, range(6))) == [0, 1, 4, 9, 16, 25]

    def test_map_over_nothing_is_empty(self, executor: Any) -> None:
        assert list(executor.map(pow, [], [])) == []

    def test_map_ends_with_the_shortest_iterable(self, executor: Any) -> None:
        assert list(executor.map(pow, [2, 3, 4], [1, 2])) == [2, 9]

    def test_map_raises_at_the_place_of_the_call_that_raised(self, executor: Any) -> None:
        results = executor.map(lambda number: 6 // number, [2, 1, 0])

        assert (next(results), next(results)) == (3, 6)
        with pytest.raises(ZeroDivisionError):
            next(results)

    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_map_by_chunks_gives_the_same(self, executor: Any, size: int) -> None:
        assert list(executor.map(pow, range(5), [2] * 5, chunksize=size)) == [0, 1, 4, 9, 16]

    @needs("asynchronous")
    def test_map_raises_when_its_time_is_over(self, executor: Any, gate: Gate) -> None:
        with pytest.raises(TimeoutError):
            list(executor.map(gate.wait, [1, 2, 3], timeout=0.05))
        gate.open()

    @needs("additions", "asynchronous")
    def test_an_abandoned_map_cancels_what_has_not_started(
        self, make: Callable[..., Any], gate: Gate
    ) -> None:
        executor = make(1)
        results = executor.map(lambda number: gate.wait(number) if number else number, range(5))

        assert next(results) == 0
        gate.await_arrivals(1)
        results.close()

        assert executor.pending_count() == 1

    @needs("additions")
    @pytest.mark.parametrize("chunksize", [1, 3])
    def test_map_with_a_buffer_reads_only_so_far(self, executor: Any, chunksize: int) -> None:
        read: list[int] = []

        def numbers() -> Iterator[int]:
            for number in range(20):
                read.append(number)
                yield number

        results = executor.map(abs, numbers(), buffersize=4, chunksize=chunksize)
        ahead = 4 if chunksize == 1 else 6  # whole chunks

        assert len(read) == ahead
        assert next(results) == 0
        assert len(read) == ahead + chunksize
        assert list(results) == list(range(1, 20))

    @needs("additions")
    def test_map_with_a_buffer_takes_endless_iterables(self, executor: Any) -> None:
        import itertools

        results = executor.map(abs, itertools.count(), buffersize=2)

        assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
        results.close()

    @needs("additions")
    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"chunksize": 0}, ValueError),
            ({"chunksize": -1}, ValueError),
            ({"buffersize": 0}, ValueError),
            ({"buffersize": -3}, ValueError),
            ({"buffersize": "2"}, TypeError),
        ],
    )
    def test_map_refuses_wrong_sizes_at_once(
        self, executor: Any, options: dict[str, Any], error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            executor.map(abs, [1], **options)

    # shutdown and cancel

    @pytest.mark.parametrize("number", [0, -1])
    def test_fewer_than_one_worker_are_refused(self, number: int) -> None:
        with pytest.raises(ValueError, match="max_workers"):
            self.make_executor(number)

    def test_submit_after_shutdown_is_refused(self, executor: Any) -> None:
        executor.shutdown()

        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(pow, 2, 3)
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.map(abs, [1])

    def test_shutting_down_twice_is_fine(self, executor: Any) -> None:
        executor.submit(pow, 2, 3)

        executor.shutdown()
        executor.shutdown()
        executor.shutdown(wait=False)

    def test_what_was_never_used_can_be_shut_down(self, executor: Any) -> None:
        with executor as entered:
            assert entered is executor

    def test_leaving_the_with_block_waits_for_all_calls(self, make: Callable[..., Any]) -> None:
        with make(2) as executor:
            submitted = [executor.submit(time.sleep, 0.02) for _ in range(4)]

        assert all(future.done() for future in submitted)

    @needs("asynchronous")
    def test_shutdown_without_waiting_lets_all_calls_finish(self, executor: Any, gate: Gate) -> None:
        submitted = [executor.submit(gate.wait, number) for number in range(4)]

        executor.shutdown(wait=False)
        gate.open()

        assert [future.result(PATIENCE_S) for future in submitted] == [0, 1, 2, 3]

    @needs("asynchronous")
    def test_shutdown_may_cancel_what_has_not_started(self, make: Callable[..., Any], gate: Gate) -> None:
        executor = make(1)
        running, *others = [executor.submit(gate.wait, number) for number in range(4)]
        gate.await_arrivals(1)

        executor.shutdown(wait=False, cancel_futures=True)

        assert all(future.cancelled() for future in others)
        gate.open()
        assert running.result(PATIENCE_S) == 0

    @needs("additions", "asynchronous")
    def test_who_waits_for_what_a_shutdown_cancels_is_told_at_once(
        self, make: Callable[..., Any], gate: Gate
    ) -> None:
        executor = make(1)
        _, *others = [executor.submit(gate.wait, number) for number in range(4)]
        gate.await_arrivals(1)

        executor.shutdown(wait=False, cancel_futures=True)

        assert set(futures.as_completed(others, PATIENCE_S)) == set(others)
        assert futures.wait(others, PATIENCE_S).done == set(others)

    @needs("asynchronous")
    def test_who_submits_while_it_is_shut_down_is_refused_or_served(self, make: Callable[..., Any]) -> None:
        for _ in range(5):
            executor = make(2)
            submitted: list[Future[Any]] = []
            refused: list[BaseException] = []
            arguments = executor, submitted, refused
            threads = [threading.Thread(target=_submit_until_refused, args=arguments) for _ in range(3)]
            for thread in threads:
                thread.start()
            wait_until(submitted.__len__, "calls are submitted")
            executor.shutdown(cancel_futures=True)
            for thread in threads:
                thread.join(PATIENCE_S)

            assert [type(error) for error in refused] == [RuntimeError] * 3
            assert all(future.done() for future in submitted)

    @needs("asynchronous")
    def test_what_has_not_started_can_be_cancelled_and_never_runs(
        self, make: Callable[..., Any], gate: Gate, tmp_path: Path
    ) -> None:
        executor = make(1)
        running = executor.submit(gate.wait, 1)
        gate.await_arrivals(1)
        other = executor.submit((tmp_path / "ran").touch)

        assert other.cancel()
        assert other.cancel()
        assert not running.cancel()
        gate.open()

        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8
        assert running.result(PATIENCE_S) == 1
        assert not (tmp_path / "ran").exists()
        with pytest.raises(futures.CancelledError):
            other.result(PATIENCE_S)

    @needs("additions", "asynchronous")
    def test_who_waits_for_a_cancelled_future_is_told_at_once(
        self, make: Callable[..., Any], gate: Gate
    ) -> None:
        executor = make(1)
        executor.submit(gate.wait)
        gate.await_arrivals(1)
        called: list[Any] = []
        others = [executor.submit(abs, number) for number in range(3)]
        others[0].add_done_callback(called.append)

        others[0].cancel()
        assert executor.cancel() == 2

        assert called == [others[0]]
        assert futures.wait(others, PATIENCE_S).done == set(others)
        assert set(futures.as_completed(others, PATIENCE_S)) == set(others)
        assert executor.pending_count() == 1

    # Several futures together

    @needs("additions")
    def test_completed_gives_each_future_once(self, executor: Any) -> None:
        submitted = {executor.submit(pow, 2, number) for number in range(5)}

        assert sorted(future.result() for future in executor.completed(PATIENCE_S)) == [1, 2, 4, 8, 16]
        assert list(executor.completed(PATIENCE_S)) == []
        assert all(future.done() for future in submitted)

    @needs("additions")
    def test_completed_leaves_out_futures_whose_results_were_asked_for(self, executor: Any) -> None:
        asked, other = executor.submit(pow, 2, 1), executor.submit(pow, 2, 2)
        asked.result(PATIENCE_S)

        assert list(executor.completed(PATIENCE_S)) == [other]

    @needs("additions", "asynchronous")
    def test_completed_never_gives_cancelled_futures_and_ends(
        self, make: Callable[..., Any], gate: Gate
    ) -> None:
        executor = make(1)
        first = executor.submit(gate.wait)
        gate.await_arrivals(1)
        others = [executor.submit(abs, number) for number in range(3)]
        others[1].cancel()
        gate.open()

        assert set(executor.completed(PATIENCE_S)) == {first, others[0], others[2]}

    @needs("additions", "asynchronous")
    def test_completed_raises_when_its_time_is_over(self, executor: Any, gate: Gate) -> None:
        executor.submit(gate.wait)

        with pytest.raises(TimeoutError, match="1 call"):
            next(executor.completed(0.05))

    @needs("additions", "asynchronous")
    def test_pending_are_those_that_have_neither_finished_nor_been_cancelled(
        self, executor: Any, gate: Gate
    ) -> None:
        submitted = [executor.submit(gate.wait, number) for number in range(4)]
        gate.await_arrivals(2)

        assert executor.pending_count() == 4
        assert executor.cancel() == 2
        assert executor.pending_count() == 2
        gate.open()
        for future in submitted[:2]:
            future.result(PATIENCE_S)
        assert executor.pending_count() == 0

    @needs("additions", "asynchronous")
    def test_tasks_tell_what_runs_and_what_waits(self, make: Callable[..., Any], gate: Gate) -> None:
        executor = make(1)
        executor.options(name="first", key="k/1").submit(gate.wait)
        gate.await_arrivals(1)
        executor.options(name="second").submit(gate.wait)

        running, pending = executor.tasks()

        assert (running.name, running.state, running.key) == ("first", "running", "k/1")
        assert running.submitted <= running.started <= time.time()
        assert running.host
        assert (pending.name, pending.state, pending.started, pending.pid) == (
            "second",
            "pending",
            None,
            None,
        )
        assert running.id != pending.id
        gate.open()
        assert len(list(executor.completed(PATIENCE_S))) == 2
        assert executor.tasks() == []

    # Options

    @needs("additions")
    def test_options_make_views_of_the_same_executor(self, executor: Any) -> None:
        view = executor.options(name="a").options(key="b")

        assert view.submit(pow, 2, 3).result(PATIENCE_S) == 8
        assert list(view.map(abs, [-1, -2])) == [1, 2]
        assert asyncio.run(view.run(abs, -4)) == 4
        assert (view.name, view.max_workers) == (executor.name, executor.max_workers)
        view.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(abs, 1)

    @needs("additions", "asynchronous")
    def test_views_add_to_each_others_options(self, executor: Any, gate: Gate) -> None:
        view = executor.options(name="a", key="b").options(name="c")

        view.submit(gate.wait)
        executor.submit(gate.wait)

        gate.await_arrivals(2)
        assert {(info.name, info.key) for info in view.tasks()} == {
            ("c", "b"),
            ("_waiting.<locals>.wait", None),
        }
        assert view.pending_count() == 2

    @needs("additions")
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"memroy": "4GB"}, TypeError, "did you mean 'memory'?"),
            ({"memory": "much"}, ValueError, "memory: 'much' is not a size"),
            ({"memory": -1}, ValueError, "memory: -1 is not a size"),
            ({"time": "soon"}, ValueError, "time: 'soon' is not a time"),
            ({"timeout": 0}, ValueError, "timeout: 0 is not a time"),
            ({"cpus": 0}, ValueError, "cpus: 0 is not a whole number of at least 1"),
            ({"cpus": "1"}, ValueError, "cpus: '1' is not a whole number"),
            ({"name": ""}, ValueError, "name: '' is not a text"),
            ({"context_filter": "abc"}, ValueError, "context_filter: 'abc' is neither a function nor a coll"),
            ({"extra": 3}, ValueError, "extra: 3 is not a mapping"),
        ],
    )
    def test_wrong_options_are_refused_at_once(
        self, executor: Any, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error) as caught:
            executor.options(**options)

        assert message in str(caught.value)
        with pytest.raises(error):
            executor.options(name="a").options(**options)

    # Futures as arguments, and calls from within calls

    @needs("additions")
    def test_futures_among_the_arguments_are_replaced_by_their_results(self, executor: Any) -> None:
        two, three = executor.submit(abs, -2), executor.submit(abs, -3)

        assert executor.submit(pow, two, exp=three).result(PATIENCE_S) == 8

    @needs("additions", "asynchronous")
    def test_a_call_that_waits_for_an_argument_takes_no_worker(
        self, make: Callable[..., Any], gate: Gate
    ) -> None:
        executor, other = make(1), futures.ThreadPoolExecutor(1)
        with other:
            argument = other.submit(gate.wait, 2)
            waiting = executor.submit(pow, argument, 3)

            assert executor.submit(abs, -1).result(PATIENCE_S) == 1
            assert not waiting.running()
            gate.open()
            assert waiting.result(PATIENCE_S) == 8

    @needs("additions")
    def test_a_failed_argument_fails_the_call_with_the_same_exception(self, executor: Any) -> None:
        failed = executor.submit(_raiser(ValueError("no")))

        future = executor.submit(pow, 2, failed)

        assert future.exception(PATIENCE_S) is failed.exception()

    @needs("additions")
    def test_a_cancelled_argument_cancels_the_call(self, executor: Any) -> None:
        argument: Future[int] = Future()
        future = executor.submit(pow, argument, exp=argument)
        argument.cancel()
        argument.set_running_or_notify_cancel()

        with pytest.raises(futures.CancelledError):
            future.result(PATIENCE_S)
        assert executor.pending_count() == 0

    @needs("additions")
    def test_a_call_that_waits_for_an_argument_can_be_cancelled(self, executor: Any) -> None:
        argument: Future[int] = Future()
        future = executor.submit(abs, argument)

        assert executor.cancel() == 1
        argument.set_result(3)

        assert future.cancelled()
        assert executor.submit(abs, -1).result(PATIENCE_S) == 1

    @needs("additions")
    def test_calls_from_within_calls_finish_or_are_refused_at_once(self, make: Callable[..., Any]) -> None:
        executor = make(1)

        def nest(depth: int) -> Any:
            if depth == 0:
                return 0
            inner = [executor.submit(nest, depth - 1) for _ in range(2)]
            futures.wait(inner[:1])
            return 1 + max(future.result() for future in futures.as_completed(inner))

        future = executor.submit(nest, 3)

        if (error := future.exception(PATIENCE_S)) is None:
            assert future.result() == 3
        else:
            assert isinstance(error, (ExecutorError, RuntimeError, TypeError)), error
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    # Ends that come from outside

    @needs("additions", "asynchronous")
    def test_stop_ends_what_has_not_started_and_what_runs(self, executor: Any, gate: Gate) -> None:
        submitted = [executor.submit(gate.wait, number) for number in range(4)]
        gate.await_arrivals(2)

        assert executor.stop() == 4

        assert futures.wait(submitted, PATIENCE_S).done == set(submitted)
        for future in submitted[:2]:
            with pytest.raises(JobExecutionError, match="was stopped") as caught:
                future.result()
            assert caught.value.reason == "CANCELLED"
        assert all(future.cancelled() for future in submitted[2:])
        assert executor.pending_count() == 0
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("additions", "asynchronous")
    def test_stop_ends_the_calls_it_is_given_and_no_others(self, executor: Any, gate: Gate) -> None:
        submitted = [executor.submit(gate.wait, number) for number in range(4)]
        gate.await_arrivals(2)

        assert executor.stop(submitted[0], submitted[3]) == 2

        assert isinstance(submitted[0].exception(PATIENCE_S), JobExecutionError)
        assert submitted[3].cancelled()
        gate.open()
        assert [future.result(PATIENCE_S) for future in submitted[1:3]] == [1, 2]
        assert executor.stop(*submitted) == 0

    @needs("additions", "asynchronous")
    def test_cancelling_the_task_that_awaits_a_call_stops_it(self, executor: Any, gate: Gate) -> None:
        async def use() -> None:
            assert await executor.run(pow, 2, exp=3) == 8
            task = asyncio.create_task(executor.run(gate.wait))
            await asyncio.to_thread(gate.await_arrivals, 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(use())

        wait_until(lambda: executor.pending_count() == 0, "the call has ended")

    @needs("additions", "kills")
    @pytest.mark.parametrize("how", ["stop", "timeout"])
    def test_what_is_ended_is_gone_with_all_that_it_has_started(
        self, executor: Any, tmp_path: Path, how: str
    ) -> None:
        noted = tmp_path / "pids"

        def start_and_wait() -> None:
            child = subprocess.Popen(["sleep", "1000"])
            lost = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            noted.with_suffix(".new").write_text(f"{os.getpid()} {child.pid} {lost.pid}")
            noted.with_suffix(".new").rename(noted)
            time.sleep(1000)

        view = executor.options(timeout=3) if how == "timeout" else executor
        future = view.submit(start_and_wait)
        wait_until(noted.exists, "the call has started its children")
        if how == "stop":
            executor.stop(future)

        error = future.exception(PATIENCE_S)

        assert isinstance(error, TimeoutError if how == "timeout" else JobExecutionError)
        assert "start_and_wait" in str(error)
        pids = [int(pid) for pid in noted.read_text().split()]
        wait_until(lambda: not any(map(is_alive, pids)), "the processes are gone")
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("additions", "kills")
    def test_a_call_that_logs_without_end_can_be_ended(self, executor: Any) -> None:
        def talk() -> None:
            logger = logging.getLogger("conformance.endless")
            while True:
                logger.error("again")

        logger = logging.getLogger("conformance.endless")
        logger.addFilter(_nothing)
        try:
            error = executor.options(timeout=1).submit(talk).exception(PATIENCE_S)
        finally:
            logger.removeFilter(_nothing)

        assert isinstance(error, TimeoutError)

    @needs("additions", "kills")
    def test_a_call_within_its_timeout_is_left_alone(self, executor: Any) -> None:
        view = executor.options(timeout="1m")

        assert view.submit(pow, 2, 3).result(PATIENCE_S) == 8
        assert isinstance(view.submit(_raiser(KeyError(1))).exception(PATIENCE_S), KeyError)

    @needs("additions", "isolates")
    def test_a_dying_worker_fails_only_its_own_call(self, executor: Any, gate: Gate) -> None:
        held = executor.submit(gate.wait, 1)
        [pid] = gate.await_arrivals(1)
        killed = executor.submit(gate.wait, 2)
        gate.await_arrivals(2)
        [victim] = set(gate.arrived()) - {pid}

        os.kill(victim, signal.SIGKILL)

        with pytest.raises(JobExecutionError, match="SIGKILL") as caught:
            killed.result(PATIENCE_S)
        assert caught.value.returncode == -9
        assert not held.done()
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8
        gate.open()
        assert held.result(PATIENCE_S) == 1

    @needs("additions", "isolates")
    def test_a_worker_that_exits_fails_its_call_with_the_exit_code(self, executor: Any) -> None:
        error = executor.submit(os._exit, 3).exception(PATIENCE_S)

        assert isinstance(error, JobExecutionError)
        assert error.returncode == 3
        assert "exit code 3" in str(error)
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    # What travels between processes

    @needs("additions", "isolates")
    def test_an_exception_has_its_traceback_as_text_for_a_cause(self, executor: Any) -> None:
        def outer() -> None:
            def inner() -> None:
                raise LookupError("nothing there")

            inner()

        error = executor.submit(outer).exception(PATIENCE_S)

        assert type(error) is LookupError
        text = str(error.__cause__)
        assert "Traceback (most recent call last)" in text
        assert "in inner" in text
        assert "LookupError: nothing there" in text

    @needs("additions", "isolates")
    def test_a_result_that_cannot_be_pickled_is_named(self, executor: Any) -> None:
        error = executor.submit(threading.Lock).exception(PATIENCE_S)

        assert isinstance(error, ExecutorError)
        assert "lock" in str(error)
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("additions", "isolates")
    def test_a_result_that_cannot_be_unpickled_is_an_error(self, executor: Any) -> None:
        class Odd:
            def __reduce__(self) -> Any:
                return int, ("not a number",)

        error = executor.submit(Odd).exception(PATIENCE_S)

        assert isinstance(error, ExecutorError)
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("additions", "isolates")
    def test_an_exception_that_cannot_be_pickled_is_told(self, executor: Any) -> None:
        class Locked(Exception):
            def __init__(self) -> None:
                super().__init__("locked in")
                self.lock = threading.Lock()

        def fail() -> None:
            raise Locked

        _check_told(executor.submit(fail).exception(PATIENCE_S), "Locked", "locked in")
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("additions", "isolates")
    def test_an_exception_that_cannot_be_unpickled_is_told(self, executor: Any) -> None:
        class Two(Exception):
            def __init__(self, one: int, two: int) -> None:
                super().__init__(f"both {one} and {two}")

        def fail() -> None:
            raise Two(1, 2)

        _check_told(executor.submit(fail).exception(PATIENCE_S), "Two", "both 1 and 2")
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("additions")
    @pytest.mark.parametrize(
        ("args", "kwargs", "name"),
        [(("a", threading.Lock()), {}, "argument 1"), ((), {"key": threading.Lock()}, "argument 'key'")],
    )
    def test_an_argument_that_cannot_be_pickled_arrives_or_is_named(
        self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> None:
        future = executor.submit(lambda *given, **named: len(given) + len(named), *args, **kwargs)

        if (error := future.exception(PATIENCE_S)) is None:
            assert future.result() == len(args) + len(kwargs)
        else:
            assert isinstance(error, ExecutorError), error
            assert name in str(error)
            assert "lock" in str(error)
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    def test_large_arguments_and_results_arrive_whole(self, executor: Any) -> None:
        data = bytes(range(256)) * 2**14  # 4 MiB

        assert executor.submit(lambda given: given[::-1], data).result(PATIENCE_S) == data[::-1]

    @needs("additions", "isolates")
    def test_what_a_call_prints_is_in_its_futures_output(self, executor: Any) -> None:
        def talk() -> None:
            for number in range(20_000):
                print("line", number)

        future = executor.submit(talk)
        future.result(PATIENCE_S)

        assert future.output == "".join(f"line {number}\n" for number in range(20_000))
        quiet = executor.submit(abs, 1)
        quiet.result(PATIENCE_S)
        assert quiet.output == ""

    @needs("additions", "isolates")
    def test_the_output_has_all_streams_and_those_of_child_processes_in_order(self, executor: Any) -> None:
        def talk() -> None:
            print("one")
            print("two", file=sys.stderr)
            subprocess.run(["echo", "three"], check=True)
            os.write(1, b"four\n")
            print("five", end="")

        future = executor.submit(talk)
        future.result(PATIENCE_S)

        assert future.output == "one\ntwo\nthree\nfour\nfive"

    @needs("additions", "isolates")
    def test_the_output_of_a_call_that_failed_or_died_is_kept(self, executor: Any) -> None:
        def fail() -> None:
            print("before it failed")
            raise ValueError

        def die() -> None:
            print("before it died")
            os.kill(os.getpid(), 9)

        failed, died = executor.submit(fail), executor.submit(die)
        futures.wait([failed, died], PATIENCE_S)

        assert failed.output == "before it failed\n"
        assert died.output == "before it died\n"

    @needs("additions")
    def test_log_records_reach_the_logger_of_the_same_name_once_and_in_order(
        self, executor: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)

        def talk() -> None:
            logger = logging.getLogger("conformance.talk")
            for number in range(50):
                logger.info("record %d of %s", number, "fifty", extra={"number": number})
            try:
                raise LookupError("nothing there")
            except LookupError:
                logger.exception("it failed")

        executor.submit(talk).result(PATIENCE_S)

        records = [record for record in caplog.records if record.name == "conformance.talk"]
        assert [record.getMessage() for record in records[:-1]] == [f"record {n} of fifty" for n in range(50)]
        assert [record.number for record in records[:-1]] == list(range(50))  # type: ignore[attr-defined]
        assert {record.levelname for record in records[:-1]} == {"INFO"}
        assert records[-1].levelname == "ERROR"
        assert "LookupError: nothing there" in logging.Formatter().format(records[-1])

    @needs("additions")
    def test_only_records_of_the_levels_in_force_are_logged(
        self, executor: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        caplog.set_level(logging.ERROR, "conformance.terse")
        caplog.set_level(logging.DEBUG, "conformance.chatty")  # the last one is caplog's own, too

        def talk() -> list[bool]:
            loggers = [logging.getLogger(f"conformance.{name}") for name in ("chatty", "terse", "other")]
            for logger in loggers:
                for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
                    logger.log(level, "said")
            return [logger.isEnabledFor(logging.DEBUG) for logger in loggers]

        assert executor.submit(talk).result(PATIENCE_S) == [True, False, False]

        said = [(record.name.rpartition(".")[2], record.levelname) for record in caplog.records]
        assert [one for one in said if one[0] in ("chatty", "terse", "other")] == [
            *(("chatty", level) for level in ("DEBUG", "INFO", "WARNING", "ERROR")),
            ("terse", "ERROR"),
            *(("other", level) for level in ("WARNING", "ERROR")),
        ]

    @needs("additions")
    def test_a_worker_bears_the_name_of_its_call(self, executor: Any) -> None:
        def names() -> str:
            return threading.current_thread().name

        assert executor.options(name="unit 7").submit(names).result(PATIENCE_S) == "unit 7"
        assert "names" in executor.submit(names).result(PATIENCE_S)
        assert threading.current_thread().name != "unit 7"

    # The shared context

    @needs("additions")
    def test_calls_read_the_context(self, make: Callable[..., Any]) -> None:
        executor = make(1, context={"table": [1, 2, 3], "other": 4})

        def total() -> int:
            return int(sum(current_context()["table"]))

        assert executor.submit(total).result(PATIENCE_S) == 6
        assert executor.options(name="x").submit(total).result(PATIENCE_S) == 6

    @needs("additions")
    @pytest.mark.parametrize(
        ("chosen", "names"),
        [
            (("b", "a"), ["a", "b"]),
            ((), []),
            (lambda context: {"sum": context["a"] + context["b"]}, ["sum"]),
            (None, ["a", "b", "c"]),
        ],
    )
    def test_a_filter_chooses_what_of_the_context_a_call_gets(
        self, make: Callable[..., Any], chosen: Any, names: list[str]
    ) -> None:
        executor = make(1, context={"a": 1, "b": 2, "c": 3})

        view = executor.options(context_filter=chosen)

        assert view.submit(lambda: sorted(current_context())).result(PATIENCE_S) == names

    @needs("additions")
    def test_a_context_that_cannot_be_pickled_is_there_or_named(self, make: Callable[..., Any]) -> None:
        executor = make(1, context={"lock": threading.Lock(), "number": 3})

        def number() -> int:
            return int(current_context()["number"])

        future = executor.submit(number)

        if (error := future.exception(PATIENCE_S)) is None:
            assert future.result() == 3
        else:
            assert isinstance(error, ExecutorError), error
            assert "context" in str(error)
            assert "lock" in str(error)
        assert executor.options(context_filter=["number"]).submit(number).result(PATIENCE_S) == 3

    @needs("additions")
    def test_outside_of_a_call_there_is_no_context(self, make: Callable[..., Any]) -> None:
        make(1, context={"a": 1}).submit(abs, 1).result(PATIENCE_S)

        with pytest.raises(RuntimeError, match="no call in this thread"):
            current_context()


def _capabilities_of(executor_class: Any) -> frozenset[str]:
    if not (isinstance(executor_class, type) and issubclass(executor_class, Executor)):
        return frozenset({"asynchronous"})
    told = {word for word in CAPABILITIES if getattr(executor_class, word, False)}
    return frozenset(told | {"additions"})


def _submit_until_refused(
    executor: futures.Executor, submitted: list[Future[Any]], refused: list[BaseException]
) -> None:
    try:
        while True:
            submitted.append(executor.submit(abs, -1))
    except BaseException as error:
        refused.append(error)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def _check_told(error: BaseException | None, type_name: str, message: str) -> None:
    """What cannot travel is told in full by what comes in its place."""
    assert isinstance(error, ExecutorError), error
    assert error.type_name.endswith(type_name)
    assert message in str(error)
    assert "in fail" in error.remote_traceback
