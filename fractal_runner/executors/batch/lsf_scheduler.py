"""LSF, by its commands: what both of its families understand, and more where IBM's answers.

What its commands say is read in `lsf_words`, what it is given to run is made in `lsf_submission`.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fractal_runner.errors import did_you_mean
from fractal_runner.executors.batch import lsf_words as words
from fractal_runner.executors.batch.commands import (
    CommandAnswer,
    Commands,
    Run,
    parse_python,
    parse_timeout,
    parse_words,
)
from fractal_runner.executors.batch.limits import SiteLimits
from fractal_runner.executors.batch.lsf_limits import ask_limits, read_reasons, read_unit
from fractal_runner.executors.batch.lsf_long import read_long
from fractal_runner.executors.batch.lsf_options import OPTIONS
from fractal_runner.executors.batch.lsf_submission import (
    SETTINGS,
    UNITS,
    MemoryPer,
    MemoryTerms,
    MemoryUnit,
    bsub_words,
    line_of,
    script_of,
    write_script,
)
from fractal_runner.executors.batch.options import flag
from fractal_runner.executors.batch.scheduler import (
    ArrayRequest,
    Cause,
    JobState,
    JobStatus,
    PartlyExplainedError,
    Scheduler,
    SchedulerError,
    SubmissionRefusedError,
)
from fractal_runner.executors.preview import Handover
from fractal_runner.quantities import optional, parse_count

_MAX_ARRAY = 1000  # MAX_JOB_ARRAY_SIZE of both families, where a site has not set it
_ARRAYS_PER_COMMAND = 500
_WORDS_PER_COMMAND = 200
_SPANS_PER_WORD = 20
_HINT = (
    "is this a login node of LSF? Read its profile there (`. <top>/conf/profile.lsf`), or say by "
    "`bsub_cmd`, `bjobs_cmd`, `bkill_cmd` and `command_prefix` where its commands are."
)
# They change what commands print, for people.
_UNSET = ("BSUB_QUIET", "BSUB_QUIET2", "BSUB_STDERR", "LSB_BJOBS_FORMAT", "LSB_DISPLAY_YEAR")
_ELEMENT = re.compile(r"(\d{1,18})\[(\d{1,9})\]", re.ASCII)
_NOT_AN_ARRAY = "NOT_AN_ARRAY"


class LsfScheduler(Scheduler):
    """A cluster that is run by LSF: IBM's (Spectrum LSF 10.1), or one of the openlava family.

    Args, the first ones being defaults of what a call may say for itself in `extra`:
        resource_requirements: `"select[type==any]"`, or several such texts. They are put together with what
            is asked for memory, and with `span[hosts=1]`, where they say nothing of these.
        bsub_extra: further words for bsub, `["-app", "chem"]`. A call's own come after them.
        setup: lines of shell that each job begins with.
        teardown: lines of shell that it ends with, unless it is killed.
        env: variables for each job.

    Args that no call says:
        memory_unit: what LSF counts memory in here, "KB", "MB", …; by default what `LSF_UNIT_FOR_LIMITS`
            says in `$LSF_ENVDIR/lsf.conf`, else IBM's KB for limits and MB for reservations, and MB for the
            others.
        memory_per: whether the site takes what a job reserves as of a "job", of each "host" of it, or of
            each "task" (`RESOURCE_RESERVE_PER_TASK`). The limit, `-M`, is the job's.
        rerunnable: whether LSF may start a job again whose host was lost. It may still run there.
        python: the interpreter on the hosts; this one's path by default.
        command_prefix: words in front of each command, `["ssh", "login1"]`, or one text with them.
        bsub_cmd, bjobs_cmd, bkill_cmd: LSF's commands, by name or path, with words of their own if need be.
            `lsid` and `bhist` are looked for where `bjobs_cmd` is.
        command_timeout: seconds after which a command is ended.
        max_array: how many jobs an array may have: not more than the site's MAX_JOB_ARRAY_SIZE. LSF of the
            open families does not refuse larger ones; it runs something else.
        run: what runs commands, as `subprocess.run` does.

    Memory is rounded up to whole units, time to whole minutes.

    Raises:
        TypeError, ValueError: if an argument is not what it should be.
    """

    name = "LSF"
    done_is_proof = False  # a job that was killed may read DONE
    ignores = frozenset({"constraint", "extra_lines", "gres", "nodes", "ntasks_per_node"})

    def __init__(
        self,
        *,
        resource_requirements: str | Sequence[str] = (),
        bsub_extra: Sequence[str] = (),
        setup: Sequence[str] = (),
        teardown: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        memory_unit: MemoryUnit | None = None,
        memory_per: MemoryPer = "host",
        rerunnable: bool = False,
        python: str | None = None,
        command_prefix: str | Sequence[str] = (),
        bsub_cmd: str | Sequence[str] = "bsub",
        bjobs_cmd: str | Sequence[str] = "bjobs",
        bkill_cmd: str | Sequence[str] = "bkill",
        command_timeout: int | float | str = 60.0,
        max_array: int | None = None,
        run: Run = subprocess.run,
    ) -> None:
        self._defaults = self.check(
            {
                "resource_requirements": resource_requirements,
                "bsub_extra": bsub_extra,
                "setup": setup,
                "teardown": teardown,
                "env": env,
            }
        )
        self._unit: str | None = None if memory_unit is None else _chosen("memory_unit", memory_unit, UNITS)
        self._per: MemoryPer = _chosen("memory_per", memory_per, ("job", "host", "task"))
        self._rerunnable = flag(rerunnable, "rerunnable")
        self._python = parse_python(python)
        self._commands = Commands(
            prefix=parse_words("command_prefix", command_prefix),
            timeout=parse_timeout(command_timeout),
            run=run,
            hint=_HINT,
            settings=SETTINGS,
            unset=_UNSET,
        )
        self._bsub = parse_words("bsub_cmd", bsub_cmd, least=1)
        self._bjobs = parse_words("bjobs_cmd", bjobs_cmd, least=1)
        self._bkill = parse_words("bkill_cmd", bkill_cmd, least=1)
        self._max_array = optional("max_array", parse_count, max_array) or _MAX_ARRAY
        self._asking = threading.Lock()  # guards the next one
        self._dialect: words.Dialect | None = None
        self._has_fields = True  # until IBM's bjobs does not know of them
        # The names of the arrays that surely had these ids in this process's time. Set in single steps.
        self._known: dict[str, str] = {}

    @property
    def max_array(self) -> int:
        return self._max_array

    @property
    def dialect(self) -> words.Dialect | None:
        """Which family's LSF it is; None as long as it does not answer."""
        with self._asking:
            if self._dialect is None:
                self._dialect = self._find_dialect()
            return self._dialect

    def check(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        return OPTIONS.parse(extra)

    def submit(self, request: ArrayRequest) -> Sequence[str]:
        made = self.preview(request)
        try:
            write_script(request, made.script)
        except OSError as error:
            raise SchedulerError(f"{request.directory} cannot be written to: {error}") from error
        answer = self._commands(*made.command, stdin=made.stdin)
        if array := words.read_submission(answer.text):  # whatever else there is, or its exit code
            return self._ids(array, request)
        if answer.is_missing:  # nothing was asked, and waiting does not bring it
            raise SubmissionRefusedError(f"{answer.program} was not found: {_HINT}")
        text = words.without_patience(answer.text) or f"{answer.program} says nothing"
        if words.is_refusal(answer.text):
            raise SubmissionRefusedError(f"LSF has refused array {request.name}: {text}")
        raise SchedulerError(f"It is not known whether LSF has array {request.name}: {text}")

    def preview(self, request: ArrayRequest) -> Handover:
        options = OPTIONS.merge(self._defaults, request.extra)
        dialect = self._dialect_for(request, options)
        memory = self._memory(dialect)
        said = bsub_words(request, options, dialect=dialect, memory=memory, rerunnable=self._rerunnable)
        script = script_of(request, options, python=self._python)
        return Handover(script, (*self._bsub, *said), line_of(request))

    def find(self, request: ArrayRequest) -> Sequence[Sequence[str]]:
        # Not by name: whether an array has that of its elements differs.
        rows, answer = self._ask("-a")
        arrays = {row.array for row in rows if _is_of(row, request.name)}
        says_none = bool(rows) or words.NO_JOBS.search(answer.text)
        is_whole = not words.BUSY.search(answer.text) and request.name not in answer.stdout
        if not arrays and not (says_none and is_whole):
            raise _no_answer(answer)
        return [self._ids(array, request) for array in sorted(arrays, key=int)]

    def states(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        found: dict[str, JobStatus] = {}
        arrays = list(dict.fromkeys(map(_array_of, jobs)))
        for some in _chunks(arrays, _ARRAYS_PER_COMMAND):
            chosen = set(some)
            asked = {job: name for job, name in jobs.items() if _array_of(job) in chosen}
            found |= self._states(some, asked)
        # Elements of which nothing is said may have been forgotten, each by itself: that is said if one asks.
        missing = {job: name for job, name in jobs.items() if job not in found}
        for some in _chunks(list(_spans(missing)), _WORDS_PER_COMMAND):
            with suppress(SchedulerError):  # others are known
                found |= self._states(some, missing)
        return found

    def explain(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        found = self._long(self._bjobs, jobs)
        # bhist reads files, and knows who has killed a job, and jobs that bjobs has forgotten.
        unclear = {job: name for job, name in jobs.items() if _is_unclear(found.get(job))}
        if unclear:
            try:
                told = self._long(self._beside_bjobs("bhist"), unclear)
            except SchedulerError as error:
                raise PartlyExplainedError(str(error), found) from error
            found |= {
                job: status
                for job, status in told.items()
                if job not in found or status.cause not in (None, Cause.NODE)
            }
        return found

    def cancel(self, jobs: Mapping[str, str]) -> None:
        refusals = []
        chosen = list(_spans(self._without_others(jobs)))
        for some in _chunks(chosen, _WORDS_PER_COMMAND):  # never none: bkill would take the last job
            answer = self._commands(*self._bkill, *some)
            said = words.without_patience(answer.stderr).splitlines()
            if answer.returncode and not (said and all(map(words.NOTHING_TO_KILL.search, said))):
                refusals.append(answer)
        for answer in refusals:  # the others are ended, whatever one of them says
            answer.expect_success()

    def limits(self, *, queue: str | None = None, account: str | None = None) -> SiteLimits:
        return ask_limits(
            self._commands,
            self._beside_bjobs,
            dialect=self.dialect,
            stated=self._unit,
            in_file=self._unit_of_site(),
        )

    def reasons(self, jobs: Mapping[str, str]) -> Mapping[str, str]:
        said = {job: read_reasons(self._commands(*self._bjobs, "-l", job).stdout) for job in jobs}
        return {job: why for job, why in said.items() if why is not None}

    def _dialect_for(self, request: ArrayRequest, options: Mapping[str, Any]) -> words.Dialect:
        """Which LSF an array is submitted to; what both understand, if it asks for nothing in particular.

        Raises:
            SubmissionRefusedError: if there is none here.
            SchedulerError: if that has to be known first.
        """
        dialect = self.dialect
        if dialect is not None:
            return dialect
        has_memory = request.memory is not None and self._unit is None
        if has_memory or request.gpus or options.get("needs_gpu"):
            answer = self._commands(*self._bjobs, "-V")
            if answer.is_missing:
                raise SubmissionRefusedError(f"{answer.program} was not found: {_HINT}")
            raise SchedulerError(
                f"{answer.program} does not say which LSF it is, and so neither in what units it counts "
                "memory, nor how it has GPUs asked for: "
                f"{words.without_patience(answer.text) or 'it says nothing'}"
            )
        return words.Dialect.OPENLAVA

    def _find_dialect(self) -> words.Dialect | None:
        for command in (self._beside_bjobs("lsid"), (*self._bjobs, "-V")):
            try:
                answer = self._commands(*command)
            except SchedulerError:  # its daemons are down; the other command does without
                continue
            if dialect := words.read_dialect(answer.text):
                return dialect
        return None

    def _beside_bjobs(self, program: str) -> tuple[str, ...]:
        """A command of LSF's that has no setting of its own."""
        for place, word in enumerate(self._bjobs):
            if Path(word).name == "bjobs":
                return *self._bjobs[:place], str(Path(word).with_name(program))
        return (program,)

    def _memory(self, dialect: words.Dialect) -> MemoryTerms:
        """How the site counts memory."""
        unit = self._unit or self._unit_of_site()
        limit_unit = "KB" if dialect is words.Dialect.IBM else "MB"
        return MemoryTerms(UNITS[unit or limit_unit], UNITS[unit or "MB"], self._per)

    def _unit_of_site(self) -> str | None:
        directory = os.environ.get("LSF_ENVDIR")
        if directory is None or self._commands.prefix:  # then LSF is not here
            return None
        try:
            return read_unit((Path(directory) / "lsf.conf").read_text(errors="replace"))
        except OSError:
            return None

    def _ids(self, array: str, request: ArrayRequest) -> list[str]:
        self._known[array] = request.name
        return [f"{array}[{index}]" for index in range(1, request.count + 1)]

    def _ask(self, *said: str) -> tuple[list[words.Row], CommandAnswer]:
        """What bjobs says. Its exit code says nothing: sites and versions differ in it."""
        if self._has_fields and self.dialect is words.Dialect.IBM:
            answer = self._commands(*self._bjobs, "-noheader", "-o", words.FIELDS, *said)
            if not words.USAGE.search(answer.stderr):
                return words.read_fields(answer.stdout), self._there(answer)
            self._has_fields = False  # it is older than they are
        answer = self._commands(*self._bjobs, "-w", *said)
        return words.read_bjobs(answer.stdout), self._there(answer)

    @staticmethod
    def _there(answer: CommandAnswer) -> CommandAnswer:
        """An answer of a program that there is."""
        if answer.is_missing:
            answer.expect_success()
        return answer

    def _states(self, said: Sequence[str], jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """What bjobs says of these jobs, if it is asked in these words."""
        rows, answer = self._ask(*said)
        unknown = words.read_unknown(answer.text)
        has_none = not rows and words.NO_JOBS.search(answer.text)
        if not (rows or unknown or has_none):
            raise _no_answer(answer)
        by_id = {f"{row.array}[{row.index}]": row for row in rows if row.index is not None}
        plain = {row.array: row for row in rows if row.index is None}
        names = {_array_of(job): name for job, name in jobs.items()}
        others = {row.array: row.name for row in rows if not _is_of(row, names.get(row.array, row.name))}
        found = {}
        misread: set[str] = set()
        for job in jobs:
            array = _array_of(job)
            if array in others:
                self._known.pop(array, None)
                found[job] = JobStatus(JobState.LOST, detail=f"LSF has given its id to {others[array]!r}")
            elif (row := by_id.get(job)) is not None:
                self._known[array] = names[array]
                found[job] = row.status
            elif (row := plain.get(array)) is not None:
                found[job] = _not_an_array(row)
                misread.add(array)
            elif has_none or array in unknown or job in unknown:
                found[job] = JobStatus(JobState.LOST, detail="LSF does not know it")
        if misread:
            with suppress(SchedulerError):  # it does nothing but wait for its turn
                self._commands(*self._bkill, *misread)
        return found

    def _long(self, command: Sequence[str], jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """What a command tells of jobs at length; nothing of those of which it does not."""
        found = {}
        for some in _chunks(list(_spans(jobs)), _WORDS_PER_COMMAND):
            answer = self._commands(*command, "-l", *some)
            if answer.is_missing and command != self._bjobs:  # sites may do without bhist
                return {}
            rows = read_long(self._there(answer).stdout)
            if not (rows or words.read_unknown(answer.text) or words.NO_JOBS.search(answer.text)):
                raise _no_answer(answer)
            for row in rows:
                job = f"{row.array}[{row.index}]"
                if row.name == jobs.get(job):
                    found[job] = row.status
        return found

    def _without_others(self, jobs: Mapping[str, str]) -> Mapping[str, str]:
        """Without jobs of arrays whose ids are others' by now."""
        unsure = {job: name for job, name in jobs.items() if self._known.get(_array_of(job)) != name}
        if not unsure:
            return jobs
        states = self.states(unsure)
        return {
            job: name
            for job, name in jobs.items()
            if job not in states or states[job].state is not JobState.LOST
        }


def _chosen(name: str, value: Any, known: Collection[str]) -> Any:
    if value in known:
        return value
    # Units are all in capitals: whoever writes "mb" means one of them.
    word = str(value).upper() if all(map(str.isupper, known)) else str(value)
    near = did_you_mean(word, known)
    hint = f": {near}" if near.startswith("did") else ""
    raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}{hint}")


def _array_of(job: str) -> str:
    return job.partition("[")[0]


def _is_of(row: words.Row, name: str) -> bool:
    """Whether it is one of this array, or the array as one plain job."""
    return row.name == name or row.name.startswith(f"{name}[")


def _not_an_array(row: words.Row) -> JobStatus:
    detail = (
        f"LSF has taken the array as one plain job, {row.name!r}: it is larger than the site's "
        "MAX_JOB_ARRAY_SIZE; say by `max_array` what that is"
    )
    return JobStatus(JobState.ENDED, _NOT_AN_ARRAY, detail=detail, cause=Cause.REFUSED)


def _is_unclear(status: JobStatus | None) -> bool:
    """Whether bhist may know more.

    Of jobs that bjobs has forgotten, of those that a signal has ended, and of those without an exit code: of
    a lost host's, as LSF has it, and of those that somebody has removed by force.
    """
    if status is None:
        return True
    is_open = status.cause is Cause.NODE or (status.cause is None and status.reason is not None)
    return is_open and (status.returncode is None or status.returncode < 0)


def _no_answer(answer: CommandAnswer) -> SchedulerError:
    said = words.without_patience(answer.text) or "nothing at all"
    return SchedulerError(f"{answer.program} gave no answer, but said: {said}")


def _spans(jobs: Collection[str]) -> Iterator[str]:
    """Jobs in the words of bkill and bjobs: "12[1-4,7]"."""
    by_array: dict[str, list[int]] = {}
    for job in jobs:
        if match := _ELEMENT.fullmatch(job):
            by_array.setdefault(match[1], []).append(int(match[2]))
    for array, indices in by_array.items():
        spans: list[list[int]] = []
        for index in sorted(indices):
            if spans and spans[-1][1] == index - 1:
                spans[-1][1] = index
            else:
                spans.append([index, index])
        texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
        for some in _chunks(texts, _SPANS_PER_WORD):
            yield f"{array}[{','.join(some)}]"


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))
