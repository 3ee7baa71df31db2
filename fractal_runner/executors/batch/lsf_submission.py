"""What is submitted to LSF: bsub's words, the line that it reads, and the script which that line starts.

The script lies in the array's directory and not in what bsub is given: that can be read by everybody who
asks for the job at length. All that comes from outside is quoted, except the lines of `setup`, `teardown` and
`pre_submission_commands`, which are shell by nature.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fractal_runner.executors.batch.files import put
from fractal_runner.executors.batch.lsf_options import asks_for_gpus, hosts_of, requirement
from fractal_runner.executors.batch.lsf_words import Dialect
from fractal_runner.executors.batch.options import one_line
from fractal_runner.executors.batch.packing import lead_s
from fractal_runner.executors.batch.scheduler import ArrayRequest

MemoryUnit = Literal["KB", "MB", "GB", "TB", "PB", "EB"]
MemoryPer = Literal["job", "host", "task"]

# bytes; LSF counts in powers of two
UNITS: dict[str, int] = {
    name: 1024**power for power, name in enumerate(("KB", "MB", "GB", "TB", "PB", "EB"), 1)
}
# For our own commands: one attempt, as whoever asks has time, and asks again; and in no other language.
SETTINGS = {"LSB_NTRIES": "1", "LC_ALL": "C"}
_SCRIPT = "job.sh"
# People's lines are mostly written for bash, and their clusters' modules for it as well.
_LINES = ("setup", "pre_submission_commands", "teardown")
_IN_BASH = 'if [ -z "${BASH_VERSION:-}" ] && command -v bash >/dev/null; then exec bash "$0"; fi'
_SIGNALS = "INT,TERM,USR2"  # bkill's, in that order, and what a job gets whose time is up


@dataclass(frozen=True, slots=True)
class MemoryTerms:
    """How a site counts memory.

    Attributes:
        limit_unit: bytes of the unit of `-M`.
        reserve_unit: bytes of the unit of `rusage[mem=…]`.
        per: what a reservation is of: the whole job, each of its hosts, or each of its tasks.
    """

    limit_unit: int
    reserve_unit: int
    per: MemoryPer

    def limit(self, memory: int) -> int:
        """So many bytes, in the unit of `-M`."""
        return -(-memory // self.limit_unit)  # in whole numbers: floats would round large ones down

    def reserve(self, memory: int, *, cpus: int, hosts: int) -> int:
        """What is to be reserved of so many bytes of a job, in the unit of `rusage`."""
        return -(-memory // ({"job": 1, "host": hosts, "task": cpus}[self.per] * self.reserve_unit))


def bsub_words(
    request: ArrayRequest,
    options: Mapping[str, Any],
    *,
    dialect: Dialect,
    memory: MemoryTerms,
    rerunnable: bool,
) -> list[str]:
    """What bsub is told of an array, in words that both families know.

    Raises:
        ValueError: if LSF could not keep to it.
    """
    if not re.fullmatch(r"[\w.+-]+", request.name, re.ASCII):
        raise ValueError(f"{request.name!r} is not a name for an array: bjobs would not find it by that")
    own = options.get("resource_requirements", ())
    words = ["-J", f"{request.name}[1-{request.count}]", "-o", "/dev/null", "-n", str(request.cpus)]
    reserve = None
    if request.memory is not None:
        words += ["-M", str(memory.limit(request.memory))]
        reserve = memory.reserve(request.memory, cpus=request.cpus, hosts=hosts_of(own, request.cpus))
    words += ["-R", requirement(own, excluded=options.get("exclude", ()), memory=reserve)]
    if request.time is not None:
        words += ["-W", str(_minutes(request.time))]
    for option, value in (("-q", request.queue), ("-P", request.account)):
        if value is not None:
            words += [option, one_line(value)]
    if hosts := options.get("nodelist"):
        words += ["-m", " ".join(hosts)]
    if rerunnable:
        words.append("-r")
    extra = options.get("bsub_extra", ())
    return [*words, *_gpus(request, options, dialect), *extra]


def script_of(request: ArrayRequest, options: Mapping[str, Any], *, python: str) -> str:
    """What each job of an array runs.

    Args:
        request: the array.
        options: its own and the scheduler's, parsed.
        python: the interpreter on the nodes.

    Raises:
        ValueError: if its directory's name is no line of text.
    """
    one_line(request.seen_as)
    try:
        place = os.getcwd()
    except FileNotFoundError:  # somebody has removed it
        place = request.seen_as
    return _script(request, options, python, place)


def line_of(request: ArrayRequest) -> str:
    """The line that starts an array's script, for bsub to read."""
    script = f"{request.seen_as.rstrip('/')}/{_SCRIPT}"
    return f"/bin/sh {shlex.quote(script)}\n"


def write_script(request: ArrayRequest, script: str) -> None:
    """Put an array's script in its place.

    Raises:
        OSError: if it cannot be written.
    """
    put(str(request.directory / _SCRIPT), script.encode())


def _script(request: ArrayRequest, options: Mapping[str, Any], python: str, place: str) -> str:
    directory, here = shlex.quote(request.seen_as), shlex.quote(place)
    variables = {**options.get("env", {}), **options.get("user_local_exports", {})}
    warned = ""
    if request.time is not None:
        seconds = _minutes(request.time) * 60
        warned = f"$((_fr_begun + {int(seconds - lead_s(seconds))}))"
    steps = [
        "#!/bin/sh",
        f"# The jobs of {request.name}. LSF says which one this is.",
        *([_IN_BASH] if any(map(options.get, _LINES)) else []),
        f"cd {directory} || exit",  # LSF itself would go on in /tmp
        # Kept before anybody's lines: these may have variables of any name but ours.
        "_fr_ended=",
        *(["_fr_begun=$(date +%s)"] if warned else []),
        "_fr_number=$((${LSB_JOBINDEX:-0} - 1))",
        '_fr_id="${LSB_JOBID}[${LSB_JOBINDEX}]"',
        '_fr_node="${LSB_HOSTS%% *}"',
        # Some take a list of numbers that they do not like for a part of a plain job's name.
        '[ "$_fr_number" -ge 0 ] || { echo "LSF has taken the array as one plain job" >>job-0.log; exit 1; }',
        'exec >>"job-$_fr_number.log" 2>&1 </dev/null',
        f"cd {here} 2>/dev/null || echo {here} is not there on this host: the job runs in {directory}",
        # The worker is told as well, and the shell waits for it, and hands on its exit code. Before there is
        # one, it remembers that there is to be none.
        "trap _fr_ended=130 INT",
        "trap _fr_ended=140 USR2",
        "trap _fr_ended=143 TERM",
        *_restored(),
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *options.get("setup", ()),
        *options.get("pre_submission_commands", ()),
        '[ -z "$_fr_ended" ] || exit "$_fr_ended"',
        f'{shlex.quote(python)} -u -P -m fractal_runner.executors.batch {directory} "$_fr_number" '
        f'"$_fr_id" "$_fr_node" {_SIGNALS} "" "{warned}"',
        "_fr_code=$?",
        *options.get("teardown", ()),
        'exit "$_fr_code"',
    ]
    return "\n".join(steps) + "\n"


def _restored() -> list[str]:
    """Lines that take back what bsub was told for itself: it gives its own environment to the jobs."""
    return [
        f"export {name}={shlex.quote(os.environ[name])}" if name in os.environ else f"unset {name}"
        for name in SETTINGS
    ]


def _minutes(seconds: float) -> int:
    return max(1, math.ceil(seconds / 60))


def _gpus(request: ArrayRequest, options: Mapping[str, Any], dialect: Dialect) -> list[str]:
    count = request.gpus or int(options.get("needs_gpu", False))
    if not count or asks_for_gpus(options):
        return []
    if dialect is not Dialect.IBM:
        raise ValueError(
            "this family of LSF has no option for GPUs: name the resource that your site has for them in "
            '`resource_requirements`, "rusage[ngpus=1]"'
        )
    return ["-gpu", f"num={count}"]
