"""What the workers of one owner know together of its fork servers: the files of a station.

A directory of mode 0700 on a local disk holds `lock`, held while a server is started; per kind of units
NAME.json, which says where its server is or why there is none; and the directory of each server that runs.
One that has ended by itself has removed its directory: a directory without a server tells of one that has
crashed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fractal_runner.worker import processes, warm

# The user, the world of its pids, and the owner's pid and start, as station.py has it.
_NAME = re.compile(r"(fractal-runner-\d+-[0-9a-f]{8}-)(\d+)-(\d+)-\d+")


@dataclass(frozen=True, slots=True)
class Link:
    """What there is for one command in one environment.

    Attributes:
        socket: the server's; "" for none.
        pid, ticks: which process it is.
        crashes: how many have crashed before it.
        changes: how many have ended before it because one of their files had changed.
        cold: why it must be started cold; "" if it need not.
        stage: whose units they are; the link is forgotten when these have ended.
    """

    socket: str = ""
    pid: int = 0
    ticks: int | None = None
    crashes: int = 0
    changes: int = 0
    cold: str = ""
    stage: str = ""

    def lives(self) -> bool:
        """Whether its server's process has not ended."""
        return (
            bool(self.socket)
            and processes.is_running(self.pid)
            and (self.ticks is None or processes.start_ticks(self.pid) == self.ticks)
        )

    def is_news(self, gone: str) -> bool:
        """Whether it is another server than that at the socket `gone`, or says that there is to be none."""
        return bool(self.cold) or self.socket != gone


class Links:
    """The links of a station.

    Args:
        directory: the station's; it need not be there yet.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def make(self) -> None:
        """Make the directory, or see that it is ours alone.

        Raises:
            ColdStart: if it cannot be, or is another's.
        """
        try:
            try:
                os.mkdir(self.directory, 0o700)
                _sweep(self.directory)
            except FileExistsError:
                if not self.is_ours():
                    raise warm.ColdStart(f"{self.directory} is open to others, or theirs.") from None
        except OSError as error:
            raise warm.ColdStart(f"{self.directory} cannot be made: {error.strerror}.") from None

    def is_ours(self) -> bool:
        """Whether there is a directory that nobody else can have put anything into."""
        try:
            found = os.lstat(self.directory)
        except FileNotFoundError:
            return False
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        return is_own and not stat.S_IMODE(found.st_mode) & 0o077

    @contextlib.contextmanager
    def lock(self, patience_s: float, give_up: Callable[[], bool]) -> Iterator[None]:
        """Hold the lock. It is the kernel's, and goes with the process that holds it.

        Raises:
            ColdStart: if it is not to be had.
            NobodyWaits: if the unit was told to stop meanwhile.
        """
        try:
            fd = os.open(f"{self.directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise warm.ColdStart(f"{self.directory}/lock cannot be opened: {error.strerror}.") from None
        try:
            deadline = time.monotonic() + patience_s
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno != errno.EWOULDBLOCK or time.monotonic() > deadline:
                        raise warm.ColdStart(f"{self.directory} stays locked: {error.strerror}.") from None
                if give_up():
                    raise warm.NobodyWaits
                time.sleep(0.01)  # a wait in the kernel could not be given up
            try:
                yield
            finally:
                # Closing it would not do: a process that was forked meanwhile has it open as well.
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)

    def _file(self, name: str) -> str:
        return f"{self.directory}/{name}.json"

    def read(self, name: str) -> Link | None:
        """What is known of this kind of units."""
        try:
            with open(self._file(name), encoding="utf-8") as file:
                return Link(**json.load(file))
        except (FileNotFoundError, ValueError, TypeError):  # damaged: as if it were not there
            return None

    def write(self, name: str, link: Link) -> None:
        """Make it known to all workers."""
        unfinished = f"{self.directory}/{name}.{os.getpid()}.tmp"
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump({field: getattr(link, field) for field in link.__slots__}, file)
        os.replace(unfinished, self._file(name))

    def forget(self, name: str) -> None:
        """Know nothing of this kind of units any more."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._file(name))

    def all(self) -> Iterator[tuple[str, Link]]:
        """All that is known, with its names."""
        with contextlib.suppress(FileNotFoundError):
            for entry in os.listdir(self.directory):
                name, dot, rest = entry.partition(".")
                if dot and rest == "json" and (link := self.read(name)) is not None:
                    yield name, link


def remove(directory: str) -> None:
    """Remove a directory with all that is in it, as far as that can be."""
    shutil.rmtree(directory, ignore_errors=True)


def _sweep(directory: str) -> None:
    """Remove what stations of processes that were killed have left beside this one."""
    parent, own = os.path.split(directory)
    me = _NAME.fullmatch(own)
    with contextlib.suppress(OSError):  # others may do so at the same time
        for entry in os.listdir(parent) if me else ():
            found = _NAME.fullmatch(entry)
            # Of another user, host or container nobody here knows whether its owner lives.
            if found is None or me is None or found[1] != me[1]:
                continue
            path = f"{parent}/{entry}"
            if processes.start_ticks(int(found[2])) != int(found[3]) and os.lstat(path).st_uid == os.getuid():
                remove(path)
