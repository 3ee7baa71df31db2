"""Places that several executors share, and `make` with them: GNU make's jobserver protocol.

A jobserver is a pipe with one byte ("token") in it per free place: whoever wants one reads, whoever is
done writes it back (GNU make manual, "POSIX Jobserver Interaction"). Our own pools are such pipes, too,
so a `make -j` that a call starts takes its places from the same stock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import shutil
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fractal_runner.executors.cpus import usable_cpus
from fractal_runner.quantities import parse_count

if TYPE_CHECKING:
    import asyncio

_AUTH = re.compile(r"--jobserver-(?:auth|fds)=(?:fifo:(?P<path>\S+)|(?P<read>-?\d+),(?P<write>-?\d+))")
_MAKE_TIMEOUT_S = 10.0
_TOKEN = b"+"
_TURN_S = 0.1
_PAUSE_S = 0.01


class SlotPool:
    """A number of places, taken and given back; several executors given the same pool share them.

    Args:
        size: how many places there are. In a process that GNU make started as a job ("+" before the
            recipe's line), the places are make's own, and `size` bounds how many of them are taken at a
            time. None: all that make has; without make, the CPUs that this process may use.
        makeflags: the value of MAKEFLAGS to look for a jobserver in; the environment's by default.

    Raises:
        ValueError: if size is not a positive whole number.
        OSError: if MAKEFLAGS names a jobserver that is not there.
    """

    def __init__(self, size: int | None = None, *, makeflags: str | None = None) -> None:
        try:
            size = None if size is None else parse_count(size)
        except ValueError as error:
            raise ValueError(f"size: {error}") from None
        given = os.environ.get("MAKEFLAGS", "") if makeflags is None else makeflags
        matches = list(_AUTH.finditer(given))
        self._lock = threading.Lock()  # guards what is taken, and the implicit place
        self._taken: deque[bytes | None] = deque()  # the tokens we hold; None is make's implicit one
        self._folder: str | None = None
        self._makeflags = given
        self._offers = 0
        self._replaced: str | None = None
        self._read = self._write = -1  # ours, with O_NONBLOCK
        self._read_shared = self._write_shared = -1  # those that children inherit; none for a named pipe
        if matches and matches[-1]["read"] not in ("-2", "-1"):  # make's word for "no jobserver here"
            self._own = 0
            self._implicit = True  # a job that make starts has one place without asking
            self._limit = size
            self._open(matches[-1]["path"], int(matches[-1]["read"] or 0), int(matches[-1]["write"] or 0))
        else:
            self._own = self._limit = size or usable_cpus()
            self._implicit = False
            self._make_jobserver(self._own)

    @property
    def size(self) -> int | None:
        """How many places may be taken at a time; None if only make knows."""
        return self._limit

    def acquire(self, timeout: float | None = None) -> bool:
        """Take a place, waiting for one for up to `timeout` seconds; for as long as it takes if None.

        Returns:
            Whether a place was taken.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        while not self._try():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            # Short turns: a place may also come free without a token in the pipe.
            poll.poll(1000 * (_TURN_S if left is None else min(_TURN_S, left)))
            if self._is_full():
                time.sleep(_PAUSE_S)  # there are tokens, so poll does not wait, and none is for us
        return True

    def release(self) -> None:
        """Give back a place that was taken.

        Raises:
            ValueError: if none is taken.
        """
        with self._lock:
            if not self._taken:
                raise ValueError("a place is given back that was not taken")
            token = self._taken.pop()
            if token is None:
                self._implicit = True
            else:
                os.write(self._write, token)
            if self._own and not self._taken:
                self._replace_lost()

    async def acquire_slot(self) -> None:
        """Take a place, waiting for one without holding up the event loop."""
        import asyncio  # takes longer to load than all the rest, and few pools are awaited

        loop = asyncio.get_running_loop()
        while not self._try():
            fd = os.dup(self._read)  # a loop watches a descriptor once
            arrived: asyncio.Future[None] = loop.create_future()
            loop.add_reader(fd, _tell, arrived)
            try:
                await asyncio.wait([arrived], timeout=_TURN_S)
                if self._is_full():
                    await asyncio.sleep(_PAUSE_S)
            finally:
                loop.remove_reader(fd)
                os.close(fd)

    async def release_slot(self) -> None:
        """Give back a place that was taken."""
        self.release()

    def offer(self) -> None:
        """Put MAKEFLAGS into this process's environment, for commands that calls in threads start.

        Each `offer` is answered by a `withdraw`; the last one, or `close`, puts back what was there.
        """
        with self._lock:
            self._offers += 1
            if self._offers == 1:
                self._replaced = os.environ.get("MAKEFLAGS")
                os.environ["MAKEFLAGS"] = self._makeflags

    def withdraw(self) -> None:
        """Take an offer back."""
        with self._lock:
            if self._offers > 0:
                self._offers -= 1
                if self._offers == 0:
                    self._put_back()

    def _put_back(self) -> None:
        if self._replaced is None:
            os.environ.pop("MAKEFLAGS", None)
        else:
            os.environ["MAKEFLAGS"] = self._replaced

    def makeflags(self) -> str:
        """The value of MAKEFLAGS that lets a child process share the places.

        It says -j by itself; a make that is given its own -j takes no part. Where the installed make is
        older than 4.4, the descriptors of `inherited` must be open in it: `subprocess` closes them unless
        told not to.
        """
        return self._makeflags

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors that a child process needs under the same numbers; none for a named pipe."""
        return (self._read_shared, self._write_shared) if self._read_shared >= 0 else ()

    def close(self) -> None:
        """Give up the pool. What is taken is make's again, if it is make's."""
        with self._lock:
            if self._offers > 0:
                self._offers = 0
                self._put_back()
            while self._taken:
                if (token := self._taken.pop()) is not None and not self._own:
                    os.write(self._write, token)
            owned = {self._read, self._write}
            if self._own:
                owned |= set(self.inherited)
            self._read = self._write = self._read_shared = self._write_shared = -1
            for fd in owned - {-1}:
                os.close(fd)
            if self._folder is not None:
                shutil.rmtree(self._folder)
                self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_read", -1) >= 0:
            self.close()

    def _try(self) -> bool:
        with self._lock:
            if self._is_full():
                return False
            if self._implicit:
                self._implicit = False
                self._taken.append(None)
                return True
            try:
                token = os.read(self._read, 1)
            except BlockingIOError:
                return False
            if not token:
                raise OSError(errno.EPIPE, "The jobserver in MAKEFLAGS has gone: its pipe is at its end")
            self._taken.append(token)
            return True

    def _is_full(self) -> bool:
        return self._limit is not None and len(self._taken) >= self._limit

    def _open(self, path: str | None, read: int, write: int) -> None:
        """Join a jobserver. Our end is opened anew: to set O_NONBLOCK on a shared one would break make."""
        self._read_shared, self._write_shared = (-1, -1) if path else (read, write)
        try:
            self._read = os.open(path or f"/dev/fd/{read}", os.O_RDONLY | os.O_NONBLOCK)
            try:
                self._write = os.open(path, os.O_WRONLY) if path else os.dup(write)
            except OSError:
                os.close(self._read)
                self._read = -1
                raise
        except OSError as error:
            raise OSError(
                error.errno,
                f"MAKEFLAGS={self._makeflags!r} names a jobserver that cannot be opened "
                f"({os.strerror(error.errno or 0)}): does the recipe's line begin with '+'?",
            ) from None

    def _make_jobserver(self, size: int) -> None:
        if _make_knows_fifos():
            self._folder = tempfile.mkdtemp(prefix="fractal-runner-slots-")
            path = f"{self._folder}/jobserver"
            os.mkfifo(path, 0o600)
            auth = f"fifo:{path}"
            self._read_shared = self._write_shared = -1
            self._read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            self._write = os.open(path, os.O_WRONLY)
        else:
            self._read_shared, self._write_shared = os.pipe()
            for fd in (self._read_shared, self._write_shared):
                os.set_inheritable(fd, True)
            auth = f"{self._read_shared},{self._write_shared}"
            self._read = os.open(f"/dev/fd/{self._read_shared}", os.O_RDONLY | os.O_NONBLOCK)
            self._write = os.dup(self._write_shared)
        self._makeflags = f" -j{size} --jobserver-auth={auth}"
        os.write(self._write, _TOKEN * size)

    def _replace_lost(self) -> None:
        """Put back the tokens of makes that were killed: none of our calls runs that could have one."""
        waiting = struct.unpack("i", fcntl.ioctl(self._read, termios.FIONREAD, b"\0" * 4))[0]
        if waiting < self._own:
            os.write(self._write, _TOKEN * (self._own - waiting))


def _tell(arrived: asyncio.Future[None]) -> None:
    if not arrived.done():
        arrived.set_result(None)


def _make_knows_fifos() -> bool:
    """Whether the installed make is 4.4 or newer; older ones stop at a jobserver with a name."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            ["make", "--version"], capture_output=True, text=True, timeout=_MAKE_TIMEOUT_S, check=True
        )
        if match := re.match(r"GNU Make (\d+)\.(\d+)", answer.stdout):
            return (int(match[1]), int(match[2])) >= (4, 4)
    return False
