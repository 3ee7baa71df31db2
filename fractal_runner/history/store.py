"""`History`: one database of runs, opened once and used by any number of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self

from fractal_runner.history.database import PATIENCE_S, Database, without_password
from fractal_runner.history.reading import HistoryReader
from fractal_runner.history.writing import RunWriter

FILE_NAME = "history.sqlite"


class History:
    """The record of runs in a database.

    Args:
        url: an SQLAlchemy URL ("postgresql+psycopg://user@host/name"), or the path of a SQLite file. Its
            tables are made if need be.
        patience_s: seconds for which a database that has gone away in mid-run is waited for.
        read_only: change nothing: an older history is read as it is, with NULL for what came later, and
            a database that is not there, or without tables, is an error.
        options: `at_commit` and `sleep` of the database, for tests.

    Raises:
        HistoryError: if it cannot be opened, or a newer version wrote it.
        ValueError: if the URL is not one, or its driver is not installed.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        patience_s: float = PATIENCE_S,
        read_only: bool = False,
        **options: Any,
    ) -> None:
        self._database = Database(url, create=not read_only, patience_s=patience_s, **options)
        self.read = HistoryReader(self._database)

    @property
    def name(self) -> str:
        """What it is called in messages: a path, or a URL without its password."""
        return self._database.name

    @property
    def url(self) -> str:
        """Its SQLAlchemy URL, without a password."""
        return without_password(self._database.url)

    def check(self) -> None:
        """Whether it is whole, as far as that can be told.

        Raises:
            HistoryError: if it is not.
        """
        self._database.check()

    def writer(self, run_id: str, *, give_up: Callable[[], bool] = lambda: False) -> RunWriter:
        """What writes of one run."""
        return RunWriter(self._database, run_id, give_up=give_up)

    def close(self) -> None:
        """Let go of its connections."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
