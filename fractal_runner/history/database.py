"""Where a history lies: a SQLite file beside the run, or any database that SQLAlchemy knows.

Here is what differs between them: how they are opened, which of their errors pass by themselves, and
what the others mean. What is written is `writing`'s affair.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Table, bindparam, create_engine, delete, event, insert
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import NullPool

from fractal_runner.errors import HistoryError
from fractal_runner.filesystems import is_shared
from fractal_runner.history import schema

T = TypeVar("T")

PATIENCE_S = 120.0

_PAUSES_S = (0.1, 0.2, 0.5, 1.0)
_BUSY_S = 10.0
_VALUES = " VALUES "
_PASSWORD = re.compile(r"(://[^/@:]*:).*(?=@)|((?:ssl)?password=)[^&]*")  # in what need not be a URL
# A host that is gone without a word is noticed in half a minute, not in the kernel's two hours
# (postgresql.org, "libpq: parameter key words").
_LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_SECRETS = ("password", "sslpassword", "odbc_connect")  # libpq takes its parameters from a URL's query, too
_ROWS_AT_A_TIME = (256, 32, 4, 1)  # times a unit's columns: within SQLite's 32,766 parameters
# The pool's own is what waiters get when all connections are busy with a database that has gone away.
_TROUBLE = (DBAPIError, sqlite3.Error, PoolTimeoutError, UnicodeError)
_logger = logging.getLogger("fractal_runner")
# What SQLite (sqlite.org/rescode.html) and libpq say when waiting does not help, and what that means.
_LASTING = (
    ("disk is full", "the disk is full"),
    ("readonly database", "it can be read, but not written"),
    ("unable to open", "it cannot be opened: its directory, or its permissions, do not allow it"),
    ("malformed", "it is damaged (a copy from a backup may replace it)"),
    ("not a database", "it is no SQLite database, or a damaged one (a copy from a backup may replace it)"),
    ("disk I/O error", "its disk does not work, or is full"),
    ("no password supplied", "it wants a password: give its whole URL, or set PGPASSWORD or ~/.pgpass"),
    ("password authentication failed", "it does not take this password"),
)
# What drivers say when the database, or the way to it, is away for a while, or another one writes.
_PASSING = (
    *("locked", "connection", "could not connect", "starting up", "shutting down", "terminating"),
    *("server closed", "timeout", "timed out", "recovery mode", "deadlock", "serialize", "broken pipe"),
)


class Database:
    """A database with the history's tables.

    Args:
        url: an SQLAlchemy URL ("postgresql+psycopg://user@host/name"), or the path of a SQLite file.
        create: make the tables, or bring older ones up to date; a reader reads these as they are.
        patience_s: seconds for which one that has gone away is waited for, once it was reached.
        at_commit: called with "before" and "after" around each commit.
        sleep: how to wait.

    Attributes:
        name: what messages call it; without a password.
        version: of its tables, when it was opened. That they have more columns by now harms no reader.

    Raises:
        HistoryError: if it cannot be opened, or a newer version wrote it.
        ValueError: if the URL is not one, or its driver is missing.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        create: bool = True,
        patience_s: float = PATIENCE_S,
        at_commit: Callable[[str], None] = lambda when: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = parse_url(url)
        self.path = sqlite_file(url)
        self.name = str(self.path or without_password(self.url))
        self._patience_s = patience_s
        self._at_commit = at_commit
        self._sleep = sleep
        if self.path is not None and not create and not self.path.exists():
            raise HistoryError(f"There is no history {self.path}.")
        self._engine = _engine(self.url, writes=create)
        try:
            if create:
                # One that is not there now is not waited for. But of two who make a SQLite file at once,
                # one is told at once that it is locked.
                patience_s = _BUSY_S if self.path is not None else 0
                self.write(lambda connection: schema.prepare(connection, self.name), patience_s=patience_s)
                self.version = schema.VERSION
            else:
                with self.reading() as connection:
                    self.version = schema.expect_readable(connection, self.name)
        except BaseException:  # a Ctrl-C, too, must leave no connection behind
            self.close()
            raise

    def write(
        self,
        work: Callable[[Connection], T],
        *,
        patience_s: float | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> T:
        """Do `work` in one transaction, and again while the database is away.

        It may be done again although it was committed, if only the answer was lost: what it writes must
        tell that.

        Args:
            work: what to do.
            patience_s: for how long to try.
            give_up: asked from the second try on.

        Raises:
            HistoryError: if it cannot be written, or has been away for too long.
        """
        patience_s = self._patience_s if patience_s is None else patience_s
        deadline = time.monotonic() + patience_s
        tries = 0
        while True:
            try:
                with self._engine.connect() as connection:
                    with connection.begin() as transaction:
                        result = work(connection)
                        self._at_commit("before")
                        transaction.commit()
                    self._at_commit("after")
                    if tries:
                        _logger.warning("the history %s is back", self.name)
                    return result
            except _TROUBLE as error:
                why = _why(error)
                waited = time.monotonic() >= deadline
                # A broken connection is made anew once even for one who is in a hurry.
                if not _passes(error) or waited or (tries and give_up()):
                    away = f" (it was tried for {patience_s:g} s)" if waited and patience_s else ""
                    raise HistoryError(f"The history {self.name} cannot be written: {why}{away}.") from error
                if tries == 0:
                    _logger.warning("the history %s cannot be reached: %s; waiting", self.name, why)
                self._sleep(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)])
                tries += 1

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection to read from.

        Raises:
            HistoryError: if it cannot be read.
        """
        try:
            with self._engine.connect() as connection:
                yield connection
        except _TROUBLE as error:
            raise HistoryError(f"The history {self.name} cannot be read: {_why(error)}.") from error

    def check(self) -> None:
        """Whether a SQLite file is whole, as far as can be told without reading all that it says.

        Raises:
            HistoryError: if it is not.
        """
        if self.path is None:
            return
        with self.reading() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if found != "ok":
            raise HistoryError(
                f"The history {self.name} is damaged ({found}); a copy from a backup may replace it."
            )

    def close(self) -> None:
        self._engine.dispose()


class Upsert:
    """Puts rows into a table, in the place of those with the same primary key.

    Rows are many and small, and in SQLite's driver each row that is given by itself costs a turn at the
    interpreter's lock, which workers want, too. So there they go many to a statement; elsewhere they are
    handed to the driver as they are. Either way values are the driver's own types.

    Args:
        table: the table; rows have all of its columns.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._columns = [column.name for column in table.columns]
        self._key = [column.name for column in table.primary_key]
        self._values_of = itemgetter(*self._columns)
        self._texts: dict[str, str] = {}  # of the statement for one row, by dialect

    def execute(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put these rows, no two of which have the same key."""
        if not rows:
            return
        name = connection.dialect.name
        if name == "sqlite":
            self._many_to_a_statement(connection, rows)
        elif name == "postgresql":
            from sqlalchemy.dialects import postgresql  # takes a while to load, and most have SQLite

            connection.exec_driver_sql(self._text(connection, postgresql.insert(self._table)), list(rows))
        else:
            here = [self._table.c[column] == bindparam(f"of_{column}") for column in self._key]
            keys = [{f"of_{column}": row[column] for column in self._key} for row in rows]
            connection.execute(delete(self._table).where(*here), keys)
            connection.execute(insert(self._table), rows)

    def _many_to_a_statement(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        from sqlalchemy.dialects import sqlite

        text = self._text(connection, sqlite.insert(self._table))
        head, _, tail = text.partition(_VALUES)
        group = f"({', '.join('?' * len(self._columns))})"
        at = 0
        for size in _ROWS_AT_A_TIME:  # few sizes: the driver keeps statements that it has seen before
            while len(rows) - at >= size:
                values = chain.from_iterable(map(self._values_of, rows[at : at + size]))
                groups = ", ".join([group] * size)
                connection.exec_driver_sql(head + _VALUES + groups + tail[len(group) :], tuple(values))
                at += size

    def _text(self, connection: Connection, statement: Any) -> str:
        name = connection.dialect.name
        if name not in self._texts:
            changed = {c: statement.excluded[c] for c in self._columns if c not in self._key}
            named = statement.values({column: bindparam(column) for column in self._columns})
            upsert = named.on_conflict_do_update(index_elements=self._key, set_=changed)
            self._texts[name] = upsert.compile(dialect=connection.dialect).string
        return self._texts[name]


def parse_url(url: str | os.PathLike[str]) -> URL:
    """A database's URL; one of a SQLite file where a path was given.

    Raises:
        ValueError: if it is neither.
    """
    if not isinstance(url, str) or "://" not in url:
        return URL.create("sqlite", database=os.path.abspath(url))  # noqa: PTH100 - links are kept
    said, example = _PASSWORD.sub(r"\1\2***", url), "postgresql+psycopg://user@host/name"
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError) as error:
        raise ValueError(f"{said!r} is not the URL of a database, such as {example}: {error}") from None
    except ValueError:  # it quotes what it took for the port, and that may be part of a password
        raise ValueError(
            f"{said!r} is not the URL of a database, such as {example}: its port is not a number (in a "
            "password, signs like : / @ are written as %3A %2F %40)"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ValueError(f"{url!r} names no file: a history in memory would be lost with the process")
        return parsed.set(database=os.path.abspath(parsed.database))  # noqa: PTH100
    return parsed


def sqlite_file(url: str | os.PathLike[str]) -> Path | None:
    """The file of a SQLite database; None if it is another one.

    Raises:
        ValueError: as `parse_url`.
    """
    parsed = parse_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def without_password(url: URL) -> str:
    """A database's URL as it may be shown, and written down."""
    return url._replace(password=None).difference_update_query(_SECRETS).render_as_string()


def _engine(url: URL, *, writes: bool) -> Engine:
    try:
        if url.get_backend_name() == "sqlite":
            return _sqlite(url, writes=writes)
        arguments = _LIBPQ if url.get_dialect().driver in ("psycopg", "psycopg2") else {}
        given = {name: value for name, value in arguments.items() if name not in url.query}
        return create_engine(url, pool_pre_ping=True, connect_args=given)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{without_password(url)!r} needs a driver that is not installed: {error}. For PostgreSQL "
            "install fractal-runner[postgresql], and write postgresql+psycopg://…"
        ) from None


def _sqlite(url: URL, *, writes: bool) -> Engine:
    path = Path(url.database or "")
    if writes:
        engine = create_engine(url, connect_args={"check_same_thread": False, "timeout": _BUSY_S})
    elif os.access(path.parent, os.W_OK):
        engine = create_engine(url, creator=lambda: _reader(path, "mode=rw"))  # which does not create it
    else:
        # A connection a look: what lies still now, a run with more rights may change in a moment.
        engine = create_engine(url, creator=lambda: _reader_without_rights(path), poolclass=NullPool)
    journal = "DELETE" if is_shared(path) else "WAL"

    def on_connect(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # a transaction begins where we say; the driver's begin too late
        connection.execute("PRAGMA foreign_keys = ON")
        if writes:
            connection.execute(f"PRAGMA journal_mode = {journal}")
            connection.execute("PRAGMA synchronous = FULL")

    def on_begin(connection: Connection) -> None:
        # A transaction that first reads and then writes could not wait for another one's end.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    return engine


def _reader(path: Path, options: str) -> sqlite3.Connection:
    uri = f"{path.as_uri()}?{options}"
    return sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=_BUSY_S)


def _reader_without_rights(path: Path) -> sqlite3.Connection:
    """Reads a file in a directory where nothing can be made.

    A write-ahead log can be read there only if its writer has left it (sqlite.org/wal.html, "read-only
    databases"). Where there is none, nobody is writing, and the file by itself is the whole database.
    """
    has_log = path.with_name(f"{path.name}-wal").exists()
    return _reader(path, "mode=ro" if has_log else "immutable=1")


def _passes(error: Exception) -> bool:
    """Whether the same may succeed later: the connection broke, or somebody else writes."""
    if isinstance(error, PoolTimeoutError) or getattr(error, "connection_invalidated", False):
        return True
    said = _words(error).lower()
    return not _meaning(said) and any(word in said for word in _PASSING)


def _why(error: Exception) -> str:
    said = _words(error)
    meaning = _meaning(said)
    return f"{meaning} ({said})" if meaning else said


def _meaning(said: str) -> str | None:
    return next((ours for theirs, ours in _LASTING if theirs.lower() in said.lower()), None)


def _words(error: Exception) -> str:
    original = error.orig if isinstance(error, DBAPIError) else error
    return str(original or error).strip().split("\n", 1)[0].rstrip(".")
