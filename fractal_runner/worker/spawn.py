"""Start a command, fast: `posix_spawnp` of the C library, prepared once and called many times.

`os.posix_spawnp` keeps the interpreter's lock until the child has replaced its image, which for a small
command is a third of its life, and it encodes the whole environment anew for each child. A call through
ctypes lets other threads run meanwhile. Where the C library cannot be called that way, `os.posix_spawnp`
does the same.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

# What the interpreter ignores, and what a worker may: a command starts with the system's defaults.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WRITE_LOG = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LOG_MODE = 0o644
_DEVNULL = os.devnull.encode()

# <spawn.h>, the same numbers in glibc, musl and on macOS.
_SETPGROUP, _SETSIGDEF, _SETSIGMASK = 0x02, 0x04, 0x08
_OPAQUE_BYTES = 1024  # glibc's largest, posix_spawnattr_t, has 336; on macOS they are pointers


class Environment:
    """The variables of many commands: all alike but for one.

    Args:
        variables: as `os.environb` has them.
        varying: the name of the one that `spawn` sets for each command.

    Raises:
        OSError: EINVAL if one holds a NUL character.

    Not to be used by two threads at a time.
    """

    __slots__ = ("actions", "array", "pid", "targets", "variables", "varying")

    def __init__(self, variables: Mapping[bytes, bytes], varying: bytes) -> None:
        self.varying = varying
        self.targets: dict[Any, Any] = {}  # whatever is found out once for all commands that share it
        self.variables = {name: value for name, value in variables.items() if name != varying}
        entries = [b"%s=%s" % pair for pair in self.variables.items()]
        if b"\0" in b"".join(entries):
            raise _nul_in("the environment")
        self.array = (ctypes.c_char_p * (len(entries) + 2))(*entries, None, None)
        # What the C library fills in for each command: made once.
        self.actions = ctypes.create_string_buffer(_OPAQUE_BYTES)
        self.pid = ctypes.c_int()


def spawn(words: Sequence[str], environment: Environment, value: bytes, log_file: str) -> int:
    """Start `words` in a process group of its own: stdin is empty, stdout and stderr go to `log_file`.

    Args:
        words: the program, looked up in PATH, and its arguments.
        environment: its variables.
        value: what the varying one of them is for this command.
        log_file: made anew.

    Returns:
        The child's pid.

    Raises:
        OSError: if the program cannot be executed or the log not be opened: posix_spawn(3) does not tell
            which. EINVAL if a word holds a NUL character.
    """
    # All of them at once, which is four times as fast as one by one: what the C library is given ends with
    # a NUL anyway, and there must be no other.
    encoded = os.fsencode("\0".join(words)).split(b"\0")
    if len(encoded) > len(words) or b"\0" in value:
        raise _nul_in("the words of a command")
    library = _library()
    if library is None:
        return _spawn_by_os(words, environment, value, log_file)
    prepare = ctypes.pythonapi  # for what cannot block: its functions are called without a change of thread
    arguments = (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None)
    environment.array[len(environment.array) - 2] = b"%s=%s" % (environment.varying, value)
    actions, pid = environment.actions, environment.pid
    _checked(prepare.posix_spawn_file_actions_init(actions))
    try:
        add_open = prepare.posix_spawn_file_actions_addopen
        _checked(add_open(actions, 0, _DEVNULL, os.O_RDONLY, 0))
        _checked(add_open(actions, 1, os.fsencode(log_file), WRITE_LOG, LOG_MODE))
        _checked(prepare.posix_spawn_file_actions_adddup2(actions, 1, 2))
        code = library.posix_spawnp(
            ctypes.byref(pid), encoded[0], actions, _attributes(), arguments, environment.array
        )
    finally:
        prepare.posix_spawn_file_actions_destroy(actions)
    if code:
        raise OSError(code, os.strerror(code), words[0])
    return pid.value


def _spawn_by_os(words: Sequence[str], environment: Environment, value: bytes, log_file: str) -> int:
    return os.posix_spawnp(
        words[0],
        list(words),
        {**environment.variables, environment.varying: value},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log_file, WRITE_LOG, LOG_MODE),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setpgroup=0,
        setsigmask=(),
        setsigdef=_DEFAULT_SIGNALS,
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C library of this process, if it has what is called here."""
    try:
        library = ctypes.CDLL(None)
        library.posix_spawnp.argtypes = (ctypes.c_void_p, ctypes.c_char_p, *4 * (ctypes.c_void_p,))
    except (OSError, AttributeError):
        return None
    return library


@functools.cache
def _attributes() -> ctypes.Array[ctypes.c_char]:
    """What is the same for every command; never changed once it is made, so that threads share it."""
    library = ctypes.CDLL(None)
    attributes = ctypes.create_string_buffer(_OPAQUE_BYTES)
    signals = ctypes.create_string_buffer(_OPAQUE_BYTES)
    _checked(library.posix_spawnattr_init(attributes))
    flags = ctypes.c_short(_SETPGROUP | _SETSIGDEF | _SETSIGMASK)
    _checked(library.posix_spawnattr_setflags(attributes, flags))
    _checked(library.posix_spawnattr_setpgroup(attributes, 0))
    library.sigemptyset(signals)
    _checked(library.posix_spawnattr_setsigmask(attributes, signals))
    for number in _DEFAULT_SIGNALS:
        library.sigaddset(signals, int(number))
    _checked(library.posix_spawnattr_setsigdefault(attributes, signals))
    return attributes


def _nul_in(where: str) -> OSError:
    # To the C library it is the end of the text.
    return OSError(errno.EINVAL, f"There is a NUL character in {where}")


def _checked(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
