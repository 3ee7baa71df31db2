"""The demo's first task, with its executor chosen by each layer of the configuration alone.

What is proved is what the history records: the executor's name, and that the unit ran on it to its end.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.demo, pytest.mark.timeout(300)]

PROGRAM = str(Path(sys.executable).parent / "fractal-runner")

# By layer, the executor that it chooses: another one each time.
CHOSEN = {
    "built-in": "thread",
    "installation": "serial",
    "site": "fork",
    "project": "process",
    "environment": "spawn",
    "command line": "process",
}


@pytest.fixture(scope="module")
def plate(tmp_path_factory: pytest.TempPathFactory, top: Path, task_python: Path) -> Path:
    """A folder with a plate of one well."""
    folder = tmp_path_factory.mktemp("plate")
    script = top / "examples" / "ihc_plate" / "make_plate.py"
    subprocess.run([task_python, script, folder, "--wells", "1"], check=True, timeout=120)
    return folder


@pytest.mark.parametrize("layer", CHOSEN)
def test_the_demo_runs_on_the_executor_that_one_layer_chooses(
    layer: str, plate: Path, top: Path, task_python: Path, tmp_path: Path
) -> None:
    name = CHOSEN[layer]
    project, elsewhere, site = tmp_path / "project", tmp_path / "elsewhere", tmp_path / "home"
    for directory in (project / ".fractal-runner", elsewhere, site / "fractal-runner"):
        directory.mkdir(parents=True)
    for file in ("workflow.json", "dataset.json"):
        shutil.copy(top / "examples" / "ihc_plate" / file, project)
    environment = {**os.environ, "XDG_CONFIG_HOME": str(site)}
    environment.pop("FRACTAL_RUNNER_INSTALL_CONFIG", None)
    words: list[str | Path] = []
    said = f"executor: {name}\n"
    if layer == "installation":
        (tmp_path / "install.yaml").write_text(said)
        environment["FRACTAL_RUNNER_INSTALL_CONFIG"] = str(tmp_path / "install.yaml")
    elif layer == "site":
        (site / "fractal-runner" / "site.yaml").write_text(said)
    elif layer == "project":
        (project / ".fractal-runner" / "config.yaml").write_text(said)
    elif layer == "environment":
        environment["FRACTAL_RUNNER_EXECUTOR"] = name
    elif layer == "command line":
        words = ["--executor", name]

    done = subprocess.run(
        [
            *(PROGRAM, "run", project / "workflow.json", "--dataset", project / "dataset.json"),
            *("--zarr-dir", plate, "--task-env", task_python, "--workflow-dir", tmp_path / "run"),
            *("--last", "0", *words),
        ],
        cwd=elsewhere,  # the project is where the workflow's file is
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "run" / "history.sqlite") as database:
        [(executor, state)] = database.execute("SELECT executor, state FROM fractal_runner_runs").fetchall()
        units = database.execute("SELECT attempt, state FROM fractal_runner_units").fetchall()
    assert json.loads(executor) == [name, {}]
    assert state == "done"
    assert units == [(1, "done")]
    assert len(json.loads((tmp_path / "run" / "dataset.json").read_text())["images"]) == 1
