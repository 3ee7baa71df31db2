"""What a benchmark says: progress while it runs, tables and targets at its end, JSON for later."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks._scratch import file_system

median = statistics.median


def say(text: str) -> None:
    """Progress, to stderr."""
    print(f"[{datetime.now().astimezone():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def alternate(
    repetitions: int, measures: Mapping[str, Callable[[], dict[str, Any]]], label: str
) -> dict[str, list[dict[str, Any]]]:
    """Take each measure `repetitions` times, in turns, each turn in the other order than the last.

    What the machine does meanwhile befalls all of them alike.

    Returns:
        The figures of each measure, one dict per repetition.
    """
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
    for repetition in range(repetitions):
        names = list(measures) if repetition % 2 == 0 else list(reversed(measures))
        for name in names:
            taken[name].append(measures[name]())
        last = ", ".join(f"{name} {taken[name][-1].get('seconds', 0):.3g} s" for name in measures)
        say(f"{label}, {repetition + 1}/{repetitions}: {last}")
    return taken


def medians(figures: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median of one figure over the repetitions."""
    return float(median([figure[key] for figure in figures]))


def ratio(
    ours: Sequence[Mapping[str, Any]], yardstick: Sequence[Mapping[str, Any]], key: str = "seconds"
) -> float:
    """The median of the ratios of neighbouring repetitions: steadier than the ratio of medians."""
    return float(median([a[key] / b[key] for a, b in zip(ours, yardstick, strict=True)]))


def spread(
    ours: Sequence[Mapping[str, Any]], yardstick: Sequence[Mapping[str, Any]], key: str = "seconds"
) -> str:
    """The least and the largest ratio, for the table."""
    ratios = [a[key] / b[key] for a, b in zip(ours, yardstick, strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def mb(size: float) -> str:
    """Bytes as MB (10^6), for the table."""
    return f"{size / 1e6:,.0f} MB"


def seconds(value: float) -> str:
    """Seconds with three digits in their natural unit, for the table."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        scaled = value * factor
        if scaled >= 1:
            return f"{scaled:,.3g} {unit}" if scaled < 1000 else f"{scaled:,.0f} {unit}"
    return f"{value * 1e6:.2f} µs"


@dataclass(frozen=True, slots=True)
class Table:
    """A table as it is printed."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure should be, and is."""

    what: str
    wanted: str
    measured: str
    met: bool


class Report:
    """One benchmark's results, collected while it runs.

    Attributes:
        figures: the raw figures, by name; JSON values.
        tables: what is printed.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.title = title
        self.figures: dict[str, Any] = {}
        self.tables: list[Table] = []
        self._targets: list[Target] = []
        self._notes: list[str] = []
        self._file_systems: dict[str, str] = {}
        self._began = datetime.now(UTC)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.tables.append(Table(title, columns, rows))

    def at_most(self, what: str, limit: float, value: float, unit: str = "") -> None:
        """A target: `value` should be at most `limit`."""
        self._target(what, "≤", limit, (value, unit), value <= limit)

    def at_least(self, what: str, limit: float, value: float, unit: str = "") -> None:
        """A target: `value` should be at least `limit`."""
        self._target(what, "≥", limit, (value, unit), value >= limit)

    def note(self, text: str) -> None:
        """What a reader of the tables should know."""
        self._notes.append(text)

    def uses(self, directory: Path) -> str:
        """Record the file system that a benchmark works on; its type."""
        kind = file_system(directory)
        self._file_systems[str(directory)] = kind
        return kind

    def print(self) -> None:
        """Print everything to stdout."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable

        # A pipe has no width; a table cut at 80 columns loses its figures.
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(f"\n[bold]{self.name}[/]: {escape(self.title)}")
        console.print(f"  {escape(self._circumstances())}")
        for table in self.tables:
            rich = RichTable(title=escape(table.title), title_justify="left")
            for position, column in enumerate(table.columns):
                rich.add_column(escape(column), justify="left" if position == 0 else "right")
            for row in table.rows:
                rich.add_row(*map(escape, row))
            console.print(rich)
        for note in self._notes:
            console.print(f"  {escape(note)}")
        for target in self._targets:
            word = "[green]met[/]" if target.met else "[red]missed[/]"
            console.print(f"  target {word}: {target.what}: {target.measured} (wanted {target.wanted})")

    def write(self, directory: Path) -> Path:
        """Write everything as JSON; the file's path."""
        path = directory / f"{self.name}.json"
        content = {
            "benchmark": self.name,
            "date": self._began.isoformat(timespec="seconds"),
            "machine": {**machine(), "file_systems": self._file_systems},
            "versions": versions(),
            "targets": [asdict(target) for target in self._targets],
            "notes": self._notes,
            "tables": [asdict(table) for table in self.tables],
            "figures": self.figures,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def _circumstances(self) -> str:
        """When, where and with what, in a line."""
        here, known = machine(), versions()
        own = {name: known[name] for name in ("python", "fractal_runner")} | self.figures.get("versions", {})
        return ", ".join(
            [
                f"{self._began:%Y-%m-%d %H:%M} UTC",
                f"{here['cpu']}, {here['cores']} cores, load {here['load_average'][0]:.1f}",
                *(f"{name} {number}" for name, number in own.items()),
            ]
        )

    def _target(self, what: str, sign: str, limit: float, figure: tuple[float, str], met: bool) -> None:
        value, unit = figure
        unit = f" {unit}" if unit else ""
        digits = ",.0f" if value >= 100 else ".3g"
        self._targets.append(Target(what, f"{sign} {limit:,g}{unit}", f"{value:{digits}}{unit}", met))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg(),
    }


def versions() -> dict[str, str]:
    """The versions that matter to the figures."""
    from importlib.metadata import version

    import fractal_runner

    return {
        "python": platform.python_version(),
        "fractal_runner": fractal_runner.__version__,
        **{name: version(name) for name in ("pydantic", "loky", "labtech", "daglite")},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
