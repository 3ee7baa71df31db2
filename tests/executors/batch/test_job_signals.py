"""A job whose script is ours is told by signals, and by its clock, what its scheduler wants of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fractal_runner.executors.batch.job import DONE, DRAINED
from fractal_runner.executors.batch.records import Kind
from fractal_runner.testing import PATIENCE_S, Gate, wait_until
from fractal_runner.worker.spec import UnitResult
from tests.executors.batch.test_job import Jobs

pytestmark = pytest.mark.timeout(120)


class ScriptJobs(Jobs):
    """Jobs that are started as a script starts them."""

    node = ""
    ended_by = "TERM"
    warned_at = ""

    def command(self, id: str, directory: str) -> list[str]:
        program = [sys.executable, "-P", "-m", "fractal_runner.executors.batch"]
        return [*program, directory, "0", id, self.node, self.ended_by, "", self.warned_at]

    def start(self, id: str = "7[1]", directory: str | None = None) -> subprocess.Popen[str]:
        return super().start(id, directory)

    def run(self, id: str = "7[1]") -> str:
        return super().run(id)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[ScriptJobs]:
    jobs = ScriptJobs(tmp_path / "fr-array")
    yield jobs
    jobs.close()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def test_it_says_which_job_it_is_and_where(jobs: ScriptJobs) -> None:
    jobs.node = "host7"
    jobs.give(lambda: os.environ["FRACTAL_RUNNER_NODE"])
    assert jobs.run() == ""
    (said,) = [record for record in jobs.said() if record.kind == Kind.JOB]
    assert (said.fields["id"], said.fields["node"]) == ("7[1]", "host7")
    assert jobs.files.claimed_by(0)["job"] == "7[1]"
    assert jobs.story()[-1] == (Kind.CLOSE, DONE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_each_signal_that_may_end_it_ends_it_without_a_word_about_what_runs(
    jobs: ScriptJobs, gate: Gate, number: int
) -> None:
    jobs.ended_by = "INT,TERM,USR2"
    jobs.give(gate.wait, lambda: None)
    process = jobs.start()
    gate.await_arrivals(1)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 128 + number
    assert jobs.ends() == []
    assert not [record for record in jobs.said() if record.kind == Kind.CLOSE]


def test_a_worker_that_the_scheduler_has_ended_first_is_no_failure_of_its_call(
    jobs: ScriptJobs, gate: Gate
) -> None:
    jobs.ended_by = "INT,TERM,USR2"
    jobs.give(gate.wait)
    process = jobs.start()
    gate.await_arrivals(1)
    (start,) = [record for record in jobs.said() if record.kind == Kind.START]
    os.kill(start.fields["pid"], signal.SIGUSR2)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGUSR2
    assert jobs.ends() == []


def test_a_unit_that_was_interrupted_with_its_job_has_not_failed_by_itself(
    jobs: ScriptJobs, gate: Gate
) -> None:
    """Its command gets the scheduler's signals as well, and may leave with whatever exit code."""
    wait = gate.wait

    def unit() -> UnitResult:
        import signal
        import time

        from fractal_runner.worker.spec import UnitResult

        got: list[int] = []
        signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
        wait()
        deadline = time.monotonic() + 30
        while not got and time.monotonic() < deadline:
            time.sleep(0.01)  # until the signal comes
        time.sleep(0.2)  # as long as a command takes to leave
        return UnitResult(key="unit", returncode=1)

    jobs.ended_by = "INT,TERM"
    jobs.give(unit)
    process = jobs.start()
    gate.await_arrivals(1)
    gate.open()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGINT
    assert jobs.ends() == []


def test_by_its_clock_it_starts_nothing_more_when_time_is_nearly_over(jobs: ScriptJobs, gate: Gate) -> None:
    jobs.warned_at = str(time.time() + 2)
    jobs.give(gate.wait, lambda: None)
    process = jobs.start()
    gate.await_arrivals(1)
    wait_until(lambda: time.time() > float(jobs.warned_at), "its time is nearly over")
    gate.open()
    process.wait(PATIENCE_S)
    assert jobs.ends() == [0]
    assert jobs.story()[-1] == (Kind.CLOSE, DRAINED)


def test_one_that_has_hardly_any_time_does_one_call_all_the_same(jobs: ScriptJobs) -> None:
    jobs.warned_at = "0"
    jobs.give(lambda: None, lambda: None)
    jobs.run()
    assert jobs.ends() == [0]


def test_the_same_job_started_again_goes_on_with_what_has_not_ended(jobs: ScriptJobs, gate: Gate) -> None:
    jobs.ended_by = "INT,TERM"
    jobs.give(lambda: 1, gate.wait)
    process = jobs.start()
    gate.await_arrivals(1)
    process.kill()
    process.wait(PATIENCE_S)
    gate.open()
    jobs.run()
    assert jobs.ends() == [0, 1]


def test_another_job_for_the_same_work_does_nothing(jobs: ScriptJobs) -> None:
    jobs.give(lambda: None)
    jobs.run()
    assert "Nothing to do" in jobs.run("8[1]")
    assert jobs.ends() == [0]
