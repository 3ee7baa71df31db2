"""One pair of runs for each executor, which all tests of it look at, whichever process of pytest has them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.lsf.fixtures import ibm_cluster, openlava_cluster  # noqa: F401
from tests.clusters.slurm.fixtures import slurm_cluster  # noqa: F401
from tests.warm.pairs import Pair, run_pair

# `make chaos` says "slurm lsf ibm". Fixture of its cluster, name of its executor, and its options.
OVER = os.environ.get("FRACTAL_RUNNER_PAIRS_OVER", "thread process").split()
_CLUSTERS = {
    "slurm": ("slurm_cluster", "slurm", {"poll_interval": 1, "mem": 800}),
    "lsf": ("openlava_cluster", "lsf", {"poll_interval": 1, "memory": 800}),
    "ibm": ("ibm_cluster", "lsf", {"poll_interval": 1, "memory": 800}),
}


@pytest.fixture(scope="session", params=OVER)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, top: Path
) -> Iterator[Pair]:
    """What came of all units, cold and warm, over an executor."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    place = shared / f"pair-{request.param}"
    with (shared / f"pair-{request.param}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes first runs it
        if not (place / "ended").exists():
            fixture, name, options = _CLUSTERS.get(request.param, (None, request.param, {}))
            env = {} if fixture is None else request.getfixturevalue(fixture).env
            python = top / ".venv-tasks" / "bin" / "python"
            ready = python if (top / ".venv-tasks" / ".ready").exists() else None
            run_pair(place, name, options, env=env, is_cluster=fixture is not None, task_python=ready)
            (place / "ended").touch()
    yield Pair(place)
