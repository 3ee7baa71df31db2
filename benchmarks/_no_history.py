"""Runs that record nothing of their units: what the history costs is the difference to these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from fractal_runner.history.writing import RunWriter
from fractal_runner.workflow.journal import Journal


@contextmanager
def without_history() -> Iterator[None]:
    """The history is told of the run and its tasks, without which nothing works; of images and units, not."""
    begin_task = RunWriter.begin_task

    def begin_task_alone(self: RunWriter, task: Any, images: Any, dataset_key: str) -> None:
        begin_task(self, task, (), dataset_key)

    def nothing(*_: Any, **__: Any) -> None:
        """Instead of noting something."""

    with ExitStack() as stack:
        stack.enter_context(patch.object(RunWriter, "begin_task", begin_task_alone))
        for name in ("submitted", "running", "done", "failed", "given_up"):
            stack.enter_context(patch.object(Journal, name, nothing))
        yield
