"""What travels between the parts of a pool: its terms, how a worker is started, how one has ended.

Apart from those parts because nothing here needs Dask: a node's host process starts in a moment.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fractal_runner.errors import did_you_mean
from fractal_runner.executors.cpus import usable_cpus
from fractal_runner.quantities import format_size, parse_count, parse_size, parse_time

LOCAL = "local"
CLUSTERS = ("slurm", "lsf")  # names of our executors, whose calls the workers are
KINDS = (LOCAL, *CLUSTERS)

JOIN_HANDLER = "fractal_runner_join"  # of the pool's scheduler, for who wants workers
CALLS_HANDLER = "fractal_runner_calls"  # of a worker, for who has it
MARK = "FRACTAL_RUNNER_DASK_WORKER"  # in the environment of all that belongs to a worker

LARGEST_MESSAGE = 2**32 - 2**20  # what one of Dask's messages holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a worker has, as far as that is said: what is None is not said, and no call is measured by it.

    Attributes:
        cpus: CPUs.
        memory: bytes.
        gpus: GPUs.
    """

    cpus: int | None = None
    memory: int | None = None
    gpus: int | None = None

    def lacks(self, *, cpus: int, memory: int | None, gpus: int) -> list[str]:
        """What of this need it has not, in words with both numbers."""
        found = []
        if self.cpus is not None and cpus > self.cpus:
            found.append(f"cpus={cpus} exceeds the {self.cpus} of a worker")
        if self.memory is not None and memory is not None and memory > self.memory:
            found.append(f"memory={format_size(memory)} exceeds the {format_size(self.memory)} of a worker")
        if self.gpus is not None and gpus > self.gpus:
            found.append(f"gpus={gpus} exceeds the {self.gpus} of a worker")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTerms:
    """What a pool is.

    Attributes:
        workers: what its workers are: processes of this machine ("local"), or jobs of "slurm" or "lsf".
        min_workers: so many there are, whether or not there is work.
        max_workers: and so many at most.
        idle_timeout: seconds after which a worker without work ends.
        launch_batch_size: how many are started at most per interval.
        launch_interval: that interval, in seconds.
        start_timeout: seconds within which a worker that runs must have come; a job may wait for longer.
        shape: what each of them has.
        host: the address that the scheduler listens at.
        interface: the network interface that scheduler and workers listen at.
        cluster: arguments of the executor of that cluster: `folder`, `partition`, `command_prefix`, …
    """

    workers: str = LOCAL
    min_workers: int = 0
    max_workers: int = 1
    idle_timeout: float = 60.0
    launch_batch_size: int = 100
    launch_interval: float = 1.0
    start_timeout: float = 120.0
    shape: Shape = field(default_factory=Shape)
    host: str | None = None
    interface: str | None = None
    cluster: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, *, max_workers: int | None = None) -> PoolTerms:
        """From values as people write them.

        Args:
            given: the terms by name; what the workers have stands beside them as `cpus`, `memory` and
                `gpus`, and a cluster's own options below its name.
            max_workers: the same as there, where that does not say.

        Raises:
            TypeError: for a name that there is not, naming the nearest one.
            ValueError: for a value that does not fit its name, or does not fit another one.
        """
        said = {name: value for name, value in (given or {}).items() if value is not None}
        if unknown := [name for name in said if name not in PARSERS]:
            raise TypeError(f"pool: there is no option {unknown[0]!r}: {did_you_mean(unknown[0], PARSERS)}")
        said.setdefault("max_workers", usable_cpus() if max_workers is None else max_workers)
        parsed = {name: _parsed(name, value) for name, value in said.items()}
        options = {name: parsed.pop(name) for name in CLUSTERS if name in parsed}
        if options and "workers" not in parsed:
            name = next(iter(options))
            raise ValueError(f"pool: {name} has options, and nothing says that workers is {name!r}")
        kind = parsed.setdefault("workers", LOCAL)
        # A configuration may say something of several: what is said of the others waits for its day.
        if kind in options:
            parsed["cluster"] = MappingProxyType(dict(options[kind]))
        shape = {name: parsed.pop(name, None) for name in ("cpus", "memory", "gpus")}
        if kind in CLUSTERS:
            shape["cpus"] = shape["cpus"] or 1  # a job always has a number of them, and of GPUs
            shape["gpus"] = shape["gpus"] or 0
        terms = cls(shape=Shape(**shape), **parsed)
        terms.check()
        return terms

    def check(self) -> None:
        """Whether these go together.

        Raises:
            ValueError: if not, naming both sides.
        """
        if self.min_workers > self.max_workers:
            raise ValueError(f"pool: min_workers={self.min_workers} exceeds max_workers={self.max_workers}")
        if self.host is not None and self.interface is not None:
            raise ValueError(
                f"pool: host={self.host!r} and interface={self.interface!r} both say where to listen: choose "
                "one"
            )
        if self.workers in CLUSTERS and self.host is None and self.interface is None:
            raise ValueError(
                f"pool: the workers of {self.workers} have to reach this host: name its address (`host`) or "
                "its network interface (`interface`) that the nodes see"
            )


@dataclass(frozen=True, slots=True)
class WorkerTerms:
    """How a worker is started.

    Attributes:
        name: its own, which no other one has or had.
        address: the scheduler's.
        folder: where it writes its log and whatever Dask puts down, as its node sees it.
        ca_file, cert_file, key_file: of the pool's TLS, as its node sees them.
        interface: the network interface that it listens at.
        host: the address that it listens at; None for all that its node has, or those of the interface.
        death_timeout: seconds within which it has to find the scheduler.
        python: the interpreter that it is run by; None for the one that starts it.
    """

    name: str
    address: str
    folder: str
    ca_file: str
    cert_file: str
    key_file: str
    interface: str | None = None
    host: str | None = None
    death_timeout: float = 60.0
    python: str | None = None

    def command(self) -> list[str]:
        """The words that run it."""
        return [
            *(self.python or sys.executable, "-P", "-m", "distributed.cli.dask_worker", self.address),
            *("--name", self.name, "--nthreads", "1", "--no-nanny", "--no-dashboard"),
            *("--memory-limit", "0", "--death-timeout", f"{self.death_timeout:g}"),
            *("--local-directory", f"{self.folder}/{self.name}"),
            *("--preload", "fractal_runner.executors.adapters.daskpool.seat"),
            *("--tls-ca-file", self.ca_file, "--tls-cert", self.cert_file, "--tls-key", self.key_file),
            *(() if self.interface is None else ("--interface", self.interface)),
            *(() if self.host is None else ("--host", self.host)),
        ]


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """How a worker has ended, with all that it had started, or that its node is known to be dead.

    Attributes:
        text: what has happened to it, the rest of a sentence: "was killed by SIGKILL".
        returncode: as subprocess reports it; None if unknown.
        reason: a scheduler's word for it, or the signal's name; None if there is none.
        refused: whether another one would end the same way, as the cluster does not take it.
        clean: whether nothing of it can be left.
    """

    text: str
    returncode: int | None = None
    reason: str | None = None
    refused: bool = False
    clean: bool = True


def _kind(value: Any) -> str:
    if value in KINDS:
        return str(value)
    raise ValueError(f"{value!r} is not one of {', '.join(KINDS)}: {did_you_mean(str(value), KINDS)}")


def _text(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{value!r} is not a text of at least one character")


def _mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise ValueError(f"{value!r} is not a mapping of option names to values")


def _parsed(name: str, value: Any) -> Any:
    try:
        return PARSERS[name](value)
    except ValueError as error:
        raise ValueError(f"pool: {name}: {error}") from None


PARSERS: dict[str, Any] = {
    "workers": _kind,
    "min_workers": lambda value: parse_count(value, least=0),
    "max_workers": parse_count,
    "idle_timeout": parse_time,
    "launch_batch_size": parse_count,
    "launch_interval": parse_time,
    "start_timeout": parse_time,
    "cpus": parse_count,
    "memory": parse_size,
    "gpus": lambda value: parse_count(value, least=0),
    "host": _text,
    "interface": _text,
    **dict.fromkeys(CLUSTERS, _mapping),
}
