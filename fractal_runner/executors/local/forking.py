"""A forked child process, as multiprocessing would have it, but for two things.

Its end is seen through a pidfd (a pipe's would come late), and Python's warning about forks in a process
with threads is answered: what the child does is known to need no lock of another thread's, a child that
does not get going is noticed, and every call can have a process of another kind.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from multiprocessing import util
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess
from typing import Any

warnings.filterwarnings(
    "ignore",
    message=r"This process .* is multi-threaded, use of fork\(\)",
    category=DeprecationWarning,
    module=r"fractal_runner\.executors\.local\.forking",
)


class _ForkPopen(Popen):
    def _launch(self, process_obj: Any) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = process_obj._bootstrap()
            finally:
                os._exit(code)
        self.sentinel = os.pidfd_open(self.pid)
        self.finalizer = util.Finalize(self, os.close, (self.sentinel,))


class ForkProcess(BaseProcess):
    """A process that is a copy of this one, with the calling thread alone."""

    _start_method = "fork"
    _Popen: Callable[[Any], Popen] = staticmethod(_ForkPopen)
