"""The files of a job: what runs, what it says, and the report around it that LSF makes of that at the end."""

from __future__ import annotations

import contextlib
import grp
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tests.clusters.lsf.jobs import Job
from tests.clusters.lsf.options import expand
from tests.clusters.lsf.settings import Settings

if TYPE_CHECKING:
    from tests.clusters.lsf.answers import Texts


@dataclass(frozen=True, slots=True)
class Opened:
    """Where a job writes to."""

    output: IO[bytes]
    errors: IO[bytes]


class JobFiles:
    """All jobs' files."""

    def __init__(self, settings: Settings, texts: Texts) -> None:
        self._settings = settings
        self._texts = texts
        self._spool = Path(settings.directory, "spool")
        self._spool.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def open(self, job: Job, now: float) -> Iterator[Opened]:
        """Write down what runs, and open what it writes to."""
        submission = job.submission
        job.file = str(self._spool / f"{int(now)}.{job.id}{f'.{job.index}' if job.index else ''}")
        script = submission.script
        if not script.startswith("#!"):
            script = f"#!/bin/sh\n{script}"
        Path(job.file).unlink(missing_ok=True)  # an earlier run of it may still be reading it
        with Path(job.file).open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(script)
            os.fchmod(file.fileno(), 0o700)
        with contextlib.ExitStack() as stack:
            kept = submission.output not in (None, os.devnull)
            output = stack.enter_context(Path(f"{job.file}.out" if kept else os.devnull).open("wb"))
            errors = output
            if submission.errors is not None:
                # Opened at once and without a report.
                with contextlib.suppress(OSError):
                    errors = stack.enter_context(Path(self._name(job, submission.errors)).open("ab"))
            yield Opened(output, errors)

    def environment(self, job: Job, host: str, now: float) -> dict[str, str]:
        """What a job's environment has: the submission's, and what LSF adds."""
        settings, submission = self._settings, job.submission
        top = settings.directory
        slash = "" if settings.dialect == "ibm" else "/"
        added = {
            "LSB_ACCT_FILE": f"{top}/spool/.{int(now)}.{job.id}.{job.index}.acct",
            "LSB_CHKFILENAME": job.file,
            "LSB_EXIT_PRE_ABORT": "99",
            "LSB_HOSTS": " ".join([host] * submission.slots),
            "LSB_JOBEXIT_STAT": "0",
            "LSB_JOBFILENAME": job.file,
            "LSB_JOBID": str(job.id),
            "LSB_JOBINDEX": str(job.index),
            "LSB_JOBNAME": job.name,
            "LSB_MCPU_HOSTS": f"{host} {submission.slots} ",
            "LSB_QUEUE": submission.queue,
            "LSB_SUB_HOST": settings.master,
            "LSB_TRAPSIGS": "trap # 15 10 12 2 1",
            "LSB_UNIXGROUP": _group(),
            "LSFUSER": settings.user,
            "LSF_BINDIR": f"{top}/bin",
            "LSF_EAUTH_CLIENT": "user",
            "LSF_EAUTH_SERVER": f"mbatchd@{settings.cluster}",
            "LSF_ENVDIR": top,
            "LSF_LIBDIR": f"{top}/lib",
            "LSF_SERVERDIR": f"{top}/sbin",
            "LS_EXEC_T": "START",
            "LS_SUBCWD": submission.cwd.rstrip("/") + slash,
        }
        if submission.indices:
            added["LSB_JOBINDEX_END"] = str(submission.indices[-1])
            added["LSB_JOBINDEX_STEP"] = "1"
        if submission.output is not None:
            added["LSB_OUTPUTFILE"] = self._name(job, submission.output)
        if submission.errors is not None:
            added["LSB_ERRORFILE"] = self._name(job, submission.errors)
        if settings.dialect == "ibm":
            added["LSB_BATCH_JID"] = job.label
            added["LSB_DJOB_NUMPROC"] = str(submission.slots)
        return {**submission.env, **added}

    def report(self, job: Job, now: float) -> None:
        """Write the file that `-o` names: the report, and the output in it."""
        Path(job.file).unlink(missing_ok=True)
        if job.submission.output in (None, os.devnull):
            return
        kept = Path(f"{job.file}.out")
        try:
            said = kept.read_bytes()
            kept.unlink()
        except FileNotFoundError:
            said = b""
        text = self._texts.report(job, now).encode("utf-8", "surrogateescape")
        mode = "wb" if job.submission.overwrites else "ab"
        # Where it cannot be written LSF mails it, and the job is as it is.
        with contextlib.suppress(OSError), Path(self._name(job, job.submission.output)).open(mode) as file:
            file.write(text + said)

    @staticmethod
    def _name(job: Job, path: str) -> str:
        return expand(path, job.id, job.index, job.submission.cwd)


def _group() -> str:
    try:
        return grp.getgrgid(os.getgid()).gr_name
    except KeyError:
        return str(os.getgid())
