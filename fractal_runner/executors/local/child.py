"""What runs in a worker process: it takes calls off a connection and reports how they ended.

A worker process must start fast, so this module and what it imports are few. Messages are a byte that
tells their kind and a pickle. To the worker: `CALL`, and before it, where something has changed,
`SETTINGS`. From it: `STARTED`, any number of `LOG`, and one of `RESULT`, `RAISED` or `FAILED` per call.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Protocol

from fractal_runner.executors.calls import Call, CallOptions
from fractal_runner.executors.local.pickling import dump, dump_error
from fractal_runner.worker import evidence

CALL, SETTINGS = b"C", b"S"
STARTED, LOG, RESULT, RAISED, FAILED = b"+", b"L", b"R", b"E", b"F"
PRINTED, SILENT = b"p", b"-"  # second byte of the last three: whether the call has printed something

_COMM_BYTES = 15  # what Linux keeps of a process's name
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGALRM)


class InheritedFd:
    """A descriptor that a child process is to have, wherever it is mentioned among what it is given."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _detached, (DupFd(self.fd),)


def _detached(duplicate: Any) -> InheritedFd:
    return InheritedFd(duplicate.detach())


_NO_OPTIONS = CallOptions()
_NOTHING_ABOUT = (None, None)  # key, place in a map

Raised = tuple[bytes | None, str, str, str, str]  # pickled or not, module, name, message, traceback


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker process is given at its start.

    Attributes:
        output: where its standard output and error go.
        environment: variables that it sets.
        ledger: the name of the evidence files that its slot writes.
        inherited: further descriptors that its children need.
        not_ours: descriptors that a fork has copied and which are the parent's alone.
        forked: whether it is a copy of its parent.
    """

    output: InheritedFd
    environment: Mapping[str, str]
    ledger: str
    inherited: tuple[InheritedFd, ...] = ()
    not_ours: tuple[int, ...] = ()
    forked: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What a worker has to know for the calls that follow.

    Attributes:
        name: their name.
        context: the number of the context they see, and its pickle if it is new to the worker.
        levels: loggers and their levels, "" being the root; None if they are as before.
        attempt: which start of the call it is: what is sent of a call itself is the same each time.
    """

    name: str
    context: tuple[int, bytes | None]
    levels: Mapping[str, int] | None
    attempt: int = 1


def serve(connection: Connection, setup: Setup) -> None:
    """Take calls off the connection until it ends: what a reused worker process does."""
    reporter = _arrive(connection, setup)
    contexts: dict[int, Mapping[str, Any]] = {}
    settings = Settings("", (0, None), None)
    handler = Forward(reporter)
    if setup.forked:
        _forget_handlers()
        _reseed()
    logging.getLogger().addHandler(handler)
    reporter.send(STARTED)
    while True:
        try:
            message = memoryview(connection.recv_bytes())
        except (EOFError, OSError):
            return  # the executor has closed it, or has died
        try:
            if message[:1] == SETTINGS:
                settings = pickle.loads(message[1:])
                _settle(settings, contexts)
                continue
            fn, args, kwargs, *told = pickle.loads(message[1:])
        except BaseException as error:
            # Settings are what a call needs: its own message comes next, and is answered instead.
            if message[:1] == SETTINGS:
                _refuse(reporter, connection, error)
            else:
                reporter.failed("could not be unpickled in its worker process", error)
            continue
        finally:
            del message
        call = Call(
            *(fn, args, kwargs),
            options=options_told(told),
            context=contexts[settings.context[0]],
            name=settings.name,
            attempt=settings.attempt,
        )
        do_call(reporter, call)
        del fn, args, kwargs, call


def run_once(connection: Connection, setup: Setup, call: Call) -> None:
    """Do one call, which is in this process's memory already: what a forked child does."""
    reporter = _arrive(connection, setup)
    handler = Forward(reporter)
    _forget_handlers()
    logging.getLogger().addHandler(handler)
    bear_name(call.name)
    reporter.send(STARTED)
    do_call(reporter, call)


def about_call(call: Call) -> tuple[Any, ...]:
    """What a worker process is told of a call beside function and arguments: nothing, of most."""
    said = call.key, call.options.map_index
    return () if said == _NOTHING_ABOUT else said


def options_told(about: Sequence[Any], **others: Any) -> CallOptions:
    """What a call that runs is to know of its options: what `about_call` has said, and others."""
    if not about and not others:
        return _NO_OPTIONS
    key, map_index = about or _NOTHING_ABOUT
    return CallOptions(key=key, map_index=map_index, **others)


def levels_in_force() -> dict[str, int]:
    """The loggers whose level was set, and it; `logging.disable`d levels raise all of them."""
    disabled = logging.root.manager.disable
    levels = {"": max(logging.root.level, disabled + 1 if disabled else 0)}
    for name, logger in _loggers().items():
        if logger.level:
            levels[name] = max(logger.level, disabled + 1 if disabled else 0)
    return levels


def bear_name(name: str) -> None:
    """Let this process, as Python and the system know it, have the name of its call."""
    multiprocessing.current_process().name = name
    threading.current_thread().name = name
    # The name of the file is what counts, so it is no use on macOS.
    with suppress(OSError):
        fd = os.open("/proc/self/comm", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, name.encode()[:_COMM_BYTES])
        finally:
            os.close(fd)


class _Reporter:
    """The worker's end of the connection, for all of its threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: bytes | memoryview) -> None:
        with self._lock, suppress(OSError):  # whoever was to read it has died; so does this process, soon
            self._connection.send_bytes(message)

    def end(self, kind: bytes, value: Any) -> None:
        """Report the end of a call. What cannot be pickled raises before anything is sent."""
        _flush()
        try:
            printed = PRINTED if os.fstat(1).st_size else SILENT
        except OSError:  # the call has closed it
            printed = PRINTED
        self.send(dump(kind + printed, value))

    def failed(self, what: str, error: BaseException) -> None:
        """Report that the call could not be carried here or its result back."""
        self.end(FAILED, (what, str(error), type(error).__qualname__, _text_of(error)))


class Sends(Protocol):
    """Where messages go."""

    def send(self, message: bytes | memoryview) -> None: ...


class Forward(logging.Handler):
    """Sends records to the executor's process, where they reach the logger of the same name."""

    def __init__(self, reporter: Sends) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        try:
            values = dict(record.__dict__)
            values["msg"], values["args"] = record.getMessage(), None
            if record.exc_info:
                values["exc_text"] = record.exc_text or _formatter.formatException(record.exc_info)
            values["exc_info"] = None
            try:
                data = pickle.dumps(values)
            except Exception:  # some `extra` that cannot travel: its text can
                data = pickle.dumps({name: _portable(value) for name, value in values.items()})
            self._reporter.send(LOG + data)
        except Exception:  # as every handler of the standard library: logging never ends the work
            self.handleError(record)


def _arrive(connection: Connection, setup: Setup) -> _Reporter:
    """Make this process a worker: its own group, its output into the file, no signals of the parent's."""
    with suppress(OSError):
        os.setpgid(0, 0)  # a terminal's Ctrl-C is the parent's, and so is what becomes of us then
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)  # a forked event loop's: it would tell the parent of our signals
    signal.signal(signal.SIGINT, _unmoved)  # not SIG_IGN: what we start would ignore it, too
    for number in _ENDING:
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for fd in setup.not_ours:
        os.close(fd)
    os.environ.update(setup.environment)
    evidence.go_on_as(setup.ledger)
    if not setup.forked:
        _keep_to_ourselves()
    for descriptor in setup.inherited:
        os.set_inheritable(descriptor.fd, True)
    _redirect(setup.output.fd)
    return _Reporter(connection)


def _keep_to_ourselves() -> None:
    """Let what this process starts not have the descriptors that it was itself started with."""
    with suppress(OSError):  # no /proc: macOS
        for path in Path("/proc/self/fd").iterdir():
            if int(path.name) > 2:
                with suppress(OSError):  # the listing's own
                    os.set_inheritable(int(path.name), False)


def _redirect(fd: int) -> None:
    """Let descriptors 1 and 2, and Python's streams on them, lead to `fd`, a line at a time."""
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    # A forked child's are the parent's: closed or flushed, they would write its text once more.
    _former_streams.extend((sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__))
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = os.fdopen(
            number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


_former_streams: list[Any] = []


class Reports(Protocol):
    """Who hears how a call has ended."""

    def end(self, kind: bytes, value: Any) -> None: ...
    def failed(self, what: str, error: BaseException) -> None: ...


def do_call(reporter: Reports, call: Call) -> None:
    """Do a call and report its end: whatever it raises is its own."""
    try:
        result = call.returned()
    except BaseException as error:  # SystemExit, too: it is the call's, and the worker goes on
        # Without the frames of this module; the caller sees the text as the cause of what it gets.
        text = _text_of(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        try:
            pickled = dump_error(error)
        except Exception:  # pickling runs the exception's own code; all about it is told in words as well
            pickled = None
        report = pickled, type(error).__module__, type(error).__qualname__, _safe_str(error), text
        reporter.end(RAISED, report)
        return
    try:
        reporter.end(RESULT, result)
    except BaseException as error:  # pickling runs the result's own code
        reporter.failed(f"returned a {type(result).__qualname__}, which cannot be pickled", error)


def _refuse(reporter: _Reporter, connection: Connection, error: BaseException) -> None:
    with suppress(EOFError, OSError):
        connection.recv_bytes()
        reporter.failed("was given a context that could not be unpickled in its worker process", error)


def _settle(settings: Settings, contexts: dict[int, Mapping[str, Any]]) -> None:
    number, pickled = settings.context
    if pickled is not None:
        contexts[number] = pickle.loads(pickled)
    if settings.levels is not None:
        set_levels(settings.levels)
    bear_name(settings.name)


def set_levels(levels: Mapping[str, int]) -> None:
    """Give these levels to these loggers, "" being the root, and none to all others."""
    for name, logger in _loggers().items():
        if name not in levels:
            logger.setLevel(logging.NOTSET)
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)


def _loggers() -> dict[str, logging.Logger]:
    known = logging.root.manager.loggerDict
    return {name: logger for name, logger in list(known.items()) if isinstance(logger, logging.Logger)}


def _forget_handlers() -> None:
    """Those that a fork has copied are the parent's; it gets every record, and handles it there."""
    for logger in _loggers().values():
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger().handlers.clear()


def _reseed() -> None:
    """A fork has copied the state of random generators, and its siblings have the same."""
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # a call may have closed or replaced it
            stream.flush()


def _portable(value: Any) -> Any:
    try:
        pickle.dumps(value)
    except Exception:  # pickling runs the value's own code
        return repr(value)
    return value


def _safe_str(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as another:  # an exception's __str__ is anybody's code
        return f"<its message cannot be made: {type(another).__name__}>"


def _text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).strip()


def _unmoved(number: int, frame: Any) -> None:
    """What a worker does about Ctrl-C: its executor decides."""


_formatter = logging.Formatter()
