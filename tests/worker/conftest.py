"""A unit to run, with all that it needs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from fractal_runner.worker.function import FunctionRef
from fractal_runner.worker.spec import UnitSpec
from tests.worker.pairs import Bench

Make = Callable[..., UnitSpec]


@pytest.fixture
def spec(tmp_path: Path) -> Make:
    (tmp_path / "evidence").mkdir()
    (tmp_path / "0_t").mkdir()

    def make(script: str = "", function: Any = None, **more: Any) -> UnitSpec:
        values: dict[str, Any] = {
            # Its processes are found by it, and tests run side by side.
            "key": f"{uuid.uuid4().hex}/0/par-000000-0000000",
            "command": None if function else ("sh", "-c", script, "sh"),
            "function": FunctionRef(function, cloudpickle.dumps) if function else None,
            "args": {"zarr_url": "/z/1"},
            "run_id": str(tmp_path),
            "run_dir": str(tmp_path),
            "folder": str(tmp_path / "0_t"),
            "prefix": "par-000000-0000000",
            "coordinator": (os.uname().nodename, os.getpid()),
        }
        return UnitSpec(**{**values, **more})

    return make


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A directory to run scripts in, warm and cold; the current one."""
    for path in Path("/proc/self/fd").iterdir():  # what other tests of this process leave open to children
        with suppress(OSError):
            os.set_inheritable(int(path.name), int(path.name) <= 2)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Bench(folder)
