"""`fractal-runner cancel`: end a run from another terminal, and wait for its end.

The run's own coordinator does the work. It is asked by a file in the run's directory, which its units see
as well, on whatever host they run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fractal_runner.cli.locate import INTERRUPTED, Condition, LocatedRun
from fractal_runner.cli.wording import command, first_line
from fractal_runner.errors import HistoryError
from fractal_runner.history.schema import State
from fractal_runner.quantities import format_time
from fractal_runner.worker.stop import SHUTDOWN_FILE, ask_to_stop

EXIT_NOBODY = 2
EXIT_TIMEOUT = 3

_POLL_S = 0.2


def cancel_run(
    found: LocatedRun,
    *,
    timeout_s: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Ask for the run's end, and wait for it; the exit code.

    Args:
        found: the run.
        timeout_s: how long to wait, in seconds.
        say: told what happens, in sentences.
        clock: seconds.
        pause: how to wait.

    Raises:
        HistoryError: if the history cannot be read at first, or nothing can be written in the directory.
    """
    began = clock()
    before = found.condition()
    if before.coordinator is None:
        how = "It was interrupted" if before.state == INTERRUPTED else f"It has ended: {before.state}"
        if before.state == INTERRUPTED:
            _ask(found)
            how += ", and what it has left running, on a cluster for one, is told to end"
        say(f"Nobody is at work on the run in {found.directory}. {how}.{_to_go_on(found, before)}")
        return EXIT_NOBODY
    who = before.coordinator
    _ask(found)
    say(f"Process {who.pid} on {who.host} was asked to end the run.")
    unknown: HistoryError | None = None
    while True:
        pause(_POLL_S)
        try:
            now = found.condition()
        except HistoryError as error:  # its database may come back
            unknown = error
        else:
            unknown = None
            if not now.is_running or now.epoch != before.epoch:
                say(_how_it_ended(found, now, clock() - began))
                return 0
            _ask(found)  # a resume that was just beginning takes away what it finds
        if clock() - began >= timeout_s:
            why = f": {unknown}" if unknown is not None else "."
            say(
                f"The run has not ended within {format_time(timeout_s)}{why} It remains asked to "
                f"({found.directory / SHUTDOWN_FILE}); see {command('status', found.directory)}"
            )
            return EXIT_TIMEOUT


def _ask(found: LocatedRun) -> None:
    path: Path = found.directory / SHUTDOWN_FILE
    if path.exists():
        return
    try:
        ask_to_stop(found.run_id, str(found.directory))
    except OSError as error:
        raise HistoryError(f"{path} cannot be written, which would end the run: {error.strerror}.") from error


def _how_it_ended(found: LocatedRun, now: Condition, seconds: float) -> str:
    after = f"after {format_time(seconds)}"
    if now.coordinator is not None:
        return f"Process {now.coordinator.pid} on {now.coordinator.host} has taken the run over meanwhile."
    if now.state == State.DONE:
        return f"The run came to its end {after}: it is done."
    if now.state == State.CANCELLED:
        return f"The run was cancelled {after}.{_to_go_on(found, now)}"
    if now.state == INTERRUPTED:
        return f"The process that ran it is gone {after}, without recording an end.{_to_go_on(found, now)}"
    return f"The run failed {after}: {first_line(now.run.error)}{_to_go_on(found, now)}"


def _to_go_on(found: LocatedRun, now: Condition) -> str:
    return f" To go on: {command('resume', found.directory)}" if now.can_go_on else ""
