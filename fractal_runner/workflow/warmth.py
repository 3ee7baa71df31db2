"""Which units of a run are started warm, and what they have to know for it.

`worker.station` does it, where the units run. Here is who wants it: the caller, and each task's meta.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable
from typing import Literal

from fractal_runner.worker.spec import COLD, Ahead, UnitResult, WarmStart
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
        self._next: dict[Stage, Stage] = {}

    def follow(self, stages: Iterable[Stage]) -> None:
        """Learn in which order the run's stages come."""
        self._next = dict(itertools.pairwise(stages))

    def terms(
        self, stage: Stage, count: int, run_dir: str, *, is_local: bool, keeps_workers: bool
    ) -> WarmStart | None:
        """How this many units of a stage may be started warm; None for a cold start.

        Args:
            stage: the stage.
            count: how many units it has.
            run_dir: the run's directory, as the workers see it.
            is_local: whether they surely find the same program here.
            keeps_workers: whether the processes that start them stay for the next stage.
        """
        mode = self._mode_of(stage)
        if stage.command is None or mode == "never":
            return None
        if count < 2 and mode == "auto":
            return None  # there is nobody to share the imports with
        if is_local and recognise(stage.command) is None:
            return None  # what need not be found out again by each worker
        return WarmStart(
            stage=_name_of(stage),
            station=self._station.directory,
            ticks=self._station.ticks,
            timeout_s=self._timeout_of(stage),
            most=self._most,
            even_single=mode == "always",
            log=_log_of(stage, run_dir),
            ahead=self._ahead(stage, run_dir) if is_local and keeps_workers else None,
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

    def end_servers(self, stage: Stage) -> None:
        """The units of a stage have ended."""
        following = self._next.get(stage)
        self._station.end_servers(keep="" if following is None else _name_of(following))

    def close(self) -> None:
        """The run has ended."""
        self._station.remove()

    def _ahead(self, stage: Stage, run_dir: str) -> Ahead | None:
        """The next stage, if its units will probably want a server, in the same environment as these."""
        following = self._next.get(stage)
        if following is None or following.command is None or not following.parallel:
            return None
        ours, theirs = stage.resources, following.resources
        is_alike = (ours.executor, ours.cpus) == (theirs.executor, theirs.cpus)
        if not is_alike or self._mode_of(following) == "never":
            return None
        return Ahead(
            following.command, _name_of(following), self._timeout_of(following), _log_of(following, run_dir)
        )

    def _timeout_of(self, stage: Stage) -> float:
        return stage.resources.warm_start_timeout_s or self._timeout_s

    def _mode_of(self, stage: Stage) -> WarmMode:
        """What the caller and the task want together: "never" is for safety, and holds whoever says it."""
        wishes = (self._mode, stage.resources.warm_start)
        return next((mode for mode in ("never", "always") if mode in wishes), "auto")


def _name_of(stage: Stage) -> str:
    return f"{stage.folder}-{stage.name}"


def _log_of(stage: Stage, run_dir: str) -> str:
    return f"{run_dir}/{SERVERS_DIR}/{_name_of(stage)}"
