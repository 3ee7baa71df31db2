"""What runs below a process and what it holds, read from /proc: of any run, by whoever looks from outside.

A fork server is known by its command line, which also says who its owner is. Its units have the same one, as
they are forks of it, so that a server is a process of that command line whose parent has another one.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import fractal_runner

COORDINATOR, WORKER, SERVER, UNIT = "coordinator", "workers", "servers", "units"
ROLES = (COORDINATOR, WORKER, SERVER, UNIT)

_PROC = Path("/proc")
_SERVER_WORD = os.fsencode(Path(fractal_runner.__file__).resolve().parent / "worker" / "forkboot.py")
_UNIT_WORD = b"--args-json"  # in the command of every unit that is started cold
_DIRECTORY_WORD = b"--directory="


@dataclass(frozen=True, slots=True)
class Process:
    """A process below another one.

    Attributes:
        pid: its process id.
        role: what it is to the run: one of `ROLES`.
    """

    pid: int
    role: str


def tree(root: int) -> Iterator[Process]:
    """`root`, which is a run's coordinator, its descendants, and its fork servers with theirs.

    A server need not be a descendant: it may be nobody's child, and its command line says whose it is.
    """
    ahead = [(root, COORDINATOR), *((pid, SERVER) for pid in servers(root))]
    seen = set()
    while ahead:
        pid, role = ahead.pop()  # servers first, so that they are not taken for something else below
        if pid not in seen:
            seen.add(pid)
            yield Process(pid, role)
            ahead += [(child, _role(child, role)) for child in children(pid)]


def children(pid: int) -> list[int]:
    """The child processes of all its threads; none if it has ended."""
    found: list[int] = []
    try:
        for task in os.listdir(_PROC / str(pid) / "task"):  # noqa: PTH208 - often, and only the names
            found += map(int, _read(_PROC / str(pid) / "task" / task / "children").split())
    except OSError:
        return found
    return found


def servers(root: int) -> list[int]:
    """The fork servers of a coordinator."""
    wanted = {b"--owner=%d" % root, _SERVER_WORD}
    return [
        int(name)
        for name in os.listdir(_PROC)  # noqa: PTH208 - often, and only the names
        if name.isdigit()
        and wanted <= set(_words(int(name)))
        and (parent := _parent(int(name))) is not None
        and not wanted <= set(_words(parent))
    ]


def server_directory(pid: int) -> Path | None:
    """Where a fork server has its socket, as its command line says; None if it has ended."""
    for word in _words(pid):
        if word.startswith(_DIRECTORY_WORD):
            return Path(os.fsdecode(word.removeprefix(_DIRECTORY_WORD)))
    return None


def pss(pid: int) -> int:
    """Its memory in bytes, of what it shares its share; 0 if it has ended.

    smaps_rollup of proc(5). The sum over processes counts each page once, but for a page that processes
    outside share as well, of which it counts a part.
    """
    return _kilobytes(_PROC / str(pid) / "smaps_rollup", b"Pss:")


def rss(pid: int) -> int:
    """Its memory in bytes, what it shares included; 0 if it has ended."""
    return _kilobytes(_PROC / str(pid) / "status", b"VmRSS:")


def descriptors(pid: int) -> int:
    """How many file descriptors it has open; 0 if it has ended."""
    try:
        return len(os.listdir(_PROC / str(pid) / "fd"))  # noqa: PTH208 - only how many
    except OSError:
        return 0


def marked(mark: str) -> dict[int, str]:
    """The processes that were started with the entry `mark` (NAME=value) in their environment.

    Also those whose parents have ended, which no tree shows.

    Returns:
        Their command lines, by pid; this process is not among them.
    """
    found = {}
    for name in os.listdir(_PROC):  # noqa: PTH208 - only the names
        if not name.isdigit() or int(name) == os.getpid():
            continue
        if mark.encode() in _read(_PROC / name / "environ").split(b"\0"):
            found[int(name)] = b" ".join(_words(int(name))).decode(errors="replace")
    return found


@dataclass
class Watch:
    """A thread that looks at a run from outside, again and again, while the context lasts.

    Args:
        root: the process id of the run's coordinator.
        every_s: seconds between two looks.
        memory: whether to read memory as well. It takes the kernel some milliseconds per process, during
            which that process cannot change its memory: not for a run whose time is taken.

    Attributes:
        servers: the fork servers seen, each with its directory.
        peak: the most memory of all processes together at one look, in bytes.
        at_peak: how that was distributed over the roles.
        most_of: the most of each role, whenever that was.
        looks: how many looks there were.
    """

    root: int
    every_s: float
    memory: bool = False
    servers: dict[int, Path | None] = field(default_factory=dict)
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    most_of: Counter[str] = field(default_factory=Counter)
    looks: int = 0

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._over.wait(self.every_s):
            self._look()

    def _look(self) -> None:
        self.looks += 1
        held: Counter[str] = Counter()
        for process in tree(self.root):
            if process.role == SERVER and self.servers.get(process.pid) is None:
                self.servers[process.pid] = server_directory(process.pid)
            if self.memory:
                held[process.role] += pss(process.pid)
        self.most_of |= held
        if held.total() > self.peak:
            self.peak, self.at_peak = held.total(), dict(held)


def _role(pid: int, parents: str) -> str:
    if parents in (SERVER, UNIT):
        return UNIT
    return UNIT if _UNIT_WORD in _words(pid) else WORKER


def _parent(pid: int) -> int | None:
    """Its parent's process id, field 4 of proc(5)'s stat; None if it has ended."""
    fields = _read(_PROC / str(pid) / "stat").rpartition(b") ")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def _words(pid: int) -> list[bytes]:
    return _read(_PROC / str(pid) / "cmdline").split(b"\0")


def _kilobytes(path: Path, name: bytes) -> int:
    for line in _read(path).splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has ended, or is another user's
