"""Executors of other packages and of the caller's own: their names and sections, and what can be wrong."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import Dataset, Image, Task, Workflow, WorkflowTask, config, process_workflow, register
from fractal_runner.executors import factories, plugins
from fractal_runner.executors.sections import ExecutorSections

TOP = Path(__file__).parent.parent.parent

# A package as somebody would write it.
MODULE = '''
from concurrent.futures import Future
import fractal_runner

class GreetingExecutor(fractal_runner.Executor):
    """Runs calls at once, and says so."""

    asynchronous = False

    def __init__(self, *, greeting: str = "hello", times: int = 1) -> None:
        super().__init__(max_workers=1)
        self._words = " ".join([greeting] * times)

    def start(self, session) -> None:
        print(self._words, "from", sorted(session.names()), flush=True)

    def _start(self, call) -> None:
        call.run()
'''


class Own(ThreadPoolExecutor):
    """An executor of the caller's, which keeps note of how it was made.

    Attributes:
        made: all of them.
    """

    made: list[Own] = []  # noqa: RUF012 - emptied by the tests

    def __init__(self, *, workers: int = 1, label: str | None = None) -> None:
        super().__init__(workers)
        self.workers, self.label = workers, label
        self.started_by: list[Any] = []
        self.made.append(self)

    def start(self, session: Any) -> None:
        self.started_by.append(session)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is registered, and packages are looked for anew."""
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setattr(Own, "made", [])
    plugins._of_packages.cache_clear()
    factories._warn_of.cache_clear()
    yield
    plugins._of_packages.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a package there as an installer leaves it, which offers these names."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))

    def put(package: str, offers: dict[str, str], text: str = "") -> Path:
        module = package.replace("-", "_")
        info = place / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in offers.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *lines, ""]))
        (place / f"{module}.py").write_text(text)
        plugins._of_packages.cache_clear()
        return place / f"{module}.py"

    return put


def note(*, zarr_url: str) -> None:
    """A task that has nothing to do."""


def run(directory: Path, **more: Any) -> None:
    """One task over one image."""
    asyncio.run(
        process_workflow(
            workflow=Workflow(
                name="w", task_list=[WorkflowTask(task=Task(name="F", function_parallel=note))]
            ),
            dataset=Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url="/z/0")]),
            workflow_dir_local=directory,
            **more,
        )
    )


# Registered in this process


def test_a_registered_factory_is_called_with_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("own", Own)
    monkeypatch.chdir(tmp_path)
    Path(".fractal-runner").mkdir()
    Path(".fractal-runner/config.yaml").write_text("executor: own\nown: {workers: 3}\n")

    run(tmp_path / "r")
    run(tmp_path / "s", executor=("own", {"label": "x"}))

    assert [(one.workers, one.label) for one in Own.made] == [(3, None), (3, "x")]
    assert [len(one.started_by) for one in Own.made] == [1, 1]


def test_a_function_may_be_a_factory(tmp_path: Path) -> None:
    def two_workers(*, label: str = "two") -> Executor:
        return Own(workers=2, label=label)

    register("two", two_workers)
    run(tmp_path / "r", executor=("two", {"label": "b"}))

    assert [(one.workers, one.label) for one in Own.made] == [(2, "b")]


def test_a_mistake_in_the_section_of_a_registered_one_is_told_as_any_other(tmp_path: Path) -> None:
    register("own", Own)
    file = tmp_path / "c.yaml"
    file.write_text("own:\n  worker: 3\n  label: 7\n")

    assert [str(mistake) for mistake in config.check(ExecutorSections(), file)] == [
        f"{file}:2: own.worker: unknown key: did you mean 'workers'?",
        f"{file}:3: own.label: 7 is a number, and it takes text: write '7'",
    ]


@pytest.mark.parametrize("name", ["slurm", "thread", "defaults", "executor", "resource_classes"])
def test_our_own_names_and_those_of_the_configuration_cannot_be_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"the name '{name}' cannot be given to an executor"):
        register(name, Own)


@pytest.mark.parametrize("name", ["", "a b", "../up", "a.b", "a__b", "-a", "7up", "a/b", "ä"])
def test_a_name_has_to_do_as_a_key_and_as_a_folder(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be an executor's name: letters and digits"):
        register(name, Own)


def test_what_cannot_be_called_is_no_factory() -> None:
    with pytest.raises(TypeError, match="the factory of the executor 'own' cannot be called: 7"):
        register("own", 7)  # type: ignore[arg-type]


def test_a_name_is_given_once_but_the_same_thing_may_be_defined_again() -> None:
    def again() -> type:
        class Cell(Own):
            """What a notebook's cell defines."""

        return Cell

    register("own", again())
    last = again()
    register("own", last)
    assert factories.factory_of("own") is last

    with pytest.raises(ValueError, match=r"'own' is taken, by register\(\) in this process \(.*Cell\)"):
        register("own", Own)

    register("part", functools.partial(Own, workers=2))
    with pytest.raises(ValueError, match="'part' is taken"):
        register("part", functools.partial(ThreadPoolExecutor, 2))


def test_a_factory_that_makes_no_executor_is_told() -> None:
    register("own", dict)

    with pytest.raises(TypeError, match=r"factory of the executor 'own' has made \{\}, which is no executor"):
        factories.make("own")


def test_an_argument_that_nobody_gives_is_asked_for(tmp_path: Path) -> None:
    def needs(address: str, port: int = 1) -> Executor:
        return Own(label=address)

    register("needs", needs)

    with pytest.raises(ValueError, match=r"the executor 'needs' needs 'address': .* needs\.address"):
        run(tmp_path / "r", executor="needs")


def test_an_unknown_name_is_answered_with_the_nearest_of_all() -> None:
    register("own-cluster", Own)

    with pytest.raises(ValueError, match="unknown executor 'own-clustre': did you mean 'own-cluster'"):
        factories.factory_of("own-clustre")
    assert "own-cluster" in factories.names()


# Offered by packages


def test_two_packages_with_one_name_are_both_named_when_it_is_used_and_not_before(
    site: Any, tmp_path: Path
) -> None:
    site(
        "alpha",
        {"same": "alpha:make", "other": "alpha:make"},
        "from fractal_runner import SerialExecutor as make",
    )
    site("beta", {"same": "beta:make"}, "raise RuntimeError('nobody asks for it')")

    run(tmp_path / "r", executor="other")
    with pytest.raises(ValueError) as caught:
        run(tmp_path / "s", executor="same")

    assert "'same' is offered by package alpha 1.0 (alpha:make) and package beta 1.0 (beta:make)" in str(
        caught.value
    )
    file = tmp_path / "c.yaml"
    file.write_text("same: {}\n")
    [mistake] = config.check(ExecutorSections(), file)
    assert "this section cannot be checked: the executor 'same' is offered by package alpha" in str(mistake)


def test_a_package_cannot_take_a_name_of_ours(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    site("alpha", {"serial": "alpha:make", "defaults": "alpha:make"}, "make = 7")

    assert factories.factory_of("serial").__name__ == "SerialExecutor"
    factories.factory_of("serial")

    [record] = caplog.records
    assert "package alpha 1.0 offers an executor 'serial': ours is taken" in record.getMessage()
    assert "defaults" not in factories.names()
    with pytest.raises(ValueError, match="no executor can have the name 'defaults'"):
        factories.factory_of("defaults")


@pytest.mark.parametrize(
    ("value", "text", "message"),
    [
        ("alpha:make", "import not_installed", "cannot be had: alpha:make: ModuleNotFoundError: No module"),
        ("alpha:makes", "make = dict", "cannot be had: alpha:makes: AttributeError"),
        ("alpha:make", "make = 7", "cannot be made: alpha:make is 7"),
        ("alpha:make", "1/0", "cannot be had: alpha:make: ZeroDivisionError"),
        ("alpha:make", "raise SystemExit(3)", "cannot be had: alpha:make: SystemExit: 3"),
    ],
)
def test_a_broken_package_is_named_when_its_name_is_used(
    site: Any, value: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "alpha", raising=False)
    site("alpha", {"broken": value}, text)

    with pytest.raises(ValueError, match=r"the executor 'broken' of package alpha 1\.0") as caught:
        factories.factory_of("broken")

    assert message in str(caught.value)
    monkeypatch.delitem(sys.modules, "alpha", raising=False)


def test_a_package_whose_entry_points_cannot_be_read_harms_no_other(
    site: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site("alpha", {"good": "alpha:make"}, "make = dict")
    site("beta", {})
    broken = tmp_path / "site" / "beta-1.0.dist-info" / "entry_points.txt"
    broken.write_text(f"[{plugins.GROUP}]\nno equals sign\n")

    assert [offer.by for offer in plugins.offers("good")] == ["package alpha 1.0"]
    assert "thread" in factories.names()
    [record] = caplog.records
    assert f"the entry points of package beta in {tmp_path / 'site'} cannot be read" in record.getMessage()


def test_a_name_that_a_package_offers_cannot_be_registered(site: Any) -> None:
    site("alpha", {"own": "alpha:make"}, "make = dict")

    with pytest.raises(ValueError, match=r"'own' is taken, by package alpha 1.0 \(alpha:make\)"):
        register("own", Own)


# Built and installed


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment where a package that offers an executor is installed."""
    top = tmp_path_factory.mktemp("package")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(top / "env")], check=True, timeout=60)
    [packages] = (top / "env").glob("lib/python*/site-packages")
    # What is installed here, pip and the builder too, is there as well.
    (packages / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    project = top / "greeting"
    project.mkdir()
    (project / "greeting_executor.py").write_text(MODULE)
    (project / "pyproject.toml").write_text(
        f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "greeting-executor"
version = "1.2"
[project.entry-points."{plugins.GROUP}"]
greeting = "greeting_executor:GreetingExecutor"
[tool.hatch.build.targets.wheel]
include = ["greeting_executor.py"]
"""
    )
    python = top / "env" / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    pip = subprocess.run(
        [*command, str(project)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PIP_NO_INDEX": "1"},
    )
    assert pip.returncode == 0, pip.stderr
    return python


@pytest.fixture
def program(environment: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The program, in that environment and in tmp_path, where w.json is a workflow of one task."""
    task = {"name": "T", "command_parallel": "true"}
    (tmp_path / "w.json").write_text(json.dumps({"name": "w", "task_list": [{"task": task}]}))
    images = [{"zarr_url": "/d/1", "attributes": {}, "types": {}}]
    (tmp_path / "d.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(environment), "-m", "fractal_runner", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": str(TOP)},
        )

    return call


def test_an_installed_package_brings_its_executor_with_it(program: Any, tmp_path: Path) -> None:
    (tmp_path / ".fractal-runner").mkdir()
    (tmp_path / ".fractal-runner" / "config.yaml").write_text("greeting: {times: 2}\n")
    run = ["run", "w.json", "--dataset", "d.json", "--executor", "greeting", "--executor-opt"]

    ran = program(*run, "greeting=good day", "--workflow-dir", "r")
    wrong = program(*run, "greetin=x", "--workflow-dir", "s")

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "good day good day from []\n"
    assert wrong.returncode == 2
    assert "greeting.greetin: unknown key: did you mean 'greeting'?" in wrong.stderr
    [line] = [one for one in program("executors").stdout.splitlines() if one.startswith("greeting ")]
    assert " ".join(line.split()) == "greeting package greeting-executor 1.2 - usable"
