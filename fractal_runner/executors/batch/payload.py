"""What the jobs of an array are to do, in one file.

Functions and contexts stand in it once, however many calls need them; a job reads the beginning of the
file and its own slice. A number of bytes each, one behind the other:

    FRPAYLOAD2 <length of the header, 16 digits> <its CRC-32, 8 hex digits>\\n
    header     JSON: who made it, and where in the file the rest is, with checksums
    blobs      functions and contexts, pickled
    slices     for each job an index of its calls (JSON), and their arguments, pickled

Nothing here unpickles. A function is unpickled where it is called, once per process (`Bound`).
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import platform
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fractal_runner
from fractal_runner.errors import ExecutorError
from fractal_runner.executors.batch.files import open_ours, put, read_at

_MAGIC = b"FRPAYLOAD2 "
_START = len(_MAGIC) + 16 + 1 + 8 + 1

PYTHON = platform.python_version()


@dataclass(frozen=True, slots=True)
class PackedCall:
    """A call as it travels.

    Attributes:
        name, key: the call's.
        function: it, pickled.
        arguments: the pair of its arguments, by position and by name, pickled.
        context: what it sees of the executor's context, pickled.
        timeout: seconds after which it is ended.
        tries: how many jobs it has been given to before, none of which started it.
        map_index: its place among those of one `map`.
    """

    name: str
    key: str | None
    function: bytes
    arguments: bytes
    context: bytes
    timeout: float | None = None
    tries: int = 0
    map_index: int | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for all jobs of an array.

    Attributes:
        parallel: how many calls a job runs at a time.
        cpus: CPUs of each call.
        memory: bytes of each call; None if it did not say.
        gpus: GPUs of each call.
        time: seconds of each call, for the scheduler.
        queue, account, extra: see `CallOptions`.
        job: what each job asks for: `cpus`, `memory`, `gpus`, `time`.
    """

    parallel: int = 1
    cpus: int = 1
    memory: int | None = None
    gpus: int = 0
    time: float | None = None
    queue: str | None = None
    account: str | None = None
    extra: Mapping[str, Any] | None = None
    job: Mapping[str, Any] | None = None

    @property
    def group(self) -> str:
        """The same for calls that need the same, which may share a job."""
        needs = (self.cpus, self.memory, self.gpus, self.time, self.queue, self.account, self.extra)
        return json.dumps(needs, sort_keys=True, default=dict)


def write_payload(
    path: str, slices: Sequence[Sequence[PackedCall]], terms: Terms, *, levels: Mapping[str, int]
) -> None:
    """Write what an array's jobs are to do.

    Args:
        path: the file.
        slices: the calls of each job.
        terms: what holds for all of them.
        levels: the levels of loggers in this process.

    Raises:
        OSError: if it cannot be written.
    """
    blobs: dict[bytes, int] = {}
    pieces: list[bytes] = []
    places = []
    offset = 0
    for calls in slices:
        index, arguments = [], []
        for call in calls:
            index.append(
                (
                    *(call.name, call.key, blobs.setdefault(call.function, len(blobs))),
                    *(blobs.setdefault(call.context, len(blobs)), len(call.arguments)),
                    *(call.timeout, call.tries, call.map_index),
                )
            )
            arguments.append(call.arguments)
        head, body = json.dumps(index).encode(), b"".join(arguments)
        places.append((offset, len(head), len(body), zlib.crc32(head), zlib.crc32(body)))
        pieces += head, body
        offset += len(head) + len(body)
    header = {
        "python": PYTHON,
        "package": fractal_runner.__version__,
        "made": time.time(),
        "search": own_search_path(),
        "levels": dict(levels),
        "terms": {
            name: dict(value) if isinstance(value, Mapping) else value
            for name in Terms.__slots__
            if (value := getattr(terms, name)) is not None
        },
        "blobs": [(len(blob), zlib.crc32(blob)) for blob in blobs],
        "slices": places,
    }
    text = json.dumps(header).encode()
    put(path, _first_line(text), text, *blobs, *pieces)


class Payload:
    """A payload as it is read, a part at a time.

    Args:
        path: the file.

    Raises:
        ExecutorError: if it is no such file, or damaged.
        NotOursError: if it is somebody else's.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with open_ours(path) as fd:
            start = os.pread(fd, _START, 0)
            digits = start[len(_MAGIC) : len(_MAGIC) + 16]
            if len(start) < _START or not start.startswith(_MAGIC) or not digits.isdigit():
                raise ExecutorError(f"{path} is no payload of this version, or cut short")
            length = int(digits)
            text = read_at(fd, _START, min(length, os.fstat(fd).st_size))
        if _first_line(text) != start:
            raise ExecutorError(f"{path} is damaged in its header, or cut short: its checksum is another one")
        self.header: dict[str, Any] = json.loads(text)
        self.terms = Terms(**self.header["terms"])
        self._blobs: list[tuple[int, int, int]] = []
        offset = _START + length
        for size, checksum in self.header["blobs"]:
            self._blobs.append((offset, size, checksum))
            offset += size
        self._slices_at = offset

    @property
    def count(self) -> int:
        """How many jobs there are."""
        return len(self.header["slices"])

    def keys(self, number: int) -> list[str | None]:
        """The keys of a job's calls."""
        return [row[1] for row in self._index(number)]

    def size(self, number: int) -> int:
        """How many calls a job has."""
        return len(self._index(number))

    def calls(self, number: int) -> list[StoredCall]:
        """A job's calls.

        Raises:
            ExecutorError: if they are damaged.
        """
        index = self._index(number)
        start, head, size, _, checksum = self.header["slices"][number]
        body = self._read(self._slices_at + start + head, size, checksum)
        found, offset = [], 0
        for place, (name, key, function, context, length, timeout, tries, map_index) in enumerate(index):
            arguments = body[offset : offset + length]
            offset += length
            found.append(
                StoredCall(
                    *(self, place, name, key, function, context, arguments),
                    timeout=timeout,
                    tries=tries,
                    map_index=map_index,
                )
            )
        return found

    def blob(self, number: int) -> bytes:
        """A function or a context, pickled."""
        return self._read(*self._blobs[number])

    def place_of(self, number: int) -> tuple[int, int, int]:
        """Where in the file a function or a context stands, and its checksum."""
        return self._blobs[number]

    def _index(self, number: int) -> list[list[Any]]:
        start, head, _, checksum, _ = self.header["slices"][number]
        index: list[list[Any]] = json.loads(self._read(self._slices_at + start, head, checksum))
        return index

    def _read(self, offset: int, size: int, checksum: int) -> bytes:
        return _read(self.path, offset, size, checksum)


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A call as it stands in a payload.

    Attributes:
        place: which of its job's calls it is.
        name, key, arguments, timeout, tries, map_index: see `PackedCall`.
        function, context: their numbers among the blobs.
    """

    payload: Payload
    place: int
    name: str
    key: str | None
    function: int
    context: int
    arguments: bytes
    timeout: float | None
    tries: int
    map_index: int | None

    def bound(self, *about: Any) -> Bound:
        """The call as what a worker process unpickles; `about` follows its function and arguments."""
        return Bound(self.payload.path, *self.payload.place_of(self.function), self.arguments, *about)

    def packed(self) -> PackedCall:
        """The call, to be sent once more."""
        payload = self.payload
        return PackedCall(
            *(self.name, self.key, payload.blob(self.function), self.arguments, payload.blob(self.context)),
            timeout=self.timeout,
            tries=self.tries,
            map_index=self.map_index,
        )


class Bound:
    """A call that becomes function, arguments, named arguments and what follows when it is unpickled."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return _unbound, self._parts


def _unbound(
    path: str, offset: int, size: int, checksum: int, arguments: bytes, *about: Any
) -> tuple[Any, ...]:
    fn = _function(path, offset, size, checksum)
    args, kwargs = pickle.loads(arguments)
    return fn, args, kwargs, *about


@functools.lru_cache(maxsize=64)
def _function(path: str, offset: int, size: int, checksum: int) -> Any:
    return pickle.loads(_read(path, offset, size, checksum))


def _read(path: str, offset: int, size: int, checksum: int) -> bytes:
    with open_ours(path) as fd:
        data = read_at(fd, offset, size)
    if len(data) < size:
        raise ExecutorError(f"{path} is cut short: it had {offset + size} bytes, or more")
    if zlib.crc32(data) != checksum:
        raise ExecutorError(
            f"{path} is damaged between bytes {offset} and {offset + size}: their checksum is another one"
        )
    return data


def _first_line(header: bytes) -> bytes:
    return _MAGIC + b"%016d %08x\n" % (len(header), zlib.crc32(header))


def own_search_path() -> list[str]:
    """Where this process finds modules besides its installation: next to its script, mostly."""
    installed = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    found = []
    for entry in sys.path:
        place = os.path.realpath(entry or os.getcwd())
        if not any(place.startswith(f"{prefix}/lib") for prefix in installed):
            found.append(place)
    return found
