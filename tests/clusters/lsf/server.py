"""The scheduler's process: its sockets, its signals, and what the cluster's owner tells it.

Clients come to one socket, which a daemon that is down does not have, and which nobody looks at while it
hangs. The owner comes to another one, which is always there.
"""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import signal
import socket
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.clusters.lsf import client, processes
from tests.clusters.lsf.commands import Answer, Commands
from tests.clusters.lsf.queries import Queries
from tests.clusters.lsf.scheduler import Scheduler
from tests.clusters.lsf.settings import Settings

CONTROL = "control"
_BACKLOG = 1024
_TICK_S = 0.02
_IDLE_TICK_S = 0.1


def main(settings: Settings) -> None:
    """Run it, until it is killed."""
    processes.adopt()
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    server = Server(settings)
    server.open()
    while True:  # what is due at a time; the rest comes by itself
        server.scheduler.tick()
        await asyncio.sleep(_TICK_S if server.scheduler.is_busy else _IDLE_TICK_S)


class Server:
    """The daemon, as its clients and its owner meet it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._directory = Path(settings.directory)
        self.scheduler = Scheduler(settings)
        queries = Queries(self.scheduler)
        self._commands = Commands(self.scheduler, {"bjobs": queries.bjobs, "bhist": queries.bhist})
        self._loop = asyncio.get_running_loop()
        self._listening: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop.add_signal_handler(signal.SIGCHLD, self.scheduler.reap)
        # Many may end at once, and one signal tells of all.
        signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)

    def open(self) -> None:
        """Be there, for clients and for the owner."""
        self._be_up()
        control = _listen(self._directory / CONTROL)
        self._loop.add_reader(control, self._accept, control, self._obey)

    def _be_up(self) -> None:
        self._tell_clients("mbatchd")
        self.scheduler.frozen = False
        if self._listening is None:
            self._listening = _listen(self._directory / client.SOCKET)
        self._loop.add_reader(self._listening, self._accept, self._listening, self._answer)

    def _hang(self) -> None:
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
        self.scheduler.frozen = True

    def _crash(self, what: str) -> None:
        self._hang()
        self._tell_clients(what)
        if self._listening is not None:
            (self._directory / client.SOCKET).unlink(missing_ok=True)
            self._listening.close()
            self._listening = None

    def _configure(self, changes: dict[str, float]) -> None:
        known = {name for name in Settings.__dataclass_fields__ if name.endswith("_s")}
        if unknown := changes.keys() - known:
            raise ValueError(f"no times {sorted(unknown)}: there are {', '.join(sorted(known))}")
        self.scheduler.settings = replace(self.scheduler.settings, **changes)
        self._tell_clients("mbatchd")

    def _tell_clients(self, down: str) -> None:
        """What clients go by when there is no answer."""
        dialect = self.scheduler.dialect
        text = marshal.dumps(
            {
                "bsub_flags": dialect.bsub_flags,
                "bsub_values": dialect.bsub_values,
                "no_answer": dict(dialect.no_answer),
                "down": down,
                "reply_timeout_s": self.scheduler.settings.reply_timeout_s,
                "retry_s": self.scheduler.settings.retry_s,
            }
        )
        new = self._directory / f"{client.SETTINGS}.new"
        new.write_bytes(text)
        new.replace(self._directory / client.SETTINGS)

    def _accept(self, listening: socket.socket, handle: Any) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, OSError):
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._talk(connection, handle))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _talk(self, connection: socket.socket, handle: Any) -> None:
        with connection:
            request = b""
            with contextlib.suppress(OSError):
                while more := await self._loop.sock_recv(connection, 65536):
                    request += more
            try:
                read = marshal.loads(request)
            except (EOFError, ValueError, TypeError):
                return  # a client that was killed while it wrote
            reply, delay_s = handle(read)
            if delay_s:
                await asyncio.sleep(delay_s)  # asked for by a fault
            with contextlib.suppress(OSError):  # a client that has gone: what it asked for is done
                await self._loop.sock_sendall(connection, marshal.dumps(reply))

    def _answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], float]:
        try:
            answer = self._commands.answer(request)
        except Exception:  # a mistake in here: the client is to fail with it, not to wait for ever
            traceback.print_exc()
            answer = Answer(stderr=f"the emulation failed:\n{traceback.format_exc()}", returncode=70)
        reply = {
            "stdout": answer.stdout,
            "stderr": answer.stderr,
            "returncode": answer.returncode,
            "signal": answer.signal and int(answer.signal),
        }
        return reply, answer.delay_s

    def _obey(self, request: dict[str, Any]) -> tuple[dict[str, Any], float]:
        scheduler = self.scheduler
        order, with_ = request["order"], request["with"]
        try:
            match order:
                case "jobs":
                    return {"value": self._jobs()}, 0
                case "switch":
                    scheduler.faults.switch(with_["fault"], scheduler.now(), with_["settings"])
                case "configure":
                    self._configure(with_)
                case "clear_faults":
                    scheduler.faults.clear()
                case "lose_host":
                    scheduler.hosts.lose(**with_)
                case "give_up_host":
                    scheduler.hosts.give_up(**with_)
                case "restore_host":
                    scheduler.hosts.restore(**with_)
                case "set_ids":
                    scheduler.next_id, scheduler.max_id = with_["next_id"], with_["max_id"]
                case "crash":
                    self._crash(with_["what"])
                case "hang":
                    self._hang()
                case "resume":
                    self._be_up()
                case "reset":
                    self._crash("mbatchd")  # so that nothing is left of what clients asked for
                    for task in self._tasks - {asyncio.current_task()}:
                        task.cancel()
                    scheduler.settings = self._settings
                    scheduler.reset()
                    self._be_up()
                case _:
                    raise ValueError(f"no order {order!r}")
        except ValueError as error:
            return {"error": str(error)}, 0
        return {"value": None}, 0

    def _jobs(self) -> list[dict[str, Any]]:
        found = []
        for elements in self.scheduler.history.values():
            for job in elements.values():
                asked = job.submission
                found.append(
                    {
                        "id": job.id,
                        "index": job.index,
                        "name": job.name,
                        "state": job.state.value,
                        "starts": job.starts,
                        "host": job.host,
                        "pid": job.pid,
                        "queue": asked.queue,
                        "slots": asked.slots,
                        "reason": job.reason,
                        "exit_code": self.scheduler.texts.exit_code(job),
                        "cwd": asked.cwd,
                        "execution_cwd": job.execution_cwd,
                        "submitted": job.submitted,
                        "begun": job.begun,
                        "ended": job.ended,
                        "is_forgotten": job.id not in self.scheduler.jobs,
                    }
                )
        return found


def _listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.setblocking(False)
    # Not there before it listens: a client that finds it is let in.
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    listening.bind(str(new))
    listening.listen(_BACKLOG)
    new.replace(path)
    return listening
