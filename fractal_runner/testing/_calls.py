"""Calls, their futures, and `map`."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future
from typing import Any

import pytest

from fractal_runner.testing._base import Conformance
from fractal_runner.testing._tools import (
    PATIENCE_S,
    Gate,
    await_running,
    needs,
    raiser,
    wait_until,
)


class Calls(Conformance):
    """Calls, their futures, and `map`."""

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
        future = executor.submit(raiser(KeyError("nothing", 3)))

        with pytest.raises(KeyError) as caught:
            future.result(PATIENCE_S)
        assert type(caught.value) is KeyError
        assert caught.value.args == ("nothing", 3)
        assert isinstance(future.exception(), KeyError)

    def test_a_call_that_raises_harms_no_other(self, executor: Any) -> None:
        failing = [executor.submit(raiser(ValueError(number))) for number in range(3)]

        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8
        assert [future.exception(PATIENCE_S).args for future in failing] == [(0,), (1,), (2,)]

    def test_system_exit_in_a_call_is_that_futures_alone(self, executor: Any) -> None:
        future = executor.submit(sys.exit, 3)

        assert isinstance(future.exception(PATIENCE_S), SystemExit)
        assert future.exception().code == 3
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("asynchronous")
    def test_a_keyboard_interrupt_that_a_call_raises_is_that_futures_alone(self, executor: Any) -> None:
        future = executor.submit(raiser(KeyboardInterrupt()))

        assert isinstance(future.exception(PATIENCE_S), KeyboardInterrupt)
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("asynchronous")
    def test_submit_does_not_wait_for_the_work(self, executor: Any, gate: Gate) -> None:
        submitted = [executor.submit(gate.wait, number) for number in range(4)]

        gate.await_arrivals(2)
        await_running(*submitted[:2])
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

    def test_a_callback_that_raises_harmsnothing(
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

        future = executor.submit(raiser(Odd()))
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
        wait_until(lambda: executor.tasks()[0].state == "running", "it is known to run")
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
