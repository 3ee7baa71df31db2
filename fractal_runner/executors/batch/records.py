"""What a job has to say: which calls started, what they logged, how they ended.

A record is a frame of `worker.evidence`: a line of JSON, and bytes behind it. The job writes, the executor
reads along. A bad end of the file is a record that is still being written; a bad record that a good one
follows is damage, and is passed over and told.
"""

from __future__ import annotations

import enum
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fractal_runner.executors.batch.files import open_ours, read_at
from fractal_runner.worker import evidence

_FULL_DISK_S = 60.0  # how long a job waits for space before it gives up
_RETRY_S = 0.5
_READ_BYTES = 64 * 2**20
_decode = json.JSONDecoder().raw_decode


class Kind(enum.StrEnum):
    """What a record tells."""

    JOB = "job"  # a job has started: `id`, `node`, `host`, `pid`
    START = "start"  # of call `c`: `t`, `pid`
    LOG = "log"  # a log record of call `c`; the bytes are it, pickled
    END = "end"  # of call `c`: `t`; the bytes are what it printed (`out` of them), and its process's message
    FAIL = "fail"  # of call `c`, as END; the bytes are what it printed, and an exception, pickled
    STOP = "stop"  # said to a job, not by it: end calls `c` of job `n`; all of them if there is no `c`
    CLOSE = "close"  # nothing more is started: `why`
    REFUSE = "refuse"  # the job does none of its calls, nor would another one: `why`


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it is read.

    Attributes:
        kind: what it tells.
        fields: the rest of its line.
        data: what is behind it.
        end: where in the file it ends.
    """

    kind: str
    fields: dict[str, Any]
    data: memoryview
    end: int


class RecordLog:
    """A job's end of its file.

    Args:
        path: the file.
        sync: whether each record is to be seen on other hosts before it counts as written.
        patience_s: how long to wait for space on a full disk.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: str, *, sync: bool, patience_s: float = _FULL_DISK_S) -> None:
        self._lock = threading.Lock()  # one record at a time
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._sync = sync
        self._patience_s = patience_s
        self.path = path

    def write(self, kind: Kind, *data: bytes | memoryview, **fields: Any) -> None:
        """Write a record.

        Raises:
            OSError: if it could not be written, not even after a while.
        """
        line = json.dumps({"k": kind, **fields}, separators=(",", ":")).encode()
        frame = evidence.frame(b"".join((line, b"\n", *data)))
        deadline = time.monotonic() + self._patience_s
        with self._lock:
            while True:
                try:
                    self._append(frame, sync=self._sync and kind != Kind.LOG)
                except OSError:
                    if time.monotonic() >= deadline:
                        raise
                else:
                    return
                time.sleep(_RETRY_S)  # a disk tells nobody when there is space

    def _append(self, frame: bytes, *, sync: bool) -> None:
        start = os.fstat(self._fd).st_size
        left = memoryview(frame)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
            if sync:
                os.fsync(self._fd)  # over the network, it is only now that a disk turns out to be full
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, start)
            raise

    def close(self) -> None:
        os.close(self._fd)


class Tail:
    """The executor's end of a job's file: what is new in it, each time that it is asked.

    Attributes:
        damage: what was found to be wrong with the file; "" if nothing was.
    """

    __slots__ = ("_offset", "_path", "damage")

    def __init__(self, path: str) -> None:
        self._path = path
        self._offset = 0
        self.damage = ""

    def rewind(self) -> None:
        """Begin anew."""
        self._offset = 0

    def read(self, *, final: bool = False) -> Iterator[Record]:
        """What has been written since.

        Args:
            final: nothing more is going to be written: an unfinished record that whole ones follow is none,
                but one with a damaged length.

        Opened anew each time: over the network, only that makes sure that it is the newest.

        Raises:
            NotOursError: if the file is somebody else's.
            OSError: if it cannot be read.
        """
        while True:
            with open_ours(self._path) as fd:
                size = os.fstat(fd).st_size
                if size < self._offset:
                    self.damage = f"{self._path} was cut to {size} bytes, and had {self._offset}"
                    return
                if size == self._offset:
                    return
                data = _read_some(fd, self._offset, size)
            before = self._offset
            yield from self._parse(data, final)
            if self._offset == before or self._offset >= size:
                return

    def _parse(self, data: bytes, final: bool) -> Iterator[Record]:
        # Only what is whole is counted as read.
        view = memoryview(data)
        offset = 0
        start = self._offset
        while offset < len(data):
            found = evidence.payload_span(data, offset)
            if found is None:
                if not final and evidence.is_unfinished(data, offset):
                    break  # what is in it may look like records, being anybody's data
                good = evidence.next_whole(data, offset)
                if good is None:
                    break
                self.damage = f"{self._path} is damaged between bytes {start + offset} and {start + good}"
                offset = good
                continue
            begin, end = found
            offset = end + 1
            self._offset = start + offset
            line_end = data.index(b"\n", begin, end)
            fields = _decode(data[begin:line_end].decode())[0]  # loads would guess at the encoding first
            yield Record(fields.pop("k"), fields, view[line_end + 1 : end], self._offset)


def _read_some(fd: int, offset: int, size: int) -> bytes:
    """From `offset` on, at most to `size`: so much that at least one record is whole, if any is."""
    limit = _READ_BYTES
    while True:
        data = read_at(fd, offset, min(limit, size - offset))
        if offset + len(data) >= size or evidence.payload_span(data, 0) is not None or not data:
            return data
        limit *= 4
