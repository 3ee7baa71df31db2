"""The call that does nothing, as a task of labtech: in a module of its own, by which its workers find it."""

from __future__ import annotations

import time

import labtech


@labtech.task(cache=None)
class Nothing:
    """A task that does nothing; its number makes it another one than the rest."""

    number: int

    def run(self) -> None:
        return None


def run(backend: str, count: int, workers: int) -> float:
    """Seconds for `count` tasks on one of labtech's runner backends, its start included."""
    lab = labtech.Lab(storage=None, max_workers=workers, runner_backend=backend, notebook=False)
    tasks = [Nothing(number=number) for number in range(count)]
    began = time.perf_counter()
    lab.run_tasks(tasks, disable_progress=True, disable_top=True)
    return time.perf_counter() - began
