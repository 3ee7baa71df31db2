"""How Slurm's commands are run: without Slurm's variables around them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence

from fractal_runner.executors.batch.commands import Commands, Run, parse_timeout, parse_words

TIMED_OUT = (124, 137)  # timeout(1)
HINT = "is this a SLURM login node? Load its module there, or say by `command_prefix` how to reach one."

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


def slurm_commands(
    prefix: str | Sequence[str] = (), timeout: int | float | str = 60.0, run: Run = subprocess.run
) -> Commands:
    """What runs Slurm's commands."""
    return Commands(
        prefix=parse_words("command_prefix", prefix),
        timeout=parse_timeout(timeout),
        run=run,
        hint=HINT,
        settings=_SETTINGS,
        variables=_without_slurm,
    )


def sbatch(commands: Commands, said: Collection[str]) -> Callable[[str], list[str]]:
    """What makes the words that submit a script; `said` are the parameters that it sets itself."""
    kept = {name for name, parameter in _DEFAULT_VARIABLES.items() if parameter not in said}
    unset = sorted(os.environ.keys() - _without_slurm(os.environ, kept).keys())
    without = ["env", *(word for name in unset for word in ("-u", name))]
    # submitit gives a command all the time that it takes.
    limit = ["timeout", "-k", "5", f"{commands.timeout:g}"]
    return lambda script: [
        *limit,
        *without,
        *commands.behind_prefix(["sbatch", script], with_settings=False),
    ]


def _without_slurm(variables: Mapping[str, str], kept: Collection[str] = ()) -> dict[str, str]:
    return {
        name: value
        for name, value in variables.items()
        if not name.startswith(_VARIABLES) or name in _KEPT_VARIABLES or name in kept
    }
