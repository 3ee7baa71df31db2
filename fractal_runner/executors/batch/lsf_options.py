"""What a call may say to LSF by `extra`, by LSF's names and Fractal's, and how requirements become one.

LSF takes a job's requirements as one text of sections, `select[mem>8000] rusage[mem=8000] span[hosts=1]`. The
open ones of its families look at the last `-R` alone, so all that is asked for is put into one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fractal_runner.executors.batch.options import (
    OptionTable,
    both,
    flag,
    lines,
    names,
    own_first,
    own_over,
    variables,
)

# Of bsub's own: what the executor says, as jobs could not be found or followed any more, and what has a name
# among its arguments.
_OURS = {
    "-J": "the array is found by its name",
    "-o": "what a job prints is in its log",
    "-oo": "what a job prints is in its log",
    "-e": "what a job prints is in its log",
    "-eo": "what a job prints is in its log",
    "-i": "a job reads nothing",
    "-is": "a job reads nothing",
    "-I": "nobody waits at a terminal",
    "-Ip": "nobody waits at a terminal",
    "-Is": "nobody waits at a terminal",
    "-K": "bsub would wait for the job",
    "-h": "bsub would submit nothing",
    "-V": "bsub would submit nothing",
    "-pack": "bsub would read others",
    "-q": "say it by `queue`",
    "-P": "say it by `project`",
    "-W": "say it by `walltime`",
    "-n": "say it by `cores`",
    "-M": "say it by `memory`",
    "-R": "say it by `resource_requirements`",
    "-r": "say it by `rerunnable`",
}
_ORDER = ("select", "order", "rusage", "span", "same", "cu", "affinity")
_SECTION = re.compile(rf"({'|'.join(_ORDER)})\s*\[([^\[\]]*)\]")
_PTILE = re.compile(r"\bptile\s*=\s*(\d{1,6})")


def _bsub_arguments(value: Any) -> tuple[str, ...]:
    """Further words for bsub, `["-app", "chem"]`."""
    words = lines(value)
    if words and not words[0].startswith("-"):
        raise ValueError(f"{words[0]!r} is no option: bsub would take it for the command to run")
    for word in words:
        if why := _OURS.get(word):
            raise ValueError(f"{word!r} is the executor's own to say: {why}")
    return words


def _requirements(value: Any) -> tuple[str, ...]:
    """LSF's resource requirements: a text, or several."""
    texts = names(value)
    for text in texts:
        if text.count("[") != text.count("]"):
            raise ValueError(f"{text!r} has a bracket without its other half")
    return tuple(filter(None, texts))


OPTIONS = OptionTable(
    "LSF",
    {
        "bsub_extra": _bsub_arguments,
        "env": variables,
        "exclude": names,
        "needs_gpu": flag,
        "nodelist": names,
        "pre_submission_commands": lines,
        "resource_requirements": _requirements,
        "setup": lines,
        "teardown": lines,
        "user_local_exports": variables,
    },
    merges={
        "bsub_extra": both,
        "env": own_over,
        "exclude": both,
        "resource_requirements": both,
        "setup": both,
        "teardown": own_first,
    },
    elsewhere={
        "account": "account",
        "cores": "cpus",
        "cpus_per_task": "cpus",
        "gpus": "gpus",
        "mem": "memory",
        "memory": "memory",
        "partition": "queue",
        "project": "account",
        "queue": "queue",
        "time": "time",
        "walltime": "time",
    },
)


def requirement(own: Sequence[str], *, excluded: Iterable[str] = (), memory: int | None = None) -> str:
    """One text of all that is required.

    Args:
        own: the user's requirements. What they say of memory or of the hosts counts over what is added here.
        excluded: hosts that are not wanted.
        memory: how much of it is to be reserved, in the site's unit; None for nothing.

    Returns:
        It, in LSF's order of sections. One that is made of alternatives, `{…} || {…}`, is taken as it is: no
        part of it is everybody's.
    """
    if alternatives := next((text for text in own if "{" in text), None):
        return alternatives
    sections: dict[str, list[str]] = {}
    for text in own:
        for name, content in _SECTION.findall(text):
            sections.setdefault(name, []).append(content.strip())
        if rest := _outside(text):
            sections.setdefault("select", []).append(rest)  # as LSF reads what has no section
    sections.setdefault("select", []).extend(f"hname!={_quoted(name)}" for name in _hosts(excluded))
    if memory is not None and not any(re.search(r"\bmem\s*=", part) for part in sections.get("rusage", ())):
        sections.setdefault("rusage", []).insert(0, f"mem={memory}")
    sections.setdefault("span", ["hosts=1"])
    return " ".join(f"{name}[{_joined(name, sections[name])}]" for name in _ORDER if sections.get(name))


def hosts_of(own: Sequence[str], cpus: int) -> int:
    """Over how many hosts such requirements spread these CPUs."""
    for text in own:
        if (found := _PTILE.search(text)) and int(found[1]):
            return -(-cpus // int(found[1]))
    return 1


def _outside(text: str) -> str:
    return " ".join(_SECTION.sub(" ", text).split())


def _joined(name: str, parts: Sequence[str]) -> str:
    if name == "select":
        return parts[0] if len(parts) == 1 else " && ".join(f"({part})" for part in parts)
    return ",".join(parts) if name == "rusage" else parts[-1]


def _hosts(names: Iterable[str]) -> list[str]:
    return [host for text in names for host in re.split(r"[,\s]+", text) if host]


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"\w+", name, re.ASCII) else f"'{name}'"


def host_names(options: Mapping[str, Any]) -> list[str]:
    """The hosts that a job may have, as `-m` takes them."""
    return _hosts(options.get("nodelist", ()))
