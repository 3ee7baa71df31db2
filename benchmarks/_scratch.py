"""Where benchmarks make their run directories: one directory in memory, one on a disk.

Nothing in them is deleted before all benchmarks have ended: ext4 makes files ten times more slowly for a
while after a mass deletion, and the next repetition would be measured in that while.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

_MEMORY = Path("/dev/shm")
_IN_MEMORY = ("tmpfs", "ramfs")


class Scratch:
    """Two temporary directories, removed on leaving the context.

    Args:
        below: where the one on a disk is made if $TMPDIR is not set or is itself in memory.

    Attributes:
        memory: a directory on tmpfs; None on systems without /dev/shm.
        disk: a directory on a disk, or on what comes closest to one here.
    """

    def __init__(self, below: Path) -> None:
        self._below = below
        self._made: list[Path] = []
        self._count = 0
        self.memory: Path | None = None
        self.disk = below

    def __enter__(self) -> Scratch:
        if file_system(_MEMORY) in _IN_MEMORY:
            self.memory = self._make(_MEMORY)
        given = os.environ.get("TMPDIR")
        if given and file_system(Path(given)) not in _IN_MEMORY:
            self.disk = self._make(Path(given))
        else:
            self._below.mkdir(parents=True, exist_ok=True)
            self.disk = self._make(self._below)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for directory in self._made:
            shutil.rmtree(directory, ignore_errors=True)

    def fast(self) -> Path:
        """A new directory in memory, where there is one."""
        return self.new(self.memory or self.disk)

    def new(self, parent: Path) -> Path:
        """A path below `parent` (`memory` or `disk`) at which nothing is yet."""
        self._count += 1
        return parent / f"{self._count:04d}"

    def _make(self, parent: Path) -> Path:
        made = Path(tempfile.mkdtemp(prefix="fractal-benchmark-", dir=parent))
        self._made.append(made)
        return made


def file_system(path: Path) -> str:
    """The type of the file system that `path` is on ("ext4"); "unknown" without /proc."""
    try:
        mounts = Path("/proc/self/mounts").read_text()
    except OSError:
        return "unknown"
    real = path.resolve()
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        _, point, type_, *_ = line.split(" ")
        place = Path(point.replace("\\040", " "))
        # Of two mounts at one place the later one is seen.
        if real.is_relative_to(place) and len(place.parts) >= best:
            best, kind = len(place.parts), type_
    return kind
