"""The files of a batch executor: they are this user's alone, and there whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.executors.batch.files import (
    ArrayFiles,
    NotOursError,
    check_ours,
    make_folder,
    open_ours,
    put,
    put_once,
    read_at,
)

SOMEBODY_ELSE = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@pytest.fixture
def files(tmp_path: Path) -> ArrayFiles:
    files = ArrayFiles(tmp_path / "fr-array")
    files.make(2)
    return files


def test_a_folder_is_made_for_our_eyes_only(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_is_ours_already_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o755)
    assert make_folder(tmp_path / "there") == tmp_path / "there"


def test_a_folder_may_be_reached_by_a_link_of_ours(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("scratch")
    make_folder(tmp_path / "link")


@as_root
@pytest.mark.parametrize("check", [make_folder, check_ours])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, check: Callable[[Path], Any]) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, SOMEBODY_ELSE, -1)
    with pytest.raises(NotOursError, match=f"theirs belongs to user {SOMEBODY_ELSE}, and this is user 0"):
        check(theirs)


@as_root
def test_a_user_other_than_the_owner_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "roots"
    folder.mkdir(mode=0o755)
    fd = os.open(folder, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.seteuid(SOMEBODY_ELSE)
            check_ours(folder, fd)
        except NotOursError:
            code = 0
        finally:
            os._exit(code)
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
def test_a_folder_that_others_may_write_to_is_refused_and_it_is_said_what_to_do(
    tmp_path: Path, mode: int
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(NotOursError, match=rf"shared can be written by others \(mode {mode:o}\).*chmod go-w"):
        make_folder(shared)


@as_root
def test_a_file_of_somebody_else_is_not_read(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"evil")
    os.chown(theirs, SOMEBODY_ELSE, -1)
    with pytest.raises(NotOursError, match=f"{theirs} belongs"), open_ours(str(theirs)):
        pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "ours").write_bytes(b"ours")
    (tmp_path / "link").symlink_to("ours")
    with pytest.raises(NotOursError, match="link is a link"), open_ours(str(tmp_path / "link")):
        pass


def test_files_that_are_looked_for_again_and_again_are_there_from_the_beginning(files: ArrayFiles) -> None:
    there = {path.name for path in Path(files.directory).iterdir()}
    assert there == {"control", "records-0.0", "records-1.0"}
    assert files.starts() == {0: 1, 1: 1}


def test_starts_are_counted_by_their_files(files: ArrayFiles) -> None:
    Path(files.records(1, 1)).touch()
    Path(files.records(1, 2)).touch()
    assert files.starts() == {0: 1, 1: 3}


def test_of_two_jobs_that_claim_the_same_work_one_gets_it(files: ArrayFiles) -> None:
    with ThreadPoolExecutor(8) as threads:
        ids = [f"job-{number}" for number in range(40)]
        got = dict(zip(ids, threads.map(lambda id: files.claim_for(0, id), ids), strict=True))
    won = [id for id in ids if got[id]]
    assert len(won) == 1
    claim = files.claimed_by(0)
    assert claim is not None
    assert claim["job"] == won[0]


def test_the_same_job_claims_its_work_once_more(files: ArrayFiles) -> None:
    assert files.claim_for(0, "7_0", node="a")
    assert files.claim_for(0, "7_0", node="b")
    assert files.claimed_by(0) == {"job": "7_0", "node": "a"}


def test_what_is_claimed_for_nobody_is_nobodys(files: ArrayFiles) -> None:
    assert files.claim_for(0, None, void=True)
    assert files.claim_for(0, None, void=True)
    assert not files.claim_for(0, "7_0")
    assert files.claim_for(1, "7_1")
    assert not files.claim_for(1, None)


def test_nobody_has_claimed_what_has_no_claim(files: ArrayFiles) -> None:
    assert files.claimed_by(0) is None


def test_a_file_is_put_whole_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    put(str(path), b"a", memoryview(b"bc"))
    put(str(path), b"d")
    assert path.read_bytes() == b"d"
    assert not put_once(str(path), b"e")
    assert path.read_bytes() == b"d"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_of_a_file_that_cannot_be_written_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        put(str(tmp_path / "file"), b"text")
    assert not list(tmp_path.iterdir())


def test_what_the_system_gives_in_pieces_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 3), offset))
    with open_ours(str(tmp_path / "file")) as fd:
        assert read_at(fd, 1, 8) == b"12345678"
        assert read_at(fd, 1, 80) == b"123456789"
