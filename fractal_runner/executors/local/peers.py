"""A child process that runs calls, as the slot that owns it sees it: started, spoken to, ended.

Its death is seen through a pidfd. A pipe's end would not do: siblings that were forked meanwhile hold
the other one, and it comes when they end.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import multiprocessing
import os
import pickle
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import IO, Any

import cloudpickle

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.calls import Call
from fractal_runner.executors.local import child
from fractal_runner.quantities import format_time
from fractal_runner.worker import processes

OUTPUT_LIMIT_BYTES = 16 * 2**20
_TICK_S = 0.25  # how often it is looked whether the call is to be stopped
_TERM_GRACE_S = 1.0
_EXIT_WAIT_S = 5.0
_REAP_WAIT_S = 1.0
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")  # a message's length; -1 if the longer one follows
_logger = logging.getLogger("fractal_runner")


class _Starting:
    """One process is started at a time, and a forked child begins anew."""

    lock = threading.Lock()

    @classmethod
    def reset(cls) -> None:
        cls.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Starting.reset)

MakeProcess = Callable[[Callable[..., None], tuple[Any, ...]], BaseProcess]


class RemoteTraceback(Exception):
    """Where a call raised in its worker process, as text: the cause of the exception that it raised."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}\n"""'


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
        forked: bool = False,
    ) -> None:
        self._output: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  ours for long
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)  # so that it can be emptied between calls
        ours, theirs = multiprocessing.Pipe()
        self.connection = ours
        self._incoming = _Incoming(ours)
        setup = child.Setup(
            child.InheritedFd(os.dup(self._output.fileno())),
            environment,
            ledger,
            tuple(map(child.InheritedFd, inherited)),
            (ours.fileno(), self._incoming.fd) if forked else (),
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
        except BaseException:
            self._incoming.close()
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
        self._poll.register(ours, select.POLLIN)
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
        except BaseException:
            self.close()
            raise

    def receive(
        self, deadline: float | None, stopped: Callable[[], bool] = lambda: False
    ) -> memoryview | None:
        """The next message that is not a log record, which are handled; None if the process has died.

        Raises:
            TimeoutError: at the deadline.
            InterruptedError: once `stopped` says so.
        """
        while True:
            left = _TICK_S if deadline is None else min(_TICK_S, deadline - time.monotonic())
            ready = self._poll.poll(max(0.0, left) * 1000)
            if any(fd != self._pidfd for fd, _ in ready) or (ready and self.connection.poll()):
                try:
                    message = self._incoming.read()
                except (EOFError, OSError):
                    return None
                if message is not None:
                    if message[:1] != child.LOG:
                        return message
                    _handle(message[1:])
            elif ready or (self._pidfd < 0 and not self._process.is_alive()):
                return None
            # Also after a log record: who logs without end can be ended all the same.
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError
            if stopped():
                raise InterruptedError

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
        if code is not None and code < 0:
            name = processes.signal_name(-code)
            how = f"was killed by {name}"
            if name == "SIGKILL":
                how += " (is it the kernel's out-of-memory killer? its log, dmesg, tells)"
            elif name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"):
                how += " (a fault in native code)"
        else:
            how = "has gone" if code is None else f"ended with exit code {code}"
        return JobExecutionError(f"The worker process (pid {self.pid}) {how}, {when}.", returncode=code)

    def kill(self, grace_s: float = _TERM_GRACE_S) -> None:
        """End the process and all that it has started."""
        processes.end_tree(self.pid, grace_s)

    def close(self) -> None:
        """Close the connection, which ends a process that waits for calls, and see to it that it ends."""
        self._incoming.close()
        self.connection.close()
        self._output.close()
        if not self._has_exited(_EXIT_WAIT_S):
            self.kill()
            self._has_exited(_EXIT_WAIT_S)
        del self._process  # what it holds is closed with it; loky's cannot be closed otherwise
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

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


class _Incoming:
    """Messages as multiprocessing's connections frame them, read without waiting for the rest of one.

    The rest may never come: a process that dies in the midst of sending leaves no end behind it as long
    as another one, that it has forked, holds its connection, too.
    """

    def __init__(self, connection: Connection) -> None:
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._is_body = False
        self._expect(_SHORT.size)

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    def read(self) -> memoryview | None:
        """The next message; None if it has not arrived whole.

        Raises:
            EOFError: if there is no more.
        """
        while self._receive():
            if self._is_body:
                message = self._part
                self._is_body = False
                self._expect(_SHORT.size)
                return message
            if len(self._part) == _SHORT.size and (size := _SHORT.unpack(self._part)[0]) < 0:
                self._expect(_LONG.size)
                continue
            self._is_body = True
            self._expect(size if len(self._part) == _SHORT.size else _LONG.unpack(self._part)[0])
        return None

    def close(self) -> None:
        """End the connection for whoever holds it, a sibling that was forked meanwhile, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _expect(self, size: int) -> None:
        self._part = memoryview(bytearray(size))
        self._filled = 0

    def _receive(self) -> bool:
        """Whether the part that is expected is there."""
        while self._filled < len(self._part):
            try:
                number = self._socket.recv_into(self._part[self._filled :], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if not number:
                raise EOFError
            self._filled += number
        return True


def report_end(call: Call, message: memoryview | bytes) -> None:
    """End `call` as its worker process reports."""
    kind, body = bytes(message[:1]), message[1:]
    if kind == child.RESULT:
        try:
            result = pickle.loads(body)
        except BaseException as error:
            failure = ExecutorError(f"The result of {call.name!r} could not be unpickled: {error}")
            failure.__cause__ = error
            call.fail(failure)
        else:
            call.succeed(result)
    elif kind == child.RAISED:
        call.fail(_raised(call, pickle.loads(body)))
    else:
        what, message_text, type_name, text = pickle.loads(body)
        failure = ExecutorError(
            f"The call {call.name!r} {what}: {type_name}: {message_text}",
            type_name=type_name,
            remote_traceback=text,
        )
        failure.__cause__ = RemoteTraceback(text)
        call.fail(failure)


def dump_call(call: Call) -> memoryview:
    """The message of a call.

    Raises:
        ExecutorError: naming the argument, if something of it cannot be pickled.
    """
    buffer = io.BytesIO()
    buffer.write(child.CALL)
    try:
        cloudpickle.Pickler(buffer).dump((call.fn, call.args, call.kwargs))
    except Exception as error:
        named = [("the function", call.fn)]
        named += [(f"argument {place} (counted from 0)", value) for place, value in enumerate(call.args)]
        named += [(f"argument {name!r}", value) for name, value in call.kwargs.items()]
        for name, value in named:
            if (own := _pickling_error(value)) is not None:
                raise ExecutorError(
                    f"The call {call.name!r} cannot be sent to a worker process: {name}, a "
                    f"{type(value).__qualname__}, cannot be pickled: {own}",
                    type_name=type(value).__qualname__,
                ) from own
        raise ExecutorError(f"The call {call.name!r} cannot be pickled: {error}") from error
    return buffer.getbuffer()


def _pickling_error(value: Any) -> Exception | None:
    try:
        cloudpickle.dumps(value)
    except Exception as error:
        return error
    return None


def _raised(call: Call, report: child.Raised) -> BaseException:
    """The work's own exception, or an ExecutorError that tells all about it."""
    pickled, module, name, message, text = report
    error: object = None
    problem = "cannot be pickled"
    if pickled is not None:
        try:
            error = pickle.loads(pickled)
        except BaseException as unpickling:
            problem = f"cannot be unpickled ({type(unpickling).__name__}: {unpickling})"
    if not isinstance(error, BaseException):
        type_name = name if module == "builtins" else f"{module}.{name}"
        error = ExecutorError(
            f"The call {call.name!r} raised {type_name}: {message}\n(The exception itself {problem}.)",
            type_name=type_name,
            remote_traceback=text,
        )
    error.__cause__ = RemoteTraceback(text)
    return error


def _handle(pickled: memoryview) -> None:
    record = None
    try:
        record = logging.makeLogRecord(pickle.loads(pickled))
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    except Exception as error:
        # An `extra` that only the worker can make, or a handler that raises: the call goes on without.
        said = "that cannot be unpickled" if record is None else repr(record.getMessage())
        _logger.warning("a log record of a worker process, %s, is lost: %r", said, error)


def _pidfd(pid: int) -> int:
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return -1


_HELD_BACK = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
