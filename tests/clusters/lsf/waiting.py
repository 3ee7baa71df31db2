"""What tests of jobs wait with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil


def wait_until(condition: Callable[[], bool], timeout: float = 30) -> None:
    """Until something holds. Fails if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)  # nothing tells


def until_there_is(path: Path) -> str:
    """What a job runs that goes on until there is a file."""
    return f"until [ -e {path} ]; do sleep 0.05; done"


def is_alive(process: psutil.Process) -> bool:
    """Whether a process is there, and not only its remains."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
