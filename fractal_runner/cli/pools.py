"""`fractal-runner pool`: pools of Dask's workers that are kept between runs, by name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fractal_runner.cli.console import note, output
from fractal_runner.cli.console import stop as stop_with
from fractal_runner.cli.parameters import ExecutorOpt
from fractal_runner.cli.wording import moment
from fractal_runner.errors import ExecutorError, InputFileError

if TYPE_CHECKING:
    from rich.table import Table

    from fractal_runner.executors.adapters.daskpool.warm import PoolRecord

app = typer.Typer(no_args_is_help=True, help="Keep workers between runs: start, list, show and stop pools.")

_EXECUTOR = "dask"
_GONE_S = 60.0  # within which a start that was broken off has cleaned up
_LOOK_S = 0.1
_NO_ANSWER = "no answer"

Name = Annotated[str, typer.Argument(metavar="NAME", help="The pool's name.")]


@app.command()
def start(name: Name, executor_opt: ExecutorOpt = None) -> None:
    """Start a pool that stays, and return once it can be joined.

    Its terms are those of `dask.pool` in the configuration, and what --executor-opt says of them:
    pool.workers=local, pool.max_workers=4, pool.idle_timeout=10m. The files of a pool whose workers are jobs
    are in ./fractal_jobs/dask, unless folder=DIR says where: the nodes have to see it.

    Exit codes: 0 it is there, 2 wrong usage, or there is one already, 3 it has not started, 130 Ctrl-C.
    """
    with _told():
        from fractal_runner.executors import sections
        from fractal_runner.executors.adapters.daskpool import warm

        config = sections.load(executor=_EXECUTOR, options=map(_in_full, executor_opt or ()))
        options = config.options(_EXECUTOR)
        terms = _terms_of(options)
        folder = _folder_of(terms, options)
        if any(one.name == name and one.life != "dead" for one in warm.list_pools()):
            raise ValueError(
                f"there is a pool {name!r} already: stop it (fractal-runner pool stop {name}), or choose "
                "another name"
            )
        try:
            record = warm.start_pool(name, terms, folder=folder)
        except KeyboardInterrupt:
            typer.echo(f"Stopped: the pool {name!r} is being ended …", err=True)
            _await_gone(name)
            raise
    typer.echo(
        f"The pool {name!r} is there: up to {record.max_workers} worker(s) ({record.workers}), kept by "
        f"{_where(record)}."
    )
    typer.echo(f"Join it:  --executor {_EXECUTOR} --executor-opt join={name}")
    typer.echo(f"See it:   fractal-runner pool status {name}")
    typer.echo(f"End it:   fractal-runner pool stop {name}")


@app.command("list")
def list_all() -> None:
    """List the pools that have been started by this user, alive or not.

    Exit codes: 0 listed, also if there are none, 2 Dask is not installed.
    """
    with _told():
        from fractal_runner.executors.adapters.daskpool import warm

        records = warm.list_pools()
        if not records:
            typer.echo("There are no pools. `fractal-runner pool start NAME` starts one.")
            return
        output().print(_table_of(records))


@app.command()
def status(name: Name) -> None:
    """Show how a pool is: its workers, its bounds, who uses it.

    Exit codes: 0 it answers, 2 there is none of this name, 3 it is dead, or does not answer.
    """
    with _told():
        from fractal_runner.executors.adapters.daskpool import warm

        record = _find(name)
        if record.life != "dead":
            said = warm.pool_status(record)
    if record.life == "dead":
        _tell_dead(record)
        raise typer.Exit(3)
    idle = said["present"] - said["lent"]
    others = said["clients"] - 1  # who asks is one of them
    rows = {
        "pool": f"{name} ({_where(record)}), since {moment(record.started)}",
        "address": record.address,
        "workers": f"{said['present']} present ({idle} idle), {said['launched']} on their way",
        "bounds": f"{said['min_workers']} to {said['max_workers']} ({said['workers']})",
        "in use by": f"{others} executor(s)",
        "calls": f"{said['lent']} worker(s) lent for them, {said['wanted']} wanted",
        "log": record.log,
    }
    width = max(map(len, rows))
    for word, text in rows.items():
        typer.echo(f"{word:<{width}}  {text}")


@app.command()
def stop(name: Name) -> None:
    """End a pool with its workers and whatever runs there, and return once nothing is left.

    Exit codes: 0 it is gone, 2 there is none of this name, 3 it has not ended, or something of it is left.
    """
    with _told():
        from fractal_runner.executors.adapters.daskpool import warm

        record = _find(name)
        was_dead = record.life == "dead"
        warm.stop_pool(name)
    if was_dead:
        typer.echo(f"The {record.says} was dead already: its record is removed, and its workers here ended.")
    else:
        typer.echo(f"The {record.says} has ended, with its workers.")
    left = _left_of(record, was_dead)
    for sentence in left:
        typer.echo(f"left: {sentence}", err=True)
    if left:
        raise typer.Exit(3)


def _in_full(word: str) -> str:
    """A word of --executor-opt; one that is a term of pools, and nothing else, as that of a pool."""
    from fractal_runner.executors import factories
    from fractal_runner.executors.adapters.daskpool.options import PoolOptions

    key = word.partition("=")[0].strip().partition(".")[0]
    taken, _ = factories.parameters_of(factories.factory_of(_EXECUTOR))
    is_term = key in PoolOptions.__annotations__ and key not in taken
    return f"pool.{word.strip()}" if is_term else word


def _terms_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The terms of a pool, of an executor's arguments.

    Raises:
        ValueError: if they say that another pool is to be used.
    """
    from fractal_runner.executors.adapters.daskpool.terms import CLUSTERS

    for other in ("join", "address", "scheduler_file"):
        if options.get(other) is not None:
            raise ValueError(
                f"{_EXECUTOR}.{other} is said ({options[other]!r}), and names workers that there are: a pool "
                f"that is started has its own. Take it back by --executor-opt {other}=null"
            )
    terms = dict(options.get("pool") or {})
    if options.get("max_workers") is not None:
        terms.setdefault("max_workers", options["max_workers"])
    kind = terms.get("workers")
    if options.get("path_map") is not None and kind in CLUSTERS:
        terms[kind] = {"path_map": options["path_map"], **(terms.get(kind) or {})}
    return terms


def _folder_of(terms: Mapping[str, Any], options: Mapping[str, Any]) -> str | Path | None:
    """Where the pool's files are: for a cluster's, by default, where a session in Python has them, too."""
    from fractal_runner.executors.adapters.daskpool.terms import CLUSTERS
    from fractal_runner.executors.registry import SESSION_DIR

    folder: str | Path | None = options.get("folder")
    if folder is None and terms.get("workers") in CLUSTERS:
        return Path.cwd() / SESSION_DIR / _EXECUTOR
    return folder


def _find(name: str) -> PoolRecord:
    """The record of this name, whether or not its pool is alive.

    Raises:
        ValueError: if there is none, naming the nearest one.
    """
    from fractal_runner.executors.adapters.daskpool import warm

    record = warm.PoolFiles.of(name).read()
    if record is None:
        try:
            record = warm.find_pool(name)  # which says what there is instead
        except ExecutorError as error:
            raise ValueError(str(error)) from None
    return record


def _await_gone(name: str) -> None:
    """Wait until the process that was to have a pool has ended; if the pool is there, end it."""
    from fractal_runner.executors.adapters.daskpool import warm

    files = warm.PoolFiles.of(name)
    deadline = time.monotonic() + _GONE_S
    while files.is_held() and time.monotonic() < deadline:
        record = files.read()
        if record is not None and record.life == "running":
            warm.stop_pool(name)
        time.sleep(_LOOK_S)  # another process's end tells nobody
    if files.is_held():
        typer.echo(f"left: a process still has {files.lock}; its log is {files.log}", err=True)


def _left_of(record: PoolRecord, was_dead: bool) -> list[str]:
    """What is left of a pool that has ended; a sentence each."""
    folder = Path(record.tls.cert).parent
    left = []
    if folder.exists():
        left.append(f"its folder {folder}: remove it")
    if was_dead and record.workers != "local":
        left.append(
            f"perhaps jobs of {record.workers} that were its workers: they end by themselves once they find "
            "no scheduler; the queue tells"
        )
    return left


def _tell_dead(record: PoolRecord) -> None:
    typer.echo(
        f"The {record.says} is dead: its process has ended without removing its record. Its log is "
        f"{record.log}. `fractal-runner pool stop {record.name}` removes the record, and "
        f"`fractal-runner pool start {record.name}` starts it anew.",
        err=True,
    )


def _table_of(records: list[PoolRecord]) -> Table:
    from rich.table import Table

    table = Table(
        "pool", "state", "workers", "since", "kept by", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for record in records:
        state = {"unknown": "on another host: unknown"}.get(record.life, record.life)
        table.add_row(record.name, state, _workers_of(record), moment(record.started), _where(record))
    return table


def _workers_of(record: PoolRecord) -> str:
    """How many workers a pool has, of how many; only one of this host is asked."""
    from fractal_runner.executors.adapters.daskpool import warm

    present = "-"
    if record.life == "running":
        try:
            present = str(warm.pool_status(record)["present"])
        except ExecutorError:
            present = _NO_ANSWER
    return f"{present} of {record.max_workers} ({record.workers})"


def _where(record: PoolRecord) -> str:
    return f"process {record.keeper.pid} on {record.keeper.host}"


@contextmanager
def _told() -> Iterator[None]:
    """Make what goes wrong a message and an exit code: 2 for what was said, 3 for what has happened."""
    try:
        from fractal_runner.executors.adapters.daskpool.pool import require_dask

        require_dask()
        yield
    except ExecutorError as error:
        note("error", str(error))
        raise typer.Exit(3) from None
    except (ImportError, InputFileError, TypeError, ValueError) as error:
        stop_with("error", str(error))
