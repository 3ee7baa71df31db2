"""What goes to a worker process and what comes back: calls, their ends, log records, as pickles."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import cloudpickle

from fractal_runner.errors import ExecutorError
from fractal_runner.executors.calls import Call
from fractal_runner.executors.local import child
from fractal_runner.executors.local.pickling import dump

_logger = logging.getLogger("fractal_runner")


class RemoteTraceback(Exception):
    """Where a call raised in its worker process, as text: the cause of the exception that it raised."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}\n"""'


def report_end(call: Call, message: memoryview) -> None:
    """End `call` as its worker process reports."""
    kind, body = bytes(message[:1]), message[2:]
    if kind == child.RESULT:
        try:
            result = pickle.loads(body)
        except BaseException as error:  # unpickling runs the result's own code
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


def has_output(message: memoryview) -> bool:
    """Whether a call that ended with `message` has printed something."""
    return message[1:2] == child.PRINTED


def dump_call(call: Call, about: tuple[Any, ...] = ()) -> memoryview:
    """The message of a call.

    Args:
        call: the call.
        about: what follows function and arguments; see `child.about_call`.

    Raises:
        ExecutorError: naming the argument, if something of it cannot be pickled.
    """
    try:
        return dump(child.CALL, (call.fn, call.args, call.kwargs, *about))
    except Exception as error:  # pickling runs the arguments' own code
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


def _pickling_error(value: Any) -> Exception | None:
    try:
        cloudpickle.dumps(value)
    except Exception as error:  # whatever it is, it is the answer
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
        except BaseException as unpickling:  # its __init__ is anybody's code
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


def handle_record(pickled: memoryview) -> None:
    """Give a log record of a worker to the logger of the same name here."""
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
