"""What a run shows while it goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fractal_runner.quantities import format_size, format_time
from fractal_runner.workflow.events import Event, RunningUnit, TaskFinished, TaskProgress, TaskStarted

_LINE_EVERY_S = 10.0


class Display(AbstractContextManager["Display"], Protocol):
    """Shows events; entered before the run and left after it."""

    def show(self, event: Event) -> None: ...


def display_for(console: Console) -> Display:
    """Bars if the console is a terminal, lines if not."""
    return _Bars(console) if console.is_terminal else _Lines(console)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="cyan")


class _Bars:
    """One bar per command of a task: done, failed, running, rate, time left; below, what runs now."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[red]{task.fields[failed]}[/red]"),
            TextColumn("{task.fields[running]}"),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._bars: dict[tuple[int, str], TaskID] = {}
        self._live = Live(self._progress, console=console, refresh_per_second=5)

    def __enter__(self) -> _Bars:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.update(self._progress)
        self._live.stop()

    def show(self, event: Event) -> None:
        if not isinstance(event, TaskProgress):
            return
        key = event.order, event.stage
        if key not in self._bars:
            name = f"{event.order} {escape(event.task_name)}"
            if event.stage == "non_par":
                name += " [dim](once)[/dim]"
            self._bars[key] = self._progress.add_task(name, total=event.units, failed="", running="")
        self._progress.update(
            self._bars[key],
            completed=event.done + event.failed,
            failed=f"{event.failed} failed" if event.failed else "",
            running=f"{event.running} running" if event.running else "",
        )
        room = max(0, self._console.height - len(self._bars) - 4)
        units = event.units_running[:room]
        self._live.update(Group(self._progress, _table_of(units)) if units else self._progress)


def _table_of(units: Sequence[RunningUnit]) -> Table:
    """What runs now, a line each."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("  running", overflow="ellipsis", no_wrap=True)
    for title in ("host", "pid", "time", "CPU", "memory"):
        table.add_column(title, justify="right", no_wrap=True)
    for unit in units:
        table.add_row(
            f"  {escape(unit.name)}",
            escape(unit.host or ""),
            "" if unit.pid is None else str(unit.pid),
            format_time(unit.seconds),
            "" if unit.cpu is None else f"{unit.cpu:.0f} %",
            "" if unit.memory is None else format_size(unit.memory),
        )
    return table


class _Lines:
    """A line when a task begins and ends, and one now and then in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0.0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def show(self, event: Event) -> None:
        if isinstance(event, TaskStarted):
            with_images = "" if event.images is None else f" with {event.images} image(s)"
            self._say(f"{event.order} {event.task_name}: begins{with_images}")
            self._next = time.monotonic() + _LINE_EVERY_S
        elif isinstance(event, TaskProgress) and time.monotonic() >= self._next:
            failed = f", {event.failed} failed" if event.failed else ""
            self._say(
                f"{event.order} {event.task_name}: {event.done} of {event.units} unit(s) done{failed}, "
                f"{event.running} running"
            )
            self._next = time.monotonic() + _LINE_EVERY_S
        elif isinstance(event, TaskFinished):
            ended = "done" if event.succeeded else "failed"
            self._say(
                f"{event.order} {event.task_name}: {ended} after {format_time(event.seconds)}; "
                f"the dataset has {event.images} image(s)"
            )

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
