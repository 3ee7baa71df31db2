"""What a job has written down is read once, in order, whatever pieces it comes in and whatever befalls it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal_runner.executors.batch.records import Kind, RecordLog, Tail
from fractal_runner.worker import evidence

FULL = OSError(28, "No space left on device")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "records").touch(0o600)
    return tmp_path / "records"


def log_of(path: Path, **options: Any) -> RecordLog:
    return RecordLog(str(path), **{"sync": False, "patience_s": 0, **options})


def write_calls(path: Path, *numbers: int) -> None:
    log = log_of(path)
    for number in numbers:
        log.write(Kind.START, c=number)
    log.close()


def numbers_of(tail: Tail) -> list[int]:
    return [record.fields["c"] for record in tail.read()]


records = st.tuples(
    st.sampled_from(Kind),
    st.dictionaries(st.sampled_from("ctn"), st.integers() | st.text(max_size=5), max_size=3),
    st.binary(max_size=100) | st.sampled_from([b"FR1 ", b"\n\n", b"FR1 00000000 00000000\n\n"]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(told=st.lists(records, max_size=8), cuts=st.lists(st.integers(0, 1500), max_size=10))
def test_what_was_written_is_read_once_in_order_in_whatever_pieces_it_comes(
    path: Path, told: list[tuple[Kind, dict[str, Any], bytes]], cuts: list[int]
) -> None:
    path.write_bytes(b"")
    log = log_of(path)
    for kind, fields, data in told:
        log.write(kind, data, **fields)
    log.close()
    whole = path.read_bytes()
    path.write_bytes(b"")

    tail, heard = Tail(str(path)), []
    for cut in [*sorted(cuts), len(whole)]:
        with path.open("ab") as file:
            file.write(whole[file.tell() : cut])
        heard += [(record.kind, record.fields, bytes(record.data)) for record in tail.read()]

    assert heard == told
    assert not tail.damage
    tail.rewind()
    assert len(list(tail.read())) == len(told)


def test_an_unfinished_end_is_not_there_yet(path: Path) -> None:
    write_calls(path, 1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    tail = Tail(str(path))
    assert numbers_of(tail) == [1]
    assert numbers_of(tail) == []
    path.write_bytes(whole)
    assert numbers_of(tail) == [2]
    assert not tail.damage


def test_a_changed_byte_costs_its_record_alone_and_is_told(path: Path) -> None:
    write_calls(path, 0, 1, 2, 3)
    whole = path.read_bytes()
    size = len(whole) // 4
    for place in range(size, 2 * size):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        tail = Tail(str(path))
        found = numbers_of(tail)
        # With a longer length it looks unfinished, as long as more may come.
        found += [record.fields["c"] for record in tail.read(final=True)]
        assert found == [0, 2, 3]
        assert f"{path} is damaged between bytes {size} and {2 * size}" in tail.damage


def test_what_a_call_returned_is_never_taken_for_records(path: Path) -> None:
    write_calls(path, 0)
    forged = evidence.frame(next(evidence.payloads(path.read_bytes())).replace(b'"c":0', b'"c":7'))
    log = RecordLog(str(path), sync=False)
    log.write(Kind.END, forged * 3, c=1, out=0)
    log.close()
    whole = path.read_bytes()
    for cut in range(len(whole) - 3 * len(forged), len(whole)):
        path.write_bytes(whole[:cut])
        tail = Tail(str(path))
        assert numbers_of(tail) == [0]
        assert not tail.damage
        path.write_bytes(whole)
        assert numbers_of(tail) == [1]


def test_a_file_that_was_cut_is_told(path: Path) -> None:
    write_calls(path, 0, 1)
    tail = Tail(str(path))
    numbers_of(tail)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    assert numbers_of(tail) == []
    assert tail.damage == f"{path} was cut to {size // 2} bytes, and had {size}"


def test_a_large_record_among_small_ones_is_whole(path: Path) -> None:
    large = os.urandom(2**20) * 100
    log = log_of(path)
    log.write(Kind.START, c=1)
    log.write(Kind.END, large, c=1, out=0)
    log.write(Kind.START, c=2)
    log.close()
    first, second, third = Tail(str(path)).read()
    assert (first.fields["c"], third.fields["c"]) == (1, 2)
    assert second.data == large


def test_a_file_that_is_read_in_pieces_is_read_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_calls(path, *range(50))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 7), offset))
    assert numbers_of(Tail(str(path))) == list(range(50))


class Disk:
    """Fails as many times as it is told to, having written a part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = 0
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, fd: int, data: memoryview) -> int:
        if not self.failures or len(data) < 10:
            return self._write(fd, data)
        self.failures -= 1
        self._write(fd, data[:10])
        raise FULL


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractal_runner.executors.batch.records._RETRY_S", 0.01)


def test_a_full_disk_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch, no_pause: None) -> None:
    disk = Disk(monkeypatch)
    disk.failures = 3
    log = log_of(path, patience_s=30)
    log.write(Kind.START, c=1)
    log.close()
    tail = Tail(str(path))
    assert numbers_of(tail) == [1]
    assert not tail.damage


def test_what_finds_no_space_in_the_end_leaves_nothing_torn(
    path: Path, monkeypatch: pytest.MonkeyPatch, no_pause: None
) -> None:
    disk = Disk(monkeypatch)
    log = log_of(path, patience_s=0.05)
    log.write(Kind.START, c=1)
    disk.failures = 1000
    with pytest.raises(OSError, match="No space"):
        log.write(Kind.START, c=2)
    disk.failures = 0
    log.write(Kind.START, c=3)
    log.close()
    tail = Tail(str(path))
    assert numbers_of(tail) == [1, 3]
    assert not tail.damage


def test_a_disk_that_is_full_only_when_it_is_written_through_has_each_record_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, no_pause: None
) -> None:
    failures = [FULL, FULL]

    def fsync(fd: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, "fsync", fsync)
    log = log_of(path, sync=True, patience_s=30)
    log.write(Kind.END, b"result", c=1)
    log.write(Kind.END, b"result", c=2)
    log.close()
    assert numbers_of(Tail(str(path))) == [1, 2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_in_truth_takes_records_again_once_there_is_space(
    small_disk: Path, no_pause: None
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 40_000)
    log = log_of(small_disk / "records")
    log.write(Kind.START, c=1)
    with pytest.raises(OSError, match="No space"):
        log.write(Kind.END, b"r" * 30_000, c=1)
    ballast.unlink()
    log.write(Kind.END, b"r" * 30_000, c=1)
    log.close()
    tail = Tail(str(small_disk / "records"))
    assert [record.kind for record in tail.read()] == ["start", "end"]
    assert not tail.damage
