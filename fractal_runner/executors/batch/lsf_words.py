"""What LSF's commands say, in our words: tables, and what reads their short answers by them.

Apart from what runs commands because nothing here does: text goes in, `JobStatus` comes out, and what does
not look like an answer is passed over. The long texts, of `bjobs -l` and `bhist -l`, have a module of their
own. Two families of LSF say nearly the same: IBM's, as documented for 10.1, and those that descend from
openlava, whose recorded answers are among the tests.
"""

from __future__ import annotations

import enum
import functools
import logging
import re
from dataclasses import dataclass

from fractal_runner.executors.batch.scheduler import Cause, JobState, JobStatus

_logger = logging.getLogger("fractal_runner")


class Dialect(enum.Enum):
    """The families of LSF, which differ in what they can be asked."""

    IBM = "IBM Spectrum LSF"
    OPENLAVA = "openlava"


# bjobs(1), the STAT column.
STATES: dict[str, JobState] = {
    "PEND": JobState.QUEUED,
    "PSUSP": JobState.QUEUED,  # held before it started: waits for people
    "WAIT": JobState.QUEUED,  # in a chunk of jobs that are sent to a host together, and not its turn yet
    "PROV": JobState.RUNNING,  # has its host, which is being booted for it
    "RUN": JobState.RUNNING,
    "SSUSP": JobState.RUNNING,  # stopped as its host is loaded, or not yet resumed: comes back
    "USUSP": JobState.RUNNING,  # stopped by people while it ran: comes back when they say so
    "UNKWN": JobState.RUNNING,  # its host does not answer: most come back, and the job has run on meanwhile
    "ZOMBI": JobState.RUNNING,  # killed, or to be run again, while its host is silent: processes may be there
    "DONE": JobState.ENDED,  # with exit code 0
    "EXIT": JobState.ENDED,  # with another one, by a signal, or killed
}
_HELD = "PSUSP"

# bacct(1), "Termination reasons": the words, and what of it matters to whoever waits for the job.
TERMS: dict[str, Cause | None] = {
    "TERM_ADMIN": Cause.CANCELLED,  # killed by an administrator
    "TERM_BUCKET_KILL": Cause.CANCELLED,  # killed by people with all that is like it (bkill -b)
    "TERM_CHKPNT": None,  # killed after its state was saved, to go on elsewhere
    "TERM_CPULIMIT": Cause.TIME,  # its CPU time was up
    "TERM_CWD_NOTEXIST": None,  # its working directory is not there on the host
    "TERM_DATA": None,  # its data could not be staged
    "TERM_DEADLINE": Cause.DEADLINE,  # its termination deadline had come (bsub -t)
    "TERM_EXTERNAL_SIGNAL": None,  # a signal from outside of LSF: of the job itself, of a host out of memory
    "TERM_FORCE_ADMIN": Cause.CANCELLED,  # removed by an administrator without waiting for its host
    "TERM_FORCE_OWNER": Cause.CANCELLED,  # the same, by its owner
    "TERM_LOAD": Cause.PREEMPTED,  # its host was loaded too much
    "TERM_MEMLIMIT": Cause.MEMORY,
    "TERM_ORPHAN_SYSTEM": None,  # what it depended on had failed
    "TERM_OWNER": Cause.CANCELLED,  # killed by its owner
    "TERM_PREEMPT": Cause.PREEMPTED,  # made room for another job
    "TERM_PRE_EXEC_FAIL": None,  # the site's or the queue's command before the job failed
    "TERM_PROCESSLIMIT": None,  # had too many processes
    "TERM_RC_RECLAIM": Cause.PREEMPTED,  # its host, hired, was taken back
    "TERM_REMOVE_HUNG_JOB": Cause.NODE,  # its host had been silent for too long
    "TERM_REQUEUE_ADMIN": None,  # killed by an administrator to be run again
    "TERM_REQUEUE_OWNER": None,  # the same, by its owner
    "TERM_RUNLIMIT": Cause.TIME,
    "TERM_SWAP": Cause.MEMORY,  # used too much swap space
    "TERM_THREADLIMIT": None,  # had too many threads
    "TERM_WINDOW": Cause.DEADLINE,  # the hours were over in which its queue runs jobs
    "TERM_ZOMBIE": Cause.NODE,  # ended while LSF was not there to see it
}
HOST_LOST = "HOST_LOST"  # our own word for an end that LSF has none for: the host went away with the job

# A daemon is down or busy, and the command tries on by itself.
_PATIENCE = (
    r"still trying",
    r"[Pp]lease wait",
    r"\bRetrying\b",
)
# The same, and the command has given up.
_DOWN = (
    r"Failed in an LSF library call",  # whatever follows: the daemons' library, and not the request
    r"\btry (?:again )?later\b",
    r"\bLIM is (?:down|not responding)",
    r"\b[Dd]aemon(?: \(\w{1,20}\))? (?:is )?not respond",
    r"[Bb]atch daemon cannot fork",
    r"[Cc]ommunication time ?out",
    r"Connection (?:refused|timed out|reset)",
    r"(?:concurrent )?query limit exceeded",
    r"[Bb]atch service not registered",
    r"[Mm]aster LIM\b.{0,40}\b(?:unknown|not found)",
    r"[Cc]annot locate master LIM",
    r"[Cc]annot (?:connect to|open) (?:LSF|LIM|SBD|mbatchd)",
    r"[Uu]nable to (?:contact|connect|reach)\b",
    r"[Bb]atch (?:daemon|library) internal error",
    r"[Ss]ystem call failed",
    r"Resource temporarily unavailable",
    r"[Cc]annot allocate memory",
    r"No buffer space available|Too many open files|Broken pipe",
    r"XDR operation error",
)
# Not an answer: what a command says of a daemon. Nothing follows from it for any job.
BUSY = re.compile("|".join((*_PATIENCE, *_DOWN)))
_PATIENCE_LINE = re.compile("|".join(_PATIENCE))

# Failed submissions that say nothing of the job itself: it may be there, or be taken another time.
NOT_REFUSED = re.compile(
    "|".join(
        (
            BUSY.pattern,
            # Of a user or the site: others' jobs make room.
            r"[Pp]ending (?:(?:job|slot)s? ){1,2}(?:threshold|limit)",
            r"(?:reached|exceeded) (?:its|the|his) (?:pending |maximum )?(?:job|slot)s?\b.{0,20}limit",
            r"does not have enough per-(?:user|host|processor) job slots",
            r"does not have enough job slots",
            r"No job Id can be used now",  # all numbers are in use
            r"[Aa]uthentication (?:failed|error)",  # a service of its own, which may be down
        )
    )
)

# What a command says of an option that it does not have.
USAGE = re.compile(r"\b(?:illegal|invalid|unrecognized) option|^[ \t]{0,20}Usage:", re.MULTILINE)

# What is said of all that was asked for, if there is nothing of it.
NO_JOBS = re.compile(r"\bNo (?:\w{1,20} )?job found", re.IGNORECASE)

# What bkill says of jobs that need not be killed (any more).
NOTHING_TO_KILL = re.compile(
    r"Job has already (?:finished|ended)"
    r"|No matching job found"
    r"|No unfinished job found"
    r"|[Oo]peration is in progress"  # of an array, all of whose jobs are being killed
    r"|(?:is|are) (?:already )?being (?:terminated|killed)"
    r"|Job <[^<>]{1,200}> is not found"
)

# bjobs -o: the fields of a row, by IBM's names, with widths: its own are as narrow as seven digits of an id.
# The name is the last one, as it may hold anything.
FIELDS = (
    "jobid:20 jobindex:10 stat:8 exit_code:10 exit_reason:150 exec_host:255 max_mem:20 job_name:255 "
    "delimiter='^'"
)
_FIELD_COUNT = 8

# Signals as Linux numbers them, which is what the hosts run, wherever this is read. Those in real time,
# above, have no names of their own.
_SIGNALS = (
    *("", "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE"),
    *("ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ"),
    *("VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS"),
)
_NEWEST_SIGNAL = 64
_SIGNALLED = 128  # a shell adds it to the signal that ended its child

_SUBMITTED = re.compile(r"Job <([1-9][0-9]{0,18})>\s{1,40}is\s{1,40}submitted\s{1,40}to\b")
_NOT_SUBMITTED = "Job not submitted."
_WHY_IS_ELSEWHERE = re.compile(r"(?:Request aborted by esub\.?[ \t]{0,20})?Job not submitted\.")
_USAGE = re.compile(
    r"^[ \t]{0,20}(?:[Uu]sage: {1,8}\S{0,80}bsub\b|bsub: (?:illegal|invalid|unrecognized) option)"
)
_UNKNOWN_JOB = re.compile(
    r"^[ \t]{0,20}Job <([1-9][0-9]{0,18}(?:\[[0-9,-]{1,400}\])?)> is not found\.?[ \t\r]{0,20}$",
    re.MULTILINE,
)
_IBM = re.compile(r"(?:IBM )?(?:Spectrum|Platform) LSF\b")
_OPENLAVA = re.compile(r"(?:open|volc)lava\b", re.IGNORECASE)

_ROW = re.compile(
    r"[ \t]{0,40}([1-9][0-9]{0,18})(?:\[([0-9]{1,9})\])?"  # the id, with an index at some sites
    r"[ \t]{1,80}[^ \t]{1,256}[ \t]{1,80}([A-Z]{2,12})"  # the user, the state
    r"[ \t]{1,80}[^ \t]{1,256}[ \t]{1,80}[^ \t]{1,256}"  # the queue, the host it was submitted from
    r"([ \t]{1,200})(?=[^ \t])"
)
_SUBMIT_TIME = re.compile(
    r"[ \t][A-Z][a-z]{2}[ \t]{1,4}[0-9]{1,2}[ \t]{1,4}"
    r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?(?:[ \t]{1,4}[0-9]{4})?$"
)
_LONGEST_SUBMIT_TIME = 40
_HOST_WORD = re.compile(r"([^ \t]{1,4000})[ \t]{1,4000}(?=[^ \t])")
_EMPTY_COLUMN = 12  # blanks in a row: the column of the execution host is empty, as it is without -w
_INDEX = re.compile(r"\[([1-9][0-9]{0,8})\]\Z")
_LONGEST_INDEX = 11
_TERM = re.compile(r"\bTERM_[A-Z_]{1,40}\b")
_HOST = re.compile(r"(?:[0-9]{1,9}\*)?([^ \t:*]{1,255})")
_NO_VALUE = {"", "-"}
_LONGEST_DETAIL = 300


@dataclass(frozen=True, slots=True)
class Row:
    """What one answer says of one job.

    Attributes:
        array: the job's id, without an index.
        index: the element's, from 1; None for a job that is no array's, or none that LSF knows of: one that
            was submitted as an array and taken as a single job keeps its indices in its name.
        name: the job's name, without the element's index.
        status: where the job is.
    """

    array: str
    index: int | None
    name: str
    status: JobStatus


def read_dialect(text: str) -> Dialect | None:
    """Whose LSF this is, by what `lsid` or `bjobs -V` prints, wherever it prints it; None if it is neither's.

    The product's name begins a line. Elsewhere, it may be a cluster's.
    """
    for line in text.split("\n"):
        if _IBM.match(line.lstrip()):
            return Dialect.IBM
        if _OPENLAVA.match(line.lstrip()):
            return Dialect.OPENLAVA
    return None


def read_submission(text: str) -> str | None:
    """The id of what has been submitted, by all that bsub and a site's scripts around it have printed.

    Returns:
        None if there is none, and if there are several: some script has submitted a job besides, before or
        after, and only the job's name tells which is which. A wrong id would be followed for ever.
    """
    found = set(_SUBMITTED.findall(text))
    return found.pop() if len(found) == 1 else None


def is_refusal(text: str) -> bool:
    """Whether bsub, having failed with these words, would fail the same way another time.

    Each line counts by itself: bsub may have waited for a daemon before it was refused. A script of the site
    says in other lines why it refuses.
    """
    for line in map(str.strip, text.split("\n")):
        if _USAGE.match(line):
            return True
        if _NOT_SUBMITTED in line:
            if _WHY_IS_ELSEWHERE.fullmatch(line):
                return NOT_REFUSED.search(text) is None
            if NOT_REFUSED.search(line) is None:
                return True
    return False


def read_bjobs(text: str) -> list[Row]:
    """What `bjobs`, with -w or without, says in its plain columns, with or without a header.

    A row that does not reach to the time of its submission is passed over: its index may be missing.
    """
    rows = []
    for raw in text.split("\n"):
        line = raw.rstrip()
        head = _ROW.match(line)
        tail = _SUBMIT_TIME.search(line, max(len(line) - _LONGEST_SUBMIT_TIME, 0))
        if head is None or tail is None or tail.start() <= head.end():
            continue
        array, index, word, gap = head.groups()
        host, name = _host_and_name(line[head.end() : tail.start()].rstrip(" \t"), len(gap))
        name, suffix = split_name(name)
        status = status_of(word, node_of(host), f"bjobs says {word}: {' '.join(line.split())}")
        rows.append(Row(array, int(index) if index else suffix, name, status))
    return rows


def read_fields(text: str) -> list[Row]:
    """What IBM's `bjobs -noheader -o FIELDS` says."""
    rows = []
    for line in text.split("\n"):
        fields = line.rstrip("\r").split("^", _FIELD_COUNT - 1)
        if len(fields) != _FIELD_COUNT:
            continue
        array, index, word, code, why, host, memory, name = map(str.strip, fields)
        number = re.fullmatch(r"([1-9][0-9]{0,18})(?:\[([0-9]{1,9})\])?", array)
        if number is None or re.fullmatch(r"[A-Z]{2,12}", word) is None:
            continue
        if index in _NO_VALUE:
            index = number[2] or "0"
        if re.fullmatch(r"[0-9]{1,9}", index) is None:
            continue
        if int(index):
            name = name.removesuffix(f"[{int(index)}]")
        parts = [f"bjobs says {word}"]
        parts += [f"exit code {code}"] if code not in _NO_VALUE else []
        parts += [why] if why not in _NO_VALUE else []
        parts += [f"at most {memory} of memory"] if memory not in _NO_VALUE else []
        status = status_of(word, node_of(host), ", ".join(parts), _number(code), read_term(why))
        rows.append(Row(number[1], int(index) or None, name, status))
    return rows


def read_unknown(text: str) -> set[str]:
    """The ids, "12", "12[3]" or "12[3-5,7]", of which a command says that there are no such jobs."""
    return set(_UNKNOWN_JOB.findall(text))


def without_patience(text: str) -> str:
    """What a command wrote, without blank lines and without its asking for patience.

    If it has asked for nothing else, that stays, once: it is what there is to be said.
    """
    lines = list(filter(None, map(str.strip, text.split("\n"))))
    said = [line for line in lines if not _PATIENCE_LINE.search(line)]
    return "\n".join(said or dict.fromkeys(lines))


def status_of(
    word: str, node: str | None, detail: str, code: int | None = None, term: str | None = None
) -> JobStatus:
    """A status, by LSF's word for where a job is.

    Args:
        word: of `STATES`; another one counts as running, and is noted.
        node: where it runs or ran.
        detail: the answer in LSF's own words.
        code: the exit code that LSF gives of a job that has ended.
        term: LSF's word for why it was ended.
    """
    state = STATES.get(word)
    if state is None:
        _note_unknown(word)
        state = JobState.RUNNING
    detail = shortened(detail)
    if word == _HELD:
        return JobStatus(state, _HELD, detail=detail, can_start=False)
    if state is JobState.QUEUED:
        return JobStatus(state, detail=detail)
    if state is JobState.RUNNING:
        return JobStatus(state, node=node, detail=detail)
    if word == "DONE":
        return JobStatus(state, None, 0, node, detail)
    reason, returncode = read_code(code)
    return JobStatus(state, term or reason, returncode, node, detail, cause=TERMS.get(term or ""))


def read_code(code: int | None) -> tuple[str, int | None]:
    """LSF's exit code of a job that has failed.

    Returns:
        Its reason, "EXIT" or a signal's name, and its exit code as subprocess reports it.
    """
    if code is None or code == 0:  # that is what a job has that has not failed by itself
        return "EXIT", None
    if _SIGNALLED < code < _SIGNALLED + len(_SIGNALS):
        return read_signal(code - _SIGNALLED)
    return "EXIT", code


def read_signal(number: int) -> tuple[str, int | None]:
    """The same, of the signal that has ended a job."""
    if 0 < number < len(_SIGNALS):
        return f"SIG{_SIGNALS[number]}", -number
    return "EXIT", -number if 0 < number <= _NEWEST_SIGNAL else None


def read_term(text: str) -> str | None:
    """LSF's word for why a job was ended, if there is one in this text."""
    match = _TERM.search(text)
    return match[0] if match and match[0] != "TERM_UNKNOWN" else None


def split_name(name: str) -> tuple[str, int | None]:
    """A job's name without the element's index, and the index; only a single number is one."""
    match = _INDEX.search(name, max(len(name) - _LONGEST_INDEX, 0))
    return (name[: match.start()], int(match[1])) if match else (name, None)


def node_of(hosts: str) -> str | None:
    """The first one of the hosts that a job has: "4*a:2*b" is "a"."""
    match = _HOST.match(hosts)
    return match[1] if match and match[1] not in _NO_VALUE else None


def shortened(detail: str) -> str:
    """A detail of the length of an error message."""
    return detail if len(detail) <= _LONGEST_DETAIL else detail[: _LONGEST_DETAIL - 1] + "…"


def _host_and_name(text: str, gap: int) -> tuple[str, str]:
    """What stands after the host that a job was submitted from, `gap` blanks away: the next host may not."""
    match = _HOST_WORD.match(text)
    if match is None or (gap >= _EMPTY_COLUMN and match[1] != "-"):
        return "-", text
    return match[1], text[match.end() :]


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


@functools.cache
def _note_unknown(word: str) -> None:
    _logger.warning("LSF says of a job that it is %r, which is not known here: it counts as running", word)
