"""The contract of executors, over clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.testing import ExecutorConformance


class OnACluster(ExecutorConformance):
    """For an executor of batch jobs; a subclass has the fixture `cluster`."""

    many = 20

    @pytest.fixture
    def make(
        self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[..., Any]]:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        made: list[Any] = []

        def make(max_workers: int = 2, **options: Any) -> Any:
            folder = tmp_path / f"jobs{len(made)}"
            made.append(self.executor_class(folder, max_workers=max_workers, **options))
            return made[-1]

        yield make
        for executor in made:
            executor.stop()
            executor.shutdown()

    def make_executor(self, max_workers: int, **options: Any) -> Any:
        return self.executor_class("/nowhere", max_workers=max_workers, **options)
