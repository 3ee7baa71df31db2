"""Messages both ways over one of Dask's connections: what is sent together travels together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from distributed.comm.core import connect
from distributed.security import Security

Message = tuple[Any, ...]

CONNECT_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 5.0


class Stream:
    """One end of a connection that carries lists of messages. It belongs to a loop's thread.

    Args:
        comm: Dask's connection, after its first message.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._outbox: list[Message] = []
        self._writer: asyncio.Task[None] | None = None
        self._closed = False
        self.bytes_waiting = 0  # about how much is still to be sent; any thread may read it

    @classmethod
    async def open(cls, address: str, security: Security, handler: str, **hello: Any) -> Stream:
        """Connect to a handler of a Dask server.

        Raises:
            OSError: if it cannot be reached.
        """
        args = security.get_connection_args("client")  # type: ignore[no-untyped-call]
        comm: Any = await connect(address, timeout=CONNECT_TIMEOUT_S, **args)  # type: ignore[no-untyped-call]
        stream = cls(comm)
        try:
            await comm.write({"op": handler, "reply": False, **hello})
        except BaseException:  # nor a connection is left behind when this is cancelled
            comm.abort()
            raise
        return stream

    @property
    def peer(self) -> str:
        """The address of the other end."""
        return str(self._comm.peer_address)

    def send(self, *messages: Message, size: int = 0) -> None:
        """Have messages sent, after those before. What is lost with the connection, the reader hears of."""
        if self._closed:
            return
        self._outbox += messages
        self.bytes_waiting += size
        if self._writer is None:
            self._writer = asyncio.ensure_future(self._write())

    async def read(self) -> Sequence[Message]:
        """The messages that have come together.

        Raises:
            OSError: once the connection is over, or if what comes is nothing of this kind.
        """
        messages = await self._comm.read()
        if not isinstance(messages, (list, tuple)):
            self.abort()
            raise ConnectionAbortedError(f"{self.peer} has answered {messages!r:.200}")
        return messages

    async def close(self) -> None:
        """Send what waits, and end the connection."""
        self._closed = True
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=_CLOSE_TIMEOUT_S)
        try:
            await asyncio.wait_for(self._comm.close(), _CLOSE_TIMEOUT_S)
        except (OSError, TimeoutError):
            self._comm.abort()

    def abort(self) -> None:
        """End the connection at once."""
        self._closed = True
        self._comm.abort()

    async def _write(self) -> None:
        try:
            while self._outbox:
                messages, self._outbox = self._outbox, []
                size = self.bytes_waiting
                await self._comm.write(messages)
                self.bytes_waiting -= size
        except OSError:
            self._comm.abort()  # whoever reads here hears of it
        finally:
            self._writer = None
