"""The coordinator is killed, at random moments and between any two writes, and the run resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters.lsf.fixtures import openlava_cluster  # noqa: F401
from tests.clusters.slurm.fixtures import slurm_cluster  # noqa: F401
from tests.history import chaos

# `make chaos` asks for more of both.
RUNS = int(os.environ.get("FRACTAL_RUNNER_CHAOS_RUNS", "10"))
KILLS = int(os.environ.get("FRACTAL_RUNNER_CHAOS_KILLS", "5"))
CLUSTER_RUNS = max(1, RUNS // 10)  # each job of a cluster takes its time to start
CLUSTERS = {"slurm": ("slurm_cluster", "mem"), "lsf": ("openlava_cluster", "memory")}
EXECUTORS = ["thread", "process", "fork", "spawn"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(RUNS))
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path, seed: int) -> None:
    run = chaos.KilledRun(tmp_path / "run", EXECUTORS[seed % len(EXECUTORS)], seed)
    print(f"seed {seed}, over {EXECUTORS[seed % len(EXECUTORS)]}")

    run.run(KILLS)

    run.check()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(CLUSTER_RUNS))
@pytest.mark.parametrize("name", CLUSTERS)
def test_over_a_cluster_no_unit_is_repeated_however_often_its_coordinator_is_killed(
    tmp_path: Path, name: str, seed: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture, memory = CLUSTERS[name]
    cluster = request.getfixturevalue(fixture)
    for variable, value in cluster.env.items():
        monkeypatch.setenv(variable, value)
    cluster.reset()
    options = {"poll_interval": 1, memory: 100}
    run = chaos.KilledRun(tmp_path / "run", name, seed, options=options, outlives=True, life_s=3)

    run.run(KILLS)

    run.check()
    cluster.reset()


@pytest.mark.timeout(1200)
def test_a_run_that_dies_between_any_two_writes_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, chaos.__file__, str(tmp_path), "at-each-write"],
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )

    assert answer.returncode == 0, answer.stderr[-5000:]
    assert int(answer.stdout) > 30  # the units' records, the transactions, and the files
