"""Start fork servers: processes that import what a command imports once, and fork a child per unit."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence

from fractal_runner.worker import processes, warm
from fractal_runner.worker.spec import PATH_BYTES
from fractal_runner.worker.targets import Target

VARYING = (processes.MARK_VARIABLE,)
MARK_ROOM = 256  # characters of a varying variable that /proc/PID/environ can show

_FORKSERVER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "forkboot.py")
# They make an interpreter say or do more at its start or end than a fork repeats.
_TELLING = (b"PYTHONINSPECT", b"PYTHONPROFILEIMPORTTIME", b"PYTHONVERBOSE", b"PYTHONDUMPREFS")
# By a named pipe (make 4.4 and newer) anybody can have it.
_JOBSERVER = re.compile(rb"--jobserver-(auth|fds)=\d+,\d+")
_TURN_S = 0.05
_LAST_WORD_S = 5.0


class Server:
    """A fork server, as seen by the process that starts it. It ends with its owner.

    Once it is ready it is nobody's child: a worker that starts it for all may be ended with its children.

    Attributes:
        target: what it imports and runs.
        socket: its path, for `run` in whichever process.
        pid: its process id, once it is ready; until then, that of a parent which ends as it does.
        ticks: when the process of this pid started, once it is ready.
    """

    def __init__(
        self, target: Target, process: subprocess.Popen[bytes], directory: str, status: int, timeout_s: float
    ) -> None:
        self.target = target
        self.socket = f"{directory}/socket"
        self.pid = process.pid
        self.ticks: int | None = None
        self._process = process
        self._directory = directory
        self._status = status
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._lock = threading.Lock()  # over what follows
        self._said: str | None = None
        self._ended: float | None = None  # when the process was seen to have, that was started
        self._heard = b""

    @classmethod
    def start(
        cls,
        target: Target,
        *,
        words: Sequence[str],
        directory: str,
        environment: Mapping[bytes, bytes],
        log: str,
        cwd: str | None = None,
        owner: int | None = None,
        varying: Sequence[str] = VARYING,
        import_timeout_s: float = 60.0,
        idle_s: float = 300.0,
        learn: bool = True,
    ) -> Server:
        """Start a server; it imports from now on.

        Args:
            target: what `recognise` found.
            words: the command that it found it in; only its first `target.words` count.
            directory: where to make the server's own one, which is short-lived and of mode 0700: on a disk
                of this host, and with a short path, as sockets need it.
            environment: that of its units.
            log: a file for what the server itself has to say.
            cwd: the working directory of its units; this process's, if None.
            owner: the process that it ends with; this one, if None.
            varying: variables that may be another in each unit. They must not matter to an import.
            import_timeout_s: seconds that its imports may take.
            idle_s: seconds without a unit after which it ends.
            learn: whether it may import beforehand what its units were seen to import.

        Raises:
            warm.ColdStart: if a server cannot be had for such a command.
            OSError: if its files cannot be made.
        """
        if sys.platform != "linux":
            raise warm.ColdStart(f"Processes are forked on Linux only, not on {sys.platform}.")
        if found := [name for name in _TELLING if environment.get(name)]:
            raise warm.ColdStart(f"{os.fsdecode(found[0])} is set.")
        if _JOBSERVER.search(environment.get(b"MAKEFLAGS", b"")):
            raise warm.ColdStart("MAKEFLAGS names descriptors of a jobserver, which its units must inherit.")
        owner = os.getpid() if owner is None else owner
        if (ticks := processes.start_ticks(owner)) is None:
            raise warm.ColdStart("The process that its fork server would end with has ended.")
        own = tempfile.mkdtemp(prefix="warm-", dir=directory)
        read, write = os.pipe()
        try:
            if len(os.fsencode(f"{own}/socket")) > PATH_BYTES:
                raise warm.ColdStart(f"The path of {directory} is too long for a socket.")
            options = {
                "directory": own,
                "status": write,
                "owner": owner,
                "owner-ticks": ticks,
                "import-timeout": import_timeout_s,
                "idle": idle_s,
                "varying": ",".join(varying),
                "learn": int(learn),
                "kind": target.kind,
                "name": target.name,
            }
            given = [f"--{name}={value}" for name, value in options.items()]
            # Room for a varying value, where the kernel shows the environment that a process started with.
            room = {os.fsencode(name): b"_" * MARK_ROOM for name in varying}
            command = [target.python, *target.options, _FORKSERVER, *given, "--", *words[: target.words]]
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    command,
                    executable=_found(
                        target.python, os.fsdecode(environment.get(b"PATH", b"")) if target.by_env else None
                    ),
                    env={**environment, **room},
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(write,),
                    start_new_session=True,
                )
        except BaseException:  # a Ctrl-C, too, must leave neither descriptor nor directory behind
            os.close(read)
            shutil.rmtree(own, ignore_errors=True)
            raise
        finally:
            os.close(write)
        return cls(target, process, own, read, import_timeout_s)

    def wait_ready(self, timeout: float | None = None) -> str | None:
        """Wait until it can be used.

        Args:
            timeout: seconds to wait; as long as its imports may take, if None.

        Returns:
            None once it can; else why this command must be started cold. Then the server has ended.

        Raises:
            TimeoutError: if it is neither yet; it may be asked again.
        """
        with self._lock:
            return self._wait_ready(timeout)

    def _wait_ready(self, timeout: float | None) -> str | None:
        if self._said is None:
            left = self._deadline - time.monotonic()
            pause = left if timeout is None else min(left, timeout)
            self._said = self._read_status(time.monotonic() + max(0.0, pause))
            if self._said is None and pause < left:
                raise TimeoutError(f"The fork server is not ready after {pause:g} s.")
            if self._said is None:
                self._said = f"cold {self._too_long()}"
            kind, _, rest = self._said.partition(" ")
            if kind == "ready":
                self._close_status()
                self._process.wait()  # it was killed before we were told
                self.pid = int(rest)
                self.ticks = processes.start_ticks(self.pid)
            else:
                self.stop(0)
        kind, _, rest = self._said.partition(" ")
        return None if kind == "ready" else rest

    def _read_status(self, deadline: float) -> str | None:
        """The line that it says of itself, or what its end says of it; None if neither has come by then."""
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        while b"\n" not in self._heard:
            has_ended = not self.runs()  # asked first: what it has said is in the pipe by then
            now = time.monotonic()
            left = deadline - now
            if has_ended:
                self._ended = now if self._ended is None else self._ended
                # A child that is ready kills it, and says so a moment later.
                patience = _LAST_WORD_S if self._process.returncode == -signal.SIGKILL else 0.0
                left = min(left, self._ended + patience - now)
                has_ended = self._ended + patience <= now
            # In short turns: a process that was forked meanwhile may hold the pipe open.
            if poll.poll(max(0.0, min(left, _TURN_S)) * 1000):
                part = os.read(self._status, 65536)
                self._heard += part
                if part:
                    continue
                try:  # what it imports may close what it does not know, and take its time
                    self._process.wait(max(0.0, left))
                except subprocess.TimeoutExpired:
                    return None
                has_ended = True
            if has_ended:
                code = self._process.returncode
                if code == -signal.SIGALRM:
                    return f"cold {self._too_long()}"
                return f"cold Its imports end the interpreter ({code})."
            if left <= 0:
                return None
        return self._heard.partition(b"\n")[0].decode(errors="replace")

    def _read_rest(self) -> str:
        """What it has said, once it cannot say any more but within a moment."""
        poll = select.poll()
        if self._status >= 0:
            poll.register(self._status, select.POLLIN)
        deadline = time.monotonic() + _TURN_S
        while self._status >= 0 and b"\n" not in self._heard:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                break
            part = os.read(self._status, 65536)
            if not part:
                break
            self._heard += part
        return self._heard.partition(b"\n")[0].decode(errors="replace")

    def _too_long(self) -> str:
        return f"Its imports take longer than {self._timeout_s:g} s."

    def _close_status(self) -> None:
        if self._status >= 0:
            os.close(self._status)
            self._status = -1

    def run(
        self, words: Sequence[str], environment: Mapping[bytes, bytes], cwd: str, log_file: str
    ) -> warm.WarmChild:
        """Run a command here: see `warm.run`."""
        return warm.run(self.socket, words, environment, cwd, log_file)

    def runs(self) -> bool:
        """Whether its process has not ended. One whose files have changed still waits for its units."""
        if self.pid == self._process.pid:
            return self._process.poll() is None
        return processes.is_running(self.pid) and processes.start_ticks(self.pid) == self.ticks

    def stop(self, grace_s: float = 2.0) -> None:
        """End it, not the units that it has started; twice is fine."""
        if self.pid == self._process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # both of them; there is no unit yet
            self._process.wait()
            kind, _, pid = self._read_rest().partition(" ")
            if kind == "ready":  # it had left the group just before
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(pid), signal.SIGKILL)
        else:
            processes.end_found(lambda: [self.pid] if self.runs() else [], grace_s)
        self._close_status()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _found(program: str, path: str | None) -> str:
    """Where a program is, in `path`, or in the PATH of this process.

    Raises:
        FileNotFoundError: if it is nowhere.
    """
    found = shutil.which(program, path=path)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
    return found
