"""The demo, as `make demo` runs it, with fewer wells: real tasks on real images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]

PROGRAM = str(Path(sys.executable).parent / "fractal-runner")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=500, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, top: Path, task_python: Path) -> Path:
    """A folder in which the demo has run for four wells."""
    folder = tmp_path_factory.mktemp("demo")
    example = top / "examples" / "ihc_plate"
    made = run(task_python, example / "make_plate.py", folder, "--wells", "4")
    assert made.returncode == 0, made.stderr
    ran = run(
        *(PROGRAM, "run", example / "workflow.json", "--dataset", example / "dataset.json"),
        *("--zarr-dir", folder, "--task-env", task_python, "--max-workers", "2"),
        *("--workflow-dir", folder / "run", "--output", folder / "after.json"),
    )
    assert ran.returncode == 0, ran.stderr
    return folder


def test_the_type_filters_select_the_projections_of_all_images(demo: Path) -> None:
    images = json.loads((demo / "after.json").read_text())["images"]

    assert len(images) == 8
    assert sum(image["types"] == {"is_3D": False} for image in images) == 4
    measured = sorted((demo / "run" / "3_measure_features").glob("*-args.json"))
    urls = {json.loads(path.read_text())["zarr_url"] for path in measured}
    assert urls == {image["zarr_url"] for image in images if not image["types"]["is_3D"]}


def test_the_nuclei_are_counted_and_drawn(demo: Path, top: Path, task_python: Path) -> None:
    script = top / "examples" / "ihc_plate" / "show_nuclei.py"
    shown = run(task_python, script, demo / "after.json", demo / "plate.png")

    assert shown.returncode == 0, shown.stderr
    assert (demo / "plate.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"A\s+7\s+14\s+10\s+\d+", shown.stdout), shown.stdout


def test_a_run_that_begins_in_the_middle_goes_on_from_the_files_of_the_first(
    demo: Path, top: Path, task_python: Path
) -> None:
    example = top / "examples" / "ihc_plate"
    filters = json.loads((demo / "run" / "filters.json").read_text())
    assert filters["type_filters"] == {"is_3D": False}

    ran = run(
        *(PROGRAM, "run", example / "workflow.json", "--dataset", demo / "run" / "dataset.json"),
        *("--task-env", task_python, "--workflow-dir", demo / "again", "--first", "3"),
        *("--type-filter", "is_3D=false", "--attribute-filter", "well=A01"),
    )

    assert ran.returncode == 0, ran.stderr
    assert len(list((demo / "again" / "3_measure_features").glob("*-args.json"))) == 1


def test_the_tasks_of_the_environment_are_listed(task_python: Path) -> None:
    listed = run(PROGRAM, "tasks", "--task-env", task_python)

    assert listed.returncode == 0
    assert "fractal-tasks-core 2.1.0" in listed.stdout
    assert "Threshold" in listed.stdout


def test_the_demo_killed_in_its_third_task_is_resumed_as_the_readme_shows(
    demo: Path, top: Path, task_python: Path, tmp_path: Path
) -> None:
    printed = re.search(r"^```sh\n(.*?)^```$", (top / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert printed is not None
    # The same words in another place: a plate of four wells, and a directory of this test's own.
    script = (
        printed[1].replace(".venv/bin/fractal-runner", PROGRAM).replace("runs/plate", str(tmp_path / "run"))
    )
    script = script.replace("examples/ihc_plate/out", str(demo)).replace(
        ".venv-tasks/bin/python", str(task_python)
    )
    script = script.replace("examples/ihc_plate", str(top / "examples" / "ihc_plate"))

    shown = run("bash", "-c", script)

    assert shown.returncode == 0, shown.stderr
    assert "2 Threshold Segmentation     interrupted" in shown.stdout
    images = json.loads((tmp_path / "run" / "dataset.json").read_text())["images"]
    assert images == json.loads((demo / "after.json").read_text())["images"]
