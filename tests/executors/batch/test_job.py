"""A job does its share of an array's calls once, and writes down what it did, whatever befalls it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import fractal_runner
from fractal_runner import current_call
from fractal_runner.executors.batch.files import ArrayFiles
from fractal_runner.executors.batch.job import DONE, DRAINED, STOPPED
from fractal_runner.executors.batch.payload import PackedCall, Terms, write_payload
from fractal_runner.executors.batch.records import Kind, Record, RecordLog, Tail
from fractal_runner.executors.local import child
from fractal_runner.testing import PATIENCE_S, Gate, wait_until
from tests.executors.batch.processes import JOB_PROGRAM, end_session

pytestmark = pytest.mark.timeout(120)


class Jobs:
    """An array of one job, and processes that do it."""

    def __init__(self, directory: Path) -> None:
        self.files = ArrayFiles(directory)
        self.files.make(1)
        self._processes: list[subprocess.Popen[str]] = []

    def give(self, *calls: Callable[[], Any], parallel: int = 1) -> None:
        packed = [
            PackedCall(
                *(f"call-{place}", None, cloudpickle.dumps(call), pickle.dumps(((), {}))),
                pickle.dumps({"place": "context"}),
            )
            for place, call in enumerate(calls)
        ]
        write_payload(self.files.payload, [packed], Terms(parallel=parallel), levels={"": 20})

    def command(self, id: str, directory: str) -> list[str]:
        """What does the job."""
        return [sys.executable, "-c", JOB_PROGRAM, directory, "0", id]

    def start(self, id: str = "1_0", directory: str | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.command(id, directory or self.files.directory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def run(self, id: str = "1_0") -> str:
        """Do the job to its end; what it printed."""
        printed, _ = self.start(id).communicate(timeout=PATIENCE_S)
        return printed

    def stop(self, *places: int) -> None:
        log = RecordLog(self.files.control, sync=False)
        log.write(Kind.STOP, n=0, **({"c": places} if places else {}))
        log.close()

    def said(self) -> list[Record]:
        return [
            record
            for start in range(self.files.starts()[0])
            for record in Tail(self.files.records(0, start)).read()
        ]

    def story(self) -> list[tuple[str, Any]]:
        """What it said of calls and of its own end, in a few words."""
        return [
            (record.kind, record.fields.get("c", record.fields.get("why")))
            for record in self.said()
            if record.kind not in (Kind.JOB, Kind.LOG)
        ]

    def ends(self) -> list[int]:
        return [record.fields["c"] for record in self.said() if record.kind in (Kind.END, Kind.FAIL)]

    def close(self) -> None:
        for process in self._processes:
            end_session(process.pid)
            process.communicate(timeout=PATIENCE_S)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path / "fr-array")
    yield jobs
    jobs.close()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def result_of(record: Record) -> Any:
    body = record.data[record.fields["out"] :]
    assert bytes(body[:1]) == child.RESULT
    return pickle.loads(body[2:])


def error_of(record: Record) -> BaseException:
    assert record.kind == Kind.FAIL
    error = pickle.loads(record.data[record.fields["out"] :])
    assert isinstance(error, BaseException)
    return error


def told_of(jobs: Jobs, kind: Kind, place: int = 0) -> Record:
    (record,) = [one for one in jobs.said() if one.kind == kind and one.fields.get("c") == place]
    return record


def noting(file: Path) -> Callable[[], None]:
    """A call that leaves a line each time that it runs."""
    name = str(file)

    def note() -> None:
        with open(name, "a") as lines:  # noqa: PTH123  a function that travels brings no imports with it
            lines.write("ran\n")

    return note


def killing(number: int) -> Callable[[], None]:
    def kill() -> None:
        os.kill(os.getpid(), number)

    return kill


def test_each_call_is_on_record_before_it_runs_and_before_the_next_one_starts(jobs: Jobs) -> None:
    jobs.give(lambda: 1, lambda: 2)
    jobs.run()
    assert jobs.story() == [("start", 0), ("end", 0), ("start", 1), ("end", 1), ("close", DONE)]
    assert [result_of(told_of(jobs, Kind.END, place)) for place in (0, 1)] == [1, 2]
    assert jobs.said()[0].fields.items() >= {"id": "1_0", "node": "here"}.items()


def test_what_a_call_logs_and_prints_arrives(jobs: Jobs) -> None:
    def speak() -> None:
        import logging

        logging.getLogger("speaker").info("logged")
        logging.getLogger("speaker").debug("below the level")
        print("printed")

    jobs.give(speak)
    jobs.run()
    assert pickle.loads(told_of(jobs, Kind.LOG).data)["msg"] == "logged"
    end = told_of(jobs, Kind.END)
    assert bytes(end.data[: end.fields["out"]]) == b"printed\n"


def test_calls_have_the_context_that_was_sent_with_them(jobs: Jobs) -> None:
    def context() -> Any:
        from fractal_runner.executors.calls import current_context

        return dict(current_context())

    jobs.give(context)
    jobs.run()
    assert result_of(told_of(jobs, Kind.END)) == {"place": "context"}


def test_another_job_for_the_same_work_does_nothing(jobs: Jobs, tmp_path: Path) -> None:
    jobs.give(noting(tmp_path / "runs"))
    jobs.run("1_0")
    before = jobs.story()
    printed = jobs.run("2_0")
    assert "Nothing to do for" in printed
    assert "2_0" in printed
    assert "1_0" in printed
    assert jobs.story() == before
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_of_two_jobs_at_a_time_one_does_the_work(jobs: Jobs, tmp_path: Path) -> None:
    jobs.give(noting(tmp_path / "runs"))
    started = [jobs.start(f"{number}_0") for number in range(4)]
    for process in started:
        process.wait(PATIENCE_S)
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_work_that_is_claimed_for_nobody_is_not_done(jobs: Jobs, tmp_path: Path) -> None:
    jobs.give(noting(tmp_path / "runs"))
    jobs.files.claim_for(0, None, void=True)
    jobs.run()
    assert not (tmp_path / "runs").exists()
    assert not jobs.said()


def test_the_same_job_started_again_goes_on_with_what_has_not_ended(
    jobs: Jobs, gate: Gate, tmp_path: Path
) -> None:
    wait = gate.wait
    jobs.give(noting(tmp_path / "first"), wait, noting(tmp_path / "last"))
    process = jobs.start()
    gate.await_arrivals(1)
    end_session(process.pid)
    process.wait(PATIENCE_S)
    assert jobs.story() == [("start", 0), ("end", 0), ("start", 1)]

    gate.open()
    jobs.run()

    again = [(record.kind, record.fields.get("c")) for record in Tail(jobs.files.records(0, 1)).read()]
    assert again[1:] == [("start", 1), ("end", 1), ("start", 2), ("end", 2), ("close", None)]
    assert (tmp_path / "first").read_text() == (tmp_path / "last").read_text() == "ran\n"


def test_a_call_that_is_started_again_knows_it(jobs: Jobs, gate: Gate) -> None:
    wait = gate.wait

    def attempt() -> int:
        if current_call().attempt == 1:
            wait()
        return current_call().attempt

    jobs.give(attempt, lambda: current_call().attempt)
    process = jobs.start()
    gate.await_arrivals(1)
    end_session(process.pid)
    process.wait(timeout=PATIENCE_S)

    jobs.run()

    ends = [record for record in jobs.said() if record.kind == Kind.END]
    assert [result_of(record) for record in ends] == [2, 1]


def test_a_job_that_has_ended_does_nothing_when_it_is_started_again(jobs: Jobs, tmp_path: Path) -> None:
    jobs.give(noting(tmp_path / "runs"))
    jobs.run()
    jobs.run()
    assert (tmp_path / "runs").read_text() == "ran\n"


@pytest.mark.parametrize(
    ("part", "version"), [("package", "0.0.1"), ("python", "3.7.1")], ids=["package", "python"]
)
def test_a_job_of_other_versions_refuses_and_names_both(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, version: str
) -> None:
    with monkeypatch.context() as patch:
        if part == "package":
            patch.setattr(fractal_runner, "__version__", version)
        else:
            patch.setattr("fractal_runner.executors.batch.payload.PYTHON", version)
        jobs.give(noting(tmp_path / "runs"))
    jobs.run()
    ((kind, _),) = jobs.story()
    assert kind == Kind.REFUSE
    why = jobs.said()[-1].fields["why"]
    assert version in why
    assert fractal_runner.__version__ in why
    assert not (tmp_path / "runs").exists()


def test_a_payload_that_is_missing_ends_the_job(jobs: Jobs) -> None:
    jobs.run()
    ((kind, why),) = jobs.story()
    assert kind == Kind.CLOSE
    assert "the payload is missing" in why
    assert jobs.files.payload in why


def test_a_payload_that_is_damaged_ends_the_job(jobs: Jobs) -> None:
    jobs.give(lambda: 1)
    Path(jobs.files.payload).write_bytes(Path(jobs.files.payload).read_bytes()[:-1])
    jobs.run()
    ((kind, why),) = jobs.story()
    assert kind == Kind.CLOSE
    assert jobs.files.payload in why


def test_a_directory_that_others_may_write_to_is_not_worked_in(jobs: Jobs) -> None:
    jobs.give(lambda: 1)
    Path(jobs.files.directory).chmod(0o777)
    assert "NotOursError" in jobs.run()
    assert not jobs.said()


def test_a_call_that_is_to_be_ended_ends_and_others_go_on(jobs: Jobs, gate: Gate, tmp_path: Path) -> None:
    jobs.give(gate.wait, noting(tmp_path / "next"), noting(tmp_path / "last"))
    process = jobs.start()
    gate.await_arrivals(1)
    jobs.stop(0, 1)
    process.wait(PATIENCE_S)
    assert jobs.story() == [("start", 0), ("fail", 0), ("start", 2), ("end", 2), ("close", DONE)]
    assert error_of(told_of(jobs, Kind.FAIL)).reason == "CANCELLED"  # type: ignore[attr-defined]
    assert not (tmp_path / "next").exists()


def test_a_job_that_is_to_do_nothing_more_ends_all(jobs: Jobs, gate: Gate, tmp_path: Path) -> None:
    jobs.give(gate.wait, gate.wait, noting(tmp_path / "last"), parallel=2)
    process = jobs.start()
    gate.await_arrivals(2)
    jobs.stop()
    process.wait(PATIENCE_S)
    assert sorted(jobs.ends()) == [0, 1]
    assert jobs.story()[-1] == ("close", STOPPED)
    assert not (tmp_path / "last").exists()


def test_what_was_said_before_the_job_began_holds(jobs: Jobs, tmp_path: Path) -> None:
    jobs.give(noting(tmp_path / "first"), noting(tmp_path / "second"))
    jobs.stop(0)
    jobs.run()
    assert not (tmp_path / "first").exists()
    assert (tmp_path / "second").exists()


def test_when_time_is_nearly_over_what_runs_ends_and_nothing_starts(
    jobs: Jobs, gate: Gate, tmp_path: Path
) -> None:
    jobs.give(lambda: 0, gate.wait, noting(tmp_path / "last"))
    process = jobs.start()
    gate.await_arrivals(1)
    os.kill(process.pid, signal.SIGUSR2)
    gate.open()
    process.wait(PATIENCE_S)
    assert jobs.story() == [("start", 0), ("end", 0), ("start", 1), ("end", 1), ("close", DRAINED)]
    assert not (tmp_path / "last").exists()


def test_a_job_whose_time_is_nearly_over_from_the_beginning_does_one_call(
    jobs: Jobs, gate: Gate, tmp_path: Path
) -> None:
    jobs.give(gate.wait, noting(tmp_path / "second"))
    process = jobs.start()
    gate.await_arrivals(1)
    os.kill(process.pid, signal.SIGUSR2)
    time.sleep(0.5)  # nobody tells when the job has noticed
    gate.open()
    process.wait(PATIENCE_S)
    assert jobs.story() == [("start", 0), ("end", 0), ("close", DRAINED)]
    assert not (tmp_path / "second").exists()


def end_all_of(process: subprocess.Popen[str], number: int) -> None:
    """As a scheduler does: every process of the job gets the signal."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == process.pid:
                    os.kill(int(entry.name), number)
            except ProcessLookupError:
                continue


def test_a_job_that_is_ended_says_nothing_of_calls_that_die_of_it(jobs: Jobs, gate: Gate) -> None:
    jobs.give(gate.wait, lambda: 1)
    process = jobs.start()
    gate.await_arrivals(1)
    end_all_of(process, signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert jobs.story() == [("start", 0)]


def test_a_job_that_is_ended_says_nothing_of_calls_whose_programs_die_of_it(
    jobs: Jobs, tmp_path: Path
) -> None:
    flag = str(tmp_path / "here")

    def command() -> None:
        import signal
        import subprocess
        import threading

        main = threading.current_thread()
        assert main is threading.main_thread()
        signal.signal(signal.SIGTERM, lambda *_: None)  # the program alone dies of it
        subprocess.run(["sh", "-c", f"touch {flag}; exec sleep 60"], check=True)

    jobs.give(command)
    process = jobs.start()
    wait_until(lambda: Path(flag).exists(), "the program runs")
    os.kill(process.pid, signal.SIGTERM)
    end_all_of(process, signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert jobs.story() == [("start", 0)]


def test_a_call_that_kills_its_process_takes_no_other_with_it(jobs: Jobs) -> None:
    jobs.give(killing(signal.SIGKILL), lambda: 1)
    jobs.run()
    assert jobs.story() == [("start", 0), ("fail", 0), ("start", 1), ("end", 1), ("close", DONE)]
    error = error_of(told_of(jobs, Kind.FAIL))
    assert error.returncode == -signal.SIGKILL  # type: ignore[attr-defined]
    assert "killed by SIGKILL" in str(error)
