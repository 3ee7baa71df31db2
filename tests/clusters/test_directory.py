"""A cluster has a directory that is its own: what is there at its end is removed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.clusters.directory import own_directory


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_is_made_if_need_be_and_closed_to_others(exists: bool, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted"
    if exists:
        wanted.mkdir(mode=0o755)
    assert own_directory(wanted, prefix="fr-", longest=1000) == wanted
    assert stat.S_IMODE(wanted.stat().st_mode) == 0o700


def test_without_a_wish_there_is_a_new_one() -> None:
    first, second = (own_directory(None, prefix="fr-own-", longest=60) for _ in range(2))
    try:
        assert first != second
        assert first.name.startswith("fr-own-")
    finally:
        first.rmdir()
        second.rmdir()


def test_what_others_have_put_there_is_not_removed_one_day(tmp_path: Path) -> None:
    (tmp_path / "thesis").touch()
    with pytest.raises(ValueError, match="is not empty"):
        own_directory(tmp_path, prefix="fr-", longest=1000)
    assert (tmp_path / "thesis").exists()


def test_a_directory_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ValueError, match="is someone else's"):
        own_directory(tmp_path, prefix="fr-", longest=1000)


def test_a_path_that_is_too_long_for_sockets_is_refused_before_it_is_made(tmp_path: Path) -> None:
    wanted = tmp_path / "wanted"
    with pytest.raises(ValueError, match=f"short names: at most {len(str(wanted)) - 1}"):
        own_directory(wanted, prefix="fr-", longest=len(str(wanted)) - 1)
    assert not wanted.exists()
