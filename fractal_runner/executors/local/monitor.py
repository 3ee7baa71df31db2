"""What calls that run use of the machine: CPU and memory, of their processes and what these start."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from fractal_runner.executors.base import info_of
from fractal_runner.executors.calls import Call, TaskInfo
from fractal_runner.executors.local.dispatcher import Slot
from fractal_runner.worker.processes import bearers_by_key, commands_of_threads, descendants, host_name


class Monitor:
    """Measures calls. `_lock` guards the CPU times of the snapshot before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: dict[int, tuple[float, float]] = {}  # call id -> time of the look, CPU seconds then

    def infos(self, running: Sequence[tuple[Call, Slot]], state: str) -> list[TaskInfo]:
        """A snapshot of these calls, in `state`."""
        commands = commands_of_threads()
        # What a fork server has started for a call is no child of the call's process.
        keys = {call.key for call, slot in running if slot.worker.pid is not None}
        others = bearers_by_key({key for key in keys if key}) if any(keys) else {}
        return [
            self._info(call, slot, state, (commands, others.get(call.key or "", [])))
            for call, slot in running
        ]

    def _info(self, call: Call, slot: Slot, state: str, known: tuple[dict[int, int], list[int]]) -> TaskInfo:
        commands, others = known
        own = os.getpid()
        pid = slot.worker.pid
        if pid is None:  # a thread: what counts is the command it has started, if it has
            pid = commands.get(slot.thread.ident or 0, own)
        seconds, rss, children, threads = _usage(pid, slot.thread.native_id if pid == own else None, others)
        return info_of(
            call,
            state=state,
            host=host_name(),
            pid=pid,
            cpu=self._percent(call, seconds),
            rss=rss,
            children=children,
            threads=threads,
        )

    def _percent(self, call: Call, seconds: float | None) -> float | None:
        if seconds is None:
            return None
        now = time.monotonic()
        with self._lock:
            for old in [number for number, (then, _) in self._before.items() if now - then > 60]:
                del self._before[old]
            then, used = self._before.get(call.id, (now - (time.time() - (call.started or 0)), 0.0))
            self._before[call.id] = now, seconds
        return 100 * max(0.0, seconds - used) / max(now - then, 1e-3)


def _usage(
    pid: int, native_id: int | None, others: Sequence[int] = ()
) -> tuple[float | None, int | None, int | None, int | None]:
    """CPU seconds, bytes, descendants and threads of a process; of a thread, its own CPU seconds.

    Args:
        pid: the process.
        native_id: the thread.
        others: processes that work for it, whether they are descendants or not.
    """
    try:
        process = psutil.Process(pid)
        if native_id is not None:
            own = [thread for thread in process.threads() if thread.id == native_id]
            seconds = own[0].user_time + own[0].system_time if own else None
            return seconds, process.memory_info().rss, 0, 1
    except psutil.Error:
        return None, None, None, None
    family = [process]
    # psutil would read every process of the machine for it.
    for child in {*descendants(pid), *others}:
        with suppress(psutil.Error):
            family.append(psutil.Process(child))
    seconds, rss, threads = 0.0, 0, 0
    for member in family:
        try:
            times = member.cpu_times()
            seconds += times.user + times.system
            rss += member.memory_info().rss
            threads += member.num_threads()
        except psutil.Error:
            continue  # it has ended meanwhile
    return seconds, rss, len(family) - 1, threads
