"""How an executor is named to the tests, and which of them it is spared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fractal_runner.executors.base import Executor
from fractal_runner.testing._tools import (
    Gate,
    capabilities_of,
)


class Conformance:
    """What `ExecutorConformance` is besides its tests, which stand in the subclasses that it is made of."""

    executor_class: ClassVar[Callable[..., futures.Executor] | None] = None
    capabilities: ClassVar[frozenset[str] | None] = None
    many: ClassVar[int] = 100
    left_out: ClassVar[dict[str, list[str]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if (able := cls.capabilities) is None:
            if cls.executor_class is None:
                return  # one to derive others from
            able = capabilities_of(cls.executor_class)
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
