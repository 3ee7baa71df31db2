"""What is to be said of an executor: what its probe has found, and how it is set beside what the site allows.

Nothing here asks anybody anything: facts go in, findings come out, each with what to write into the
configuration.
"""

from __future__ import annotations

import enum
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fractal_runner import __version__
from fractal_runner.errors import did_you_mean
from fractal_runner.executors.batch.base import BatchExecutor
from fractal_runner.executors.batch.limits import MemoryUnits, Queue, SiteLimits
from fractal_runner.executors.probing import ANSWER_S, Seen
from fractal_runner.quantities import format_time
from fractal_runner.worker.processes import boot_id, host_name

_SKEW_S = 5.0  # beyond which what two clocks say cannot be put in order
_QUEUE_WORDS = {"SLURM": "partition"}  # what a scheduler's executor calls a queue, where it is not that
# What becomes of an array that is too large.
_TOO_LARGE = {
    "SLURM": "sbatch refuses larger ones",
    "LSF": "LSF refuses larger ones, or makes one plain job of each",
}
# What the workers have to have.
_AS_HERE = f"a Python {sys.version_info.major}.{sys.version_info.minor} that has fractal_runner {__version__}"


class Kind(enum.Enum):
    """How much a finding matters; its value stands before it."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: how much it matters.
        text: a sentence.
        write: options of the executor that mend it, as they are written in its section.
    """

    kind: Kind
    text: str
    write: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """Where an executor's options stand in a configuration.

    Attributes:
        keys: the way to them: ("slurm",), ("dask", "pool", "slurm").
        names: the options that there are.
    """

    keys: tuple[str, ...]
    names: frozenset[str]

    def options(self, **options: object) -> Mapping[str, str]:
        """These options as they are written; none if there is one that it does not have."""
        return {name: str(value) for name, value in options.items()} if options.keys() <= self.names else {}

    def hint(self, name: str, what: str) -> str:
        """Half a sentence about an option whose value somebody has to know; "" if there is no such option."""
        return f": set {self.key_of(name)} to {what}" if name in self.names else ""

    def key_of(self, name: str) -> str:
        """An option's dotted key."""
        return ".".join((*self.keys, name))

    def lines(self, options: Mapping[str, str]) -> list[str]:
        """Options as a configuration has them, from its first column on."""
        above = [f"{'  ' * depth}{key}:" for depth, key in enumerate(self.keys)]
        return [*above, *(f"{'  ' * len(self.keys)}{name}: {value}" for name, value in options.items())]

    @property
    def python(self) -> str:
        """What to do about another Python."""
        return self.hint("python", f"the path of {_AS_HERE}")


@dataclass(frozen=True, slots=True)
class Setting:
    """How the executor of a cluster is set.

    Attributes:
        scheduler: what that is called.
        max_array: how many jobs it puts into an array.
        max_jobs: how many it has in the queue at a time.
        max_time: seconds that no job of it asks for more than; None for no bound.
        queue: where its jobs go; None for the scheduler's default.
        time: seconds that a call asks for which does not say; None for the scheduler's default.
    """

    scheduler: str
    max_array: int
    max_jobs: int
    max_time: float | None = None
    queue: str | None = None
    time: float | None = None

    @classmethod
    def of(cls, cluster: BatchExecutor) -> Setting:
        """How this one is."""
        limits, options = cluster.limits, cluster._options
        return cls(
            scheduler=cluster.scheduler.name,
            max_array=limits.max_array or cluster.scheduler.max_array,
            max_jobs=limits.max_jobs,
            max_time=limits.max_time,
            queue=options.queue,
            time=options.time,
        )


def of_worker(seen: Seen, section: Section) -> Iterator[Finding]:
    """Where the probe ran, and in what."""
    yield _place(seen)
    yield _python(seen, section)
    yield _package(seen, section)


def of_directory(seen: Seen, directory: Path) -> Finding:
    """Whether the worker shares the run's file system."""
    where = directory.parent
    if seen.directory_problem:
        return Finding(
            Kind.PROBLEM,
            f"the worker does not see the run's directory, which would be in {where}: "
            f"{seen.directory_problem}. Units read their arguments and write their results there: choose a "
            "directory that the workers have under the same path",
        )
    if not seen.is_seen_here:
        return Finding(
            Kind.PROBLEM,
            f"what the worker wrote in {where} was not seen here: it has a directory of that name, and it is "
            "not the same one",
        )
    if not seen.is_answered:
        return Finding(
            Kind.PROBLEM,
            f"what was written here in {where} was not seen by the worker within {format_time(ANSWER_S)}: "
            "the file system takes too long to show what other hosts have written",
        )
    return Finding(Kind.OK, f"the worker sees what is written in {where}, and writes what is seen here")


def of_clock(seen: Seen) -> Finding:
    """Whether the worker's clock goes with ours."""
    if seen.boot_id and seen.boot_id == boot_id():
        return Finding(Kind.OK, "its clock is ours")
    least, most = seen.ahead_s
    if least > _SKEW_S or most < -_SKEW_S:
        by, side = (least, "ahead of") if least > 0 else (-most, "behind")
        return Finding(
            Kind.PROBLEM,
            f"its clock is {format_time(by)} {side} ours, or more: times in histories and reports will "
            "contradict each other. Hosts that work together need NTP",
        )
    return Finding(Kind.OK, f"its clock goes with ours, to {format_time(max(abs(least), abs(most)))}")


def of_cluster(setting: Setting, site: SiteLimits, section: Section) -> Iterator[Finding]:
    """How an executor is set beside what its scheduler allows.

    Args:
        setting: how it is set.
        site: what the scheduler says.
        section: where its options stand.
    """
    yield _array(setting, site, section)
    yield _jobs(setting, site, section)
    yield from _queue(setting, site, section)
    if site.memory is not None:
        yield _memory(setting, site.memory, section)
    for fact in site.facts:
        yield Finding(Kind.OK, f"{setting.scheduler} says: {fact}")
    for sentence in site.unknown:
        yield Finding(Kind.NOTE, sentence)


def _place(seen: Seen) -> Finding:
    is_here = (seen.boot_id, seen.host) == (boot_id(), host_name())
    if is_here and seen.pid == os.getpid():
        return Finding(Kind.OK, f"the probe ran in this process, which may use {seen.cpus} CPU(s)")
    named = f" (node {seen.node})" if seen.node not in ("", seen.host) else ""
    where = f"this machine{named}" if is_here else f"{seen.host}{named}"
    return Finding(
        Kind.OK,
        f"the probe ran on {where}, in process {seen.pid}, which may use {seen.cpus} CPU(s): it started "
        f"after {format_time(seen.start_s)}, and its result was here after {format_time(seen.seconds)}",
    )


def _python(seen: Seen, section: Section) -> Finding:
    here = platform.python_version()
    told = f"{seen.implementation} {seen.python} on the worker ({seen.executable})"
    if (seen.implementation, _minor(seen.python)) != (platform.python_implementation(), _minor(here)):
        return Finding(
            Kind.PROBLEM,
            f"{told}, and {platform.python_implementation()} {here} here ({sys.executable}): functions "
            f"travel between them as bytecode, which is another one in each minor version{section.python}",
        )
    if seen.python != here:
        return Finding(Kind.NOTE, f"{told}, and {here} here: the same minor version, which is what counts")
    return Finding(Kind.OK, f"{told}, as here")


def _package(seen: Seen, section: Section) -> Finding:
    if not seen.version:
        return Finding(
            Kind.PROBLEM,
            f"fractal_runner cannot be imported on the worker ({seen.executable}): {seen.import_problem}. "
            f"Install version {__version__} there, or have another Python{section.python}",
        )
    if seen.version != __version__:
        return Finding(
            Kind.PROBLEM,
            f"fractal_runner {seen.version} on the worker ({seen.place}), and {__version__} here: they need "
            f"not understand each other. Install version {__version__} there, or have another Python"
            f"{section.python}",
        )
    return Finding(Kind.OK, f"fractal_runner {seen.version} on the worker, as here")


def _array(setting: Setting, site: SiteLimits, section: Section) -> Finding:
    name, used, bound = setting.scheduler, setting.max_array, site.max_array
    if bound is None:
        return Finding(
            Kind.NOTE,
            f"{name} does not say how many jobs an array may have, and up to {used} are put into one"
            f"{section.hint('max_array', 'what the site allows, if that is fewer')}",
        )
    if used > bound.value:
        return Finding(
            Kind.PROBLEM,
            f"up to {used} jobs are put into an array, and the site allows {bound.value}: {bound}; "
            f"{_TOO_LARGE.get(name, 'larger ones are refused')}",
            section.options(max_array=bound.value),
        )
    told = f"up to {used} jobs are put into an array, and the site allows {bound.value}: {bound}"
    if used < bound.value:
        return Finding(Kind.OK, f"{told}. There may be more ({section.key_of('max_array')})")
    return Finding(Kind.OK, told)


def _jobs(setting: Setting, site: SiteLimits, section: Section) -> Finding:
    jobs, bound = setting.max_jobs, site.max_submitted
    at_a_time = f"; {site.max_running.value} run at a time: {site.max_running}" if site.max_running else ""
    if bound is not None and jobs > bound.value:
        return Finding(
            Kind.PROBLEM,
            f"max_jobs is {jobs}, and this user may have {bound.value} in the queue: {bound}; further "
            f"submissions fail until others have ended{at_a_time}",
            section.options(max_jobs=bound.value),
        )
    said = f"this user may have {bound.value}: {bound}" if bound else "no bound of the site's is known"
    return Finding(Kind.OK, f"up to {jobs} jobs (max_jobs) are in the queue at a time; {said}{at_a_time}")


def _queue(setting: Setting, site: SiteLimits, section: Section) -> Iterator[Finding]:
    if not site.queues:
        return
    word = _QUEUE_WORDS.get(setting.scheduler, "queue")
    queues = {queue.name: queue for queue in site.queues}
    others = ", ".join(f"{one.name} ({one.state})" for one in site.queues)
    wanted = setting.queue
    if wanted is None:
        default = next((queue for queue in site.queues if queue.is_default), None)
        if default is None and not site.names_default:
            yield Finding(Kind.OK, f"jobs name no {word}; there are {others}")
            return
        if default is None:
            yield Finding(
                Kind.PROBLEM,
                f"there is no default {word}, and jobs name none: take one of {others}",
                section.options(**{word: site.queues[0].name}),
            )
            return
        wanted = default.name
    # A scheduler may be given several, of which it chooses one.
    for name in wanted.replace(",", " ").split():
        if name not in queues:
            hint = did_you_mean(name, queues)
            yield Finding(Kind.PROBLEM, f"there is no {word} {name!r}: {hint} There are {others}")
        elif not queues[name].is_open:
            yield Finding(
                Kind.PROBLEM,
                f"the {word} {name} takes no jobs, it is {queues[name].state}: there are {others}",
            )
        else:
            yield _time(setting, queues[name], word, section)


def _time(setting: Setting, queue: Queue, word: str, section: Section) -> Finding:
    default = ", the default one" if queue.is_default else ""
    told = f"jobs go to the {word} {queue.name} ({queue.state}{default})"
    if queue.max_time is None:
        return Finding(Kind.OK, told)
    told += f", which gives them {format_time(queue.max_time)} at most"
    own, bound = setting.time, setting.max_time
    if own is not None and own > queue.max_time:
        return Finding(
            Kind.PROBLEM, f"{told}: a call asks for {format_time(own)}, and would wait for ever or be refused"
        )
    if bound is None or bound > queue.max_time:
        return Finding(
            Kind.NOTE,
            f"{told}: a job of several long calls may ask for more, unless you bound it",
            section.options(max_time=f'"{_clock(queue.max_time)}"'),
        )
    return Finding(Kind.OK, told)


def _memory(setting: Setting, memory: MemoryUnits, section: Section) -> Finding:
    told = f"{setting.scheduler} is told memory in {memory.used}, by {memory.by}"
    if memory.site is not None and memory.site != memory.used:
        return Finding(
            Kind.PROBLEM,
            f"{told}, and the site counts in {memory.site} (LSF_UNIT_FOR_LIMITS, by {memory.site_by}): jobs "
            "would get another amount than they ask for",
            section.options(memory_unit=memory.site),
        )
    if not memory.is_known:
        return Finding(
            Kind.NOTE,
            f"{told}: the site's LSF_UNIT_FOR_LIMITS cannot be read here"
            f"{section.hint('memory_unit', 'what that is, if there is one')}",
        )
    return Finding(Kind.OK, told)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"


def counted(found: Mapping[Kind, int]) -> str:
    """The last line of a report."""
    problems, notes = found[Kind.PROBLEM], found[Kind.NOTE]
    noted = f", {notes} note(s)" if notes else ""
    return f"{problems} problem(s){noted}." if problems else f"No problems found{noted}."
