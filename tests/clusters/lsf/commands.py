"""What each executable asks of the scheduler, and what it is to print."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.clusters.lsf.jobs import ENDED, STARTED, WAITING, Job, State
from tests.clusters.lsf.options import Refused, read_id, read_submission
from tests.clusters.lsf.scheduler import Scheduler


@dataclass(slots=True)
class Answer:
    """What a client prints, and how it ends.

    Attributes:
        signal: it kills itself with that, before it says anything.
        delay_s: until it hears of it.
    """

    stdout: str = ""
    stderr: str = ""
    returncode: int = 0
    signal: int | None = None
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """What a client was called with."""

    program: str
    argv: list[str]
    stdin: str
    env: dict[str, str]
    cwd: str


class Commands:
    """All of them but bjobs and bhist, which only ask: see `queries.py`."""

    def __init__(self, scheduler: Scheduler, queries: dict[str, Callable[[Call], Answer]]) -> None:
        self._scheduler = scheduler
        self._commands: dict[str, Callable[[Call], Answer]] = {
            **queries,
            "bsub": self._bsub,
            "bkill": self._bkill,
            "brequeue": self._brequeue,
            "bstop": lambda call: self._each(call, self._stop),
            "bresume": lambda call: self._each(call, self._resume),
            "lsid": self._lsid,
        }

    def answer(self, request: dict[str, Any]) -> Answer:
        """Do what a client asks for."""
        call = Call(
            request["program"],
            request["argv"],
            request["stdin"].decode("utf-8", "surrogateescape"),
            request["env"],
            request["cwd"],
        )
        if "-V" in call.argv:
            return self._version(call)
        faults, now = self._scheduler.faults, self._scheduler.now()
        if limited := faults.strikes("query_limit", now, call.program):
            answer = Answer(stderr=limited["text"], returncode=255)
        else:
            answer = self._commands[call.program](call)
        if answer.returncode == 0 and (busy := faults.strikes("please_wait", now)):
            answer.stderr = busy["text"] + answer.stderr
        if faults.strikes("wrong_exit_codes", now, call.program):
            answer.returncode = 0 if answer.returncode else 255
        if slow := faults.strikes("slow", now, call.program):
            answer.delay_s = slow["seconds"]
        self._scheduler.loop.call_soon(self._scheduler.tick)
        return answer

    def _version(self, call: Call) -> Answer:
        dialect = self._scheduler.dialect
        if dialect.version_on_stderr:
            return Answer(stderr=dialect.version)
        return Answer(stdout="" if call.program == "bsub" else dialect.version)

    def _lsid(self, call: Call) -> Answer:
        settings = self._scheduler.settings
        return Answer(
            f"{self._scheduler.dialect.version}\n"
            f"My cluster name is {settings.cluster}\nMy master name is {settings.master}\n"
        )

    def _bsub(self, call: Call) -> Answer:
        scheduler, now = self._scheduler, self._scheduler.now()
        faults = scheduler.faults
        big_array = scheduler.dialect.big_array_is_one_job or bool(faults.strikes("array_as_job", now))
        try:
            submission = read_submission(
                scheduler.dialect, call.argv, call.stdin, call.env, call.cwd, big_array_is_one_job=big_array
            )
            if refusal := faults.strikes("refuse", now):
                raise Refused(refusal["text"], whole=True)
            job_id = scheduler.submit(submission)
        except Refused as refused:
            return Answer(stderr=refused.text, returncode=255)
        queue = "default queue" if submission.default_queue else "queue"
        reply = f"Job <{job_id}> is submitted to {queue} <{submission.queue}>.\n"
        answer = Answer("" if "BSUB_QUIET" in call.env else reply)
        if noise := faults.strikes("noise", now):
            answer.stdout = noise["before"] + answer.stdout + noise["after"]
            answer.stderr = noise["stderr"]
        if lost := faults.strikes("lost_reply", now):
            answer = Answer(returncode=255, signal=signal.SIGKILL if lost["how"] == "killed" else None)
        return answer

    def _bkill(self, call: Call) -> Answer:
        number: int | None = None
        force, name = False, None
        ids: list[str] = []
        words = iter(call.argv)
        for word in words:
            if word == "-s":
                number = _signal(next(words, "KILL"))
            elif word in ("-J", "-q", "-u", "-m", "-g", "-app"):
                given = next(words, "")
                name = given if word == "-J" else name
            elif word == "-r":
                force = True
            elif word.startswith("-") and _signal(word[1:]):
                number = _signal(word[1:])
            elif not word.startswith("-"):
                ids.append(word)
        if name is not None and ids in ([], ["0"]):
            unfinished = [job for job in self._scheduler.named(name) if job.state not in ENDED]
            ids = [job.label for job in (unfinished if ids else unfinished[-1:])]
            if not ids:
                return Answer(stderr="No matching job found\n", returncode=255)
        if not ids:  # the latest job
            unfinished = [job for job in self._scheduler.all_jobs() if job.state not in ENDED]
            ids = [unfinished[-1].label] if unfinished else []
            if not ids:
                return Answer(stderr="No unfinished job found\n", returncode=255)
        return self._each(
            Call(call.program, ids, "", call.env, call.cwd),
            lambda job: self._kill(job, number, force),
            whole_array=None if number or not self._scheduler.dialect.array_kill_in_progress else self._all,
        )

    def _all(self, elements: list[Job]) -> str | None:
        """Kill what is left of an array, and say what is wrong with that."""
        left = [job for job in elements if job.state not in ENDED]
        if not left:
            return "Job has already finished"
        for job in left:
            self._kill(job, None, False)
        return "Operation is in progress"

    def _kill(self, job: Job, number: int | None, force: bool) -> tuple[bool, str]:
        scheduler, now = self._scheduler, self._scheduler.now()
        if job.state in ENDED:
            return False, "Job has already finished"
        user = scheduler.settings.user
        if number is not None and job.state in STARTED:
            job.tell(now, f"Signal <{_signal_name(number)}> requested by user or administrator <{user}>;")
            scheduler.signal(job, number)
            return True, "is being signaled"
        job.tell(now, f"Signal <KILL> requested by user or administrator <{user}>;")
        if force:
            scheduler.signal(job, signal.SIGKILL)
            scheduler.forget_run(job)
            job.reason = "TERM_FORCE_OWNER"
            scheduler.close(job, State.EXIT, now)
            scheduler.texts.tell_end(job, now)
        else:
            scheduler.kill(job, "TERM_OWNER", now)
        return True, "is being terminated"

    def _brequeue(self, call: Call) -> Answer:
        return self._each(call, self._requeue)

    def _requeue(self, job: Job) -> tuple[bool, str]:
        now = self._scheduler.now()
        if job.state in ENDED:
            return False, "Job has already finished"
        if job.state in WAITING:
            return False, "Job has not started yet"
        user = self._scheduler.settings.user
        job.tell(now, f"Signal <REQUEUE_RUN> requested by user or administrator <{user}>;")
        self._scheduler.requeue(job, now)
        return True, "is being requeued"

    def _stop(self, job: Job) -> tuple[bool, str]:
        if job.state in ENDED:
            return False, "Job has already finished"
        self._scheduler.stop(job, self._scheduler.now())
        return True, "is being stopped"

    def _resume(self, job: Job) -> tuple[bool, str]:
        if job.state in ENDED:
            return False, "Job has already finished"
        self._scheduler.resume(job, self._scheduler.now())
        return True, "is being resumed"

    def _each(
        self,
        call: Call,
        act: Callable[[Job], tuple[bool, str]],
        whole_array: Callable[[list[Job]], str | None] | None = None,
    ) -> Answer:
        """Do something to all jobs that were named, and say what came of it."""
        answer = Answer()

        def fail(text: str) -> None:
            answer.stderr += text + "\n"
            answer.returncode = 255

        words = [word for word in call.argv if not word.startswith("-")]
        if not words:
            fail("Job ID must be specified.")
        if words == ["0"]:
            words = [job.label for job in self._scheduler.all_jobs() if job.state not in ENDED]
            if not words:
                fail("No unfinished job found")
        for word in words:
            named = read_id(word)
            if named is None:
                fail(f"{word}: Illegal job ID.")
                continue
            job_id, indices = named
            elements = self._scheduler.jobs.get(job_id, {})
            is_array = 0 not in elements
            if not elements or (indices and is_array and not set(indices) & elements.keys()):
                fail(f"Job <{word}>: No matching job found")
            elif indices:
                for index in indices:
                    if index not in elements:
                        fail(f"Job <{job_id}[{index}]>: No matching job found")
                        continue
                    done, text = act(elements[index])
                    if done:
                        answer.stdout += f"Job <{job_id}[{index}]> {text}\n"
                    else:
                        fail(f"Job <{job_id}[{index}]>: {text}")
            elif is_array and whole_array is not None:
                fail(f"Job <{job_id}>: {whole_array(list(elements.values()))}")
            else:
                results = [act(job) for job in elements.values()]
                texts = [text for worked, text in results if worked]
                if texts:
                    answer.stdout += f"Job <{job_id}> {texts[0]}\n"
                else:
                    fail(f"Job <{job_id}>: {results[0][1]}")
        return answer


def _signal(text: str) -> int | None:
    if text.isdecimal():
        return int(text)
    try:
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"].value
    except KeyError:
        return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return str(number)
