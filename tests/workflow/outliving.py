"""An executor whose calls outlive the process that submitted them, as those of a batch system do.

`python outliving.py FOLDER` does the call in FOLDER, in its turn.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle

from fractal_runner.executors.base import Executor, stopped_error
from fractal_runner.executors.calls import Call, CallOptions

TOP = Path(__file__).parent.parent.parent


class Outliving(Executor):
    """Each call is a process of a session of its own, with a folder: its turn, its start, its result.

    Args:
        place: where the folders are, each named by its key's digest.
        max_workers: how many calls run at a time; the others wait for their turn.
    """

    kills = True
    isolates = True

    def __init__(self, place: Path, max_workers: int = 2) -> None:
        super().__init__(max_workers=max_workers)
        self.place = place
        self.place.mkdir(exist_ok=True)
        self.asked: list[tuple[str, str]] = []  # what was asked of it, in order

    def __reduce__(self) -> Any:
        return Outliving, (self.place, self.max_workers)

    def attach(self, key: str) -> Future[Any] | None:
        self.asked.append(("attach", key))
        if not (self._folder(key) / "pid").exists():
            return None
        call = Call(len, (), {}, options=CallOptions(key=key), keeper=self._calls)
        self._calls.add(call)
        future = call.future
        self._watch(call, key)
        return future

    def _start(self, call: Call) -> None:
        key = str(call.key)
        self.asked.append(("submit", key))
        folder = self._folder(key)
        ticket = len(list(self.place.iterdir()))
        folder.mkdir()
        (folder / "ticket").write_text(str(ticket))
        (folder / "call").write_bytes(cloudpickle.dumps((call.fn, call.args, call.kwargs)))
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder), str(self.max_workers)],
            cwd=TOP,
            env={**os.environ, "PYTHONPATH": str(TOP)},
            start_new_session=True,
        )
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie is to be taken for it
        (folder / "pid").write_text(str(process.pid))
        self._watch(call, key)

    def _stop(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self._end(self._folder(str(call.key)))
            call.fail(stopped_error(call))

    def _folder(self, key: str) -> Path:
        return self.place / hashlib.sha256(key.encode()).hexdigest()[:16]

    def _watch(self, call: Call, key: str) -> None:
        threading.Thread(
            target=self._follow, args=(call, call.future, self._folder(key)), daemon=True
        ).start()

    def _follow(self, call: Call, future: Future[Any], folder: Path) -> None:
        while not future.done():
            if (folder / "started").exists() and not future.running():
                call.begin()
            if (folder / "result").exists():
                call.begin()
                call.succeed(pickle.loads((folder / "result").read_bytes()))
            time.sleep(0.01)
        if future.cancelled():
            self._end(folder)

    @staticmethod
    def _end(folder: Path) -> None:
        with suppress(ProcessLookupError):
            os.killpg(int((folder / "pid").read_text()), signal.SIGKILL)
        (folder / "ended").touch()


def main() -> None:
    folder, places = Path(sys.argv[1]), int(sys.argv[2])
    fn, args, kwargs = pickle.loads((folder / "call").read_bytes())
    while _in_front(folder) >= places:
        time.sleep(0.01)
    (folder / "started").touch()
    result = cloudpickle.dumps(fn(*args, **kwargs))
    (folder / ".result").write_bytes(result)
    (folder / ".result").rename(folder / "result")
    (folder / "ended").touch()


def _in_front(folder: Path) -> int:
    """How many calls that were submitted before this one have not ended."""
    own = int((folder / "ticket").read_text())
    tickets = folder.parent.glob("*/ticket")
    return sum(int(t.read_text() or own) < own and not t.with_name("ended").exists() for t in tickets)


if __name__ == "__main__":
    main()
