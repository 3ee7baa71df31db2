"""Ends what is left of a local Ray instance whose process was killed: a small program, one per instance.

Ray's daemons end with the process that has started them, but not those that these have started in turn; and
nobody removes their directory. This program waits for that process's end, outside of its process group.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from fractal_runner.worker import processes

_END_S = 5.0
_LOOK_S = 1.0  # where the system does not tell when a process ends
_PROGRAM = (
    "import sys; sys.path[0] = sys.argv[1]; "
    "from fractal_runner.executors.adapters.rayengine.guardian import main; main(sys.argv[2])"
)


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the guardian of this process's instance in `folder`; whoever closes that ends the guardian."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(Path(__file__).parents[4]), str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def clean(folder: Path) -> list[int]:
    """End the processes of the instance in `folder`, and remove it; what could not be ended."""
    left = processes.end_found(lambda: members(folder), 0, _END_S)
    shutil.rmtree(folder, ignore_errors=True)
    return left


def members(folder: Path) -> list[int]:
    """Ray's processes of the instance in `folder`, but for what its workers have started.

    Ray's daemons are started with that path. Its workers and agents write titles over their commands and
    environments, and have their logs open there; so may others (a fork of ours, somebody who reads them).
    """
    own, found = os.getpid(), []
    for pid, entry in processes.table().items():
        if entry.is_running and pid != own:
            with suppress(OSError):  # it has ended meanwhile, or is somebody else's
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if command.startswith(b"ray::"):
                    fds = Path(f"/proc/{pid}/fd").iterdir()
                    is_member = any(_leads_into(fd, folder) for fd in fds)
                else:
                    is_member = os.fsencode(folder) in command and b"/ray/" in command
                if is_member:
                    found.append(pid)
    return found


def _leads_into(fd: Path, folder: Path) -> bool:
    with suppress(OSError):  # it is closed again
        return fd.readlink().is_relative_to(folder)
    return False


def main(folder: str) -> None:
    """Wait for the end of the process that has started this one; then clean up after it."""
    parent = os.getppid()
    with suppress(AttributeError, OSError):  # no pidfd here, or it has ended already
        select.select([os.pidfd_open(parent)], [], [])
    while os.getppid() == parent:
        time.sleep(_LOOK_S)  # without a pidfd, nobody tells
    clean(Path(folder))
