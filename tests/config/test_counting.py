"""What the configuration says is what runs: which executor, how it is made, what units ask for."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fractal_runner import (
    Dataset,
    Image,
    InputFileError,
    Task,
    ThreadExecutor,
    Workflow,
    WorkflowTask,
    process_workflow,
)
from fractal_runner.cli.app import app
from fractal_runner.executors import factories, sections
from tests.config.conftest import Layers
from tests.executors.batch import standin
from tests.executors.batch.standin import StandIn


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """The executors called "batch" that are made."""
    monkeypatch.setitem(factories._PLACES, "batch", standin.PLACE)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn.made


@pytest.fixture
def cli(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the program in the project's directory, where w.json is a workflow of one task."""
    monkeypatch.chdir(layers.start)
    task = {"name": "T", "command_parallel": "true"}
    Path("w.json").write_text(json.dumps({"name": "w", "task_list": [{"task": task}]}))
    images = [{"zarr_url": "/d/1", "attributes": {}, "types": {}}]
    Path("d.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))
    return lambda *words: CliRunner().invoke(app, [*words])


RUN = ("run", "w.json", "--dataset", "d.json", "--workflow-dir", "r")


def recorded(directory: Path) -> Any:
    """The executor that a run's history has."""
    with sqlite3.connect(directory / "history.sqlite", timeout=30) as database:
        [(text,)] = database.execute("select executor from fractal_runner_runs").fetchall()
    database.close()
    return None if text is None else json.loads(text)


def note(*, zarr_url: str) -> None:
    """A task that has nothing to do."""


async def run(
    directory: Path,
    *,
    meta: Mapping[str, Any] | None = None,
    package: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """One task over one image.

    Args:
        directory: the run's.
        meta: the workflow task's.
        package: the task's.
        more: for process_workflow.
    """
    task = Task(name="F", function_parallel=note, meta_parallel=dict(package or {}))
    await process_workflow(
        workflow=Workflow(name="w", task_list=[WorkflowTask(task=task, meta_parallel=dict(meta or {}))]),
        dataset=Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url="/z/0")]),
        workflow_dir_local=directory,
        **more,
    )


# Which executor it is


@pytest.mark.parametrize(
    "layer", ["built-in", "installation", "site", "project", "environment", "command line"]
)
def test_each_layer_alone_can_choose_the_executor_of_a_run(
    layers: Layers, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    words = list(RUN)
    if layer in layers.files:
        layers.write(layer, "executor: serial\n")
    elif layer == "environment":
        monkeypatch.setenv("FRACTAL_RUNNER_EXECUTOR", "serial")
    elif layer == "command line":
        words += ["--executor", "serial"]

    answer = cli(*words)

    assert answer.exit_code == 0, answer.output
    assert recorded(Path("r")) == ["thread" if layer == "built-in" else "serial", {}]


@pytest.mark.parametrize("layer", ["installation", "site", "project", "environment"])
async def test_calls_from_python_have_the_same_layers(
    layers: Layers, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    monkeypatch.chdir(layers.start)
    if layer == "environment":
        monkeypatch.setenv("FRACTAL_RUNNER__PROCESS__MAX_WORKERS", "1")
        monkeypatch.setenv("FRACTAL_RUNNER_EXECUTOR", "process")
    else:
        layers.write(layer, "executor: process\nprocess: {max_workers: 1}\n")

    await run(layers.start / "r")

    assert recorded(layers.start / "r") == ["process", {"max_workers": 1}]


async def test_what_is_given_in_python_counts_over_all_layers(
    layers: Layers, stand_ins: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers.start)
    layers.write("project", "executor: serial\nbatch: {max_workers: 3, partition: main}\n")
    monkeypatch.setenv("FRACTAL_RUNNER__BATCH__MAX_WORKERS", "4")

    await run(layers.start / "r", executor=("batch", {"partition": "long"}))
    await run(layers.start / "s", executor=StandIn)

    assert [(one.max_workers, one.partition) for one in stand_ins] == [(4, "long"), (4, "main")]
    assert recorded(layers.start / "r") == ["batch", {"max_workers": 4, "partition": "long"}]
    assert [one.folder for one in stand_ins] == [str(layers.start / name / "jobs" / "batch") for name in "rs"]


async def test_another_configuration_may_be_given(layers: Layers) -> None:
    layers.write("project", "executor: serial\n")

    await run(layers.start / "r", config=sections.load(start=layers.start))
    await run(layers.start / "s")  # from the directory above, where there is none

    assert [recorded(layers.start / name)[0] for name in "rs"] == ["serial", "thread"]
    with pytest.raises(TypeError, match="config is dict, not Config: read one with"):
        await run(layers.start / "t", config={"executor": "serial"})


async def test_an_executor_that_a_task_names_has_its_section_too(
    layers: Layers, stand_ins: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers.start)
    layers.write("site", "batch: {partition: main}\n")

    await run(layers.start / "r", meta={"executor": "batch"})

    assert [one.partition for one in stand_ins] == ["main"]


async def test_an_instance_is_taken_as_it_is(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layers.start)
    layers.write("project", "executor: serial\nthread: {max_workers: 7}\n")

    with ThreadExecutor(2) as executor:
        await run(layers.start / "r", executor=executor)

    assert recorded(layers.start / "r") is None


async def test_a_mistake_anywhere_means_that_nothing_runs(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers.start)
    file = layers.write("project", "executor: slrum\n")

    with pytest.raises(InputFileError, match=rf"{file}:1: executor: .*did you mean 'slurm'"):
        await run(layers.start / "r", executor="serial")

    assert not (layers.start / "r").exists()


async def test_what_a_constructor_refuses_is_told_with_its_place(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers.start)
    file = layers.write("site", "slurm:\n  partition: main\n  command_prefix: [hop, '']\n")

    with pytest.raises(InputFileError) as caught:
        await run(layers.start / "r", executor="slurm")

    problem = "the configuration is wrong: slurm: command_prefix: ['hop', ''] is no command"
    assert str(caught.value).startswith(problem)
    assert f"slurm.command_prefix[1] is from {file}:3" in str(caught.value)
    assert "partition" not in str(caught.value)


async def test_what_python_gives_wrongly_is_not_blamed_on_a_file(
    layers: Layers, stand_ins: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers.start)
    layers.write("site", "batch: {partition: main}\n")

    with pytest.raises(ValueError, match="max_workers must be greater than 0") as caught:
        await run(layers.start / "r", executor=("batch", {"max_workers": 0}))

    assert "site.yaml" not in str(caught.value)


# What units ask for


async def test_a_class_that_a_workflow_task_names_raises_what_its_package_has_set(
    layers: Layers, stand_ins: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers.start)
    large = "large: {gpus: 2, queue: gpu, extra: {constraint: a100, qos: high}}"
    layers.write("installation", f"executor: batch\nresource_classes:\n  {large}\n")

    await run(
        layers.start / "r",
        meta={"resource_class": "large", "gpus": 1},
        package={"partition": "small", "gpus": 0},
    )

    [one] = stand_ins
    assert one.seen[-1] == {
        "queue": "gpu",
        "account": None,
        "gpus": 1,
        "extra": {"constraint": "a100", "qos": "high"},
    }


async def test_a_class_that_there_is_not_is_named_with_its_task(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers.start)
    layers.write("project", "resource_classes: {large: {cpus: 2}}\n")

    with pytest.raises(ValueError, match=r"\('F'\): meta_parallel.resource_class: .*did you mean 'large'"):
        await run(layers.start / "r", meta={"resource_class": "lagre"})


async def test_another_class_does_not_make_a_unit_another_one(
    layers: Layers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(layers.start)
    layers.write("project", "resource_classes: {large: {cpus: 2}}\nthread: {max_cpus: 4}\n")
    await run(layers.start / "r")

    await run(layers.start / "r", meta={"resource_class": "large"}, resume=True)

    with sqlite3.connect(layers.start / "r" / "history.sqlite") as database:
        states = database.execute("select state, attempt from fractal_runner_units").fetchall()
    database.close()
    assert states == [("done", 1)]


def test_check_tells_what_units_get(layers: Layers, cli: Callable[..., Result]) -> None:
    layers.write(
        "project", "defaults: {cpus: 2}\nresource_classes: {big: {memory: 3G}}\nthread: {max_cpus: 2}\n"
    )
    task = {"name": "T", "command_parallel": "true"}
    one = {"task": task, "meta_parallel": {"resource_class": "big"}}
    Path("w.json").write_text(json.dumps({"name": "w", "task_list": [one]}))

    answer = cli("check", "w.json", "--dataset", "d.json")

    assert answer.exit_code == 0, answer.output
    assert "resources         2 CPUs, 3 GB" in answer.output


def test_check_tells_the_configurations_mistakes_among_the_others(
    layers: Layers, cli: Callable[..., Result]
) -> None:
    file = layers.write("project", "thread: {max_worker: 2}\n")

    answer = cli("check", "w.json", "--dataset", "d.json", "--first", "7")

    assert answer.exit_code == 2
    assert f"mistake: {file}:1: thread.max_worker: unknown key: did you mean 'max_workers'?" in answer.output
    assert answer.output.count("mistake: ") == 2


def test_classes_of_a_configuration_that_is_wrong_elsewhere_are_not_missed(
    layers: Layers, cli: Callable[..., Result]
) -> None:
    layers.write("project", "resource_classes: {large: {cpus: 2}}\nthread: {max_worker: 2}\n")
    named = {"task": {"name": "T", "command_parallel": "true"}, "meta_parallel": {"resource_class": "large"}}
    Path("w.json").write_text(json.dumps({"name": "w", "task_list": [named]}))

    answer = cli("check", "w.json", "--dataset", "d.json")

    assert answer.exit_code == 2
    assert answer.output.count("mistake: ") == 1, answer.output


# In a resume


def test_a_resume_keeps_the_executor_that_is_recorded_whatever_the_files_say_by_now(
    layers: Layers, cli: Callable[..., Result], stand_ins: list[StandIn]
) -> None:
    layers.write("project", "executor: batch\nbatch: {partition: main, path_map: {/a: /b}}\n")
    assert cli(*RUN, "--max-workers", "5").exit_code == 0
    layers.write("project", "executor: serial\nbatch: {partition: other, path_map: {/c: /d}}\n")

    assert cli("resume", "r").exit_code == 0
    assert cli("resume", "r", "--executor-opt", "partition=long").exit_code == 0
    assert cli("resume", "r", "--executor", "thread").exit_code == 0

    assert [(one.partition, one.max_workers) for one in stand_ins] == [("main", 5), ("main", 5), ("long", 5)]
    assert stand_ins[1].path_map == {"/a": "/b", "/c": "/d"}
    assert recorded(Path("r"))[0] == "thread"


def test_a_resume_from_elsewhere_finds_the_project_of_the_runs_directory(
    layers: Layers, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layers.write("project", "resource_classes: {big: {memory: 3G}}\n")
    task = {"name": "T", "command_parallel": "true"}
    one = {"task": task, "meta_parallel": {"resource_class": "big"}}
    Path("w.json").write_text(json.dumps({"name": "w", "task_list": [one]}))
    assert cli(*RUN).exit_code == 0
    monkeypatch.chdir(tmp_path)

    answer = cli("resume", str(layers.start / "r"))

    assert answer.exit_code == 0, answer.output


# On the command line


def test_show_prints_what_all_layers_say_and_where(layers: Layers, cli: Callable[..., Result]) -> None:
    site = layers.write("site", "slurm:\n  partition: main\n")
    layers.write("project", "executor: slurm\n")

    assert cli("config", "show").output == "executor: slurm\nslurm:\n  partition: main\n"
    assert cli("config", "show", "slurm.partition").output == "slurm:\n  partition: main\n"
    answer = cli("config", "show", "--origin", "slurm")
    assert answer.output == f"slurm:\n  partition: main  # site: {site}:2\n"
    head = cli("config", "show", "--origin").output
    assert f"# installation  {layers.files['installation']} (there is none)\n" in head
    assert f"# site          {site}\n" in head


def test_show_of_a_key_that_nobody_has_said_names_the_nearest(
    layers: Layers, cli: Callable[..., Result]
) -> None:
    layers.write("site", "slurm:\n  partition: main\n")

    answer = cli("config", "show", "slurm.partitoin")

    assert answer.exit_code == 2
    assert "nothing is said of 'slurm.partitoin': did you mean 'slurm.partition'?" in answer.output


def test_check_of_files_tells_all_of_their_mistakes(layers: Layers, cli: Callable[..., Result]) -> None:
    Path("a.yaml").write_text("slurm: {mem: 4X}\ndefaults: {cpu: 1}\n")
    Path("b.yaml").write_text("executor: thread\n")

    wrong = cli("config", "check", "a.yaml", "b.yaml", "c.yaml")
    right = cli("config", "check", "b.yaml")

    assert wrong.exit_code == 2
    assert [line.split(":")[1] for line in wrong.output.splitlines()] == [" a.yaml", " a.yaml", " c.yaml"]
    assert (right.exit_code, right.output) == (0, "No mistakes found.\n")


def test_check_without_files_looks_at_all_layers(layers: Layers, cli: Callable[..., Result]) -> None:
    assert cli("config", "check").exit_code == 0
    file = layers.write("site", "executor: [thread]\n")

    answer = cli("config", "check")

    assert answer.exit_code == 2
    assert f"mistake: {file}:1: executor: this is a list" in answer.output
