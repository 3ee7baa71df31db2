"""What the units of one stage have come to, while they end and once they have.

Kept small per unit: a stage may have a million, and most return nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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

Validated = TaskOutput | list[ComputeItem] | None

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

    def validated(self, raw: Any) -> Validated:
        """What a unit of this stage returned, once it is known to be valid.

        Raises:
            ValueError: if it is not.
        """
        return validate_init_output(raw) if self._lists_items else validate_output(raw)

    def succeed(self, unit: Unit, output: Validated) -> None:
        """Take in a unit that ended well, and its output."""
        if isinstance(output, list):
            self.items = output
        elif output is not None:
            self._outputs[unit.index] = output
        self._ends[unit.index] = _SUCCEEDED
        self.done += 1

    def fail(self, unit: Unit, error: UnitError) -> None:
        self._ends[unit.index] = _FAILED
        self.failures[unit.index] = error

    def image_states(self, selected: Iterable[str]) -> dict[str, bool]:
        """Of the images that the task was given: whether every unit that had it is done."""
        if not self.stage.parallel:  # its one unit had them all
            return dict.fromkeys(selected, self.done == self.count and not self._lists_items)
        states = dict.fromkeys(selected, True)
        for url, end in zip(self._urls, self._ends, strict=True):
            if url in states:
                states[url] = states[url] and end == _SUCCEEDED
        return states

    def units(self) -> Iterator[UnitOutput]:
        """All units in order, as merging sees them; one that did not run is as one that failed."""
        for index, (url, end) in enumerate(zip(self._urls, self._ends, strict=True)):
            yield UnitOutput(url, end == _SUCCEEDED, self._outputs.get(index))
