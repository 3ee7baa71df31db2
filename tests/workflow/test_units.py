"""The units that a task is cut into, what each is called with, and where its files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import Dataset, Image, Task, UnitFinished, WorkflowTask

KEEP = "import shutil; shutil.copy(sys.argv[sys.argv.index('--args-json') + 1], out + '.seen')\n"


def seen(folder: Path, half: str) -> list[dict[str, Any]]:
    """What the units of a stage were called with, in unit order."""
    paths = sorted(folder.rglob(f"{half}*.seen"))
    return [json.loads(path.read_text()) for path in paths]


async def test_a_non_parallel_task_is_one_unit_with_all_urls(
    run: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    task = Task(name="N", command_non_parallel=script(KEEP))

    await run(WorkflowTask(task=task, args_non_parallel={"x": [1]}), dataset=images(2))

    assert seen(tmp_path / "run", "non_par") == [{"zarr_dir": "/z", "zarr_urls": ["/z/0", "/z/1"], "x": [1]}]


async def test_a_converter_is_given_no_urls(run: Any, script: Any, tmp_path: Path) -> None:
    task = Task(name="N", type="converter_non_parallel", command_non_parallel=script(KEEP))

    await run(WorkflowTask(task=task, args_non_parallel={"x": None}))

    assert seen(tmp_path / "run", "non_par") == [{"zarr_dir": "/z", "x": None}]


async def test_a_parallel_task_is_a_unit_per_image(
    run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    await run(parallel(script(KEEP), args_parallel={"x": 1.5}), dataset=images(2))

    assert seen(tmp_path / "run", "par") == [{"zarr_url": "/z/0", "x": 1.5}, {"zarr_url": "/z/1", "x": 1.5}]


@pytest.mark.parametrize("kind", ["compound", "converter_compound"])
async def test_a_compound_task_is_an_init_unit_and_one_per_listed_element(
    run: Any, script: Any, images: Any, tmp_path: Path, kind: str
) -> None:
    init = """
write({"parallelization_list": [
    {"zarr_url": "/z/0", "init_args": {"n": 1}},
    {"zarr_url": "/z/new/"},
    {"zarr_url": "/z/0", "init_args": {"n": 2}},
    {"init_args": {"n": 1}, "zarr_url": "/z//0"},
]})
"""
    task = Task(name="C", type=kind, command_non_parallel=script(KEEP + init), command_parallel=script(KEEP))

    await run(WorkflowTask(task=task, args_non_parallel={"a": 1}, args_parallel={"b": 2}), dataset=images(1))

    urls = {} if kind == "converter_compound" else {"zarr_urls": ["/z/0"]}
    assert seen(tmp_path / "run", "non_par") == [{"zarr_dir": "/z", **urls, "a": 1}]
    assert seen(tmp_path / "run", "par") == [  # each element once, in the order of the list
        {"zarr_url": "/z/0", "init_args": {"n": 1}, "b": 2},
        {"zarr_url": "/z/new", "init_args": {}, "b": 2},
        {"zarr_url": "/z/0", "init_args": {"n": 2}, "b": 2},
    ]


@pytest.mark.parametrize("left", ["", "write('null')", "write({})", "write({'parallelization_list': []})"])
async def test_an_empty_parallelization_list_is_a_success(
    run: Any, script: Any, images: Any, left: str
) -> None:
    task = Task(
        name="C",
        command_non_parallel=script(left),
        command_parallel=script("sys.exit(1)"),
        output_types={"t": True},
    )

    after = await run(task, dataset=images(2))

    assert [image.types for image in after.images] == [{"t": True}] * 2


async def test_an_init_unit_may_list_nothing_but_its_list(run: Any, script: Any) -> None:
    task = Task(
        name="C", command_non_parallel=script("write({'image_list_updates': []})"), command_parallel="true"
    )

    with pytest.raises(ValueError, match="unknown field 'image_list_updates'"):
        await run(task)


async def test_files_stand_in_the_tasks_folder_by_stage_batch_and_index(
    run: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    init = script("write({'parallelization_list': [{'zarr_url': f'/z/{n}'} for n in range(2)]})")
    task = Task(name="My Task-1", command_non_parallel=init, command_parallel=script("write({})"))

    await run(task, dataset=images(1))

    assert sorted(path.name for path in (tmp_path / "run" / "0_my_task_1").iterdir()) == [
        f"{unit}-{name}"
        for unit in ("non_par", "par-000000-0000000", "par-000000-0000001")
        for name in ("args.json", "log.txt", "metadiff.json")
    ]


async def test_a_task_of_more_than_a_thousand_units_has_a_folder_per_thousand(
    run: Any, images: Any, tmp_path: Path
) -> None:
    def fail_some(*, zarr_url: str) -> None:
        if zarr_url in ("/z/0", "/z/999", "/z/1000"):
            raise ValueError("a log")

    with pytest.raises(RuntimeError) as caught:
        await run(Task(name="F", function_parallel=fail_some), dataset=images(1001))

    top = tmp_path / "run" / "0_f"
    assert [failure.log_file for failure in caught.value.failures] == [  # type: ignore[attr-defined]
        f"{top}/000000/par-000000-0000000-log.txt",
        f"{top}/000000/par-000000-0000999-log.txt",
        f"{top}/000001/par-000001-0001000-log.txt",
    ]
    assert all(Path(failure.log_file).is_file() for failure in caught.value.failures)  # type: ignore[attr-defined]


async def test_a_task_of_a_thousand_units_needs_no_folder_of_its_own_for_them(
    run: Any, images: Any, tmp_path: Path
) -> None:
    def nothing(*, zarr_url: str) -> None: ...

    await run(Task(name="F", function_parallel=nothing), dataset=images(1000))

    assert list((tmp_path / "run" / "0_f").iterdir()) == []


async def test_there_is_no_cap_on_the_number_of_units(run: Any) -> None:
    def init(*, zarr_dir: str, zarr_urls: list[str]) -> dict[str, Any]:
        return {"parallelization_list": [{"zarr_url": f"/z/{n}"} for n in range(20_001)]}

    def compute(*, zarr_url: str, init_args: dict[str, Any]) -> None: ...

    ended = 0

    def count(event: object) -> None:
        nonlocal ended
        ended += isinstance(event, UnitFinished) and event.stage == "par"

    await run(Task(name="C", function_non_parallel=init, function_parallel=compute), on_event=count)

    assert ended == 20_001


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("../../etc/x", "0_______etc_x"),
        ("Cellpose 3D", "0_cellpose_3d"),
        ("Ünïcode", "0__n_code"),
        (".", "0__"),
        ("a\nb\0c", "0_a_b_c"),
    ],
)
async def test_no_name_of_a_task_leads_out_of_the_directory(
    run: Any, script: Any, tmp_path: Path, name: str, folder: str
) -> None:
    await run(Task(name=name, command_parallel=script(KEEP)))

    [path] = tmp_path.rglob("*.seen")
    assert path.parent == tmp_path / "run" / folder


async def test_a_name_of_any_length_is_a_folder(run: Any, parallel: Any, tmp_path: Path) -> None:
    await run(parallel(name="n" * 1000))

    assert len(list((tmp_path / "run").glob("0_nnn*"))) == 1


async def test_the_dataset_and_the_filters_are_written_after_every_task(
    run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    look = f"""
import shutil
for name in ("dataset.json", "filters.json"):
    shutil.copy({str(tmp_path / "run")!r} + "/" + name, {str(tmp_path)!r} + "/seen-" + name)
"""

    await run(parallel(output_types={"a": True}), parallel(script(look), output_types={"b": True}))

    between = json.loads((tmp_path / "seen-dataset.json").read_text())
    after = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert between["images"] == [{"zarr_url": "/z/0", "origin": None, "attributes": {}, "types": {"a": True}}]
    assert after["images"][0]["types"] == {"a": True, "b": True}
    assert json.loads((tmp_path / "seen-filters.json").read_text())["type_filters"] == {"a": True}


async def test_a_function_changes_no_other_units_arguments(run: Any, images: Any) -> None:
    def append(*, zarr_url: str, items: list[str]) -> dict[str, Any]:
        items.append(zarr_url)
        return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"n": len(items)}}]}

    task = WorkflowTask(task=Task(name="F", function_parallel=append), args_parallel={"items": []})

    after = await run(task, dataset=images(3))

    assert [image.attributes["n"] for image in after.images] == [1, 1, 1]


async def test_images_outside_the_zarr_dir_are_units_like_others(run: Any, parallel: Any) -> None:
    dataset = Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url="s3://b/x")])

    after = await run(parallel(output_types={"t": True}), dataset=dataset)

    assert after.images == [Image(zarr_url="s3://b/x", types={"t": True})]
