"""In the LSF that tests use goes wrong what a test says, and nothing else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.clusters.lsf import LsfCluster
from tests.clusters.lsf.waiting import is_alive, until_there_is, wait_until

# What goes wrong.


def test_a_quiet_client_says_nothing(lsf: LsfCluster) -> None:
    assert lsf.run("bsub", input="true\n", env={"BSUB_QUIET": "1"}).stdout == ""
    assert len(lsf.jobs()) == 1
    assert lsf.calls("bsub")[0].env == {"BSUB_QUIET": "1"} | _inherited()


def test_noise_stands_around_the_reply(lsf: LsfCluster) -> None:
    lsf.switch("noise", before="hello\n", after="bye\n", stderr="psst\n", count=1)

    said = lsf.run("bsub", input="true\n")

    assert said.stdout == "hello\nJob <1> is submitted to default queue <normal>.\nbye\n"
    assert said.stderr == "psst\n"
    assert lsf.run("bsub", input="true\n").stdout.startswith("Job <2>")


@pytest.mark.parametrize(("how", "returncode"), [("killed", -signal.SIGKILL), ("silent", 255)])
def test_a_lost_reply_leaves_a_job(lsf: LsfCluster, how: str, returncode: int) -> None:
    lsf.switch("lost_reply", how=how, count=1)

    said = lsf.run("bsub", input="true\n", check=False)

    assert (said.stdout, said.stderr, said.returncode) == ("", "", returncode)
    assert len(lsf.jobs()) == 1


def test_a_refusal_is_what_a_test_says(lsf: LsfCluster) -> None:
    lsf.switch("refuse", text="Not today. Job not submitted.\n", count=1)

    assert lsf.run("bsub", input="true\n", check=False).stderr == "Not today. Job not submitted.\n"


@pytest.mark.parametrize("header", [False, True])
def test_bjobs_is_empty_for_a_moment(lsf: LsfCluster, header: bool) -> None:
    job = str(lsf.submit("sleep 60"))
    lsf.switch("bjobs_empty", header=header, count=1)

    said = lsf.run("bjobs", "-w", job)

    assert len(said.stdout.splitlines()) == header
    assert len(lsf.run("bjobs", "-w", job).stdout.splitlines()) == 2


def test_exit_codes_say_the_opposite(lsf: LsfCluster) -> None:
    job = str(lsf.submit("sleep 60"))
    lsf.switch("wrong_exit_codes")

    codes = [
        lsf.run(*command, check=False).returncode
        for command in (("bjobs", job), ("bjobs", "99"), ("bkill", job), ("bkill", "99"))
    ]

    assert codes == [255, 0, 255, 0]


def test_jobs_read_unknown_and_run_on(lsf: LsfCluster, tmp_path: Path) -> None:
    job = lsf.submit("sleep 60")
    lsf.wait_for(job, "RUN")
    lsf.switch("unknown", jobs=[job], count=1)

    states = [lsf.run("bjobs", "-w", str(job)).stdout.splitlines()[1].split()[2] for _ in range(2)]

    assert states == ["UNKWN", "RUN"]


def test_a_failed_job_reads_done(lsf: LsfCluster) -> None:
    lsf.switch("false_done", count=1)

    lsf.wait_for(lsf.submit("kill -9 $$"), "DONE")


@pytest.mark.parametrize("history", [False, True])
def test_jobs_are_forgotten_with_their_end(lsf: LsfCluster, history: bool) -> None:
    lsf.switch("forget", history=history)
    job = lsf.submit("true")
    lsf.wait_for(job, "DONE")

    assert "is not found" in lsf.run("bjobs", "-w", str(job), check=False).stderr
    assert ("No matching" in lsf.run("bhist", "-l", str(job), check=False).stdout) == history


def test_queries_are_limited_and_answers_take_a_while(lsf: LsfCluster) -> None:
    lsf.switch("query_limit", count=1)
    lsf.switch("please_wait", count=1)

    said = lsf.run("bjobs", check=False)
    assert (said.stderr, said.returncode) == ("Batch system concurrent query limit exceeded\n", 255)
    said = lsf.run("bsub", input="true\n")
    assert said.stderr == "LSF is processing your request. Please wait...\n"


def test_nothing_starts(lsf: LsfCluster) -> None:
    lsf.switch("no_dispatch")
    job = lsf.submit("true")
    assert lsf.jobs(job)[0].state == "PEND"

    lsf.clear_faults()

    lsf.wait_for(job, "DONE")


def test_columns_shift_where_a_field_is_empty(lsf: LsfCluster) -> None:
    lsf.switch("shifted_columns")
    job = str(lsf.submit("true", "-H", "-J", "held"))

    assert lsf.run("bjobs", "-w", job).stdout.splitlines()[1].split()[5] == "held"


def test_hosts_may_lack_a_directory(lsf: LsfCluster) -> None:
    lsf.switch("no_directory")

    assert lsf.wait_for(lsf.submit("true"), "DONE")[0].execution_cwd == "/tmp"


def test_there_are_no_other_faults(lsf: LsfCluster) -> None:
    with pytest.raises(ValueError, match="no fault 'weather': there are noise"):
        lsf.switch("weather")
    with pytest.raises(ValueError, match="no settings"):
        lsf.switch("noise", loudness=3)


# Hosts and daemons that fail.


def test_a_lost_host_takes_its_jobs_with_it(lsf: LsfCluster) -> None:
    fails = lsf.submit("setsid -f sleep 60; sleep 60", "-m", "h1")
    comes_back = lsf.submit("sleep 60", "-m", "h1", "-r")
    for job in (fails, comes_back):
        lsf.wait_for(job, "RUN")

    lsf.lose_host("h1", given_up_s=None)

    assert [lsf.jobs(job)[0].state for job in (fails, comes_back)] == ["UNKWN", "UNKWN"]
    lsf.give_up_host("h1")
    assert [lsf.jobs(job)[0].state for job in (fails, comes_back)] == ["EXIT", "PEND"]
    assert re.search(r": Exited\.?$", lsf.run("bjobs", "-l", str(fails)).stdout, re.MULTILINE)
    lsf.restore_host("h1")
    lsf.wait_for(comes_back, "RUN")


def test_jobs_of_a_host_that_was_cut_off_run_on(lsf: LsfCluster, tmp_path: Path) -> None:
    job, ends = (
        lsf.submit("sleep 60", "-m", "h2"),
        lsf.submit(until_there_is(tmp_path / "go") + "; exit 7", "-m", "h2"),
    )
    lsf.wait_for(job, "RUN")
    lsf.wait_for(ends, "RUN")
    runs, ended = (psutil.Process(lsf.jobs(each)[0].pid) for each in (job, ends))
    lsf.lose_host("h2", processes="live", given_up_s=None)
    (tmp_path / "go").touch()
    wait_until(lambda: not is_alive(ended))
    assert is_alive(runs)
    assert lsf.jobs(ends)[0].state == "UNKWN"

    lsf.restore_host("h2")

    assert lsf.wait_for(job, "RUN")
    assert lsf.wait_for(ends, "EXIT")[0].exit_code == 7


def test_a_job_that_was_given_up_can_live_on(lsf: LsfCluster) -> None:
    job = lsf.submit("sleep 60", "-m", "h2", "-r")
    lsf.wait_for(job, "RUN")
    process = psutil.Process(lsf.jobs(job)[0].pid)

    lsf.lose_host("h2", processes="live", given_up_s=0)

    wait_until(lambda: lsf.jobs(job)[0].state == "PEND")
    assert process.is_running()
    lsf.restore_host("h2")
    lsf.wait_for(job, "RUN")
    wait_until(lambda: not is_alive(process))


@pytest.mark.parametrize(
    ("what", "text"), [("mbatchd", "Connection refused by server"), ("all", "LIM is down; try later")]
)
def test_clients_of_a_daemon_that_is_down_fail_or_wait(lsf: LsfCluster, what: str, text: str) -> None:
    lsf.crash(what)

    for command, end in (("bsub", ". Job not submitted.\n"), ("bjobs", "\n")):
        said = lsf.run(command, input="true\n", env={"LSB_NTRIES": "1"}, check=False)
        assert (said.stderr, said.returncode) == (f"Failed in an LSF library call: {text}{end}", 255)
    with _submitting(lsf) as waits:
        assert waits.stderr is not None
        assert re.search("still trying|Please wait", waits.stderr.readline())
        lsf.resume()
        assert waits.wait(30) == 0


def test_what_a_hung_daemon_was_asked_for_is_done_later(lsf: LsfCluster) -> None:
    lsf.configure(reply_timeout_s=0.5)
    lsf.hang()
    said = lsf.run("bsub", "-J", "dup", input="true\n", env={"LSB_NTRIES": "1"}, check=False)
    with _submitting(lsf, "-J", "dup") as waits:
        assert waits.stderr is not None
        waits.stderr.readline()
        waits.kill()

    lsf.resume()

    assert said.stderr == "Failed in an LSF library call: Communication time out. Job not submitted.\n"
    wait_until(lambda: [job.name for job in lsf.jobs()].count("dup") >= 2)


def test_jobs_end_while_the_daemon_is_down(lsf: LsfCluster, tmp_path: Path) -> None:
    job = lsf.submit(until_there_is(tmp_path / "go"))
    lsf.wait_for(job, "RUN")
    lsf.crash()
    (tmp_path / "go").touch()

    lsf.wait_for(job, "DONE")
    lsf.resume()


def _submitting(lsf: LsfCluster, *options: str) -> subprocess.Popen[str]:
    """A bsub that waits for its daemon."""
    process = subprocess.Popen(
        ["bsub", *options],
        env={**os.environ, **lsf.env},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write("true\n")
    process.stdin.close()
    return process


def _inherited() -> dict[str, str]:
    return {name: os.environ[name] for name in ("LC_ALL", "LANG") if name in os.environ}
