"""Tasks of installed packages: found in this environment or another, or said to be missing."""

from __future__ import annotations

import json
import os
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import InputFileError, load_workflow
from fractal_runner.workflow.manifest import TaskLookupError, find_packages, find_task

TASKS: list[dict[str, Any]] = [
    {"name": "Convert", "type": "converter_non_parallel", "executable_non_parallel": "tasks/convert.py"},
    {
        "name": "Both ways",
        "executable_non_parallel": "tasks/init.py",
        "executable_parallel": "tasks/compute.py",
        "input_types": {"is_3D": True},
        "meta_parallel": {"mem": 100},
        "args_schema_parallel": {"ignored": True},
    },
]


def install(
    site: Path, name: str = "My.Tasks", version: str = "1.2", tasks: Any = TASKS, **more: Any
) -> Path:
    """Put a package with a manifest into a site directory, as an installer leaves it."""
    root = site / "my_tasks"
    (root / "tasks").mkdir(parents=True)
    for script in ("convert", "init", "compute"):
        (root / "tasks" / f"{script}.py").touch()
    (root / "__FRACTAL_MANIFEST__.json").write_text(
        json.dumps(
            {"manifest_version": "2", "task_list": tasks, "authors": "unknown keys are ignored", **more}
        )
    )
    info = site / f"my_tasks-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("my_tasks/__FRACTAL_MANIFEST__.json,,\n")
    return root


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site directory of this interpreter."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    return place


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another virtual environment."""
    place = tmp_path_factory.mktemp("envs") / "tasks env"
    venv.create(place, symlinks=True, with_pip=False)
    return place


def test_a_task_is_found_by_package_version_and_name(site: Path) -> None:
    root = install(site)

    task = find_task(find_packages(), "my-tasks", "1.2", "Both ways")

    assert task.type == "compound"  # it follows from the executables
    assert task.command_parallel == f"{sys.executable} {root}/tasks/compute.py"
    assert (task.input_types, task.meta_parallel, task.pkg_name) == (
        {"is_3D": True},
        {"mem": 100},
        "My.Tasks",
    )
    assert find_task(find_packages(), "MY_tasks", None, "Convert").type == "converter_non_parallel"


@pytest.mark.parametrize(
    ("package", "version", "name", "expected"),
    [
        ("other", None, "Convert", "is not installed (task packages here: "),
        ("my-tasks", "1.3", "Convert", "is of my-tasks 1.3, but 1.2 is installed"),
        (
            "my-tasks",
            "1.2",
            "Convrt",
            "has no task 'Convrt': did you mean 'Convert'? (it has 'Convert', 'Both ways')",
        ),
    ],
)
def test_what_is_missing_is_said_beside_what_is_there(
    site: Path, package: str, version: str | None, name: str, expected: str
) -> None:
    install(site)

    with pytest.raises(TaskLookupError) as caught:
        find_task(find_packages(), package, version, name)

    assert expected in str(caught.value)
    assert "1.2" in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "more", "expected"),
    [
        ([{"name": "t", "executable_parallel": "../x.py"}], {}, "'../x.py' lies outside its package"),
        ([{"name": "t", "executable_parallel": "no.py"}], {}, "'no.py' is not in"),
        ([{"name": "t"}], {}, "task 't' has no executable"),
        ([{"executable_parallel": "x.py"}], {}, "task_list[0].name: Field required"),
        ([], {"manifest_version": "3"}, "version '2' is understood"),
    ],
)
def test_a_manifest_that_cannot_be_used_harms_only_its_own_tasks(
    site: Path, tasks: Any, more: Any, expected: str
) -> None:
    install(site, tasks=tasks, **more)

    packages = find_packages()

    with pytest.raises(TaskLookupError) as caught:
        find_task(packages, "my-tasks", None, "t")
    assert expected in str(caught.value)


def test_another_environment_is_asked_through_its_own_interpreter(environment: Path, tmp_path: Path) -> None:
    [site] = (environment / "lib").glob("python*/site-packages")
    root = install(site)
    python = environment / "bin" / "python"
    assert python.is_symlink()

    for given in (python, environment):
        task = find_task(find_packages(given), "my-tasks", "1.2", "Convert")
        assert task.command_non_parallel == f"'{python}' '{root}/tasks/convert.py'"

    path = tmp_path / "w.json"
    by_name = {"pkg_name": "my-tasks", "version": "1.2", "name": "Convert"}
    path.write_text(json.dumps({"name": "w", "task_list": [{"task": by_name}]}))
    assert load_workflow(path, task_env=python).task_list[0].task.name == "Convert"
    with pytest.raises(InputFileError, match="is not installed"):
        load_workflow(path)


def test_an_environment_that_cannot_be_asked_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    with pytest.raises(TaskLookupError, match="there is no Python interpreter at"):
        find_packages(broken)
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 4\n")
    with pytest.raises(TaskLookupError, match="is not executable"):
        find_packages(broken)
    os.chmod(broken, 0o755)  # noqa: PTH101
    with pytest.raises(TaskLookupError, match=r"exit code 4\): no such luck"):
        find_packages(broken)
    broken.write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(TaskLookupError, match="is not a Python that can be asked"):
        find_packages(broken)
