"""Where the files of an array of jobs are, and that they are ours alone.

An array has a directory, named after it, below the executor's folder:

    payload              what its jobs are to do; there once it is whole
    jobs                 the ids that the scheduler gave them; there once they are known
    control              what the executor has to say to its jobs, appended to
    claim-<n>            which job it is that does the work of number n, or that none will
    records-<n>.<start>  what job n has to say, a file for each time that it was started
    job-<n>.log          what job n printed

Files that are looked for again and again exist from the beginning: a file system over the network may
remember for a minute that there was none. Results are pickles, and unpickling runs anybody's code: nothing
is read that is not our own.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fractal_runner.errors import ExecutorError

PAYLOAD, JOBS, CONTROL = "payload", "jobs", "control"
_CLAIM, _RECORDS = "claim", "records"


class NotOursError(ExecutorError):
    """A file or folder belongs to somebody else, or others may write to it."""


class ArrayFiles:
    """The files of one array.

    Args:
        directory: its own.
    """

    __slots__ = ("directory",)

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)

    @property
    def name(self) -> str:
        """The array's name."""
        return os.path.basename(self.directory)

    @property
    def payload(self) -> str:
        return f"{self.directory}/{PAYLOAD}"

    @property
    def jobs(self) -> str:
        return f"{self.directory}/{JOBS}"

    @property
    def control(self) -> str:
        return f"{self.directory}/{CONTROL}"

    def claim(self, number: int) -> str:
        return f"{self.directory}/{_CLAIM}-{number}"

    def records(self, number: int, start: int = 0) -> str:
        """What job `number` has to say, having been started `start` times before."""
        return f"{self.directory}/{_RECORDS}-{number}.{start}"

    def log(self, number: int) -> str:
        return f"{self.directory}/job-{number}.log"

    def make(self, count: int) -> None:
        """Make the directory, and what exists from the beginning.

        Raises:
            OSError: if that cannot be done.
        """
        os.mkdir(self.directory, 0o700)
        for path in (self.control, *(self.records(number) for number in range(count))):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def starts(self) -> dict[int, int]:
        """How many files of records each job has, by its number."""
        found: dict[int, int] = {}
        with os.scandir(self.directory) as entries:
            for entry in entries:
                kind, _, rest = entry.name.partition("-")
                number, _, start = rest.partition(".")
                if kind == _RECORDS and number.isdigit() and start.isdigit():
                    found[int(number)] = max(found.get(int(number), 0), int(start) + 1)
        return found

    def claimed_by(self, number: int) -> dict[str, Any] | None:
        """Who has claimed the work of a job: `{"job": id or None}`; None if nobody has."""
        try:
            with open_ours(self.claim(number)) as fd:
                content: dict[str, Any] = json.loads(os.pread(fd, 4096, 0))
        except FileNotFoundError:
            return None
        return content

    def claim_for(self, number: int, job: str | None, **more: Any) -> bool:
        """Claim the work of a job for the one with this id, or for none; whether it is that one's now."""
        text = json.dumps({"job": job, **more})
        if put_once(self.claim(number), text.encode()):
            return True
        held = self.claimed_by(number)
        return held is not None and held["job"] == job


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Make sure that there is a folder of our own, for our eyes only.

    Raises:
        NotOursError: if it is somebody else's, or others may write to it.
        OSError: if it cannot be made.
    """
    path = Path(folder).expanduser().absolute()
    with suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    check_ours(path)
    return path


def check_ours(path: str | os.PathLike[str], fd: int | None = None) -> None:
    """Whether a file or folder is ours, and nobody else may write to it.

    Raises:
        NotOursError: if not, naming it and what it is instead.
        OSError: if there is none.
    """
    status = os.stat(path) if fd is None else os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise NotOursError(
            f"{os.fspath(path)} belongs to user {status.st_uid}, and this is user {os.geteuid()}: what is "
            "read from there is run, so it is not read"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotOursError(
            f"{os.fspath(path)} can be written by others (mode {stat.S_IMODE(status.st_mode):o}), and what "
            f"is read from there is run: say chmod go-w {os.fspath(path)}, if it is yours alone"
        )


@contextmanager
def open_ours(path: str) -> Iterator[int]:
    """A descriptor of a file to be read, which is ours.

    Raises:
        NotOursError: if it is not; a link does not lead elsewhere.
        OSError: if there is none.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotOursError(f"{path} is a link: it is not followed") from None
        raise
    try:
        check_ours(path, fd)
        yield fd
    finally:
        os.close(fd)


def read_at(fd: int, offset: int, size: int) -> bytes:
    """So many bytes from `offset` on; fewer only at the file's end.

    The system gives at most 2 GiB at a time (read(2)).
    """
    pieces = []
    while size > 0 and (piece := os.pread(fd, size, offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def put(path: str, *pieces: bytes | memoryview) -> None:
    """Put a file in its place, whole or not at all, there after a power cut.

    Raises:
        OSError: if it cannot be written; nothing of it stays.
    """
    with _unfinished(path, pieces) as unfinished:
        os.replace(unfinished, path)


def put_once(path: str, content: bytes) -> bool:
    """As `put`, unless the file exists already; whether it did not."""
    with _unfinished(path, (content,)) as unfinished:
        try:
            os.link(unfinished, path)
        except FileExistsError:
            return False
        return True


@contextmanager
def _unfinished(path: str, pieces: tuple[bytes | memoryview, ...]) -> Iterator[str]:
    fd, unfinished = tempfile.mkstemp(prefix=".", dir=os.path.dirname(path))
    try:
        with open(fd, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        yield unfinished
        sync_directory(os.path.dirname(path))
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def sync_directory(path: str) -> None:
    """See that a directory's entries are there after a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
