"""A child process that runs calls, as the slot that owns it sees it: started, spoken to, ended.

Its death is seen through a pidfd. A pipe's end would not do: siblings that were forked meanwhile hold
the other one, and it comes when they end.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import select
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import IO, Any

from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.local import child
from fractal_runner.executors.local.line import Line
from fractal_runner.executors.local.reports import handle_record
from fractal_runner.quantities import format_time
from fractal_runner.worker import processes

KILLED_HINT = " (is it the kernel's out-of-memory killer? its log, dmesg, tells)"
OUTPUT_LIMIT_BYTES = 16 * 2**20
_TICK_S = 0.25  # how often it is looked whether the call is to be stopped
TERM_GRACE_S = 1.0
_EXIT_WAIT_S = 5.0
_REAP_WAIT_S = 1.0
_SILENCE_S = 0.001  # a process that has just answered has not died since


class _Starting:
    """One process is started at a time, and a forked child begins anew."""

    lock = threading.Lock()

    @classmethod
    def reset(cls) -> None:
        cls.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Starting.reset)

MakeProcess = Callable[[Callable[..., None], tuple[Any, ...]], BaseProcess]


class NotStartedError(Exception):
    """A child process has not reported its start in time."""


class Peer:
    """A child process and the connection to it. All of it belongs to one slot's thread.

    Args:
        make_process: makes the process that calls a target with arguments.
        target: a function of `child`.
        more: further arguments of the target.
        environment, ledger, inherited: see `child.Setup`.
        start_timeout: seconds within which it has to report its start.
        on_record: gets the log records of its calls, pickled.
        forked: whether it has copies of all our descriptors.

    Raises:
        NotStartedError: if it does not; it has been killed.
        JobExecutionError: if it died before that.
    """

    def __init__(
        self,
        make_process: MakeProcess,
        target: Callable[..., None],
        *more: Any,
        environment: dict[str, str],
        ledger: str,
        inherited: tuple[int, ...],
        start_timeout: float,
        on_record: Callable[[memoryview], None] = handle_record,
        forked: bool = False,
    ) -> None:
        self._on_record = on_record
        self._output: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  ours for long
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)  # so that it can be emptied between calls
        ours, theirs = multiprocessing.Pipe()
        self._connection = ours
        self._line = Line(ours)
        self._heard_at = 0.0
        setup = child.Setup(
            child.InheritedFd(os.dup(self._output.fileno())),
            environment,
            ledger,
            tuple(map(child.InheritedFd, inherited)),
            (ours.fileno(), self._line.fd) if forked else (),
            forked,
        )
        try:
            with _Starting.lock:
                self._process = make_process(target, (theirs, setup, *more))
                blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
                try:
                    # Until it has its own process group, a Ctrl-C would reach it.
                    self._process.start()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        except BaseException:  # a Ctrl-C, too, must leave no descriptor behind
            self._line.close()
            ours.close()
            self._output.close()
            raise
        finally:
            theirs.close()
            os.close(setup.output.fd)
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._pidfd = _pidfd(self.pid)
        self._poll = select.poll()
        self._poll.register(self._line.fd, select.POLLIN)
        if self._pidfd >= 0:
            self._poll.register(self._pidfd, select.POLLIN)
        try:
            if (self.receive(time.monotonic() + start_timeout) or b"")[:1] != child.STARTED:
                raise self.death("before it took its first call")
        except TimeoutError:
            self.kill(0)
            self.close()
            raise NotStartedError(
                f"a worker process (pid {self.pid}) has not started in {format_time(start_timeout)}"
            ) from None
        except BaseException:  # nor a process
            self.close()
            raise

    def send(
        self, data: bytes | memoryview, deadline: float | None, stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Send a message; False if the process has died.

        Raises:
            TimeoutError, InterruptedError: as `receive`. The process cannot be used any more.
        """
        if time.monotonic() - self._heard_at > _SILENCE_S and self._has_exited(0):
            return False
        pieces = self._line.framed(data)
        try:
            while not self._line.push(pieces):
                poll = select.poll()
                poll.register(self._line.fd, select.POLLOUT)
                if self._pidfd >= 0:
                    poll.register(self._pidfd, select.POLLIN)
                if any(fd == self._pidfd for fd, _ in poll.poll(self._turn_ms(deadline))):
                    return False
                self._raise_if_over(deadline, stopped)
        except OSError as error:
            if isinstance(error, (TimeoutError, InterruptedError)):
                raise
            return False
        return True

    def receive(
        self, deadline: float | None, stopped: Callable[[], bool] = lambda: False
    ) -> memoryview | None:
        """The next message that is not a log record, which are handled; None if the process has died.

        Raises:
            TimeoutError: at the deadline.
            InterruptedError: once `stopped` says so.
        """
        while True:
            while (message := self._line.next()) is not None:
                if message[:1] != child.LOG:
                    self._heard_at = time.monotonic()
                    return message
                self._on_record(message[1:])
                # Also here: who logs without end can be ended all the same.
                self._raise_if_over(deadline, stopped)
            ready = self._poll.poll(self._turn_ms(deadline))
            try:
                # Its last words may have come between the system's looks at the one and at the other.
                if ready and not self._line.fetch() and any(fd == self._pidfd for fd, _ in ready):
                    return None
            except (EOFError, OSError):
                return None
            if not ready and self._pidfd < 0 and not self._process.is_alive():
                return None
            self._raise_if_over(deadline, stopped)

    def take_output(self) -> str:
        """What was printed since the last time; the end of it, if it is very much."""
        fd = self._output.fileno()
        size = os.fstat(fd).st_size
        if not size:
            return ""
        start = max(0, size - OUTPUT_LIMIT_BYTES)
        text = os.pread(fd, size - start, start).decode(errors="replace")
        os.ftruncate(fd, 0)
        if start:
            text = f"[{start} bytes before this are left out]\n{text[text.find(chr(10)) + 1 :]}"
        return text

    def death(self, when: str) -> JobExecutionError:
        """The error of a call whose process has died; what it left running is ended."""
        self._has_exited(_EXIT_WAIT_S)
        code = self._process.exitcode
        processes.end_tree(self.pid, 0)
        reason = None
        if code is not None and code < 0:
            reason = name = processes.signal_name(-code)
            how = f"was killed by {name}"
            if name == "SIGKILL":
                how += KILLED_HINT
            elif name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"):
                how += " (a fault in native code)"
        else:
            how = "has gone" if code is None else f"ended with exit code {code}"
        return JobExecutionError(
            f"The worker process (pid {self.pid}) {how}, {when}.", reason=reason, returncode=code
        )

    def kill(self, grace_s: float = TERM_GRACE_S) -> None:
        """End the process and all that it has started."""
        processes.end_tree(self.pid, grace_s)

    def hang_up(self) -> None:
        """Close the connection, which ends a process that waits for calls."""
        self._line.close()
        self._connection.close()

    def close(self) -> None:
        """Hang up, and see to it that the process ends."""
        self.hang_up()
        self._output.close()
        if not self._has_exited(_EXIT_WAIT_S):
            self.kill()
            self._has_exited(_EXIT_WAIT_S)
        del self._process  # what it holds is closed with it; loky's cannot be closed otherwise
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _turn_ms(self, deadline: float | None) -> float:
        left = _TICK_S if deadline is None else min(_TICK_S, deadline - time.monotonic())
        return max(0.0, left) * 1000

    def _raise_if_over(self, deadline: float | None, stopped: Callable[[], bool]) -> None:
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError
        if stopped():
            raise InterruptedError

    def _has_exited(self, seconds: float) -> bool:
        """Whether it has, waiting for it for up to `seconds`; then it has been reaped."""
        if self._pidfd < 0:
            self._process.join(seconds)
        elif self._process.is_alive():
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if poll.poll(seconds * 1000):
                # multiprocessing reaps children in whatever thread starts the next one: its exit code
                # is known once that thread has had its turn.
                deadline = time.monotonic() + _REAP_WAIT_S
                while self._process.is_alive() and time.monotonic() < deadline:
                    time.sleep(0.001)
        return not self._process.is_alive()


def _pidfd(pid: int) -> int:
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return -1


_HELD_BACK = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
