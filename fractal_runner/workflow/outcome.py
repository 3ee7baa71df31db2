"""What the units of one stage have come to, while they end and once they have.

Kept small per unit: a stage may have a million, and most return nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fractal_runner.workflow.failures import UnitError
from fractal_runner.workflow.outputs import (
    ComputeItem,
    TaskOutput,
    UnitOutput,
    validate_init_output,
    validate_output,
)
from fractal_runner.workflow.units import Stage, Unit

_SUCCEEDED, _FAILED = 1, 2


class Outcome:
    """The ends of a stage's units, in whatever order they come.

    Args:
        stage: the stage.
        urls: the zarr_url of each of its units, by index.

    Attributes:
        failures: the errors of failed units, by index.
        items: what the init unit of a compound task listed.
        stopped: the run was told to stop before all units had ended.
        done: how many units succeeded.
    """

    def __init__(self, stage: Stage, urls: Sequence[str | None]) -> None:
        self.stage = stage
        self.count = len(urls)
        self.failures: dict[int, UnitError] = {}
        self.items: list[ComputeItem] = []
        self.stopped = False
        self.done = 0
        self._urls = urls
        self._ends = bytearray(self.count)
        self._outputs: dict[int, TaskOutput] = {}
        self._lists_items = stage.task.task.is_compound and not stage.parallel

    def succeed(self, unit: Unit, raw: Any) -> None:
        """Take in the output of a unit that ended well.

        Raises:
            ValueError: if the output is not valid; the unit has not succeeded then.
        """
        if self._lists_items:
            self.items = validate_init_output(raw)
        elif (output := validate_output(raw)) is not None:
            self._outputs[unit.index] = output
        self._ends[unit.index] = _SUCCEEDED
        self.done += 1

    def fail(self, unit: Unit, error: UnitError) -> None:
        self._ends[unit.index] = _FAILED
        self.failures[unit.index] = error

    def units(self) -> Iterator[UnitOutput]:
        """All units in order, as merging sees them; one that did not run is as one that failed."""
        for index, (url, end) in enumerate(zip(self._urls, self._ends, strict=True)):
            yield UnitOutput(url, end == _SUCCEEDED, self._outputs.get(index))
