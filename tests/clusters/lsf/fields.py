"""`bjobs -o`: a format of fields, as text in columns, between delimiters, or as JSON."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.clusters.lsf.answers import Texts, cut
from tests.clusters.lsf.dialects import Dialect
from tests.clusters.lsf.jobs import ENDED, Job, State


class BadField(Exception):
    """A format names what there is not."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format as it was read: the fields with their widths, and the delimiter if there is one."""

    fields: tuple[tuple[str, int], ...]
    delimiter: str | None


def read_format(text: str, dialect: Dialect) -> Format:
    """Read what follows -o. Raises `BadField`."""
    delimiter = None
    match = re.search(r"delimiter=(?:'([^']*)'|\"([^\"]*)\"|(\S+))", text)
    if match:
        delimiter = match[1] or match[2] or match[3]
        text = text[: match.start()] + text[match.end() :]
    fields = []
    for word in text.split():
        name, _, width = word.lower().partition(":")
        if name not in dialect.fields:
            raise BadField(f"<{name.upper()}> in the format string is not a valid field name.\n")
        fields.append((name, abs(int(width)) if width.lstrip("-").isdecimal() else dialect.fields[name]))
    return Format(tuple(fields), delimiter)


def as_text(
    jobs: Sequence[tuple[Job, State]], form: Format, texts: Texts, names: Names, *, header: bool
) -> str:
    """Lines, with a header or without."""
    lines = []
    if header:
        lines.append([name.upper() for name, _ in form.fields])
    for job, state in jobs:
        lines.append([value(job, state, name, texts, names) or "-" for name, _ in form.fields])
    if form.delimiter is not None:
        return "".join(form.delimiter.join(line) + "\n" for line in lines)
    widths = [width for _, width in form.fields]
    return "".join(
        " ".join(f"{cut(text, width):<{width}}" for text, width in zip(line, widths, strict=True)) + "\n"
        for line in lines
    )


def as_json(
    found: Sequence[tuple[Job, State] | str], form: Format, texts: Texts, names: Names, dialect: Dialect
) -> str:
    """A document; ids that are not known stand in it with an error."""
    records = []
    for each in found:
        if isinstance(each, str):
            records.append({"JOBID": each, "ERROR": f"Job <{each}> is not found"})
        else:
            job, state = each
            records.append({name.upper(): value(job, state, name, texts, names) for name, _ in form.fields})
    if dialect.is_ibm:
        document = {"COMMAND": "bjobs", "JOBS": len(records), "RECORDS": records}
        return json.dumps(document, indent=2, separators=(",", ":")) + "\n"
    shown = ", ".join(
        "{\n"
        + ",\n".join(f"\t\t\t{_quote(name)}:\t{_quote(text)}" for name, text in each.items())
        + "\n\t\t}"
        for each in records
    )
    return f'{{\n\t"COMMAND":\t"bjobs",\n\t"JOBS":\t{len(records)},\n\t"RECORDS":\t[{shown}]\n}}\n'


@dataclass(frozen=True, slots=True)
class Names:
    """What is the same for all jobs."""

    user: str
    master: str


def value(job: Job, state: State, field: str, texts: Texts, names: Names) -> str:
    """A field of a job; empty where it has none."""
    return _FIELDS[field](job, state, texts, names)


def _seconds_run(job: Job) -> int:
    if job.begun is None:
        return 0
    return int((job.ended if job.ended is not None else time.time()) - job.begun)


def _max_mem(job: Job) -> str:
    return f"{max(1, round(max(job.memory) / 2**20))} Mbytes" if job.memory else ""


def _mem(job: Job) -> str:
    return f"{max(1, round(job.memory[-1] / 2**20))} Mbytes" if job.memory and job.state not in ENDED else ""


def _exit_code(job: Job, texts: Texts) -> str:
    code = texts.exit_code(job)
    return "" if code is None else str(code)


def _moment(when: float | None) -> str:
    return "" if when is None else time.strftime("%b %e %H:%M", time.localtime(when))


_FIELDS: dict[str, Callable[[Job, State, Texts, Names], str]] = {
    "jobid": lambda job, *_: str(job.id),
    "jobindex": lambda job, *_: str(job.index),
    "stat": lambda _job, state, *_: state.value,
    "user": lambda _job, _state, _texts, names: names.user,
    "queue": lambda job, *_: job.submission.queue,
    "job_name": lambda job, *_: job.name,
    "proj_name": lambda job, *_: job.submission.project,
    "from_host": lambda _job, _state, _texts, names: names.master,
    "exec_host": lambda job, *_: job.exec_host,
    "submit_time": lambda job, *_: _moment(job.submitted),
    "start_time": lambda job, *_: _moment(job.begun),
    "finish_time": lambda job, *_: _moment(job.ended) and f"{_moment(job.ended)} L",
    "exit_code": lambda job, _state, texts, _names: _exit_code(job, texts),
    "exit_reason": lambda job, _state, texts, _names: texts.reason(job) or "",
    "max_mem": lambda job, *_: _max_mem(job),
    "mem": lambda job, *_: _mem(job),
    "slots": lambda job, *_: str(job.submission.slots),
    "nexec_host": lambda job, *_: "1" if job.host else "",
    "command": lambda job, *_: job.submission.command,
    "run_time": lambda job, *_: f"{_seconds_run(job)} second(s)",
    "cpu_used": lambda job, *_: f"{job.cpu_s:.1f} second(s)",
    "pids": lambda job, *_: ",".join(map(str, job.pids)),
    "sub_cwd": lambda job, *_: job.submission.cwd,
    "exec_cwd": lambda job, *_: job.execution_cwd,
    "output_file": lambda job, *_: job.submission.output or "",
    "pend_reason": lambda job, state, *_: "New job is waiting for scheduling;" if state is State.PEND else "",
}


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
