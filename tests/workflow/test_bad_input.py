"""Mistakes in what users write: each is answered with its place, its value and what would be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fractal_runner import (
    Dataset,
    Image,
    InputFileError,
    Task,
    Workflow,
    WorkflowTask,
    load_dataset,
    load_workflow,
)
from fractal_runner.workflow.urls import is_inside, normalise_url

TASK = {"name": "t", "type": "parallel", "command_parallel": "true"}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def workflow_of(*tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "w", "task_list": list(tasks), **more}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"name": "w" "v"}', "line 1, column 14: not valid JSON"),
        ("", "line 1, column 1: not valid JSON"),
        ("[]", "a workflow is a JSON object, and this is an array"),
        ('{"name": "w", "name": "v", "task_list": []}', "the key 'name' stands twice in one object"),
        (
            workflow_of({"task": TASK}, descriptoin="x"),
            "descriptoin: unknown field 'descriptoin': did you mean",
        ),
        (
            workflow_of({"task": TASK, "typ_filters": {}}),
            "task_list[0].typ_filters: unknown field 'typ_filters'",
        ),
        (workflow_of({"task": TASK, "type_filters": {"a": 1}}), "task_list[0].type_filters.a: "),
        (
            workflow_of({"task": TASK, "args_parallel": {"zarr_url": 1}}),
            "the argument 'zarr_url' is reserved",
        ),
        (
            workflow_of({"task": TASK, "args_non_parallel": {"x": 1}}),
            "has no non-parallel command to take it",
        ),
        (workflow_of({"task": {**TASK, "type": "paralel"}}), "task_list[0].task.type: "),
        (
            workflow_of({"task": {"name": "t", "type": "compound", "command_parallel": "x"}}),
            "task 't' is of type compound: it needs command_non_parallel or function_non_parallel",
        ),
        (
            workflow_of({"task": {**TASK, "command_non_parallel": "x"}}),
            "task 't' is of type parallel: it takes no command_non_parallel",
        ),
        (
            workflow_of({"task": {**TASK, "function_parallel": "a:b"}}),
            "has both command_parallel and function",
        ),
        (workflow_of({"task": {**TASK, "command_parallel": "echo 'x"}}), "cannot be split into words"),
        (workflow_of({"task": {"name": "t"}}), "has neither a command nor a function nor a pkg_name"),
        (workflow_of({"task": {"name": "t", "function_parallel": "a b"}}), "write 'package.module:name'"),
        (workflow_of({"task": TASK, "id": 1}, {"task": TASK}), "positions 0 and 1 have the same id, 1"),
        (
            workflow_of({"task": {"pkg_name": "no-such-package", "version": None, "name": "t"}}),
            "task_list[0].task: the package 'no-such-package' of task 't' is not installed",
        ),
    ],
)
def test_a_workflow_file_with_a_mistake_is_answered_with_its_place(
    tmp_path: Path, content: Any, expected: str
) -> None:
    path = written(tmp_path / "w.json", content)

    with pytest.raises(InputFileError) as caught:
        load_workflow(path)

    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"name": "d", "zarr_dir": "data", "images": []}, "zarr_dir: 'data' is neither an absolute path"),
        ({"name": "d", "zarr_dir": "/d/../e"}, "'..' as a component"),
        ({"name": "d", "zarr_dir": "s3://"}, "names no bucket"),
        ({"name": "d"}, "zarr_dir: Field required"),
        (
            {"name": "d", "zarr_dir": "/d", "images": [{"zarr_url": "/d/a"}, {"zarr_url": "/d//a/"}]},
            "images[0] and images[1] have the same zarr_url, '/d/a'",
        ),
        (
            {"name": "d", "zarr_dir": "/d", "images": [{"zarr_url": "/d/a", "attributes": {"x": None}}]},
            "images[0].attributes.x: should be text, a finite number, true or false",
        ),
        (
            {"name": "d", "zarr_dir": "/d", "images": [{"zarr_url": "/d/a", "types": {"x": "yes"}}]},
            "images[0].types.x",
        ),
    ],
)
def test_a_dataset_file_with_a_mistake_is_answered_with_its_place(
    tmp_path: Path, content: Any, expected: str
) -> None:
    path = written(tmp_path / "d.json", content)

    with pytest.raises(InputFileError) as caught:
        load_dataset(path)

    assert expected in str(caught.value)


def test_all_mistakes_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path / "w.json",
        workflow_of(
            {"task": {"pkg_name": "nowhere", "version": "1", "name": "t"}, "typ": 1},
            {"task": TASK, "args_parallel": {"init_args": 1}},
        ),
    )

    with pytest.raises(InputFileError) as caught:
        load_workflow(path)

    assert len(caught.value.problems) == 3


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"no\.json: cannot be read: No such file or directory"):
        load_workflow(tmp_path / "no.json")
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(InputFileError, match="is not UTF-8 text"):
        load_dataset(tmp_path / "latin.json")


def test_legacy_keys_load_with_a_warning(tmp_path: Path) -> None:
    dataset = {
        "name": "d",
        "zarr_dir": "/d",
        "images": [],
        "filters": {"types": {"a": True}, "attributes": {}},
    }
    task = {"task": TASK, "input_filters": {"types": {"is_3D": True}, "attributes": {}}}

    with pytest.warns(UserWarning, match="'filters'.* is a key of older exports and is not applied"):
        load_dataset(written(tmp_path / "d.json", dataset))
    with pytest.warns(UserWarning, match="input_filters is a key of older exports"):
        workflow = load_workflow(written(tmp_path / "w.json", workflow_of(task)))

    assert workflow.task_list[0].type_filters == {"is_3D": True}


def test_the_export_formats_load_as_they_are_but_for_the_tasks_place(tmp_path: Path) -> None:
    exported = {
        "name": "d",
        "zarr_dir": "/d/",
        "images": [
            {"zarr_url": "/d/a", "origin": None, "attributes": {"well": "A01"}, "types": {"is_3D": False}}
        ],
    }

    dataset = load_dataset(written(tmp_path / "d.json", exported))

    assert dataset == Dataset(
        name="d",
        zarr_dir="/d",
        images=[Image(zarr_url="/d/a", attributes={"well": "A01"}, types={"is_3D": False})],
    )
    nulls = dict.fromkeys(("meta_parallel", "meta_non_parallel", "args_parallel", "args_non_parallel"))
    workflow = load_workflow(written(tmp_path / "w.json", workflow_of({"task": TASK, **nulls})))
    assert workflow.task_list[0].args_parallel == {}


def test_id_and_order_default_to_the_position() -> None:
    tasks = [WorkflowTask(task=Task(**TASK)), WorkflowTask(task=Task(**TASK), id=7, order=5)]

    numbered = Workflow(name="w", task_list=tasks).task_list

    assert [(task.id, task.order) for task in numbered] == [(0, 0), (7, 5)]


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("/a/b", "/a/b"),
        ("//a//b/./c/", "/a/b/c"),
        ("/", "/"),
        ("/a /b\n/ü", "/a /b\n/ü"),
        ("/a/.hidden", "/a/.hidden"),
        ("/a..b/c", "/a..b/c"),
        ("s3://b/k//x/", "s3://b/k//x"),
        ("s3://b", "s3://b"),
    ],
)
def test_urls_have_one_form(given: str, normal: str) -> None:
    assert normalise_url(given) == normal
    assert normalise_url(normal) == normal


@pytest.mark.parametrize(
    "given", ["", "a", "./a", "/a/../b", "s3://", "s3:///k", "s3://b/../c", "/a\0b", "http://x/y"]
)
def test_other_urls_are_refused(given: str) -> None:
    with pytest.raises(ValidationError):
        Image(zarr_url=given)


def test_inside_is_by_components() -> None:
    assert is_inside("/data/plate/a", "/data/plate")
    assert is_inside("/a", "/")
    assert not is_inside("/data/plate2", "/data/plate")
    assert not is_inside("/data/plate", "/data/plate")
    assert is_inside("s3://b/x", "s3://b")
    assert not is_inside("s3://bb/x", "s3://b")
