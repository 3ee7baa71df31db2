"""Jobs' processes: starting them, finding all that came from them, what they take, and signalling them.

A job has a session of its own. What leaves it is found as a descendant of what is in it, or, with its parent
gone, by the environment that it was started in.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_PAGE = os.sysconf("SC_PAGE_SIZE")
MARK = "EMULATED_LSF_RUN"  # an environment variable that no two runs of jobs share


@dataclass(frozen=True, slots=True)
class Ended:
    """A child that has ended.

    Attributes:
        code: its exit code, or the signal's number.
        signalled: which of the two.
        program: what it was running, as the kernel knows it: 15 characters.
    """

    pid: int
    code: int
    signalled: bool
    cpu_s: float
    program: str


def adopt() -> None:
    """Become the parent of all processes below this one that lose theirs."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def start(
    file: str, cwd: str, env: Mapping[str, str], output: IO[bytes], errors: IO[bytes]
) -> tuple[int, str]:
    """Start a script in its own session: its process, and where it runs."""
    if not os.access(cwd, os.X_OK):
        cwd = "/tmp"  # and nobody is told
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'export LS_JOBPID=$$; exec "$0"', file],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        start_new_session=True,
    )
    process.returncode = 0  # it is `reap` that waits for it
    return process.pid, cwd


def reap() -> list[Ended]:
    """All children that have ended."""
    found: list[Ended] = []
    while True:
        try:
            # A zombie still tells what it was.
            waiting = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return found
        if waiting is None:
            return found
        program = _read(waiting.si_pid, "comm").decode(errors="replace").strip()
        pid, status, usage = os.wait4(waiting.si_pid, 0)
        signalled = os.WIFSIGNALED(status)
        code = os.WTERMSIG(status) if signalled else os.WEXITSTATUS(status)
        found.append(Ended(pid, code, signalled, usage.ru_utime + usage.ru_stime, program))


def find(sessions: Mapping[int, str]) -> dict[int, list[int]]:
    """The processes of jobs, by the jobs' sessions; for each session, its run's mark."""
    parents, in_session = _below()
    owner = {pid: session for pid, session in in_session.items() if session in sessions}
    marks = {mark.encode(): session for session, mark in sessions.items()}
    own = os.getpid()
    for pid, parent in parents.items():
        if parent == own and pid not in owner:
            environment = dict(
                variable.partition(b"=")[::2] for variable in _read(pid, "environ").split(b"\0")
            )
            session = marks.get(environment.get(MARK.encode(), b""))
            if session is not None:
                owner[pid] = session
    found: dict[int, list[int]] = {session: [] for session in sessions}
    for pid in parents:
        above, seen = pid, []
        while above in parents and above not in owner:
            seen.append(above)
            above = parents[above]
        if above in owner:
            owner.update(dict.fromkeys(seen, owner[above]))
            found[owner[above]].append(pid)
    return found


def find_all() -> list[int]:
    """All processes that came from this one."""
    return list(_below()[0])


def _below() -> tuple[dict[int, int], dict[int, int]]:
    """The parents and the sessions of all that came from this process: ids of others are used again."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if not entry.isdecimal():
            continue
        fields = _read(int(entry), "stat").rpartition(b")")[2].split()
        if fields and fields[0] not in (b"Z", b"X"):
            parents[int(entry)], sessions[int(entry)] = int(fields[1]), int(fields[3])
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    below: list[int] = []
    todo = [os.getpid()]
    while todo:
        found = children.get(todo.pop(), [])
        below += found
        todo += found
    return {pid: parents[pid] for pid in below}, {pid: sessions[pid] for pid in below}


def memory(pids: list[int]) -> int:
    """What they have in memory, in bytes."""
    sizes = (_read(pid, "statm").split() for pid in pids)
    return sum(int(size[1]) * _PAGE for size in sizes if size)


def send(pids: list[int], number: int) -> None:
    """Signal them all; those that are stopped as well, but for the signals that leave them so."""
    for pid in pids:
        try:
            os.kill(pid, number)
            if number not in (signal.SIGSTOP, signal.SIGCONT, signal.SIGUSR2):
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue


def _read(pid: int, name: str) -> bytes:
    """A file of /proc; empty if the process has gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
