"""A configuration whose layers are all in a temporary directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import config
from fractal_runner.errors import InputFileError
from fractal_runner.executors.sections import ExecutorSections

SECTIONS = ExecutorSections()


@dataclass
class Layers:
    """The six layers of one configuration.

    Attributes:
        files: the paths of those that are files, by layer.
        environ: the environment.
        start: where the project's file is looked for.
    """

    files: dict[str, Path]
    environ: dict[str, str]
    start: Path
    arguments: dict[str, Any] = field(default_factory=dict)

    def write(self, layer: str, text: str | bytes) -> Path:
        path = self.files[layer]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def load(self, **arguments: Any) -> config.Config:
        return config.load(SECTIONS, start=self.start, environ=self.environ, **self.arguments, **arguments)

    def mistakes(self, **arguments: Any) -> list[str]:
        with pytest.raises(InputFileError) as caught:
            self.load(**arguments)
        top = f"{self.start.parent}/"
        assert all(problem in str(caught.value) for problem in caught.value.problems)
        return [problem.replace(top, "") for problem in caught.value.problems]


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layers:
    """No layer says anything, but the one that is built in."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    installation = tmp_path / "prefix" / "etc" / "fractal-runner" / "config.yaml"
    monkeypatch.setattr("sys.prefix", str(tmp_path / "prefix"))
    start = tmp_path / "project"
    start.mkdir()
    monkeypatch.chdir(tmp_path)
    return Layers(
        files={
            "installation": installation,
            "site": tmp_path / "home" / "fractal-runner" / "site.yaml",
            "project": start / ".fractal-runner" / "config.yaml",
        },
        environ={},
        start=start,
    )
