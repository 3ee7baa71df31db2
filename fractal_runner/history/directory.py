"""A run's directory: which run it holds, and who is at work in it.

The lock keeps a second coordinator on this host out for as long as the first one lives, and not a moment
longer: the kernel lets go of it with the process. Between hosts, where locks may not reach, the owner's
epoch in the history decides (`writing`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fractal_runner.errors import HistoryError, RunBusyError
from fractal_runner.history.store import FILE_NAME
from fractal_runner.worker.processes import Identity, identify, is_same_process

RUN_FILE = "run.json"
LOCK_FILE = "run.lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_logger = logging.getLogger("fractal_runner")


@dataclass(frozen=True, slots=True)
class RunFile:
    """What a directory says of its run.

    Attributes:
        run_id: the run.
        history: the URL of its history, without a password; None for the file in the directory.
    """

    run_id: str
    history: str | None

    def history_in(self, directory: Path) -> str:
        """The history's URL, or the path of its file."""
        return self.history or str(directory / FILE_NAME)

    def text(self) -> str:
        """What the file contains."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_run_file(directory: Path) -> RunFile | None:
    """What the directory says of its run; None if it holds none.

    Raises:
        HistoryError: if what it says cannot be understood.
    """
    path = directory / RUN_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        run_id, history = data["run_id"], data["history"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HistoryError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HistoryError(f"{path} is damaged: it does not say which run this is ({error}).") from error
    if not isinstance(run_id, str) or not (history is None or isinstance(history, str)):
        raise HistoryError(f"{path} is damaged: it does not say which run this is.")
    return RunFile(run_id, history)


class DirectoryLock:
    """This process's claim to a run's directory, until `release` or the process's end.

    Args:
        directory: it is there.

    Raises:
        RunBusyError: if another coordinator has it, naming it.
        OSError: if the lock's file cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_FILE
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _held.add(self._fd)
        try:
            self._lock()
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, (json.dumps(asdict(identify(os.getpid()))) + "\n").encode(), 0)
        except BaseException:  # a Ctrl-C, too, must leave no lock behind
            self.release()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._busy(_holder(self._fd)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _logger.warning("%s: this file system has no locks (%s)", self._path, error.strerror)
            holder = _holder(self._fd)
            if holder is not None and is_same_process(holder):
                raise self._busy(holder) from None

    def _busy(self, holder: Identity | None) -> RunBusyError:
        who = "another process" if holder is None else f"process {holder.pid} on {holder.host}"
        return RunBusyError(
            f"{self._path.parent} is in use: {who} is at work on its run. Wait for its end, or cancel it "
            f"(fractal-runner cancel {self._path.parent}).",
            host="" if holder is None else holder.host,
            pid=0 if holder is None else holder.pid,
        )

    def release(self) -> None:
        """Let others have the directory. Twice is fine."""
        if self._fd in _held:
            _held.discard(self._fd)
            os.close(self._fd)
            self._fd = -1


def _holder(fd: int) -> Identity | None:
    try:
        said = json.loads(os.pread(fd, 4096, 0))
        return Identity(**said)
    except (OSError, ValueError, TypeError):
        return None  # it has just been made, and says nothing yet


_held: set[int] = set()  # descriptors of locks; a forked child that kept them would keep the locks, too


def _let_go_in_child() -> None:
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
