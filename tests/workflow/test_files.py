"""Files of workflows and datasets: exports of fractal-web, older ones, and those that a run writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import Dataset, Image, InputFileError, load_dataset, load_workflow
from fractal_runner.workflow.files import write_dataset, write_json

TASK = {"name": "t", "type": "parallel", "command_parallel": "true"}


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Writes a value as a JSON file."""

    def save(value: Any) -> Path:
        path = tmp_path / "file.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return save


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package, image-tasks 0.3, with a compound task."""
    site = tmp_path / "site"
    root = site / "image_tasks"
    info = site / "image_tasks-0.3.dist-info"
    root.mkdir(parents=True)
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Image_Tasks\nVersion: 0.3\n")
    (info / "RECORD").write_text("image_tasks/__FRACTAL_MANIFEST__.json,,\n")
    for name in ("init.py", "compute.py"):
        (root / name).touch()
    task = {
        "name": "Project",
        "type": "compound",
        "executable_non_parallel": "init.py",
        "executable_parallel": "compute.py",
        "input_types": {"is_3D": True},
        "output_types": {"is_3D": False},
        "meta_non_parallel": {"cpus_per_task": 1},
        "meta_parallel": {"cpus_per_task": 2},
    }
    (root / "__FRACTAL_MANIFEST__.json").write_text(
        json.dumps({"manifest_version": "2", "task_list": [task], "has_args_schemas": False})
    )
    monkeypatch.syspath_prepend(str(site))
    return root


@pytest.mark.parametrize("version", ["0.3", None])
def test_a_workflow_export_of_fractal_web_loads_as_it_is(saved: Any, package: Path, version: Any) -> None:
    export = {
        "name": "Plate",
        "description": None,
        "task_list": [
            {
                "meta_non_parallel": None,
                "meta_parallel": {"mem": "2G"},
                "args_non_parallel": {"level": 1},
                "args_parallel": None,
                "type_filters": {},
                "description": None,
                "alias": "mip",
                "task": {"pkg_name": "image-tasks", "version": version, "name": "Project"},
            }
        ],
    }

    [task] = load_workflow(saved(export)).task_list

    assert (task.id, task.order, task.alias) == (0, 0, "mip")
    assert (task.task.type, task.task.output_types) == ("compound", {"is_3D": False})
    assert task.task.command_non_parallel == f"{sys.executable} {package}/init.py"
    assert (task.task.pkg_name, task.task.version) == ("Image_Tasks", "0.3")
    assert (task.args_non_parallel, task.args_parallel, task.meta_parallel) == (
        {"level": 1},
        {},
        {"mem": "2G"},
    )


def test_a_dataset_export_of_fractal_web_loads_as_it_is(saved: Any) -> None:
    image = {
        "zarr_url": "/z/p.zarr/B/03/0",
        "origin": "/z/p.zarr/B/02/0",
        "attributes": {"plate": "p.zarr", "well": "B03", "acquisition": 0},
        "types": {"is_3D": True},
    }

    dataset = load_dataset(saved({"name": "d", "zarr_dir": "/z", "images": [image]}))

    assert dataset == Dataset(name="d", zarr_dir="/z", images=[Image(**image)])


@pytest.mark.parametrize("key", ["filters", "type_filters", "attribute_filters"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "it is empty and passed over"),
        (None, "it is empty and passed over"),
        ({"a": {}, "b": []}, "it is empty and passed over"),
        ({"is_3D": True}, "is not applied"),
        ({"types": {"is_3D": True}}, "is not applied"),
    ],
)
def test_legacy_keys_of_datasets_load_with_a_warning(saved: Any, key: str, value: Any, message: str) -> None:
    path = saved({"name": "d", "zarr_dir": "/z", key: value})

    with pytest.warns(UserWarning, match=f"'{key}'.*{message}"):
        dataset = load_dataset(path)

    assert dataset == Dataset(name="d", zarr_dir="/z")


def test_input_filters_of_a_workflow_task_are_its_type_filters(saved: Any) -> None:
    item = {
        "task": TASK,
        "input_filters": {"types": {"a": True, "b": True}, "attributes": {}},
        "type_filters": {"b": False},
    }

    with pytest.warns(UserWarning, match=r"task_list\[0\].input_filters"):
        workflow = load_workflow(saved({"name": "w", "task_list": [item]}))

    assert workflow.task_list[0].type_filters == {"a": True, "b": False}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{\n  "name": "d",\n  "zarr_dir": /z\n}', "line 3, column 15: not valid JSON"),
        ('{"name": "d"', "line 1, column 13: not valid JSON"),
        ('{"name": "d"}}', "line 1, column 14: not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_json_is_named_with_line_and_column(saved: Any, text: str, place: str) -> None:
    for load in (load_dataset, load_workflow):
        with pytest.raises(InputFileError, match=place):
            load(saved(text))


def test_a_directory_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="cannot be read: Is a directory"):
        load_dataset(tmp_path)


def test_the_zarr_dir_can_be_given_beside_the_file(saved: Any) -> None:
    path = saved({"name": "d", "zarr_dir": "/old"})

    assert load_dataset(path, zarr_dir="/new/").zarr_dir == "/new"


def test_a_dataset_is_written_as_it_is_read(tmp_path: Path) -> None:
    images = [
        Image(
            zarr_url=f"/z/{number} é\n",
            origin="/z/o" if number % 2 else None,
            attributes={"a": 1, "b": 1.0, "c": True, "d": "ü"},
            types={"t": False},
        )
        for number in range(2500)
    ]
    for dataset in (
        Dataset(name='"d"', zarr_dir="/z", images=images),
        Dataset(name="empty", zarr_dir="s3://b", id=3),
    ):
        write_dataset(tmp_path / "d.json", dataset)

        assert load_dataset(tmp_path / "d.json") == dataset
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]  # nothing is left beside it


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})

    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "folder.json", {})

    assert json.loads(path.read_text()) == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["folder.json", "state.json"]  # noqa: PTH208
