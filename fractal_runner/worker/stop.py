"""How a run tells its units to stop, over any executor.

A file `shutdown` in the run's directory reaches workers wherever they are. Units that run in the
coordinator's own process are told through memory as well, at once and without needing disk space.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

SHUTDOWN_FILE = "shutdown"
POLL_S = 0.25
_REMEMBERED = 1000

_stopped_here: set[str] = set()
_looked_at: dict[str, float] = {}  # when a file was last looked for and not found, by its path


class StopRequest:
    """Whether a run has been told to stop, as seen from one of its units."""

    __slots__ = ("_file", "_run_id")

    def __init__(self, run_id: str, run_dir: str) -> None:
        self._run_id = run_id
        self._file = f"{run_dir}/{SHUTDOWN_FILE}"

    def asked(self) -> bool:
        """Whether it has been; the file is looked for at most once in POLL_S by all units of a process."""
        if self._run_id in _stopped_here:
            return True
        now = time.monotonic()
        if now - _looked_at.get(self._file, 0.0) < POLL_S:
            return False
        if os.path.exists(self._file):
            return True
        if len(_looked_at) > _REMEMBERED:
            _looked_at.clear()
        _looked_at[self._file] = now
        return False


def ask_to_stop(run_id: str, run_dir: str) -> None:
    """Tell every unit of the run to stop.

    Raises:
        OSError: if the file cannot be written; units in this process have been told all the same.
    """
    _stopped_here.add(run_id)
    os.close(os.open(f"{run_dir}/{SHUTDOWN_FILE}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))


@contextmanager
def stoppable(run_id: str) -> Iterator[None]:
    """Around a run, in its coordinator: forgets afterwards that it was told to stop."""
    try:
        yield
    finally:
        _stopped_here.discard(run_id)
