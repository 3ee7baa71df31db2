"""The demo on an LSF cluster, as it stands, from the command line."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters.lsf import LsfCluster
from tests.clusters.lsf.fixtures import ibm, ibm_cluster  # noqa: F401

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]

PROGRAM = str(Path(sys.executable).parent / "fractal-runner")


def test_the_demo_runs_on_lsf_by_its_name_alone(
    ibm: LsfCluster,  # noqa: F811
    top: Path,
    task_python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in ibm.env.items():
        monkeypatch.setenv(name, value)
    example = top / "examples" / "ihc_plate"
    subprocess.run(
        [task_python, example / "make_plate.py", tmp_path, "--wells", "2"], check=True, timeout=120
    )
    run_dir = tmp_path / "run"

    done = subprocess.run(
        [
            *(PROGRAM, "run", example / "workflow.json", "--dataset", example / "dataset.json"),
            *("--zarr-dir", tmp_path, "--task-env", task_python, "--workflow-dir", run_dir),
            *("--executor", "lsf", "--executor-opt", "poll_interval=2"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    images = json.loads((run_dir / "dataset.json").read_text())["images"]
    assert sum(image["types"] == {"is_3D": False} for image in images) == 2
    with sqlite3.connect(run_dir / "history.sqlite") as database:
        states = database.execute("SELECT DISTINCT attempt, state FROM fractal_runner_units").fetchall()
    assert states == [(1, "done")]
    assert {job.state for job in ibm.jobs()} == {"DONE"}
    assert [call.argv[call.argv.index("-n") + 1] for call in ibm.calls("bsub")]
