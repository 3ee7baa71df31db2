"""The fork servers of a run, or of a cluster's job, on one host: found, started, ended.

A *station* is a directory of mode 0700 on a local disk that all workers of one owner share, whatever their
executor: the coordinator of a run, or a job. A worker that has a unit to start looks there for the server of
its command and environment, and starts it if there is none. Servers watch their owner and end with it, so
none outlives a `kill -9`; the owner ends them when their task has ended.

What a station holds: `lock`, held while a server is started; per server NAME.json, which says where it is or
why there is none; and the directory of each server that runs. One that has ended by itself has removed its
directory: a directory without a server tells of one that has crashed.

Nothing is loaded here for units that start cold.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fractal_runner.worker import processes
from fractal_runner.worker.spawn import Environment
from fractal_runner.worker.spec import WarmStart

if TYPE_CHECKING:
    from fractal_runner.worker.server import Server
    from fractal_runner.worker.targets import Target
    from fractal_runner.worker.warm import WarmChild

IDLE_S = 300.0

_MOST_CRASHES = 2  # with the third one its units start cold: something kills it, or it kills itself
_MOST_TRIES = 4  # servers that one unit asks: each may just have ended
_IDLE_FOR_S = 1.0  # a server that has had no unit for so long may make room for another
_LOCK_MARGIN_S = 15.0  # beyond the time of the imports that the holder of the lock waits for
_TURN_S = 0.2
_END_S = 2.0
_LONGEST_BASE = 36  # characters: the path of a socket ends at 107 (unix(7))
_NAME = re.compile(r"fractal-runner-(\d+)-(\d+)-(\d+)-\d+")

_of_this_job: list[Station] = []  # one, where this process is of a job; made before any worker is there
_links: dict[tuple[str, str], _Link] = {}  # what this process knows, by station and name; in single steps


class GivenUp(Exception):
    """The unit was told to stop while its server was being started; nothing of it has been."""


class UnitLost(Exception):
    """The fork server ended while it was starting the unit: whether it has started is not known."""


@dataclass(frozen=True, slots=True)
class _Link:
    """What there is for one command in one environment.

    Attributes:
        socket: the server's; "" for none.
        pid, ticks: which process it is.
        crashes: how many have crashed before it.
        cold: why it must be started cold; "" if it need not.
    """

    socket: str = ""
    pid: int = 0
    ticks: int | None = None
    crashes: int = 0
    cold: str = ""

    def lives(self) -> bool:
        return (
            bool(self.socket)
            and processes.is_running(self.pid)
            and (self.ticks is None or processes.start_ticks(self.pid) == self.ticks)
        )

    def is_news_to(self, kind: _Kind) -> bool:
        """Whether it is another server than the one that has gone, or says that there is to be none."""
        return bool(self.cold) or self.socket != kind.gone


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
    """

    name: str
    target: Target
    gone: str


class Station:
    """The fork servers of one owner on this host.

    Args:
        directory: where they are.
        owner: the process that they end with.
        ticks: when it started, which tells it from a later one of its pid; 0 where that cannot be known.
    """

    def __init__(self, directory: str, owner: int, ticks: int) -> None:
        self.directory = directory
        self.ticks = ticks
        self._owner = owner

    @classmethod
    def of(cls, owner: int, number: int = 0) -> Station:
        """A station of a process of this host; its directory need not be there yet.

        Args:
            owner: the process.
            number: which of its stations: the runs that it coordinates have one each, as each ends its own.
        """
        ticks = processes.start_ticks(owner) or 0
        base = os.environ.get("TMPDIR", "").rstrip("/")
        if not base.startswith("/") or len(os.fsencode(base)) > _LONGEST_BASE:
            base = "/tmp"
        return cls(f"{base}/fractal-runner-{os.getuid()}-{owner}-{ticks}-{number}", owner, ticks)

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
            link = _links.get((self.directory, name))
            if link is None or (link.socket and link.socket == gone):
                try:
                    link = self._find_or_start(_Kind(name, target, gone), unit, give_up)
                except warm.ColdStart as error:
                    return None, str(error)
                except OSError as error:  # a full disk, too many open files: the next unit tries again
                    return None, f"Its fork server cannot be had: {error}."
                _links[self.directory, name] = link
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
                _links.pop((self.directory, name), None)
                raise UnitLost(str(error)) from None
            except warm.ColdStart as error:
                if not error.gone:
                    return None, str(error)
                gone, why = link.socket, str(error)
        return None, why

    def end_servers(self) -> None:
        """End all servers, whose units have ended. The station stays, and starts others if need be."""
        from fractal_runner.worker import warm  # only those who need it pay for it

        if not self._is_ours():
            return  # what others may write there names processes that are none of its servers
        links = list(self._all())
        for _, link in links:
            with contextlib.suppress(warm.ColdStart):  # it has ended by itself, or does not listen
                if link.lives():
                    warm.ask(link.socket, "end", _END_S)
        deadline = time.monotonic() + _END_S
        while any(link.lives() for _, link in links) and time.monotonic() < deadline:
            time.sleep(0.005)  # they are not all our children: nobody tells us when they end
        for name, link in links:
            if link.lives():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(link.pid, 9)  # units lead groups of their own
                _remove(os.path.dirname(link.socket))
            _links.pop((self.directory, name), None)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._file(name))

    def remove(self) -> None:
        """End all servers, and remove the station."""
        if self._is_ours():
            self.end_servers()
            _remove(self.directory)

    def _named(self, unit: Wanted) -> tuple[str, Target | None]:
        """What the server of such units is called here, and what it serves."""
        # Looked up once by each thread, for all units of a task.
        words, known = tuple(unit.words[: unit.leading]), unit.environment.targets
        if (words, unit.cwd) not in known:
            from fractal_runner.worker.targets import recognise

            # Looked up as posix_spawnp(3) does it: in the PATH of this process, whatever the unit's is.
            target = recognise(words)
            known[words, unit.cwd] = (_name_of(words, unit.cwd, unit.environment), target)
        found: tuple[str, Target | None] = known[words, unit.cwd]
        return found

    def _find_or_start(self, kind: _Kind, unit: Wanted, give_up: Callable[[], bool]) -> _Link:
        """The server of this kind that there is, or a new one."""
        self._make_directory()
        link = self._read(kind.name)
        if link is not None and link.is_news_to(kind):
            return link
        with self._lock(unit.terms.timeout_s + _LOCK_MARGIN_S, give_up):
            link = self._read(kind.name)
            if link is not None and link.is_news_to(kind):
                return link  # somebody else was faster
            crashes = 0 if link is None else link.crashes + self._has_crashed(link)
            cold = None
            if crashes > _MOST_CRASHES:
                cold = _Link(cold=f"Its fork server has crashed {crashes} times.")
            elif link is not None and link.lives() and os.path.exists(link.socket):
                # Kept in mind with who it is: it is to end with the others.
                cold = replace(link, cold="Its fork server does not answer.")
            if cold is not None:
                self._write(kind.name, cold)
                return cold
            self._make_room(unit.terms.most)
            return self._start_server(kind, unit, crashes, give_up)

    def _start_server(self, kind: _Kind, unit: Wanted, crashes: int, give_up: Callable[[], bool]) -> _Link:
        """Start a server, and write down where it is, or why there is none."""
        from fractal_runner.worker.server import Server  # only the one who starts it pays for it
        from fractal_runner.worker.warm import ColdStart

        environment = {**unit.environment.variables, unit.environment.varying: unit.value}
        log = f"{unit.terms.log}-{processes.host_name()}-{os.getpid()}.log"
        os.makedirs(os.path.dirname(log), exist_ok=True)
        try:
            server = Server.start(
                kind.target,
                words=unit.words,
                directory=self.directory,
                environment=environment,
                log=log,
                cwd=unit.cwd,
                owner=self._owner,
                varying=(os.fsdecode(unit.environment.varying),),
                import_timeout_s=unit.terms.timeout_s,
                idle_s=IDLE_S,
            )
        except ColdStart as error:
            link = _Link(cold=str(error))
            self._write(kind.name, link)
            return link
        try:
            why = _wait_ready(server, give_up)
            link = _Link(server.socket, server.pid, server.ticks, crashes) if why is None else _Link(cold=why)
            self._write(kind.name, link)
        except BaseException:  # whatever it is, no server is left that nobody knows of
            server.stop(0)
            raise
        return link

    def _has_crashed(self, link: _Link) -> bool:
        """Whether the server has ended otherwise than of its own accord; what it has left is removed."""
        directory = os.path.dirname(link.socket)
        deadline = time.monotonic() + _END_S
        while link.lives() and os.path.exists(link.socket):
            if time.monotonic() > deadline:
                return False  # it does not answer
            time.sleep(0.01)  # it is just ending, and not our child
        if link.lives() or not os.path.exists(directory):
            return False
        _remove(directory)
        return True

    def _make_room(self, most: int) -> None:
        """Have a server retire that has nothing to do, if there are too many for another one.

        Raises:
            ColdStart: if all have.
        """
        from fractal_runner.worker import warm

        living = [link for _, link in self._all() if link.lives()]
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

    def _make_directory(self) -> None:
        """Make the station's directory, or see that it is ours alone.

        Raises:
            ColdStart: if it cannot be, or is another's.
        """
        from fractal_runner.worker.warm import ColdStart

        try:
            try:
                os.mkdir(self.directory, 0o700)
                _sweep(self.directory)
            except FileExistsError:
                if not self._is_ours():
                    raise ColdStart(f"{self.directory} is open to others, or theirs.") from None
        except OSError as error:
            raise ColdStart(f"{self.directory} cannot be made: {error.strerror}.") from None

    def _is_ours(self) -> bool:
        """Whether there is a directory that nobody else can have put anything into."""
        try:
            found = os.lstat(self.directory)
        except FileNotFoundError:
            return False
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        return is_own and not stat.S_IMODE(found.st_mode) & 0o077

    @contextlib.contextmanager
    def _lock(self, patience_s: float, give_up: Callable[[], bool]) -> Iterator[None]:
        """Hold the station's lock. It is the kernel's, and goes with the process that holds it.

        Raises:
            ColdStart: if it is not to be had.
            GivenUp: if the unit was told to stop meanwhile.
        """
        from fractal_runner.worker.warm import ColdStart

        try:
            fd = os.open(f"{self.directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ColdStart(f"{self.directory}/lock cannot be opened: {error.strerror}.") from None
        try:
            deadline = time.monotonic() + patience_s
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno != errno.EWOULDBLOCK or time.monotonic() > deadline:
                        raise ColdStart(f"{self.directory} stays locked: {error.strerror}.") from None
                if give_up():
                    raise GivenUp
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

    def _read(self, name: str) -> _Link | None:
        try:
            with open(self._file(name), encoding="utf-8") as file:
                return _Link(**json.load(file))
        except FileNotFoundError:
            return None

    def _write(self, name: str, link: _Link) -> None:
        unfinished = f"{self.directory}/{name}.{os.getpid()}.tmp"
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump({field: getattr(link, field) for field in link.__slots__}, file)
        os.replace(unfinished, self._file(name))

    def _all(self) -> Iterator[tuple[str, _Link]]:
        with contextlib.suppress(FileNotFoundError):
            for entry in os.listdir(self.directory):
                name, dot, rest = entry.partition(".")
                if dot and rest == "json" and (link := self._read(name)) is not None:
                    yield name, link


def station_for(coordinator: tuple[str, int], terms: WarmStart) -> Station:
    """Where a unit of this process finds its server: its job's station, the coordinator's, or its own.

    Args:
        coordinator: host and pid of the run's.
        terms: of the unit's warm start.
    """
    if _of_this_job:
        return _of_this_job[0]
    host, pid = coordinator
    if host == processes.host_name() and (processes.start_ticks(pid) or 0) == terms.ticks:
        return Station(terms.station, pid, terms.ticks)
    return Station.of(os.getpid())


def serve_this_job() -> None:
    """Have this process, and those that it forks, use servers that end with it."""
    _of_this_job[:] = [Station.of(os.getpid())]


def leave_this_job() -> None:
    """End the servers of this process's calls, which have ended."""
    for station in _of_this_job:
        station.remove()


def _wait_ready(server: Server, give_up: Callable[[], bool]) -> str | None:
    """Why it will not be ready; None once it is.

    Raises:
        GivenUp: if nobody waits for it any more.
    """
    while True:
        with contextlib.suppress(TimeoutError):
            return server.wait_ready(_TURN_S)
        if give_up():
            raise GivenUp


def _sweep(directory: str) -> None:
    """Remove what stations of processes that were killed have left beside this one."""
    parent = os.path.dirname(directory)
    with contextlib.suppress(OSError):  # others may do so at the same time
        for entry in os.listdir(parent):
            found = _NAME.fullmatch(entry)
            if found is None or int(found[1]) != os.getuid():
                continue
            path = f"{parent}/{entry}"
            if processes.start_ticks(int(found[2])) != int(found[3]) and os.lstat(path).st_uid == os.getuid():
                _remove(path)


def _name_of(words: Sequence[str], cwd: str, environment: Environment) -> str:
    import hashlib

    parts = [*map(os.fsencode, words), b"", os.fsencode(cwd), b""]
    parts += [b"%s=%s" % pair for pair in sorted(environment.variables.items())]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def _remove(directory: str) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)
