"""What goes to a worker process and comes back: exceptions, output, log records."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from concurrent import futures
from typing import Any

import pytest

from fractal_runner.errors import ExecutorError
from fractal_runner.testing._base import Conformance
from fractal_runner.testing._tools import (
    PATIENCE_S,
    check_told,
    needs,
)


class Travels(Conformance):
    """What goes to a worker process and comes back: exceptions, output, log records."""

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

        check_told(executor.submit(fail).exception(PATIENCE_S), "Locked", "locked in")
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8

    @needs("additions", "isolates")
    def test_an_exception_that_cannot_be_unpickled_is_told(self, executor: Any) -> None:
        class Two(Exception):
            def __init__(self, one: int, two: int) -> None:
                super().__init__(f"both {one} and {two}")

        def fail() -> None:
            raise Two(1, 2)

        check_told(executor.submit(fail).exception(PATIENCE_S), "Two", "both 1 and 2")
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
