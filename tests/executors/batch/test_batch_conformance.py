"""The batch executor keeps the contract of executors, over a batch system of processes of this host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.testing import ExecutorConformance
from tests.executors.batch.processes import ProcessBatchExecutor


class TestBatch(ExecutorConformance):
    executor_class = ProcessBatchExecutor
    many = 20

    @pytest.fixture
    def make(self, tmp_path: Path) -> Iterator[Callable[..., Any]]:
        made: list[ProcessBatchExecutor] = []

        def make(max_workers: int = 2, **options: Any) -> Any:
            folder = tmp_path / f"jobs{len(made)}"
            made.append(ProcessBatchExecutor(folder, max_workers=max_workers, **options))
            return made[-1]

        yield make
        for executor in made:
            executor.stop()
            executor.shutdown()
            executor.scheduler.close()  # type: ignore[attr-defined]

    def make_executor(self, max_workers: int, **options: Any) -> Any:
        return ProcessBatchExecutor("/nowhere", max_workers=max_workers, **options)
