"""What a call may say to Slurm by `extra`, by Fractal's names and sbatch's."""

from __future__ import annotations

import re
import shlex
from typing import Any

from fractal_runner.executors.batch.options import (
    OptionTable,
    both,
    flag,
    lines,
    names,
    one_line,
    own_first,
    own_over,
    variables,
)
from fractal_runner.quantities import parse_count

# Options that extra lines may not have, as the array could not be found or followed any more.
_OURS = {
    "array": "a",
    "clusters": "M",
    "help": "h",
    "job-name": "J",
    "output": "o",
    "parsable": "",
    "signal": "",
    "test-only": "",
    "usage": "",
    "version": "V",
    "wait": "W",
    "wrap": "",
}


def _sbatch_lines(value: Any) -> tuple[str, ...]:
    """Lines for sbatch, each with its "#SBATCH" in front."""
    return tuple(f"#SBATCH {_sbatch_options(line)}" for line in lines(value))


def _sbatch_options(line: str) -> str:
    found = re.fullmatch(r"(?:#SBATCH\s+)?(-.*)", line.strip())
    if found is None:
        raise ValueError(
            f'{line!r} is no line for sbatch: write "#SBATCH --option=value", or "--option=value"'
        )
    try:
        parts = shlex.split(found[1])
    except ValueError as error:
        raise ValueError(f"{line!r}: {error}") from None
    for part in parts:
        if ours := _is_ours(part):
            raise ValueError(f"{line!r}: --{ours} is the executor's own to say")
    return found[1]


def _is_ours(word: str) -> str | None:
    """The option of `_OURS` that a word is, if any: in full, cut short as sbatch allows, or a letter."""
    if word.startswith("--"):
        name = word[2:].partition("=")[0]
        return next((ours for ours in _OURS if name and ours.startswith(name)), None)
    letter = word[1:2] if word.startswith("-") else ""
    return next((ours for ours, short in _OURS.items() if letter and short == letter), None)


def _node_list(value: Any) -> str:
    return ",".join(names(value))


OPTIONS = OptionTable(
    "SLURM",
    {
        "constraint": one_line,
        "env": variables,
        "exclude": _node_list,
        "extra_lines": _sbatch_lines,
        "gres": one_line,
        "needs_gpu": flag,
        "nodelist": _node_list,
        "nodes": parse_count,
        "ntasks_per_node": parse_count,
        "pre_submission_commands": lines,
        "qos": one_line,
        "setup": lines,
        "teardown": lines,
        "user_local_exports": variables,
    },
    merges={
        "env": own_over,
        "exclude": lambda default, own: f"{default},{own}",
        "extra_lines": both,
        "setup": both,
        "teardown": own_first,
    },
    elsewhere={
        "account": "account",
        "cpus_per_task": "cpus",
        "gpus": "gpus",
        "mem": "memory",
        "memory": "memory",
        "partition": "queue",
        "time": "time",
    },
)
