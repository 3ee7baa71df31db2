"""What the interpreter waits for before it ends: executors whose calls have not.

As the standard library's own executors do: what was submitted finishes, and Ctrl-C ends the waiting.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import ClassVar, Protocol


class Closes(Protocol):
    """What holds calls and can be closed."""

    def close(self, wait: bool) -> bool:
        """Take no more calls, let those that there are finish; whether there was something to wait for."""


class _Known:
    """Those of this process."""

    holders: ClassVar[weakref.WeakSet[Closes]] = weakref.WeakSet()

    @classmethod
    def reset(cls) -> None:
        cls.holders = weakref.WeakSet()


def wait_at_exit(holder: Closes) -> None:
    """Have the interpreter wait for it, as long as it lives."""
    _Known.holders.add(holder)


def close_when_gone(owner: object, holder: Closes) -> None:
    """Have `holder` closed once nobody holds its owner any more: it gets no more calls then."""
    weakref.finalize(owner, _close_soon, holder).atexit = False


def _close_soon(holder: Closes) -> None:
    # Not here: the collector may run in the middle of anything, the holder's own work included.
    threading.Thread(target=holder.close, args=(False,), daemon=True).start()


def _at_exit() -> None:
    # Several rounds: the end of a call may start another one, elsewhere, whose argument it was.
    while any(holder.close(wait=True) for holder in list(_Known.holders)):
        pass


if hasattr(os, "register_at_fork"):
    # A forked child ends through the same hook; what it would wait for are its parent's calls.
    os.register_at_fork(after_in_child=_Known.reset)

# Before the interpreter waits for threads, and before it refuses to start new ones: where the standard
# library's own executors have their hook.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
