"""A run over an engine that fails, and is resumed: by its name alone, with what its history has of it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from pathlib import Path

from typer.testing import CliRunner

from fractal_runner.cli.app import app
from fractal_runner.history.schema import runs

# It fails the first time, and puts down below which processes it runs.
TASK = """
import pathlib, sys
import psutil
here = pathlib.Path(sys.argv[0]).parent
number = len(list(here.glob("seen*")))
parents = [" ".join(one.cmdline()) for one in psutil.Process().parents()]
(here / f"seen{number}").write_text("\\n".join(parents))
pathlib.Path(sys.argv[sys.argv.index("--out-json") + 1]).write_text("{}")
sys.exit(number == 0)
"""


def assert_resumed_over_the_same(here: Path, name: str, *options: str) -> None:
    """Run a workflow of one task below `here`, which fails, and resume it; `seen0` and `seen1` are left.

    Args:
        here: an empty directory, which is the current one.
        name: the executor's.
        options: as they follow `--executor-opt`.
    """
    (here / "task.py").write_text(TASK)
    task = {"name": "T", "command_parallel": f"{sys.executable} {here / 'task.py'}"}
    (here / "w.json").write_text(json.dumps({"name": "w", "task_list": [{"task": task}]}))
    images = [{"zarr_url": "/d/1", "attributes": {}, "types": {}}]
    (here / "d.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))
    chosen = [word for option in options for word in ("--executor-opt", option)]
    words = ["--dataset", "d.json", "--workflow-dir", "r", "--executor", name, "--max-workers", "1", *chosen]

    first = CliRunner().invoke(app, ["run", "w.json", *words])
    second = CliRunner().invoke(app, ["resume", "r"])

    assert first.exit_code == 1, first.output
    assert second.exit_code == 0, second.output
    assert (here / "seen1").exists()
    assert not (here / "r" / "jobs" / name).exists()
    with contextlib.closing(sqlite3.connect(here / "r" / "history.sqlite")) as history:
        [(recorded,)] = history.execute(f"select executor from {runs.name}").fetchall()
    keys = {option.partition("=")[0].partition(".")[0] for option in options}
    assert (json.loads(recorded)[0], json.loads(recorded)[1].keys()) == (name, {"max_workers", *keys})
