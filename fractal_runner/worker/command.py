"""Run one unit of work where it is to run, and report what happened to it as data.

`run_unit` is what an executor is given, in whatever thread, process or cluster job that may be. It
writes the unit's arguments, starts its command in a process group of its own, watches it (a limit, a
request to stop) and reads what it left. It never raises for what the task did.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fractal_runner.worker import processes
from fractal_runner.worker.evidence import EVIDENCE_DIR, Ledger, own_ledger
from fractal_runner.worker.function import call_function
from fractal_runner.worker.jsontext import encoder
from fractal_runner.worker.processes import Child
from fractal_runner.worker.spawn import WRITE_LOG, Environment, spawn
from fractal_runner.worker.spec import (
    CANCELLED,
    COLD,
    LAUNCH_FAILED,
    SERVER_LOST,
    TIMEOUT,
    UNKILLABLE,
    WARM,
    UnitResult,
    UnitSpec,
)
from fractal_runner.worker.station import GivenUp, UnitLost, Wanted, station_for
from fractal_runner.worker.stop import POLL_S, StopRequest
from fractal_runner.worker.unit_records import end_of, process_of, start_of

if TYPE_CHECKING:
    from fractal_runner.worker.warm import WarmChild

__all__ = [
    "EVIDENCE_DIR",
    "LOG_TAIL_CHARS",
    "log_tail",
    "read_output",
    "run_unit",
    "runs_here",
]

LOG_TAIL_CHARS = 20_000

_BRIEF_S = 0.01
_FIRST_SAMPLE_S = 0.05
_LEFTOVER_GRACE_S = 2.0
_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
_KILL_WAIT_S = 10.0
_local = threading.local()
_running: set[str] = set()  # keys of the units that run in this process
_encode = encoder(allow_nan=False)
# The shell's codes (POSIX, XCU 2.8.2): 127 for a command that is not there, 126 for one that is but
# cannot be executed.
_EXEC_CODES = {
    errno.ENOENT: 127,
    errno.ENOTDIR: 127,
    errno.EACCES: 126,
    errno.ENOEXEC: 126,
    errno.E2BIG: 126,
    errno.ELOOP: 126,
}


def run_unit(spec: UnitSpec) -> UnitResult:
    """Run `spec` here, to its end, and report it."""
    _running.add(spec.key)
    try:
        return _run_unit(spec)
    finally:
        _running.discard(spec.key)


def runs_here(key: str) -> bool:
    """Whether the unit of this key is being run in this process, by one of its threads."""
    return key in _running


def _run_unit(spec: UnitSpec) -> UnitResult:
    stop = StopRequest(spec.run_id, spec.run_dir, epoch=spec.epoch, key=spec.key)
    if stop.asked():
        return _not_started(spec, CANCELLED, f"{stop.reason()} This unit had not started.")
    try:
        ledger = own_ledger(f"{spec.run_dir}/{EVIDENCE_DIR}", spec.run_id, spec.coordinator, spec.epoch)
        ledger.write(start_of(spec))
    except OSError as error:
        return _not_started(spec, LAUNCH_FAILED, f"Cannot record the start of the unit: {error}.")
    # Recorded first, looked then; who takes over raises the fence first and reads then: one of the two
    # always sees the other.
    text: str | None = None
    if stop.fenced():
        result = _not_started(spec, CANCELLED, f"{stop.reason()} This unit had not started.")
    elif spec.command is not None:
        result, text = _run_command(spec, spec.command, stop, ledger)
    else:
        result, text = _run_function(spec, stop)
    try:
        ledger.write(end_of(spec, result, text))
    except OSError as error:
        # The result is known here, and the coordinator records what it is told.
        result = _with_note(result, f"The unit's end could not be recorded where it ran: {error}.")
    return result


def log_tail(path: str, limit: int = LOG_TAIL_CHARS) -> str:
    """The last lines of a log, at most `limit` characters; "" if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        size = os.fstat(fd).st_size
        start = max(0, size - 4 * limit)  # UTF-8: at most four bytes a character
        data = os.pread(fd, size - start, start)
    except OSError:
        return ""
    finally:
        os.close(fd)
    text = data.decode(errors="replace").strip("\n")
    if start == 0 and len(text) <= limit:
        return text
    text = text[-limit:]
    return text[text.find("\n") + 1 :]  # from the start of a line, where there is one


def read_output(path: str) -> tuple[Any, str | None, str | None]:
    """What a unit left in its out file: the value, or why there is none; and its text."""
    try:
        # Non-blocking, because a task may leave anything under that name, a pipe included.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, None, None
    except OSError as error:
        return None, f"{path} cannot be read: {os.strerror(error.errno or 0)}", None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return None, f"{path} is not a regular file", None
    with os.fdopen(fd, "rb") as file:
        try:
            text = file.read().decode()
            # The hooks cost little and let other threads have their turn within a large file.
            value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except OSError as error:
            return None, f"{path} cannot be read: {os.strerror(error.errno or 0)}", None
        except (ValueError, RecursionError) as error:
            return None, f"{path} is not valid JSON: {error}", None
    return value, None, text


def _run_command(
    spec: UnitSpec, command: tuple[str, ...], stop: StopRequest, ledger: Ledger
) -> tuple[UnitResult, str | None]:
    """The result, and the text of what the unit left."""
    try:
        _prepare_files(spec)
    except OSError as error:
        return _not_started(spec, LAUNCH_FAILED, f"Cannot write the unit's files: {error}."), None
    parent_peak = processes.own_peak_rss()
    mark = processes.mark_of(spec.key)
    started = time.time()
    since = processes.ticks_since_boot()
    try:
        child, why_cold = _start(spec, command, stop)
    except OSError as error:
        return _not_executed(spec, command[0], error, started), None
    except GivenUp:
        return _not_started(spec, CANCELLED, f"{stop.reason()} This unit had not started."), None
    except UnitLost as error:
        left = processes.end_found(lambda: processes.bearers(mark), spec.grace_s)
        return _not_started(spec, UNKILLABLE if left else SERVER_LOST, str(error)), None
    except BaseException:  # Ctrl-C in a pool's worker, before its server has said whether it has started
        processes.end_found(lambda: processes.bearers(mark), spec.grace_s)
        raise
    processes.note_command(child.pid)
    try:
        # Most of what is over at once need not be found by anybody; its mark tells it all the same.
        brief = child.wait(_BRIEF_S)
        note = None if brief else _record_process(ledger, spec, child.pid, since)
        reason, message, peak = _watch(spec, stop, child, mark)
    except BaseException:  # Ctrl-C in a pool's worker: what was started here is not left behind
        processes.end_group(child, mark, spec.grace_s)
        raise
    finally:
        processes.note_command(None)
        child.close()
    code = child.returncode
    output, output_error, text = read_output(spec.out_file) if code == 0 else (None, None, None)
    if child.usage is not None:
        # A forked child's own figure began with itself: there is nothing to be told apart.
        parent_peak = parent_peak if isinstance(child, Child) else 0
        peak = max(peak, processes.peak_rss_of(child.usage.ru_maxrss, parent_peak))
    result = UnitResult(
        key=spec.key,
        digest=spec.digest,
        returncode=code,
        signal=processes.signal_name(-code) if code is not None and code < 0 else None,
        reason=reason,
        message=message,
        output=output,
        output_error=output_error,
        log_tail="" if code == 0 and output_error is None and reason is None else log_tail(spec.log_file),
        host=processes.node_name(),
        pid=child.pid,
        started=started,
        ended=time.time(),
        cpu_s=None if child.usage is None else child.usage.ru_utime + child.usage.ru_stime,
        peak_bytes=peak or None,
        start=COLD if isinstance(child, Child) else WARM,
        why_cold=why_cold,
    )
    return (_with_note(result, note) if note else result), text


def _start(spec: UnitSpec, command: tuple[str, ...], stop: StopRequest) -> tuple[Child | WarmChild, str]:
    """The unit's process; and, if it was to be started warm and was not, why."""
    environment = _environment(spec)
    words, mark = [*command, *spec.file_options], spec.key.encode()
    why_cold = ""
    station = None if spec.warm is None else station_for(spec.coordinator, spec.warm)
    if spec.warm is not None and station is not None and (cwd := _current_directory()):
        unit = Wanted(words, len(command), cwd, environment, mark, spec.log_file, spec.warm)
        child, why_cold = station.start(unit, stop.asked)
        if child is not None:
            return child, ""
    return Child(spawn(words, environment, mark, spec.log_file)), why_cold


def _current_directory() -> str:
    """Where a command would start; "" if that has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _watch(
    spec: UnitSpec, stop: StopRequest, child: Child | WarmChild, mark: bytes
) -> tuple[str | None, str | None, int]:
    """Wait for the child's end, or bring it about: reason, message, and the peak memory sampled."""
    peak = 0
    begin = time.monotonic()
    next_sample = begin + _FIRST_SAMPLE_S
    next_look = begin + POLL_S
    deadline = begin + spec.timeout_s if spec.timeout_s is not None else float("inf")
    while not child.wait(min(next_sample, next_look, deadline) - time.monotonic()):
        now = time.monotonic()
        if now >= deadline:
            message = f"It ran longer than its timeout of {spec.timeout_s:g} s."
            return *_end(spec, child, mark, TIMEOUT, message), peak
        if now >= next_look:
            if stop.asked():
                return *_end(spec, child, mark, CANCELLED, stop.reason()), peak
            next_look = now + POLL_S
        if now >= next_sample:
            peak = max(peak, processes.sample_memory(child.pid))
            next_sample = now + POLL_S
    if child.returncode is None:
        message = "The fork server that had started it has ended; what was left of the unit was ended."
        return *_end(spec, child, mark, SERVER_LOST, message), peak
    _end_leftovers(spec, child, mark)
    return None, None, peak


def _end(spec: UnitSpec, child: Child | WarmChild, mark: bytes, reason: str, message: str) -> tuple[str, str]:
    processes.end_group(child, mark, spec.grace_s)
    # Of one whose fork server has ended nobody learns its exit code, only that it is gone.
    if child.wait(_KILL_WAIT_S) and (child.returncode is not None or processes.group_is_empty(child.pid)):
        return reason, message
    return UNKILLABLE, f"{message} It has not ended {_KILL_WAIT_S:g} s after SIGKILL (pid {child.pid})."


def _end_leftovers(spec: UnitSpec, child: Child | WarmChild, mark: bytes) -> None:
    """End what the command left behind in its process group, once it had time to end by itself.

    A unit is over when nothing of it runs any more: a background process could go on writing into an
    image that the next task reads. Helpers such as multiprocessing's resource tracker end by themselves
    when they see their parent gone.
    """
    if processes.group_is_empty(child.pid):
        return
    deadline = time.monotonic() + _LEFTOVER_GRACE_S
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if processes.group_is_empty(child.pid):
            return
    left = processes.group_members(child.pid)
    processes.end_group(child, mark, spec.grace_s)
    note = f"[fractal_runner] ended {len(left)} process(es) that the command left behind: pid {left}\n"
    try:
        fd = os.open(spec.log_file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return  # the task removed its own log; there is nowhere to say it
    try:
        os.write(fd, note.encode())
    finally:
        os.close(fd)


def _run_function(spec: UnitSpec, stop: StopRequest) -> tuple[UnitResult, str | None]:
    result = call_function(spec, stop)
    text: str | None = None
    if result.output is not None:
        try:
            text = _encode(result.output)
        except (TypeError, ValueError, RecursionError) as error:
            reason = f"the value that the function returned is not JSON: {error}"
            result = replace(result, output=None, output_error=reason)
    if not result.succeeded and result.log_tail:
        try:
            fd = os.open(spec.log_file, WRITE_LOG, 0o644)
        except OSError as error:
            return _with_note(result, f"Its log could not be written: {error}."), text
        try:
            os.write(fd, result.log_tail.encode(errors="replace") + b"\n")
        finally:
            os.close(fd)
        result = replace(result, log_tail=_shortened(result.log_tail))
    return result, text


def _shortened(text: str) -> str:
    return text if len(text) <= LOG_TAIL_CHARS else text[-LOG_TAIL_CHARS:]


def _not_started(spec: UnitSpec, reason: str, message: str) -> UnitResult:
    now = time.time()
    return UnitResult(
        key=spec.key,
        digest=spec.digest,
        reason=reason,
        message=message,
        host=processes.node_name(),
        started=now,
        ended=now,
    )


def _not_executed(spec: UnitSpec, word: str, error: OSError, started: float) -> UnitResult:
    """The system refused to start the command: the task's fault if the command is, else the node's."""
    try:  # the child opens the log, and what fails there looks as if the command had
        os.close(os.open(spec.log_file, WRITE_LOG, 0o644))
    except OSError as log_error:
        return _not_started(spec, LAUNCH_FAILED, f"Cannot write the unit's files: {log_error}.")
    if error.errno not in _EXEC_CODES:
        return _not_started(spec, LAUNCH_FAILED, f"Cannot start {word!r}: {error}.")
    if error.errno == errno.ENOENT and os.path.exists(word):
        why = "the interpreter that its first line (#!) names does not exist"
    elif error.errno == errno.ENOEXEC:
        why = "it is neither a binary nor does it begin with #! and an interpreter"
    else:
        why = os.strerror(error.errno)
    return UnitResult(
        key=spec.key,
        digest=spec.digest,
        returncode=_EXEC_CODES[error.errno],
        message=f"{word!r} cannot be executed: {why}.",
        host=processes.node_name(),
        started=started,
        ended=time.time(),
    )


def _record_process(ledger: Ledger, spec: UnitSpec, pid: int, since: int) -> str | None:
    """Record the identity of the unit's process; why it could not be, if so."""
    try:
        ledger.write(process_of(spec, pid, since))
    except OSError as error:
        return f"The unit's process id could not be recorded: {error}."
    return None


def _with_note(result: UnitResult, note: str) -> UnitResult:
    return replace(result, message=f"{result.message} {note}" if result.message else note)


def _environment(spec: UnitSpec) -> Environment:
    """The unit's environment: that of the worker when it met the run, and the unit's mark.

    Kept for the run's next unit in this thread: to copy `os.environ` takes longer than to start a small
    command.
    """
    run, environment = getattr(_local, "environment", (None, None))
    if environment is None or run != (spec.run_id, spec.env):
        added = {os.fsencode(name): os.fsencode(value) for name, value in spec.env}
        environment = Environment({**os.environb, **added}, processes.MARK_VARIABLE.encode())
        _local.environment = (spec.run_id, spec.env), environment
    return environment


def _prepare_files(spec: UnitSpec) -> None:
    """Write the args file, and see to it that there is no out file."""
    data = _encode(spec.args).encode()
    path = spec.args_file
    try:
        fd = os.open(path, _WRITE_NEW | os.O_EXCL, 0o644)
        # Where nothing was but what units have left, and no execution of this one was before, there is no
        # out file. A job that is started again executes its units once more: they find their args file.
        is_clear = spec.is_folder_new
    except FileExistsError:
        fd = os.open(path, _WRITE_NEW | os.O_TRUNC, 0o644)
        is_clear = False
    try:
        written = os.write(fd, data)
        while written < len(data):
            written += os.write(fd, memoryview(data)[written:])
    except OSError as error:
        error.filename = path  # write(2) knows only the descriptor
        raise
    finally:
        os.close(fd)
    if not is_clear:
        with suppress(FileNotFoundError):
            os.unlink(spec.out_file)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")
