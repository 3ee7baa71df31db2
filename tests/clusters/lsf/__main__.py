"""A cluster to try things on by hand: python -m tests.clusters.lsf start|stop|shell

From the project's top. It runs until it is stopped; each user of the machine can have one.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.clusters.lsf.cluster import LsfCluster, LsfFailed
from tests.clusters.lsf.dialects import DIALECTS

_DIRECTORY = Path(f"/tmp/fractal-runner-lsf-{os.getuid()}")
_READY = "ready"
_MODULE = "tests.clusters.lsf"
_PROGRAM = f"python -m {_MODULE}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="An emulated LSF cluster on this machine, to try things on."
    )
    parser.add_argument(
        "--directory", type=Path, default=_DIRECTORY, help="where it is (default: %(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start it; it goes on in the background")
    start.add_argument("--dialect", choices=DIALECTS, default="openlava", help="default: %(default)s")
    start.add_argument(
        "--minute", type=float, default=60.0, metavar="SECONDS", help="how long a minute of -W is"
    )
    start.add_argument("--stay", action="store_true", help="do not go to the background")
    commands.add_parser("stop", help="end it, with all its jobs and files")
    commands.add_parser("shell", help="a shell whose LSF commands find it")
    arguments = parser.parse_args()
    directory = arguments.directory.absolute()
    match arguments.command:
        case "stop":
            _stop(directory)
        case "shell":
            _shell(directory)
        case "start" if owner := _owner(directory):
            sys.exit(f"it is running already, as process {owner.pid}\n\n{_use(directory)}")
        case "start" if arguments.stay:
            _stay(directory, arguments.dialect, arguments.minute)
        case "start":
            _start(directory, arguments.dialect, arguments.minute)


def _start(directory: Path, dialect: str, minute_s: float) -> None:
    options = ["--dialect", dialect, "--minute", str(minute_s)]
    owner = subprocess.Popen(
        [sys.executable, "-m", _MODULE, "--directory", str(directory), "start", "--stay", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout is not None
    said = []
    for line in owner.stdout:
        if line.strip() == _READY:
            print(_use(directory))
            return
        said.append(line)
    sys.exit("".join(said).rstrip() or f"it ended at once, with exit code {owner.wait(60)}")


def _stay(directory: Path, dialect: str, minute_s: float) -> None:
    """Have the cluster until told to end it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    if _pid_file(directory).exists():  # and the process that had it is gone: `main` has looked
        shutil.rmtree(directory)
    try:
        with LsfCluster(directory, dialect=dialect, minute_s=minute_s):
            _pid_file(directory).write_text(str(os.getpid()))
            print(_READY, flush=True)
            with Path(os.devnull).open("w") as nothing:  # who started it does not read on
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(nothing.fileno(), stream.fileno())
            while True:
                signal.pause()
    except KeyboardInterrupt:
        sys.exit()
    except (LsfFailed, TimeoutError, ValueError, OSError) as error:
        sys.exit(str(error))


def _stop(directory: Path) -> None:
    owner = _owner(directory)
    if not owner:
        sys.exit(f"it is not running: there is none in {directory}")
    owner.terminate()
    owner.wait(60)


def _shell(directory: Path) -> None:
    if not _owner(directory):
        sys.exit(f"it is not running. To start it: {_PROGRAM} start")
    shell = os.environ.get("SHELL") or "/bin/sh"
    path = f"{directory / 'bin'}:{os.environ.get('PATH', os.defpath)}"
    os.execve(shell, [shell], {**os.environ, "PATH": path, "LSF_ENVDIR": str(directory)})


def _use(directory: Path) -> str:
    return (
        f'export PATH={shlex.quote(str(directory / "bin"))}:"$PATH"\n'
        f"export LSF_ENVDIR={shlex.quote(str(directory))}"
    )


def _pid_file(directory: Path) -> Path:
    return directory / "owner.pid"


def _owner(directory: Path) -> psutil.Process | None:
    """The process that has it, if it runs."""
    try:
        process = psutil.Process(int(_pid_file(directory).read_text()))
        return process if _MODULE in process.cmdline() else None
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None


if __name__ == "__main__":
    main()
