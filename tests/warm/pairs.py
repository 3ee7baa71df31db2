"""A pair of runs of the same units over one executor, cold and warm; and how to compare them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.warm import runner, scripts

WORKERS = 2
RUN_S = 800
# What two units have in common whose commands did the same.
COMPARED = ("state", "returncode", "signal", "reason", "message", "output", "text", "left")
# What tells one process from the next, by nobody's doing.
_VARYING = re.compile(r"(?<=left behind: pid )\[[\d, ]+\]|(?<= at )0x[0-9a-f]+")


def run_pair(
    place: Path,
    executor: str,
    options: Mapping[str, Any],
    *,
    env: Mapping[str, str],
    is_cluster: bool,
    task_python: Path | None,
) -> None:
    """Run all units, cold and warm.

    Args:
        place: a directory that is made for it.
        executor: the executor's name.
        options: its options, but for how many units run at a time.
        env: what its cluster has in the environment.
        is_cluster: whether it packs units into jobs.
        task_python: an interpreter that has numpy, if there is one.
    """
    place.mkdir()
    for mode in runner.MODES:
        scripts.write_scripts(place / mode / "scripts")
    jobs = scripts.tasks(place / "{mode}" / "scripts", task_python)
    plan = {
        "executor": executor,
        "options": {"max_workers": WORKERS, **options},
        "packs": is_cluster,
        "tasks": {name: asdict(job) for name, job in jobs.items()},
    }
    (place / "plan.json").write_text(json.dumps(plan))
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYTEST", "COV", "FRACTAL_RUNNER"))
    }
    with (place / "errors").open("wb") as errors:
        done = subprocess.run(
            [sys.executable, runner.__file__, place],
            # A changed module of the same size in the same second is not seen where there is a .pyc.
            env={**kept, **env, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=errors,
            stderr=errors,
            timeout=RUN_S,
            check=False,
        )
    (place / "returncode").write_text(str(done.returncode))


class Pair:
    """What came of the units of both runs.

    Args:
        place: where they ran.

    Attributes:
        executor: the name of the one that they ran over.
        pid: of the process that ran them.
        tasks: what they are called.
    """

    def __init__(self, place: Path) -> None:
        errors = (place / "errors").read_text()
        assert (place / "returncode").read_text() == "0", errors
        self.errors = errors
        found = json.loads((place / "outcome.json").read_text())
        self.executor: str = json.loads((place / "plan.json").read_text())["executor"]
        self.pid: int = found["pid"]
        self._place = place
        self._units: dict[str, dict[str, dict[str, dict[str, Any]]]] = found["units"]
        self.tasks = list(self._units["cold"])

    def units(self, mode: str, task: str) -> list[dict[str, Any]]:
        """What is known of a task's units, in order."""
        return list(self._units[mode][task].values())

    def compared(self, mode: str, task: str, unit: str) -> dict[str, Any]:
        """What is known of a unit but for what may differ, and where it ran."""
        values = self._units[mode][task][unit]
        return {name: self._without_places(mode, values[name], values["run_id"]) for name in COMPARED}

    def messages(self, mode: str, task: str) -> str:
        """What the runner said of a task while it ran."""
        lines = (self._place / "messages").read_text().splitlines()
        return "\n".join(line for line in lines if f":{mode}.{task}:" in line)

    def _without_places(self, mode: str, value: Any, run_id: str) -> Any:
        if isinstance(value, dict):
            return {key: self._without_places(mode, inner, run_id) for key, inner in value.items()}
        if not isinstance(value, str):
            return value
        text = value.replace(str(self._place / mode), "PLACE").replace(run_id, "RUN")
        return _VARYING.sub("...", text)
