"""What the documentation shows is run: Python blocks as scripts, commands as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fractal_runner.executors.adapters.daskpool.options import PoolOptions
from fractal_runner.executors.adapters.daskpool.warm import stop_pool
from tests.clusters.lsf.fixtures import openlava_cluster  # noqa: F401
from tests.clusters.slurm.fixtures import slurm_cluster  # noqa: F401
from tests.docs import set_ups

TOP = Path(__file__).parent.parent.parent
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
CLUSTERS = {"clusters.md": "openlava_cluster", "lsf.md": "openlava_cluster", "slurm.md": "slurm_cluster"}
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str | None, str]]:
    return [(kind, title or None, text) for kind, title, text in BLOCK.findall(page.read_text())]


def run(command: list[str], folder: Path) -> str:
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_on_the_page_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = blocks(page)
    if page.name in CLUSTERS:
        for name, value in request.getfixturevalue(CLUSTERS[page.name]).env.items():
            monkeypatch.setenv(name, value)
    for position, (kind, title, text) in enumerate(found):
        if kind != "python" or title is not None:
            continue
        script = tmp_path / f"block_{position}.py"
        script.write_text(text)
        printed = run([sys.executable, str(script)], tmp_path)
        following = found[position + 1] if position + 1 < len(found) else ("", None, "")
        if following[0] == "text":
            assert printed == following[2]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory of the page's own; a pool that one of its commands was to end is ended."""
    folder = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    yield folder
    for record in (folder / "fractal-runner" / "pools").glob("*.json"):
        stop_pool(record.stem, folder / "fractal-runner")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("state")
def test_the_commands_on_the_page_run(page: Path, tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "fractal-runner")
    for kind, title, text in blocks(page):
        if title is not None:
            (tmp_path / title).write_text(text)
        elif kind == "console":
            for line in text.splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                # Those with a task environment need one; the test of the demo runs them.
                if words[0] == "fractal-runner" and "--task-env" not in words:
                    run([program, *words[1:]], tmp_path)


def test_the_page_on_the_configuration_shows_what_is_printed_of_its_set_ups() -> None:
    page = set_ups.PAGE.read_text()

    assert set_ups.written(page) == page
    assert page.count("# /home/mona/.config/fractal-runner/site.yaml") == 0
    assert page.count("# site: /home/mona/.config/fractal-runner/site.yaml:") == 4


def test_the_executor_on_its_page_is_short_and_keeps_the_contract(tmp_path: Path) -> None:
    page = TOP / "docs" / "writing-executors.md"
    files = {title: text for _, title, text in blocks(page) if title is not None}
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_thread_per_call.py"]
    printed = run(command, tmp_path)

    assert re.search(r"\b[4-9]\d passed", printed), printed
    code = [line for line in files["thread_per_call.py"].splitlines() if line.strip()]
    assert len(code) <= 32


def test_the_terms_of_a_pool_are_on_the_page_of_the_engines_all_of_them() -> None:
    page = (TOP / "docs" / "engines.md").read_text()
    rows = page.partition("| term | meaning |")[2].partition("\n\n")[0].splitlines()[2:]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}

    assert told == set(PoolOptions.__annotations__)


def test_every_page_that_is_linked_exists() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_documentation_builds_without_warnings(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "s"),
    ]
    run(command, TOP)
