"""Tasks of installed packages: found by their manifests, turned into commands.

A package that offers Fractal tasks carries a `__FRACTAL_MANIFEST__.json` (fractal-task-tools). Packages are
looked for in this interpreter's environment or in another one, as tasks mostly have an environment of
their own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fractal_runner.errors import did_you_mean
from fractal_runner.workflow import manifest_probe
from fractal_runner.workflow.models import Task, TaskType, describe, type_of

_PROBE_TIMEOUT_S = 120.0


class TaskLookupError(ValueError):
    """A task that a workflow names is not installed, or a task environment cannot be asked."""


class _ManifestTask(BaseModel):
    """One task of a manifest; keys that we do not use are ignored, as manifests have many."""

    model_config = ConfigDict(extra="ignore")

    name: str
    type: TaskType | None = None
    executable_non_parallel: str | None = None
    executable_parallel: str | None = None
    input_types: dict[str, bool] | None = None
    output_types: dict[str, bool] | None = None
    meta_non_parallel: dict[str, Any] | None = None
    meta_parallel: dict[str, Any] | None = None


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    manifest_version: str = "2"
    task_list: list[_ManifestTask]


@dataclass(frozen=True, slots=True)
class TaskPackage:
    """An installed package that offers tasks.

    Attributes:
        name: the distribution's name.
        version: its version.
        root: the folder of its manifest, which the executables are relative to.
        interpreter: the Python that runs them.
        tasks: what it offers, by name.
        problem: why its manifest cannot be used; None if it can.
    """

    name: str
    version: str
    root: Path
    interpreter: str
    tasks: dict[str, Task] = field(default_factory=dict)
    problem: str | None = None


def find_packages(task_env: str | os.PathLike[str] | None = None) -> list[TaskPackage]:
    """The task packages of an environment, by name.

    Args:
        task_env: path of its Python interpreter, or of the folder of the virtual environment; None for
            the environment of this interpreter.

    Raises:
        TaskLookupError: if there is no such interpreter or it cannot be asked.
    """
    if task_env is None:
        interpreter, entries = sys.executable, manifest_probe.task_packages()
    else:
        interpreter = _interpreter(task_env)
        entries = _ask(interpreter)
    return sorted((_package(entry, interpreter) for entry in entries), key=lambda package: package.name)


def find_task(packages: Sequence[TaskPackage], pkg_name: str, version: str | None, name: str) -> Task:
    """The task that a workflow names by package, version and name.

    Args:
        packages: where to look.
        pkg_name: the package's name, compared as PEP 503 normalises it.
        version: the version it must have; None for whichever is installed.
        name: the task's name.

    Raises:
        TaskLookupError: if it is not there, listing what is.
    """
    package = next((item for item in packages if _normal(item.name) == _normal(pkg_name)), None)
    if package is None:
        there = ", ".join(f"{item.name} {item.version}" for item in packages) or "none"
        raise TaskLookupError(
            f"the package {pkg_name!r} of task {name!r} is not installed (task packages here: {there}); "
            "name the Python that has it with --task-env"
        )
    if version is not None and version != package.version:
        raise TaskLookupError(
            f"task {name!r} is of {pkg_name} {version}, but {package.version} is installed; install "
            f"'{pkg_name}=={version}', or set the version to null to take what is installed"
        )
    if package.problem is not None:
        raise TaskLookupError(
            f"the manifest of {package.name} {package.version} is not valid: {package.problem}"
        )
    if name not in package.tasks:
        raise TaskLookupError(
            f"{package.name} {package.version} has no task {name!r}: {did_you_mean(name, package.tasks)} "
            f"(it has {', '.join(map(repr, package.tasks))})"
        )
    return package.tasks[name]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503


def _interpreter(task_env: str | os.PathLike[str]) -> str:
    """The interpreter's absolute path. Never resolved: a virtual environment's is a symbolic link."""
    given = os.fspath(task_env)
    # A word is a program's name, unless it is a folder here: "env" is both.
    found = shutil.which(given) if "/" not in given and not Path(given).is_dir() else given
    path = Path(os.path.abspath(found or given))  # noqa: PTH100 - Path.resolve would follow the link
    if path.is_dir():
        path = path / "bin" / "python"
    if not path.is_file():
        raise TaskLookupError(f"there is no Python interpreter at {str(path)!r} (given as --task-env)")
    if not os.access(path, os.X_OK):
        raise TaskLookupError(f"{str(path)!r} (given as --task-env) is not executable")
    return str(path)


def _ask(interpreter: str) -> list[dict[str, Any]]:
    # Started with -c, sys.path begins with the current directory, whose modules are not installed.
    text = "import sys; sys.path.pop(0)\n" + Path(manifest_probe.__file__).read_text()
    command = [interpreter, "-c", text]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        entries: list[dict[str, Any]] = json.loads(answer.stdout)
    except subprocess.TimeoutExpired:
        raise TaskLookupError(
            f"{interpreter} did not list its packages within {_PROBE_TIMEOUT_S:g} s"
        ) from None
    except subprocess.CalledProcessError as error:
        raise TaskLookupError(
            f"{interpreter} could not list its packages (exit code {error.returncode}): "
            f"{error.stderr.strip()}"
        ) from None
    except (OSError, ValueError) as error:
        raise TaskLookupError(
            f"{interpreter} is not a Python that can be asked for its packages: {error}"
        ) from None
    return entries


def _package(entry: dict[str, Any], interpreter: str) -> TaskPackage:
    name, version, root = entry["name"], entry["version"], Path(entry["root"])
    problem = entry.get("problem")
    tasks: dict[str, Task] = {}
    if problem is None:
        try:
            manifest = _Manifest.model_validate(entry["manifest"])
            if manifest.manifest_version != "2":
                raise ValueError(f"its version is {manifest.manifest_version!r}; version '2' is understood")
            tasks = {item.name: _task(item, name, version, root, interpreter) for item in manifest.task_list}
        except ValidationError as error:
            problem = "; ".join(describe(error))
        except ValueError as error:
            problem = str(error)
    return TaskPackage(name, version, root, interpreter, tasks, problem)


def _task(item: _ManifestTask, package: str, version: str, root: Path, interpreter: str) -> Task:
    kind = item.type or type_of(item.executable_non_parallel, item.executable_parallel)
    if kind is None:
        raise ValueError(f"task {item.name!r} has no executable")
    return Task(
        name=item.name,
        type=kind,
        command_non_parallel=_command(item.executable_non_parallel, root, interpreter),
        command_parallel=_command(item.executable_parallel, root, interpreter),
        input_types=item.input_types or {},
        output_types=item.output_types or {},
        meta_non_parallel=item.meta_non_parallel or {},
        meta_parallel=item.meta_parallel or {},
        pkg_name=package,
        version=version,
    )


def _command(executable: str | None, root: Path, interpreter: str) -> str | None:
    if executable is None:
        return None
    place = PurePosixPath(executable)
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"the executable {executable!r} lies outside its package")
    if not (root / place).is_file():
        raise ValueError(f"the executable {executable!r} is not in {root}")
    return shlex.join([interpreter, str(root / place)])
