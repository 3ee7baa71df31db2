"""How Slurm's commands are run: as lists of words, without Slurm's variables around them, not for ever."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from fractal_runner.executors.batch import slurm_words as words
from fractal_runner.executors.batch.scheduler import SchedulerError

Run = Callable[..., "subprocess.CompletedProcess[str]"]

NOT_FOUND, TIMED_OUT = 127, (124, 137)  # env(1), timeout(1)

# Slurm's variables change what its commands do: within a job they are that job's limits, and a user may have
# set some to have nicer listings. None is kept but those that say where the cluster is and who we are, and
# what a user wants of all jobs, unless the array says something else: sbatch puts them above its script.
_VARIABLES = ("SLURM_", "SLURMD_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")
_KEPT_VARIABLES = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}
_DEFAULT_VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "",
    "SBATCH_WCKEY": "",
}
# No list of array elements is cut short (squeue(1)); no message is in another language.
_SETTINGS = {"SLURM_BITSTR_LEN": "0", "LC_ALL": "C"}


@dataclass(frozen=True, slots=True)
class CommandAnswer:
    """What a command has answered."""

    program: str
    returncode: int
    stdout: str
    stderr: str

    @property
    def is_missing(self) -> bool:
        """Whether there is no such program."""
        return self.returncode == NOT_FOUND

    def expect_success(self) -> None:
        """Raise SchedulerError unless it has succeeded."""
        if self.is_missing:
            raise SchedulerError(missing(self.program))
        if self.returncode:
            said = words.cleaned(self.stderr) or words.cleaned(self.stdout) or "It says nothing."
            raise SchedulerError(f"{self.program} failed with exit code {self.returncode}: {said}")


@dataclass(frozen=True, slots=True)
class Commands:
    """How Slurm's commands are run: a list of words, never by a shell of ours, and not for ever."""

    prefix: tuple[str, ...]
    timeout: float
    run: Run

    def __call__(self, *command: str) -> CommandAnswer:
        """Run a command.

        Raises:
            SchedulerError: if it does not end in time.
        """
        settings = ["env", *(f"{name}={value}" for name, value in _SETTINGS.items())] if self.prefix else []
        try:
            answer = self.run(
                self._behind_prefix([*settings, *command]),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self.timeout,
                env={**_without_slurm(os.environ), **_SETTINGS},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SchedulerError(f"{command[0]} did not answer within {self.timeout:g} s") from None
        except FileNotFoundError:
            return CommandAnswer((self.prefix or command)[0], NOT_FOUND, "", "")
        except OSError as error:
            raise SchedulerError(f"{command[0]} could not be run: {error}") from error
        return CommandAnswer(command[0], answer.returncode, answer.stdout, answer.stderr)

    def sbatch(self, said: Collection[str]) -> Callable[[str], list[str]]:
        """What makes the words that submit a script; `said` are the parameters that it sets itself."""
        kept = {name for name, parameter in _DEFAULT_VARIABLES.items() if parameter not in said}
        unset = sorted(os.environ.keys() - _without_slurm(os.environ, kept).keys())
        without = ["env", *(word for name in unset for word in ("-u", name))]
        # submitit gives a command all the time that it takes.
        limit = ["timeout", "-k", "5", f"{self.timeout:g}"]
        return lambda script: [*limit, *without, *self._behind_prefix(["sbatch", script])]

    def _behind_prefix(self, command: list[str]) -> list[str]:
        # ssh joins its words, and the shell at the other end takes them apart again.
        if any(PurePosixPath(word).name == "ssh" for word in self.prefix):
            command = [shlex.join(command)]
        return [*self.prefix, *command]


def _without_slurm(variables: Mapping[str, str], kept: Collection[str] = ()) -> dict[str, str]:
    return {
        name: value
        for name, value in variables.items()
        if not name.startswith(_VARIABLES) or name in _KEPT_VARIABLES or name in kept
    }


def missing(program: str) -> str:
    return (
        f"{program} was not found: is this a SLURM login node? Load its module there, or say by "
        "`command_prefix` how to reach one."
    )
