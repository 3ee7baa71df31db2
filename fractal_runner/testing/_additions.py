"""What our executors have beyond PEP 3148: options, futures as arguments, nested calls, a context."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import pytest

from fractal_runner.errors import ExecutorError
from fractal_runner.executors.calls import current_context
from fractal_runner.testing._base import Conformance
from fractal_runner.testing._tools import (
    PATIENCE_S,
    Gate,
    needs,
    raiser,
)


class Additions(Conformance):
    """What our executors have beyond PEP 3148: options, futures as arguments, nested calls, a context."""

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
        failed = executor.submit(raiser(ValueError("no")))

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
