"""What all of the cluster's executables are: ask the scheduler over its socket, and say what it answers.

A client knows no more of LSF than whether it reads its standard input, and what to do if there is no answer.
It runs as `python -IS` and imports what it cannot do without: it is to start in some 20 ms.

Each call is written down by the client itself, in the cluster's `calls`: the scheduler may be down.
"""

from __future__ import annotations

import _socket
import marshal
import os
import sys
import time

SOCKET = "mbatchd"
SETTINGS = "client.settings"
CALLS = "calls"
# What of a client's environment the record of its call has.
RECORDED = ("LSB_NTRIES", "BSUB_QUIET", "LSB_BJOBS_FORMAT", "LSB_JOBID", "LC_ALL", "LANG")


class NoAnswer(Exception):
    """The scheduler is down, or does not answer: "mbatchd", "all" or "hung"."""


def main() -> int:
    """Be the program that this was called as."""
    directory = os.environ.get("LSF_ENVDIR", "")
    program, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]  # noqa: PTH119
    try:
        settings = _settings(directory)
    except OSError:
        sys.stderr.write("Failed in an LSF library call: Configuration file error: LSF_ENVDIR\n")
        return 255
    body = b""
    if program == "bsub" and reads_stdin(arguments, settings["bsub_flags"], settings["bsub_values"]):
        body = sys.stdin.buffer.read()
    call = f"{os.getpid()}-{time.time_ns()}"
    _record(
        directory,
        {
            "call": call,
            "program": program,
            "argv": arguments,
            "stdin": len(body),
            "env": {name: os.environ[name] for name in RECORDED if name in os.environ},
            "began": time.time(),
        },
    )
    returncode = _ask_until_answered(directory, program, arguments, body)
    _record(directory, {"call": call, "returncode": returncode, "ended": time.time()})
    return returncode


def reads_stdin(arguments: list[str], flags: tuple[str, ...], values: tuple[str, ...]) -> bool:
    """Whether bsub has no command among its arguments: the job is then on its standard input."""
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-") or word == "-":
            return False
        name = word[1:]
        if name in flags:
            continue
        if name in values:
            next(rest, None)
    return True


def _ask_until_answered(directory: str, program: str, arguments: list[str], body: bytes) -> int:
    request = marshal.dumps(
        {
            "program": program,
            "argv": arguments,
            "stdin": body,
            "env": dict(os.environ),
            "cwd": os.getcwd(),  # noqa: PTH109
        }
    )
    tries = int(os.environ.get("LSB_NTRIES") or 0)  # without it, for ever
    tried = 0
    while True:
        settings = _settings(directory)  # they change while one waits
        try:
            answer = _ask(f"{directory}/{SOCKET}", request, settings)
        except NoAnswer as problem:
            tried += 1
            waiting, failed = settings["no_answer"][str(problem)]
            if 0 < tries <= tried:
                sys.stderr.write(failed + (". Job not submitted.\n" if program == "bsub" else "\n"))
                return 255
            sys.stderr.write(waiting + "\n")
            sys.stderr.flush()
            if str(problem) != "hung":
                time.sleep(settings["retry_s"])  # nothing tells that the scheduler is back
        else:
            return _say(answer)


def _ask(path: str, request: bytes, settings: dict) -> dict:
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.settimeout(settings["reply_timeout_s"])
    try:
        connection.connect(path)
        sent = 0
        while sent < len(request):
            sent += connection.send(request[sent : sent + 65536])
        connection.shutdown(_socket.SHUT_WR)
        answer = b""
        while more := connection.recv(65536):
            answer += more
    except TimeoutError:
        raise NoAnswer("hung") from None
    except OSError:
        raise NoAnswer(settings["down"]) from None
    finally:
        connection.close()
    if not answer:
        raise NoAnswer(settings["down"])
    return marshal.loads(answer)


def _say(answer: dict) -> int:
    if answer.get("signal"):
        os.kill(os.getpid(), answer["signal"])
    for stream, text in ((sys.stderr, answer["stderr"]), (sys.stdout, answer["stdout"])):
        stream.buffer.write(text.encode("utf-8", "surrogateescape"))
        stream.flush()
    return answer["returncode"]


def _settings(directory: str) -> dict:
    with open(f"{directory}/{SETTINGS}", "rb") as file:  # noqa: PTH123
        return marshal.loads(file.read())


def _record(directory: str, what: dict) -> None:
    """Append a line: short enough to be written at once."""
    line = repr(what).encode("utf-8", "backslashreplace") + b"\n"
    try:
        fd = os.open(f"{directory}/{CALLS}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError:  # the cluster is being removed
        return
    try:
        os.write(fd, line)
    finally:
        os.close(fd)
