"""What is left of a run's units after its coordinator has died: what they told, and what still runs.

Whoever resumes the run first raises a fence (`worker.stop`), so that nothing more starts; then it reads
what the workers wrote, and ends what goes on. A process is only ever signalled if it is known to be the
run's: by the mark in its environment, or by its pid together with the time of its start.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from fractal_runner.worker import processes
from fractal_runner.worker.command import read_output, runs_here
from fractal_runner.worker.evidence import LEDGER_SUFFIX, CorruptEvidenceError, read_payloads
from fractal_runner.worker.processes import Identity
from fractal_runner.worker.spec import UnitResult

_LOOK_S = 0.1
# A child is without its mark for the moment between its parent's call and its own first instruction.
_SETTLE_S = 0.1
_KILL_WAIT_S = 10.0
_WORKER_RECORD = b'{"kind":"worker"'
_decode = json.JSONDecoder().raw_decode  # what json.loads does besides takes as long again
_logger = logging.getLogger("fractal_runner")


class Process(NamedTuple):
    """The process of a unit's command: it started between two ticks of its host's clock.

    Attributes:
        pid: its process id, and that of the process group that it leads.
        since: clock ticks since boot, before it was started.
        until: the same, after.
    """

    pid: int
    since: int
    until: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What a worker has told of one unit that it started.

    Attributes:
        key: the unit's key.
        digest: of its command and arguments; "" if it was not recorded.
        started: when it started, in seconds since the epoch.
        worker: the process that ran it, or had it run.
        coordinator: the process that the worker served. Its boot and the start of it are known only if it
            was on the worker's host.
        ledger: path of the file that tells this.
        process: its command's process; None for a function, and for what was over within milliseconds.
        has_ended: whether the worker says that nothing of it runs any more.
        result: how it ended; None if that is not known, or if its output has been lost since.
    """

    key: str
    digest: str
    started: float
    worker: Identity
    coordinator: Identity
    ledger: str
    process: Process | None = None
    has_ended: bool = False
    result: UnitResult | None = None

    @property
    def in_coordinator(self) -> bool:
        """Whether the coordinator itself was the worker, in one of its threads."""
        return (self.worker.host, self.worker.pid) == (self.coordinator.host, self.coordinator.pid)


def read_traces(directory: str, prefix: str) -> dict[str, Trace]:
    """What the workers of a run have told of the units whose keys begin with `prefix`.

    Of a unit that was started twice (a cluster may queue a job anew), it is the success that counts, else
    the later start.

    Args:
        directory: the run's, where their ledgers are; there need not be one.
        prefix: "<run_id>/3/" for all units of a task.

    Raises:
        CorruptEvidenceError: if a ledger was changed after it was written, naming it.
        OSError: if one cannot be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return {}
    traces: dict[str, Trace] = {}
    with _collector_paused():
        for name in names:
            if name.endswith(LEDGER_SUFFIX):
                for trace in _read_ledger(f"{directory}/{name}", prefix):
                    other = traces.get(trace.key)
                    if other is None or _rank(trace) > _rank(other):
                        traces[trace.key] = trace
    return traces


def end_leftovers(
    traces: Iterable[Trace],
    *,
    run_id: str,
    directory: str,
    spare: Collection[str],
    grace_s: float,
    patience_s: float,
) -> list[Trace]:
    """End what still runs of a run's units. The fence must have been raised before.

    All commands of the run on this host are ended, of whatever unit. A worker process that lives is given
    time to meet the fence; then it is killed if its coordinator is dead. What runs in a live coordinator,
    or on another host, can only be waited for. The children of a function whose worker has died cannot be
    told from other processes: they are not found.

    Args:
        traces: the units to make sure of; those that have ended are passed over.
        run_id: the run.
        directory: where its ledgers are.
        spare: keys of the units that are to go on.
        grace_s: seconds between TERM and KILL.
        patience_s: how long to wait for what cannot be ended from here, or should end by itself.

    Returns:
        Those that may still run.

    Raises:
        CorruptEvidenceError, OSError: if a ledger can no longer be read.
    """
    unsure = [trace for trace in traces if not trace.has_ended and trace.key not in spare]
    commands = _Commands(run_id, unsure, spare)
    left = commands.end(grace_s)
    if unsure:
        workers = _Workers(unsure)
        workers.wait(patience_s)
        workers.kill_orphans(spare, directory, run_id)
        time.sleep(_SETTLE_S)  # what was just forked bears its mark only after its exec
        # Once more, for what workers started before they met the fence or their end.
        left = commands.end(grace_s) | workers.units
    if others := left - {trace.key for trace in unsure}:
        _logger.warning("Processes that are left of units cannot be ended: %s", ", ".join(sorted(others)))
    return [trace for trace in unsure if trace.key in left]


class _Commands:
    """The commands of a run on this host: process groups that were recorded, and what bears its mark.

    Args:
        run_id: the run.
        traces: units that have not ended.
        spare: keys of units whose commands are no business of ours.
    """

    def __init__(self, run_id: str, traces: Iterable[Trace], spare: Collection[str]) -> None:
        self._beginning = processes.mark_of(f"{run_id}/")
        self._spared = {processes.mark_of(key) for key in spare}
        self._leaders = {
            (trace.process.pid, trace.key): trace.process
            for trace in traces
            if trace.process is not None and _is_of_this_boot(trace.worker)
        }
        self._found: dict[tuple[int, int], str] = {}  # by pid and start, all that were found: the unit's key

    def end(self, grace_s: float) -> set[str]:
        """End them all; the keys of the units for which it could not be done."""
        if not processes.has_table():
            # Nothing here tells whose group that is by now: it is left alone, and not believed to be over.
            return {key for pid, key in self._leaders if not processes.group_is_empty(pid)}
        left = set(processes.end_found(self._find, grace_s, _KILL_WAIT_S))
        return {key for (pid, _), key in self._found.items() if pid in left}

    def _find(self) -> list[int]:
        """Those that run now."""
        table = {
            pid: entry
            for pid, entry in processes.table().items()
            if entry.is_running and pid not in (1, os.getpid())
        }
        found = {pid: key for pid in table if (key := self._marked(pid)) is not None}
        groups = self._groups(table, found)
        found |= {pid: groups[entry.group] for pid, entry in table.items() if entry.group in groups}
        for pid, key in found.items():
            if (pid, table[pid].start_ticks) not in self._found:
                self._found[pid, table[pid].start_ticks] = key
                _logger.info("Ending process %d, which is left of unit %s", pid, key)
        return list(found)

    def _marked(self, pid: int) -> str | None:
        """The unit whose mark the process bears, if it is one of these."""
        mark = processes.entry_of(pid, self._beginning)
        if mark is None or mark in self._spared:
            return None
        return mark.partition(b"=")[2].decode(errors="replace")

    def _groups(self, table: Mapping[int, processes.Entry], marked: Mapping[int, str]) -> dict[int, str]:
        """The process groups that are the units', by their leader or by one that is known to be in it.

        A group's number is not given to another process while anybody is in the group.
        """
        groups = {}
        for (pid, key), process in self._leaders.items():
            # Also a zombie's start is told, and it leads its group still.
            start = processes.start_ticks(pid)
            if start is not None and process.since <= start <= process.until:
                groups[pid] = key
        known = [(pid, key) for (pid, start), key in self._found.items() if _starts_at(table.get(pid), start)]
        for pid, key in (*marked.items(), *known):
            if (group := table[pid].group, key) in self._leaders:
                groups[group] = key
        return groups


class _Workers:
    """The workers of units that have not ended, as far as they may live.

    Args:
        traces: the units.
    """

    def __init__(self, traces: Iterable[Trace]) -> None:
        self._traces = list(traces)
        self._sizes: dict[str, int] = {}
        self._look()

    @property
    def units(self) -> set[str]:
        """Keys of the units that may still run, as of the last look."""
        return {trace.key for trace in self._traces}

    def wait(self, seconds: float) -> None:
        """Wait until all is over: each unit has ended, or its worker."""
        deadline = time.monotonic() + seconds
        while self._traces and time.monotonic() < deadline:
            time.sleep(_LOOK_S)  # files and processes of others: nothing tells when they change
            self._look()

    def kill_orphans(self, spare: Collection[str], directory: str, run_id: str) -> None:
        """Kill the worker processes whose coordinator is dead, but for those that run what is spared."""
        orphans = {trace.worker: trace for trace in self._traces if _is_orphan(trace)}
        if not orphans:
            return
        for key, trace in read_traces(directory, f"{run_id}/").items() if spare else ():
            if key in spare and not trace.has_ended:
                orphans.pop(trace.worker, None)
        for worker, trace in orphans.items():
            _logger.warning(
                "Killing worker process %d, which has outlived its coordinator and goes on with unit %s",
                *(worker.pid, trace.key),
            )
            processes.end_tree(worker.pid, 0)
        self._look()

    def _look(self) -> None:
        # Whether they live is asked first: one that is dead by then has written all that it ever will.
        alive = {worker for worker in {trace.worker for trace in self._traces} if _may_live(worker)}
        # What this process itself has run it need not read: the record of the end may have found no space.
        me = processes.identify(os.getpid())
        waited_for = [
            trace
            for trace in self._traces
            if trace.worker in alive and (trace.worker != me or runs_here(trace.key))
        ]
        ended = self._ended(waited_for)
        self._traces = [trace for trace in waited_for if trace.key not in ended]

    def _ended(self, traces: Iterable[Trace]) -> set[str]:
        """Those whose end has been recorded since the last look."""
        ended = set()
        for ledger in {trace.ledger for trace in traces}:
            size = _size(ledger)
            if self._sizes.get(ledger) == size:
                continue
            self._sizes[ledger] = size
            ended |= _ends(ledger, [trace.key for trace in traces if trace.ledger == ledger])
        return ended


def _ends(ledger: str, keys: Iterable[str]) -> set[str]:
    """Those of the units that the ledger says have ended."""
    beginnings = tuple(b'{"kind":"end","key":%s,' % json.dumps(key).encode() for key in keys)
    records = (json.loads(payload) for payload in read_payloads(ledger) if payload.startswith(beginnings))
    return {record["key"] for record in records if _is_end(record["result"])}


def _is_end(result: Mapping[str, Any]) -> bool:
    return not result.get("left_running", False)


def _size(path: str) -> int:
    with open(path, "rb") as file:  # opened, because a network file system looks anew only then
        return os.fstat(file.fileno()).st_size


def _may_live(worker: Identity) -> bool:
    return worker.host != processes.host_name() or processes.is_same_process(worker)


def _is_of_this_boot(worker: Identity) -> bool:
    return worker.host == processes.host_name() and worker.boot_id == processes.boot_id()


def _starts_at(entry: processes.Entry | None, ticks: int) -> bool:
    return entry is not None and entry.start_ticks == ticks


def _is_orphan(trace: Trace) -> bool:
    """Whether its worker may be killed: a process of this host that lives, unlike its coordinator."""
    worker, coordinator, host = trace.worker, trace.coordinator, processes.host_name()
    if trace.in_coordinator or worker.host != host or coordinator.host != host:
        return False
    if worker.pid in (1, os.getpid()) or worker.start_ticks is None:
        return False
    return processes.is_same_process(worker) and not processes.is_same_process(coordinator)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """While very many objects are made and kept: the collector goes through them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _rank(trace: Trace) -> tuple[bool, float]:
    return trace.result is not None and trace.result.succeeded, trace.started


def _read_ledger(path: str, prefix: str) -> list[Trace]:
    """The traces in one ledger of the units whose keys begin with `prefix`.

    Raises:
        CorruptEvidenceError, OSError: as `read_traces`.
    """
    wanted = b'"key":' + json.dumps(prefix).encode()[:-1]  # as `Ledger.append` writes it
    run_dir = os.path.dirname(os.path.dirname(path))
    traces: list[Trace] = []
    unended: dict[str, _Start] = {}
    who: tuple[Identity, Identity] | None = None
    try:
        for payload in read_payloads(path):
            if wanted not in payload:
                if payload.startswith(_WORKER_RECORD):
                    who = _worker(_decode(payload.decode())[0])
                continue
            record = _decode(payload.decode())[0]
            kind, key = record["kind"], record["key"]
            if kind == "start":
                if key in unended:
                    traces.append(unended[key].trace(path))
                unended[key] = _Start(key, record, who)
            elif kind == "process":
                unended[key].process = Process(record["pid"], *record["start_ticks"])
            elif kind == "end":
                traces.append(unended.pop(key).trace(path, record["result"], run_dir))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CorruptEvidenceError):
            raise
        raise CorruptEvidenceError(f"{path}: a record is not one that a worker writes: {error!r}") from error
    traces.extend(start.trace(path) for start in unended.values())
    return traces


class _Start:
    """A unit that has started, while its other records are looked for."""

    __slots__ = ("_key", "_record", "_who", "process")

    def __init__(self, key: str, record: Mapping[str, Any], who: tuple[Identity, Identity] | None) -> None:
        if who is None:
            raise ValueError(f"there is no record of the worker before the one of unit {key}")
        self._key = key
        self._record = record
        self._who = who
        self.process: Process | None = None

    def trace(self, ledger: str, end: dict[str, Any] | None = None, run_dir: str = "") -> Trace:
        digest = self._record.get("digest", "")
        return Trace(
            self._key,
            digest,
            self._record["time"],
            *self._who,
            ledger,
            self.process,
            end is not None and _is_end(end),
            None if end is None else _result(self._key, digest, end, run_dir),
        )


def _worker(record: Mapping[str, Any]) -> tuple[Identity, Identity]:
    """Who wrote what follows, and for whom."""
    who = Identity(record["host"], record["boot_id"], record["pid"], record["start_ticks"])
    host, pid, ticks = record["coordinator"]
    boot_id = who.boot_id if host == who.host else ""
    return who, Identity(host, boot_id, pid, ticks)


def _result(key: str, digest: str, record: dict[str, Any], run_dir: str) -> UnitResult | None:
    """What an end record says; None if it says that there is output which is no longer there."""
    output = None
    said = record.pop("output", None)
    if said is not None and "json" in said:
        output = json.loads(said["json"])
    elif said is not None:
        path = os.path.join(run_dir, said["file"])
        output, error, text = read_output(path)
        if text is None or len(text) != said["chars"] or zlib.crc32(text.encode()) != said["crc32"]:
            _logger.warning(
                "Unit %s ended, but its output is lost: %s",
                *(key, error or f"{path} is not there, or is not what the unit wrote"),
            )
            return None
    return UnitResult(key=key, digest=digest, output=output, **record)
