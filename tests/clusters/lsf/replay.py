"""Put recorded exchanges to a cluster again, one after the other, and make the answers comparable.

The recordings were made on one host with 8 slots, by a user whose name and home were given other names later:
`ada`, and `/home/ada`. Lines were cut before that. So what answers here has a user's name and a home
of the original lengths, and both are replaced in what it says.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.clusters.lsf.cluster import LsfCluster

# Standard output without what varies, standard error, and the exit code: None if it was cut off.
Answer = tuple[str, str, int | None]

_TRANSCRIPT = Path(__file__).with_name("transcripts") / "openlava.jsonl"
_USER = "adalove"  # 7 letters
_HOME = "fr-lsf-home-"  # and 8 more: 25 with "/tmp/"
_QUERIES = {"bjobs", "bhist", "cat"}  # where the recording waited for what it wanted to show
_DEADLINE_S = 20.0
_REPLY_TIMEOUT_S = 1.0
# Where the recording cut off what hung: two tries had failed and a third one waited, or one had failed.
_CUT_OFF_S = {89: 2.5 * _REPLY_TIMEOUT_S, 93: 1.0}

# Jobs that were submitted between the exchanges 29 and 30: the commands are in the exchanges that follow.
_UNRECORDED = (
    "exit 3",
    "exit 137",
    "sh -c 'kill -9 $$'; exit $?",
    "kill -9 $$",
    "nosuchcommand",
    "cd /nosuch || exit 98",
)
# `sleep 3` goes on until it is told to end: a busy machine takes longer for what was done meanwhile.
_SLEEP = """\
#!/bin/sh
[ "$1" = 3 ] || exec /bin/sleep "$1"
until [ -e "$HOME/go" ]; do /bin/sleep 0.05; done
"""

# What differs from one time to the next.
_VARIES: tuple[tuple[str, str], ...] = (
    (r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d( \d{4})?", "DATE"),
    (r"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d$", "DATE"),  # at the end of a row
    (r"\b\d{10}\.(\d+\.\d+)", r"TIME.\1"),  # in names of files
    (r"\(Pid \d+\)", "(Pid N)"),
    (r"Pid <\d+\n +\d+>", "Pid <N>"),
    (r"PGID: \d+;  PIDs: [\d ]+", "PGID: N;  PIDs: N "),
    (r"LS_JOBPID=\d+", "LS_JOBPID=N"),
    (r"LSB_UNIXGROUP=.*", "LSB_UNIXGROUP=GROUP"),
    (r"\d+\.\d seconds", "N seconds"),
    (r"CPU time   : +\d+\.\d\d", "CPU time   : N"),
    (r"\d+ Mbytes", "N Mbytes"),
    # It is there if memory was looked at while the job ran, which is a matter of luck.
    (r"\n MEMORY USAGE:\n MAX MEM: .*\n", ""),
    (r"(?m)(?<=TOTAL\n)  [\d ]+$", "TIMES"),
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A command, and what was answered.

    Attributes:
        number: from 1.
        returncode: None if it was cut off.
    """

    number: int
    note: str
    argv: tuple[str, ...]
    stdin: str
    env: dict[str, str]
    stdout: str
    stderr: str
    returncode: int | None

    def __str__(self) -> str:
        return f"{self.number}-{self.argv[0]}: {self.note}"

    @property
    def answer(self) -> Answer:
        return comparable(self.stdout), self.stderr, self.returncode


def exchanges() -> list[Exchange]:
    """All that were recorded, in order."""
    found = []
    for number, line in enumerate(_TRANSCRIPT.read_text().splitlines(), 1):
        read = json.loads(line)
        found.append(
            Exchange(
                number=number,
                note=read["note"],
                argv=tuple(read["argv"]),
                stdin=read.get("stdin") or "",
                env=read.get("env") or {},
                stdout=read["stdout"],
                stderr=read["stderr"],
                returncode=None if read["returncode"] == "timeout" else read["returncode"],
            )
        )
    return found


def comparable(text: str) -> str:
    """A text without what varies."""
    for pattern, replacement in _VARIES:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


class Replay:
    """A cluster as the recorded one was, which is asked again."""

    def __init__(self, cluster: LsfCluster, home: Path) -> None:
        self._cluster = cluster
        self._home = home
        programs = home / "programs"
        programs.mkdir()
        sleep = programs / "sleep"
        sleep.write_text(_SLEEP)
        sleep.chmod(0o700)
        self._env = {
            "PATH": f"{cluster.bin}:{programs}:{os.defpath}",
            "LSF_ENVDIR": str(cluster.directory),
            "HOME": str(home),
        }
        # What the recording did before an exchange, by its number.
        self._before: dict[int, Callable[[], object]] = {
            24: (home / "go").touch,
            30: self._submit_unrecorded,
            62: lambda: cluster.wait_for(19, "RUN"),
            88: cluster.hang,
            90: cluster.resume,
            91: lambda: cluster.crash("all"),
        }

    def answer(self, exchange: Exchange) -> Answer:
        """What is answered now; a query is put until the recorded answer comes, or no longer may."""
        self._before.get(exchange.number, lambda: None)()
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            answer = self._run(exchange)
            is_query = exchange.argv[0] in _QUERIES and not exchange.env
            if answer == exchange.answer or not is_query or time.monotonic() > deadline:
                return answer
            time.sleep(0.05)  # nothing tells when a job is as far

    def _run(self, exchange: Exchange) -> Answer:
        returncode: int | None
        with subprocess.Popen(
            [word.replace("/home/ada", str(self._home)) for word in exchange.argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self._env, **exchange.env},
            cwd=self._home,
        ) as process:
            try:
                limit = _CUT_OFF_S.get(exchange.number, _DEADLINE_S)
                stdout, stderr = process.communicate(exchange.stdin, timeout=limit)
                returncode = process.returncode
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
                returncode = None
        return comparable(self._neutral(stdout)), stderr, returncode

    def _neutral(self, text: str) -> str:
        directory = str(self._cluster.directory)
        names = {
            f"{directory}/spool/.": "/scratch/.",
            f"{directory}/spool/": "/home/ada/.lsbatch/",
            f"LSF_ENVDIR={directory}\n": "LSF_ENVDIR=/opt/lsf/etc\n",
            f"{directory}/": "/opt/lsf/",
            str(self._home): "/home/ada",
            _USER: "ada",
        }
        for name, neutral in names.items():
            text = text.replace(name, neutral)
        return text

    def _submit_unrecorded(self) -> None:
        for command in _UNRECORDED:
            subprocess.run(
                ["bsub", "-o", "/dev/null", "-J", "k"],
                input=f"{command}\n",
                text=True,
                stdout=subprocess.DEVNULL,
                env=self._env,
                cwd=self._home,
                timeout=_DEADLINE_S,
                check=True,
            )


@contextmanager
def replay() -> Iterator[Replay]:
    """A cluster for all exchanges in order."""
    with (
        tempfile.TemporaryDirectory(prefix=_HOME, dir="/tmp") as home,
        LsfCluster(
            dialect="openlava",
            hosts=["vm"],
            slots=8,
            master="vm",
            user=_USER,
            minute_s=0.5,
            resume_s=600.0,  # a resumed job is killed before it goes on
            reply_timeout_s=_REPLY_TIMEOUT_S,
            retry_s=600.0,
        ) as cluster,
    ):
        yield Replay(cluster, Path(home))
