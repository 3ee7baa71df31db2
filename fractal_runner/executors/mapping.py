"""`map` over futures: calls made ahead of their results, one by one or in chunks, as far as is wanted."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def mapped(
    submit: Callable[[Callable[..., Any], tuple[Any, ...], int], Future[Any]],
    fn: Callable[..., T],
    iterables: Sequence[Iterable[Any]],
    *,
    timeout: float | None,
    chunksize: int,
    buffersize: int | None,
) -> Iterator[T]:
    """The results of `fn`, as `Executor.map` says.

    Args:
        submit: makes a call of a function and its arguments, with its index.
        fn, iterables, timeout, chunksize, buffersize: see `Executor.map`.
    """
    if chunksize < 1:
        raise ValueError(f"chunksize must be >= 1, not {chunksize!r}")
    if buffersize is not None:
        if isinstance(buffersize, bool) or not isinstance(buffersize, int):
            raise TypeError(f"buffersize must be an integer or None, not {buffersize!r}")
        if buffersize < 1:
            raise ValueError(f"buffersize must be None or > 0, not {buffersize!r}")
    deadline = None if timeout is None else time.monotonic() + timeout
    rows: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
    numbers = itertools.count()
    called: Callable[..., Any] = fn
    if chunksize > 1:
        called, rows = _call_chunk, ((fn, chunk) for chunk in _chunks(rows, chunksize))

    def submit_next(row: tuple[Any, ...]) -> Future[Any]:
        return submit(called, row, next(numbers))

    ahead = deque(submit_next(row) for row in itertools.islice(rows, _in_chunks(buffersize, chunksize)))
    results = _results(ahead, rows if buffersize is not None else iter(()), submit_next, deadline)
    return results if chunksize == 1 else itertools.chain.from_iterable(results)


def _chunks(rows: Iterator[tuple[Any, ...]], size: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
    while chunk := tuple(itertools.islice(rows, size)):
        yield chunk


def _call_chunk(fn: Callable[..., T], rows: Sequence[tuple[Any, ...]]) -> list[T]:
    return [fn(*row) for row in rows]


def _in_chunks(buffersize: int | None, chunksize: int) -> int | None:
    return None if buffersize is None else max(1, -(-buffersize // chunksize))


def _results(
    ahead: deque[Future[Any]],
    rows: Iterator[tuple[Any, ...]],
    submit: Callable[[tuple[Any, ...]], Future[Any]],
    deadline: float | None,
) -> Iterator[Any]:
    """Results in order, one more call being made for each that is taken. What is left is cancelled."""
    try:
        while ahead:
            if (row := next(rows, None)) is not None:
                ahead.append(submit(row))
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            # Neither this frame nor the queue may keep a future whose result somebody else has now.
            yield _result_or_cancel(ahead.popleft(), left)
    finally:
        for future in ahead:
            future.cancel()


def _result_or_cancel(future: Future[Any], timeout: float | None) -> Any:
    try:
        try:
            return future.result(timeout)
        finally:
            future.cancel()
    finally:
        del future
