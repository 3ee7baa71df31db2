"""How many CPUs there are for us, and how calls are told to keep to theirs."""

from __future__ import annotations

import os

# The number of threads that numerical libraries start, one pool each, in every process.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def usable_cpus() -> int:
    """CPUs that this process may use: fewer than the machine has in a container or a job."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def thread_variables(cpus: int) -> dict[str, str]:
    """What the environment of a call's process needs, so that it starts no more threads than it has CPUs.

    What the caller has set stays.
    """
    return {name: str(cpus) for name in THREAD_VARIABLES if name not in os.environ}
