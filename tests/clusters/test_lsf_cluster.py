"""The LSF that tests use gives the recorded answers, and runs jobs as tests rely on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.clusters.lsf import LsfCluster, LsfFailed
from tests.clusters.lsf.fixtures import Watch
from tests.clusters.lsf.replay import Answer, Exchange, exchanges, replay
from tests.clusters.lsf.waiting import is_alive, wait_until

# What was recorded.


@pytest.fixture(scope="module")
def replayed() -> Iterator[Callable[[Exchange], Answer]]:
    """The answers of now: each exchange needs those before it, so that all up to it are replayed."""
    answers: dict[int, Answer] = {}
    with replay() as cluster:

        def answer(wanted: Exchange) -> Answer:
            for exchange in exchanges()[len(answers) : wanted.number]:
                answers[exchange.number] = cluster.answer(exchange)
            return answers[wanted.number]

        yield answer


@pytest.mark.parametrize("exchange", exchanges(), ids=str)
def test_the_recorded_answer_comes_again(exchange: Exchange, replayed: Callable[[Exchange], Answer]) -> None:
    assert replayed(exchange) == exchange.answer


# What jobs go through.


def test_a_job_runs_where_it_was_submitted_and_writes_its_report(lsf: LsfCluster, tmp_path: Path) -> None:
    job = lsf.submit("pwd; echo $LSB_JOBID; exit 3", "-o", "%J.out", cwd=tmp_path)

    assert lsf.wait_for(job, "EXIT")[0].exit_code == 3
    text = (tmp_path / f"{job}.out").read_text()
    assert text.startswith("Sender: LSF System <")
    assert "\nExited with exit code 3.\n" in text
    assert text.endswith(f"The output (if any) follows:\n\n{tmp_path}\n{job}\n")


def test_options_stand_in_the_script_and_are_overridden(lsf: LsfCluster) -> None:
    job = lsf.submit("#!/bin/sh\n#BSUB -J embedded -q requeue\n#BSUB -W 5\ntrue", "-q", "short")

    [seen] = lsf.wait_for(job, "DONE")
    assert (seen.name, seen.queue) == ("embedded", "short")


def test_a_script_runs_with_its_own_interpreter(lsf: LsfCluster, tmp_path: Path) -> None:
    lsf.wait_for(lsf.submit(f"#!{sys.executable}\nopen({str(tmp_path / 'x')!r}, 'w')"), "DONE")

    assert (tmp_path / "x").exists()


def test_jobs_wait_for_slots(lsf: LsfCluster) -> None:
    first = [lsf.submit("sleep 60", "-n", "4") for _ in lsf.hosts]
    waits = lsf.submit("true")
    for job in first:
        lsf.wait_for(job, "RUN")

    assert lsf.jobs(waits)[0].state == "PEND"
    lsf.run("bkill", str(first[0]))
    lsf.wait_for(waits, "DONE")


def test_an_array_runs_so_many_at_a_time(lsf: LsfCluster) -> None:
    job = lsf.submit("sleep 60", "-J", "sim[1-3,7]%2")

    wait_until(lambda: [each.state for each in lsf.jobs(job)].count("RUN") == 2)
    assert [each.name for each in lsf.jobs(job)] == ["sim[1]", "sim[2]", "sim[3]", "sim[7]"]
    lsf.run("bkill", f"{job}[1-2]")
    wait_until(lambda: [each.state for each in lsf.jobs(job)] == ["EXIT", "EXIT", "RUN", "RUN"])


def test_a_job_waits_for_another(lsf: LsfCluster) -> None:
    first = lsf.submit("true", "-H")
    second = lsf.submit("true", "-w", f"done({first})")

    assert [lsf.jobs(job)[0].state for job in (first, second)] == ["PSUSP", "PEND"]
    lsf.run("bresume", str(first))
    lsf.wait_for(second, "DONE")


def test_a_kill_reaches_all_processes_whatever_they_ignore(lsf: LsfCluster, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"trap '' INT TERM; setsid sleep 60 & echo $! $$ > {pids}.new; mv {pids}.new {pids}; sleep 60"
    job = lsf.submit(script)
    wait_until(pids.exists)
    left = [psutil.Process(int(pid)) for pid in pids.read_text().split()]

    lsf.run("bkill", str(job))

    lsf.wait_for(job, "EXIT")
    wait_until(lambda: not any(is_alive(process) for process in left))


def test_at_its_run_limit_a_job_is_told(lsf: LsfCluster) -> None:
    job = lsf.submit("sleep 60", "-W", "0:01")

    assert lsf.wait_for(job, "EXIT")[0].exit_code == 140


def test_who_ignores_the_run_limit_is_killed_by_ibms_alone(lsf: LsfCluster) -> None:
    lsf.configure(minute_s=0.2, kill_after_s=0.2)
    job = lsf.submit("trap '' USR2; sleep 2", "-W", "1")

    [seen] = lsf.wait_for(job, "EXIT", "DONE")

    assert (seen.state, seen.exit_code) == (("EXIT", 137) if lsf.dialect == "ibm" else ("DONE", None))


def test_who_takes_too_much_memory_is_killed(lsf: LsfCluster) -> None:
    job = lsf.submit("tail /dev/zero", "-M", "40000" if lsf.dialect == "ibm" else "40")

    assert lsf.wait_for(job, "EXIT")[0].reason == "TERM_MEMLIMIT"


def test_a_requeued_job_runs_again_with_its_id(lsf: LsfCluster) -> None:
    job = lsf.submit("sleep 60")
    lsf.wait_for(job, "RUN")

    lsf.run("brequeue", str(job))

    wait_until(lambda: lsf.jobs(job)[0].starts == 2)
    assert lsf.wait_for(job, "RUN")


def test_a_missing_directory_is_tmp_silently(lsf: LsfCluster, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    job = lsf.submit("true", "-H", cwd=gone)
    gone.rmdir()

    lsf.run("bresume", str(job))

    assert lsf.wait_for(job, "DONE")[0].execution_cwd == "/tmp"


def test_what_ended_long_ago_is_in_the_history_alone(lsf: LsfCluster) -> None:
    lsf.configure(clean_period_s=0)
    job = lsf.submit("true")
    wait_until(lambda: lsf.jobs(job)[0].is_forgotten)

    assert "is not found" in lsf.run("bjobs", "-w", str(job), check=False).stderr
    assert "Done successfully" in lsf.run("bhist", "-l", str(job)).stdout


def test_ids_begin_again_and_those_of_forgotten_jobs_are_given_to_others(lsf: LsfCluster) -> None:
    kept = lsf.submit("sleep 60")
    lsf.set_next_id(20, max_id=20)

    assert [kept, lsf.submit("true"), lsf.submit("true")] == [1, 20, 2]


def test_closed_queues_and_large_requests_are_refused(lsf: LsfCluster) -> None:
    for options, text in {
        ("-q", "closed"): "closed: Queue has been closed. Job not submitted.",
        ("-n", "17"): "Too many processors requested. Job not submitted.",
        ("-W", "soon"): "soon: Bad RUNLIMIT specification. Job not submitted.",
    }.items():
        with pytest.raises(LsfFailed, match=re.escape(text)):
            lsf.submit("true", *options)


# What tests look at, and what they leave.


def test_calls_are_recorded(lsf: LsfCluster) -> None:
    lsf.run("bsub", "-J", "x", input="true\n", env={"LSB_NTRIES": "5"})
    lsf.run("bjobs", "99", check=False)

    submitted, asked = lsf.calls()

    assert (submitted.program, submitted.argv, submitted.stdin) == ("bsub", ("-J", "x"), 5)
    assert (submitted.env["LSB_NTRIES"], submitted.returncode, asked.returncode) == ("5", 0, 255)
    assert lsf.calls("bjobs") == [asked]
    lsf.reset()
    assert lsf.calls() == []


@pytest.mark.parametrize("ids", [(), ("-J", "x"), ("0",)])
def test_ending_all_jobs_is_a_violation(lsf: LsfCluster, ids: tuple[str, ...]) -> None:
    job = lsf.submit("sleep 60", "-J", "x")

    lsf.run("bkill", *ids)

    lsf.wait_for(job, "EXIT")
    assert lsf.violations() == [f"bkill without the id of a job: {list(ids)}"]
    lsf.reset()
    assert len(lsf.violations()) == 1
    with pytest.raises(pytest.fail.Exception, match="bkill without the id of a job"):
        Watch(lsf).check()  # as at the end of each test
    assert not lsf.violations()


def test_a_reset_leaves_no_jobs(lsf: LsfCluster) -> None:
    job = lsf.submit("trap '' INT TERM; setsid -f sleep 60; sleep 60")
    lsf.wait_for(job, "RUN")
    process = psutil.Process(lsf.jobs(job)[0].pid)
    lsf.lose_host("h1")
    lsf.hang()

    lsf.reset()

    assert not lsf.jobs()
    assert not is_alive(process)
    lsf.wait_for(lsf.submit("true", "-m", "h1"), "DONE")


def test_nothing_is_left_of_a_cluster_that_was_stopped() -> None:
    before = set(psutil.Process().children(recursive=True))
    with LsfCluster() as cluster:
        job = cluster.submit("setsid -f sleep 60; trap '' TERM; sleep 60")
        cluster.wait_for(job, "RUN")
        there = set(psutil.Process().children(recursive=True)) - before

    assert len(there) >= 4
    assert not [process for process in there if process.is_running()]
    assert not cluster.directory.exists()


def test_nothing_is_left_of_a_cluster_whose_owner_was_killed(top: Path) -> None:
    program = """
import sys
from tests.clusters.lsf import LsfCluster
cluster = LsfCluster()
cluster.start()
cluster.wait_for(cluster.submit("setsid -f sleep 60; sleep 60"), "RUN")
print(cluster.directory, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=top, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip())
        assert directory.exists()
        there = psutil.Process(owner.pid).children(recursive=True)

        owner.send_signal(signal.SIGKILL)

    wait_until(lambda: not directory.exists())
    wait_until(lambda: not [process for process in there if process.is_running()])


def test_a_directory_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    directory = Path(f"/tmp/fr-lsf-used-{os.getpid()}")
    directory.mkdir()
    try:
        (directory / "precious").touch()

        with pytest.raises(ValueError, match="is not empty"):
            LsfCluster(directory).start()

        assert (directory / "precious").exists()
    finally:
        shutil.rmtree(directory)
    with pytest.raises(ValueError, match="short names"):
        LsfCluster(tmp_path / ("long" * 20)).start()


def test_a_cluster_can_be_had_by_hand(top: Path) -> None:
    directory = Path(f"/tmp/fr-lsf-hand-{os.getpid()}")
    command = [sys.executable, "-m", "tests.clusters.lsf", "--directory", str(directory)]

    def by_hand(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            cwd=top,
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert f"export LSF_ENVDIR={directory}\n" in by_hand("start", "--dialect", "ibm").stdout
    try:
        assert "running already" in by_hand("start").stderr
        assert "IBM Spectrum LSF" in by_hand("shell", text="lsid").stdout
    finally:
        stopped = by_hand("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert not directory.exists()
    assert "not running" in by_hand("stop").stderr
