"""`fractal-runner doctor`: an executor as a run would have it, tried with a small call, and looked at."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fractal_runner.cli import options as given
from fractal_runner.cli.console import log_if, stop
from fractal_runner.cli.parameters import ExecutorName, ExecutorOpt, Verbose
from fractal_runner.quantities import format_time, parse_time

if TYPE_CHECKING:
    from fractal_runner.cli.diagnosis import Finding, Kind, Section
    from fractal_runner.config import Config
    from fractal_runner.executors.registry import Executors

_PARENT = "fractal_runs"  # where runs are that say nothing else
_INDENT = " " * 9


def doctor(
    *,
    executor: ExecutorName = None,
    executor_opt: ExecutorOpt = None,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="TIME", help="A probe that has not started by then is ended.")
    ] = "5m",
    directory: Annotated[
        Path | None,
        typer.Option("--directory", metavar="DIR", help=f"Where runs would be; ./{_PARENT} if not given."),
    ] = None,
    workflow: Annotated[
        Path | None,
        typer.Option(
            "--workflow",
            metavar="WORKFLOW.json",
            help="With the configuration that a run of this workflow has.",
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Try an executor: send it a small call, look at what the site allows, and say what to set.

    Exit codes: 0 all is well, 1 there are problems, 2 wrong usage, or it cannot be used here, 3 the call
    did not come back.
    """
    from fractal_runner.executors import sections

    log_if(verbose)
    try:
        seconds = parse_time(timeout)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--timeout") from None
    with given.told_mistakes():
        config = sections.load(start=workflow, executor=executor, options=executor_opt or ())
    raise typer.Exit(_Examination(config, seconds).run(directory or Path(_PARENT)))


class _Examination:
    """One executor, from its making to what is left of it."""

    def __init__(self, config: Config, timeout: float) -> None:
        self._config = config
        self._timeout = timeout
        self._counts: Counter[Kind] = Counter()
        self._write: dict[str, str] = {}  # options of the executor that mend what was found

    def run(self, parent: Path) -> int:
        """Examine it; the exit code."""
        from fractal_runner.cli.diagnosis import Kind, counted
        from fractal_runner.executors.probing import left_in_queue

        name = self._config.executor
        origin = " ".join(str(self._config.origin("executor")).split())
        with _directory(parent) as directory:
            executors, executor = _made(self._config, directory, self._timeout)
            typer.echo(f"Executor {name} ({origin}), with a run in {directory.parent}")
            came_back, is_ended = False, True
            try:
                came_back, is_ended = self._probe(executors, directory)
                self._look_at_site(executor)
            finally:
                executors.close(wait=is_ended)
                left = left_in_queue(executor)
            self._report_left(left)
        typer.echo(counted(self._counts))
        if self._write:
            typer.echo("In the configuration, write:\n")
            typer.echo("\n".join(self._section(executor).lines(self._write)))
        return 3 if not came_back else int(self._counts[Kind.PROBLEM] > 0)

    def _probe(self, executors: Executors, directory: Path) -> tuple[bool, bool]:
        """Send the probe, and tell of it: whether it came back, and whether nothing of it runs."""
        from fractal_runner.cli.diagnosis import Finding, Kind, of_clock, of_directory, of_worker
        from fractal_runner.executors.probing import ProbeError, send

        resources = self._config.defaults_of(self._config.executor)
        typer.echo(f"Sending a probe: it has {format_time(self._timeout)} to start …", err=True)
        try:
            seen = send(executors, directory, timeout=self._timeout, resources=_parsed(resources))
        except ProbeError as error:
            hint = self._section(executors.get()).python if error.is_of_python else ""
            self._say(Finding(Kind.PROBLEM, f"{str(error).rstrip('.')}{hint}"), error.words)
            if not error.is_ended:
                self._say(Finding(Kind.NOTE, "the executor cannot end it: it is left where it is"))
            return False, error.is_ended
        for finding in of_worker(seen, self._section(executors.get())):
            self._say(finding)
        self._say(of_directory(seen, directory))
        self._say(of_clock(seen))
        return True, True

    def _look_at_site(self, executor: object) -> None:
        from fractal_runner.cli.diagnosis import Setting, of_cluster
        from fractal_runner.executors.probing import cluster_of

        cluster = cluster_of(executor)
        if cluster is None:
            return
        wanted = cluster._options
        site = cluster.scheduler.limits(queue=wanted.queue, account=wanted.account)
        for finding in of_cluster(Setting.of(cluster), site, self._section(executor)):
            self._say(finding)

    def _report_left(self, left: Mapping[str, str]) -> None:
        from fractal_runner.cli.diagnosis import Finding, Kind

        if left:
            self._say(
                Finding(Kind.PROBLEM, "the scheduler still has jobs of the probe: end them"),
                [f"job {job}: {said}" for job, said in left.items()],
            )

    def _section(self, executor: object) -> Section:
        """Where the options stand of what runs the calls: of a pool's workers, below those of the pool."""
        from fractal_runner.cli.diagnosis import Section
        from fractal_runner.executors import factories
        from fractal_runner.executors.probing import cluster_of

        cluster, keys = cluster_of(executor), [self._config.executor]
        if cluster is not None and cluster is not executor:
            keys += ["pool", factories.name_of(type(cluster))]
        names, _ = factories.parameters_of(factories.factory_of(keys[-1]))
        return Section(tuple(keys), frozenset(names))

    def _say(self, finding: Finding, more: Iterable[str] = ()) -> None:
        from fractal_runner.cli.wording import printable

        self._counts[finding.kind] += 1
        first, *lines = finding.text.splitlines()
        typer.echo(f"{finding.kind.value:<{len(_INDENT)}}{printable(first)}")
        for line in (*lines, *more):
            typer.echo(f"{_INDENT}{printable(line)}")
        self._write.update(finding.write)


def _made(config: Config, directory: Path, timeout: float) -> tuple[Executors, object]:
    """The executor, with those of the run that it is one of; or a message why there is none."""
    from fractal_runner.errors import ExecutorError
    from fractal_runner.executors import factories
    from fractal_runner.executors.probing import patient
    from fractal_runner.executors.registry import Executors

    name = config.executor
    try:
        factory, arguments = factories.factory_of(name), config.options(name)
        problem = factories.unusable(name, arguments)
        if problem is None:
            taken, _ = factories.parameters_of(factory)
            choice = (name, patient(arguments, taken, timeout))
            executors = Executors(choice, config=config, directory=directory)
            return executors, executors.get()
    except (ExecutorError, ImportError, TypeError, ValueError) as error:
        problem = str(error)
    stop("error", f"the executor {name!r} cannot be used here: {problem}")


def _parsed(resources: Mapping[str, Any]) -> dict[str, Any]:
    from fractal_runner.quantities import parse_size

    memory = resources.get("memory")
    return {**resources, "memory": None if memory is None else parse_size(memory)}


@contextmanager
def _directory(parent: Path) -> Iterator[Path]:
    """A directory as a run would have it, which is gone in the end."""
    is_new = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="doctor-", dir=parent.absolute()))
        made.chmod(0o755)  # as a run's is: a worker may be another user
    except OSError as error:
        stop("error", f"{parent}: no run could be there: {error.strerror}")
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # a file system over the network may keep a file that somebody has open
                parent.rmdir()
