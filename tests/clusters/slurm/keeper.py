"""The process that keeps a cluster's daemons: nothing that it started outlives it, and it not its parent.

Daemons detach, and so do jobs and what they start; a process group or a session says nothing about where they
belong. So the keeper adopts whatever loses its parent below it (`PR_SET_CHILD_SUBREAPER`): all of it is
in its tree, whoever forked how often. Each daemon has an adopter of its own in between, so that one node can
be taken down with all that runs on it. When the keeper's standard input closes, which it does as well when
its parent is killed, everything goes: the processes, their control groups, and the cluster's directory.

`Keeper` is the parent's end. This file is also what the keeper runs, by its path.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_DEADLINE_S = 30


class Keeper:
    """A keeper that was started, as its parent has it.

    Args:
        directory: the cluster's: goes when the keeper does.
        control_groups: where it may have control groups; they go as well.
    """

    def __init__(self, directory: Path, control_groups: Sequence[Path]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(directory), *map(str, control_groups)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for the tests
            text=True,
            cwd="/",
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Daemon:
        """Start a daemon, which stays in the foreground; what it says goes to `log`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"command": list(command), "log": str(log), "environment": dict(environment)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the keeper of the cluster's daemons (process {self.pid}) has ended")
        pids = json.loads(answer)
        return Daemon(psutil.Process(pids["adopter"]), pids["daemon"])

    def end(self) -> None:
        """End all that it keeps."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        if returncode := self._process.wait(2 * _DEADLINE_S):
            raise RuntimeError(f"the keeper of the cluster's daemons failed with exit code {returncode}")


class Daemon:
    """A daemon below its adopter.

    Attributes:
        adopter: its parent, and that of whatever detaches from it. Ends when nothing is left below it.
        pid: its own.
    """

    def __init__(self, adopter: psutil.Process, pid: int) -> None:
        self.adopter = adopter
        self.pid = pid

    def is_running(self) -> bool:
        return any(child.pid == self.pid for child in _children(self.adopter))

    def processes(self) -> list[psutil.Process]:
        """Itself and all that came from it."""
        return _children(self.adopter)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the daemon alone."""
        if self.is_running():
            os.kill(self.pid, number)

    def wait(self) -> None:
        """Until the daemon is gone, and all that came from it."""
        try:
            self.adopter.wait(_DEADLINE_S)
        except psutil.TimeoutExpired:
            left = ", ".join(str(process) for process in self.processes())
            raise TimeoutError(f"still there after {_DEADLINE_S} s: {left}") from None

    def crash(self, control_groups: Sequence[Path] = ()) -> None:
        """End it and all that came from it, at once."""
        end_below(self.adopter, control_groups)
        self.wait()


def end_below(top: psutil.Process, control_groups: Sequence[Path]) -> None:
    """Kill all processes below this one.

    Args:
        top: stays itself.
        control_groups: where they may be frozen: Slurm freezes what it is about to kill, and a frozen process
            does not die.
    """
    deadline = time.monotonic() + _DEADLINE_S
    while left := _children(top):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not to be killed: {', '.join(map(str, left))}")
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for group in control_groups:
            for state in group.rglob("freezer.state"):
                state.write_text("THAWED")
        time.sleep(0.01)


def remove_control_groups(top: Path) -> None:
    """Remove a control group that nothing is in any more, and those in it."""
    for directory, _, _ in os.walk(top, topdown=False):
        _remove_control_group(Path(directory))


def _remove_control_group(group: Path) -> None:
    # A process that is gone to its parent can still be leaving its group.
    for _ in range(100):
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
    group.rmdir()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


# What the keeper itself does.


def _keep(directory: Path, control_groups: list[Path], requests: IO[str]) -> None:
    _adopt()
    signal.signal(signal.SIGCHLD, _bury)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        for line in requests:
            print(json.dumps(_start(**json.loads(line))), flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_below(psutil.Process(), control_groups)
        for group in control_groups:
            remove_control_groups(group)
        shutil.rmtree(directory)


def _start(command: list[str], log: str, environment: dict[str, str]) -> dict[str, Any]:
    reading, writing = os.pipe()
    adopter = os.fork()
    if adopter == 0:
        try:
            _be_adopter(command, log, environment, writing)
        except BaseException as error:
            print(f"{command[0]}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        return {"adopter": adopter, "daemon": int(answer.read())}


def _be_adopter(command: list[str], log: str, environment: dict[str, str], told: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _adopt()
    with Path(log).open("ab") as output, Path(os.devnull).open("rb") as nothing:
        daemon = subprocess.Popen(command, stdin=nothing, stdout=output, stderr=output, env=environment)
    os.write(told, str(daemon.pid).encode())
    for fd in (0, 1, told):  # what the keeper and its parent see the end of each other by
        os.close(fd)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def _adopt() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _bury(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    _keep(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]], sys.stdin)
