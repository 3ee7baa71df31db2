"""How a scheduler's commands are run: as lists of words, by no shell of ours, not for ever."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from fractal_runner.executors.batch.scheduler import SchedulerError
from fractal_runner.quantities import argument, parse_time

Run = Callable[..., "subprocess.CompletedProcess[str]"]

NOT_FOUND = 127  # of a program, as shells and env(1) report it


@dataclass(frozen=True, slots=True)
class CommandAnswer:
    """What a command has answered.

    Attributes:
        program: what was run.
        returncode: `NOT_FOUND` if there is no such program.
        stdout, stderr: what it wrote.
        hint: what can be done if there is no such program.
    """

    program: str
    returncode: int
    stdout: str
    stderr: str
    hint: str = ""

    @property
    def is_missing(self) -> bool:
        """Whether there is no such program."""
        return self.returncode == NOT_FOUND

    @property
    def text(self) -> str:
        """All that it wrote."""
        return f"{self.stdout}\n{self.stderr}"

    def expect_success(self) -> None:
        """Raise SchedulerError unless it has succeeded."""
        if self.is_missing:
            raise SchedulerError(f"{self.program} was not found: {self.hint}")
        if self.returncode:
            said = cleaned(self.stderr) or cleaned(self.stdout) or "It says nothing."
            raise SchedulerError(f"{self.program} failed with exit code {self.returncode}: {said}")


@dataclass(frozen=True, slots=True)
class Commands:
    """How the commands of a scheduler are run.

    Attributes:
        prefix: words in front of each of them.
        timeout: seconds after which one is ended.
        run: what runs them, as `subprocess.run` does.
        hint: what can be done where a command is not found.
        settings: variables that they are given.
        unset: variables that they are not to have, here or behind the prefix.
        variables: of the environment here, those that they are to have.
    """

    prefix: tuple[str, ...]
    timeout: float
    run: Run
    hint: str
    settings: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    variables: Callable[[Mapping[str, str]], dict[str, str]] = dict

    def __call__(self, *command: str, stdin: str | None = None) -> CommandAnswer:
        """Run a command.

        Args:
            command: its words.
            stdin: what it reads.

        Raises:
            SchedulerError: if it does not end in time, or cannot be run.
        """
        program = command[0]
        try:
            answer = self.run(
                self.behind_prefix(command),
                **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self.timeout,
                env=self._environment(),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = _text(error.stderr)
            raise SchedulerError(
                f"{program} did not answer within {self.timeout:g} s{f': {said}' if said else ''}"
            ) from None
        except FileNotFoundError:
            return CommandAnswer((self.prefix or command)[0], NOT_FOUND, "", "", self.hint)
        except OSError as error:
            raise SchedulerError(f"{program} could not be run: {error}") from error
        return CommandAnswer(program, answer.returncode, answer.stdout, answer.stderr, self.hint)

    def behind_prefix(self, command: Sequence[str], *, with_settings: bool = True) -> list[str]:
        """The words that run a command, wherever that is."""
        words = list(command)
        if self.prefix and with_settings:
            unset = [word for name in self.unset for word in ("-u", name)]
            words = ["env", *unset, *(f"{name}={value}" for name, value in self.settings.items()), *words]
        # ssh joins its words, and the shell at the other end takes them apart again.
        if any(PurePosixPath(word).name == "ssh" for word in self.prefix):
            words = [shlex.join(words)]
        return [*self.prefix, *words]

    def _environment(self) -> dict[str, str]:
        kept = self.variables(os.environ)
        return {name: value for name, value in kept.items() if name not in self.unset} | dict(self.settings)


def _text(output: Any) -> str:
    """What a command had written when its time was over: bytes, whatever it was asked for."""
    return cleaned(output.decode(errors="replace") if isinstance(output, bytes) else output or "")


def parse_words(name: str, value: str | Sequence[str], *, least: int = 0) -> tuple[str, ...]:
    """The words of a command, or of what stands in front of one: a list of them, or one text.

    Args:
        name: of the argument, for the message.
        value: its value.
        least: how many words there have to be.

    Raises:
        ValueError: if it is none of that.
    """
    try:
        words = tuple(shlex.split(value) if isinstance(value, str) else value)
    except ValueError as error:
        raise ValueError(f"{name}: {value!r} cannot be taken apart: {error}") from None
    if len(words) < least or not all(words):
        raise ValueError(f"{name}: {value!r} is no command: write its words, or one text with them")
    return words


def parse_timeout(value: int | float | str) -> float:
    """Seconds for which a command may take.

    Raises:
        ValueError: if it is no such time.
    """
    return argument("command_timeout", parse_time, value)


def parse_python(value: str | None) -> str:
    """The interpreter on the nodes: by default, this one.

    Raises:
        ValueError: if it is an empty text.
    """
    if value is None:
        return sys.executable
    if not value:
        raise ValueError(f"python: {value!r} is not the path of an interpreter")
    return value


def cleaned(text: str) -> str:
    """What a command wrote, without what is blank."""
    return "\n".join(filter(None, map(str.strip, text.splitlines())))
