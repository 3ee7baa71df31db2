"""Clusters to try things on by hand: `python -m tests.clusters.NAME start|stop|shell`, from the top.

One runs until it is stopped; each user of the machine can have one of each kind.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_READY = "ready"


@dataclass(frozen=True, slots=True)
class ByHand:
    """A kind of cluster.

    Attributes:
        module: whose `__main__` this is: "tests.clusters.slurm".
        what: it is, in words.
        add_options: adds what can be said at its start.
        make: the cluster in a directory, as its options say.
        env: what the environment of a shell must have to find the cluster in a directory. A PATH is put in
            front of the shell's own.
        failures: what may come between that is no defect.
    """

    module: str
    what: str
    add_options: Callable[[argparse.ArgumentParser], Any]
    make: Callable[[Path, argparse.Namespace], AbstractContextManager[Any]]
    env: Callable[[Path], Mapping[str, str]]
    failures: tuple[type[Exception], ...]

    def main(self) -> None:
        """Do what the command line says."""
        kind = self.module.rpartition(".")[2]
        default = Path(f"/tmp/fractal-runner-{kind}-{os.getuid()}")
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}", description=self.what)
        parser.add_argument(
            "--directory", type=Path, default=default, help="where it is (default: %(default)s)"
        )
        commands = parser.add_subparsers(dest="command", required=True)
        start = commands.add_parser("start", help="start it; it goes on in the background")
        start.add_argument("--stay", action="store_true", help="do not go to the background")
        self.add_options(start)
        commands.add_parser("stop", help="end it, with all its jobs and files")
        commands.add_parser("shell", help="a shell whose commands find it")
        arguments = parser.parse_args()
        directory = arguments.directory.absolute()
        match arguments.command:
            case "stop":
                self._stop(directory)
            case "shell":
                self._shell(directory)
            case "start" if owner := self._owner(directory):
                sys.exit(f"it is running already, as process {owner.pid}\n\n{self._use(directory)}")
            case "start" if arguments.stay:
                self._stay(directory, arguments)
            case "start":
                self._start(directory)

    def _start(self, directory: Path) -> None:
        owner = subprocess.Popen(
            [sys.executable, "-m", self.module, *sys.argv[1:], "--stay"],
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
                print(self._use(directory))
                return
            said.append(line)
        sys.exit("".join(said).rstrip() or f"it ended at once, with exit code {owner.wait(60)}")

    def _stay(self, directory: Path, arguments: argparse.Namespace) -> None:
        """Have the cluster until told to end it."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        if _pid_file(directory).exists():  # and the process that had it is gone: `main` has looked
            shutil.rmtree(directory)
        try:
            with self.make(directory, arguments):
                _pid_file(directory).write_text(str(os.getpid()))
                print(_READY, flush=True)
                with Path(os.devnull).open("w") as nothing:  # who started it does not read on
                    for stream in (sys.stdout, sys.stderr):
                        os.dup2(nothing.fileno(), stream.fileno())
                while True:
                    signal.pause()
        except KeyboardInterrupt:
            sys.exit()
        except (*self.failures, TimeoutError, ValueError, OSError) as error:
            sys.exit(str(error))

    def _stop(self, directory: Path) -> None:
        owner = self._owner(directory)
        if not owner:
            sys.exit(f"it is not running: there is none in {directory}")
        owner.terminate()
        owner.wait(60)

    def _shell(self, directory: Path) -> None:
        if not self._owner(directory):
            sys.exit(f"it is not running. To start it: python -m {self.module} start")
        shell = os.environ.get("SHELL") or "/bin/sh"
        found = dict(self.env(directory))
        if "PATH" in found:
            found["PATH"] = f"{found['PATH']}:{os.environ.get('PATH', os.defpath)}"
        os.execve(shell, [shell], {**os.environ, **found})

    def _use(self, directory: Path) -> str:
        return "\n".join(
            f"export {name}={shlex.quote(value)}" + (':"$PATH"' if name == "PATH" else "")
            for name, value in self.env(directory).items()
        )

    def _owner(self, directory: Path) -> psutil.Process | None:
        """The process that has it, if it runs."""
        try:
            process = psutil.Process(int(_pid_file(directory).read_text()))
            return process if self.module in process.cmdline() else None
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return None


def _pid_file(directory: Path) -> Path:
    return directory / "owner.pid"
