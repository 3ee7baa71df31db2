"""`fractal-runner list`: one line a run, of directories or of a whole database."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fractal_runner.cli.locate import (
    Condition,
    LocatedRun,
    condition_of,
    expect_run,
    holds_run,
    open_history,
    whereabouts,
)
from fractal_runner.cli.wording import first_line, moment
from fractal_runner.errors import HistoryError
from fractal_runner.history.store import History
from fractal_runner.quantities import format_time

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_PARENT = Path("fractal_runs")
UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the list.

    Attributes:
        directory: the run's.
        condition: of the run; None if its history cannot be read.
        done: how many of its tasks are.
        problem: why it cannot be read.
    """

    directory: str
    condition: Condition | None
    done: int = 0
    problem: str = ""


def runs_of_database(url: str) -> list[Entry]:
    """All runs of a database, the latest first.

    Raises:
        HistoryError: if it cannot be read.
    """
    with open_history(url) as history:
        done = history.read.tasks_done()
        return [
            Entry(run.directory, condition_of(history.read, run), done.get(run.id, 0))
            for run in history.read.runs()
        ]


def runs_of_directories(directories: Iterable[Path], url: str | None) -> list[Entry]:
    """The runs of directories, the latest first, those that cannot be read last.

    Args:
        directories: each holds a run, or directories that do.
        url: where the histories are, if not where the directories say.
    """
    with ExitStack() as stack:
        histories = _Histories(stack)
        found = [
            _entry(run, url, histories) for directory in directories for run in directories_of_runs(directory)
        ]
    return sorted(found, key=lambda entry: -(entry.condition.run.started if entry.condition else 0.0))


def directories_of_runs(directory: Path) -> Sequence[Path]:
    """This directory, if it holds a run; or those right below it that do."""
    if holds_run(directory):
        return [directory]
    try:
        below = sorted(directory.iterdir())
    except OSError:  # there is no such directory, or it is not ours to look into
        return []
    return [path for path in below if path.is_dir() and holds_run(path)]


def table_of(entries: Iterable[Entry]) -> Table:
    """The list for people."""
    from rich.table import Table
    from rich.text import Text

    from fractal_runner.cli.status_view import STYLES

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("directory", "state", "workflow", "dataset", "tasks", "started", "took"):
        table.add_column(title, no_wrap=True, justify="right" if title in ("tasks", "took") else "left")
    table.add_column("error", no_wrap=True, overflow="ellipsis")
    for entry in entries:
        directory = Text(first_line(entry.directory))
        if entry.condition is None:
            problem = Text(first_line(entry.problem))
            table.add_row(directory, Text(UNREADABLE, style="red"), *[""] * 5, problem)
            continue
        run, state = entry.condition.run, entry.condition.state
        table.add_row(
            directory,
            Text(state, style=STYLES.get(state, "")),
            Text(first_line(run.workflow_name)),
            Text(first_line(run.dataset_name)),
            f"{entry.done}/{run.last_task - run.first_task + 1}",
            moment(run.started),
            format_time(entry.condition.seconds),
            Text(first_line(run.error)),
        )
    return table


class _Histories:
    """Opens each server's database once, and waits for one that is away once; files one after the other."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._servers: dict[str, History | HistoryError] = {}

    @contextmanager
    def open(self, url: str) -> Iterator[History]:
        if "://" not in url:
            with open_history(url) as history:
                yield history
            return
        if url not in self._servers:
            try:
                self._servers[url] = self._stack.enter_context(open_history(url))
            except HistoryError as error:
                self._servers[url] = error
        found = self._servers[url]
        if isinstance(found, HistoryError):
            raise HistoryError(str(found))
        yield found


def _entry(directory: Path, url: str | None, histories: _Histories) -> Entry:
    try:
        run_id, where = whereabouts(directory, url)
        with histories.open(where) as history:
            run_id = expect_run(history.read, directory, run_id, history.name)
            found = LocatedRun(directory, history, run_id)
            return Entry(str(directory), found.condition(), history.read.tasks_done(run_id).get(run_id, 0))
    except HistoryError as error:
        return Entry(str(directory), None, problem=str(error))
