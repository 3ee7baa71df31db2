"""Shutting down, cancelling, stopping, dying: however a call ends, its future does."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.errors import JobExecutionError
from fractal_runner.testing._base import Conformance
from fractal_runner.testing._tools import (
    PATIENCE_S,
    Gate,
    await_running,
    is_alive,
    needs,
    nothing,
    raiser,
    submit_until_refused,
    wait_until,
)


class Ends(Conformance):
    """Shutting down, cancelling, stopping, dying: however a call ends, its future does."""

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
        await_running(running)

        executor.shutdown(wait=False, cancel_futures=True)

        assert all(future.cancelled() for future in others)
        gate.open()
        assert running.result(PATIENCE_S) == 0

    @needs("additions", "asynchronous")
    def test_who_waits_for_what_a_shutdown_cancels_is_told_at_once(
        self, make: Callable[..., Any], gate: Gate
    ) -> None:
        executor = make(1)
        running, *others = [executor.submit(gate.wait, number) for number in range(4)]
        gate.await_arrivals(1)
        await_running(running)

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
            threads = [threading.Thread(target=submit_until_refused, args=arguments) for _ in range(3)]
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
        await_running(running)
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
        running = executor.submit(gate.wait)
        gate.await_arrivals(1)
        await_running(running)
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
        await_running(first)
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
        await_running(*submitted[:2])

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
        first = executor.options(name="first", key="k/1").submit(gate.wait)
        gate.await_arrivals(1)
        await_running(first)
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

    # Ends that come from outside

    @needs("additions", "asynchronous")
    def test_stop_ends_what_has_not_started_and_what_runs(self, executor: Any, gate: Gate) -> None:
        submitted = [executor.submit(gate.wait, number) for number in range(4)]
        gate.await_arrivals(2)
        await_running(*submitted[:2])

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
        await_running(*submitted[:2])

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
            time.sleep(1000)  # until it is ended

        view = executor.options(timeout=3) if how == "timeout" else executor
        future = view.submit(start_and_wait)
        wait_until(noted.exists, "the call has started its children")
        await_running(future)
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
        logger.addFilter(nothing)
        try:
            error = executor.options(timeout=1).submit(talk).exception(PATIENCE_S)
        finally:
            logger.removeFilter(nothing)

        assert isinstance(error, TimeoutError)

    @needs("additions", "kills")
    def test_a_call_within_its_timeout_is_left_alone(self, executor: Any) -> None:
        view = executor.options(timeout="1m")

        assert view.submit(pow, 2, 3).result(PATIENCE_S) == 8
        assert isinstance(view.submit(raiser(KeyError(1))).exception(PATIENCE_S), KeyError)

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
