"""Run commands warm: recognise those that a fork server can run, start servers, ask them for units.

`forkserver.py` is the other side, and has the protocol; it runs in the task's interpreter and is not
imported here. A server serves one command in one environment and one working directory: what differs in
anything else is refused (`ColdStart`), and runs cold with the same result.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fractal_runner.worker import processes

__all__ = ["ColdStart", "Server", "ServerLost", "Target", "WarmChild", "ask", "recognise", "run"]

VARYING = ("FRACTAL_RUNNER_UNIT",)
MARK_ROOM = 256  # characters of a varying variable that /proc/PID/environ can show

_FORKSERVER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "forkserver.py")
_PYTHON = re.compile(r"python(\d+(\.\d+)*)?t?")
_PLAIN_OPTIONS = frozenset("bBEIOPqRsSu")
_HARMLESS_X = frozenset(
    (
        *("cpu_count", "dev", "faulthandler", "frozen_modules", "gil", "int_max_str_digits"),
        *("no_debug_ranges", "pycache_prefix", "utf8", "warn_default_encoding"),
    )
)
# They make an interpreter say or do more at its start or end than a fork repeats.
_TELLING = (b"PYTHONINSPECT", b"PYTHONPROFILEIMPORTTIME", b"PYTHONVERBOSE", b"PYTHONDUMPREFS")
_SH_EXEC = re.compile(rb"""'''exec' (.+) "\$0" "\$@"\s*$""")  # pip's, where a shebang would be too long
_HELLO_S = 60.0
_PID_S = 60.0
_PATH_BYTES = 107  # unix(7)


class ColdStart(Exception):
    """This unit must be started cold; nothing was started.

    Attributes:
        gone: whether the server takes no more units, so that another one would have to be started.
    """

    def __init__(self, message: str = "", *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class ServerLost(Exception):
    """The server ended between the request and its answer: whether the unit was started is not known."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a fork server imports and runs.

    Attributes:
        python: the interpreter, as the command or its first line names it.
        options: the interpreter's own.
        kind: what comes after them.
        name: the script's path, as the interpreter gets it, or the module's name.
        words: how many words of the command stand for all this; the rest are arguments.
    """

    python: str
    options: tuple[str, ...]
    kind: Literal["script", "module"]
    name: str
    words: int = field(compare=False)


def recognise(words: Sequence[str], path: str | None = None) -> Target | None:
    """Whether a command is a Python script or module, and which.

    Args:
        words: the command: `python [options] script …`, `python [options] -m module …`, or a script whose
            first line names a Python.
        path: where to look for a script without a slash; PATH, if None.

    Returns:
        None for all else, and for what cannot be run by a fork: `-c`, `-i`, archives, options not known.
    """
    if not words:
        return None
    if _PYTHON.fullmatch(os.path.basename(words[0])):
        return _interpreted(words[0], words[1:], 1)
    script = words[0] if "/" in words[0] else shutil.which(words[0], path=path)
    interpreter = _interpreter_of(script) if script else None
    if not script or not interpreter or not _PYTHON.fullmatch(os.path.basename(interpreter[0])):
        return None
    target = _interpreted(interpreter[0], [*interpreter[1:], script], 0)
    if target is None or target.kind != "script" or target.name != script:
        return None
    return Target(target.python, target.options, "script", script, 1)


def _interpreted(python: str, words: Sequence[str], before: int) -> Target | None:
    """The target of what follows an interpreter's name, read as getopt(3) reads it."""
    place = 0
    while place < len(words) and words[place].startswith("-") and words[place] != "-":
        word = words[place]
        place += 1
        if word == "--":
            break
        if word.startswith("--"):
            return None
        for at, letter in enumerate(word[1:], start=1):
            if letter in _PLAIN_OPTIONS:
                continue
            if letter not in "WXm":
                return None
            value = word[at + 1 :]
            if not value:
                if place == len(words):
                    return None
                value = words[place]
                place += 1
            if letter == "m":
                options = _without_module(words[:place])
                return Target(python, options, "module", value, before + place)
            if letter == "X" and value.partition("=")[0] not in _HARMLESS_X:
                return None
            break
    if place == len(words) or words[place] in ("", "-") or words[place].endswith((".pyc", ".pyz", ".zip")):
        return None
    options = tuple(word for word in words[:place] if word != "--")
    return Target(python, options, "script", words[place], before + place + 1)


def _without_module(words: Sequence[str]) -> tuple[str, ...]:
    """The options before `-m module`, in whichever of its spellings: `-m x`, `-mx`, `-um x`."""
    rest = list(words)
    last = rest.pop()
    if not _has_m(last):
        last = rest.pop()
    letters = last[1 : last.index("m")]
    return (*rest, *([f"-{letters}"] if letters else []))


def _has_m(word: str) -> bool:
    return re.fullmatch(r"-[a-zA-Z]*?m.+", word) is not None


def _interpreter_of(script: str) -> list[str] | None:
    """The words that the first line of a script puts before its path."""
    try:
        with open(script, "rb") as file:
            head = file.read(4096)
    except OSError:
        return None
    lines = head.split(b"\n", 2)
    if not lines[0].startswith(b"#!"):
        return None
    words = os.fsdecode(lines[0][2:].strip()).split(None, 1)  # execve(2): one argument, spaces and all
    if len(words) == 2 and os.path.basename(words[0]) == "env":
        rest = words[1]
        if not rest.startswith("-"):
            return [rest] if " " not in rest else None
        with contextlib.suppress(ValueError):
            found = shlex.split(rest.removeprefix("-S").strip()) if rest.startswith("-S") else []
            return found if found and "=" not in found[0] and not found[0].startswith("-") else None
        return None
    if words and os.path.basename(words[0]) == "sh" and len(lines) > 1:
        match = _SH_EXEC.match(lines[1])
        with contextlib.suppress(ValueError):
            return shlex.split(os.fsdecode(match[1])) if match else None
        return None
    return words or None


class WarmChild:
    """A unit that a server has forked, with what `processes.Child` has.

    Attributes:
        pid: its process id, and its group's, which it leads.
        returncode: as subprocess reports it, once it has ended; None if its server was lost.
        usage: what wait4 reports of it and the children it waited for. Its peak memory counts the pages
            that it shares with the server, as a cold start would have had them for itself; never those
            of whoever asked for it.
        lost: whether the server has ended first. Then its end is not known, nor whether it has come.
    """

    __slots__ = ("_buffer", "_connection", "_poll", "lost", "pid", "returncode", "usage")

    def __init__(self, connection: socket.socket, pid: int, buffer: bytes = b"") -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.usage: resource.struct_rusage | None = None
        self.lost = False
        self._buffer = buffer
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, or is lost, waiting for up to `seconds`."""
        deadline = time.monotonic() + seconds
        while self.returncode is None and not self.lost:
            if self._read_end():
                break
            left = deadline - time.monotonic()
            if not self._poll.poll(max(0.0, left) * 1000):
                return False
            try:
                data = self._connection.recv(4096)
            except OSError:
                data = b""
            self._buffer += data
            if not data and not self._read_end():
                self.lost = True
        return True

    def close(self) -> None:
        self._connection.close()

    def _read_end(self) -> bool:
        line, end, _ = self._buffer.partition(b"\n")
        if not end:
            return False
        _, status, *usage = line.split()
        self.returncode = os.waitstatus_to_exitcode(int(status))
        seconds, figures = map(float, usage[:2]), map(int, usage[2:])
        self.usage = resource.struct_rusage((*seconds, *figures))
        return True


def run(
    path: str, words: Sequence[str], environment: Mapping[bytes, bytes], cwd: str, log_file: str
) -> WarmChild:
    """Have the server at the socket `path` run a command; from any process of this host.

    Args:
        path: the server's socket.
        words: the command, as it would be spawned.
        environment: all its variables.
        cwd: where it starts.
        log_file: made anew, for its stdout and stderr.

    Raises:
        ColdStart: if it must be started cold, or the server is not there.
        OSError: as `spawn` raises it: the log cannot be opened, there is no process to be had, or a NUL
            character is in a word.
        ServerLost: if the server ended before it had answered.
    """
    entries = [b"%s=%s" % pair for pair in environment.items()]
    encoded = [os.fsencode(word) for word in words]
    parts = [b"run", os.fsencode(cwd), os.fsencode(os.path.abspath(log_file)), b"%d" % len(encoded)]
    parts += encoded + entries
    if b"\0" in b"".join(parts):
        raise OSError(errno.EINVAL, "There is a NUL character in a command or its environment")
    connection = _connected(path)
    try:
        answer, rest = _answer(connection, parts, _PID_S)
        if not answer:
            raise ServerLost("The fork server ended while it was starting a unit.")
        kind, _, text = answer.partition(" ")
        if kind in ("cold", "gone"):
            raise ColdStart(text, gone=kind == "gone")
        if kind == "error":
            number, _, what = text.partition(" ")
            raise OSError(int(number), what)
        return WarmChild(connection, int(text), rest)
    except BaseException:
        connection.close()
        raise


def ask(path: str, request: Literal["status", "end"]) -> dict[str, str]:
    """Ask a server how it is, or to end.

    Raises:
        ColdStart: if it is not there.
    """
    with _connected(path) as connection:
        answer, _ = _answer(connection, [request.encode()], _PID_S)
    return dict(pair.split("=", 1) for pair in answer.split(" ") if "=" in pair)


def _connected(path: str) -> socket.socket:
    """A connection that the server has taken: only now may anything be sent that it might do."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_HELLO_S)
        connection.connect(path)
        hello = _line(connection, time.monotonic() + _HELLO_S)[0]
    except (OSError, ValueError) as error:
        connection.close()
        raise ColdStart(f"The fork server does not answer: {error}.", gone=True) from None
    if hello != "hello":
        connection.close()
        kind, _, why = hello.partition(" ")
        raise ColdStart(why or "The fork server has ended.", gone=kind != "cold")
    return connection


def _answer(connection: socket.socket, parts: Sequence[bytes], timeout_s: float) -> tuple[str, bytes]:
    payload = b"\0".join(parts)
    try:
        connection.sendall(b"%d\n%s" % (len(payload), payload))
    except OSError:
        # It may have said why it does not listen; a request that it has not got in full is not done.
        with contextlib.suppress(OSError, ValueError):
            answer, rest = _line(connection, time.monotonic() + timeout_s)
            if answer:
                return answer, rest
        raise ColdStart("The fork server has ended.", gone=True) from None
    try:
        return _line(connection, time.monotonic() + timeout_s)
    except (OSError, ValueError):
        return "", b""


def _line(connection: socket.socket, deadline: float) -> tuple[str, bytes]:
    """The next line, and what came after it; an empty one at the end."""
    data = b""
    while b"\n" not in data:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        connection.settimeout(left)
        part = connection.recv(65536)
        if not part:
            return "", b""
        data += part
    line, _, rest = data.partition(b"\n")
    return line.decode(errors="replace"), rest


class Server:
    """A fork server of this process, which is its owner: it ends with it.

    Attributes:
        target: what it imports and runs.
        socket: its path, for `run` in whichever process.
        pid: its process id.
    """

    def __init__(
        self, target: Target, process: subprocess.Popen[bytes], directory: str, status: int, timeout_s: float
    ) -> None:
        self.target = target
        self.socket = f"{directory}/socket"
        self.pid = process.pid
        self._process = process
        self._directory = directory
        self._status = status
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._lock = threading.Lock()  # over what follows
        self._said: str | None = None

    @classmethod
    def start(
        cls,
        target: Target,
        *,
        words: Sequence[str],
        directory: str,
        environment: Mapping[bytes, bytes],
        log: str,
        cwd: str | None = None,
        owner: int | None = None,
        varying: Sequence[str] = VARYING,
        import_timeout_s: float = 60.0,
        idle_s: float = 300.0,
        learn: bool = True,
    ) -> Server:
        """Start a server; it imports from now on.

        Args:
            target: what `recognise` found.
            words: the command that it found it in; only its first `target.words` count.
            directory: where to make the server's own one, which is short-lived and of mode 0700: on a disk
                of this host, and with a short path, as sockets need it.
            environment: that of its units.
            log: a file for what the server itself has to say.
            cwd: the working directory of its units; this process's, if None.
            owner: the process that it ends with; this one, if None.
            varying: variables that may be another in each unit. They must not matter to an import.
            import_timeout_s: seconds that its imports may take.
            idle_s: seconds without a unit after which it ends.
            learn: whether it may import beforehand what its units were seen to import.

        Raises:
            ColdStart: if a server cannot be had for such a command.
            OSError: if its files cannot be made.
        """
        if sys.platform != "linux":
            raise ColdStart(f"Processes are forked on Linux only, not on {sys.platform}.")
        if found := [name for name in _TELLING if environment.get(name)]:
            raise ColdStart(f"{os.fsdecode(found[0])} is set.")
        owner = os.getpid() if owner is None else owner
        own = tempfile.mkdtemp(prefix="warm-", dir=directory)
        read, write = os.pipe()
        try:
            if len(os.fsencode(f"{own}/socket")) > _PATH_BYTES:
                raise ColdStart(f"The path of {directory} is too long for a socket.")
            options = {
                "directory": own,
                "status": write,
                "owner": owner,
                "owner-ticks": processes.start_ticks(owner),
                "import-timeout": import_timeout_s,
                "idle": idle_s,
                "varying": ",".join(varying),
                "learn": int(learn),
                "kind": target.kind,
                "name": target.name,
            }
            given = [f"--{name}={value}" for name, value in options.items()]
            # Room for a varying value, where the kernel shows the environment that a process started with.
            room = {os.fsencode(name): b"_" * MARK_ROOM for name in varying}
            command = [target.python, *target.options, _FORKSERVER, *given, "--", *words[: target.words]]
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    command,
                    env={**environment, **room},
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(write,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(read)
            shutil.rmtree(own, ignore_errors=True)
            raise
        finally:
            os.close(write)
        return cls(target, process, own, read, import_timeout_s)

    def wait_ready(self, timeout: float | None = None) -> str | None:
        """Wait until it can be used.

        Args:
            timeout: seconds to wait; as long as its imports may take, if None.

        Returns:
            None once it can; else why this command must be started cold. Then the server has ended.

        Raises:
            TimeoutError: if it is neither yet; it may be asked again.
        """
        with self._lock:
            return self._wait_ready(timeout)

    def _wait_ready(self, timeout: float | None) -> str | None:
        if self._said is None:
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            left = self._deadline - time.monotonic()
            pause = left if timeout is None else min(left, timeout)
            if poll.poll(max(0.0, pause) * 1000):
                self._said = self._read_status()
            elif pause < left:
                raise TimeoutError(f"The fork server is not ready after {pause:g} s.")
            else:
                self._said = f"cold Its imports take longer than {self._timeout_s:g} s."
            if self._said != "ready":
                self.stop(0)
        return None if self._said == "ready" else self._said.removeprefix("cold ")

    def _read_status(self) -> str:
        said = b""
        while part := os.read(self._status, 65536):
            said += part
        if said:
            return said.decode(errors="replace")
        code = self._process.wait()
        if code == -14:
            return f"cold Its imports take longer than {self._timeout_s:g} s."
        return f"cold Its imports end the interpreter ({code})."

    def run(
        self, words: Sequence[str], environment: Mapping[bytes, bytes], cwd: str, log_file: str
    ) -> WarmChild:
        """Run a command here: see the function of this name."""
        return run(self.socket, words, environment, cwd, log_file)

    def runs(self) -> bool:
        """Whether its process has not ended. One whose files have changed still waits for its units."""
        return self._process.poll() is None

    def stop(self, grace_s: float = 2.0) -> None:
        """End it, not the units that it has started; twice is fine."""
        if self.runs():
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._status >= 0:
            os.close(self._status)
            self._status = -1
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
