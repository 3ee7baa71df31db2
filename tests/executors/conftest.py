"""Whatever a module of these tests does, nothing of it is left: no process, thread, descriptor or file."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

# Processes that Python's and loky's multiprocessing start once and keep until the interpreter ends.
_KEPT = ("resource_tracker", "forkserver")
# Their descriptors: a pipe to each of the two trackers; the fork server's socket and pipe, the null
# device that multiprocessing keeps open for it; one for a module that is loaded lazily meanwhile.
_FDS_KEPT = 6
# multiprocessing keeps this directory until the interpreter ends.
_FOLDERS_KEPT = "pymp-*"


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compares what there is after a module with what there was before it.

    By module, not by session: other tests may run in the same process before and after.
    """
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.setenv("TMPDIR", str(temporary))
        threads, children, fds = set(threading.enumerate()), _children(), _open_files()
        yield
        _await_none(lambda: [str(thread) for thread in set(threading.enumerate()) - threads], "threads")
        _await_none(lambda: [_described(child) for child in _children() - children], "child processes")
        _await_none(lambda: _beyond(_FDS_KEPT, _open_files(), fds), "file descriptors")
        _await_none(
            lambda: sorted(map(str, set(temporary.iterdir()) - set(temporary.glob(_FOLDERS_KEPT)))),
            "temporary files",
        )


def _await_none(left: Callable[[], object], what: str) -> None:
    """Wait until nothing is left: what has been told to end may take a moment."""
    from fractal_runner.testing import wait_until

    try:
        wait_until(lambda: not left(), f"no {what} are left", seconds=15)
    except AssertionError:
        pytest.fail(f"{what} are left: {left()}")


def _children() -> set[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    # What a cluster starts anew is below its keeper, which ends all of it with the cluster.
    keepers = [child for child in children if "clusters/slurm/keeper.py" in _described(child)]
    kept = {child for keeper in keepers for child in _below(keeper)}
    others = set(children) - kept
    return {child for child in others if not any(word in _described(child) for word in _KEPT)}


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _described(child: psutil.Process) -> str:
    try:
        return f"{child.pid} {child.status()} {child.cmdline()}"
    except psutil.Error:
        return "one that ends"


def _open_files() -> dict[int, str]:
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            found[int(path.name)] = str(path.readlink())
        except OSError:
            continue  # the one that lists them
    return found


def _beyond(few: int, now: dict[int, str], before: dict[int, str]) -> dict[int, str]:
    """The descriptors that are new, if there are more than a few of them."""
    return {fd: now[fd] for fd in now.keys() - before.keys()} if len(now) > len(before) + few else {}
