"""The cluster, as tests have it: its life, its commands, and what can happen to it."""

from __future__ import annotations

import marshal
import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from tests.clusters.directory import own_directory
from tests.clusters.lsf import client
from tests.clusters.lsf.dialects import DIALECTS
from tests.clusters.lsf.seen import ClientCall, JobSeen, dangerous_kills, read_calls
from tests.clusters.lsf.settings import Settings

if TYPE_CHECKING:
    from tests.clusters.slurm.keeper import Daemon, Keeper

PROGRAMS = ("bsub", "bjobs", "bkill", "bhist", "brequeue", "bstop", "bresume", "lsid")
_CONTROL = "control"
_TOP = Path(__file__).resolve().parents[3]
_LONGEST_DIRECTORY = 80  # a unix socket's name has 107 characters
_DEADLINE_S = 30
_SERVE = """\
import sys
sys.path.insert(0, {top!r})
from tests.clusters.lsf.server import main
from tests.clusters.lsf.settings import Settings
main(Settings(**{settings!r}))
"""
_STUB = """\
#!{interpreter} -IS
import sys
sys.path.insert(0, {here!r})
from client import main
sys.exit(main())
"""


class LsfFailed(Exception):
    """A command failed, or the cluster itself."""


class LsfCluster:
    """An LSF on this machine: executables that tests call, and a scheduler that really runs jobs.

    An emulation: see the README beside it. It is started and stopped as a context manager does, and leaves
    nothing behind, even if the process that started it is killed. Queues: `normal` (the default), `short`,
    `requeue` (jobs that leave with 99 run again) and `closed` (refuses jobs).

    Args:
        directory: for all its files: must not exist yet, or be empty; removed at the end. None: a new one.
        dialect: whose words it uses: "openlava" for that family, "ibm" for IBM Spectrum LSF 10.1.
        hosts: how many, or their names.
        slots: of each host.
        master: the name of the host that clients are on.
        cluster: its name.
        user: the name that jobs have as their user; None: who runs this.
        minute_s: how long a minute of `-W` is.
        kill_interval_s: between the signals INT, TERM and KILL.
        kill_after_s: at its run limit a job gets SIGUSR2, and so much later KILL; in IBM's dialect alone.
        clean_period_s: bjobs forgets what ended so long ago.
        dispatch_s: how long a job waits at least.
        requeue_s: how long a requeued job waits at least.
        resume_s: how long a resumed job reads SSUSP.
        sample_s: how often memory is looked at.
        reply_timeout_s: a client waits so long for an answer before it tries again.
        retry_s: between the tries of a client that finds no scheduler.
        next_id: the first job's id.
        max_id: after which they begin at 1 again.

    Attributes:
        directory: where all its files are. `mbatchd.log` there is what the scheduler says.
        bin: where the executables are.
        hosts: the hosts' names.
        dialect: which.
    """

    directory: Path

    def __init__(
        self,
        directory: Path | None = None,
        *,
        dialect: Literal["openlava", "ibm"] | str = "openlava",
        hosts: int | Sequence[str] = 4,
        slots: int = 4,
        master: str = "login",
        cluster: str = "labcl",
        user: str | None = None,
        minute_s: float = 60.0,
        kill_interval_s: float = 10.0,
        kill_after_s: float = 600.0,
        clean_period_s: float = 3600.0,
        dispatch_s: float = 0.0,
        requeue_s: float = 0.0,
        resume_s: float = 0.1,
        sample_s: float = 0.25,
        reply_timeout_s: float = 10.0,
        retry_s: float = 0.5,
        next_id: int = 1,
        max_id: int = 999_999,
    ) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"no dialect {dialect!r}: there are {', '.join(DIALECTS)}")
        self._wanted_directory = directory
        self.dialect = dialect
        self.hosts = (
            tuple(f"h{number}" for number in range(1, hosts + 1)) if isinstance(hosts, int) else tuple(hosts)
        )
        self._wanted = {
            "dialect": dialect,
            "hosts": self.hosts,
            "slots": slots,
            "master": master,
            "cluster": cluster,
            "user": user or _user(),
            "interpreter": str(Path(sys.executable).resolve()),
            "minute_s": minute_s,
            "kill_interval_s": kill_interval_s,
            "kill_after_s": kill_after_s,
            "clean_period_s": clean_period_s,
            "dispatch_s": dispatch_s,
            "requeue_s": requeue_s,
            "resume_s": resume_s,
            "sample_s": sample_s,
            "reply_timeout_s": reply_timeout_s,
            "retry_s": retry_s,
            "next_id": next_id,
            "max_id": max_id,
        }
        self._violations: list[str] = []  # those before the last reset
        self._excused = 0  # how many of those after it were forgotten
        self._keeper: Keeper | None = None
        self._daemon: Daemon | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Its life.

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # Here, as the scheduler imports this package as well, in an interpreter without psutil.
        from tests.clusters.slurm.keeper import Keeper

        directory = own_directory(self._wanted_directory, prefix="fr-lsf-", longest=_LONGEST_DIRECTORY)
        self.directory = directory
        self.settings = Settings(directory=str(directory), **self._wanted)
        self._keeper = Keeper(directory, [])
        try:
            self._write_programs()
            self._start_scheduler()
        except BaseException:  # whatever it is, a Ctrl-C as well: nobody else has what runs by now
            self.stop()
            raise

    def _write_programs(self) -> None:
        self.bin.mkdir()
        stub = _STUB.format(interpreter=self.settings.interpreter, here=str(Path(__file__).parent))
        for program in PROGRAMS:
            path = self.bin / program
            path.write_text(stub)
            path.chmod(0o700)

    def _start_scheduler(self) -> None:
        assert self._keeper is not None
        program = _SERVE.format(top=str(_TOP), settings=asdict(self.settings))
        self._daemon = self._keeper.start(
            [self.settings.interpreter, "-IS", "-c", program],
            self.directory / "mbatchd.log",
            {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
        )
        self._wait_until((self.directory / _CONTROL).exists, "the scheduler")

    def stop(self) -> None:
        """End it and whatever its jobs left behind, and remove its directory."""
        if self._keeper:
            keeper, self._keeper = self._keeper, None
            keeper.end()

    def reset(self) -> None:
        """Make it again what it was after the start: no jobs, no faults, no calls, all is up."""
        self._violations += dangerous_kills(self.calls())[self._excused :]
        self._excused = 0
        self._order("reset")
        (self.directory / client.CALLS).unlink(missing_ok=True)

    # Its commands.

    @property
    def bin(self) -> Path:
        return self.directory / "bin"

    @property
    def env(self) -> dict[str, str]:
        """What the environment must have for the executables to be found, and to find the cluster."""
        path = os.environ.get("PATH", os.defpath)
        return {"PATH": f"{self.bin}:{path}", "LSF_ENVDIR": str(self.directory)}

    def run(
        self,
        *command: str | Path,
        input: str | None = None,
        check: bool = True,
        timeout: float = 30,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, with this cluster in its environment.

        Args:
            env: beside that of this process and the cluster's.

        Raises:
            LsfFailed: it failed, and `check` says that it may not.
        """
        answer = subprocess.run(
            [str(each) for each in command],
            **({"input": input} if input is not None else {"stdin": subprocess.DEVNULL}),
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **self.env, **(env or {})},
            cwd=cwd,
            check=False,
        )
        if check and answer.returncode:
            shown = " ".join(map(str, command))
            raise LsfFailed(f"{shown}: exit code {answer.returncode}\n{answer.stdout}{answer.stderr}")
        return answer

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> int:
        """Submit a job, lines of sh: its id. Its output is lost unless `options` say where it goes."""
        said = self.run("bsub", "-o", os.devnull, *options, input=f"{script}\n", cwd=cwd).stdout
        for line in said.splitlines():
            if " is submitted to " in line:
                return int(line.split("<")[1].split(">")[0])
        raise LsfFailed(f"bsub said nothing of a job: {said!r}")

    def wait_for(self, job_id: int, *states: str, timeout: float = _DEADLINE_S) -> list[JobSeen]:
        """Until all elements of a job are in one of these states ("RUN"): the elements."""
        self._wait_until(
            lambda: {job.state for job in self.jobs(job_id)} <= set(states),
            f"job {job_id} to be {' or '.join(states)}",
            timeout,
        )
        return self.jobs(job_id)

    # What happened.

    def jobs(self, job_id: int | None = None) -> list[JobSeen]:
        """What the scheduler knows, of all jobs or of one; its elements by index."""
        found = [JobSeen(**each) for each in self._order("jobs")]
        return [job for job in found if job_id in (None, job.id)]

    def calls(self, program: str | None = None) -> list[ClientCall]:
        """All calls of the executables since the start or the last reset, or those of one."""
        calls = read_calls(self.directory / client.CALLS)
        return [call for call in calls if program in (None, call.program)]

    def violations(self) -> list[str]:
        """What no client may ever do: end jobs without saying which. A reset does not change it."""
        failures = [f"the emulation failed:\n{log}"] if (log := self._log()) else []
        return [*self._violations, *failures, *dangerous_kills(self.calls())[self._excused :]]

    def forget_violations(self) -> None:
        """As if there had been none."""
        self._excused = len(dangerous_kills(self.calls()))
        if self._log():
            os.truncate(self.directory / "mbatchd.log", 0)
        self._violations = []

    # What can happen to it.

    def switch(self, fault: str, **settings: object) -> None:
        """Have something go wrong: `faults.FAULTS` has the names and settings.

        Args:
            settings: `count`, how often (None, the default: until it is cleared); `duration_s`, for how
                long; and the fault's own.
        """
        self._order("switch", fault=fault, settings=settings)

    def configure(self, **settings: float) -> None:
        """Change times until the next reset, by the names that they have as arguments: `minute_s`, …"""
        self._order("configure", **settings)

    def clear_faults(self) -> None:
        """Switch all faults off."""
        self._order("clear_faults")

    def lose_host(
        self,
        host: str,
        *,
        processes: Literal["killed", "live"] = "killed",
        noticed_s: float = 0.0,
        given_up_s: float | None = 1.0,
    ) -> None:
        """A host goes away.

        Args:
            host: its name.
            processes: whether they go with it, or live on where nobody reaches them.
            noticed_s: when its jobs begin to read UNKWN.
            given_up_s: how long they do, before they read EXIT without a code, or PEND if they were submitted
                with -r. None: until `give_up_host` or `restore_host`.
        """
        self._order(
            "lose_host",
            host=host,
            processes_live=processes == "live",
            noticed_s=noticed_s,
            given_up_s=given_up_s,
        )

    def give_up_host(self, host: str) -> None:
        """Give up a lost host's jobs now."""
        self._order("give_up_host", host=host)

    def restore_host(self, host: str) -> None:
        """It is back. Jobs that live read RUN again; what is left of those given up is killed."""
        self._order("restore_host", host=host)

    def crash(self, what: Literal["mbatchd", "all"] = "mbatchd") -> None:
        """Nobody answers clients, until `resume`: mbatchd is down, or "all" with the LIM. Jobs go on."""
        self._order("crash", what=what)

    def hang(self) -> None:
        """Clients get no answer, until `resume`; then what they asked for is done, though they be gone."""
        self._order("hang")

    def resume(self) -> None:
        """End what `crash` or `hang` began."""
        self._order("resume")

    def set_next_id(self, next_id: int, max_id: int = 999_999) -> None:
        """The next job's id, and the last one before they begin at 1 again. Those in use are passed over."""
        self._order("set_ids", next_id=next_id, max_id=max_id)

    def _order(self, order: str, **with_: Any) -> Any:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_DEADLINE_S)
                connection.connect(str(self.directory / _CONTROL))
                connection.sendall(marshal.dumps({"order": order, "with": with_}))
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                while more := connection.recv(65536):
                    answer += more
        except OSError as error:
            raise LsfFailed(f"{order}: the scheduler: {error}\n{self._log()}") from error
        if not answer:
            raise LsfFailed(f"{order}: the scheduler did not answer\n{self._log()}")
        reply = marshal.loads(answer)
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["value"]

    def _wait_until(self, condition: Callable[[], bool], what: str, timeout: float = _DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if self._daemon is not None and not self._daemon.is_running():
                raise LsfFailed(f"the scheduler ended:\n{self._log()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {what} for {timeout:.0f} s\n{self._log()}")
            time.sleep(0.02)  # nothing tells

    def _log(self) -> str:
        try:
            return "\n".join((self.directory / "mbatchd.log").read_text(errors="replace").splitlines()[-20:])
        except FileNotFoundError:
            return ""


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
