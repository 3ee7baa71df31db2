"""The server of the stage that comes next, which imports while that of this stage does.

Until a stage's server is ready its workers wait for one process, and the other processors have nothing to
do. Who starts it starts the next one beside it, and a thread sees to that one from then on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

from fractal_runner.worker import warm
from fractal_runner.worker.links import Link, Links
from fractal_runner.worker.server import Server

_END_S = 2.0
_LOCK_S = 15.0  # beyond the time of the imports: for the link of the stage before to be written

_under_way: list[ServerAhead] = []  # of this process; changed by single steps


class ServerAhead:
    """A server that imports, and that nobody waits for yet.

    Its thread holds the station's lock until it is ready: whoever comes for it waits there, as for any other
    server, and finds it then.

    Args:
        server: the server.
        links: of its station.
        name: what its units look for.
        stage: whose units these are.
        timeout_s: seconds that its imports may take.
    """

    def __init__(self, server: Server, links: Links, name: str, stage: str, timeout_s: float) -> None:
        self._server = server
        self._links = links
        self._name = name
        self._stage = stage
        self._timeout_s = timeout_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._see_to_it, name="fork-server-ahead", daemon=True)

    def begin(self) -> None:
        """See to it from now on, in a thread."""
        _under_way.append(self)
        self._thread.start()

    def is_of(self, directory: str, keep: str) -> bool:
        """Whether it belongs to this station, and to another stage than that."""
        return self._links.directory == directory and self._stage != keep

    def end(self) -> None:
        """It is not wanted any more."""
        self._is_over.set()
        if self._thread.ident is None:
            self._server.stop(0)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)  # its thread sees it
        self._thread.join(_END_S)

    def _see_to_it(self) -> None:
        is_known = False
        try:
            with self._links.lock(self._timeout_s + _LOCK_S, self._is_over.is_set):
                if self._links.read(self._name) is None:
                    is_known = self._make_known(self._server.wait_ready())
        except (OSError, warm.ColdStart, warm.NobodyWaits):
            is_known = False  # the station has gone, or its disk is full: its units start one of their own
        finally:
            if not is_known:
                self._server.stop(0)
            _under_way.remove(self)

    def _make_known(self, why_cold: str | None) -> bool:
        """Write down where it is, or why there is none; whether that has been done."""
        if self._is_over.is_set():
            return False
        server = self._server
        found = Link(cold=why_cold or "", stage=self._stage)
        if why_cold is None:
            found = Link(server.socket, server.pid, server.ticks, stage=self._stage)
        self._links.write(self._name, found)
        return True


def end_those_of(directory: str, keep: str) -> None:
    """End what this process has under way for a station, but for a stage's."""
    for one in [one for one in _under_way if one.is_of(directory, keep)]:
        one.end()
