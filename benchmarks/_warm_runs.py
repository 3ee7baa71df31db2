"""Runs whose units start warm or cold: of the demo's tasks on its plate, and of scripts.

What is measured runs in a fresh interpreter, which is the run's coordinator (`run_tasks`, `run_script`); who
asks for it watches from outside.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._child import TOP
from benchmarks._processes import children, descriptors, pss, rss, servers
from benchmarks.overhead import dataset_of, workflow_of
from fractal_runner import (
    Dataset,
    Event,
    TaskFinished,
    TaskProgress,
    Workflow,
    load_dataset,
    load_workflow,
    process_workflow,
)
from fractal_runner.cli.locate import open_run

WORKERS = 2
WARM, COLD = "auto", "never"
TASK_PYTHON = TOP / ".venv-tasks" / "bin" / "python"
FIRST, LAST = 2, 3  # Threshold Segmentation and Measure Features, in the demo's workflow
PLATE, LABEL, TABLE = "plate_mip.zarr", "nuclei", "region_props_features"

_EXAMPLE = TOP / "examples" / "ihc_plate"
_COMPARE = Path(__file__).resolve().parent / "_compare_plates.py"
_LIMIT_S = 3600.0  # of one run; the longest here takes a tenth of it


class WarmStartError(Exception):
    """Warm and cold do not come to the same, or what should be warm is not: the figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plate on which everything has been done that comes before the tasks to be measured.

    Attributes:
        folder: the directory that holds its OME-Zarrs, and `dataset.json`.
        wells: how many wells it has.
        types: the type filters that are in force by now.
    """

    folder: Path
    wells: int
    types: dict[str, bool]

    def copy(self, folder: Path) -> Prepared:
        """The same at another place, its dataset speaking of that place."""
        shutil.copytree(self.folder, folder)
        dataset = json.loads((folder / "dataset.json").read_text())
        dataset["zarr_dir"] = str(folder)
        for image in dataset["images"]:
            for key in ("zarr_url", "origin"):
                if image.get(key):
                    image[key] = image[key].replace(f"{self.folder}/", f"{folder}/", 1)
        (folder / "dataset.json").write_text(json.dumps(dataset))
        return Prepared(folder, self.wells, self.types)


def prepare(folder: Path, run_directory: Path, wells: int) -> Prepared:
    """Make the demo's plate, and run the workflow's first tasks over it: its import and its projection."""
    if not TASK_PYTHON.exists():
        raise FileNotFoundError(f"{TASK_PYTHON}, the environment of the demo's tasks, is missing: make demo")
    made = subprocess.run(
        [TASK_PYTHON, _EXAMPLE / "make_plate.py", folder, "--wells", str(wells)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if made.returncode:
        raise RuntimeError(f"The demo's plate could not be made: {made.stderr.strip()}")
    dataset = load_dataset(_EXAMPLE / "dataset.json", zarr_dir=str(folder))
    after, _ = _run(
        load_workflow(_EXAMPLE / "workflow.json", task_env=TASK_PYTHON),
        dataset,
        run_directory,
        executor=("thread", {"max_workers": WORKERS}),
        last_task_index=FIRST - 1,
    )
    (folder / "dataset.json").write_text(after.model_dump_json())
    filters = json.loads((run_directory / "filters.json").read_text())
    return Prepared(folder, wells, filters["type_filters"])


def compare(one: Prepared, other: Prepared) -> dict[str, Any]:
    """Compare what the tasks have left on two copies, as the tasks' own environment reads it.

    Returns:
        How many images, labels, rows and features there are, and `differences`.

    Raises:
        WarmStartError: if one of the two lacks what is to be compared.
    """
    words = [TASK_PYTHON, _COMPARE, one.folder / PLATE, other.folder / PLATE, LABEL, TABLE]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise WarmStartError(f"The plates cannot be compared: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if result["images"] != one.wells or not result["labels"] or not result["rows"]:
        raise WarmStartError(f"Of {one.wells} images, this is all that there is to compare: {result}")
    return result


def run_tasks(
    folder: str, types: dict[str, bool], run_directory: str, executor: str, warm_start: str
) -> dict[str, Any]:
    """In a fresh process: Threshold Segmentation and Measure Features, after a line with the process's id.

    Returns:
        `seconds` for the whole run; `tasks`, which has for each task its own `seconds`, the CPU of each unit
        and how many of them started warm; and a checksum of the dataset that came of it, wherever that lies.
    """
    workflow = load_workflow(_EXAMPLE / "workflow.json", task_env=TASK_PYTHON)
    dataset = load_dataset(Path(folder) / "dataset.json")
    print(os.getpid(), flush=True)
    after, figures = _run(
        workflow,
        dataset,
        Path(run_directory),
        executor=(executor, {"max_workers": WORKERS}),
        warm_start=warm_start,
        first_task_index=FIRST,
        last_task_index=LAST,
        job_type_filters=types,
    )
    return {**figures, "dataset": _checksum(after, folder)}


def run_script(script: str, units: int, run_directory: str, executor: str, warm_start: str) -> dict[str, Any]:
    """In a fresh process: so many units of a script in the tasks' interpreter; as `run_tasks` returns it."""
    return _run_script(script, units, run_directory, executor=executor, warm_start=warm_start)


def _run_script(script: str, units: int, run_directory: str, *, executor: str, **more: Any) -> dict[str, Any]:
    _, figures = _run(
        workflow_of(command_parallel=f"{TASK_PYTHON} {script}"),
        dataset_of(units),
        Path(run_directory),
        executor=(executor, {"max_workers": WORKERS}),
        **more,
    )
    return figures


def run_script_watched(
    script: str, units: int, run_directory: str, executor: str, warm_start: str
) -> dict[str, Any]:
    """In a fresh process: the same, looking at the fork servers and at this process several times a second.

    Returns:
        As `run_script`, and `looks`: how many units were `done`, and what each server and this process held.
    """
    print(os.getpid(), flush=True)
    looks: list[dict[str, Any]] = []

    def look(event: Event) -> None:
        if isinstance(event, TaskProgress):
            held = {str(pid): _held(pid) for pid in servers(os.getpid())}
            looks.append({"done": event.done, "servers": held, "coordinator": _held(os.getpid())})

    given = {"executor": executor, "warm_start": warm_start, "on_event": look}
    figures = _run_script(script, units, run_directory, **given)
    return {**figures, "looks": looks}


def _held(pid: int) -> dict[str, int]:
    return {
        "children": len(children(pid)),
        "descriptors": descriptors(pid),
        "rss": rss(pid),
        "pss": pss(pid),
    }


def _run(
    workflow: Workflow,
    dataset: Dataset,
    directory: Path,
    on_event: Callable[[Event], object] | None = None,
    **arguments: Any,
) -> tuple[Dataset, dict[str, Any]]:
    """The dataset that comes of a run, and its figures."""
    ended: list[TaskFinished] = []

    def note(event: Event) -> None:
        if isinstance(event, TaskFinished):
            ended.append(event)
        if on_event is not None:
            on_event(event)

    async def measured() -> tuple[Dataset, float]:
        began = time.perf_counter()
        async with asyncio.timeout(_LIMIT_S):
            after = await process_workflow(
                workflow=workflow,
                dataset=dataset,
                workflow_dir_local=directory,
                on_event=note,
                **arguments,
            )
        return after, time.perf_counter() - began

    after, seconds = asyncio.run(measured())
    tasks = [
        {"name": event.task_name, "seconds": event.seconds, **_units_of(directory, event.order)}
        for event in ended
    ]
    return after, {"seconds": seconds, "tasks": tasks}


def _units_of(directory: Path, position: int) -> dict[str, Any]:
    """CPU seconds of each unit of a task, and how they started, as the run has recorded it."""
    with open_run(directory) as found:
        units = list(found.reader.units(found.run_id, position=position))
    return {
        "cpu_s": [unit.cpu_s for unit in units if unit.cpu_s is not None],
        "units": len(units),
        "warm": sum(unit.start == "warm" for unit in units),
    }


def _checksum(dataset: Dataset, folder: str) -> str:
    images = sorted(map(json.dumps, dataset.model_dump(mode="json")["images"]))
    return hashlib.sha256("\n".join(images).replace(folder, "").encode()).hexdigest()
