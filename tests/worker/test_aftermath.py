"""What a dead coordinator has left: read, fenced off and ended, with real processes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from fractal_runner.worker import processes, stop
from fractal_runner.worker.aftermath import Trace, end_leftovers, read_traces
from fractal_runner.worker.command import run_unit
from fractal_runner.worker.evidence import CorruptEvidenceError, Ledger
from fractal_runner.worker.processes import MARK_VARIABLE, Identity
from fractal_runner.worker.spec import CANCELLED, UnitSpec
from fractal_runner.worker.stop import StopRequest, raise_fence

Make = Callable[..., UnitSpec]
Started = subprocess.Popen[bytes]

_HOST = os.uname().nodename
_RUN = uuid4().hex  # tests of other runs may be at work on this host
_WORK = """
import os, pickle, sys
from dataclasses import replace
from fractal_runner.worker.command import run_unit

for unit in pickle.load(open(sys.argv[1], "rb")):
    if unit.coordinator[1] == 0:
        unit = replace(unit, coordinator=(os.uname().nodename, os.getpid()))
    run_unit(unit)
"""
_ITSELF = (_HOST, 0)  # the coordinator of units that a process runs for itself


def until(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` returns, once that is true."""
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within 30 s: {what}"
        time.sleep(0.01)
    return value


@pytest.fixture
def unit(spec: Make) -> Make:
    """A unit of the run, by its name."""

    def make(name: str = "par-0", script: str = "", **more: Any) -> UnitSpec:
        return spec(script, **{"key": f"{_RUN}/0/{name}", "prefix": name, "run_id": _RUN, **more})

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    """Starts commands, in groups of their own, that are gone after the test."""
    started: list[Started] = []

    def go(*words: str, mark: str | None = None) -> Started:
        env = {**os.environ, **({MARK_VARIABLE: mark} if mark else {})}
        started.append(subprocess.Popen(words, env=env, start_new_session=True))
        return started[-1]

    yield go
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def work(start: Callable[..., Started], tmp_path: Path) -> Callable[..., Started]:
    """Has units run, one after the other, by a new process."""

    def go(*units: UnitSpec) -> Started:
        path = tmp_path / "units.pkl"
        path.write_bytes(pickle.dumps(units))
        return start(sys.executable, "-c", _WORK, str(path))

    return go


@pytest.fixture
def dead() -> tuple[str, int]:
    """Host and pid of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return _HOST, process.pid


@pytest.fixture
def evidence(tmp_path: Path) -> str:
    return str(tmp_path / "evidence")


@pytest.fixture
def record(evidence: str, dead: tuple[str, int]) -> Callable[..., Trace]:
    """Writes by hand what a worker tells that is no more."""

    def write(process: Started | None = None, *, ticks: tuple[int, int] = (0, 1), **who: Any) -> Trace:
        worker = {**asdict(Identity(_HOST, processes.boot_id(), dead[1], 1)), **who}
        key = f"{_RUN}/0/par-0"
        ledger = Ledger(f"{evidence}/by-hand.log")
        ledger.append({"kind": "worker", **worker, "coordinator": [worker["host"], worker["pid"], 1]})
        ledger.append({"kind": "start", "key": key, "time": time.time()})
        if process is not None:
            ledger.append({"kind": "process", "key": key, "pid": process.pid, "start_ticks": ticks})
        ledger.close()
        return trace_of(evidence)

    return write


def trace_of(evidence: str, name: str = "par-0") -> Trace:
    return read_traces(evidence, f"{_RUN}/0/")[f"{_RUN}/0/{name}"]


def end(evidence: str, *traces: Trace, spare: tuple[str, ...] = (), patience_s: float = 30) -> list[str]:
    """The names of the units that could not be ended."""
    left = end_leftovers(
        traces, run_id=_RUN, directory=evidence, spare=spare, grace_s=0.2, patience_s=patience_s
    )
    return [trace.key.rpartition("/")[2] for trace in left]


def recorded_process(evidence: str) -> Trace:
    """The trace of the one unit, once its process is told of."""

    def look() -> Trace | None:
        traces = list(read_traces(evidence, "").values())
        return traces[0] if traces and traces[0].process else None

    trace: Trace = until(look, "the unit's process is recorded")
    return trace


def pid_in(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text().strip(), f"{path} is written"))


def kill(process: Started) -> None:
    process.kill()
    process.wait()


# What is read


def test_what_units_told_is_read_back(unit: Make, evidence: str) -> None:
    done = unit("par-0", 'echo \'{"a": [1]}\' > "$4"', digest="abc")
    failed = unit("par-1", "echo why; exit 3")
    other = unit("par-2", "true", key=f"{_RUN}/01/par-2")
    results = [run_unit(one) for one in (done, failed, other)]

    traces = read_traces(evidence, f"{_RUN}/0/")

    assert list(traces) == [done.key, failed.key]
    trace = traces[done.key]
    assert trace.digest == "abc"
    assert trace.worker == processes.identify(os.getpid()) == trace.coordinator
    assert trace.in_coordinator and trace.has_ended
    assert abs(trace.started - time.time()) < 60
    assert [trace.result for trace in traces.values()] == results[:2]


def test_a_run_that_has_not_started_has_no_traces(tmp_path: Path) -> None:
    assert read_traces(str(tmp_path / "none"), "") == {}


def test_a_function_s_result_is_read_back(unit: Make, evidence: str) -> None:
    result = run_unit(unit(function=lambda **_: {"b": "é"}))

    assert trace_of(evidence).result == result


def test_large_output_is_read_from_its_file(unit: Make, evidence: str) -> None:
    result = run_unit(unit(script="""python3 -c 'print("[" + "1," * 50000 + "1]")' > "$4" """))

    assert trace_of(evidence).result == result


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_text("[1]")])
def test_large_output_that_is_gone_or_changed_is_not_believed(
    unit: Make, evidence: str, caplog: pytest.LogCaptureFixture, change: Callable[[Path], Any]
) -> None:
    one = unit(script="""python3 -c 'print("[" + "1," * 50000 + "1]")' > "$4" """)
    run_unit(one)
    change(Path(one.out_file))

    trace = trace_of(evidence)

    assert trace.has_ended
    assert trace.result is None
    assert f"Unit {one.key} ended, but its output is lost: {one.out_file}" in caplog.text


def test_of_a_unit_that_was_started_twice_its_success_counts(
    unit: Make, evidence: str, record: Callable[..., Trace]
) -> None:
    run_unit(unit(script="true"))
    time_of_success = trace_of(evidence).started

    assert record().started == time_of_success


def test_a_damaged_ledger_is_named(unit: Make, evidence: str) -> None:
    run_unit(unit(script="true"))
    [ledger] = Path(evidence).iterdir()
    data = bytearray(ledger.read_bytes())
    data[40] ^= 1
    ledger.write_bytes(data)

    with pytest.raises(CorruptEvidenceError, match=f"{ledger}: the record at byte 0 is damaged"):
        read_traces(evidence, "")


def test_a_record_that_no_worker_writes_is_named(evidence: str, tmp_path: Path, spec: Make) -> None:
    Ledger(f"{evidence}/a.log").append({"kind": "end", "key": "run/0/x", "result": {}})

    with pytest.raises(CorruptEvidenceError, match=r"a\.log: a record is not one that a worker writes"):
        read_traces(evidence, "")


# The fence


def test_a_fenced_unit_does_not_start(
    unit: Make, tmp_path: Path, evidence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "POLL_S", 1000)  # what was looked at before the fence still counts
    run_unit(unit("par-0", "true"))
    raise_fence(str(tmp_path), 2, [])

    result = run_unit(unit("par-1", f"touch {tmp_path}/ran"))

    assert (result.reason, result.returncode) == (CANCELLED, None)
    assert "Another coordinator has taken over the run." in str(result.message)
    assert trace_of(evidence, "par-1").result == result
    assert not (tmp_path / "ran").exists()


def test_a_unit_that_comes_after_the_fence_leaves_no_trace(unit: Make, tmp_path: Path, evidence: str) -> None:
    raise_fence(str(tmp_path), 2, [])

    result = run_unit(unit(script=f"touch {tmp_path}/ran"))

    assert result.reason == CANCELLED
    assert "Another coordinator has taken over the run." in str(result.message)
    assert read_traces(evidence, "") == {}
    assert not (tmp_path / "ran").exists()


def test_spared_units_and_those_of_the_new_coordinator_run(unit: Make, tmp_path: Path) -> None:
    raise_fence(str(tmp_path), 2, [unit("par-0").key])

    assert run_unit(unit("par-0", "true")).succeeded
    assert run_unit(unit("par-1", "true", epoch=2)).succeeded
    assert not run_unit(unit("par-1", "true")).succeeded
    assert run_unit(unit("par-0", "true")).succeeded


def test_what_one_fence_spares_the_next_may_not(tmp_path: Path) -> None:
    spared_once, spared_twice = (
        StopRequest(_RUN, str(tmp_path), epoch=1, key=key) for key in ("once", "twice")
    )

    raise_fence(str(tmp_path), 2, ["once", "twice"])
    assert not spared_once.asked() and not spared_twice.asked()

    raise_fence(str(tmp_path), 3, ["twice"])
    assert spared_once.asked() and not spared_twice.asked()


def test_a_coordinator_that_died_before_it_raised_its_fence_lets_nobody_through(tmp_path: Path) -> None:
    raise_fence(str(tmp_path), 4, ["spared"])

    assert StopRequest(_RUN, str(tmp_path), epoch=1, key="other").fenced()
    assert not StopRequest(_RUN, str(tmp_path), epoch=1, key="spared").fenced()
    assert StopRequest(_RUN, str(tmp_path), epoch=3).fenced()
    assert not StopRequest(_RUN, str(tmp_path), epoch=4).fenced()


def test_a_newer_units_look_does_not_hide_the_fence_from_an_older_one(tmp_path: Path) -> None:
    raise_fence(str(tmp_path), 2, ["spared"])

    assert not StopRequest(_RUN, str(tmp_path), epoch=2).asked()
    assert not StopRequest(_RUN, str(tmp_path), epoch=1, key="spared").asked()
    assert StopRequest(_RUN, str(tmp_path), epoch=1, key="other").asked()


@pytest.mark.parametrize("content", ["", '["spa', '"spared"', '{"spared": 1}', "[[]]", "\x00"])
def test_a_damaged_fence_spares_nobody(tmp_path: Path, content: str) -> None:
    raise_fence(str(tmp_path), 2, ["spared"])
    (tmp_path / "evidence" / "fence-2").write_text(content)

    assert StopRequest(_RUN, str(tmp_path), epoch=1, key="spared").fenced()


def test_a_fence_that_cannot_be_written_leaves_nothing_behind(spec: Make, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        raise_fence(str(tmp_path), 2, [b"no text"])  # type: ignore[list-item]

    assert list((tmp_path / "evidence").iterdir()) == []


@pytest.mark.parametrize("attempt", range(4))
def test_whoever_runs_after_the_fence_was_read_of_before(
    unit: Make, work: Callable[..., Started], tmp_path: Path, evidence: str, attempt: int
) -> None:
    """The race between a worker that starts units and a coordinator that takes over."""
    ran = tmp_path / "ran"

    def run(name: str) -> None:
        fd = os.open(ran, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{name}\n".encode())
        os.close(fd)

    units = [unit(f"par-{n}", function=run, args={"name": f"par-{n}"}) for n in range(5000)]
    worker = work(*units)
    until(lambda: ran.exists() and ran.stat().st_size > 100 * (attempt + 1), "some units have run")

    raise_fence(str(tmp_path), 2, [])
    told = read_traces(evidence, f"{_RUN}/0/")

    assert worker.wait(60) == 0
    names = ran.read_text().split()
    assert 10 <= len(names) < len(units)
    assert {f"{_RUN}/0/{name}" for name in names} <= set(told)


# What is ended


def test_all_that_a_killed_coordinator_left_is_ended(
    unit: Make, work: Callable[..., Started], tmp_path: Path, evidence: str
) -> None:
    script = (
        f"trap \"\" TERM; setsid sh -c 'echo $$ > {tmp_path}/stray; exec sleep 1000' & "
        f"sleep 1000 & echo $! > {tmp_path}/member; wait"
    )
    coordinator = work(unit(script=script, coordinator=_ITSELF))
    trace = recorded_process(evidence)
    pids = [trace.process and trace.process.pid, pid_in(tmp_path / "stray"), pid_in(tmp_path / "member")]
    kill(coordinator)
    assert all(pid and processes.is_running(pid) for pid in pids)
    raise_fence(str(tmp_path), 2, [])

    left = end(evidence, trace)

    assert left == []
    assert trace.in_coordinator
    assert not any(pid and processes.is_running(pid) for pid in pids)
    assert not trace_of(evidence).has_ended


def test_a_command_that_nobody_recorded_is_found_by_its_mark(
    start: Callable[..., Started], record: Callable[..., Trace], evidence: str, spec: Make
) -> None:
    command = start("sleep", "1000", mark=f"{_RUN}/0/par-0")
    spared = start("sleep", "1000", mark=f"{_RUN}/0/par-1")
    of_another_run = start("sleep", "1000", mark=f"{_RUN}2/0/par-0")

    left = end(evidence, record(), spare=(f"{_RUN}/0/par-1",))

    assert left == []
    assert command.wait(30) == -signal.SIGTERM
    assert spared.poll() is of_another_run.poll() is None


def test_a_recycled_pid_is_left_alone(
    start: Callable[..., Started], record: Callable[..., Trace], evidence: str, spec: Make
) -> None:
    stranger = start("sleep", "1000")

    assert end(evidence, record(stranger)) == []
    assert stranger.poll() is None


def test_a_pid_of_another_boot_is_left_alone(
    start: Callable[..., Started], record: Callable[..., Trace], evidence: str, spec: Make
) -> None:
    stranger = start("sleep", "1000")
    ticks = processes.start_ticks(stranger.pid) or 0

    assert end(evidence, record(stranger, ticks=(ticks, ticks), boot_id="another")) == []
    assert stranger.poll() is None


def test_a_process_that_has_lost_its_mark_is_found_by_its_group(
    start: Callable[..., Started], record: Callable[..., Trace], evidence: str, spec: Make
) -> None:
    command = start("env", "-i", "sh", "-c", "sleep 1000 & wait")
    until(lambda: len(processes.group_members(command.pid)) == 2, "both run")
    ticks = processes.start_ticks(command.pid) or 0

    assert end(evidence, record(command, ticks=(ticks - 1, ticks + 1))) == []
    command.wait(30)
    assert processes.group_is_empty(command.pid)


def test_what_has_lost_its_mark_and_its_leader_is_found_by_one_of_its_group(
    start: Callable[..., Started], record: Callable[..., Trace], evidence: str, tmp_path: Path, spec: Make
) -> None:
    script = f"sleep 1000 & env -i sh -c 'trap \"\" TERM; echo $$ > {tmp_path}/bare; exec sleep 1000' &"
    command = start("sh", "-c", script, mark=f"{_RUN}/0/par-0")
    command.wait(30)
    bare = pid_in(tmp_path / "bare")

    assert end(evidence, record(command)) == []
    assert not processes.is_running(bare)


def test_a_command_in_a_surviving_worker_ends_by_the_fence(
    unit: Make, work: Callable[..., Started], tmp_path: Path, evidence: str, dead: tuple[str, int]
) -> None:
    worker = work(unit(script="sleep 1000", coordinator=dead))
    recorded_process(evidence)

    raise_fence(str(tmp_path), 2, [])

    assert worker.wait(30) == 0
    result = trace_of(evidence).result
    assert result is not None
    assert (result.reason, result.signal) == (CANCELLED, "SIGTERM")
    assert result.message == "Another coordinator has taken over the run."


def test_a_command_in_a_surviving_worker_is_ended_and_its_worker_is_not(
    unit: Make, work: Callable[..., Started], tmp_path: Path, evidence: str, dead: tuple[str, int]
) -> None:
    worker = work(unit("par-0", "sleep 1000", coordinator=dead), unit("par-1", "true", coordinator=dead))
    trace = recorded_process(evidence)
    raise_fence(str(tmp_path), 2, [])

    assert end(evidence, trace) == []
    assert trace_of(evidence).has_ended
    assert worker.wait(30) == 0


def test_a_function_in_a_surviving_worker_is_ended(
    unit: Make, work: Callable[..., Started], tmp_path: Path, evidence: str, dead: tuple[str, int]
) -> None:
    def loop(**_: Any) -> None:
        (tmp_path / "begun").touch()
        while True:
            pass

    worker = work(unit(function=loop, coordinator=dead))
    until((tmp_path / "begun").exists, "the function runs")
    raise_fence(str(tmp_path), 2, [])

    assert end(evidence, trace_of(evidence)) == []
    result = trace_of(evidence).result
    assert result is not None and result.reason == CANCELLED
    assert worker.wait(30) == 0


def test_a_worker_that_does_not_meet_the_fence_is_killed_once_its_coordinator_is_dead(
    unit: Make, work: Callable[..., Started], tmp_path: Path, evidence: str, dead: tuple[str, int]
) -> None:
    worker = work(unit(script="sleep 1000", coordinator=dead))
    trace = recorded_process(evidence)
    worker.send_signal(signal.SIGSTOP)
    raise_fence(str(tmp_path), 2, [])

    assert end(evidence, trace, patience_s=0.1) == []
    assert worker.wait(30) == -signal.SIGKILL
    assert trace.process is not None and not processes.is_running(trace.process.pid)


def test_a_worker_whose_coordinator_lives_is_told_of_and_not_killed(
    unit: Make, work: Callable[..., Started], tmp_path: Path, evidence: str
) -> None:
    worker = work(unit(script="sleep 1000"))
    trace = recorded_process(evidence)
    worker.send_signal(signal.SIGSTOP)
    raise_fence(str(tmp_path), 2, [])

    assert end(evidence, trace, patience_s=0.1) == ["par-0"]
    assert worker.poll() is None


def test_a_coordinator_is_not_mistaken_for_a_process_that_has_its_pid_now(
    unit: Make, work: Callable[..., Started], start: Callable[..., Started], tmp_path: Path, evidence: str
) -> None:
    stranger = start("sleep", "1000")
    worker = work(unit(script="sleep 1000", coordinator=(_HOST, stranger.pid)))
    trace = recorded_process(evidence)
    worker.send_signal(signal.SIGSTOP)
    raise_fence(str(tmp_path), 2, [])
    earlier = replace(trace.coordinator, start_ticks=1)

    assert end(evidence, replace(trace, coordinator=earlier), patience_s=0.1) == []
    assert worker.wait(30) == -signal.SIGKILL
    assert stranger.poll() is None


def test_a_worker_that_runs_something_spared_is_not_killed(
    unit: Make, work: Callable[..., Started], tmp_path: Path, evidence: str, dead: tuple[str, int]
) -> None:
    worker = work(unit(script="sleep 1000", coordinator=dead))
    trace = recorded_process(evidence)
    worker.send_signal(signal.SIGSTOP)
    raise_fence(str(tmp_path), 2, [trace.key])
    with_it = replace(trace, key=f"{_RUN}/0/another", process=None)

    assert end(evidence, trace, spare=(trace.key,)) == []
    assert end(evidence, with_it, spare=(trace.key,), patience_s=0.1) == ["another"]
    assert worker.poll() is None
    assert trace.process is not None and processes.is_running(trace.process.pid)


def test_a_function_in_a_thread_of_a_live_process_cannot_be_ended(
    unit: Make, tmp_path: Path, evidence: str
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def wait(**_: Any) -> None:
        begun.set()
        may_end.wait(60)

    thread = threading.Thread(target=run_unit, args=(unit(function=wait),))
    thread.start()
    assert begun.wait(30)
    raise_fence(str(tmp_path), 2, [])
    trace = trace_of(evidence)

    try:
        assert trace.in_coordinator
        assert end(evidence, trace, patience_s=0.1) == ["par-0"]
    finally:
        may_end.set()
        thread.join(30)
    assert end(evidence, trace) == []
    result = trace_of(evidence).result
    assert result is not None and result.succeeded


def test_a_function_that_was_left_running_has_not_ended(unit: Make, tmp_path: Path, evidence: str) -> None:
    may_end = threading.Event()
    run_unit(unit(function=lambda **_: may_end.wait(60), timeout_s=0.01))

    trace = trace_of(evidence)

    may_end.set()
    assert trace.result is not None and trace.result.left_running
    assert not trace.has_ended


def test_another_boot_has_ended_everything(record: Callable[..., Trace], evidence: str, spec: Make) -> None:
    assert end(evidence, record(boot_id="another", pid=os.getpid())) == []


def test_another_host_is_waited_for_and_told_of(
    record: Callable[..., Trace], evidence: str, spec: Make
) -> None:
    assert end(evidence, record(host="elsewhere"), patience_s=0.1) == ["par-0"]


def test_the_end_that_another_host_tells_is_heard(
    record: Callable[..., Trace], evidence: str, spec: Make
) -> None:
    trace = record(host="elsewhere")
    said = {"kind": "end", "key": trace.key, "result": {"reason": CANCELLED}}
    timer = threading.Timer(0.3, Ledger(trace.ledger).append, [said])
    timer.start()

    assert end(evidence, trace) == []
    timer.join(30)
