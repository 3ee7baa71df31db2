"""What a pool's workers would be started as: the jobs of their cluster, without Dask and without a pool."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fractal_runner.executors.adapters.daskpool.hosts import worker_options
from fractal_runner.executors.adapters.daskpool.pool import make_cluster_executor
from fractal_runner.executors.adapters.daskpool.terms import CLUSTERS, PoolTerms
from fractal_runner.executors.calls import CallOptions
from fractal_runner.executors.preview import Preview, Previewer


def pool_previewer(
    terms: PoolTerms, max_workers: int | None, folder: str | os.PathLike[str] | None
) -> Previewer:
    """What tells which workers a pool would start for calls.

    Args:
        terms: the pool's.
        max_workers, folder: as `DaskExecutor` has them.

    Raises:
        TypeError, ValueError: if one of them is not what it should be.
    """
    most = min(max_workers or terms.max_workers, terms.max_workers)
    is_clusters = terms.workers in CLUSTERS
    if is_clusters and folder is None:
        raise ValueError(f"folder is missing: the workers of {terms.workers} need one that their nodes share")
    jobs = make_cluster_executor(terms, folder) if is_clusters and folder is not None else None

    def preview(count: int, wanted: Mapping[str, Any]) -> Preview:
        # What only other schedulers have means nothing to Dask, and is left out there.
        options = CallOptions().replaced(**{name: value for name, value in wanted.items() if name != "extra"})
        lacks = terms.shape.lacks(cpus=options.cpus, memory=options.memory, gpus=options.gpus)
        found = Preview(
            calls=count,
            slots=most,
            cpus=options.cpus,
            memory=options.memory,
            gpus=options.gpus,
            reduced=tuple(lacks),
        )
        if jobs is None:
            return found
        workers = max(min(count, most, terms.launch_batch_size), terms.min_workers)
        started = jobs.preview(workers, worker_options(terms.shape))
        return replace(found, arrays=started.arrays, workers_of=terms.workers)

    return preview
