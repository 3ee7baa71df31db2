"""An event loop in a thread of its own: Dask's connections live there, and all state that goes with them.

What belongs to a loop is changed by its thread alone, and so needs no lock; others send it functions.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_LOOK_S = 0.5  # how often who waits looks whether there was a Ctrl-C
_logger = logging.getLogger("fractal_runner")


class LoopThread:
    """A running event loop, until `stop`.

    Args:
        name: of its thread.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._lock = threading.Lock()  # guards `_stopped`, so that nothing is sent to a closed loop
        self._stopped = False
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself does not keep them
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def soon(self, function: Callable[..., object], *args: Any) -> bool:
        """Have the loop's thread call `function`, from any thread; False once the loop has stopped."""
        with self._lock:
            if self._stopped:
                return False
            self.loop.call_soon_threadsafe(function, *args)
            return True

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Have the loop run a coroutine, from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Have the loop run a coroutine, from its own thread. What it raises is logged."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def stop(self) -> None:
        """End the loop, and what still runs there. From any thread; `join` waits for it."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self.loop.call_soon_threadsafe(self.loop.stop)

    def join(self) -> None:
        """Wait until the loop has ended, in turns: a Ctrl-C does not wake a thread that goes to sleep."""
        while self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_LOOK_S)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("%s: %r", self._thread.name, error, exc_info=error)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            if left:
                self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            asyncio.set_event_loop(None)
            self.loop.close()


class Deliverer:
    """A thread that ends calls and handles their log records: others' code, which may take its time.

    Were it the loop's thread, a callback that waits for another call would wait for ever.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        """How much waits to be delivered."""
        return self._queue.qsize()

    def put(self, function: Callable[..., object], *args: Any) -> None:
        """Have the thread call `function`, after what was put before."""
        self._queue.put((function, args))

    def stop(self) -> None:
        """End the thread after what was put before."""
        self._queue.put(None)

    def join(self) -> None:
        while self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_LOOK_S)

    def _run(self) -> None:
        while (order := self._queue.get()) is not None:
            function, args = order
            try:
                function(*args)
            except BaseException:  # a callback may raise anything, and the next call must end all the same
                _logger.exception("%s: what was to be delivered failed", self._thread.name)
            del order, function, args  # or the last result would be kept until the next one comes
