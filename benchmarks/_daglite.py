"""The call that does nothing, as a task of daglite: in a module of its own, by which its workers find it."""

from __future__ import annotations

import time

import daglite
from daglite.settings import DagliteSettings, set_global_settings


@daglite.task
def nothing(number: int) -> None:
    """A task that does nothing."""


def run(backend: str, count: int, workers: int) -> float:
    """Seconds for `count` calls on one of daglite's backends, its start included."""
    set_global_settings(DagliteSettings(max_backend_threads=workers, max_parallel_processes=workers))
    calls = nothing.with_options(backend_name=backend).product(number=range(count))
    began = time.perf_counter()
    daglite.evaluate(calls)
    return time.perf_counter() - began
