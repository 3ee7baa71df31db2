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


class Line:
    """Our end of a connection. It takes a copy of the descriptor, which `close` closes."""

    def __init__(self, connection: Connection) -> None:
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._is_body = False
        self._expect(_SHORT.size)

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

    def read(self) -> memoryview | None:
        """The next message; None if it has not arrived whole.

        Raises:
            EOFError: if there is no more.
        """
        while self._receive():
            if self._is_body:
                message = self._part
                self._is_body = False
                self._expect(_SHORT.size)
                return message
            if len(self._part) == _SHORT.size and (size := _SHORT.unpack(self._part)[0]) < 0:
                self._expect(_LONG.size)
                continue
            self._is_body = True
            self._expect(size if len(self._part) == _SHORT.size else _LONG.unpack(self._part)[0])
        return None

    def close(self) -> None:
        """End the connection for whoever holds it, a sibling that was forked meanwhile, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _expect(self, size: int) -> None:
        self._part = memoryview(bytearray(size))
        self._filled = 0

    def _receive(self) -> bool:
        """Whether the part that is expected is there."""
        while self._filled < len(self._part):
            try:
                number = self._socket.recv_into(self._part[self._filled :], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if not number:
                raise EOFError
            self._filled += number
        return True
