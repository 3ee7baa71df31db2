"""`fractal-runner executors`: each name with who offers it, what it can do, and what it lacks here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fractal_runner import SerialExecutor, ThreadExecutor, register
from fractal_runner.cli.app import app
from fractal_runner.executors import plugins

Lines = Callable[[], dict[str, str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory without a configuration, and an empty PATH."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(plugins, "_registered", {})
    plugins._of_packages.cache_clear()
    yield tmp_path
    plugins._of_packages.cache_clear()


def listed() -> Result:
    return CliRunner().invoke(app, ["executors"])


def line_of(name: str) -> str:
    found = [line for line in listed().output.splitlines() if line.startswith(f"{name} ")]
    return " ".join(found[0].split())


def program(*names: str) -> None:
    for name in names:
        file = Path("bin") / name
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)


def configure(text: str) -> None:
    Path(".fractal-runner").mkdir(exist_ok=True)
    Path(".fractal-runner/config.yaml").write_text(text)


def test_each_is_listed_with_what_it_can_do() -> None:
    assert listed().exit_code == 0
    assert line_of("thread") == "thread fractal_runner asynchronous usable, the default"
    assert line_of("process") == "process fractal_runner asynchronous, isolates, kills usable"
    assert line_of("serial") == "serial fractal_runner - usable"


@pytest.mark.parametrize(
    ("name", "programs"), [("slurm", ["sbatch", "squeue", "scancel"]), ("lsf", ["bsub", "bjobs", "bkill"])]
)
def test_a_cluster_is_usable_where_its_commands_are(name: str, programs: list[str]) -> None:
    assert f"remote no {programs[0]} on PATH: take a login node" in line_of(name)

    program(*programs[:-1])
    assert f"no {programs[-1]} on PATH" in line_of(name)

    program(programs[-1])
    assert line_of(name).endswith("remote usable")


def test_what_the_configuration_says_counts_in_what_is_missing() -> None:
    configure("executor: slurm\nslurm: {command_prefix: [hop, login1]}\nlsf: {bsub_cmd: my-bsub -q}\n")
    program("bjobs", "bkill")

    assert "no hop on PATH" in line_of("slurm")
    assert "no my-bsub on PATH" in line_of("lsf")

    program("hop", "my-bsub")
    assert line_of("slurm").endswith("usable, the default")
    assert line_of("lsf").endswith("usable")


def test_others_are_listed_with_who_offers_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))
    for package in ("alpha", "beta"):
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        names = ("both", "serial") if package == "alpha" else ("both", "broken")
        lines = [f"{name} = {package}_module:Made" for name in names]
        (info / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *lines, ""]))
    register("own", ThreadExecutor)

    def made() -> Executor:
        return SerialExecutor()

    def needs(address: str) -> Executor:
        raise AssertionError(address)

    register("made", made)
    register("needs", needs)

    class Unsure(ThreadExecutor):
        @classmethod
        def unusable(cls, options: Mapping[str, Any]) -> str | None:
            raise KeyError("site")

    register("unsure", Unsure)

    assert line_of("own") == "own register() in this process asynchronous usable"
    assert line_of("made") == "made register() in this process known once it is made usable"
    assert line_of("unsure").endswith("it cannot tell whether it is usable: KeyError: 'site'")
    assert line_of("needs").endswith("the configuration has to say needs.address")
    assert "both package alpha 1.0 and package beta 1.0 the executor 'both' is offered by" in line_of("both")
    assert "broken package beta 1.0 the executor 'broken' of package beta 1.0 cannot be had" in line_of(
        "broken"
    )
    taken = [line for line in listed().output.splitlines() if line.startswith("serial ")]
    assert (
        " ".join(taken[1].split())
        == "serial package alpha 1.0 the name is taken: this one cannot be had by it"
    )


def test_with_a_wrong_configuration_they_are_listed_all_the_same() -> None:
    configure("executor: nobody\n")

    answer: Any = listed()

    assert answer.exit_code == 2
    assert "process" in answer.output
    assert "config.yaml:1: executor: there is no executor 'nobody'" in answer.output
