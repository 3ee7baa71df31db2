"""Which of CPython's tests are left out for our executors, each with its reason.

Written for the tests of 3.13. `ThreadPool…` is run for threads only, `ProcessPool…` and
`ExecutorDeadlockTest` for processes only, the rest for all.
"""

from __future__ import annotations

_BY_NAME = "its script imports the class by name from concurrent.futures"
_NOT_OURS = "makes the standard library's own executor, not the one that it is given"
_PRIVATE = "looks at private attributes of the standard library's executors"
_INITIALIZER = "there is no `initializer`: what workers have in common is `context`"
_MAX_TASKS = "there is no `max_tasks_per_child`: SpawnExecutor has a process for each call"

_NOT_PICKLED = "what a call is given is in a fork's memory already: it is not pickled"

_FOR_ALL: dict[str, dict[str, str]] = {
    "ThreadPoolExecutorTest": {
        "test_default_workers": f"{_PRIVATE}, for a default of CPUs + 4; ours is the CPUs",
        "test_hang_global_shutdown_lock": _NOT_OURS,
        "test_idle_thread_reuse": _PRIVATE,
        "test_saturation": _PRIVATE,
    },
    "ThreadPoolShutdownTest": {
        "test_cancel_futures_wait_false": _NOT_OURS,
        "test_context_manager_shutdown": _NOT_OURS,
        "test_del_shutdown": _NOT_OURS,
        "test_hang_gh83386": _BY_NAME,
        "test_interpreter_shutdown": _BY_NAME,
        "test_shutdown_no_wait": _NOT_OURS,
        "test_submit_after_interpreter_shutdown": _BY_NAME,
        "test_thread_names_assigned": _NOT_OURS,
        "test_thread_names_default": _NOT_OURS,
        "test_threads_terminate": _PRIVATE,
    },
    "ProcessPoolExecutorTest": {
        "test_idle_process_reuse_multiple": _PRIVATE,
        "test_idle_process_reuse_one": _PRIVATE,
        "test_killed_child": f"{_PRIVATE}, and a dead worker shall break the pool; ours go on",
        "test_max_tasks_early_shutdown": _MAX_TASKS,
        "test_max_tasks_per_child": _MAX_TASKS,
        "test_max_tasks_per_child_defaults_to_spawn_context": _MAX_TASKS,
        "test_max_workers_too_large": "is about Windows",
        "test_python_finalization_error": "replaces a private function for what the pool's own threads do",
        "test_saturation": _PRIVATE,
        "test_traceback": "wants the private class _RemoteTraceback as the cause; ours is of our own",
    },
    "ProcessPoolShutdownTest": {
        "test_context_manager_shutdown": _NOT_OURS,
        "test_del_shutdown": _NOT_OURS,
        "test_hang_gh83386": _BY_NAME,
        "test_interpreter_shutdown": _BY_NAME,
        "test_processes_terminate": _PRIVATE,
        "test_shutdown_no_wait": _NOT_OURS,
        "test_submit_after_interpreter_shutdown": _BY_NAME,
    },
    "ExecutorDeadlockTest": {
        "test_gh105829_should_not_deadlock_if_wakeup_pipe_full": "replaces the pool's private wakeup pipe",
        "test_shutdown_deadlock_pickle": _PRIVATE,
    },
    "InitializerMixin": {"test_initializer": _INITIALIZER},
    "FailingInitializerMixin": {"test_initializer": _INITIALIZER},
}

_FOR_ONE: dict[str, dict[str, dict[str, str]]] = {
    "ForkExecutor": {
        "ProcessPoolExecutorTest": {
            "test_ressources_gced_in_workers": f"{_NOT_PICKLED}, so no copy has an end of its own",
        },
        "ExecutorDeadlockTest": {
            "test_crash_at_task_unpickle": _NOT_PICKLED,
            "test_error_at_task_pickle": _NOT_PICKLED,
            "test_error_at_task_unpickle": _NOT_PICKLED,
            "test_exit_at_task_unpickle": _NOT_PICKLED,
        },
    },
}


def exclusions(executor: str) -> dict[str, str]:
    """What is left out for this class of ours: "TestClass.test_method" and why."""
    return {
        f"{tests}.{method}": reason
        for table in (_FOR_ALL, _FOR_ONE.get(executor, {}))
        for tests, methods in table.items()
        for method, reason in methods.items()
    }
