"""`fractal-runner run --dry-run`: what executors would make of a run's units, with nothing made of them.

A batch executor's arrays are packed, and its scheduler's script is made, by what does so when they are
submitted; here that is where it ends.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from fractal_runner.cli.wording import row
from fractal_runner.errors import ExecutorError, InputFileError
from fractal_runner.executors import registry
from fractal_runner.executors.batch.scheduler import SchedulerError
from fractal_runner.executors.preview import ArrayPreview, Preview
from fractal_runner.quantities import format_size, format_time
from fractal_runner.workflow.dispatch import PACKING_WINDOW
from fractal_runner.workflow.opening import expect_no_run
from fractal_runner.workflow.units import Stage, title

if TYPE_CHECKING:
    from fractal_runner.cli.check import Findings

SCRIPT_BEGINS, SCRIPT_ENDS = "----- script of ", "----- end of the script of "


class DryRun:
    """Tells of each stage what its executor would make of its units.

    Args:
        directory: the run's, from the root on. Nothing is written there, and it is not made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._executors: registry.Executors
        self._findings: Findings
        self._judged: set[str] = set()  # executors of which it is known whether they can be used here

    def begin(self, executors: registry.Executors, findings: Findings) -> None:
        """Take what the questions are about.

        Args:
            executors: the run's; none of them is made.
            findings: where mistakes and warnings are noted.
        """
        self._executors = executors
        self._findings = findings
        findings.attempt(expect_no_run, self.directory)

    def told(self, stage: Stage, images: int | None, images_known: str) -> Iterator[str]:
        """What the executor of a stage would make of its units, as lines.

        Args:
            stage: the stage.
            images: how many images its task gets; None if that is not known yet.
            images_known: the same in words.
        """
        count, unknown = _units(stage, images, images_known)
        name = stage.resources.executor or self._executors.default
        is_known, found = self._preview(stage, name, 1 if count is None else count)
        if not is_known or count == 0:
            return
        where = "" if stage.parallel else " (once)"
        yield row(f"executor{where}", name)
        if found is None:
            yield row(f"packing{where}", "known once there is an executor: it places each unit by itself")
            return
        if unknown:
            yield row(f"for one unit{where}", unknown)
        for reason in found.reduced:
            self._warn(f"{title(stage.task)}: {reason}: its units get what there is")
        if not found.arrays:
            how_many = "units" if count is None else _count(count, "unit")
            yield row(f"slots{where}", f"{how_many}, {found.slots} at a time")
            yield row(f"each unit{where}", _needs(found.cpus, found.memory, found.gpus))
            return
        if found.calls < (count or 0):
            yield row(f"at first{where}", f"{_count(found.calls, 'unit')}; the others as these end")
        if found.workers_of:
            most = _count(found.slots, "worker")
            yield row(f"packing{where}", f"the pool's: each of up to {most} takes one unit at a time")
            yield row(f"each unit{where}", _needs(found.cpus, found.memory, found.gpus))
        yield from _arrays(found, where)
        yield from _scripts(stage, found.arrays, where)

    def _preview(self, stage: Stage, name: str, count: int) -> tuple[bool, Preview | None]:
        """Whether it could be asked, and the answer; what is wrong is noted."""
        wanted = stage.resources
        half = "parallel" if stage.parallel else "non_parallel"
        found: list[Preview | None] = []
        try:
            self._judge(name)
        except ValueError as error:  # there is none of this name
            self._blame([str(error)])
            return False, None
        try:
            for retry in range(wanted.variants):  # further attempts may ask for what is not there
                at_once = min(count, PACKING_WINDOW) if retry == 0 else 1  # as many as a run submits ahead
                found.append(self._executors.preview(max(at_once, 1), wanted.executor, **wanted.asked(retry)))
        except InputFileError as error:
            self._blame(error.problems)
        except (TypeError, ValueError) as error:
            self._blame([f"{title(stage.task)}: meta_{half}: {error}"])
        except (ExecutorError, ImportError, OSError, SchedulerError) as error:
            self._blame([f"{title(stage.task)}: the executor {name!r}: {error}"])
        else:
            return True, found[0]
        return False, None

    def _judge(self, name: str) -> None:
        """Say once if an executor cannot be used here; what it would do elsewhere is told all the same."""
        if name in self._judged:
            return
        self._judged.add(name)
        if (problem := self._executors.unusable(name)) is not None:
            self._warn(f"the executor {name!r} cannot be used here: {problem}")

    def _blame(self, mistakes: Iterable[str]) -> None:
        known = self._findings.mistakes
        known += [mistake for mistake in mistakes if mistake not in known]  # one executor has many stages

    def _warn(self, warning: str) -> None:
        if warning not in self._findings.warnings:
            self._findings.warnings.append(warning)


def _units(stage: Stage, images: int | None, images_known: str) -> tuple[int | None, str]:
    """How many units a stage has; None if that is not known yet, with the reason."""
    if not stage.parallel:
        return 1, ""
    if stage.task.task.is_compound:
        return None, "how many there are, its first command lists only when it runs"
    if images is None:
        return None, f"how many there are is {images_known}"
    return images, ""


def _needs(cpus: int, memory: int | None, gpus: int) -> str:
    sizes = [_count(cpus, "CPU"), "" if memory is None else format_size(memory)]
    return ", ".join(filter(None, [*sizes, _count(gpus, "GPU") if gpus else ""]))


def _arrays(found: Preview, where: str) -> Iterator[str]:
    """What goes into which arrays: a line for those that are alike."""
    what = "worker" if found.workers_of else "unit"
    for key, alike in groupby(found.arrays, key=_shape):
        some = list(alike)
        jobs, calls, each, at_a_time = key
        yield row(
            f"packing{where}" if what == "unit" else f"workers{where}",
            f"{_count(len(some) * calls, what)} in {_count(len(some), 'array')} of {_count(jobs, 'job')}: "
            f"{_count(each, what)} per job, {at_a_time} at a time",
        )
        one = some[0]
        defaults = [name for name, said in (("memory", one.memory), ("time", one.time)) if said is None]
        parts = [_needs(one.cpus, one.memory, one.gpus)]
        parts += [] if one.time is None else [format_time(one.time)]
        parts += [f"the scheduler's default of {' and '.join(defaults)}"] if defaults else []
        yield row(f"each job{where}", ", ".join(parts))
    if found.waiting:
        yield row(f"waiting{where}", f"{_count(found.waiting, 'unit')}, until these have made room")


def _shape(array: ArrayPreview) -> tuple[int, int, int, int]:
    return array.jobs, array.calls, array.calls_per_job, array.calls_at_a_time


def _scripts(stage: Stage, arrays: Sequence[ArrayPreview], where: str) -> Iterator[str]:
    """The scripts, each once, as they are handed over but for the array's name."""
    whose = f"{stage.task.order} {stage.task.task.name}{where}"
    told = [array.handover for array in arrays]
    if None in told:
        yield row(f"script{where}", "the scheduler does not tell")
    different = list(dict.fromkeys(one for one in told if one is not None))
    for number, one in enumerate(different, 1):
        name = whose if len(different) == 1 else f"{whose}, {number} of {len(different)}"
        yield row(f"by{where}", shlex.join(one.command))
        if one.stdin:
            yield row(f"which reads{where}", one.stdin.rstrip("\n"))
        yield f"{SCRIPT_BEGINS}{name}"
        yield one.script.removesuffix("\n")
        yield f"{SCRIPT_ENDS}{name}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
