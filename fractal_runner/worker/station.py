"""The fork servers of a run, or of a cluster's job, on one host: found, started, ended.

A *station* is a directory of mode 0700 on a local disk that all workers of one owner share, whatever their
executor: the coordinator of a run, or a job. A worker that has a unit to start looks there for the server of
its command and environment, and starts it if there is none. Servers watch their owner and end with it, so
none outlives a `kill -9`; the owner ends them when their task has ended.

Nothing is loaded here for units that start cold.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fractal_runner.worker import processes
from fractal_runner.worker.spawn import Environment
from fractal_runner.worker.spec import PATH_BYTES, Ahead, WarmStart

if TYPE_CHECKING:
    from fractal_runner.worker.ahead import ServerAhead
    from fractal_runner.worker.links import Link, Links
    from fractal_runner.worker.server import Server
    from fractal_runner.worker.targets import Target
    from fractal_runner.worker.warm import WarmChild

IDLE_S = 300.0
_IDLE_ELSEWHERE_S = 30.0  # where nobody ends them when their task has ended

_MOST_CRASHES = 2  # with the third one its units start cold: something kills it, or it kills itself
_MOST_TRIES = 4  # servers that one unit asks: each may just have ended
_IDLE_FOR_S = 1.0  # a server that has had no unit for so long may make room for another
_LOCK_MARGIN_S = 15.0  # beyond the time of the imports that the holder of the lock waits for
_TURN_S = 0.2
_END_S = 2.0
_MOST_CHANGES = 3  # a task that writes what it imports would have its imports paid for each unit
_CHANGED = " has changed."  # what a server says then
_SOCKET = "/warm-12345678/socket"  # below a station

_of_this_job: list[_Job] = []  # one, where this process is of a job; made before any worker is there
_known: dict[tuple[str, str], Link] = {}  # what this process knows, by station and name; in single steps


class GivenUp(Exception):
    """The unit was told to stop while its server was being started; nothing of it has been."""


class UnitLost(Exception):
    """The fork server has not said whether it has started the unit: nobody knows."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A unit to be started.

    Attributes:
        words: the command, with the unit's own arguments.
        leading: how many of them are the command of all units.
        cwd: where it starts.
        environment: its variables.
        value: what the varying one of them is.
        log_file: for what it prints.
        terms: of its warm start.
    """

    words: Sequence[str]
    leading: int
    cwd: str
    environment: Environment
    value: bytes
    log_file: str
    terms: WarmStart


@dataclass(frozen=True, slots=True)
class _Kind:
    """Which server a unit needs.

    Attributes:
        name: by what it is found in a station.
        target: what it serves.
        gone: the socket of one that has ended; "" for none.
        has_changed: whether it has because one of its files had changed.
    """

    name: str
    target: Target
    gone: str
    has_changed: bool


@dataclass(frozen=True, slots=True)
class _Job:
    """A job of a cluster.

    Attributes:
        station: its own.
        is_single: whether it has one call only.
    """

    station: Station
    is_single: bool


class Station:
    """The fork servers of one owner on this host.

    Args:
        directory: where they are.
        owner: the process that they end with.
        ticks: when it started, which tells it from a later one of its pid; 0 where that cannot be known.
        idle_s: seconds without a unit after which a server ends; IDLE_S, if None.
    """

    def __init__(self, directory: str, owner: int, ticks: int, idle_s: float | None = None) -> None:
        self.directory = directory
        self.ticks = ticks
        self._owner = owner
        self._idle_s = IDLE_S if idle_s is None else idle_s

    @classmethod
    def of(cls, owner: int, number: int = 0, *, idle_s: float | None = None) -> Station:
        """A station of a process of this host; its directory need not be there yet.

        Args:
            owner: the process.
            number: which of its stations: the runs that it coordinates have one each, as each ends its own.
            idle_s: as for the class.
        """
        ticks = processes.start_ticks(owner) or 0
        name = f"fractal-runner-{os.getuid()}-{_world()}-{owner}-{ticks}-{number}"
        base = os.environ.get("TMPDIR", "").rstrip("/")
        is_short = len(os.fsencode(f"{base}/{name}{_SOCKET}")) <= PATH_BYTES
        if not (base.startswith("/") and is_short and os.access(base, os.W_OK)):
            base = "/tmp"
        return cls(f"{base}/{name}", owner, ticks, idle_s)

    def start(self, unit: Wanted, give_up: Callable[[], bool]) -> tuple[WarmChild | None, str]:
        """Start a unit warm, if that can be.

        Args:
            unit: the unit.
            give_up: asked while a server is waited for.

        Returns:
            The unit's process; or None, and why it must be started cold, "" if its command is of no kind
            that could be started otherwise.

        Raises:
            GivenUp: if it was told to stop meanwhile.
            UnitLost: if it is not known whether it has started.
            OSError: as `spawn` raises it.
        """
        from fractal_runner.worker import warm  # only those who need it pay for it

        name, target = self._named(unit)
        if target is None:
            return None, ""
        gone = ""
        why = "Its fork servers end as soon as they have started."
        for _ in range(_MOST_TRIES):
            link = _known.get((self.directory, name))
            if link is None or (link.socket and link.socket == gone):
                try:
                    link = self._find_or_start(
                        _Kind(name, target, gone, why.endswith(_CHANGED)), unit, give_up
                    )
                except warm.NobodyWaits:
                    raise GivenUp from None
                except warm.ColdStart as error:
                    return None, str(error)
                except OSError as error:  # a full disk, too many open files: the next unit tries again
                    return None, f"Its fork server cannot be had: {error}."
                _known[self.directory, name] = link
            if link.cold:
                return None, link.cold
            environment = {**unit.environment.variables, unit.environment.varying: unit.value}
            try:
                return warm.run(
                    link.socket, unit.words, environment, unit.cwd, unit.log_file, give_up=give_up
                ), ""
            except warm.NobodyWaits:
                raise GivenUp from None
            except warm.ServerLost as error:
                _known.pop((self.directory, name), None)
                raise UnitLost(str(error)) from None
            except warm.ColdStart as error:
                if not error.gone:
                    return None, str(error)
                gone, why = link.socket, str(error)
        return None, why

    def end_servers(self, keep: str = "") -> None:
        """End the servers, whose units have ended. The station stays, and starts others if need be.

        Args:
            keep: the stage that comes next, whose server may have been started beforehand.
        """
        if not os.path.lexists(self.directory):
            return  # as with most: no unit has been started warm
        from fractal_runner.worker import warm  # only those who need it pay for it
        from fractal_runner.worker.ahead import end_those_of
        from fractal_runner.worker.links import remove

        links = self._links()
        if not links.is_ours():
            return  # what others may write there names processes that are none of its servers
        end_those_of(self.directory, keep)
        found = [(name, link) for name, link in links.all() if not keep or link.stage != keep]
        for _, link in found:
            with contextlib.suppress(warm.ColdStart):  # it has ended by itself, or does not listen
                if link.lives():
                    warm.ask(link.socket, "end", _END_S)
        deadline = time.monotonic() + _END_S
        while any(link.lives() for _, link in found) and time.monotonic() < deadline:
            time.sleep(0.005)  # they are not all our children: nobody tells us when they end
        for name, link in found:
            if link.lives():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(link.pid, 9)  # units lead groups of their own
                remove(os.path.dirname(link.socket))
            _known.pop((self.directory, name), None)
            links.forget(name)

    def remove(self) -> None:
        """End all servers, and remove the station."""
        if not os.path.lexists(self.directory):
            return
        from fractal_runner.worker.links import remove

        if self._links().is_ours():
            self.end_servers()
            remove(self.directory)

    def _links(self) -> Links:
        from fractal_runner.worker.links import Links  # only those who need it pay for it

        return Links(self.directory)

    def _named(self, unit: Wanted) -> tuple[str, Target | None]:
        """What the server of such units is called here, and what it serves."""
        # Looked up once by each thread, for all units of a task.
        words, known = tuple(unit.words[: unit.leading]), unit.environment.targets
        if (words, unit.cwd) not in known:
            from fractal_runner.worker.targets import recognise

            # Looked up as posix_spawnp(3) does it: in the PATH of this process, whatever the unit's is.
            target = recognise(words)
            known[words, unit.cwd] = (_name_of(words, unit), target)
        found: tuple[str, Target | None] = known[words, unit.cwd]
        return found

    def _find_or_start(self, kind: _Kind, unit: Wanted, give_up: Callable[[], bool]) -> Link:
        """The server of this kind that there is, or a new one."""
        from fractal_runner.worker.links import Link

        links = self._links()
        links.make()
        link = links.read(kind.name)
        if link is not None and link.is_news(kind.gone):
            return link
        with links.lock(unit.terms.timeout_s + _LOCK_MARGIN_S, give_up):
            link = links.read(kind.name)
            if link is not None and link.is_news(kind.gone):
                return link  # somebody else was faster
            before = Link(stage=unit.terms.stage) if link is None else link
            before = replace(before, crashes=before.crashes + self._has_crashed(before))
            if kind.has_changed:
                before = replace(before, changes=before.changes + 1)
            cold = None
            if before.crashes > _MOST_CRASHES:
                cold = replace(before, socket="", cold=f"Its fork server has crashed {before.crashes} times.")
            elif before.changes > _MOST_CHANGES:
                cold = replace(before, socket="", cold=f"Its files keep changing ({before.changes} times).")
            elif link is not None and link.lives() and os.path.exists(link.socket):
                # Kept in mind with who it is: it is to end with the others.
                cold = replace(link, cold="Its fork server does not answer.")
            if cold is not None:
                links.write(kind.name, cold)
                return cold
            self._make_room(unit.terms.most)
            return self._start_server(kind, unit, before, give_up)

    def _start_server(self, kind: _Kind, unit: Wanted, before: Link, give_up: Callable[[], bool]) -> Link:
        """Start a server, and write down where it is, or why there is none.

        Args:
            kind: of the units.
            unit: the first one.
            before: what there was.
            give_up: asked while it imports.
        """
        from fractal_runner.worker.warm import ColdStart

        links = self._links()
        cold = replace(before, socket="")
        try:
            server = self._begin(kind.target, unit.words, unit, unit.terms)
        except ColdStart as error:
            link = replace(cold, cold=str(error))
            links.write(kind.name, link)
            return link
        ahead = None
        try:
            ahead = self._begin_ahead(kind, unit)
            why = _ready(server, give_up)
            link = replace(cold, cold=why or "")
            if why is None:
                link = replace(before, socket=server.socket, pid=server.pid, ticks=server.ticks)
            links.write(kind.name, link)
        except BaseException:  # whatever it is, no server is left that nobody knows of
            server.stop(0)
            if ahead is not None:
                ahead.end()
            raise
        if ahead is not None:
            ahead.begin()
        return link

    def _begin(self, target: Target, words: Sequence[str], unit: Wanted, terms: WarmStart | Ahead) -> Server:
        """A server that has just been started, for units like this one.

        Raises:
            ColdStart: if there can be none.
            OSError: if its files cannot be made.
        """
        from fractal_runner.worker.server import Server  # only the one who starts it pays for it

        log = f"{terms.log}-{processes.host_name()}-{os.getpid()}.log"
        os.makedirs(os.path.dirname(log), exist_ok=True)
        return Server.start(
            target,
            words=words,
            directory=self.directory,
            environment={**unit.environment.variables, unit.environment.varying: unit.value},
            log=log,
            cwd=unit.cwd,
            owner=self._owner,
            varying=(os.fsdecode(unit.environment.varying),),
            import_timeout_s=terms.timeout_s,
            idle_s=self._idle_s,
        )

    def _begin_ahead(self, kind: _Kind, unit: Wanted) -> ServerAhead | None:
        """The server of the next stage, if there is to be one and it can be had; it is not waited for."""
        from fractal_runner.worker.targets import recognise
        from fractal_runner.worker.warm import ColdStart

        ahead, links = unit.terms.ahead, self._links()
        target = None if ahead is None else recognise(ahead.command)
        if ahead is None or target is None:
            return None
        name = _name_of(ahead.command, unit)
        living = [link for _, link in links.all() if link.lives()]
        if name == kind.name or links.read(name) is not None or len(living) + 2 > unit.terms.most:
            return None
        from fractal_runner.worker.ahead import ServerAhead

        try:
            server = self._begin(target, ahead.command, unit, ahead)
        except (OSError, ColdStart):
            return None  # its own units will say why
        return ServerAhead(server, links, name, ahead.stage, ahead.timeout_s)

    def _has_crashed(self, link: Link) -> bool:
        """Whether the server has ended otherwise than of its own accord; what it has left is removed."""
        from fractal_runner.worker.links import remove

        directory = os.path.dirname(link.socket)
        deadline = time.monotonic() + _END_S
        while link.lives() and os.path.exists(link.socket):
            if time.monotonic() > deadline:
                return False  # it does not answer
            time.sleep(0.01)  # it is just ending, and not our child
        if link.lives() or not os.path.exists(directory):
            return False
        remove(directory)
        return True

    def _make_room(self, most: int) -> None:
        """Have a server retire that has nothing to do, if there are too many for another one.

        Raises:
            ColdStart: if all have.
        """
        from fractal_runner.worker import warm

        living = [link for _, link in self._links().all() if link.lives()]
        if len(living) < most:
            return
        idle: list[tuple[float, str]] = []
        for link in living:
            with contextlib.suppress(warm.ColdStart):  # it has just ended
                idle.append((float(warm.ask(link.socket, "status", _END_S).get("idle", "0")), link.socket))
        longest, socket = max(idle, default=(_IDLE_FOR_S, ""))
        if longest < _IDLE_FOR_S:
            raise warm.ColdStart(f"There are {most} fork servers with units to run (max_servers).")
        if socket:
            with contextlib.suppress(warm.ColdStart):
                warm.ask(socket, "retire", _END_S)


def station_for(coordinator: tuple[str, int], terms: WarmStart) -> Station | None:
    """Where a unit of this process finds its server: its job's station, the coordinator's, or its own.

    None if it has nobody to share one with.

    Args:
        coordinator: host and pid of the run's.
        terms: of the unit's warm start.
    """
    host, pid = coordinator
    is_here = host == processes.host_name() and (processes.start_ticks(pid) or 0) == terms.ticks
    for job in _of_this_job:
        if not is_here or terms.ticks < job.station.ticks:  # else it is a run within a call of this job
            return None if job.is_single and not terms.even_single else job.station
    if is_here:
        return Station(terms.station, pid, terms.ticks)
    return Station.of(os.getpid(), idle_s=_IDLE_ELSEWHERE_S)


def serve_this_job(calls: int) -> None:
    """Have this process, and those that it forks, use servers that end with it.

    Args:
        calls: how many it has to do.
    """
    _of_this_job[:] = [_Job(Station.of(os.getpid()), is_single=calls < 2)]


def leave_this_job() -> None:
    """End the servers of this process's calls, which have ended."""
    for job in _of_this_job:
        job.station.remove()


@functools.cache
def _world() -> str:
    """Where pids mean the same as here: on this host, since this boot, in this container."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        namespace = ""
    return f"{zlib.crc32(f'{processes.host_name()} {processes.boot_id()} {namespace}'.encode()):08x}"


def _ready(server: Server, give_up: Callable[[], bool]) -> str | None:
    """Why it will not be ready; None once it is.

    Raises:
        NobodyWaits: if the unit was told to stop meanwhile.
    """
    from fractal_runner.worker.warm import NobodyWaits

    while True:
        with contextlib.suppress(TimeoutError):
            return server.wait_ready(_TURN_S)
        if give_up():
            raise NobodyWaits


def _name_of(words: Sequence[str], unit: Wanted) -> str:
    import hashlib

    # The run's as well: what was found out of a task in one run may not be so in the next.
    parts = [*map(os.fsencode, words), b"", os.fsencode(unit.cwd), b"", unit.terms.station.encode()]
    parts += [b"%s=%s" % pair for pair in sorted(unit.environment.variables.items())]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()
