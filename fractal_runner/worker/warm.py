"""Ask fork servers for units, from any process of their host.

`forkserver.py` is the other side, and has the protocol; it runs in the task's interpreter and is not
imported here. `server.py` starts it. A server serves one command in one environment and one working
directory: what differs in anything else is refused (`ColdStart`), and runs cold with the same result.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

_HELLO_S = 60.0
_TURN_S = 0.2
_QUEUE_S = 0.02
_PID_S = 60.0


class ColdStart(Exception):
    """This unit must be started cold; nothing was started.

    Attributes:
        gone: whether the server takes no more units, so that another one would have to be started.
    """

    def __init__(self, message: str = "", *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class ServerLost(Exception):
    """The server ended between the request and its answer: whether the unit was started is not known."""


class NobodyWaits(Exception):
    """The unit was given up before anything was asked of the server."""


class WarmChild:
    """A unit that a server has forked, with what `processes.Child` has.

    Attributes:
        pid: its process id, and its group's, which it leads.
        returncode: as subprocess reports it, once it has ended; None if its server was lost.
        usage: what wait4 reports of it and the children it waited for. Its peak memory counts the pages
            that it shares with the server, as a cold start would have had them for itself; never those
            of whoever asked for it.
        lost: whether the server has ended first. Then its end is not known, nor whether it has come.
    """

    __slots__ = ("_buffer", "_connection", "_poll", "lost", "pid", "returncode", "usage")

    def __init__(self, connection: socket.socket, pid: int, buffer: bytes = b"") -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.usage: resource.struct_rusage | None = None
        self.lost = False
        self._buffer = buffer
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, or is lost, waiting for up to `seconds`."""
        deadline = time.monotonic() + seconds
        while self.returncode is None and not self.lost:
            if self._read_end():
                break
            left = deadline - time.monotonic()
            if not self._poll.poll(max(0.0, left) * 1000):
                return False
            try:
                data = self._connection.recv(4096)
            except OSError:
                data = b""
            self._buffer += data
            if not data and not self._read_end():
                self.lost = True
        return True

    def close(self) -> None:
        self._connection.close()

    def _read_end(self) -> bool:
        line, end, _ = self._buffer.partition(b"\n")
        if not end:
            return False
        _, status, *usage = line.split()
        self.returncode = os.waitstatus_to_exitcode(int(status))
        seconds, figures = map(float, usage[:2]), map(int, usage[2:])
        self.usage = resource.struct_rusage((*seconds, *figures))
        return True


def run(
    path: str,
    words: Sequence[str],
    environment: Mapping[bytes, bytes],
    cwd: str,
    log_file: str,
    *,
    give_up: Callable[[], bool] = lambda: False,
) -> WarmChild:
    """Have the server at the socket `path` run a command; from any process of this host.

    Args:
        path: the server's socket.
        words: the command, as it would be spawned.
        environment: all its variables.
        cwd: where it starts.
        log_file: made anew, for its stdout and stderr.
        give_up: asked while the server does not listen.

    Raises:
        NobodyWaits: if it was given up meanwhile.
        ColdStart: if it must be started cold, or the server is not there.
        OSError: as `spawn` raises it: the log cannot be opened, there is no process to be had, or a NUL
            character is in a word.
        ServerLost: if the server ended before it had answered.
    """
    entries = [b"%s=%s" % pair for pair in environment.items()]
    encoded = [os.fsencode(word) for word in words]
    parts = [b"run", os.fsencode(cwd), os.fsencode(os.path.abspath(log_file)), b"%d" % len(encoded)]
    parts += encoded + entries
    if b"\0" in b"".join(parts):
        raise OSError(errno.EINVAL, "There is a NUL character in a command or its environment")
    connection = _connected(path, give_up=give_up)
    try:
        answer, rest = _answer(connection, parts, _PID_S)
        if not answer:
            raise ServerLost("The fork server ended while it was starting a unit.")
        kind, _, text = answer.partition(" ")
        if kind in ("cold", "gone"):
            raise ColdStart(text, gone=kind == "gone")
        if kind == "error":
            number, _, what = text.partition(" ")
            raise OSError(int(number), what)
        return WarmChild(connection, int(text), rest)
    except BaseException:
        connection.close()
        raise


def ask(path: str, request: Literal["status", "retire", "end"], timeout_s: float = _PID_S) -> dict[str, str]:
    """Ask a server how it is; to take no more units, and end when those that run have; or to end now.

    Args:
        path: the server's socket.
        request: what it is asked.
        timeout_s: seconds to wait for each of its answers.

    Raises:
        ColdStart: if it is not there.
    """
    with _connected(path, timeout_s) as connection:
        answer, _ = _answer(connection, [request.encode()], timeout_s)
    return dict(pair.split("=", 1) for pair in answer.split(" ") if "=" in pair)


def _connected(
    path: str, timeout_s: float = _HELLO_S, give_up: Callable[[], bool] = lambda: False
) -> socket.socket:
    """A connection that the server has taken: only now may anything be sent that it might do."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        deadline = time.monotonic() + timeout_s
        while not _try_to_connect(connection, path):
            if time.monotonic() > deadline:
                raise TimeoutError("too many others wait for it")
            if give_up():
                raise NobodyWaits
            time.sleep(_QUEUE_S)  # nothing tells when there is room in the socket's queue
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        while not poll.poll(_TURN_S * 1000) and time.monotonic() < deadline:
            if give_up():
                raise NobodyWaits
        hello = _line(connection, deadline)[0]
    except NobodyWaits:
        connection.close()
        raise
    except (OSError, ValueError) as error:
        connection.close()
        raise ColdStart(f"The fork server does not answer: {error}.", gone=True) from None
    if hello != "hello":
        connection.close()
        kind, _, why = hello.partition(" ")
        raise ColdStart(why or "The fork server has ended.", gone=kind != "cold")
    return connection


def _try_to_connect(connection: socket.socket, path: str) -> bool:
    """Connect; False if there are as many waiting as the server's queue has room for (unix(7): EAGAIN)."""
    connection.setblocking(False)
    try:
        connection.connect(path)
    except BlockingIOError:
        return False
    return True


def _answer(connection: socket.socket, parts: Sequence[bytes], timeout_s: float) -> tuple[str, bytes]:
    payload = b"\0".join(parts)
    try:
        connection.settimeout(timeout_s)
        connection.sendall(b"%d\n%s" % (len(payload), payload))
    except OSError:
        # It may have said why it does not listen; a request that it has not got in full is not done.
        with contextlib.suppress(OSError, ValueError):
            answer, rest = _line(connection, time.monotonic() + timeout_s)
            if answer:
                return answer, rest
        raise ColdStart("The fork server has ended.", gone=True) from None
    try:
        return _line(connection, time.monotonic() + timeout_s)
    except (OSError, ValueError):
        return "", b""


def _line(connection: socket.socket, deadline: float) -> tuple[str, bytes]:
    """The next line, and what came after it; an empty one at the end."""
    data = b""
    while b"\n" not in data:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        connection.settimeout(left)
        part = connection.recv(65536)
        if not part:
            return "", b""
        data += part
    line, _, rest = data.partition(b"\n")
    return line.decode(errors="replace"), rest
