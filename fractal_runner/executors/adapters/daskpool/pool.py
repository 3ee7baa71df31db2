"""A pool: Dask's scheduler, the desk beside it, its workers, and the folder that all of them share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fractal_runner.executors.adapters.daskpool.options import NOT_OF_JOBS, SAID_OF_JOBS
from fractal_runner.executors.adapters.daskpool.terms import LOCAL, PoolTerms, WorkerEnd, WorkerTerms
from fractal_runner.executors.adapters.daskpool.tls import TlsFiles
from fractal_runner.executors.adapters.extras import DASK
from fractal_runner.executors.batch.files import make_folder
from fractal_runner.executors.factories import class_of

if TYPE_CHECKING:
    from fractal_runner.executors.adapters.daskpool.desk import Desk, Hosts
    from fractal_runner.executors.adapters.daskpool.loops import LoopThread
    from fractal_runner.executors.batch.base import BatchExecutor

LOOPBACK = "127.0.0.1"


class Pool:
    """Scheduler and workers. It belongs to a loop's thread, but for its making.

    Args:
        thread: the loop's.
        terms: what it is.
        folder: for its certificate, its workers' logs and, of a cluster's, for its jobs; on a file system
            that all workers see.
        on_end: is called when a client says that the pool is to end; None if that is not for clients to say.

    Raises:
        TypeError, ValueError: if an option of the cluster is not what it should be.
        NotOursError: if the folder belongs to somebody else.
        OSError: if it cannot be made.
    """

    def __init__(
        self,
        thread: LoopThread,
        terms: PoolTerms,
        folder: str | os.PathLike[str],
        *,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._thread = thread
        self._on_end = on_end
        self.terms = terms
        self.name = f"fr-{uuid.uuid4().hex[:12]}"
        self._executor = None if terms.workers == LOCAL else make_cluster_executor(terms, folder)
        self.folder = make_folder(Path(folder).expanduser().absolute() / self.name)
        self.tls = TlsFiles.below(self.folder)
        self.tls.make()
        self._desk: Desk | None = None
        self._scheduler: Any = None

    @property
    def cluster(self) -> BatchExecutor | None:
        """The executor whose jobs its workers are; None if they are processes of this machine."""
        return self._executor

    @property
    def address(self) -> str:
        """The scheduler's."""
        return str(self._scheduler.address)

    @property
    def security(self) -> Any:
        return self.tls.security()

    def status(self) -> dict[str, Any]:
        """How things are, in plain values."""
        return {} if self._desk is None else self._desk.status()

    async def open(self) -> None:
        """Start the scheduler; workers come as they are wanted.

        Raises:
            OSError: if it cannot listen where it should.
        """
        import dask
        from distributed import Scheduler

        from fractal_runner.executors.adapters.daskpool.desk import Desk

        at_interface = self.terms.interface is not None
        # Its pages of figures have no key: there are none, and where they would be nobody else looks.
        with dask.config.set({"distributed.scheduler.http.routes": []}):
            scheduler = Scheduler(
                security=self.tls.security(),
                protocol="tls",
                port=0,
                dashboard=False,
                dashboard_address=f"{LOOPBACK}:0",
                local_directory=str(self.folder),
                interface=self.terms.interface,
                host=None if at_interface else self.terms.host or LOOPBACK,
            )
        self._scheduler = await scheduler
        self._desk = Desk(self._thread, self.terms, self.name, self._make_hosts, on_end=self._on_end)
        await self._desk.open(self._scheduler)

    async def close(self) -> None:
        """End everything; return once nothing is left."""
        try:
            if self._desk is not None:
                await self._desk.close()
        finally:
            if self._scheduler is not None:
                await self._scheduler.close(reason="fractal-runner-pool-closed")

    def _make_hosts(self, told: Callable[[str, WorkerEnd], None]) -> Hosts:
        from fractal_runner.executors.adapters.daskpool.hosts import ClusterHosts, LocalHosts

        if self._executor is None:
            return LocalHosts(self._thread, self._worker_terms, told)
        return ClusterHosts(self._thread, self._executor, self.terms, self._worker_terms, told)

    def _worker_terms(self, name: str) -> WorkerTerms:
        seen: Callable[[str], str] = str if self._executor is None else self._executor.seen_as
        folder = seen(str(self.folder))
        tls = TlsFiles.below(folder)
        return WorkerTerms(
            name=name,
            address=self.address,
            folder=folder,
            ca_file=tls.cert,
            cert_file=tls.cert,
            key_file=tls.key,
            interface=self.terms.interface,
            host=LOOPBACK if self._executor is None and self.terms.interface is None else None,
        )


def make_cluster_executor(terms: PoolTerms, folder: str | os.PathLike[str]) -> BatchExecutor:
    """The executor of the cluster whose jobs the workers are: one job for each of them.

    Raises:
        TypeError, ValueError: if one of its options is not what it should be, or is the pool's to say.
    """
    chosen: Any = class_of(terms.workers)
    if said := sorted(SAID_OF_JOBS & terms.cluster.keys()):
        raise ValueError(f"pool: {terms.workers}: {said[0]} {NOT_OF_JOBS}")
    # A worker that starts once more would find others with its calls.
    once = {"slurm": {"requeue": False}}.get(terms.workers, {})
    options = {"folder": Path(folder) / "jobs", "poll_interval": 5.0, **once, **terms.cluster}
    made: BatchExecutor = chosen(
        **options, calls_per_job=1, parallel_calls_per_job=1, max_workers=terms.max_workers
    )
    return made


def require_dask() -> None:
    """Whether Dask is installed; its own log tells of warnings only, unless somebody has said otherwise.

    Raises:
        ImportError: if not, with what installs it.
    """
    try:
        import cryptography  # noqa: F401  what certificates are made with
        import dask

        said = dask.config.get("distributed.logging", None) or dask.config.get("logging", None)
        with dask.config.set({} if said else {"logging": _QUIET}):  # as Dask is loaded, not later
            import distributed  # noqa: F401
    except ImportError as error:
        raise DASK.error(error) from error


_QUIET = {"distributed": "warning", "distributed.scheduler": "error"}  # it warns of workers that it ends
