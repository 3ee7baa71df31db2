"""What a call may say to LSF by `extra`, by LSF's names and Fractal's, and how requirements become one.

LSF takes a job's requirements as one text of sections, `select[mem>8000] rusage[mem=8000] span[hosts=1]`. The
open ones of its families look at the last `-R` alone, so all that is asked for is put into one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fractal_runner.executors.batch.commands import parse_words
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

# Options that the executor says itself, as jobs could not be found or followed otherwise, or that have a name
# among its arguments.
_OURS = {
    "-J": "the array is found by its name",
    "-o": "what a job prints is in its log",
    "-e": "what a job prints is in its log",
    "-i": "a job reads nothing",
    "-I": "nobody waits at a terminal",
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
# IBM's longer options that begin as one of these. One of a letter may have its value glued to it, "-qlong".
_LONGER = (
    "-Jd",  # a description
    "-We",  # an estimate of the time, and what follows from it
    "-Wp",
    "-env",  # variables
    "-ep",  # a command that is run at the end
    "-hl",  # limits of memory for each host
    "-hostfile",
    "-notify",  # of what
    "-nn",  # a number of nodes
    "-outdir",
    "-rn",  # not to be run again
)
_ORDER = ("select", "order", "rusage", "span", "same", "cu", "affinity")
_SECTION = re.compile(rf"({'|'.join(_ORDER)})\s*\[([^\[\]]*)\]")
_PTILE = re.compile(r"\bptile\s*=\s*(\d{1,6})")


def _bsub_arguments(value: Any) -> tuple[str, ...]:
    """Further words for bsub, `["-app", "chem"]` or "-app chem"."""
    words = parse_words("bsub_extra", value) if isinstance(value, str) else lines(value)
    if words and not words[0].startswith("-"):
        raise ValueError(f"{words[0]!r} is no option: bsub would take it for the command to run")
    for word in words:
        if word in ("-", "--"):
            raise ValueError(
                f"{word!r} ends bsub's options: it would take what follows for the command to run"
            )
        if word.startswith("-") and " " in word:
            raise ValueError(f"{word!r} is two words: write {json.dumps(word.split(maxsplit=1))}")
        own = _OURS.get(word) or (_OURS.get(word[:2]) if not word.startswith(_LONGER) else None)
        if own:
            raise ValueError(f"{word!r} is the executor's own to say: {own}")
    return words


def _requirements(value: Any) -> tuple[str, ...]:
    """LSF's resource requirements: a text, or several."""
    texts = tuple(filter(None, names(value)))
    if len(texts) > 1 and any("{" in text for text in texts):
        raise ValueError("alternatives, {…} || {…}, go with no other requirement: put all into each")
    for text in texts:
        depth = 0
        for character in text:
            depth += (character == "[") - (character == "]")
            if depth not in (0, 1):
                break
        if depth:
            raise ValueError(f"{text!r} has brackets that do not match")
    return texts


def _hosts(value: Any) -> tuple[str, ...]:
    """Hosts: "h1,h2", or a list of such."""
    hosts = tuple(host for text in names(value) for host in re.split(r"[,\s]+", text) if host)
    for host in hosts:
        if not re.fullmatch(r"[\w.+-]+", host, re.ASCII):
            raise ValueError(f'{host!r} is no host\'s name: LSF wants each of them by itself, "n1,n2"')
    return hosts


OPTIONS = OptionTable(
    "LSF",
    {
        "bsub_extra": _bsub_arguments,
        "env": variables,
        "exclude": _hosts,
        "needs_gpu": flag,
        "nodelist": _hosts,
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


def requirement(own: Sequence[str], *, excluded: Sequence[str] = (), memory: int | None = None) -> str:
    """One text of all that is required.

    Args:
        own: the user's requirements. What they say of memory or of the hosts counts over what is added here.
        excluded: hosts that are not wanted.
        memory: how much of it is to be reserved, in the site's unit; None for nothing.

    Returns:
        It, in LSF's order of sections. One that is made of alternatives, `{…} || {…}`, is taken as it is, and
        the last one if there are several: no part of it is everybody's.
    """
    if alternatives := next((text for text in reversed(own) if "{" in text), None):
        return alternatives
    sections = _sections(own)
    sections.setdefault("select", []).extend(f"hname!={_quoted(name)}" for name in excluded)
    if memory is not None and not any(re.search(r"\bmem\s*=", part) for part in sections.get("rusage", ())):
        reserved = f"mem={memory}"
        usage = ",".join(sections.get("rusage", ()))
        # Of `a || b` LSF takes one: each of them has to have it.
        each = [f"{reserved},{part.strip()}" for part in usage.split("||")] if usage else [reserved]
        sections["rusage"] = ["||".join(each)]
    sections.setdefault("span", ["hosts=1"])
    return " ".join(f"{name}[{_joined(name, sections[name])}]" for name in _ORDER if sections.get(name))


def hosts_of(own: Sequence[str], cpus: int) -> int:
    """Over how many hosts such requirements spread these CPUs."""
    spans = _sections(own).get("span")
    found = _PTILE.search(spans[-1]) if spans else None
    return -(-cpus // int(found[1])) if found and int(found[1]) else 1


def asks_for_gpus(options: Mapping[str, Any]) -> bool:
    """Whether options name GPUs by themselves, as a site has them."""
    usage = ",".join(_sections(options.get("resource_requirements", ())).get("rusage", ()))
    return (
        "-gpu" in options.get("bsub_extra", ()) or re.search(r"(?:^|[\s,:|])\w*gpu\w*\s*=", usage) is not None
    )


def _sections(own: Sequence[str]) -> dict[str, list[str]]:
    """What is required, by section."""
    sections: dict[str, list[str]] = {}
    for text in own:
        for name, content in _SECTION.findall(text):
            sections.setdefault(name, []).append(content.strip())
        if rest := " ".join(_SECTION.sub(" ", text).split()):
            sections.setdefault("select", []).append(rest)  # as LSF reads what has no section
    return sections


def _joined(name: str, parts: Sequence[str]) -> str:
    if name == "select":
        return parts[0] if len(parts) == 1 else " && ".join(f"({part})" for part in parts)
    return ",".join(parts) if name == "rusage" else parts[-1]


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) else f"'{name}'"
