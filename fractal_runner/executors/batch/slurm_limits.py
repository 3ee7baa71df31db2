"""What SLURM allows: its configuration, its partitions, and what accounting grants this user."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fractal_runner.executors.batch import slurm_words as words
from fractal_runner.executors.batch.commands import CommandAnswer, Commands, cleaned
from fractal_runner.executors.batch.limits import Bound, Queue, SiteLimits, least
from fractal_runner.executors.batch.scheduler import SchedulerError
from fractal_runner.quantities import parse_time

CONFIG = ("scontrol", "show", "config")
_PARTITIONS = ("scontrol", "show", "partition", "--oneliner", "--all")
_FACTS = ("SLURM_VERSION", "MaxJobCount", "AccountingStorageEnforce", "DefMemPerCPU", "DefMemPerNode")
# sacctmgr(1), of an association and of a QOS: bounds on jobs of one user. Those of groups count all users'.
_ASSOCIATION = ("DefaultAccount", "Account", "Partition", "DefaultQOS", "MaxJobs", "MaxSubmitJobs")
_QOS = ("Name", "MaxJobsPU", "MaxSubmitPU")
_ENFORCED = re.compile(r"\b(?:limits|safe|all)\b", re.IGNORECASE)  # slurm.conf(5), AccountingStorageEnforce
_NO_DATABASE = re.compile(
    r"accounting_storage plugin|[Aa]ccounting storage is disabled|slurm_persist_conn_open"
)


def ask_limits(
    commands: Commands, *, partition: str | None, account: str | None, qos: str | None
) -> SiteLimits:
    """Ask SLURM for all of it, by four commands at most.

    Args:
        commands: what runs them.
        partition, account, qos: as jobs name them; None for the site's defaults.

    What does not answer is told in `unknown`.
    """
    asking = _Asking(commands)
    config = read_config(asking.text(*CONFIG))
    queues = read_partitions(asking.text(*_PARTITIONS))
    array = words.read_max_array("\n".join(f"{name} = {value}" for name, value in config.items()))
    submitted, running = asking.bounds_of_user(config, partition, account, qos)
    return SiteLimits(
        max_array=None if array is None else Bound(array, "MaxArraySize", " ".join(CONFIG)),
        max_submitted=submitted,
        max_running=running,
        queues=tuple(queues),
        names_default=bool(queues),
        facts=tuple(f"{name} = {config[name]}" for name in _FACTS if config.get(name)),
        unknown=tuple(asking.unknown),
    )


def read_config(text: str) -> dict[str, str]:
    """What `scontrol show config` says, by name."""
    rows = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, equals, value in rows if equals}


def read_partitions(text: str) -> list[Queue]:
    """What `scontrol show partition --oneliner` says: a partition per line, its values as "Name=value"."""
    found = []
    for line in text.splitlines():
        said = dict(re.findall(r"(\w+)=(\S*)", line))
        if name := said.get("PartitionName"):
            state = said.get("State", "")
            time = said.get("MaxTime", "")
            max_time = None
            with suppress(ValueError):  # "UNLIMITED"
                max_time = parse_time(time)
            found.append(Queue(name, state, state == "UP", said.get("Default") == "YES", max_time))
    return found


def read_rows(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """What sacctmgr says with --parsable2, by field."""
    rows = (line.split("|") for line in text.splitlines())
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


@dataclass(slots=True)
class _Asking:
    """Asks command after command, and keeps account of those that do not answer."""

    commands: Commands
    unknown: list[str] = field(default_factory=list)

    def text(self, *command: str) -> str:
        answer = self._answer(*command)
        return "" if answer is None else answer.stdout

    def bounds_of_user(
        self, config: dict[str, str], partition: str | None, account: str | None, qos: str | None
    ) -> tuple[Bound | None, Bound | None]:
        """How many jobs this user may have submitted, and running."""
        enforced = config.get("AccountingStorageEnforce", "")
        if config and not _ENFORCED.search(enforced):
            return None, None  # whatever the database has, nobody is held to it
        user = self.text("id", "-un").strip()
        if not user:
            return None, None
        query = ("show", "user", user, "withassoc", f"format={','.join(_ASSOCIATION)}")
        associations = read_rows(self._database(*query), _ASSOCIATION)
        wanted = account or (associations[0]["DefaultAccount"] if associations else "")
        mine = [
            row
            for row in associations
            if row["Account"] == wanted and row["Partition"] in ("", partition or "")
        ]
        names = {qos} if qos else {row["DefaultQOS"] for row in mine} - {""}
        grants = read_rows(self._database("show", "qos", f"format={','.join(_QOS)}"), _QOS) if names else []
        submitted = [_bound(row["MaxSubmitJobs"], f"MaxSubmitJobs of account {wanted}") for row in mine]
        running = [_bound(row["MaxJobs"], f"MaxJobs of account {wanted}") for row in mine]
        for row in grants:
            if row["Name"] in names:
                submitted.append(_bound(row["MaxSubmitPU"], f"MaxSubmitJobsPerUser of QOS {row['Name']}"))
                running.append(_bound(row["MaxJobsPU"], f"MaxJobsPerUser of QOS {row['Name']}"))
        return least(submitted), least(running)

    def _database(self, *query: str) -> str:
        answer = self._answer("sacctmgr", "--noheader", "--parsable2", *query)
        return "" if answer is None else answer.stdout

    def _answer(self, *command: str) -> CommandAnswer | None:
        try:
            answer = self.commands(*command)
            if _NO_DATABASE.search(answer.text):
                return None  # there is no accounting, and so no such bounds
            answer.expect_success()
        except SchedulerError as error:
            shown = " ".join([word for word in command if not word.startswith("--")][:3])
            self.unknown.append(f"`{shown}` gave no answer: {cleaned(str(error)).splitlines()[0]}")
            return None
        return answer


def _bound(text: str, word: str) -> Bound | None:
    return Bound(int(text), word, "sacctmgr") if text.isdecimal() else None
