"""The demo on a SLURM cluster, from the command line: killed in its third task, and resumed."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.clusters.slurm import SlurmCluster
from tests.clusters.slurm.fixtures import slurm_cluster  # noqa: F401

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]

PROGRAM = str(Path(sys.executable).parent / "fractal-runner")
# The nodes have less memory than the tasks ask for by themselves.
NEEDS = {"mem": 900, "cpus_per_task": 1}
NEEDED_BY = [
    ["meta_non_parallel"],
    ["meta_non_parallel", "meta_parallel"],
    ["meta_parallel"],
    ["meta_parallel"],
]
ARRAYS = 5  # one for each of these


@pytest.fixture
def cluster(
    slurm_cluster: SlurmCluster,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> SlurmCluster:
    slurm_cluster.reset()
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    return slurm_cluster


def test_the_demo_killed_in_its_third_task_is_resumed_on_the_cluster(
    cluster: SlurmCluster, top: Path, task_python: Path, tmp_path: Path
) -> None:
    example = top / "examples" / "ihc_plate"
    subprocess.run(
        [task_python, example / "make_plate.py", tmp_path, "--wells", "2"], check=True, timeout=120
    )
    workflow = json.loads((example / "workflow.json").read_text())
    for task, parts in zip(workflow["task_list"], NEEDED_BY, strict=True):
        task.update(dict.fromkeys(parts, NEEDS))
    (tmp_path / "workflow.json").write_text(json.dumps(workflow))
    run_dir = tmp_path / "run"
    words = [
        *(PROGRAM, "run", tmp_path / "workflow.json", "--dataset", example / "dataset.json"),
        *("--zarr-dir", tmp_path, "--task-env", task_python, "--workflow-dir", run_dir),
        *("--executor", "slurm", "--executor-opt", "poll_interval=2"),
    ]

    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not list(run_dir.glob("2_*/*-args.json")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    status = subprocess.run(
        [PROGRAM, "status", str(run_dir)], capture_output=True, text=True, timeout=60, check=False
    )
    resumed = subprocess.run(
        [PROGRAM, "resume", str(run_dir)], capture_output=True, text=True, timeout=300, check=False
    )

    assert re.search(r"2 Threshold Segmentation +interrupted", status.stdout), status.stdout
    assert resumed.returncode == 0, resumed.stderr
    images = json.loads((run_dir / "dataset.json").read_text())["images"]
    assert len(images) == 4
    assert sum(image["types"] == {"is_3D": False} for image in images) == 2
    assert len(list((run_dir / "jobs" / "slurm").iterdir())) == ARRAYS
    with sqlite3.connect(run_dir / "history.sqlite") as database:
        states = database.execute("SELECT DISTINCT attempt, state FROM fractal_runner_units").fetchall()
    assert states == [(1, "done")]
