"""The cluster: its daemons, what can happen to them, and the commands that ask it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Self

from tests.clusters.directory import own_directory
from tests.clusters.slurm.configuration import Configuration, find_control_groups, free_ports
from tests.clusters.slurm.keeper import Daemon, Keeper, remove_control_groups

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
_ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd")
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where daemons are, whoever asks
_SYSTEM_TABLES = Path("/usr/share/mysql/mysql_system_tables.sql")
_LONGEST_DIRECTORY = 60  # a unix socket's name has 107 characters, and Slurm's are up to 40 below it
_DEADLINE_S = 60


class MissingPrograms(Exception):
    """There is no Slurm on this machine, or not all of it."""


class SlurmFailed(Exception):
    """A command or a daemon of Slurm failed."""


class SlurmCluster:
    """A Slurm cluster on this machine, with nodes `n1`, `n2`, …

    It is started and stopped as a context manager does, and leaves nothing behind, even if the process that
    started it is killed. Partitions, all of them without a time limit:

    - `main`: all nodes; for jobs that do not ask for another.
    - `other`: all nodes.
    - `low` and `high`: the last node. Jobs in `high` preempt those in `low`, which are requeued.
    - `closed`: refuses jobs.

    Each node says that it has two GPUs. A job has `memory_mb / cpus` for each of its CPUs if it does not say.

    Args:
        directory: for all its files: must not exist yet, or be empty; removed at the end. None: a new one.
        accounting: whether `sacct` works: takes a MariaDB and a slurmdbd.
        nodes: how many.
        cpus: of each node, whatever the machine has.
        memory_mb: of each node, in MB.
        limits_memory_with: "cgroup": a job that takes more than it asked for is ended by the kernel, as
            OUT_OF_MEMORY. "polling": Slurm looks once in a second, and the job is FAILED by signal 9. None:
            the first where the machine has control groups (version 1) for us, the second elsewhere.
        settings: for slurm.conf, above this cluster's own: `{"MinJobAge": 10}`.

    Attributes:
        directory: where all its files are. `*.log` there is what the daemons say.
        nodes: the nodes' names.
        limits_memory_with: which of the two it is.
        daemons: those that were started: "munged", "slurmctld", a node's slurmd under the node's name, and
            "mariadbd" and "slurmdbd" with accounting.

    Raises:
        MissingPrograms: which ones, and what installs them.
    """

    directory: Path

    def __init__(
        self,
        directory: Path | None = None,
        *,
        accounting: bool = False,
        nodes: int = 4,
        cpus: int = 4,
        memory_mb: int = 2000,
        limits_memory_with: Literal["cgroup", "polling"] | None = None,
        settings: Mapping[str, str | int] | None = None,
    ) -> None:
        find_programs(accounting)
        self._wanted_directory = directory
        self.nodes = tuple(f"n{number}" for number in range(1, nodes + 1))
        self._accounting = accounting
        self._cpus = cpus
        self._memory_mb = memory_mb
        self._settings = dict(settings or {})
        self.limits_memory_with = limits_memory_with or ("cgroup" if find_control_groups() else "polling")
        self.daemons: dict[str, Daemon] = {}
        self._keeper: Keeper | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Its life.

    def start(self) -> None:
        """Start it, and wait until all nodes are up."""
        directory = own_directory(self._wanted_directory, prefix="fr-slurm-", longest=_LONGEST_DIRECTORY)
        self.directory = directory
        self._configuration = Configuration(
            directory=directory,
            accounting=self._accounting,
            nodes=self.nodes,
            cpus=self._cpus,
            memory_mb=self._memory_mb,
            control_groups=self.limits_memory_with == "cgroup",
            ports=free_ports(2 + len(self.nodes)),
            settings=self._settings,
        )
        self._keeper = Keeper(directory, self.control_groups)
        try:
            self._configuration.write()
            self._start_munge()
            if self._accounting:
                self._start_accounting()
            self.start_controller()
            for node in self.nodes:
                self._start_node(node)
            self.wait_for_nodes()
        except BaseException:  # whatever it is, a Ctrl-C as well: nobody else has what runs by now
            self.stop()
            raise

    def stop(self) -> None:
        """End it and whatever its jobs left behind, and remove its directory."""
        if self._keeper:
            keeper, self._keeper = self._keeper, None
            self.daemons.clear()
            keeper.end()

    def _start(self, name: str, *command: str, **environment: str) -> None:
        assert self._keeper is not None, "the cluster was not started"
        if name in self.daemons and self.daemons[name].is_running():
            raise RuntimeError(f"{name} is running already: a second one would end the first")
        environment = {"PATH": _PATH, "LC_ALL": "C.UTF-8", **self.env, **environment}
        self.daemons[name] = self._keeper.start(command, self._log(name), environment)

    def _start_munge(self) -> None:
        socket = self._configuration.munge_socket
        files = {
            "key-file": self.directory / "munge.key",
            "socket": socket,
            "pid-file": self.directory / "munged.pid",
            "seed-file": self.directory / "munge.seed",
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        self._wait_until("munged", socket.exists)

    def _start_accounting(self) -> None:
        data, socket = self.directory / "db", self._configuration.database_socket
        (data / "mysql").mkdir(parents=True)
        program = [
            "mariadbd",
            "--no-defaults",
            f"--datadir={data}",
            "--skip-networking",
            "--skip-log-bin",
            "--performance-schema=off",
            "--innodb-buffer-pool-size=16M",
            "--innodb-log-file-size=8M",
            "--innodb-flush-log-at-trx-commit=0",  # the machine itself does not go away
        ]
        if os.getuid() == 0:
            program.append("--user=root")
        # What mariadb-install-db does, without users: they do not count here.
        with self._log("mariadbd").open("ab") as log:
            subprocess.run(
                [*program, "--bootstrap"],
                input=b"use mysql;\n" + _SYSTEM_TABLES.read_bytes(),
                stdout=log,
                stderr=log,
                env={"PATH": _PATH},
                timeout=_DEADLINE_S,
                check=True,
            )
        pid_file = self.directory / "mariadbd.pid"
        self._start(
            "mariadbd", *program, "--skip-grant-tables", f"--socket={socket}", f"--pid-file={pid_file}"
        )
        self._wait_until("mariadbd", socket.exists)
        self._start("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=str(socket))
        self._wait_until("slurmdbd", lambda: self._answers("sacctmgr", "-n", "list", "cluster"))

    def start_controller(self) -> None:
        """Start the controller, with what it knew before, and wait until it answers.

        If nodes are there already it hears from them after some 4 seconds: `wait_for_nodes`.
        """
        self._start("slurmctld", "slurmctld", "-D")
        self._wait_until("slurmctld", lambda: self._answers("scontrol", "ping"))

    def stop_controller(self, *, crash: bool = False) -> None:
        """End the controller. Nodes and jobs go on without it.

        Args:
            crash: with SIGKILL. What happened in the last five seconds may be lost: it writes it down later.
        """
        daemon = self.daemons["slurmctld"]
        if crash:
            daemon.crash()
        else:
            daemon.send(signal.SIGTERM)
            daemon.send(signal.SIGCONT)  # if it was paused
            daemon.wait()

    def pause_controller(self) -> None:
        """Make the controller hang: commands connect to it and wait."""
        self.daemons["slurmctld"].send(signal.SIGSTOP)

    def resume_controller(self) -> None:
        """Let it go on."""
        self.daemons["slurmctld"].send(signal.SIGCONT)

    def crash_node(self, node: str, *, noticed: bool = False) -> None:
        """End a node with all that runs on it, as if it lost its power.

        Args:
            node: its name.
            noticed: the controller is told. It notices by itself as well, after some 18 seconds.
        """
        own = [group / f"slurm_{node}" for group in self.control_groups]
        self.daemons[node].crash(own)
        for group in own:
            remove_control_groups(group)
        if noticed:
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crashed")

    def restart_node(self, node: str) -> None:
        """Start a node that crashed, and wait until it is up."""
        self._start_node(node)
        self.wait_for_nodes(node)

    def _start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def nodes_up(self) -> list[str]:
        """The nodes that can take jobs, or have them, as far as Slurm knows."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").stdout.split("\n")
        states = dict(line.split() for line in lines if line)
        return [
            node for node, state in states.items() if state in {"idle", "mixed", "allocated", "completing"}
        ]

    def wait_for_nodes(self, *nodes: str) -> None:
        """Until these nodes are up; all, if none is named."""
        wanted = set(nodes or self.nodes)
        self._wait_until("slurmctld", lambda: wanted <= set(self.nodes_up()))

    def reset(self) -> None:
        """Make it again what it was after the start: all is up, and there are no jobs."""
        self.resume_controller()
        if not self.daemons["slurmctld"].is_running():
            self.start_controller()
        for node in self.nodes:
            if not self.daemons[node].is_running():
                self._start_node(node)
        self.wait_for_nodes()
        self.cancel_all()

    # Its commands.

    @property
    def control_groups(self) -> list[Path]:
        """All that its jobs are in, if memory is limited with them."""
        return list(self._configuration.own_control_groups.values())

    @property
    def env(self) -> dict[str, str]:
        """What the environment must have for Slurm's commands to find it."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def run(
        self,
        *command: str | Path,
        input: str | None = None,
        check: bool = True,
        timeout: float = 30,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, with this cluster in its environment.

        Raises:
            SlurmFailed: it failed, and `check` says that it may not.
        """
        answer = subprocess.run(
            [str(each) for each in command],
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **self.env},
            cwd=cwd,
            check=False,
        )
        if check and answer.returncode:
            shown = " ".join(map(str, command))
            raise SlurmFailed(f"{shown}: exit code {answer.returncode}\n{answer.stdout}{answer.stderr}")
        return answer

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> int:
        """Submit a batch job, lines of sh: its id. Its output is lost unless `options` say where it goes."""
        command = ["sbatch", "--parsable", "--output=/dev/null", *options]
        return int(self.run(*command, input=f"#!/bin/sh\n{script}\n", cwd=cwd).stdout.split(";")[0])

    def show(self, job_id: int) -> dict[str, str]:
        """What `scontrol show job` says of a job: {"JobState": "RUNNING", …}. Empty if it knows none."""
        answer = self.run("scontrol", "-o", "show", "job", str(job_id), check=False)
        first = answer.stdout.split("\n")[0]
        return dict(word.split("=", 1) for word in first.split() if "=" in word)

    def wait_for(self, job_id: int, *states: str, timeout: float = _DEADLINE_S) -> dict[str, str]:
        """Until a job is in one of these states ("RUNNING"): what `show` says then."""
        self._wait_until(f"job {job_id}", lambda: self.show(job_id).get("JobState") in states, timeout)
        return self.show(job_id)

    def account(self, job_id: int) -> list[dict[str, str]]:
        """What `sacct` says of a job and its steps, and of its earlier runs if it was requeued."""
        fields = ["JobID", "State", "ExitCode", "DerivedExitCode", "MaxRSS"]
        command = ["sacct", "-D", "-n", "-P", "-j", str(job_id), "-o", ",".join(fields)]
        rows = self.run(*command).stdout.splitlines()
        return [dict(zip(fields, row.split("|"), strict=True)) for row in rows]

    def set_end_time(self, job_id: int, seconds: int) -> None:
        """Let a running job's time limit be so far away: limits themselves count in minutes.

        The controller looks at time limits twice in a minute: it can take 30 s more.
        """
        self.run("scontrol", "update", f"JobId={job_id}", f"EndTime=now+{seconds}")

    def cancel_all(self) -> None:
        """Cancel all jobs, and wait until nothing is left of them."""
        if jobs := self.run("squeue", "-h", "-o", "%A").stdout.split():
            self.run("scancel", *dict.fromkeys(jobs))
        self.wait_until_idle()

    def wait_until_idle(self, timeout: float = _DEADLINE_S) -> None:
        """Until no job is waiting, running or completing."""
        self._wait_until("squeue", lambda: not self.run("squeue", "-h").stdout, timeout)

    def _answers(self, *command: str) -> bool:
        return self.run(*command, check=False).returncode == 0

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _wait_until(self, what: str, condition: Callable[[], bool], timeout: float = _DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            for name, daemon in self.daemons.items():
                if name == what and not daemon.is_running():
                    raise SlurmFailed(f"{name} ended:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {what} for {timeout:.0f} s\n{self._tail()}")
            time.sleep(0.05)

    def _tail(self) -> str:
        """The ends of all logs."""
        found = []
        for log in sorted(self.directory.glob("*.log")):
            if lines := log.read_text(errors="replace").splitlines()[-12:]:
                found += [f"--- {log.name}", *lines]
        return "\n".join(found)


def find_programs(accounting: bool) -> None:
    """Make sure that all is installed.

    Raises:
        MissingPrograms: which ones, and what installs them.
    """
    needed = [*_PROGRAMS, *(_ACCOUNTING_PROGRAMS if accounting else ())]
    if missing := [program for program in needed if not shutil.which(program, path=_PATH)]:
        raise MissingPrograms(f"Slurm is not installed, {', '.join(missing)}: .ci/install-slurm does that")
