"""Run a script cold and warm, in the same place, and compare what came of it.

The two must agree to the byte: what a script prints may not differ between any two processes (no pids, no
times).
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fractal_runner.worker.processes import Child
from fractal_runner.worker.server import Server
from fractal_runner.worker.spawn import Environment, spawn
from fractal_runner.worker.targets import recognise
from fractal_runner.worker.warm import WarmChild

UNIT_S = 60.0
PYTHON = os.environ.get("FRACTAL_RUNNER_WARM_PYTHON", sys.executable)  # to try another version
VARYING = ("FRACTAL_RUNNER_UNIT", "CHANGED", "REMOVED")


def until(condition: Callable[[], object]) -> None:
    """Wait until this is so."""
    deadline = time.monotonic() + UNIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass(frozen=True)
class Outcome:
    """What is left of a process.

    Attributes:
        returncode: as subprocess reports it.
        text: its log.
    """

    returncode: int | None
    text: str


class Bench:
    """A directory with scripts, and ways to run them. Its units start in it.

    Args:
        folder: the directory, which is the current one.
        python: the interpreter of `script`.
    """

    def __init__(self, folder: Path, python: str = PYTHON) -> None:
        self.folder = folder
        self.python = python
        self.environment: dict[bytes, bytes] = {
            name: value for name, value in os.environb.items() if not name.startswith(b"PYTHON")
        }
        self.environment[b"FRACTAL_RUNNER_UNIT"] = uuid.uuid4().hex.encode()
        self.sockets = folder.parent / "sockets"
        self.sockets.mkdir()

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
        return path

    def script(self, text: str, *options: str, name: str = "task.py") -> list[str]:
        """The command of a new script."""
        return [self.python, *options, str(self.write(name, text))]

    def cold(self, words: Sequence[str]) -> Outcome:
        log = self.folder / "log"
        environment = Environment(self.environment, b"FRACTAL_RUNNER_UNIT")
        value = self.environment[b"FRACTAL_RUNNER_UNIT"]
        child = Child(spawn(words, environment, value, str(log)))
        return self._outcome(child, log)

    @contextmanager
    def server(self, words: Sequence[str], **more: object) -> Iterator[Server]:
        """A server for the command, ready or not."""
        target = recognise(words)
        assert target is not None
        given: Mapping[str, object] = {
            "environment": self.environment,
            "varying": VARYING,
            "directory": str(self.sockets),
            "log": str(self.sockets / "server.log"),
            **more,
        }
        with Server.start(target, words=words, **given) as server:  # type: ignore[arg-type]
            yield server

    def warm(self, server: Server, words: Sequence[str]) -> Outcome:
        log = self.folder / "log"
        return self._outcome(self.start(server, words, log), log)

    def start(self, server: Server, words: Sequence[str], log: Path | None = None) -> WarmChild:
        return server.run(words, self.environment, str(self.folder), str(log or self.folder / "log"))

    def same(self, words: Sequence[str], **more: object) -> Outcome:
        """What came of it both ways, which was the same, for a first and a second unit of the server."""
        cold = self.cold(words)
        with self.server(words, **more) as server:
            why = server.wait_ready()
            assert why is None, why
            first, second = self.warm(server, words), self.warm(server, words)
        assert first == cold, f"warm: {first}\ncold: {cold}"
        assert second == cold, f"the second: {second}\ncold: {cold}"
        return cold

    def _outcome(self, child: Child | WarmChild, log: Path) -> Outcome:
        assert child.wait(UNIT_S), f"still running after {UNIT_S:g} s: {log.read_text()}"
        child.close()
        return Outcome(child.returncode, log.read_text(errors="backslashreplace"))
