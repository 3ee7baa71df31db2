"""How a run tells its units to stop, over any executor.

A file `shutdown` in the run's directory reaches workers wherever they are. Units that run in the
coordinator's own process are told through memory as well, at once and without needing disk space.

A coordinator that resumes the run of one that died raises a *fence*: a file beside the workers' records,
named after its epoch, that keeps the units of all earlier epochs from starting or going on. The units that
it takes on instead are spared: the file lists their keys.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from fractal_runner.worker.evidence import EVIDENCE_DIR
from fractal_runner.worker.processes import host_name

SHUTDOWN_FILE = "shutdown"
POLL_S = 0.25
_REMEMBERED = 1000

_stopped_here: set[str] = set()
# When the files of a run and an epoch were last looked for and not found, by the path of the fence.
_looked_at: dict[str, float] = {}


class StopRequest:
    """Whether one of a run's units has been told to stop, as seen from the unit.

    Args:
        run_id: the run.
        run_dir: its directory.
        epoch: which of the run's coordinators the unit belongs to.
        key: the unit's; "" for what no fence spares.
    """

    __slots__ = ("_epoch", "_fence", "_key", "_run_dir", "_run_id")

    def __init__(self, run_id: str, run_dir: str, *, epoch: int = 1, key: str = "") -> None:
        self._run_id = run_id
        self._run_dir = run_dir
        self._epoch = epoch
        self._key = key
        self._fence = f"{run_dir}/{EVIDENCE_DIR}/fence-{epoch + 1}"

    def asked(self) -> bool:
        """Whether it has been; files are looked for at most once in POLL_S by all units of a process."""
        if self._run_id in _stopped_here:
            return True
        now = time.monotonic()
        if now - _looked_at.get(self._fence, 0.0) < POLL_S:
            return False
        if os.path.exists(f"{self._run_dir}/{SHUTDOWN_FILE}"):
            return True
        if os.access(self._fence, os.F_OK):
            # Not remembered: what it says to this unit is not what it says to another.
            return self.fenced()
        if len(_looked_at) > _REMEMBERED:
            _looked_at.clear()
        _looked_at[self._fence] = now
        return False

    def fenced(self) -> bool:
        """Whether another coordinator has taken over the run and not spared this unit, as of now."""
        if not os.access(self._fence, os.F_OK):  # a third of what os.path.exists takes
            return False
        epoch = self._epoch + 1
        while (spared := _spared_by(_fence_file(self._run_dir, epoch))) is not None:
            if self._key not in spared:
                return True
            epoch += 1
        return False

    def reason(self) -> str:
        """Why it is to stop, in a sentence."""
        return "Another coordinator has taken over the run." if self.fenced() else "The run was stopped."


def ask_to_stop(run_id: str, run_dir: str) -> None:
    """Tell every unit of the run to stop.

    Raises:
        OSError: if the file cannot be written; units in this process have been told all the same.
    """
    _stopped_here.add(run_id)
    os.close(os.open(f"{run_dir}/{SHUTDOWN_FILE}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))


def raise_fence(run_dir: str, epoch: int, spare: Collection[str]) -> None:
    """Keep the units of earlier coordinators from starting or going on.

    What started before is then in the records of the workers, for whoever reads them after this.

    Args:
        run_dir: the run's directory.
        epoch: that of the coordinator which takes over: units of smaller ones are fenced off.
        spare: keys of the units that may go on all the same.

    Raises:
        OSError: if it cannot be written.
    """
    os.makedirs(f"{run_dir}/{EVIDENCE_DIR}", exist_ok=True)
    # A unit looks for the fence of the epoch after its own. A coordinator that died early left none.
    for missing in range(2, epoch):
        if not os.path.exists(_fence_file(run_dir, missing)):
            _write_fence(_fence_file(run_dir, missing), spare)
    _write_fence(_fence_file(run_dir, epoch), spare)


@contextmanager
def stoppable(run_id: str) -> Iterator[None]:
    """Around a run, in its coordinator: forgets afterwards that it was told to stop."""
    try:
        yield
    finally:
        _stopped_here.discard(run_id)


def _fence_file(run_dir: str, epoch: int) -> str:
    return f"{run_dir}/{EVIDENCE_DIR}/fence-{epoch}"


def _write_fence(path: str, spare: Collection[str]) -> None:
    """Whole or not at all, whatever happens meanwhile, and there after a power cut."""
    unfinished = f"{path}.{host_name()}-{os.getpid()}.tmp"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(sorted(spare), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:  # whatever it is, no half file stays
        with suppress(OSError):
            os.unlink(unfinished)
        raise
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _spared_by(path: str) -> frozenset[str] | None:
    """The keys that a fence spares, none if it cannot be read; None if there is no such fence."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    try:
        return _read_fence(path, status.st_ino, status.st_mtime_ns)
    except (OSError, ValueError, TypeError):
        return frozenset()


@functools.lru_cache(maxsize=16)
def _read_fence(path: str, _inode: int, _changed: int) -> frozenset[str]:
    """The keys in this version of the file, kept: a worker may have thousands of spared units to run."""
    with open(path, encoding="utf-8") as file:
        keys = json.load(file)
    if not isinstance(keys, list):
        raise TypeError(f"{path} holds no list")
    return frozenset(keys)
