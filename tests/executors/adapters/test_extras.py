"""Dask and Ray come with extras: nobody else loads them; who lacks one is told the line that installs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fractal_runner.executors.adapters.extras import DASK, RAY, Extra

ENGINES = {"dask", "distributed", "ray"}
# In a fresh interpreter, where the engine cannot be found: as where it is not installed.
HIDDEN = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""
BY_CLASS = """
from fractal_runner import {executor} as Kind
try:
    Kind(1)
except Exception as error:
    print(type(error).__name__, error.name, error)
"""
BY_RUN = """
import asyncio
from fractal_runner import Dataset, Image, Task, Workflow, WorkflowTask, process_workflow
task = WorkflowTask(task=Task(name="T", command_parallel="true"))
run = process_workflow(
    workflow=Workflow(name="w", task_list=[task]),
    dataset=Dataset(name="d", zarr_dir="/d", images=[Image(zarr_url="/d/1")]),
    workflow_dir_local="run",
    executor={name!r},
)
try:
    asyncio.run(run)
except Exception as error:
    print(type(error).__name__, error.name, error)
"""
CLI = """
from fractal_runner.cli import main
main()
"""


def answer(program: str, *words: str, here: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(params=[DASK, RAY], ids=["dask", "ray"])
def extra(request: pytest.FixtureRequest) -> Extra:
    found: Extra = request.param
    return found


@pytest.fixture
def hidden(extra: Extra) -> str:
    return HIDDEN.format(modules=set(extra.modules))


@pytest.mark.parametrize("program", [BY_CLASS, BY_RUN], ids=["class", "run"])
def test_without_it_the_error_is_an_import_error_with_the_line(
    extra: Extra, hidden: str, program: str, tmp_path: Path
) -> None:
    said = answer(hidden + program.format(name=extra.name, executor=extra.executor), here=tmp_path)

    module = extra.modules[0]
    assert said.stdout.strip() == (
        f"ImportError {module} {extra.executor} needs {extra.engine}, and here {module} is not installed: "
        f"pip install 'fractal-runner[{extra.name}]'"
    ), said.stderr


def test_without_it_the_command_line_says_so_and_nothing_of_the_run_is_made(
    extra: Extra, hidden: str, tmp_path: Path
) -> None:
    task = {"name": "T", "command_parallel": "true"}
    (tmp_path / "w.json").write_text(json.dumps({"name": "w", "task_list": [{"task": task}]}))
    images = [{"zarr_url": "/d/1", "attributes": {}, "types": {}}]
    (tmp_path / "d.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))
    words = ("run", "w.json", "--dataset", "d.json", "--workflow-dir", "r", "--executor", extra.name)

    said = answer(hidden + CLI, *words, here=tmp_path)

    assert said.returncode == 2
    assert f"pip install 'fractal-runner[{extra.name}]'" in " ".join(said.stderr.split())
    assert "Traceback" not in said.stdout + said.stderr


def test_without_it_the_list_of_executors_says_why_and_what_helps(
    extra: Extra, hidden: str, tmp_path: Path
) -> None:
    said = answer("import os; os.environ['COLUMNS'] = '300'\n" + hidden + CLI, "executors", here=tmp_path)

    assert said.returncode == 0
    [line] = [line for line in said.stdout.splitlines() if line.startswith(f"{extra.name} ")]
    assert "asynchronous, isolates, kills, remote" in line
    assert f"{extra.modules[0]} is not installed: pip install 'fractal-runner[{extra.name}]'" in line


def test_with_it_there_is_nothing_to_be_told(extra: Extra) -> None:
    assert extra.lacking() is None


def test_what_is_there_and_cannot_be_imported_is_told_with_the_reason() -> None:
    error = Extra("E", "Json", "j", ("json",)).error(ImportError("no libjson.so", name="json"))

    assert "E needs Json, and here importing it fails (no libjson.so): pip install" in str(error)


def test_who_installs_the_package_alone_gets_neither() -> None:
    alone = [
        re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower()  # type: ignore[index]
        for requirement in metadata.requires("fractal-runner") or []
        if "extra ==" not in requirement
    ]

    assert "loky" in alone
    assert not ENGINES & set(alone)


@pytest.mark.parametrize(
    "program",
    [
        "import fractal_runner as r, fractal_runner.config; r.DaskExecutor, r.RayExecutor",
        "from fractal_runner.executors import registry as r; r.configuration(); r.factory_of('dask')",
        """
from fractal_runner.executors.sections import load
load(executor="dask", options=["pool.workers=local"])
load(executor="ray", options=["max_cpus=2"])
""",
        "import fractal_runner.cli.app",
        """
import sys
from fractal_runner.cli import main
sys.argv[1:] = ["executors"]
try:
    main()
except SystemExit:
    print()
""",
    ],
    ids=["package", "registry", "configuration", "cli", "executors"],
)
def test_nothing_but_making_one_loads_its_engine(program: str, tmp_path: Path) -> None:
    said = answer(f"{program}\nimport sys; print(sorted({ENGINES} & set(sys.modules)))", here=tmp_path)

    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-1] == "[]"
