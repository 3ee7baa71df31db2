"""Records of what started and what ended, written by whoever does the work.

One file per worker, only ever appended to, by one `write` per record: what was written stands, whatever
dies afterwards. A record is framed and checksummed, so that a reader can tell a record that is still
being written (a bad tail: not yet) from a damaged file (a bad record with a good one behind it).

    FR1 <length, 8 hex digits> <CRC-32 of the payload, 8 hex digits>\\n<payload>\\n

The payload is JSON text here; the frame does not care.
"""

from __future__ import annotations

import json
import os
import re
import threading
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fractal_runner.worker.jsontext import encoder
from fractal_runner.worker.processes import host_name, identify, start_ticks

EVIDENCE_DIR = "evidence"  # in a run's directory
LEDGER_SUFFIX = ".log"

_MAGIC = b"FR1 "
_HEADER = len(_MAGIC) + 8 + 1 + 8 + 1
_HEADER_FORM = re.compile(rb"FR1 ([0-9a-f]{8}) ([0-9a-f]{8})\n")
_TAIL = 65_536
_encode = encoder(separators=(",", ":"))
_local = threading.local()


class CorruptEvidenceError(ValueError):
    """A record is damaged and sound ones follow it: the file was changed after it was written."""


class Ledger:
    """A worker's file in a directory, open for appending.

    Args:
        path: the file; made if need be.
    """

    __slots__ = ("_fd", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record.

        Raises:
            OSError: if it could not be written whole; what was written of it is taken back.
        """
        self.write(_encode(record))

    def write(self, text: str) -> None:
        """Write one record that is JSON text already. Raises as `append`."""
        frame_bytes = frame(text.encode())
        written = os.write(self._fd, frame_bytes)
        if written < len(frame_bytes):
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(28, os.strerror(28), self.path)  # ENOSPC is what a short write means

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()  # with the thread that it belongs to


def own_ledger(directory: str, run_id: str, coordinator: tuple[str, int] = ("", 0), epoch: int = 1) -> Ledger:
    """The ledger of this worker (this thread of this process) for a run, in `directory`.

    It stays open until the worker serves another run, or another coordinator of the run, or ends: a worker
    holds one file at most. Each time it is opened, a record says who the worker is that writes what
    follows, and for whom it works.

    Args:
        directory: where the run's ledgers are.
        run_id: the run.
        coordinator: host and pid of the process that the worker serves.
        epoch: which of the run's coordinators that is.
    """
    ledger: Ledger | None = getattr(_local, "ledger", None)
    place = directory, run_id, coordinator, epoch, os.getpid()
    if ledger is not None and _local.place == place:
        return ledger
    if ledger is not None:
        _local.ledger = None
        ledger.close()
    path = f"{directory}/{own_file_name()}"
    if os.path.exists(path):
        _cut_unfinished(path)
    ledger = Ledger(path)
    host, pid = coordinator
    # Its start, too, as far as it can be seen from here: its pid will be another's some day.
    ticks = start_ticks(pid) if host == host_name() else None
    ledger.append({"kind": "worker", **own_identity(), "coordinator": [host, pid, ticks]})
    _local.ledger = ledger
    _local.place = place
    return ledger


def own_file_name() -> str:
    """The name of this worker's ledgers, for one that takes its place in another process."""
    return getattr(_local, "file_name", None) or _file_name()


def go_on_as(file_name: str) -> None:
    """Let this thread append to the ledgers of the worker whose process it replaces.

    So there is one file per slot of an executor that has a new process for each of its calls.
    """
    _local.ledger = None  # one inherited through a fork is the parent's to close
    _local.place = None
    _local.file_name = file_name


def frame(payload: bytes) -> bytes:
    """`payload` as one record."""
    return b"%s%08x %08x\n%s\n" % (_MAGIC, len(payload), zlib.crc32(payload), payload)


def payloads(data: bytes) -> Iterator[bytes]:
    """The payloads of the whole records in `data`; an unfinished one at the end is left out.

    Raises:
        CorruptEvidenceError: at a bad record that a good one follows, naming the offset.
    """
    offset = 0
    while offset < len(data):
        span = payload_span(data, offset)
        if span is None:
            if (good := next_whole(data, offset)) is not None:
                raise CorruptEvidenceError(
                    f"the record at byte {offset} is damaged, but the one at byte {good} is sound"
                )
            return
        start, end = span
        yield data[start:end]
        offset = end + 1


def read_ledger(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of one worker's file, in the order in which they were written.

    Raises:
        CorruptEvidenceError: naming the file and the offset.
    """
    return map(json.loads, read_payloads(path))


def read_payloads(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The payloads of one worker's file, in the order in which they were written.

    Raises:
        CorruptEvidenceError: naming the file and the offset.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        yield from payloads(data)
    except CorruptEvidenceError as error:
        raise CorruptEvidenceError(f"{os.fspath(path)}: {error}") from None


def header_at(data: bytes, offset: int) -> tuple[int, int] | None:
    """Length and checksum of the payload of the record at `offset`; None if no record begins there."""
    match = _HEADER_FORM.match(data, offset)
    return None if match is None else (int(match[1], 16), int(match[2], 16))


def is_unfinished(data: bytes, offset: int) -> bool:
    """Whether a record begins at `offset` and does not end within `data`."""
    header = header_at(data, offset)
    if header is None:
        rest = data[offset : offset + _HEADER]
        return len(rest) < _HEADER and rest[: len(_MAGIC)] == _MAGIC[: len(rest)]
    return offset + _HEADER + header[0] + 1 > len(data)


def payload_span(data: bytes, offset: int) -> tuple[int, int] | None:
    """Where the payload of the record at `offset` begins and ends; None if no whole record is there."""
    header = header_at(data, offset)
    if header is None:
        return None
    length, checksum = header
    start = offset + _HEADER
    end = start + length
    if data[end : end + 1] != b"\n" or zlib.crc32(memoryview(data)[start:end]) != checksum:
        return None
    return start, end


def next_whole(data: bytes, bad: int) -> int | None:
    """Where, behind a bad record, the next whole one begins; None if there is none."""
    offset = data.find(_MAGIC, bad + 1)
    while offset >= 0:
        if payload_span(data, offset) is not None:
            return offset
        offset = data.find(_MAGIC, offset + 1)
    return None


def _cut_unfinished(path: str) -> None:
    """Take back the last record if whoever wrote it died within the write, so that others can follow it."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        window = _TAIL
        while True:
            start = file.seek(max(0, size - window))
            data = file.read()
            offset = data.rfind(_MAGIC)
            while offset >= 0 and (span := payload_span(data, offset)) is None:
                offset = data.rfind(_MAGIC, 0, offset)
            if offset >= 0 and span is not None:
                end = start + span[1] + 1
                if end < size:
                    file.truncate(end)
                return
            if start == 0:
                return
            window *= 4


def own_identity() -> dict[str, Any]:
    """The identity of this process, as records bear it."""
    pid = os.getpid()
    if getattr(_local, "identified", None) != pid:
        _local.identity = asdict(identify(pid))
        _local.identified = pid
    identity: dict[str, Any] = _local.identity
    return identity


def _file_name() -> str:
    """A name that no other worker has or had: host, boot, pid, start of the process, thread."""
    who = own_identity()
    process = f"{who['host']}-{who['boot_id'][:8]}-{who['pid']}-{who['start_ticks'] or 0}"
    return f"{process}-{threading.get_native_id()}{LEDGER_SUFFIX}"
