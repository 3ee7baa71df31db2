"""In the place of a batch executor: it takes what such a one takes, and runs calls in threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fractal_runner.executors.base import Executor
from fractal_runner.executors.calls import Call

PLACE = f"{__name__}:StandIn"


class StandIn(Executor):
    """Keeps note of how it was made, and of its calls' options.

    Attributes:
        made: all of them, in this process.
    """

    made: list[StandIn] = []  # noqa: RUF012 - emptied by the tests

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_workers: int = 2,
        partition: str | None = None,
        path_map: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(max_workers=max_workers)
        self.folder = os.fspath(folder)
        self.partition = partition
        self.path_map = None if path_map is None else dict(path_map)
        self.seen: list[dict[str, Any]] = []
        self._threads = ThreadPoolExecutor(max_workers)
        self.made.append(self)

    def _start(self, call: Call) -> None:
        options = call.options
        given = {"queue": options.queue, "account": options.account, "gpus": options.gpus}
        self.seen.append({**given, "extra": dict(options.extra)})
        self._threads.submit(call.run)

    def _close(self, wait: bool) -> None:
        self._threads.shutdown(wait)
