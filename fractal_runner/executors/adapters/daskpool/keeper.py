"""The process that has a pool which is kept: it makes it, writes down where it is, and ends it in the end.

It is the child of the one that was started, which waits until there is a pool, and ends with 0, or until
there will be none, and ends with 1: so nobody has a pool for a child.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fractal_runner.executors.adapters.daskpool.pool import Pool, require_dask
from fractal_runner.executors.adapters.daskpool.terms import LOCAL, PoolTerms
from fractal_runner.executors.adapters.daskpool.warm import PoolFiles, PoolRecord
from fractal_runner.executors.batch.files import make_folder
from fractal_runner.worker.processes import identify

_LOOK_S = 0.5
_logger = logging.getLogger("fractal_runner")


def keep(spec: dict[str, Any], there: Callable[[], None]) -> None:
    """Have a pool until told to end it, by a signal or by a client.

    Args:
        spec: its `name`, its terms (`pool`), and where its files are (`state`, `folder`).
        there: is called once it is there.

    Raises:
        OSError: if it cannot be started, or nobody waits for it any more.
    """
    require_dask()
    from fractal_runner.executors.adapters.daskpool.loops import LoopThread

    files = PoolFiles.of(spec["name"], spec["state"])
    lock = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another process starts a pool {spec['name']!r} at this moment, or has one")
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ending.set())
    terms = PoolTerms.of(spec["pool"])
    if terms.workers == LOCAL:
        shutil.rmtree(files.own, ignore_errors=True)  # of one that died
    make_folder(spec["folder"])
    thread = LoopThread("pool")
    pool = Pool(thread, terms, spec["folder"], on_end=ending.set)
    try:
        thread.begin(pool.open()).result()
        record = PoolRecord(
            name=spec["name"],
            address=pool.address,
            tls=pool.tls,
            keeper=identify(os.getpid()),
            started=time.time(),
            workers=terms.workers,
            max_workers=terms.max_workers,
            shape=terms.shape,
            log=str(files.log),
        )
        _put(files.record, record.dumped())
        there()
        while not ending.wait(_LOOK_S):
            pass  # in turns: so a signal is seen
    finally:
        try:
            thread.begin(pool.close()).result()
        finally:
            thread.stop()
            thread.join()
            shutil.rmtree(pool.folder, ignore_errors=True)
            if terms.workers == LOCAL:
                shutil.rmtree(files.own, ignore_errors=True)
            with suppress(FileNotFoundError):
                files.record.unlink()


def _put(path: Path, content: bytes) -> None:
    """Write a file as a whole, for its owner's eyes only."""
    new = path.with_suffix(f".{os.getpid()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    new.rename(path)


def main() -> None:
    """Have a child keep the pool that standard input says; exit as the module says."""
    spec = json.load(sys.stdin)
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os._exit(0 if os.read(reading, 1) else 1)
    os.close(reading)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # an error, where nobody waits any more
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keep(spec, lambda: os.close(writing) if os.write(writing, b"+") else None)


if __name__ == "__main__":
    main()
