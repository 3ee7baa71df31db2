"""The executor of a Dask cluster: one of its own, one that is kept warm, or somebody else's."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fractal_runner.executors.adapters.daskpool.options import PoolOptions
from fractal_runner.executors.adapters.daskpool.pool import make_cluster_executor, require_dask
from fractal_runner.executors.adapters.daskpool.terms import CLUSTERS, LOCAL, PoolTerms, Shape
from fractal_runner.executors.adapters.extras import DASK
from fractal_runner.executors.base import Executor, View, at_least_one, info_of
from fractal_runner.executors.calls import Call, CallOptions, TaskInfo
from fractal_runner.executors.factories import class_of
from fractal_runner.executors.leaving import close_when_gone, wait_at_exit
from fractal_runner.executors.preview import Previewer
from fractal_runner.quantities import parse_count

if TYPE_CHECKING:
    from distributed.security import Security

    from fractal_runner.executors.batch.base import BatchExecutor

_EXTRA = frozenset({"retries"})
_OTHERS = ("join", "address", "scheduler_file", "cluster")  # arguments that name what is no pool of its own


class Engine(Protocol):
    """What runs an executor's calls."""

    def put(self, call: Call, retries: int) -> None:
        """Take a call. What is wrong with it may be raised."""

    def stop(self, calls: Sequence[Call]) -> None:
        """End calls that run, as far as it can."""

    def place_of(self, call: Call) -> dict[str, Any]:
        """Where a call runs: `host` and `pid`, as far as they are known."""

    def shapes(self) -> list[Shape]:
        """What the workers have that there are, or may be; none if nothing is known yet."""

    def close(self, wait: bool) -> bool:
        """Let go of everything, once all calls have ended; whether there was something to wait for."""


class DaskExecutor(Executor):
    """Runs calls on the workers of a Dask cluster.

    With nothing said, or with `pool`, it has workers of its own: one call at a time for each of them, in a
    process of its own, and no call is sent to a worker that has another one. So a call that dies takes none
    with it, and can be ended. The workers are processes of this machine, or jobs of SLURM or LSF.

    With `join`, it uses a pool of that kind that is kept between runs. With `address`, `scheduler_file` or
    `cluster`, it hands its calls to somebody else's Dask, where they run as Dask's tasks do: in the worker's
    own process, which may have several; they cannot be ended, and a worker that dies is Dask's matter.

    Args:
        max_workers: how many calls run at a time: by default as many as the pool may have workers, or as the
            cluster has threads.
        pool: of its own, which counts where none of the next four names another one: `workers` ("local",
            "slurm", "lsf"), `min_workers`, `max_workers`, `idle_timeout`, `launch_batch_size`,
            `launch_interval`, `start_timeout`; what each worker has (`cpus`, `memory`, `gpus`); `host` or
            `interface`, where it listens; and below the cluster's name the arguments of its executor. See
            `PoolTerms`.
        join: the name of a pool that was started before.
        address: of somebody else's scheduler.
        scheduler_file: where that has written down its address.
        cluster: a cluster object of Dask's.
        security: `distributed.security.Security` for such a scheduler; a cluster object has its own.
        folder: for what its own pool writes; on a file system that the nodes share, if it is a
            cluster's. By default a temporary one, which will do for local workers.
        path_map: from paths, as seen here, to the same as the nodes see them: of `folder`, if it is a
            cluster's.
        retries: how often a call may run again whose worker, or process, has died with it. A call may say so
            itself: `options(extra={"retries": 2})`.
        context: a mapping that calls read with `current_context()`: a copy, as of the first call that sees
            it.
        name: what it is called in logs.

    Raises:
        ImportError: if Dask is not installed.
        ExecutorError: if there is no pool of that name, or no scheduler where there should be one.
        TypeError, ValueError: if an argument is not what it should be, or does not go with another one.
    """

    isolates = True
    kills = True
    is_remote = True
    python_only: ClassVar[Collection[str]] = ("cluster", "security")

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        pool: PoolOptions | Mapping[str, Any] | None = None,
        join: str | None = None,
        address: str | None = None,
        scheduler_file: str | os.PathLike[str] | None = None,
        cluster: Any = None,
        security: Security | None = None,
        folder: str | os.PathLike[str] | None = None,
        path_map: Mapping[str, str] | None = None,
        retries: int = 0,
        context: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        if max_workers is not None:
            at_least_one(max_workers)
        self._retries = _retries(retries)
        source = _only_one(join=join, address=address, scheduler_file=scheduler_file, cluster=cluster)
        if source in (None, "join") and security is not None:
            raise ValueError("security is for somebody else's scheduler: a pool of ours makes its own")
        require_dask()
        self._engine: Engine
        if source is None:
            terms = _own_terms(pool, max_workers, path_map)
            self._engine = self._own_pool(terms, max_workers, folder, name, context)
        elif source == "join":
            assert join is not None
            self._engine = self._joined(join, max_workers, name, context)
        else:
            foreign = {"address": address, "scheduler_file": scheduler_file, "cluster": cluster}
            self._engine = self._foreign(foreign, security, max_workers, name, context)
        wait_at_exit(self._engine)
        close_when_gone(self, self._engine)

    @property
    def jobs_of_workers(self) -> BatchExecutor | None:
        """The executor whose jobs the workers of its own pool are; None if there are none, or not yet."""
        from fractal_runner.executors.adapters.daskpool.engine import PoolEngine

        return self._engine.cluster if isinstance(self._engine, PoolEngine) else None

    @classmethod
    def unusable(cls, options: Mapping[str, Any]) -> str | None:
        if (lacking := DASK.lacking()) is not None:
            return lacking
        kind = _cluster_of(options)
        return None if kind is None else class_of(kind).unusable(options["pool"].get(kind) or {})

    @classmethod
    def declines(cls, options: Mapping[str, Any]) -> Collection[str]:
        """Local workers need no place that others see; and of another pool, all is said already."""
        return ("folder", "path_map") if _cluster_of(options) is None else ()

    @classmethod
    def previewer(cls, arguments: Mapping[str, Any]) -> Previewer | None:
        if any(arguments.get(name) is not None for name in _OTHERS):
            return None  # what workers others have is known once they are asked
        from fractal_runner.executors.adapters.daskpool.previewing import pool_previewer

        terms = _own_terms(arguments.get("pool"), arguments.get("max_workers"), arguments.get("path_map"))
        return pool_previewer(terms, arguments.get("max_workers"), arguments.get("folder"))

    def _own_pool(
        self,
        terms: PoolTerms,
        max_workers: int | None,
        folder: str | os.PathLike[str] | None,
        name: str | None,
        context: Mapping[str, Any] | None,
    ) -> Engine:
        from fractal_runner.executors.adapters.daskpool.engine import PoolEngine

        super().__init__(max_workers=max_workers or terms.max_workers, name=name, context=context)
        self.is_remote = terms.workers != LOCAL
        if terms.workers in CLUSTERS:
            if folder is None:
                raise ValueError(
                    f"folder is missing: the workers of {terms.workers} need one that their nodes share"
                )
            make_cluster_executor(terms, folder).shutdown()  # what is wrong with its options is said now
        return PoolEngine(terms=terms, folder=folder, max_workers=self.max_workers, name=self.name)

    def _joined(
        self, join: str, max_workers: int | None, name: str | None, context: Mapping[str, Any] | None
    ) -> Engine:
        from fractal_runner.executors.adapters.daskpool.engine import PoolEngine
        from fractal_runner.executors.adapters.daskpool.warm import find_pool

        record = find_pool(join)
        workers = record.max_workers if max_workers is None else max_workers
        super().__init__(max_workers=workers, name=name, context=context)
        return PoolEngine(joined=record, max_workers=workers, name=self.name)

    def _foreign(
        self,
        source: Mapping[str, Any],
        security: Security | None,
        max_workers: int | None,
        name: str | None,
        context: Mapping[str, Any] | None,
    ) -> Engine:
        from fractal_runner.executors.adapters.daskpool.foreign import ForeignEngine

        self.isolates = self.kills = False
        found = ForeignEngine(**source, security=security, max_workers=max_workers, name=name)
        super().__init__(max_workers=found.max_workers, name=name, context=context)
        return found

    def fitting(self, **options: Any) -> tuple[Executor, list[str]]:
        """As `options`; what only schedulers have is left out, and what no worker has is reduced to it."""
        reduced = []
        extra = options.get("extra") or {}
        if foreign := sorted(extra.keys() - _EXTRA):
            options["extra"] = {name: value for name, value in extra.items() if name in _EXTRA}
            reduced = [f"{name} means nothing to Dask" for name in foreign]
        wanted = self._options.replaced(**options)
        shapes = self._engine.shapes()
        for shape in shapes[:1] if len(shapes) == 1 else []:
            lacks = shape.lacks(cpus=wanted.cpus, memory=wanted.memory, gpus=wanted.gpus)
            reduced += [f"{lack} of {self.name}" for lack in lacks]
            if shape.cpus is not None and wanted.cpus > shape.cpus:
                options["cpus"] = shape.cpus
            if shape.memory is not None and (wanted.memory or 0) > shape.memory:
                options["memory"] = f"{shape.memory}B"
            if shape.gpus is not None and wanted.gpus > shape.gpus:
                options["gpus"] = shape.gpus
        chosen = self._options.replaced(**options)
        self._check_options(chosen)
        return View(self, chosen), reduced

    def _check_options(self, options: CallOptions) -> None:
        if unknown := sorted(options.extra.keys() - _EXTRA):
            raise ValueError(f"extra: Dask has no option {unknown[0]!r}: there is 'retries'")
        _retries(options.extra.get("retries", 0))
        shapes = self._engine.shapes()
        lacking = [
            shape.lacks(cpus=options.cpus, memory=options.memory, gpus=options.gpus) for shape in shapes
        ]
        if lacking and all(lacking):
            closest = min(lacking, key=len)
            raise ValueError(f"{'; '.join(closest)} of {self.name}, and no other one has more")

    def _start(self, call: Call) -> None:
        self._engine.put(call, int(call.options.extra.get("retries", self._retries)))

    def _stop(self, calls: Sequence[Call]) -> None:
        self._engine.stop(calls)

    def _close(self, wait: bool) -> None:
        self._engine.close(wait)

    def _infos(self, calls: Sequence[Call]) -> list[TaskInfo]:
        return [info_of(call, state="running", **self._engine.place_of(call)) for call in calls]


def _own_terms(
    pool: Mapping[str, Any] | None, max_workers: int | None, path_map: Mapping[str, str] | None
) -> PoolTerms:
    """The terms of a pool of its own, whose workers see paths as the executor says."""
    terms = PoolTerms.of(pool, max_workers=max_workers)
    if terms.workers in CLUSTERS and path_map is not None:
        return replace(terms, cluster={"path_map": path_map, **terms.cluster})
    return terms


def _cluster_of(options: Mapping[str, Any]) -> str | None:
    """The name of the cluster whose jobs the workers of an executor with these arguments are, if they are."""
    if any(options.get(name) is not None for name in _OTHERS):
        return None
    pool = options.get("pool")
    kind = pool.get("workers") if isinstance(pool, Mapping) else None
    return kind if kind in CLUSTERS else None


def _only_one(**given: Any) -> str | None:
    """Which of these arguments says whose cluster it is."""
    said = [name for name, value in given.items() if value is not None]
    if len(said) > 1:
        raise ValueError(f"{' and '.join(said)} each say whose workers to use: choose one")
    return said[0] if said else None


def _retries(value: Any) -> int:
    try:
        return parse_count(value, least=0)
    except ValueError as error:
        raise ValueError(f"retries: {error}") from None


__all__ = ["DaskExecutor"]
