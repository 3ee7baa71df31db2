"""`fractal-runner clean`: drop the files of units that have succeeded.

Their results are in the history, so a run can be resumed as well as before. What failed keeps its files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from fractal_runner.cli.locate import LocatedRun
from fractal_runner.errors import HistoryError, RunBusyError
from fractal_runner.history.directory import DirectoryLock
from fractal_runner.history.schema import State

_LOG = "-log.txt"
_ENDINGS = ("-args.json", "-metadiff.json", _LOG)
_unit = attrgetter("position", "stage", "number")


@dataclass(slots=True)
class Freed:
    """What was removed, or would be.

    Attributes:
        files: how many files.
        bytes: how much they held.
        problems: why others could not be removed, a sentence each.
    """

    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def clean_run(found: LocatedRun, *, dry_run: bool) -> Freed:
    """Remove the files of units that have succeeded, those of their failed attempts as well.

    Args:
        found: the run.
        dry_run: only tell what would be removed.

    Raises:
        RunBusyError: if a coordinator is at work on the run.
        HistoryError: if the history cannot be read, or the directory cannot be written.
    """
    try:
        lock = DirectoryLock(found.directory)
    except OSError as error:
        raise HistoryError(f"{found.directory} cannot be cleaned: {error.strerror}.") from error
    try:
        # On this host the lock has told that nobody is at work; it may not reach to others.
        if (who := found.condition().coordinator) is not None:
            raise RunBusyError(
                f"{found.directory} is in use: process {who.pid} on {who.host} is at work on its run.",
                host=who.host,
                pid=who.pid,
            )
        return _Sweep(found.directory, dry_run=dry_run).run(found)
    finally:
        lock.release()


class _Sweep:
    """One pass over a run's directory."""

    def __init__(self, directory: Path, *, dry_run: bool) -> None:
        self._root = Path(os.path.realpath(directory))
        self._dry_run = dry_run
        self._freed = Freed()
        self._folders: dict[str, Path | None] = {}  # by name; None for those outside of the directory

    def run(self, found: LocatedRun) -> Freed:
        for log in _logs_of_successes(found):
            folder, _, name = log.rpartition("/")
            place = self._folder(folder)
            prefix = name.removesuffix(_LOG)
            if place is not None and prefix and prefix != name:
                for ending in _ENDINGS:
                    self._remove(place / f"{prefix}{ending}")
        if not self._dry_run:
            self._remove_empty_folders()
        return self._freed

    def _folder(self, name: str) -> Path | None:
        """A folder of units, if it is one below the directory, and no link on the way leads out of it."""
        if name not in self._folders:
            place = Path(os.path.realpath(self._root / name))
            inside = place != self._root and place.is_relative_to(self._root)
            self._folders[name] = place if inside else None
        return self._folders[name]

    def _remove(self, path: Path) -> None:
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                return  # not what a unit has left
            if not self._dry_run:
                path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            self._freed.problems.append(f"{path}: {error.strerror}")
            return
        self._freed.files += 1
        self._freed.bytes += status.st_size

    def _remove_empty_folders(self) -> None:
        folders = {folder for folder in self._folders.values() if folder is not None}
        parents = {parent for folder in folders for parent in folder.parents if self._is_below(parent)}
        for folder in sorted(folders | parents, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it is not empty, or not ours
                folder.rmdir()

    def _is_below(self, path: Path) -> bool:
        return path != self._root and path.is_relative_to(self._root)


def _logs_of_successes(found: LocatedRun) -> Iterator[str]:
    """The logs of all attempts at units whose last one has succeeded."""
    for _, attempts in groupby(found.reader.unit_logs(found.run_id, last_only=False), _unit):
        rows = list(attempts)
        if any(row.is_last and row.state == State.DONE for row in rows):
            yield from (row.log for row in rows if row.log)
