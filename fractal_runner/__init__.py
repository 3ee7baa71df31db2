"""Run Fractal workflows, and any Python call, through interchangeable executors.

The public names are loaded on first use (PEP 562): a worker process imports
`fractal_runner.worker.command` through this package and must not pay for pydantic or typer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fractal_runner.errors import (
        ExecutorError,
        HistoryError,
        InputFileError,
        JobExecutionError,
        RunBusyError,
        TaskExecutionError,
        TaskOutputValidationError,
    )
    from fractal_runner.executors.adapters.dask import DaskExecutor
    from fractal_runner.executors.adapters.ray import RayExecutor
    from fractal_runner.executors.base import Executor
    from fractal_runner.executors.batch.lsf import LsfExecutor
    from fractal_runner.executors.batch.slurm import SlurmExecutor
    from fractal_runner.executors.calls import CallInfo, CallOptions, TaskInfo, current_call, current_context
    from fractal_runner.executors.factories import register
    from fractal_runner.executors.local.executors import (
        ForkExecutor,
        ProcessExecutor,
        SerialExecutor,
        SpawnExecutor,
        ThreadExecutor,
    )
    from fractal_runner.executors.registry import session
    from fractal_runner.executors.sessions import Session
    from fractal_runner.executors.slots import SlotPool
    from fractal_runner.history.store import History
    from fractal_runner.workflow.events import (
        Event,
        RunFinished,
        RunningUnit,
        RunStarted,
        TaskFinished,
        TaskProgress,
        TaskStarted,
        UnitFinished,
        UnitRetried,
        UnitRunning,
        UnitSubmitted,
    )
    from fractal_runner.workflow.files import load_dataset, load_workflow
    from fractal_runner.workflow.models import Dataset, Image, Task, Workflow, WorkflowTask
    from fractal_runner.workflow.process import process_workflow

__all__ = [
    "CallInfo",
    "CallOptions",
    "DaskExecutor",
    "Dataset",
    "Event",
    "Executor",
    "ExecutorError",
    "ForkExecutor",
    "History",
    "HistoryError",
    "Image",
    "InputFileError",
    "JobExecutionError",
    "LsfExecutor",
    "ProcessExecutor",
    "RayExecutor",
    "RunBusyError",
    "RunFinished",
    "RunStarted",
    "RunningUnit",
    "SerialExecutor",
    "Session",
    "SlotPool",
    "SlurmExecutor",
    "SpawnExecutor",
    "Task",
    "TaskExecutionError",
    "TaskFinished",
    "TaskInfo",
    "TaskOutputValidationError",
    "TaskProgress",
    "TaskStarted",
    "ThreadExecutor",
    "UnitFinished",
    "UnitRetried",
    "UnitRunning",
    "UnitSubmitted",
    "Workflow",
    "WorkflowTask",
    "current_call",
    "current_context",
    "load_dataset",
    "load_workflow",
    "process_workflow",
    "register",
    "session",
]

_HOME_OF = {
    "errors": (
        *("ExecutorError", "HistoryError", "InputFileError", "JobExecutionError", "RunBusyError"),
        *("TaskExecutionError", "TaskOutputValidationError"),
    ),
    "executors.adapters.dask": ("DaskExecutor",),
    "executors.adapters.ray": ("RayExecutor",),
    "executors.base": ("Executor",),
    "executors.batch.lsf": ("LsfExecutor",),
    "executors.batch.slurm": ("SlurmExecutor",),
    "executors.calls": ("CallInfo", "CallOptions", "TaskInfo", "current_call", "current_context"),
    "executors.factories": ("register",),
    "executors.local.executors": (
        *("ForkExecutor", "ProcessExecutor", "SerialExecutor", "SpawnExecutor", "ThreadExecutor"),
    ),
    "executors.registry": ("session",),
    "executors.sessions": ("Session",),
    "executors.slots": ("SlotPool",),
    "history.store": ("History",),
    "workflow.events": (
        *("Event", "RunFinished", "RunStarted", "RunningUnit", "TaskFinished", "TaskProgress"),
        *("TaskStarted", "UnitFinished", "UnitRetried", "UnitRunning", "UnitSubmitted"),
    ),
    "workflow.files": ("load_dataset", "load_workflow"),
    "workflow.models": ("Dataset", "Image", "Task", "Workflow", "WorkflowTask"),
    "workflow.process": ("process_workflow",),
}
_MODULE_OF = {name: module for module, names in _HOME_OF.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
