"""What the tests of the workflow layer share: small workflows, scripts as tasks, and a run in tmp_path."""

from __future__ import annotations

import asyncio
import shlex
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import Dataset, Image, Task, Workflow, WorkflowTask, process_workflow
from tests.workflow.coordinator import Coordinator

_HEAD = """
import json, os, sys, time
args = json.load(open(sys.argv[sys.argv.index("--args-json") + 1]))
out = sys.argv[sys.argv.index("--out-json") + 1]
url = args.get("zarr_url", "")
number = int("".join(filter(str.isdigit, url)) or 0)
def write(value):
    with open(out, "w") as file:
        file.write(value if isinstance(value, str) else json.dumps(value))
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Writes a Python task, which finds `args`, `url`, `number` and `write` there; its command."""
    place = tmp_path / "scripts"
    place.mkdir()

    def make(body: str = "") -> str:
        path = place / f"task{len(list(place.iterdir()))}.py"
        path.write_text(_HEAD + body)
        return shlex.join([sys.executable, "-I", "-S", str(path)])

    return make


@pytest.fixture
def parallel() -> Callable[..., WorkflowTask]:
    """A parallel task of a command; what it does not know itself goes to the Task."""

    def make(command: str = "true", **more: Any) -> WorkflowTask:
        known = {key: more.pop(key) for key in list(more) if key in WorkflowTask.model_fields}
        task = {"name": "T", "type": "parallel", "command_parallel": command, **more}
        return WorkflowTask(task=Task(**task), **known)

    return make


@pytest.fixture
def flow() -> Callable[..., Workflow]:
    """A workflow of these tasks."""

    def make(*tasks: WorkflowTask | Task) -> Workflow:
        items = [item if isinstance(item, WorkflowTask) else WorkflowTask(task=item) for item in tasks]
        return Workflow(name="w", task_list=items)

    return make


@pytest.fixture
def images() -> Callable[..., Dataset]:
    """A dataset in /z of images /z/0, /z/1, …"""

    def make(count: int = 1, **more: Any) -> Dataset:
        items = [Image(zarr_url=f"/z/{number}", **more) for number in range(count)]
        return Dataset(name="d", zarr_dir="/z", images=items)

    return make


@pytest.fixture
def run(tmp_path: Path, flow: Any, images: Any) -> Callable[..., Awaitable[Dataset]]:
    """Runs a workflow, or tasks, in tmp_path/run."""

    async def call(*tasks: Any, **more: Any) -> Dataset:
        workflow = tasks[0] if isinstance(tasks[0], Workflow) else flow(*tasks)
        more.setdefault("dataset", images(1))
        more.setdefault("workflow_dir_local", tmp_path / "run")
        return await process_workflow(workflow=workflow, **more)

    return call


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    """Waits until a condition holds; fails if it does not within 30 s."""

    async def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            await asyncio.sleep(0.02)

    return wait


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where units leave word of what they do."""
    place = tmp_path / "notes"
    place.mkdir()
    return place


@pytest.fixture
def coordinator(tmp_path: Path, flow: Any, images: Any) -> Iterator[Callable[..., Coordinator]]:
    """Starts a run, as `run` does, in a process of its own, which the test may kill."""
    started: list[Coordinator] = []

    def start(*tasks: Any, **more: Any) -> Coordinator:
        workflow = tasks[0] if isinstance(tasks[0], Workflow) else flow(*tasks)
        more.setdefault("dataset", images(1))
        more.setdefault("workflow_dir_local", tmp_path / "run")
        started.append(Coordinator(tmp_path, workflow=workflow, **more))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def query(tmp_path: Path) -> Callable[..., list[Any]]:
    """Asks, or changes, the history of tmp_path/run: rows, or bare values where there is one column.

    "runs", "tasks", "units" and so on stand for the tables' whole names in {braces}.
    """

    def ask(text: str, *values: Any, path: Path = tmp_path / "run" / "history.sqlite") -> list[Any]:
        names = ("runs", "owners", "tasks", "units", "image_statuses")
        statement = text.format(**{name: f"fractal_runner_{name}" for name in names})
        with sqlite3.connect(path, timeout=30) as database:
            rows = database.execute(statement, values).fetchall()
        database.close()
        return [row[0] if len(row) == 1 else row for row in rows]

    return ask
