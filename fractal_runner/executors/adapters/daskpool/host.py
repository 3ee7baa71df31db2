"""One worker of Dask's as a process: started, waited for, ended with all that it has started.

It runs where the worker runs: in a thread of the pool's owner, or as the one call of a cluster's job. A
worker that dies may leave behind the process of its call; nobody hears of its end before that has ended too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

from fractal_runner.executors.adapters.daskpool.terms import MARK, WorkerEnd, WorkerTerms
from fractal_runner.executors.local.peers import KILLED_HINT
from fractal_runner.worker import processes

_NO_PAGES = "DASK_DISTRIBUTED__WORKER__HTTP__ROUTES"  # which have no key
_TURN_S = 0.1
_TERM_GRACE_S = 3.0
_LOG_TAIL_BYTES = 2000


def run_worker(terms: WorkerTerms, stop: threading.Event | None = None) -> WorkerEnd:
    """Run a worker to its end.

    Args:
        terms: the worker's.
        stop: set by whoever wants it to end; a job is ended by its scheduler instead.

    Raises:
        OSError: if its folder cannot be written to, or its interpreter cannot be run.
    """
    mark = f"{MARK}={terms.name}".encode()
    log = Path(terms.folder) / f"{terms.name}.log"
    with open(log, "ab", opener=_private) as output:
        process = subprocess.Popen(
            terms.command(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, _NO_PAGES: "[]", MARK: terms.name},
            start_new_session=True,  # a terminal's Ctrl-C is its owner's
        )
    try:
        code, told_to = _wait(process, stop)
    finally:
        if process.poll() is None:  # who waits was interrupted
            process.kill()
            process.wait()
        left = processes.end_found(lambda: processes.bearers(mark), 0)
        shutil.rmtree(log.with_suffix(""), ignore_errors=True)  # Dask's own, which a killed worker leaves
    text = "was ended" if told_to else _how(code)
    if code and not told_to and (tail := _tail(log)):
        text += f"; the end of its log:\n{tail}"
    reason = processes.signal_name(-code) if code < 0 and not told_to else None
    return WorkerEnd(text, code, reason, clean=not left)


def _wait(process: subprocess.Popen[bytes], stop: threading.Event | None) -> tuple[int, bool]:
    """The worker's exit code, and whether it has ended because it was told to."""
    kill_at: float | None = None
    while True:
        try:
            return process.wait(_TURN_S), kill_at is not None
        except subprocess.TimeoutExpired:
            pass  # so it looks whether it is to end
        if stop is None or not stop.is_set():
            continue
        if kill_at is None:
            process.terminate()
            kill_at = time.monotonic() + _TERM_GRACE_S
        elif time.monotonic() > kill_at:
            process.kill()


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = processes.signal_name(-code)
    return f"was killed by {name}{KILLED_HINT if name == 'SIGKILL' else ''}"


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
    except OSError:  # somebody has removed it: then there is nothing to be told
        return ""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
