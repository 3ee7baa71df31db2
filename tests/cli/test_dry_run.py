"""A dry run: what it tells of each executor, what it leaves alone, and how it tells mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fractal_runner.cli.app import app
from fractal_runner.executors.batch.slurm import SlurmExecutor
from fractal_runner.workflow.dispatch import PACKING_WINDOW

Here = Callable[..., Result]

COMMANDS = ("sbatch", "squeue", "scancel", "sacct", "bsub", "bjobs", "bkill")
LARGE = {"cpus_per_task": 2, "mem": "4G", "time": "00:10:00"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with schedulers' commands on the PATH that write down that they were called."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in COMMANDS:
        (commands / name).write_text(f"#!/bin/sh\necho {name} >>{tmp_path}/called\nexit 1\n")
        (commands / name).chmod(0o755)
    (commands / "true").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(commands))  # the machine may have schedulers of its own
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def dry(place: Path) -> Here:
    """A dry run over so many images of tasks with these metas: parallel ones, or what is said beside that."""

    def run(*words: str, metas: list[dict[str, Any]] | None = None, images: int = 3, **task: Any) -> Result:
        tasks = [
            {"task": {"name": f"T{number}", "command_parallel": "true", **task}, "meta_parallel": meta}
            for number, meta in enumerate(metas or [{}])
        ]
        (place / "w.json").write_text(json.dumps({"name": "w", "task_list": tasks}))
        rows = [{"zarr_url": f"/d/{number}", "attributes": {}, "types": {}} for number in range(images)]
        (place / "d.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": rows}))
        return CliRunner().invoke(app, ["run", "w.json", "--dataset", "d.json", "--dry-run", *words])

    return run


def slurm(**options: object) -> list[str]:
    words = ["--executor", "slurm"]
    for name, value in {"max_array": 100, **options}.items():
        words += ["--executor-opt", f"{name}={value}"]
    return words


def said(result: Result, name: str) -> list[str]:
    """What the rows of this name say."""
    return re.findall(rf"^    {re.escape(name)} {{2,}}(.+)$", result.output, re.MULTILINE)


# What it leaves alone


@pytest.mark.parametrize("executor", ["slurm", "thread", "process"])
def test_nothing_is_written_and_no_scheduler_is_told_anything(place: Path, dry: Here, executor: str) -> None:
    told = dry("--executor", executor, "--executor-opt", "max_workers=2")

    assert told.exit_code == 0, told.output
    assert told.output.endswith("No mistakes found; nothing was submitted.\n")
    assert sorted(path.name for path in place.iterdir()) == ["d.json", "w.json"]
    assert not (place.parent / "called").exists()


def test_a_directory_that_holds_a_run_is_a_mistake(place: Path, dry: Here) -> None:
    (place / "r").mkdir()
    (place / "r" / "dataset.json").write_text("{}")

    told = dry("--workflow-dir", "r")

    assert told.exit_code == 2
    assert "already holds a run: go on with it" in told.output
    assert [path.name for path in (place / "r").iterdir()] == ["dataset.json"]


def test_paths_are_those_of_a_run_there(place: Path, dry: Here) -> None:
    told = dry(*slurm(), "--workflow-dir", "../project/r")

    assert f"\n#SBATCH --output={place}/r/jobs/slurm/fr-ARRAY/job-%a.log\n" in told.output


def test_what_is_said_of_warm_starts_is_looked_at_as_well(dry: Here) -> None:
    told = dry("--warm-start", "allways")

    assert told.exit_code == 2
    assert "'allways' is none of" in told.output


# What it tells of batch executors


def test_the_packing_is_told_with_what_each_job_asks_for(place: Path, dry: Here) -> None:
    told = dry(*slurm(partition="main"), "--workflow-dir", "r", metas=[LARGE], images=9)

    assert said(told, "executor") == ["slurm"]
    assert said(told, "packing") == ["9 units in 1 array of 5 jobs: 2 units per job, 2 at a time"]
    assert said(told, "each job") == ["4 CPUs, 8 GB, 10:00 min"]
    [by] = said(told, "by")
    assert by.endswith(f"sbatch {place}/r/jobs/slurm/fr-ARRAY/submitit/submission_file.sh")
    assert "----- script of 0 T0\n#!/bin/bash\n" in told.output
    for line in ("--array=0-4", "--cpus-per-task=4", "--mem=7630M", "--partition=main", "--time=10"):
        assert f"\n#SBATCH {line}\n" in told.output


def test_arrays_that_are_alike_are_told_together_and_each_script_once(dry: Here) -> None:
    told = dry(*slurm(max_array=2, calls_per_job=2, parallel_calls_per_job=1), images=9)

    assert said(told, "packing") == [
        "8 units in 2 arrays of 2 jobs: 2 units per job, 1 at a time",
        "1 unit in 1 array of 1 job: 1 unit per job, 1 at a time",
    ]
    assert re.findall(r"^----- script of (.*)$", told.output, re.MULTILINE) == [
        "0 T0, 1 of 2",
        "0 T0, 2 of 2",
    ]


def test_units_for_which_there_is_no_room_yet_are_told(dry: Here) -> None:
    told = dry(*slurm(max_array=4, max_workers=10, parallel_calls_per_job=1), images=100)

    in_arrays = [int(line.split()[0]) for line in said(told, "packing")]
    [waiting] = said(told, "waiting")
    assert waiting == f"{100 - sum(in_arrays)} units, until these have made room"


def test_units_beyond_those_that_a_run_submits_ahead_are_told(dry: Here) -> None:
    told = dry(*slurm(max_array=1000), images=PACKING_WINDOW + 1)

    assert said(told, "at first") == [f"{PACKING_WINDOW} units; the others as these end"]


def test_of_tasks_whose_images_are_not_known_yet_one_unit_is_told(dry: Here) -> None:
    told = dry(*slurm(), metas=[{}, LARGE])

    assert said(told, "for one unit") == [
        "how many there are is not known yet: depends on what task 0 (T0) does"
    ]
    assert said(told, "packing")[1] == "1 unit in 1 array of 1 job: 1 unit per job, 1 at a time"
    assert said(told, "each job")[1] == "2 CPUs, 4 GB, 10:00 min"


def test_a_compound_tasks_first_command_is_one_unit_and_its_second_is_told_of_one(dry: Here) -> None:
    told = dry(*slurm(), command_non_parallel="true", type="compound")

    assert said(told, "packing (once)") == ["1 unit in 1 array of 1 job: 1 unit per job, 1 at a time"]
    assert said(told, "for one unit") == ["how many there are, its first command lists only when it runs"]


def test_the_executor_is_the_one_that_the_task_names_with_its_class(place: Path, dry: Here) -> None:
    project = place / ".fractal-runner"
    project.mkdir()
    (project / "config.yaml").write_text(
        "executor: process\nslurm: {partition: main, max_array: 9}\n"
        "resource_classes: {large: {cpus: 3, queue: fat}}\n"
    )

    told = dry(metas=[{"executor": "slurm", "resource_class": "large"}, {}])

    assert said(told, "executor") == ["slurm", "process"]
    assert "\n#SBATCH --partition=fat\n" in told.output
    assert "\n#SBATCH --cpus-per-task=3\n" in told.output


def test_where_there_is_no_scheduler_that_is_a_warning_only(place: Path, dry: Here) -> None:
    for name in COMMANDS:
        (place.parent / "bin" / name).unlink()

    told = dry(*slurm())

    assert told.exit_code == 0
    assert "warning: the executor 'slurm' cannot be used here: no sbatch on PATH" in told.output


# What it tells of others


def test_local_executors_have_slots_as_far_as_what_units_need_allows(dry: Here) -> None:
    words = ("--executor", "process", "--executor-opt", "max_workers=6", "--executor-opt")

    told = dry(*words, "max_memory=9G", metas=[LARGE])

    assert said(told, "slots") == ["3 units, 2 at a time"]
    assert said(told, "each unit") == ["2 CPUs, 4 GB"]


def test_what_is_more_than_a_local_executor_has_is_a_warning(dry: Here) -> None:
    told = dry("--executor", "thread", "--executor-opt", "max_cpus=1", metas=[LARGE])

    assert told.exit_code == 0
    assert "warning: Task 0 ('T0'): 2 CPUs are more than the 1 of ThreadExecutor" in told.output
    assert said(told, "each unit") == ["1 CPU, 4 GB"]


def pool(**options: object) -> list[str]:
    words = ["--executor", "dask"]
    for name, value in options.items():
        words += ["--executor-opt", f"pool.{name.replace('__', '.')}={value}"]
    return words


def test_a_pools_packing_is_its_own_and_its_workers_jobs_are_told(place: Path, dry: Here) -> None:
    told = dry(
        *pool(workers="slurm", host="10.0.0.1", max_workers=2, cpus=4, slurm__partition="main"),
        *("--executor-opt", "pool.slurm.max_array=10", "--workflow-dir", "r"),
        metas=[LARGE],
    )

    assert told.exit_code == 0, told.output
    assert said(told, "packing") == ["the pool's: each of up to 2 workers takes one unit at a time"]
    assert said(told, "workers") == ["2 workers in 1 array of 2 jobs: 1 worker per job, 1 at a time"]
    assert said(told, "each job") == ["4 CPUs, the scheduler's default of memory and time"]
    for line in ("--array=0-1", "--cpus-per-task=4", "--partition=main", "--no-requeue"):
        assert f"\n#SBATCH {line}\n" in told.output
    assert not (place / "r").exists()


def test_a_pool_of_local_workers_has_slots(dry: Here) -> None:
    told = dry(*pool(workers="local", max_workers=2), images=5)

    assert said(told, "slots") == ["5 units, 2 at a time"]


@pytest.mark.parametrize("words", [["ray"], ["dask", "--executor-opt", "address=tcp://n1:8786"]])
def test_what_is_known_only_once_there_is_an_executor_is_called_that(dry: Here, words: list[str]) -> None:
    told = dry("--executor", *words)

    assert told.exit_code == 0, told.output
    assert said(told, "packing") == ["known once there is an executor: it places each unit by itself"]


# How it tells mistakes


@pytest.mark.parametrize(
    ("words", "meta", "mistake"),
    [
        (
            slurm(max_cpus_per_job=1),
            LARGE,
            "Task 0 ('T0'): meta_parallel: cpus=2 of a call exceeds max_cpus_per_job=1",
        ),
        (
            slurm(max_memory_per_job="5G"),
            {"mem": ["4G", "8G"]},
            "Task 0 ('T0'): meta_parallel: memory=8 GB of a call exceeds max_memory_per_job=5 GB",
        ),
        (
            slurm(setup='["a", "b\\u2028c"]'),
            {},
            "slurm: setup: 'b\\u2028c' is not a line of text (slurm.setup[0] is from --executor-opt setup=",
        ),
        (slurm(partitoin="main"), {}, "slurm.partitoin: unknown key: did you mean 'partition'?"),
        (slurm(), {"executor": "slrum"}, "unknown executor 'slrum': did you mean 'slurm'?"),
        (slurm(), {"mem": "4 apples"}, "Task 0 ('T0'): meta_parallel.mem: '4 apples'"),
        (pool(workers="slurm"), {}, "the workers of slurm have to reach this host"),
        (["--executor", "lsf"], LARGE, "does not say which LSF it is"),
        (["--last", "7"], {}, "last_task_index=7 is out of range"),
        (["--executor", "ray", "--executor-opt", "max_worker=2"], {}, "did you mean 'max_workers'?"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_made(
    place: Path, dry: Here, words: list[str], meta: dict[str, Any], mistake: str
) -> None:
    told = dry(*words, metas=[meta])

    assert told.exit_code == 2
    mistakes = [line for line in told.output.splitlines() if line.startswith("mistake: ")]
    assert len(mistakes) == 1, told.output
    assert mistake in mistakes[0]
    assert "script of" not in told.output
    assert sorted(path.name for path in place.iterdir()) == ["d.json", "w.json"]


def test_a_mistake_of_one_executor_is_told_once_for_all_of_its_tasks(dry: Here) -> None:
    told = dry(*slurm(extra_lines='["a", "b\\nc"]'), metas=[{}, {}, {}])

    assert told.exit_code == 2
    assert told.output.count("mistake: ") == 1


def test_a_preview_asks_for_what_a_submission_would_refuse(tmp_path: Path) -> None:
    preview = SlurmExecutor.previewer({"folder": tmp_path / "100%j", "max_array": 1})

    with pytest.raises(ValueError, match="submitit would replace '%j' in it; choose another folder"):
        preview(1, {})
