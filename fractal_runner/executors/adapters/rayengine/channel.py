"""The connection of a worker, as the process has it that submits the calls: nothing here ever waits."""

from __future__ import annotations

import hmac
import pickle
import selectors
import socket
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection

from fractal_runner.executors.adapters.rayengine import worker
from fractal_runner.executors.adapters.rayengine.worker import CALL_HEAD, HEAD
from fractal_runner.executors.local.line import Line


class Channel:
    """One worker's connection. The manager's thread owns it.

    Args:
        joined: the connected socket, which is taken over.
        token: what the worker has to say first.
        selector: where the channel is registered, by `fd`.
    """

    def __init__(self, joined: socket.socket, token: bytes, selector: selectors.BaseSelector) -> None:
        if joined.family != socket.AF_UNIX:
            worker.keep_alive(joined)
        self._connection = Connection(joined.detach())
        self._line = Line(self._connection)
        self._token = token
        self._selector = selector
        self._is_known = False
        self._waiting: deque[memoryview] = deque()  # what could not be sent at once
        self._levels: bytes | None = None  # those that the worker knows
        self.fd = self._line.fd

    def read(self, heard: Callable[[Channel, bytes, int, memoryview], None]) -> bool:
        """Pass on what has arrived; False once nothing more can come."""
        try:
            self._line.fetch()
        except (EOFError, OSError):
            return False
        while (message := self._line.next()) is not None:
            if len(message) < HEAD.size:
                return False
            word, number = HEAD.unpack_from(message)
            body = message[HEAD.size :]
            if self._is_known:
                heard(self, word, number, body)
            elif word == worker.HELLO and hmac.compare_digest(bytes(body), self._token):
                self._is_known = True
            else:
                return False  # a stranger: nothing that it says is unpickled
        return True

    def give(
        self,
        number: int,
        *,
        name: str,
        key: str | None,
        timeout: float | None,
        levels: bytes,
        message: bytes,
    ) -> None:
        """Give the worker a call."""
        changed = None if levels == self._levels else levels
        self._levels = levels
        order = pickle.dumps((name, key, timeout, changed))
        head = HEAD.pack(worker.CALL, number) + CALL_HEAD.pack(len(order))
        self._send(b"".join((head, order, message)))

    def say(self, word: bytes, number: int) -> None:
        self._send(HEAD.pack(word, number))

    def _send(self, data: bytes) -> None:
        was_waiting = bool(self._waiting)
        self._waiting.extend(self._line.framed(data))
        if not was_waiting and not self._pushed():
            self._listen_for(selectors.EVENT_READ | selectors.EVENT_WRITE)

    def flush(self) -> None:
        """Send what has waited: there is room for some."""
        if self._pushed():
            self._listen_for(selectors.EVENT_READ)

    def _pushed(self) -> bool:
        try:
            return self._line.push(self._waiting)
        except OSError:
            self._waiting.clear()  # the end of the connection is seen by whoever reads
            return True

    def _listen_for(self, events: int) -> None:
        key = self._selector.get_key(self.fd)
        self._selector.modify(self.fd, events, key.data)

    def close(self) -> None:
        self._line.close()
        self._connection.close()
