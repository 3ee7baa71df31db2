"""What `bjobs -l` and `bhist -l` tell of a job's life, and how it ended.

Apart from the short answers because these are texts for people: a header, events line by line, sections of
limits and use; wrapped at 80 columns, and with parts that a user has typed. The rule is that nothing ends a
job but an event where events can stand, in a text that has not been cut off there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from fractal_runner.executors.batch.lsf_words import (
    HOST_LOST,
    STATES,
    TERMS,
    Row,
    node_of,
    read_code,
    read_signal,
    read_term,
    shortened,
    split_name,
    status_of,
)
from fractal_runner.executors.batch.scheduler import Cause, JobState, JobStatus

_INDENT = " " * 21  # a line that begins with it goes on with the one before, in the middle of a word
_HEADER = re.compile(r"Job <([1-9][0-9]{0,18})(?:\[([0-9]{1,9})\])?>, ")
_STAMP = re.compile(
    r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} [ 0-9][0-9] [0-9]{2}:[0-9]{2}:[0-9]{2}(?: [0-9]{4})?: "
    r"(?:\[[0-9]{1,9}\] )?"
)
_RULE = re.compile(r"-{20,200}[ \t\r]{0,20}")
_SUMMARY = "Summary of time"
_OF_HISTORY = ", to Queue <"  # in bhist's line of the submission; bjobs has the queue in the header

_USER = re.compile(r"\bUser <([^<>]{1,255})>")
_STATUS = re.compile(r", Status <([A-Z]{2,12})>, ")

_SUBMITTED = re.compile(r"Submitted from host <[^<>]{0,255}>(?P<held> with hold)?")
_STARTED = re.compile(r"(?:[Ss]tarted|[Dd]ispatched)\b(?:[^<>;]{0,200}<([^<>]{1,4000})>)?")
_RUNNING = re.compile(r"(?:Starting|Running)\b")
_PENDING = re.compile(r"(?:Pending|Requeued)\b|(?:Completed|Exited)\b.{0,500}\bTERM_REQUEUE_")
_SUSPENDED = re.compile(r"Suspended\b")
_SILENT = re.compile(r"Unknown\b")
_SIGNALLED = re.compile(
    r"Signal <(?:SIG)?([A-Z0-9+]{1,20})> requested by user or administrator <([^<>]{1,255})>"
)
_DONE = re.compile(r"Done successfully\b|Completed <done>")
_FAILED = re.compile(r"Exited\b|Completed <exit>")
_CODE = re.compile(r"Exited with exit code ([0-9]{1,9})(?![0-9])")
_SIGNAL = re.compile(r"Exited by signal ([0-9]{1,9})(?![0-9])")
_BARE = re.compile(r"(?:Exited|Completed <exit>)[.;]?\s{0,80}")

_LIMITS = re.compile(r"\s{0,40}(?:[A-Z]{3,12}LIMIT\b[ \t\r]{0,80}){1,20}")
_AMOUNT = re.compile(r"\b([0-9]{1,12}(?:\.[0-9]{1,6})?) {1,8}(?:(min)|([KMGTPE]))")
_MAX_MEM = re.compile(r"\s{0,20}MAX MEM: {1,4}([0-9]{1,12}(?:\.[0-9]{1,6})?) {1,4}([KMGTPE])")
_KILLS = {"INT", "TERM", "KILL"}  # what bkill sends, one after the other
_KILL_REASONS = {f"SIG{name}" for name in _KILLS}


@dataclass(slots=True)
class _Life:
    """A job's life as far as it has been read: what is of the run before goes with each new one."""

    held: bool = False
    runs: int = 0
    is_started: bool = False
    is_silent: bool = False
    node: str | None = None
    end: str | None = None  # "DONE" or "EXIT", as `bjobs` calls it
    ends: list[str] = field(default_factory=list)  # the events that say so
    requests: dict[str, tuple[str, str]] = field(default_factory=dict)  # signal: who wanted it, the event
    terms: list[str] = field(default_factory=list)
    is_whole: bool = False  # nothing has been cut off after the last event
    latest: str = ""
    limits: dict[str, tuple[float, str]] = field(default_factory=dict)
    max_memory: float | None = None
    seconds: dict[str, int] = field(default_factory=dict)  # in which state how long, by bhist

    def begin(self, *, is_started: bool) -> None:
        """A run begins, or the job waits for one again: what there was of an earlier one is past."""
        self.is_started, self.is_silent, self.held = is_started, False, False
        self.end, self.ends, self.requests, self.terms = None, [], {}, []


def read_long(text: str) -> list[Row]:
    """What `bjobs -l` and `bhist -l` say of one or more jobs.

    An end counts if the header says so too, as `bjobs` has it there, or if more text follows: `bhist` has a
    summary. A job whose events are not there, or stand among those of another, is passed over.
    """
    return [row for header, lines in _jobs(text) if (row := _read_job(header, lines)) is not None]


def _jobs(text: str) -> Iterator[tuple[re.Match[str], list[str]]]:
    """Each job's header, and its lines from there on, unwrapped.

    A header stands alone, after the end of what was before it. One that is met before the events of another
    job may be a part of that job's command; nothing below it can be trusted, then.
    """
    header: re.Match[str] | None = None
    lines: list[str] = []
    has_events = False
    before = ""
    for line in _unwrapped(text):
        match = _HEADER.match(line)
        if match and header and not has_events:
            return
        if match and (header is None or not before.strip() or _RULE.fullmatch(before)):
            if header:
                yield header, lines
            header, lines, has_events = match, [], False
        lines.append(line)
        has_events = has_events or _is_submission(line)
        before = line
    if header:
        yield header, lines


def _unwrapped(text: str) -> Iterator[str]:
    raw = text.split("\n")
    if not raw[-1].strip(" "):  # the last line has ended, or its other half begins and is cut off
        raw.pop()
    parts: list[str] = []
    for line in raw:
        if parts and line.startswith(_INDENT):
            parts.append(line[len(_INDENT) :].rstrip("\r"))
            continue
        if parts:
            yield "".join(parts)
        parts = [line.rstrip("\r")]
    if parts:
        yield "".join(parts)


def _is_submission(line: str) -> bool:
    stamp = _STAMP.match(line)
    return stamp is not None and _SUBMITTED.match(line, stamp.end()) is not None


def _read_job(header: re.Match[str], lines: list[str]) -> Row | None:
    # A command may have lines that look like events; the submission comes after all of them, and only once.
    first = max((number for number, line in enumerate(lines) if _is_submission(line)), default=None)
    if first is None:
        return None
    head = "".join(lines[:first])
    life = _Life()
    _read_lines(life, lines[first:])
    word = _word_of_header(head, lines[first])
    name, closing, _ = head.partition("Job Name <")[2].partition(">, User <")
    name = name if closing else ""
    number = int(header[2]) if header[2] else None
    if number:
        name = name.removesuffix(f"[{number}]")
    else:
        name, number = split_name(name)
    who = "bhist" if _OF_HISTORY in lines[first] else "bjobs"
    status = _status(life, word, who, set(_USER.findall(head)))
    return Row(header[1], number, name, status)


def _word_of_header(head: str, submission: str) -> str | None:
    """The state that `bjobs -l` has in the header; None if that is not certain.

    A name or a command may have the like of it; `bhist` has none, and names the queue with the submission.
    """
    if not submission.rstrip().endswith(";") or _OF_HISTORY in submission:
        return None
    found = _STATUS.findall(head)
    return found[0] if len(found) == 1 else None


def _read_lines(life: _Life, lines: list[str]) -> None:
    names: list[str] = []  # of the limits or the states whose numbers the next line has
    for line in lines:
        if stamp := _STAMP.match(line):
            life.is_whole = False
            _read_event(life, line[stamp.end() :].strip())
        elif not line.strip() or line.startswith(_SUMMARY):
            life.is_whole = True
        elif line.lstrip().startswith("TERM_"):
            _read_event(life, line.strip())
        elif match := _MAX_MEM.match(line):
            life.max_memory = _bytes(match[1], match[2])
        elif _LIMITS.fullmatch(line) or line.split()[:3] == ["PEND", "PSUSP", "RUN"]:
            names = line.split()
            continue
        elif names and names[0] == "PEND":
            life.seconds = {
                name: int(number)
                for name, number in zip(names, line.split(), strict=False)
                if re.fullmatch(r"[0-9]{1,12}", number)
            }
        elif names and len(found := _AMOUNT.findall(line)) == len(names):
            life.limits |= {
                name: (float(n), minutes or unit)
                for name, (n, minutes, unit) in zip(names, found, strict=True)
            }
        names = []


def _read_event(life: _Life, event: str) -> None:
    if match := _SUBMITTED.match(event):
        life.held = match["held"] is not None
    elif _PENDING.match(event):
        life.begin(is_started=False)
        life.terms += filter(None, [read_term(event)])
    elif match := _STARTED.match(event):
        life.begin(is_started=True)
        life.runs += 1
        life.node = node_of(match[1] or "")
    elif _RUNNING.match(event):
        if life.end:
            life.begin(is_started=True)
        life.is_started, life.is_silent = True, False
    elif _SUSPENDED.match(event):
        life.held = not life.is_started
    elif _SILENT.match(event):
        life.is_silent = True
    elif match := _SIGNALLED.match(event):
        life.requests[match[1]] = match[2], match[0]
    elif _DONE.match(event) or _FAILED.match(event):
        life.end = "DONE" if _DONE.match(event) else "EXIT"
        life.ends.append(event)
        life.terms += filter(None, [read_term(event)])
    elif event.startswith("TERM_"):
        life.ends.append(event)
        life.terms += filter(None, [read_term(event)])
    else:  # of its use of things, its post-processing, its parameters
        return
    life.latest = event


def _status(life: _Life, word: str | None, who: str, users: set[str]) -> JobStatus:
    said = f"{who} says {word + ': ' if word else ''}"
    state = STATES.get(word) if word else None
    if word and state is not JobState.ENDED:
        return status_of(word, life.node, said + life.latest)
    if word is None and not (life.end and life.is_whole):
        return _status_of_the_living(life, said)
    return _status_of_the_ended(life, word or life.end or "EXIT", said, users)


def _status_of_the_living(life: _Life, said: str) -> JobStatus:
    if life.is_started or life.end:
        return status_of("UNKWN" if life.is_silent else "RUN", life.node, said + life.latest)
    return status_of("PSUSP" if life.held else "PEND", None, said + life.latest)


def _status_of_the_ended(life: _Life, word: str, said: str, users: set[str]) -> JobStatus:
    requests = [(who, event) for name, (who, event) in life.requests.items() if name in _KILLS]
    detail = said + " ".join([*(event + ";" for _, event in requests), *(life.ends or [life.latest])])
    if word == "DONE":
        return status_of(word, life.node, detail)
    reason, returncode = _end(life)
    status = replace(status_of("EXIT", life.node, detail), reason=reason, returncode=returncode)
    if life.terms:
        return replace(status, reason=life.terms[-1], cause=TERMS.get(life.terms[-1]))
    if requests:
        term = "TERM_OWNER" if requests[-1][0] in users else "TERM_ADMIN"
        return replace(status, reason=term, cause=Cause.CANCELLED)
    if limit := _limit_reached(life, reason):
        shown = " ".join(map(str, life.limits[limit]))
        detail = shortened(f"{detail} {limit} {shown}")
        return replace(status, reason=f"TERM_{limit}", cause=TERMS[f"TERM_{limit}"], detail=detail)
    ends = [event for event in life.ends if not event.startswith("TERM_")]
    if life.is_whole and ends and all(map(_BARE.fullmatch, ends)):
        if life.is_started:
            return replace(status, reason=HOST_LOST, cause=Cause.NODE)
        return replace(status, cause=Cause.CANCELLED)  # killed while it waited: nothing else ends such a job
    return status


def _end(life: _Life) -> tuple[str, int | None]:
    """How it ended by itself: a reason, and an exit code as subprocess reports it."""
    for event in life.ends:
        match = _CODE.match(event) or _SIGNAL.match(event)
        if match is None or (match.end() == len(event) and not life.is_whole):  # a digit may be missing
            continue
        return read_code(int(match[1])) if match.re is _CODE else read_signal(int(match[1]))
    return read_code(None)


def _limit_reached(life: _Life, reason: str) -> str | None:
    """The limit that LSF has ended it for, of those that it has, if it does not say so by a word.

    At the run limit there is SIGUSR2 first, which other jobs get from nobody.
    """
    if "RUNLIMIT" in life.limits:
        minutes, _ = life.limits["RUNLIMIT"]
        seconds = life.seconds.get("RUN", 0) if life.runs == 1 else 0  # the summary's are those of all runs
        if reason == "SIGUSR2" and "USR2" not in life.requests:
            return "RUNLIMIT"
        if reason in _KILL_REASONS and seconds >= minutes * 60:
            return "RUNLIMIT"
    if "MEMLIMIT" in life.limits and life.max_memory is not None and reason in _KILL_REASONS:
        amount, unit = life.limits["MEMLIMIT"]
        if life.max_memory >= _bytes(str(amount), unit):
            return "MEMLIMIT"
    return None


def _bytes(amount: str, unit: str) -> float:
    return float(amount) * 1024.0 ** (" KMGTPE".find(unit))
