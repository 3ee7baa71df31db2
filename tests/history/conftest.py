"""What the tests of the history share: small runs, and disks that fail."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.history.noted import NotedRun, until
from tests.history.postgres import Database, Server


class Disk:
    """A file system of its own, which can be filled up and made read-only.

    Args:
        place: where it is mounted.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._filler = place / "filler"

    def fill(self) -> None:
        """Take all the space that is left."""
        block = 65_536
        fd = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            while block >= 1:
                try:
                    os.write(fd, b"x" * block)
                except OSError:
                    block //= 2
        finally:
            os.close(fd)

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink()

    def remount(self, option: str) -> None:
        """Change it: "ro" or "rw"."""
        _mount("-o", f"remount,{option}", str(self.place))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    """Mounts a file system in memory, of this size."""
    mounted: list[Path] = []

    def mount(size: str) -> Disk:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
        mounted.append(place)
        return Disk(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system, and what makes the kernel believe that it is damaged: it is read-only from then on."""
    image, place = tmp_path / "image", tmp_path / "failing"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=30)
    _mount("-o", "loop,errors=remount-ro", str(image), str(place))
    source = subprocess.run(
        ["findmnt", "-n", "-o", "SOURCE", str(place)], check=True, capture_output=True, text=True, timeout=30
    )
    trigger = Path("/sys/fs/ext4", Path(source.stdout.strip()).name, "trigger_fs_error")

    if not trigger.exists():
        pytest.skip(f"this kernel's ext4 cannot be told that it is damaged: there is no {trigger}")

    def fail() -> None:
        trigger.write_text("a test wants it\n")

    yield place, fail
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


def _mount(*arguments: str) -> None:
    answer = subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        pytest.skip(f"needs the right to mount a file system: {answer.stderr.strip()}")


@pytest.fixture
async def interrupted(tmp_path: Path) -> NotedRun:
    """A run that was cancelled in its second task."""
    run = NotedRun(tmp_path / "interrupted", units=6)
    held = run.hold("second", 3)
    call = asyncio.ensure_future(run.go())
    await until(lambda: run.started()["second", 3] > 0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    held.unlink()
    return run


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A PostgreSQL server, to be left running."""
    server = Server()
    yield server
    server.remove()


@pytest.fixture
def database(server: Server) -> Database:
    """A new database in it."""
    return server.database()


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A PostgreSQL server that may be stopped and started."""
    server = Server()
    yield server
    server.remove()
