"""Messages over a connection of multiprocessing's, in its own framing, without ever waiting for the rest.

The rest may never come: a process that dies in the midst of sending, or is not there to receive, leaves
no end behind it as long as another one, that was forked off it or of us, holds its connection, too. The
child's side is `multiprocessing.connection` itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from multiprocessing.connection import Connection

# A message's length comes first; -1 if it is too large for that, and the longer one follows.
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")
_SHORT_LIMIT = 0x7FFFFFFF
_SPACE_BYTES = 65_536


class Line:
    """Our end of a connection. It takes a copy of the descriptor, which `close` closes."""

    def __init__(self, connection: Connection) -> None:
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._space = memoryview(bytearray(_SPACE_BYTES))
        self._arrived = b""  # whole messages, and the beginning of one
        self._body: memoryview | None = None  # of a message too long for that, on its way
        self._filled = 0

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    def framed(self, data: bytes | memoryview) -> deque[memoryview]:
        """A message in pieces that `push` sends."""
        size = len(body := memoryview(data))
        short = size <= _SHORT_LIMIT
        header = _SHORT.pack(size) if short else _SHORT.pack(-1) + _LONG.pack(size)
        return deque((memoryview(header), body))

    def push(self, pieces: deque[memoryview]) -> bool:
        """Send as much of `pieces` as goes, which are used up meanwhile; whether that was all.

        Raises:
            OSError: if nobody can receive it.
        """
        while pieces:
            try:
                sent = self._socket.sendmsg(pieces, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            while pieces and sent >= len(pieces[0]):
                sent -= len(pieces.popleft())
            if sent:
                pieces[0] = pieces[0][sent:]
        return True

    def fetch(self) -> bool:
        """Take in what has arrived, whole or not; False if there is nothing.

        Raises:
            EOFError: if nothing more can come.
            OSError: likewise.
        """
        place = self._space if self._body is None else self._body[self._filled :]
        try:
            number = self._socket.recv_into(place, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if not number:
            raise EOFError
        if self._body is None:
            self._arrived += place[:number]
        else:
            self._filled += number
        return True

    def next(self) -> memoryview | None:
        """The next message that has arrived whole, if there is one."""
        if self._body is None:
            return self._first_arrived()
        if self._filled < len(self._body):
            return None
        body, self._body = self._body, None
        return body

    def _first_arrived(self) -> memoryview | None:
        start = _SHORT.size
        if len(self._arrived) < start:
            return None
        size = _SHORT.unpack_from(self._arrived)[0]
        if size < 0:
            start += _LONG.size
            if len(self._arrived) < start:
                return None
            size = _LONG.unpack_from(self._arrived, _SHORT.size)[0]
        body = memoryview(self._arrived)[start : start + size]
        if len(body) == size:
            self._arrived = self._arrived[start + size :]
            return body
        if start + size > _SPACE_BYTES:  # the rest of it goes straight to its place
            self._body = memoryview(bytearray(size))
            self._body[: len(body)] = body
            self._filled = len(body)
            self._arrived = b""
        return None

    def close(self) -> None:
        """End the connection for whoever holds it, a sibling that was forked meanwhile, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
