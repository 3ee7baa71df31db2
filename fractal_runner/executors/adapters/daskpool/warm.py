"""Pools that are kept between runs: started by name, joined by name, and ended when somebody says so.

A process of its own has such a pool (`keeper`), and writes down where it is. What is here reads that, and
never takes a record for a pool: a process that died left its record behind, and that is said.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fractal_runner.errors import ExecutorError, did_you_mean
from fractal_runner.executors.adapters.daskpool.pool import require_dask
from fractal_runner.executors.adapters.daskpool.terms import JOIN_HANDLER, LOCAL, MARK, PoolTerms, Shape
from fractal_runner.executors.adapters.daskpool.tls import TlsFiles
from fractal_runner.executors.batch.files import check_ours, make_folder
from fractal_runner.worker import processes
from fractal_runner.worker.processes import Identity, host_name, is_same_process

START_S = 120.0  # within which a pool has to be there
STOP_S = 180.0  # within which it has to be gone: the jobs of its workers are waited for
_ANSWER_S = 15.0
_TERM_S = 1.0  # between the signals TERM and KILL, of workers that nobody has any more
_LOOK_S = 0.05
_LOG_TAIL_BYTES = 4000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)

Life = Literal["running", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """What a pool that is kept has written down.

    Attributes:
        name: its name.
        address: its scheduler's.
        tls: how to get in.
        keeper: the process that has it.
        started: when, in seconds since the epoch.
        workers: what its workers are.
        max_workers: how many there may be.
        shape: what each of them has.
        log: what the keeper prints.
    """

    name: str
    address: str
    tls: TlsFiles
    keeper: Identity
    started: float
    workers: str
    max_workers: int
    shape: Shape
    log: str

    def dumped(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def loaded(cls, data: bytes) -> PoolRecord:
        """The record that was dumped so.

        Raises:
            ValueError, TypeError, KeyError: if it was none.
        """
        said = json.loads(data)
        parts: dict[str, Any] = {
            "tls": TlsFiles(**said.pop("tls")),
            "keeper": Identity(**said.pop("keeper")),
            "shape": Shape(**said.pop("shape")),
        }
        return cls(**parts, **said)

    @property
    def life(self) -> Life:
        """Whether the process that has it runs; from another host that is not known."""
        if self.keeper.host != host_name():
            return "unknown"
        return "running" if is_same_process(self.keeper) else "dead"

    @property
    def says(self) -> str:
        """Which one it is, in words."""
        return f"pool {self.name!r} (process {self.keeper.pid} on {self.keeper.host})"


@dataclass(frozen=True, slots=True)
class PoolFiles:
    """Where the files of one name are, below the user's state directory.

    Attributes:
        folder: of all pools, for their owner's eyes only.
        name: of this one.
    """

    folder: Path
    name: str

    @classmethod
    def of(cls, name: str, state: str | os.PathLike[str] | None = None) -> PoolFiles:
        """Those of this name.

        Raises:
            ValueError: if it cannot be one.
            NotOursError: if the folder is somebody else's.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a name for a pool: it is made of letters, digits, dots, dashes and "
                "underscores, begins with one of the first two, and has 64 of them at most"
            )
        return cls(make_folder(pools_folder(state)), name)

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.name}.lock"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def own(self) -> Path:
        """Where a pool of local workers has its files."""
        return self.folder / f"{self.name}.d"

    def is_held(self) -> bool:
        """Whether a process has this pool, or is about to: it lets go of that only when it ends."""
        try:
            lock = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def read(self) -> PoolRecord | None:
        """What is written down; None if there is nothing.

        Raises:
            ExecutorError: if it is no record, or somebody else's.
        """
        try:
            check_ours(self.record)
            return PoolRecord.loaded(self.record.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ExecutorError(f"{self.record} is not the record of a pool: {error!r}; remove it") from error


def pools_folder(state: str | os.PathLike[str] | None = None) -> Path:
    """Where the records of pools are: below `state`, by default the user's state directory."""
    if state is not None:
        return Path(state).expanduser().absolute() / "pools"
    import platformdirs

    return platformdirs.user_state_path("fractal-runner") / "pools"


def start_pool(
    name: str,
    pool: Mapping[str, Any] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    timeout: float = START_S,
) -> PoolRecord:
    """Start a pool that stays, in a process of its own; return once it is there.

    Args:
        name: what it is joined by.
        pool: its terms, as `DaskExecutor` takes them.
        folder: on a file system that the nodes share, if its workers are a cluster's.
        state: the state directory; the user's by default.
        timeout: seconds within which it has to be there.

    Raises:
        TypeError, ValueError: if a term is not what it should be.
        ExecutorError: if there is one of this name already, or it does not start.
    """
    require_dask()
    files = PoolFiles.of(name, state)
    terms = PoolTerms.of(pool)
    if terms.workers != LOCAL and folder is None:
        raise ValueError(f"folder is missing: the workers of {terms.workers} need one that their nodes share")
    earlier = files.read()
    if earlier is not None and earlier.life != "dead":
        raise ExecutorError(f"There is a {earlier.says} already: stop it, or choose another name")
    spec = {
        "name": name,
        "state": str(files.folder.parent),
        "folder": str(Path(folder or files.own).expanduser().absolute()),
        "pool": dict(pool or {}),
    }
    try:
        text = json.dumps(spec)
    except TypeError as error:
        raise ValueError(f"pool: {error}: what a pool is started with has to be plain values") from None
    log = os.open(files.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fractal_runner.executors.adapters.daskpool.keeper"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # it outlives the terminal
        )
    finally:
        os.close(log)
    try:
        process.communicate(text.encode(), timeout)  # it ends once there is a pool, or there will be none
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise ExecutorError(
            f"The pool {name!r} has not started in {timeout:g} s: {_tail(files.log)}"
        ) from None
    except BaseException:  # a Ctrl-C: who keeps the pool ends it as soon as it finds that nobody waits for it
        process.kill()
        process.communicate()
        raise
    record = files.read()
    if process.returncode or record is None:
        raise ExecutorError(f"The pool {name!r} has not started: {_tail(files.log)}")
    return record


def find_pool(name: str, state: str | os.PathLike[str] | None = None) -> PoolRecord:
    """The pool of this name.

    Raises:
        ExecutorError: if there is none, or the process that had it is dead.
    """
    files = PoolFiles.of(name, state)
    record = files.read()
    if record is None:
        known = sorted(path.stem for path in files.folder.glob("*.json"))
        others = f": {did_you_mean(name, known)}" if known else ""
        stop = "" if others.endswith("?") else "."
        raise ExecutorError(
            f"There is no pool {name!r}{others}{stop} `fractal-runner pool start {name}` starts one"
        )
    if record.life == "dead":
        raise ExecutorError(
            f"The {record.says} is dead: it has ended without removing its record. The end of its log "
            f"({record.log}) is: {_tail(Path(record.log))} `fractal-runner pool start {name}` starts it anew"
        )
    return record


def list_pools(state: str | os.PathLike[str] | None = None) -> list[PoolRecord]:
    """All pools that are written down, alive or not, by name."""
    folder = pools_folder(state)
    names = sorted(path.stem for path in folder.glob("*.json"))
    records = [PoolFiles.of(name, state).read() for name in names]
    return [record for record in records if record is not None]  # one may have gone meanwhile


def pool_status(record: PoolRecord) -> dict[str, Any]:
    """What a pool says of itself: how many workers it has, of how many; who uses it.

    Raises:
        ExecutorError: if it does not answer.
    """
    return _ask(record, "status")


def stop_pool(
    name: str, state: str | os.PathLike[str] | None = None, *, timeout: float = STOP_S
) -> PoolRecord:
    """End a pool, with its workers and what runs there; return once nothing is left.

    Of a dead pool, what is left on this machine is ended, and its record removed. Workers on other machines
    end by themselves, once they find that nobody answers them.

    Raises:
        ExecutorError: if there is none, or it does not end in time.
    """
    files = PoolFiles.of(name, state)
    record = files.read()
    if record is None:
        return find_pool(name, state)  # which says what there is instead
    if not _is_dead(record):
        _ask(record, "end")
        deadline = time.monotonic() + timeout
        # Its record goes first, and then its process, which is seen from its own host alone.
        while record.life == "running" or (record.life == "unknown" and files.read() == record):
            if time.monotonic() > deadline:
                raise ExecutorError(
                    f"The {record.says} has not ended in {timeout:g} s. Its log ({record.log}) ends: "
                    f"{_tail(Path(record.log))}"
                )
            time.sleep(_LOOK_S)  # another process's end tells nobody
    if _is_dead(record):
        _clear_up(record)
        if record.workers == LOCAL:
            shutil.rmtree(files.own, ignore_errors=True)
    with suppress(FileNotFoundError):
        if files.read() == record:
            files.record.unlink()
    return record


def _clear_up(record: PoolRecord) -> None:
    """End the workers that a dead pool has left here, and remove its folder, unless others may use it.

    Raises:
        ExecutorError: if they do not end.
    """
    folder = Path(record.tls.cert).parent
    mark = f"{MARK}={folder.name}-".encode()
    own = os.getpid()
    left = processes.end_found(
        lambda: [pid for pid in processes.table() if pid != own and processes.entry_of(pid, mark)], _TERM_S
    )
    if left:
        raise ExecutorError(f"The {record.says} is dead, and its workers cannot be ended: processes {left}")
    if record.workers == LOCAL:
        shutil.rmtree(folder, ignore_errors=True)


def _is_dead(record: PoolRecord) -> bool:
    return record.life == "dead"


def _ask(record: PoolRecord, word: str) -> dict[str, Any]:
    require_dask()
    from fractal_runner.executors.adapters.daskpool.streams import Stream

    async def ask() -> dict[str, Any]:
        stream = await Stream.open(record.address, record.tls.security(), JOIN_HANDLER)
        try:
            stream.send((word,))
            while True:
                for kind, *said in await stream.read():
                    if kind == word:
                        answer: dict[str, Any] = said[0]
                        return answer
        finally:
            await stream.close()

    try:
        return asyncio.run(asyncio.wait_for(ask(), _ANSWER_S))
    except (OSError, TimeoutError) as error:
        raise ExecutorError(
            f"The {record.says} does not answer at {record.address}: {str(error) or type(error).__name__}"
        ) from error


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip() or "it says nothing."
    except OSError as error:
        return f"it cannot be read: {error}."
