"""What the tests of stations share: scripts whose units wait, tell who they are, and count their imports."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from fractal_runner.worker import processes
from fractal_runner.worker.command import run_unit
from fractal_runner.worker.links import Link, Links
from fractal_runner.worker.spec import UnitResult, UnitSpec, WarmStart
from fractal_runner.worker.station import Station
from tests.worker.pairs import Bench, until

TOP = Path(__file__).parent.parent.parent
DEADLINE_S = 60.0

# It tells the interpreter that imports it, and takes as long as the file `slow` says.
_HEAVY = """
import os, time
with open("imports", "a") as file:
    file.write(f"{os.getpid()}\\n")
until = time.monotonic() + (float(open("slow").read()) if os.path.exists("slow") else 0)
while time.monotonic() < until:
    time.sleep(0.01)
"""

# Up to `go`, where it waits; it tells its pid before, and what it was after.
_WAITING = """
import os, sys, time
import heavy

def main():
    name = os.environ["FRACTAL_RUNNER_UNIT"].replace("/", "_")
    first()
    with open(f"up~{name}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"up~{name}", f"up-{name}")
    while not os.path.exists("go"):
        time.sleep(0.01)
    print("went on")
    open(f"done-{name}", "w").close()

if __name__ == "__main__":
    main()
"""


class Site:
    """A station whose owner is this process, and units for it, which start in the bench's directory.

    Args:
        bench: where the scripts are.
        make: makes units.
        patch: sets TMPDIR.
    """

    def __init__(self, bench: Bench, make: Callable[..., UnitSpec], patch: pytest.MonkeyPatch) -> None:
        self.bench = bench
        self._make = make
        # Not in tmp_path, which may be too long for a socket.
        self.base = Path(tempfile.mkdtemp(prefix="st-", dir="/tmp"))
        patch.setenv("TMPDIR", str(self.base))
        patch.setenv("PYTHONPATH", str(TOP))  # as its workers have it: they share their environment
        self.station = Station.of(os.getpid())
        self.terms = WarmStart(
            stage="0_t-par",
            station=self.station.directory,
            ticks=self.station.ticks,
            timeout_s=30.0,
            most=4,
            even_single=False,
            log=str(bench.folder.parent / "fork-servers" / "0_t"),
        )
        bench.write("heavy.py", _HEAVY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for found in self.left():
            self._end(found)
        shutil.rmtree(self.base, ignore_errors=True)

    def _end(self, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def spec(self, words: Sequence[str], **more: Any) -> UnitSpec:
        """A unit of such a command; what it lacks are the terms of its start and a name of its own."""
        terms = replace(self.terms, **more.pop("terms", {}))
        prefix = f"par-000000-{uuid.uuid4().hex[:7]}"
        return self._make(
            **{"command": tuple(words), "warm": terms, "prefix": prefix, "grace_s": 1.0, **more}
        )

    def waiting(self, name: str = "waiting.py", first: str = "pass") -> list[str]:
        """The command of units that wait for the file `go`, after they have done something first."""
        return self.bench.script(_WAITING.replace("first()", first), name=name)

    def quick(self, name: str = "quick.py", more: str = "") -> list[str]:
        """The command of units that end at once, and import what counts how often it is imported."""
        return self.bench.script(f"import heavy\n{textwrap.dedent(more)}\nprint('quick')\n", name=name)

    def slow(self, seconds: float) -> None:
        """Have imports take so long from now on."""
        self.bench.write("slow", str(seconds))

    def go(self) -> None:
        (self.bench.folder / "go").touch()

    def pid_of(self, spec: UnitSpec) -> int:
        """That of a waiting unit."""
        path = self.bench.folder / f"up-{name_of(spec)}"
        until(path.exists)
        return int(path.read_text())

    def has_gone_on(self, spec: UnitSpec) -> bool:
        return (self.bench.folder / f"done-{name_of(spec)}").exists()

    @property
    def imports(self) -> list[int]:
        """The processes that have imported `heavy`: servers, and units that started cold."""
        path = self.bench.folder / "imports"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    @property
    def links(self) -> list[Link]:
        """The servers that live, as the station knows them."""
        return [link for _, link in Links(self.station.directory).all() if link.lives()]

    @property
    def server(self) -> Link:
        [link] = self.links
        return link

    def left(self) -> list[int]:
        """Processes of fork servers below this test's TMPDIR: servers, who starts them, units, trials."""
        mark = os.fsencode(f"--directory={self.base}")
        return [
            pid
            for pid in processes._all_pids()
            if mark in processes._read(f"/proc/{pid}/cmdline") and processes.is_running(pid)
        ]

    def files(self) -> list[str]:
        """What there is in this test's TMPDIR."""
        return sorted(str(path.relative_to(self.base)) for path in self.base.rglob("*"))


def name_of(spec: UnitSpec) -> str:
    """What a waiting unit calls itself in the names of its files."""
    return spec.key.replace("/", "_")


class Background:
    """Units that run in threads of this process, for a test to await."""

    def __init__(self, threads: int = 16) -> None:
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, spec: UnitSpec) -> Future[UnitResult]:
        return self._pool.submit(run_unit, spec)

    def run_all(self, specs: Iterable[UnitSpec]) -> list[UnitResult]:
        return [future.result(DEADLINE_S) for future in [self.run(spec) for spec in specs]]


_WORKER = """
import os, pickle, sys
from fractal_runner.worker.command import run_unit
specs = pickle.load(open(sys.argv[1], "rb"))
results = [run_unit(spec) for spec in specs]
with open(sys.argv[1] + "~", "wb") as file:
    pickle.dump(results, file)
os.rename(sys.argv[1] + "~", sys.argv[1] + ".done")
"""


class Worker:
    """A process that runs units one after another, for a test to kill.

    Args:
        place: a directory for its files.
        specs: the units.
    """

    def __init__(self, place: Path, *specs: UnitSpec) -> None:
        self._file = place / f"worker-{uuid.uuid4().hex}"
        self._file.write_bytes(pickle.dumps(specs))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(self._file)],
            env=dict(os.environ),  # not what C libraries have added to it, as readline does
        )

    def results(self) -> list[UnitResult]:
        assert self.process.wait(DEADLINE_S) == 0
        found: list[UnitResult] = pickle.loads(self._file.with_name(f"{self._file.name}.done").read_bytes())
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def ways(results: Iterable[UnitResult]) -> list[str | None]:
    """How units were started, each way once."""
    return sorted({result.start for result in results}, key=str)


def well(results: Iterable[UnitResult]) -> bool:
    """Whether all have succeeded; what was wrong is shown."""
    wrong = [result for result in results if not result.succeeded]
    assert not wrong, wrong
    return True
