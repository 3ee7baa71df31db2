"""The tables of a history, and how an older database becomes one of today's.

One database may hold the run of a single directory or all those of a server, beside tables of the
server's own: every row knows its run, and every table bears our name. Times are seconds since the epoch,
JSON is text, a dataset is its JSON compressed by zlib.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    cast,
    inspect,
    null,
    select,
    text,
)

from fractal_runner.errors import HistoryError

VERSION = 2
READABLE_SINCE = 1  # what is older lacks more than the columns of BROUGHT

_PREFIX = "fractal_runner_"
_LOCK_KEY = 0x66725F31  # of PostgreSQL's advisory lock around making tables; any number that is ours


class State(enum.StrEnum):
    """Where a run, a task or a unit is in its life. Runs and tasks are never SUBMITTED."""

    SUBMITTED = "submitted"  # given to an executor
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"  # ended by the run, or never run: nothing is known against the work itself

    @property
    def is_end(self) -> bool:
        return self not in (State.SUBMITTED, State.RUNNING)


metadata = MetaData()


def _run_id() -> Column[str]:
    return Column("run_id", ForeignKey(f"{_PREFIX}runs.id", ondelete="CASCADE"), primary_key=True)


about = Table(
    f"{_PREFIX}history",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
)

# A run of process_workflow, in one directory, over however many resumes.
runs = Table(
    f"{_PREFIX}runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("state", String(9), nullable=False),
    Column("directory", Text, nullable=False),
    Column("host", Text, nullable=False),  # where it began
    Column("started", Double, nullable=False),
    Column("ended", Double),
    Column("resumed", Integer, nullable=False),  # how many times
    Column("error", Text),
    Column("workflow", Text, nullable=False),  # as given, JSON
    Column("dataset", LargeBinary, nullable=False),  # as given
    Column("workflow_name", Text, nullable=False),
    Column("dataset_name", Text, nullable=False),
    Column("dataset_key", Text, nullable=False),  # the dataset's identity across runs
    Column("first_task", Integer, nullable=False),  # positions in the workflow
    Column("last_task", Integer, nullable=False),
    Column("type_filters", Text, nullable=False),
    Column("attribute_filters", Text, nullable=False),
    Column("executor", Text),  # [name, options] as JSON, where it was given by name
    Column("settings", Text),  # how it goes about what it does, as arguments of process_workflow, JSON
    Column("job_id", Text),
    Column("user_id", Text),
    Column("versions", Text, nullable=False),
    Index(f"{_PREFIX}runs_by_directory", "directory"),
)

# Who may write of a run. A new owner raises the epoch; the one before learns of it at its next transaction.
owners = Table(
    f"{_PREFIX}owners",
    metadata,
    _run_id(),
    Column("epoch", Integer, nullable=False),
    Column("writes", Integer, nullable=False),  # transactions of this epoch: a lost answer is no lost write
    Column("host", Text, nullable=False),
    Column("boot_id", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("start_ticks", BigInteger),
    Column("heartbeat", Double, nullable=False),
)

# One execution of a workflow task in a run.
tasks = Table(
    f"{_PREFIX}tasks",
    metadata,
    _run_id(),
    Column("position", Integer, primary_key=True),  # in the workflow's list
    Column("task_order", Integer, nullable=False),  # as its WorkflowTask says; most often the same
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("task_key", Text, nullable=False),  # which workflow task it is, across runs
    Column("content", Text, nullable=False),  # all of it that decides what it does, JSON
    Column("state", String(9), nullable=False),
    Column("started", Double, nullable=False),
    Column("ended", Double),
    Column("error", Text),
    Column("type_filters", Text, nullable=False),  # in force before it
    Column("images", Integer),  # how many its filters selected; null for converters
    Column("units", Integer, nullable=False),  # as far as is known: a compound task's grow after its init
    Column("selected", LargeBinary),  # which images, where that cannot be told again from the dataset
    Column("dataset", LargeBinary),  # after it, once it is done
)

# One attempt at a unit.
units = Table(
    f"{_PREFIX}units",
    metadata,
    _run_id(),
    Column("position", Integer, primary_key=True),  # of its task
    Column("stage", String(7), primary_key=True),  # "non_par" or "par"
    Column("number", Integer, primary_key=True),  # the unit's index among its stage's
    Column("attempt", Integer, primary_key=True),  # from 1
    Column("is_last", Boolean, nullable=False),  # no later attempt at this unit has been made
    Column("state", String(9), nullable=False),
    Column("zarr_url", Text),
    Column("digest", String(32), nullable=False),  # of its command and arguments
    Column("submitted", Double, nullable=False),
    Column("started", Double),
    Column("ended", Double),
    Column("returncode", Integer),  # negative for a signal
    Column("signal", Text),
    Column("reason", Text),
    Column("message", Text),  # why it failed, in full
    Column("host", Text),
    Column("pid", Integer),
    Column("job_id", Text),
    Column("cpu_s", Double),
    Column("peak_bytes", BigInteger),
    Column("start", String(4)),  # how its command was started: "warm" or "cold"
    Column("log", Text),  # relative to the run's directory
    Column("output", Text),  # as it was validated, JSON; null for none
    # The primary key is the table: no second copy of it, and rows of one task lie together.
    sqlite_with_rowid=False,
)

# The latest that is known of an image and a workflow task, over all runs.
image_statuses = Table(
    f"{_PREFIX}image_statuses",
    metadata,
    Column("dataset_key", Text, primary_key=True),
    Column("task_key", Text, primary_key=True),
    Column("zarr_url", Text, primary_key=True),
    Column("status", String(9), nullable=False),  # submitted, done or failed; no row: unset
    Column("run_id", String(32), nullable=False),
    sqlite_with_rowid=False,
)


# Which columns came with which version. In rows that are older than they are, they are NULL; so they are
# for who reads a history that does not have them.
BROUGHT: dict[int, tuple[Column[Any], ...]] = {2: (units.c.start, runs.c.settings)}


def _add_columns_of_2(connection: Connection) -> None:
    for column in BROUGHT[2]:
        kind = column.type.compile(dialect=connection.dialect)
        connection.execute(text(f"ALTER TABLE {column.table.name} ADD COLUMN {column.name} {kind}"))


# From each version to the next, in one transaction with the new number.
MIGRATIONS: dict[int, Callable[[Connection], None]] = {1: _add_columns_of_2}


def as_of(version: int, columns: Iterable[Column[Any]]) -> list[ColumnElement[Any]]:
    """What to select for these columns in a history of a version: NULL for those that came later."""
    later = {
        (column.table.name, column.name)
        for brought, names in BROUGHT.items()
        if brought > version
        for column in names
    }
    # With its type, so that it can be compared and counted as the column itself can.
    return [
        cast(null(), column.type).label(column.name) if (column.table.name, column.name) in later else column
        for column in columns
    ]


def prepare(connection: Connection, where: str) -> None:
    """Make the tables, or bring those that are there to today's version.

    Args:
        connection: in a transaction.
        where: what a message calls the database.

    Raises:
        HistoryError: if they are newer than this program.
    """
    if connection.dialect.name == "postgresql":  # of two that begin at once, one makes the tables
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    if not inspect(connection).has_table(about.name):
        metadata.create_all(connection)
        connection.execute(about.insert().values(version=VERSION))
        return
    found = _version(connection, where)
    for version in range(found, VERSION):
        MIGRATIONS[version](connection)
    if found < VERSION:
        connection.execute(about.update().values(version=VERSION))


def expect_readable(connection: Connection, where: str) -> int:
    """The version of the tables, which are there, and which one who only reads can read as they are.

    Raises:
        HistoryError: if not, saying what to do.
    """
    if not inspect(connection).has_table(about.name):
        raise HistoryError(f"{where} holds no history: it has no table {about.name!r}.")
    if (found := _version(connection, where)) < READABLE_SINCE:
        raise HistoryError(
            f"{where} is a history of version {found}; it becomes one of version {VERSION} when a run "
            "in it is resumed, or begun."
        )
    return found


def _version(connection: Connection, where: str) -> int:
    found: int | None = connection.execute(select(about.c.version)).scalar_one_or_none()
    if found is None:
        raise HistoryError(f"{where} is damaged: its table {about.name!r} is empty.")
    if found > VERSION:
        raise HistoryError(
            f"{where} is a history of version {found}, and this fractal_runner knows versions up to "
            f"{VERSION}: use the newer fractal_runner that wrote it."
        )
    return found
