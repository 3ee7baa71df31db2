"""Runs the tasks of a plan, cold and warm, in a process of its own: `python runner.py PLACE`.

PLACE/plan.json says over which executor, and which tasks. In PLACE/cold and PLACE/warm there are `scripts`,
which the process is in while they run, `runs`, one for each task, and `left`, for what units leave. What
came of all units is in PLACE/outcome.json.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fractal_runner import (
    Dataset,
    Image,
    JobExecutionError,
    Task,
    TaskExecutionError,
    Workflow,
    WorkflowTask,
    process_workflow,
)

MODES = {"cold": "never", "warm": "always"}
_COLUMNS = "number state returncode signal reason message output start cpu_s peak_bytes log run_id"


async def run_task(plan: Mapping[str, Any], place: Path, mode: str, name: str) -> None:
    """Run one of its tasks in one of the two modes; how its units fare is not our concern here."""
    job = plan["tasks"][name]
    meta: dict[str, Any] = {}
    in_flight = None
    if job["one_by_one"] and plan["packs"]:
        meta = {"tasks_per_job": len(job["units"]), "parallel_tasks_per_job": 1}
    elif job["one_by_one"]:
        in_flight = 1
    task = Task(name=name, type="parallel", command_parallel=job["command"].replace("{mode}", mode))
    left = place / mode / "left" / name
    left.mkdir(parents=True)
    wftask = WorkflowTask(task=task, args_parallel={"place": str(left)}, meta_parallel=meta)
    try:
        await process_workflow(
            workflow=Workflow(name=name, task_list=[wftask]),
            dataset=Dataset(
                name="d", zarr_dir="/z", images=[Image(zarr_url=f"/z/{unit}") for unit in job["units"]]
            ),
            workflow_dir_local=place / mode / "runs" / name,
            executor=(plan["executor"], plan["options"]),
            warm_start=MODES[mode],
            max_in_flight=in_flight,
            logger_name=f"{mode}.{name}",
        )
    except (TaskExecutionError, JobExecutionError) as error:
        logging.getLogger(f"{mode}.{name}").info("it failed: %s", str(error).split("\n", 1)[0])


async def run_all(plan: Mapping[str, Any], place: Path) -> None:
    """Run all tasks, first cold, then warm. On a cluster, where they wait for its answers, side by side."""
    for mode in MODES:
        os.chdir(place / mode / "scripts")
        waiting = [run_task(plan, place, mode, name) for name in plan["tasks"]]
        if plan["packs"]:
            await asyncio.gather(*waiting)
        else:
            for one in waiting:
                await one


def outcome(place: Path, mode: str, name: str, units: list[str]) -> dict[str, dict[str, Any]]:
    """What is on record of a task's units, and what they have left, by their images."""
    top = place / mode
    with sqlite3.connect(top / "runs" / name / "history.sqlite") as database:
        database.row_factory = sqlite3.Row
        columns = ", ".join(_COLUMNS.split())
        rows = database.execute(f"SELECT {columns} FROM fractal_runner_units WHERE is_last ORDER BY number")
        found = {units[row["number"]]: dict(row) for row in rows}
    database.close()
    for unit, values in found.items():
        log = top / "runs" / name / values["log"]
        values["text"] = log.read_text(errors="backslashreplace") if log.exists() else None
        left = top / "left" / name / unit
        values["left"] = {
            str(path.relative_to(left)): path.read_text(errors="backslashreplace") if path.is_file() else None
            for path in sorted(left.rglob("*"))
        }
    return found


def main() -> None:
    place = Path(sys.argv[1])
    plan = json.loads((place / "plan.json").read_text())
    logging.basicConfig(filename=place / "messages", level=logging.INFO)
    asyncio.run(run_all(plan, place))
    found = {
        mode: {name: outcome(place, mode, name, job["units"]) for name, job in plan["tasks"].items()}
        for mode in MODES
    }
    (place / "outcome.json").write_text(json.dumps({"pid": os.getpid(), "units": found}))


if __name__ == "__main__":
    main()
