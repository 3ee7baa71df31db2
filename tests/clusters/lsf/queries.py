"""bjobs and bhist: which jobs are asked for, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.clusters.lsf.answers import HEADER
from tests.clusters.lsf.commands import Answer, Call
from tests.clusters.lsf.fields import BadField, Format, Names, as_json, as_text, read_format
from tests.clusters.lsf.jobs import ENDED, STARTED, WAITING, Job, State
from tests.clusters.lsf.options import read_id
from tests.clusters.lsf.scheduler import Scheduler

_LINE = "-" * 78 + "\n"
_FLAGS = {"w", "l", "UF", "a", "d", "p", "s", "r", "A", "json", "X", "hms", "aff", "sum"}
_VALUES = {"J", "q", "u", "m", "P", "N", "o", "g", "app", "n", "S", "D", "C", "t"}
_IBM_ONLY = {"noheader", "X", "hms", "aff", "sum", "g", "app"}
# bjobs(1): which states these options select, of jobs that were not named.
_SELECT: dict[str, tuple[State, ...]] = {
    "a": tuple(State),
    "d": ENDED,
    "p": (State.PEND,),
    "r": STARTED,
    "s": (State.PSUSP, State.USUSP, State.SSUSP),
}
_DEFAULT_COLUMNS = "jobid stat"


@dataclass(slots=True)
class _Query:
    """What was asked for."""

    options: dict[str, str] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)


class _Usage(Exception):
    """The call is not one."""


class Queries:
    """The two of them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def bjobs(self, call: Call) -> Answer:
        scheduler = self._scheduler
        try:
            query = self._read(call)
            form = self._format(query, call)
        except _Usage as usage:
            return Answer(stderr=str(usage), returncode=255)
        except BadField as bad:
            return Answer(stderr=str(bad), returncode=99)
        if empty := scheduler.faults.strikes("bjobs_empty", scheduler.now()):
            return Answer(HEADER if empty["header"] else "")
        found, answer = self._find(query)
        known = [each for each in found if not isinstance(each, str)]
        unknown = [each for each in found if isinstance(each, str)]
        names = Names(scheduler.settings.user, scheduler.settings.master)
        if "json" in query.options and form is not None:
            answer.stdout = as_json(found, form, scheduler.texts, names, scheduler.dialect)
            if not scheduler.dialect.is_ibm:
                answer.returncode = 0  # the document says it
            return answer
        answer.stderr += "".join(f"Job <{each}> is not found\n" for each in unknown)
        header = "noheader" not in query.options
        if not known:
            return answer
        if form is not None:
            answer.stdout = as_text(known, form, scheduler.texts, names, header=header)
        elif "l" in query.options or "UF" in query.options:
            answer.stdout = _LINE.join(scheduler.texts.long(job, state) for job, state in known)
        else:
            blank = bool(scheduler.faults.strikes("shifted_columns", scheduler.now()))
            wide = "w" in query.options
            rows = [scheduler.texts.row(job, state, wide=wide, blank=blank) for job, state in known]
            answer.stdout = (HEADER if header else "") + "".join(rows)
        return answer

    def bhist(self, call: Call) -> Answer:
        scheduler = self._scheduler
        query = self._read(call)
        now = scheduler.now()
        found: list[Job] = []
        for word in query.ids:
            job_id, indices = read_id(word) or (0, None)
            elements = scheduler.history.get(job_id, {})
            found += [job for index, job in elements.items() if indices is None or index in indices]
        if not query.ids:
            name = query.options.get("J")
            found = [
                job
                for elements in scheduler.history.values()
                for job in elements.values()
                if (name is None and job.state not in ENDED) or job.submission.name == name
            ]
        if (hidden := scheduler.faults.strikes("forget", now)) and hidden["history"]:
            found = [job for job in found if job.state not in ENDED]
        if not found:
            return Answer("No matching job found\n", returncode=255)
        if "l" in query.options:
            return Answer(_LINE.join(scheduler.texts.history(job, now) for job in found))
        return Answer(scheduler.texts.summary(found, now))

    def _read(self, call: Call) -> _Query:
        dialect = self._scheduler.dialect
        query = _Query()
        words = iter(call.argv)
        for word in words:
            name = word[1:]
            if not word.startswith("-"):
                query.ids.append(word)
            elif name in _IBM_ONLY and not dialect.is_ibm:
                raise _Usage(f"{call.program}: invalid option -- '{name[0]}'\n{dialect.bjobs_usage}")
            elif name in _VALUES:
                query.options[name] = next(words, "")
            elif name in _FLAGS or name == "noheader":
                query.options[name] = ""
            elif name and set(name) <= _FLAGS:  # "-aw"
                query.options |= dict.fromkeys(name, "")
            else:
                raise _Usage(f"{call.program}: invalid option -- '{name[:1]}'\n{dialect.bjobs_usage}")
        if "noheader" in query.options and ("json" in query.options or "l" in query.options):
            raise _Usage(f"{call.program}: -noheader cannot be combined with -json or -l\n")
        return query

    def _format(self, query: _Query, call: Call) -> Format | None:
        dialect = self._scheduler.dialect
        text = query.options.get("o")
        if text is None and dialect.is_ibm and not {"l", "UF", "A", "json"} & query.options.keys():
            text = call.env.get("LSB_BJOBS_FORMAT") or None
        if text is None and "json" in query.options:
            text = _DEFAULT_COLUMNS
        return None if text is None else read_format(text, dialect)

    def _find(self, query: _Query) -> tuple[list[tuple[Job, State] | str], Answer]:
        """The jobs asked for with the states that they are said to be in, and the ids that are not known."""
        scheduler, now = self._scheduler, self._scheduler.now()
        faults = scheduler.faults
        forgets = faults.strikes("forget", now)
        veiled = faults.strikes("unknown", now)
        answer = Answer()

        def is_told(job: Job) -> bool:
            return not (forgets and job.state in ENDED)

        def state(job: Job) -> State:
            hidden = veiled and job.state in STARTED and (veiled["jobs"] is None or job.id in veiled["jobs"])
            return State.UNKWN if hidden else job.state

        found: list[tuple[Job, State] | str] = []
        for word in query.ids:
            named = read_id(word)
            if named is None:
                answer.stderr += f"{word}: Illegal job ID.\n"
                answer.returncode = 255
                continue
            job_id, indices = named
            elements = scheduler.jobs.get(job_id, {})
            chosen = [
                job
                for index, job in elements.items()
                if (indices is None or index in indices) and is_told(job)
            ]
            if chosen:
                found += [(job, state(job)) for job in chosen]
            else:
                found.append(word)
                answer.returncode = 255
        if query.ids:
            return found, answer
        states: set[State] = set()
        for option, selected in _SELECT.items():
            if option in query.options:
                states |= set(selected)
        states = states or {*WAITING, *STARTED}
        name = query.options.get("J")
        jobs = list(scheduler.all_jobs()) if name is None else scheduler.named(name)
        chosen = [
            job
            for job in jobs
            if job.state in states
            and is_told(job)
            and query.options.get("q", job.submission.queue) == job.submission.queue
            and query.options.get("P", job.submission.project) == job.submission.project
            and query.options.get("m") in (None, job.host)
            and query.options.get("u", "all") in ("all", scheduler.settings.user)
        ]
        if not chosen:
            by_name = name is not None
            everything = "a" in query.options
            answer.stderr = (
                f"Job <{name}> is not found\n"
                if by_name
                else ("No job found\n" if everything else "No unfinished job found\n")
            )
            answer.returncode = scheduler.dialect.nothing_by_name if by_name else 255
        found += [(job, state(job)) for job in chosen]
        return found, answer
