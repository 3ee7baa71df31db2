"""How a command is started: through the C library, and where that cannot be, through `os`."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fractal_runner.worker import spawn as module
from fractal_runner.worker.spawn import Environment, spawn


@pytest.fixture(params=["through ctypes", "through os"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "through os":
        monkeypatch.setattr(module, "_library", lambda: None)
    else:
        assert module._library() is not None


@pytest.fixture
def environment() -> Environment:
    return Environment({b"PATH": os.environb[b"PATH"], b"MINE": "ä".encode(), b"V": b"old"}, b"V")


@pytest.fixture
def ignored_signal() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


def run(environment: Environment, log: Path, *words: str, value: bytes = b"new") -> int:
    _, status = os.waitpid(spawn(words, environment, value, str(log)), 0)
    return os.waitstatus_to_exitcode(status)


def test_words_environment_and_streams(environment: Environment, tmp_path: Path) -> None:
    log = tmp_path / "log of ü.txt"
    log.write_text("from before")
    script = 'cat; echo "$1|$MINE|$V"; echo err >&2; ps -o pgid= -p $$ | tr -d " "; echo $$; exit 3'

    code = run(environment, log, "sh", "-c", script, "sh", "a 'b\n$(c)")

    first, second, err, group, pid = log.read_text().splitlines()
    assert (code, first, second, err) == (3, "a 'b", "$(c)|ä|new", "err")
    assert group == pid


def test_each_command_has_its_own_value(environment: Environment, tmp_path: Path) -> None:
    for value in (b"1", b"a longer one", b""):
        run(environment, tmp_path / "log", "sh", "-c", 'printf %s "$V"; env | grep -c ^V=', value=value)
        assert (tmp_path / "log").read_bytes() == value + b"1\n"


def test_no_descriptor_of_ours_is_passed_on(environment: Environment, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w"):
        run(environment, tmp_path / "log", "ls", "-l", "/proc/self/fd")

    listed = (tmp_path / "log").read_text()
    assert str(tmp_path / "log") in listed
    assert str(tmp_path / "open") not in listed


def test_signals_are_the_systems_again(
    environment: Environment, tmp_path: Path, ignored_signal: None
) -> None:
    assert run(environment, tmp_path / "log", "sh", "-c", "kill -TERM $$; exit 0") == -signal.SIGTERM


def test_a_blocked_signal_is_not_blocked_in_the_command(environment: Environment, tmp_path: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        code = run(environment, tmp_path / "log", "sh", "-c", "kill -USR1 $$; exit 0")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    assert code == -signal.SIGUSR1


@pytest.mark.parametrize(
    ("word", "log", "code"),
    [
        ("no-such-program", "log", errno.ENOENT),
        ("/etc/passwd", "log", errno.EACCES),
        ("true", "missing/log", errno.ENOENT),
        ("tr\0ue", "log", errno.EINVAL),
    ],
)
def test_what_cannot_be_started(
    environment: Environment, tmp_path: Path, word: str, log: str, code: int
) -> None:
    with pytest.raises(OSError) as caught:
        spawn([word], environment, b"", str(tmp_path / log))

    assert caught.value.errno == code


def test_a_nul_in_the_environment_is_refused() -> None:
    with pytest.raises(OSError, match="NUL character in the environment"):
        Environment({b"A": b"b\0c"}, b"V")
