"""Tasks from environments of their own: made for real, asked through their own interpreter, run by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import InputFileError, load_workflow
from fractal_runner.workflow.manifest import TaskLookupError, find_packages, find_task

TASK = {"name": "Mark", "executable_parallel": "mark.py", "output_types": {"marked": True}}
MARK = """
import json, sys
assert sys.prefix == {prefix!r}, sys.prefix
"""


def manifest(*tasks: dict[str, Any], **more: Any) -> str:
    return json.dumps({"manifest_version": "2", "task_list": list(tasks), **more})


def put_package(site: Path, name: str, version: str, text: str) -> Path:
    """A package as an installer leaves it, with this manifest."""
    module = name.lower().replace("-", "_").replace(".", "_")
    root = site / module
    info = site / f"{module}-{version}.dist-info"
    root.mkdir()
    info.mkdir()
    (root / "mark.py").write_text("")
    (root / "__FRACTAL_MANIFEST__.json").write_text(text)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{module}/__FRACTAL_MANIFEST__.json,,\n")
    return root


def make_environment(place: Path, *options: str) -> Path:
    """A virtual environment; its site-packages."""
    command = [sys.executable, "-m", "venv", "--without-pip", *options, str(place)]
    subprocess.run(command, check=True, timeout=60)
    [site] = place.glob("lib/python*/site-packages")
    return site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    return place


def test_a_missing_package_is_answered_with_those_that_are_there(site: Path) -> None:
    put_package(site, "beta-tasks", "2", manifest(TASK))
    put_package(site, "Alpha.Tasks", "1", manifest(TASK))

    with pytest.raises(TaskLookupError, match=r"'gamma' .*is not installed .*Alpha.Tasks 1.*beta-tasks 2"):
        find_task(find_packages(), "gamma", None, "Mark")


@pytest.mark.parametrize("spelling", ["alpha-tasks", "Alpha_Tasks", "ALPHA.TASKS", "alpha--_.tasks"])
def test_names_of_packages_compare_as_pep_503_has_it(site: Path, spelling: str) -> None:
    put_package(site, "Alpha.Tasks", "1", manifest(TASK))

    assert find_task(find_packages(), spelling, "1", "Mark").name == "Mark"


def test_an_unknown_task_is_answered_with_those_that_are_there(site: Path) -> None:
    put_package(site, "alpha", "1", manifest(TASK, {**TASK, "name": "Other"}))

    with pytest.raises(TaskLookupError, match=r"alpha 1 has no task 'Zzz'.*it has 'Mark', 'Other'"):
        find_task(find_packages(), "alpha", None, "Zzz")


def test_a_manifest_that_is_not_json_harms_nobody_else(site: Path) -> None:
    put_package(site, "alpha", "1", "{bad")
    put_package(site, "beta", "1", manifest(TASK))

    packages = find_packages()

    assert find_task(packages, "beta", None, "Mark").name == "Mark"
    with pytest.raises(TaskLookupError, match=r"the manifest of alpha 1 is not valid: .*line 1"):
        find_task(packages, "alpha", None, "Mark")


def test_unknown_keys_of_a_manifest_are_ignored(site: Path) -> None:
    task = {**TASK, "args_schema_parallel": {"type": "object"}, "docs_link": "https://x", "tags": ["a"]}
    put_package(site, "alpha", "1", manifest(task, has_args_schemas=True, authors=None))

    assert find_task(find_packages(), "alpha", None, "Mark").output_types == {"marked": True}


@pytest.mark.parametrize("executable", ["/bin/true", "../mark.py", "a/../../mark.py", "absent.py", "."])
def test_an_executable_outside_its_package_or_missing_is_refused(site: Path, executable: str) -> None:
    put_package(site, "alpha", "1", manifest({**TASK, "executable_parallel": executable}))

    with pytest.raises(TaskLookupError, match="the manifest of alpha 1 is not valid: the executable"):
        find_task(find_packages(), "alpha", None, "Mark")


async def test_a_task_of_an_environment_is_run_by_its_own_interpreter(
    run: Any, images: Any, tmp_path: Path
) -> None:
    place = tmp_path / "an env"
    root = put_package(make_environment(place), "alpha", "1", manifest(TASK))
    (root / "mark.py").write_text(MARK.format(prefix=str(place)))
    workflow_file = tmp_path / "w.json"
    by_name = {"pkg_name": "alpha", "version": None, "name": "Mark"}
    workflow_file.write_text(json.dumps({"name": "w", "task_list": [{"task": by_name}]}))
    python = place / "bin" / "python"

    workflow = load_workflow(workflow_file, task_env=python)

    assert python.is_symlink()
    assert workflow.task_list[0].task.command_parallel == f"'{python}' '{root}/mark.py'"
    after = await run(workflow, dataset=images(1))
    assert after.images[0].types == {"marked": True}
    with pytest.raises(InputFileError, match="'alpha' of task 'Mark' is not installed"):
        load_workflow(workflow_file)


def test_an_environment_is_named_by_interpreter_folder_or_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_package(make_environment(tmp_path / "env"), "alpha", "1", manifest(TASK))
    (tmp_path / "env" / "bin" / "my-python").symlink_to("python")
    monkeypatch.setenv("PATH", f"{tmp_path}/env/bin", prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)

    for given in (tmp_path / "env", "env", "./env/bin/python", "my-python"):
        [package] = [one for one in find_packages(given) if one.name == "alpha"]
        assert Path(package.interpreter).is_absolute()
        assert package.interpreter.startswith(f"{tmp_path}/env/bin/")


def test_modules_of_the_current_directory_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_environment(tmp_path / "env")
    (tmp_path / "here").mkdir()
    put_package(tmp_path / "here", "alpha", "1", manifest(TASK))
    monkeypatch.chdir(tmp_path / "here")

    assert find_packages(tmp_path / "env") == []


@pytest.mark.parametrize("module", ["edited_tasks", "called_otherwise"])
@pytest.mark.parametrize("layout", ["src", "flat"])
def test_an_editable_install_is_found(tmp_path: Path, layout: str, module: str) -> None:
    site = make_environment(tmp_path / "env", "--system-site-packages")
    # The new environment's system is this environment's base: give it what is installed here as well.
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    project = tmp_path / "project"
    source = project / "src" if layout == "src" else project
    root = source / module
    root.mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "mark.py").touch()
    (root / "__FRACTAL_MANIFEST__.json").write_text(manifest(TASK))
    packages = f"{root.relative_to(project)}"
    (project / "pyproject.toml").write_text(
        f"""
[build-system]
requires = ["hatchling", "editables"]
build-backend = "hatchling.build"
[project]
name = "Edited.Tasks"
version = "0.1"
[tool.hatch.build.targets.wheel]
packages = ["{packages}"]
"""
    )
    python = tmp_path / "env" / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e"]
    subprocess.run([*command, str(project)], check=True, timeout=120, env={**os.environ, "PIP_NO_INDEX": "1"})

    task = find_task(find_packages(python), "edited-tasks", "0.1", "Mark")

    assert task.command_parallel == f"{python} {root}/mark.py"


def test_a_bad_interpreter_is_named(tmp_path: Path) -> None:
    for given, message in (
        (tmp_path / "none", "there is no Python interpreter at"),
        ("no-such-python", "there is no Python interpreter at"),
        (tmp_path, "there is no Python interpreter at"),  # a folder, but no environment
        (Path(__file__), "is not executable"),
    ):
        with pytest.raises(TaskLookupError, match=message) as caught:
            find_packages(given)
        assert str(given) in str(caught.value)
    with pytest.raises(TaskLookupError, match=r"/true is not a Python that can be asked"):
        find_packages("true")
