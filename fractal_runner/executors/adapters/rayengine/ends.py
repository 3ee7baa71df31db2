"""How tasks of Ray end that do not end by themselves, in our words."""

from __future__ import annotations

from fractal_runner.errors import ExecutorError, JobExecutionError

# Ray's exceptions, by name (ray.exceptions): our reason, what has happened, and what may be done about it.
_ENDS: dict[str, tuple[str, str]] = {
    "WorkerCrashedError": ("WORKER_DIED", "the Ray worker that it was given to has died"),
    "OutOfMemoryError": (
        "OUT_OF_MEMORY",
        "Ray ended its worker, as the memory of the node was nearly used up (more `memory` for each call "
        "lets fewer of them run there at a time)",
    ),
    "NodeDiedError": ("NODE_DIED", "the node that it was given to has died"),
    "LocalRayletDiedError": ("NODE_DIED", "Ray's daemon on its node has died"),
    "TaskCancelledError": ("CANCELLED", "its task was cancelled in Ray"),
    "RuntimeEnvSetupError": ("RUNTIME_ENV", "Ray could not set up its runtime_env"),
    "TaskUnschedulableError": ("UNSCHEDULABLE", "Ray has no place for it"),
    "ObjectLostError": ("RESULT_LOST", "Ray has lost its result"),
    "OwnerDiedError": ("RESULT_LOST", "Ray has lost its result"),
    "ObjectStoreFullError": ("OBJECT_STORE_FULL", "Ray's object store has no room for its result"),
    "OutOfDiskError": ("OUT_OF_DISK", "Ray has no room on its disk for its result"),
}
_ELSE = "RAY", "Ray reports an error, which `info` has in full"
# After these a call that had not begun is handed to Ray once more: it is not the call's fault.
_OF_THE_PLACE = frozenset({"WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "LocalRayletDiedError"})


def is_of_the_place(error: BaseException) -> bool:
    """Whether it was where the call was to run that has failed, and another place may do."""
    return isinstance(error, JobExecutionError) or not _OF_THE_PLACE.isdisjoint(_names(error))


def error_of(name: str, error: BaseException | None, node: str | None) -> Exception:
    """The error of a call whose task Ray reports as having failed.

    Args:
        name: the call's.
        error: Ray's, or one of our own that has come in its place; None if Ray knows of nothing.
        node: where it ran; None if it had not begun.
    """
    if isinstance(error, JobExecutionError):  # a worker of ours has told it
        return JobExecutionError(
            f"The call {name!r} has not run: {error}", reason=error.reason, node=error.node
        )
    names = _names(error)
    if error is None:
        reason, what = "CONNECTION_LOST", "the connection to its Ray worker was lost"
    elif "RayTaskError" in names:
        # Raised by what runs a call there, not by the call: a package or a module that is not there.
        told = ExecutorError(
            f"The call {name!r} could not be run by its Ray worker (is this version of fractal_runner "
            f"installed there?): {error}",
            type_name=type(error).__qualname__,
        )
        told.__cause__ = error
        return told
    else:
        reason, what = next((_ENDS[known] for known in names if known in _ENDS), _ELSE)
    begun = "had not begun" if node is None else f"was running on {node}"
    failed = JobExecutionError(
        f"The call {name!r} {begun} when it failed: {what}.",
        reason=reason,
        node=node,
        info=None if error is None else str(error),
    )
    failed.__cause__ = error
    return failed


def _names(error: BaseException | None) -> list[str]:
    """The names of an exception's classes, the nearest one first."""
    return [kind.__name__ for kind in type(error).__mro__]
