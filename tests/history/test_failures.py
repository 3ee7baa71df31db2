"""What fails around a run: disks that are full or read-only, and files that are damaged or gone.

After each failure it must be clear what failed and why, nothing may be left running, and once the cause is
gone the run must go on without doing again what is known to be done.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import History, HistoryError, JobExecutionError, TaskExecutionError, UnitFinished
from fractal_runner.worker.evidence import Ledger
from tests.history.noted import TASKS, NotedRun, sql, until

_LOCK_FOR_3_S = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
time.sleep(3)
database.execute("COMMIT")
"""


async def fail_in_mid_run(run: NotedRun, fail: Callable[[], None], **more: Any) -> Any:
    """Have something fail once the first unit of the second task has ended, and before its last one has."""
    held = run.hold("second", run.units - 1)
    failed = False

    def listen(event: Any) -> None:
        nonlocal failed
        if isinstance(event, UnitFinished) and event.order == 1 and not failed:
            failed = True
            fail()
            held.unlink()

    with pytest.raises((TaskExecutionError, JobExecutionError)) as caught:
        await run.go(on_event=listen, **more)
    assert failed
    run.expect_nothing_left()
    return caught.value


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_a_history_on_a_full_disk_ends_the_run_which_goes_on_once_there_is_space(
    tmp_path: Path, disk: Any, executor: str
) -> None:
    small = disk("1m")
    path = small.place / "history.sqlite"
    run = NotedRun(tmp_path, units=20)

    error = await fail_in_mid_run(run, small.fill, history=path, executor=(executor, {"max_workers": 2}))

    assert isinstance(error, JobExecutionError)
    assert f"The run cannot go on: The history {path} cannot be written: the disk is full" in str(error)
    assert (error.task_name, error.type_filters) == ("second", {"first": True})
    assert len(error.dataset.images) == run.units
    with pytest.raises((HistoryError, JobExecutionError), match=f"{path} cannot be written: the disk is"):
        await run.go(resume=True, history=path)
    run.expect_nothing_left()

    small.free()
    known = run.recorded(path) | run.evidenced()
    assert {unit for unit in known if unit[0] == "first"} == {("first", n) for n in range(20)}
    await run.finish(known, path)


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_a_run_directory_on_a_full_disk_ends_the_run_which_goes_on_once_there_is_space(
    tmp_path: Path, disk: Any, elsewhere: bool
) -> None:
    small = disk("2m")
    run = NotedRun(tmp_path, units=20, directory=small.place / "run")
    history = tmp_path / "history.sqlite" if elsewhere else None

    error = await fail_in_mid_run(run, small.fill, history=history)

    said = "\n".join(str(problem) for problem in (error, *error.failures))  # a unit may be the first to fail
    assert re.search("No space left on device|the disk is full", said)
    assert str(run.directory) in said
    started = run.started()
    with pytest.raises((HistoryError, JobExecutionError), match=r"No space left on|disk is full") as caught:
        await run.go(resume=True, history=history)
    assert str(run.directory) in str(caught.value)
    run.expect_nothing_left()
    assert run.started() == started

    small.free()
    await run.finish(run.recorded(history) | run.evidenced(), history)


async def test_a_unit_whose_end_found_no_space_anywhere_is_run_again(
    tmp_path: Path, disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = disk("1m")
    path = small.place / "history.sqlite"
    run = NotedRun(tmp_path)
    write = Ledger.write
    is_full = threading.Event()

    def write_while_there_is_space(self: Ledger, text: str) -> None:
        if is_full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        write(self, text)

    def fill() -> None:
        small.fill()
        is_full.set()

    monkeypatch.setattr(Ledger, "write", write_while_there_is_space)
    await fail_in_mid_run(run, fill, history=path)
    assert run.ended()["second", run.units - 1] == 1
    assert ("second", run.units - 1) not in run.evidenced() | run.recorded(path)
    small.free()
    is_full.clear()
    began = time.monotonic()

    await run.finish(run.recorded(path) | run.evidenced(), path)

    assert run.ended()["second", run.units - 1] == 2
    assert time.monotonic() - began < 5, "that it runs no more is known here"


async def test_a_disk_that_is_full_from_the_beginning_leaves_nothing_in_the_way(
    tmp_path: Path, disk: Any
) -> None:
    small = disk("1m")
    run = NotedRun(tmp_path, directory=small.place / "run")
    small.fill()

    with pytest.raises((HistoryError, JobExecutionError), match=r"No space left on|disk is full") as caught:
        await run.go()

    assert str(run.directory) in str(caught.value)
    assert not run.started()
    run.expect_nothing_left()
    small.free()
    run.check(await run.go())


async def test_a_history_that_is_read_only_from_the_beginning_is_named(
    tmp_path: Path, disk: Any, interrupted: NotedRun
) -> None:
    still = disk("4m")
    path = still.place / "history.sqlite"
    shutil.copy(interrupted.directory / "history.sqlite", path)
    still.remount("ro")
    run = NotedRun(tmp_path / "new")

    for name in ("history.sqlite", "other.sqlite"):
        with pytest.raises(HistoryError, match=f"The history {still.place}/{name} cannot be written: it can"):
            await run.go(history=still.place / name)

    assert not run.started()
    assert not (run.directory / "run.json").exists()
    still.remount("rw")
    run.check(await run.go(history=path), path)


async def test_a_history_on_a_read_only_file_system_can_be_read(disk: Any, interrupted: NotedRun) -> None:
    still = disk("4m")
    path = still.place / "history.sqlite"
    known = interrupted.recorded()
    shutil.copy(interrupted.directory / "history.sqlite", path)

    still.remount("ro")

    assert known
    assert interrupted.recorded(path) == known


async def test_a_disk_that_becomes_read_only_ends_the_run_which_goes_on_once_it_can_be_written(
    tmp_path: Path, failing_disk: tuple[Path, Callable[[], None]]
) -> None:
    place, fail = failing_disk
    path = place / "history.sqlite"
    run = NotedRun(tmp_path, units=20)

    error = await fail_in_mid_run(run, fail, history=path)

    assert isinstance(error, JobExecutionError)
    assert f"The run cannot go on: The history {path} cannot be written: " in str(error)
    assert re.search("its disk does not work|not written|cannot be opened", str(error))
    rescued = tmp_path / "rescued.sqlite"
    for end in ("", "-wal"):  # as whoever repairs the disk would find it
        if Path(f"{path}{end}").exists():
            shutil.copy(f"{path}{end}", f"{rescued}{end}")
    await run.finish(run.recorded(rescued) | run.evidenced(), rescued)


@pytest.fixture
def public_place() -> Iterator[Path]:
    """A directory that every user can enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="fractal-runner-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
@pytest.mark.parametrize("mine", ["file", "nothing"])
def test_a_history_that_the_user_may_not_write_is_refused(public_place: Path, mine: str) -> None:
    place, path = public_place / "shared", public_place / "shared" / "h.sqlite"
    place.mkdir()
    History(path).close()
    nobody = pwd.getpwnam("nobody")
    (public_place / "own").mkdir()
    os.chown(public_place / "own", nobody.pw_uid, nobody.pw_gid)
    if mine == "file":  # but not the directory, where SQLite wants to make files of its own
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    code = f"""
import asyncio, os, pathlib
from fractal_runner import HistoryError
from tests.history.noted import NotedRun
asyncio.run(NotedRun(pathlib.Path({str(public_place / "warm")!r}), units=1).go())  # imports everything
os.setgroups([])
os.setgid({nobody.pw_gid})
os.setuid({nobody.pw_uid})
run = NotedRun(pathlib.Path({str(public_place / "own")!r}))
try:
    asyncio.run(run.go(history={str(path)!r}))
except HistoryError as error:
    print(error)
assert not run.started()
with open({str(public_place / "own" / "read")!r}, "w") as file:
    from fractal_runner import History
    file.write(repr(list(History({str(path)!r}, read_only=True).read.runs())))
"""

    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
        check=False,
    )

    assert answer.returncode == 0, answer.stderr
    assert re.match(f"The history {path} cannot be (written|read): it can", answer.stdout), answer
    assert (public_place / "own" / "read").read_text() == "[]"


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: cut(path, path.stat().st_size // 2), "damaged"),
        (lambda path: cut(path, 0), "is empty"),
        (lambda path: path.write_text("Dear diary,\n" * 1000), "is no SQLite database, or a damaged one"),
        (lambda path: path.unlink(), "is gone: put it back, or go on in a new directory"),
    ],
    ids=["cut in half", "cut to nothing", "a text", "deleted"],
)
async def test_a_damaged_history_is_refused_and_nothing_is_run(
    interrupted: NotedRun, damage: Callable[[Path], object], says: str
) -> None:
    run = interrupted
    path = run.directory / "history.sqlite"
    sql(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    known, started = run.recorded() | run.evidenced(), run.started()
    backup = path.read_bytes()
    damage(path)
    damaged = path.read_bytes() if path.exists() else None

    with pytest.raises(HistoryError, match=f"{path}.* {says}"):
        await run.go(resume=True)

    run.expect_nothing_left()
    assert run.started() == started
    assert (path.read_bytes() if path.exists() else None) == damaged, "somebody may want to repair it"
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    path.write_bytes(backup)
    await run.finish(known)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_write_ahead_log_that_was_cut_never_makes_a_wrong_state(tmp_path: Path, share: float) -> None:
    run = NotedRun(tmp_path, units=8)
    run.start_and_kill("second", 5)
    log = run.directory / "history.sqlite-wal"
    backup = log.read_bytes()
    known = {("first", n) for n in range(8)}
    assert known <= run.evidenced()
    log.write_bytes(backup)
    cut(log, int(share * len(backup)))
    started = run.started()

    try:
        asyncio.run(run.finish(known))
    except HistoryError as error:  # the run itself was in what is lost
        assert f"{run.directory}/history.sqlite does not know the run {run.run_id}" in str(error)
        assert run.started() == started


@pytest.mark.parametrize("content", ["", '{"run_id": ', '"x"', '{"run_id": 3, "history": null}'])
async def test_a_damaged_run_file_is_refused_and_nothing_is_run(interrupted: NotedRun, content: str) -> None:
    run = interrupted
    known, started = run.recorded() | run.evidenced(), run.started()
    path = run.directory / "run.json"
    backup = path.read_text()
    path.write_text(content)

    for resume in (True, False):
        with pytest.raises(HistoryError, match=f"{path} is damaged: it does not say which run this is"):
            await run.go(resume=resume)

    assert run.started() == started
    path.write_text(backup)
    await run.finish(known)


async def test_a_run_file_that_is_gone_is_written_anew(interrupted: NotedRun) -> None:
    run = interrupted
    run_id, known = run.run_id, run.recorded() | run.evidenced()
    (run.directory / "run.json").unlink()

    with pytest.raises(ValueError, match="already holds a run: go on with it"):
        await run.go()
    await run.finish(known)

    assert run.run_id == run_id


async def test_the_history_of_another_directorys_run_is_refused(
    tmp_path: Path, interrupted: NotedRun
) -> None:
    run = interrupted
    other = NotedRun(tmp_path / "other", units=2)
    dataset = await other.go()
    path = other.directory / "history.sqlite"
    known, started = run.recorded() | run.evidenced(), run.started()

    with pytest.raises(HistoryError) as caught:
        await run.go(resume=True, history=path)

    assert str(caught.value) == (
        f"The history {path} does not know the run {run.run_id} of {run.directory}: "
        "give the history that it was begun with."
    )
    assert run.started() == started
    other.check(dataset)
    await run.finish(known)


async def test_a_history_that_is_not_there_is_not_made_for_a_run_that_began_with_another(
    tmp_path: Path, interrupted: NotedRun
) -> None:
    path = tmp_path / "mistyped.sqlite"

    with pytest.raises(HistoryError, match=f"The history {path} does not know the run {interrupted.run_id}"):
        await interrupted.go(resume=True, history=path)

    assert not path.exists()


async def test_a_history_that_is_locked_for_a_while_is_waited_for(tmp_path: Path) -> None:
    run = NotedRun(tmp_path, units=20)
    held = run.hold("second", 19)
    call = asyncio.ensure_future(run.go())
    await until(lambda: run.started()["second", 19] > 0)

    locker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _LOCK_FOR_3_S, str(run.directory / "history.sqlite")),
        stdout=subprocess.PIPE,
    )
    assert locker.stdout is not None
    assert await locker.stdout.readline() == b"locked\n"
    held.unlink()
    await until(lambda: run.ended()["second", 19] > 0)
    assert not call.done()
    assert ("second", 19) not in run.recorded()

    run.check(await call)
    assert await locker.wait() == 0
    assert set(run.started().values()) == {1}


async def test_a_history_given_as_a_file_is_remembered_for_the_next_time(tmp_path: Path) -> None:
    run = NotedRun(tmp_path, units=4)
    path = tmp_path / "elsewhere.sqlite"
    (run.place / "full").touch()
    held = run.hold("second", 1)
    call = asyncio.ensure_future(run.go(history=str(path)))
    await until(lambda: run.started()["second", 1] > 0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    held.unlink()

    known = run.recorded(path) | run.evidenced()
    dataset = await run.go(resume=True)

    run.check(dataset, path)
    assert not (run.directory / "history.sqlite").exists()
    assert json.loads((run.directory / "run.json").read_text())["history"] == f"sqlite:///{path}"
    assert all(run.started()[unit] == 1 for unit in known)
    assert {task for task, _ in known} == set(TASKS)
