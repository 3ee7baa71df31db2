"""Processes as the operating system knows them: who they are, what they use, how they are ended.

Apart from `command`, which knows about units: here are only pids, groups and /proc. On systems without
/proc (macOS) what cannot be known is None or empty, and groups are still signalled as groups.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

NODE_VARIABLE = "FRACTAL_RUNNER_NODE"  # set by jobs
MARK_VARIABLE = "FRACTAL_RUNNER_UNIT"  # in the environment of what a unit's command has started: its key

_PROC = "/proc"
_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.1
_KILL_WAIT_S = 2.0
_COUNTING_ERROR = 4 << 20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_BOOT_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process this is, so that no other is ever taken for it: pids alone come round again.

    Attributes:
        host: the node's name.
        boot_id: the kernel's id of this boot; "" where there is none.
        pid: the process id.
        start_ticks: when it started, in clock ticks since boot; None where it cannot be known.
    """

    host: str
    boot_id: str
    pid: int
    start_ticks: int | None


def identify(pid: int) -> Identity:
    """The identity of the live process `pid` of this host."""
    return Identity(host_name(), boot_id(), pid, start_ticks(pid))


def is_same_process(who: Identity) -> bool:
    """Whether the process of this identity still runs on this host."""
    if who.host != host_name() or (who.boot_id and boot_id() and who.boot_id != boot_id()):
        return False
    return is_running(who.pid) and (who.start_ticks is None or start_ticks(who.pid) == who.start_ticks)


@functools.cache
def host_name() -> str:
    return os.uname().nodename


@functools.cache
def node_name() -> str:
    """This host as a batch system calls it, where a job has said so; a node may have several names.

    Looked up once: a job says so before its first unit.
    """
    return os.environ.get(NODE_VARIABLE) or host_name()


@functools.cache
def boot_id() -> str:
    return _read(f"{_PROC}/sys/kernel/random/boot_id").decode().strip()


def start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)), None if there is no such process or no /proc."""
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else None


def ticks_since_boot() -> int:
    """Now, in the clock ticks that `start_ticks` counts in; 0 where there is no such clock."""
    return 0 if _BOOT_CLOCK is None else int(time.clock_gettime(_BOOT_CLOCK) * _TICKS_PER_S)


def signal_name(number: int) -> str:
    """ "SIGKILL" for 9; "SIG40" for a real-time signal without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def own_peak_rss() -> int:
    """An upper bound of this process's peak memory, in bytes."""
    return _maxrss_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak_rss_of(ru_maxrss: int, parent_peak: int) -> int:
    """The peak memory that wait4 reports of a child, in bytes, or 0 where it tells nothing.

    A child starts as its parent's image, and the kernel keeps the larger figure across exec: only what
    clearly exceeds the parent's own peak was reached by the child itself. The kernel counts pages per CPU
    and adds them up when it pleases, so two figures of one process may differ a little.
    """
    peak = _maxrss_bytes(ru_maxrss)
    return peak if peak > parent_peak * 1.02 + _COUNTING_ERROR else 0


def sample_memory(pid: int) -> int:
    """Memory of `pid` and its descendants now, in bytes: the larger of their sum and the root's peak.

    Zero if it has ended or there is no /proc. Pages that the processes share count once for each.
    """
    total = peak = 0
    for member in (pid, *descendants(pid)):
        resident, high = _memory_of(member)
        total += resident
        if member == pid:
            peak = high
    return max(total, peak)


def descendants(pid: int) -> list[int]:
    """The children of `pid`, their children, and so on, as far as parents still live."""
    found: list[int] = []
    ahead = [pid]
    while ahead:
        parent = ahead.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"{_PROC}/{parent}/task"):
                children = _read(f"{_PROC}/{parent}/task/{thread}/children")
                for child in map(int, children.split()):
                    found.append(child)
                    ahead.append(child)
    return found


def group_members(group: int) -> list[int]:
    """Live processes of the process group `group`; zombies have ended and do not count."""
    if not has_table():
        return [group] if _signal_group(group, 0) else []
    return [pid for pid, one in table().items() if one.group == group and one.is_running]


def mark_of(key: str) -> bytes:
    """What the processes of the unit, or call, of this key bear in their environment."""
    return f"{MARK_VARIABLE}={key}".encode()


def bearers(mark: bytes) -> list[int]:
    """Processes of this host that were started with `mark` ("NAME=value") in their environment.

    It finds what left its process group and its parent, as daemons do.
    """
    own = os.getpid()
    return [pid for pid in _all_pids() if pid != own and entry_of(pid, mark) == mark]


def bearers_by_key(keys: Collection[str]) -> dict[str, list[int]]:
    """The processes of this host that bear the mark of each of these keys, in one look at all of them."""
    own = os.getpid()
    found: dict[str, list[int]] = {}
    beginning = mark_of("")
    for pid in _all_pids():
        if pid != own and (entry := entry_of(pid, beginning)) is not None:
            key = entry.removeprefix(beginning).decode(errors="replace")
            if key in keys:
                found.setdefault(key, []).append(pid)
    return found


def entry_of(pid: int, beginning: bytes) -> bytes | None:
    """The entry of the environment that `pid` was started with which begins so ("NAME=", "NAME=val")."""
    environment = b"\0" + _read(f"{_PROC}/{pid}/environ")
    start = environment.find(b"\0" + beginning) + 1
    if start == 0:
        return None
    end = environment.find(b"\0", start)
    return environment[start:] if end < 0 else environment[start:end]


class Entry(NamedTuple):
    """What the system's table of processes says of one.

    Attributes:
        group: its process group.
        start_ticks: when it started, in clock ticks since boot.
        is_running: whether it has not ended; a zombie has.
    """

    group: int
    start_ticks: int
    is_running: bool


def has_table() -> bool:
    """Whether this system shows its processes (Linux: /proc)."""
    return os.path.isdir(f"{_PROC}/self")


def table() -> dict[int, Entry]:
    """All processes of this host, by pid."""
    return {
        pid: Entry(int(fields[2]), int(fields[19]), fields[0] not in (b"Z", b"X"))
        for pid in _all_pids()
        if (fields := _stat_fields(pid))
    }


def group_is_empty(group: int) -> bool:
    """Whether nothing of the process group is left (its leader must have been reaped)."""
    return not _signal_group(group, 0) or not group_members(group)


def note_command(pid: int | None) -> None:
    """Tell that this thread now waits for the command `pid`; for none any more, if None."""
    if pid is None:
        _commands.pop(threading.get_ident(), None)
    else:
        _commands[threading.get_ident()] = pid


def commands_of_threads() -> dict[int, int]:
    """The commands that threads of this process wait for: thread ident -> pid."""
    return dict(_commands)


_commands: dict[int, int] = {}


class Leader(Protocol):
    """A process that leads a group, and can be waited for."""

    pid: int

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, waiting for up to `seconds`."""


def end_group(leader: Leader, mark: bytes, grace_s: float) -> None:
    """End a process group and what has left it: TERM, a grace time, KILL.

    Args:
        leader: who leads the group; a child of ours is reaped, so that the group can be seen to be empty.
        mark: the entry of the environment that its processes bear, wherever they went.
        grace_s: seconds between TERM and KILL; 0 kills at once.
    """
    group = leader.pid
    if grace_s > 0:
        members = group_members(group)  # they get it as a group, and once: a handler may run for each
        strays = [pid for pid in bearers(mark) if pid not in members]
        _signal_group(group, signal.SIGTERM)
        _signal_each(strays, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            if leader.wait(0) and group_is_empty(group) and not any(map(is_running, strays)):
                break
            time.sleep(_PAUSE_S)
    # Children that were forked meanwhile are looked for until a round finds none.
    for _ in range(100):
        strays = bearers(mark)
        empty = leader.wait(0) and group_is_empty(group)
        if empty and not strays:
            return
        if not empty:
            _signal_group(group, signal.SIGKILL)
        _signal_each(strays, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def end_descendants(pid: int, grace_s: float) -> None:
    """End what `pid` has started, not itself: TERM, a grace time, KILL."""
    children = descendants(pid)
    _signal_each(children, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    _signal_each({*children, *descendants(pid)}, signal.SIGKILL)


def end_tree(pid: int, grace_s: float) -> None:
    """End `pid`, its process group if it leads one, and what they started: TERM, a grace time, KILL.

    The process itself is not reaped; that is its parent's to do. The calling process is never signalled.
    """
    known: dict[int, int | None] = {}

    def alive() -> list[int]:
        """Those that run, and what they have started since."""
        for member in [
            pid,
            *group_members(pid),
            *(found for old in list(known) for found in descendants(old)),
        ]:
            known.setdefault(member, start_ticks(member))
        return [
            one
            for one, ticks in known.items()
            if one != os.getpid() and is_running(one) and start_ticks(one) == ticks
        ]

    known[pid] = start_ticks(pid)
    end_found(alive, grace_s)


def end_found(
    find: Callable[[], Iterable[int]], grace_s: float, kill_wait_s: float = _KILL_WAIT_S
) -> list[int]:
    """End the processes that `find` finds, until it finds none: TERM, a grace time, KILL.

    Args:
        find: called again and again, for what was started meanwhile; what has ended it must not name.
        grace_s: seconds between TERM and KILL; 0 kills at once.
        kill_wait_s: how long to go on with KILL.

    Returns:
        What is left all the same.
    """
    pause = _PAUSE_S
    if grace_s > 0:
        _signal_each(find(), signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while find() and time.monotonic() < deadline:
            time.sleep(pause)  # not our children: nobody tells us when they end
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)
    until = None
    while left := list(find()):
        _signal_each(left, signal.SIGKILL)
        # From the first KILL on: to look through all processes may itself take long on a busy machine.
        until = time.monotonic() + kill_wait_s if until is None else until
        if time.monotonic() > until:
            return left
        time.sleep(_PAUSE_S)
    return []


class Child:
    """A child process of ours, waited for in short turns: a blocking wait could not look up to stop it.

    A pidfd where the kernel has them (Linux 5.3), else short sleeps; never a pipe, whose end comes late
    when a sibling holds the other one.

    Attributes:
        pid: its process id, and its group's where it leads one.
        returncode: as subprocess reports it, once it has ended.
        usage: what wait4 reports of it and the children it waited for, once it has ended.
    """

    __slots__ = ("_fd", "_poll", "pid", "returncode", "usage")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.usage: resource.struct_rusage | None = None
        self._fd = -1
        if hasattr(os, "pidfd_open"):
            try:
                self._fd = os.pidfd_open(pid)
            except OSError:
                return  # a kernel without them
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, waiting for up to `seconds`; then it has been reaped."""
        if self.returncode is not None:
            return True
        if self._fd >= 0:
            return bool(self._poll.poll(max(0.0, seconds) * 1000)) and self._reap()
        deadline = time.monotonic() + seconds
        pause = 0.001
        while not self._reap():
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _reap(self) -> bool:
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.returncode = os.waitstatus_to_exitcode(status)
        self.usage = usage
        return True


def _maxrss_bytes(ru_maxrss: int) -> int:
    return ru_maxrss if sys.platform == "darwin" else ru_maxrss * 1024  # getrusage(2)


def _memory_of(pid: int) -> tuple[int, int]:
    resident = high = 0
    for line in _read(f"{_PROC}/{pid}/status").splitlines():
        if line.startswith(b"VmHWM:"):
            high = int(line.split()[1]) * 1024
        elif line.startswith(b"VmRSS:"):
            resident = int(line.split()[1]) * 1024
            break  # it stands below VmHWM
    return resident, high


def is_running(pid: int) -> bool:
    """Whether there is such a process; a zombie has ended."""
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def _stat_fields(pid: int) -> list[bytes]:
    """/proc/PID/stat from field 3 (state) on: the name before it may contain anything."""
    try:
        fd = os.open(f"{_PROC}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        text = os.read(fd, 4096)
    except OSError:
        return []
    finally:
        os.close(fd)
    return text[text.rfind(b")") + 2 :].split()


def _all_pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir(_PROC) if name.isdigit()]
    except OSError:
        return []


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _signal_each(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _read(path: str) -> bytes:
    """The file's content, empty if it is gone: a process may end while it is looked at."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(fd)
