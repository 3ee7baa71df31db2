"""What all stages of a run have in common."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fractal_runner.worker.stop import StopRequest
from fractal_runner.workflow.events import Event
from fractal_runner.workflow.journal import Journal
from fractal_runner.workflow.warmth import WarmStarts

if TYPE_CHECKING:
    from fractal_runner.executors.registry import Executors


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all stages of a run have in common.

    Attributes:
        run_id: the run.
        epoch: which of its coordinators this is.
        local: its directory, as it is seen from here.
        remote: as the workers see it.
        env: variables for every unit's environment.
        executors: where units run.
        journal: what tells the history.
        logger: is told what people should know.
        emit: brings events to the listener; None if there is none.
        stop: whether the run was told to stop by its directory's file.
        cancelled: set to end the run.
        drain: set to start nothing more.
        is_cancelled_outside: whether the caller of an inline run wants it to end.
        is_inline: the run is executed in its caller's thread.
        stop_at_failure: leave out what has not started once a unit has failed.
        window: how many units may be in flight; None to choose.
        grace_s: seconds between TERM and KILL.
        warm: which units start warm.
    """

    run_id: str
    epoch: int
    local: Path
    remote: str
    env: tuple[tuple[str, str], ...]
    executors: Executors
    journal: Journal
    logger: logging.Logger
    emit: Callable[[Event], None] | None
    stop: StopRequest
    cancelled: threading.Event
    drain: threading.Event
    is_cancelled_outside: Callable[[], bool]
    is_inline: bool
    stop_at_failure: bool
    window: int | None
    grace_s: float
    warm: WarmStarts
