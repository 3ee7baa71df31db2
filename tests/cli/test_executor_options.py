"""An executor from the command line: its options, and that a resume takes the same one again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fractal_runner import Dataset, Image, Task, TaskExecutionError, Workflow, WorkflowTask, process_workflow
from fractal_runner.cli.app import app
from fractal_runner.executors import factories
from tests.executors.batch import standin
from tests.executors.batch.standin import StandIn

Here = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Runs the program in this process, in tmp_path, where "batch" is a stand-in and w.json fails."""
    monkeypatch.setitem(factories._PLACES, "batch", standin.PLACE)
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.chdir(tmp_path)
    task = {"name": "T", "command_parallel": "false"}
    Path("w.json").write_text(json.dumps({"name": "w", "task_list": [{"task": task}]}))
    images = [{"zarr_url": "/d/1", "attributes": {}, "types": {}}]
    Path("d.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))
    return lambda *words: CliRunner().invoke(app, [*words])


RUN = ("run", "w.json", "--dataset", "d.json", "--workflow-dir", "r", "--executor", "batch")


def made() -> tuple[Any, ...]:
    executor = StandIn.made[-1]
    return Path(executor.folder), executor.max_workers, executor.partition


def test_a_resume_takes_the_executor_of_the_run_with_its_options(here: Here, tmp_path: Path) -> None:
    ran = here(*RUN, "--executor-opt", "partition=main", "--max-workers", "7")
    assert ran.exit_code == 1, ran.output
    expected = (tmp_path / "r" / "jobs" / "batch", 7, "main")
    assert made() == expected

    assert here("resume", "r").exit_code == 1
    assert made() == expected

    assert here("resume", "r", "--executor-opt", "partition=long").exit_code == 1
    assert made() == (expected[0], 7, "long")

    assert here("resume", "r", "--executor", "thread").exit_code == 1
    assert len(StandIn.made) == 3


def test_options_may_be_lists_and_objects(here: Here) -> None:
    here(*RUN, "--executor-opt", 'path_map={"/here": "/there"}', "--executor-opt", "folder=files")

    executor = StandIn.made[-1]
    assert executor.path_map == {"/here": "/there"}
    assert executor.folder == "files"


@pytest.mark.parametrize("command", ["run", "resume"])
def test_an_option_that_there_is_not_is_named_with_the_nearest(here: Here, command: str) -> None:
    here(*RUN)
    words = RUN if command == "run" else ("resume", "r")

    answer = here(*words, "--executor-opt", "partitoin=main")

    assert answer.exit_code == 2
    said = " ".join(answer.output.replace("│", " ").split())
    assert "--executor-opt partitoin=main: batch.partitoin: unknown key: did you mean 'partition'?" in said
    assert len(StandIn.made) == 1


def test_a_path_among_the_options_is_the_same_in_a_resume(here: Here, tmp_path: Path) -> None:
    task = WorkflowTask(task=Task(name="T", command_parallel="false"))
    run = process_workflow(
        workflow=Workflow(name="w", task_list=[task]),
        dataset=Dataset(name="d", zarr_dir="/d", images=[Image(zarr_url="/d/1")]),
        workflow_dir_local=tmp_path / "r",
        executor=("batch", MappingProxyType({"folder": tmp_path / "mine"})),
    )
    with pytest.raises(TaskExecutionError):
        asyncio.run(run)

    assert here("resume", "r").exit_code == 1
    assert made()[0] == tmp_path / "mine"
