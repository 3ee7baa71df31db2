"""bsub's options: from a client's arguments and the #BSUB lines of its script to a `Submission`.

Also what other commands share with it: index lists, and ids with them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping

from tests.clusters.lsf.dialects import Dialect
from tests.clusters.lsf.jobs import Submission

QUEUES = ("normal", "short", "requeue", "closed")
REQUEUE_EXIT_VALUES = {"requeue": (99,)}
MAX_JOB_ARRAY_SIZE = 1000

_SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SECTIONS = ("select", "order", "rusage", "span", "same", "cu", "affinity")


class Refused(Exception):
    """A submission that is not taken.

    Args:
        text: what stderr says.
        whole: the text is all that is said.
    """

    def __init__(self, text: str, *, whole: bool = False) -> None:
        super().__init__(text)
        self.text = text if whole else f"{text}. Job not submitted.\n"


def read_submission(
    dialect: Dialect,
    arguments: list[str],
    body: str,
    env: Mapping[str, str],
    cwd: str,
    *,
    big_array_is_one_job: bool,
) -> Submission:
    """What a call of bsub asks for. Raises `Refused`."""
    given, command = _split(dialect, arguments)
    if command:  # sh reads it once more: bsub joins its arguments
        script = " ".join(command) + "\n"
    else:
        script = body
        embedded: dict[str, str] = {}
        for line in body.splitlines():
            if line.startswith("#BSUB "):
                embedded |= _split(dialect, shlex.split(line[len("#BSUB ") :], comments=True))[0]
        given = {**embedded, **given}
    shown = "\n".join(
        line for line in script.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ).strip()
    if not shown:
        raise Refused("No command is specified")
    name = given.get("J")
    indices, at_once = _array(dialect, name, big_array_is_one_job)
    values = {option: _VALUES[option](dialect, value) for option, value in given.items() if option in _VALUES}
    return Submission(
        name=name,
        script=script,
        command=shown.replace("\n", ";"),
        cwd=given.get("cwd", cwd),
        env=env,
        queue=given.get("q", QUEUES[0]),
        default_queue="q" not in given,
        indices=indices,
        at_once=at_once,
        slots=values.get("n", 1),
        held="H" in given,
        rerunnable="r" in given,
        dependency=given.get("w"),
        run_limit=values.get("W"),
        memory_limit=values.get("M"),
        resources=given.get("R"),
        project=given.get("P", "default"),
        host=given.get("m"),
        output=given.get("oo", given.get("o")),
        errors=given.get("eo", given.get("e")),
        overwrites="oo" in given,
    )


def read_indices(text: str) -> tuple[int, ...] | None:
    """The indices of "1-5,7,10-20:5"; None if it is no such list."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::(\d+))?)?\s*", part)
        if not match:
            return None
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if first < 1 or last < first or step < 1 or last > 10_000_000:
            return None
        found += range(first, last + 1, step)
    return tuple(sorted(set(found)))


def read_id(text: str) -> tuple[int, tuple[int, ...] | None] | None:
    """The id, and the indices if there are any, of "17" and "17[2-4]"; None if it is no id."""
    match = re.fullmatch(r"(\d+)(?:\[([^\]]*)\])?", text)
    if not match:
        return None
    if match[2] is None:
        return int(match[1]), None
    indices = read_indices(match[2])
    return None if indices is None else (int(match[1]), indices)


def check_resources(text: str | None) -> None:
    """Look at the form of a resource requirement. Raises `Refused`."""
    sections = re.findall(r"(\w+)\[[^\[\]]*\]", text or "")
    left = re.sub(r"\w+\[[^\[\]]*\]", "", text or "")
    if "[" in left or "]" in left or any(section not in _SECTIONS for section in sections):
        raise Refused("Bad resource requirement syntax")


def _split(dialect: Dialect, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options and the command behind them, as the dialect's getopt sees them."""
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        name = rest.pop(0)[1:]
        if name in dialect.bsub_flags:
            given[name] = ""
        elif name in dialect.bsub_values:
            if not rest:
                raise Refused(
                    f"bsub: option requires an argument -- {name}\n{dialect.bsub_usage}",
                    whole=True,
                )
            given[name] = rest.pop(0)
        elif name[0] in dialect.bsub_values:
            given[name[0]] = name[1:]  # "-oo": the file "o"
        else:
            raise Refused(f"bsub: illegal option -- {name[0]}\n{dialect.bsub_usage}", whole=True)
    _look_at(dialect, given)
    return given, rest


def _look_at(dialect: Dialect, given: Mapping[str, str]) -> None:
    """Refuse what bsub itself does not take."""
    limit = given.get("c")
    if limit is not None and not re.fullmatch(r"(\d+:)?\d+(/\S+)?", limit):
        raise Refused(f"{limit}: Bad CPULIMIT specification")
    for option in ("b", "t"):
        time = given.get(option)
        if time is not None and not re.fullmatch(r"(\d+:)*\d+:\d+", time):
            raise Refused(f"{time}: Bad time specification")
    if len(given.get("J", "")) > dialect.longest_name:
        raise Refused("Bad job name")


def _array(dialect: Dialect, name: str | None, big_array_is_one_job: bool) -> tuple[tuple[int, ...], int]:
    if name is None or "[" not in name:
        return (), 0
    match = re.fullmatch(r"[^\[\]]*\[([^\[\]]*)\](?:%(\d+))?", name)
    indices = read_indices(match[1]) if match else None
    too_large = indices is not None and indices[-1] > MAX_JOB_ARRAY_SIZE
    if match is None or not indices or too_large:
        if big_array_is_one_job:
            return (), 0
        raise Refused("Job array index too large" if too_large else "Bad job name")
    return indices, int(match[2] or 0)


def _slots(dialect: Dialect, text: str) -> int:
    match = re.fullmatch(r"(\d+)(,\d+)?", text)
    if not match or int(match[1]) < 1:
        raise Refused(f"{text}: Bad argument for option -n")
    return int(match[1])


def _run_limit(dialect: Dialect, text: str) -> int:
    match = re.fullmatch(r"(?:(\d+):)?(\d+)(?:/\S+)?", text)
    if not match:
        raise Refused(f"{text}: Bad RUNLIMIT specification")
    return 60 * int(match[1] or 0) + int(match[2])


def _memory_limit(dialect: Dialect, text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text, re.IGNORECASE)
    if not match or (not text.isdecimal() and not dialect.memory_suffixes):
        raise Refused(f"{text}: Bad MEMLIMIT specification")
    if text.isdecimal():
        return int(text) * dialect.memory_unit
    return int(match[1]) << _SUFFIXES[match[2].upper()]


_VALUES: dict[str, Callable[[Dialect, str], int]] = {
    "n": _slots,
    "W": _run_limit,
    "M": _memory_limit,
}


def expand(path: str, job_id: int, index: int, cwd: str) -> str:
    """A file that `-o` or `-e` names, for one job."""
    name = path.replace("%J", str(job_id)).replace("%I", str(index))
    return os.path.join(cwd, name)  # noqa: PTH118
