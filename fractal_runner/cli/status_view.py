"""How a run's status looks, once or for as long as the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fractal_runner.cli.locate import INTERRUPTED, LocatedRun
from fractal_runner.cli.status import WAITING, Status, TaskStatus, reason_of, status_of
from fractal_runner.cli.wording import command, first_line, moment, times, unit_title
from fractal_runner.errors import HistoryError
from fractal_runner.history.schema import State
from fractal_runner.quantities import format_time

WATCH_S = 1.0

STYLES = {
    State.DONE: "green",
    State.FAILED: "red",
    State.CANCELLED: "yellow",
    State.RUNNING: "cyan",
    INTERRUPTED: "yellow",
    WAITING: "dim",
}
_COLUMNS = (State.DONE, State.FAILED, State.CANCELLED, State.RUNNING, State.SUBMITTED)


def watch(found: LocatedRun, console: Console, pause: Callable[[float], None] = time.sleep) -> None:
    """Show the status again every second, until the run has ended or Ctrl-C.

    Raises:
        HistoryError: if the history cannot be read at first; later ones are shown, and pass.
    """
    status = status_of(found)
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        live.update(view(status), refresh=True)
        while status.condition.is_running:
            pause(WATCH_S)
            try:
                status = status_of(found)
            except HistoryError as error:
                live.update(Group(Text(str(error), style="red"), "", view(status)), refresh=True)
            else:
                live.update(view(status), refresh=True)


def view(status: Status) -> RenderableType:
    """The status for people: failures first."""
    parts: list[RenderableType] = [*_head(status), ""]
    if status.failures:
        parts += [*_failures(status), ""]
    parts.append(_tasks(status.tasks))
    if status.running:
        parts += ["", *_running(status)]
    return Group(*parts)


def _head(status: Status) -> Iterator[Text]:
    condition, run = status.condition, status.condition.run
    title = Text(f"{first_line(run.workflow_name)} over {first_line(run.dataset_name)}: ", style="bold")
    yield title.append(condition.state, style=STYLES.get(condition.state, ""))
    yield _fact("directory", first_line(str(status.directory)))
    spent = format_time(condition.seconds)
    verb = "for" if condition.is_running else "ended after" if run.ended else "last heard of after"
    resumed = f", resumed {times(run.resumed)}" if run.resumed else ""
    yield _fact("started", f"{moment(run.started)}, {verb} {spent}{resumed}")
    if (who := condition.coordinator) is not None:
        yield _fact("run by", f"process {who.pid} on {who.host}")
    if error := first_line(run.error):
        yield _fact("error", error, "red")
    if condition.state == INTERRUPTED:
        yield _fact("how so", "the process that ran it is gone, and has recorded no end")
    if condition.can_go_on:
        yield _fact("to go on", command("resume", status.directory), "bold")


def _fact(name: str, value: str, style: str = "") -> Text:
    return Text(f"  {name:<9}  ", style="dim").append(value, style=f"not dim {style}")


def _failures(status: Status) -> Iterator[Text]:
    yield Text("Failed units", style="bold red")
    for unit in status.failures:
        yield Text(f"  {reason_of(unit)}")
        if unit.log:
            yield Text(f"    {first_line(str(status.directory / unit.log))}", style="dim")
    if (more := status.count(State.FAILED) - len(status.failures)) > 0:
        yield Text(f"  and {more} more: {command('logs', status.directory, '--failed')}")


def _tasks(tasks: Iterable[TaskStatus]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("task", no_wrap=True, overflow="ellipsis")
    table.add_column("state", no_wrap=True)
    for title in ("units", *_COLUMNS, WAITING):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("start", no_wrap=True)
    for task in tasks:
        cells = [Text(f"{task.position} {first_line(task.name)}")]
        cells.append(Text(task.state, style=STYLES.get(task.state, "")))
        cells.append(_count(task.units))
        cells += [_count(task.counts.get(state, 0), STYLES.get(state, "")) for state in _COLUMNS]
        table.add_row(*cells, _count(task.waiting, STYLES[WAITING]), _starts(task.starts))
    return table


def _starts(starts: Mapping[str, int]) -> str:
    """How the task's commands were started; with numbers, where not all were started alike."""
    if len(starts) == 1:
        return next(iter(starts))
    return ", ".join(f"{count} {start}" for start, count in starts.items())


def _count(count: int | None, style: str = "") -> Text:
    return Text(str(count) if count else "", style=style)


def _running(status: Status) -> Iterator[RenderableType]:
    is_running = status.condition.is_running
    yield Text("Running now" if is_running else "Ran when it was interrupted", style="bold")
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("  unit", no_wrap=True, overflow="ellipsis")
    for title in ("host", "pid"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("since", no_wrap=True)
    for unit in status.running:
        title = unit_title(unit.position, status.name_of(unit.position), unit.stage, unit.number)
        table.add_row(
            Text(f"  {title}"),
            Text(first_line(unit.host)),
            "" if unit.pid is None else str(unit.pid),
            "" if unit.started is None else moment(unit.started),
        )
    yield table
    if (more := status.count(State.RUNNING) - len(status.running)) > 0:
        yield Text(f"  and {more} more")
