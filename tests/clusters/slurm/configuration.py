"""What a cluster's configuration files say, and how memory is limited on this machine.

The settings are there to make things happen soon: Slurm's own defaults are made for jobs of hours.
"""

from __future__ import annotations

import os
import pwd
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_CONTROLLERS = ("freezer", "memory")  # all that Slurm needs to hold a job together and to limit its memory


@dataclass(frozen=True, slots=True)
class Configuration:
    """A cluster that is to be.

    Attributes:
        directory: where all that it writes goes.
        accounting: whether there is a slurmdbd.
        nodes: the nodes' names.
        cpus: of each node, whatever the machine has.
        memory_mb: of each node, in MB.
        control_groups: whether jobs are held together and limited by control groups.
        ports: one for the controller, one for slurmdbd, one for each node.
        settings: for slurm.conf, above all others.
        group_name: of this cluster's control groups.
    """

    directory: Path
    accounting: bool
    nodes: tuple[str, ...]
    cpus: int
    memory_mb: int
    control_groups: bool
    ports: tuple[int, ...]
    settings: Mapping[str, str | int] = field(default_factory=dict)
    group_name: str = field(default_factory=lambda: f"fr-slurm-{os.urandom(6).hex()}")

    @property
    def munge_socket(self) -> Path:
        return self.directory / "munge.sock"

    @property
    def database_socket(self) -> Path:
        return self.directory / "db.sock"

    @property
    def own_control_groups(self) -> dict[str, Path]:
        """This cluster's group of each controller: all that is in them is its own."""
        if not self.control_groups:
            return {}
        return {each: _CONTROL_GROUPS / each / self.group_name for each in _CONTROLLERS}

    def write(self) -> None:
        """Write the files, and make the control groups."""
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.directory / name).mkdir()
        self._write("munge.key", os.urandom(128))
        self._write("slurm.conf", self._slurm_conf())
        self._write("gres.conf", "AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        if self.accounting:
            self._write("slurmdbd.conf", self._slurmdbd_conf())
        if self.control_groups:
            self._write("cgroup.conf", self._cgroup_conf())
            self._make_control_groups()

    def _write(self, name: str, content: str | bytes) -> None:
        path = self.directory / name
        path.touch(mode=0o600)  # slurmdbd and munged insist
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def _slurm_conf(self) -> str:
        host = socket.gethostname().split(".")[0]
        user = pwd.getpwuid(os.getuid()).pw_name
        controller, accounting, *nodes = self.ports
        scheduler = {
            "batch_sched_delay": 0,
            "sched_interval": 1,
            "bf_interval": 1,
            "bf_resolution": 1,
        }
        settings: dict[str, str | int] = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            # The time a requeued job is held for is this and a second.
            "AuthInfo": f"socket={self.munge_socket},cred_expire=5",
            "StateSaveLocation": self.directory / "state",
            "SlurmdSpoolDir": self.directory / "spool-%n",
            "SlurmctldPidFile": self.directory / "slurmctld.pid",
            "SlurmdPidFile": self.directory / "slurmd-%n.pid",
            "SlurmdParameters": "config_overrides",  # more CPUs and memory than there are
            "PropagateResourceLimits": "NONE",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "DefMemPerCPU": self.memory_mb // self.cpus,
            "MaxArraySize": 1001,
            "JobRequeue": 1,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "GresTypes": "gpu",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": ",".join(f"{name}={value}" for name, value in scheduler.items()),
            "ReturnToService": 2,
            "SlurmdTimeout": 6,
            "MessageTimeout": 5,
            "KillWait": 2,
            "CompleteWait": 0,
            "MinJobAge": 300,
            "JobAcctGatherType": "jobacct_gather/linux",
            "JobAcctGatherFrequency": "task=1",
        }
        if self.control_groups:
            settings |= {"ProctrackType": "proctrack/cgroup", "TaskPlugin": "task/cgroup"}
        else:
            settings |= {
                "ProctrackType": "proctrack/linuxproc",
                "TaskPlugin": "task/none",
                "JobAcctGatherParams": "OverMemoryKill",  # looks once in each JobAcctGatherFrequency
            }
        if self.accounting:
            settings |= {
                "AccountingStorageType": "accounting_storage/slurmdbd",
                "AccountingStorageHost": "127.0.0.1",
                "AccountingStoragePort": accounting,
                "AccountingStoragePass": self.munge_socket,  # AuthInfo does not count for slurmdbd
            }
        settings |= self.settings
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            f"RealMemory={self.memory_mb} Gres=gpu:2 State=UNKNOWN"
            for node, port in zip(self.nodes, nodes, strict=True)
        ]
        last = self.nodes[-1]
        lines += [
            "PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=OFF",
            "PartitionName=main Default=YES",
            "PartitionName=other",
            f"PartitionName=low Nodes={last} PreemptMode=REQUEUE",
            f"PartitionName=high Nodes={last} PriorityTier=10",
            "PartitionName=closed State=INACTIVE",
        ]
        return "\n".join(lines) + "\n"

    def _slurmdbd_conf(self) -> str:
        settings = {
            "DbdHost": "localhost",
            "DbdAddr": "127.0.0.1",
            "DbdPort": self.ports[1],
            "SlurmUser": pwd.getpwuid(os.getuid()).pw_name,
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.munge_socket}",
            "PidFile": self.directory / "slurmdbd.pid",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",  # and MYSQL_UNIX_PORT says where
            "StorageUser": "root",
            "CommitDelay": 1,
        }
        return "".join(f"{name}={value}\n" for name, value in settings.items())

    def _cgroup_conf(self) -> str:
        lines = [
            "CgroupPlugin=cgroup/v1",
            "CgroupAutomount=no",
            f"CgroupMountpoint={self.directory / 'cgroup'}",
            "ConstrainRAMSpace=yes",
        ]
        if (_CONTROL_GROUPS / "memory" / "memory.memsw.limit_in_bytes").exists():
            lines += ["ConstrainSwapSpace=yes", "AllowedSwapSpace=0"]  # or a job is swapped out and lives
        return "\n".join(lines) + "\n"

    def _make_control_groups(self) -> None:
        # Slurm's groups are called after its nodes, and another cluster may have a node of that name. So what
        # Slurm takes for the place where control groups are mounted is a group of this cluster's own.
        (self.directory / "cgroup").mkdir()
        for controller, own in self.own_control_groups.items():
            own.mkdir()
            (self.directory / "cgroup" / controller).symlink_to(own)


def find_control_groups() -> bool:
    """Whether there are control groups of version 1 that we may write to."""
    for controller in _CONTROLLERS:
        try:
            probe = Path(tempfile.mkdtemp(prefix="fr-probe-", dir=_CONTROL_GROUPS / controller))
        except OSError:
            return False
        try:
            if not (probe / "tasks").exists():  # which only version 1 has
                return False
        finally:
            probe.rmdir()
    return True


def free_ports(count: int) -> tuple[int, ...]:
    """Ports that nothing listens on, and that no outgoing connection will be given."""
    span = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    first = int.from_bytes(os.urandom(2)) % max(int(span[0]) - 12_000, 1) + 10_000
    found: list[int] = []
    for port in range(first, 65_536):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return tuple(found)
    raise RuntimeError(f"there are no {count} free ports from {first} on")
