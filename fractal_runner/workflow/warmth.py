"""Which units of a run are started warm, and what they have to know for it.

`worker.station` does it, where the units run. Here is who wants it: the caller, and each task's meta.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable
from typing import Literal

from fractal_runner.worker.spec import COLD, UnitResult, WarmStart
from fractal_runner.worker.station import Station
from fractal_runner.worker.targets import recognise
from fractal_runner.workflow.units import Stage, title

WarmMode = Literal["auto", "always", "never"]  # spec.WARM_MODES
TIMEOUT_S = 60.0
MAX_SERVERS = 4
SERVERS_DIR = "fork-servers"  # in the run's directory: what its servers say of themselves

_numbers = itertools.count(1)  # of this process's runs


class WarmStarts:
    """The warm starts of one run. Used by its thread alone.

    Args:
        mode: what the caller wants.
        timeout_s: seconds that imports may take, where a task's meta does not say.
        most: how many servers there may be at a time, here and in each job of a cluster.
        logger: is told why a task starts cold.
    """

    def __init__(self, mode: WarmMode, timeout_s: float, most: int, logger: logging.Logger) -> None:
        self._mode = mode
        self._timeout_s = timeout_s
        self._most = most
        self._logger = logger
        self._station = Station.of(os.getpid(), next(_numbers))

    def terms(self, stage: Stage, count: int, run_dir: str, *, is_local: bool) -> WarmStart | None:
        """How this many units of a stage may be started warm; None for a cold start.

        Args:
            stage: the stage.
            count: how many units it has.
            run_dir: the run's directory, as the workers see it.
            is_local: whether they surely find the same program here.
        """
        mode = self._mode_of(stage)
        if stage.command is None or mode == "never":
            return None
        if count < 2 and mode == "auto":
            return None  # there is nobody to share the imports with
        if is_local and recognise(stage.command) is None:
            return None  # what need not be found out again by each worker
        timeout_s = stage.resources.warm_start_timeout_s or self._timeout_s
        log = f"{run_dir}/{SERVERS_DIR}/{stage.folder}-{stage.name}"
        return WarmStart(
            self._station.directory, self._station.ticks, timeout_s, self._most, mode == "always", log
        )

    def note(self, stage: Stage, results: Iterable[UnitResult], told: set[str]) -> None:
        """Say why units have started cold that were to start warm, each reason once.

        Args:
            stage: whose units they are.
            results: theirs.
            told: the reasons that have been said of it.
        """
        is_wanted = self._mode_of(stage) == "always"
        for result in results:
            why = result.why_cold
            if is_wanted and result.start == COLD and not why:
                why = "Its command does not begin with a Python interpreter and a script or module."
            if why and why not in told:
                told.add(why)
                level = logging.WARNING if is_wanted else logging.INFO
                self._logger.log(level, "%s starts cold: %s", title(stage.task), why)

    def end_servers(self) -> None:
        """The units of a stage have ended."""
        self._station.end_servers()

    def close(self) -> None:
        """The run has ended."""
        self._station.remove()

    def _mode_of(self, stage: Stage) -> WarmMode:
        """What the caller and the task want together: "never" is for safety, and holds whoever says it."""
        wishes = (self._mode, stage.resources.warm_start)
        return next((mode for mode in ("never", "always") if mode in wishes), "auto")
