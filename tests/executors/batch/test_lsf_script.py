"""The script of LSF's jobs, really run by a shell: what the worker is told, and what becomes of its end.

In the worker's place there is a program that writes down how it was started.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.executors.batch.lsf_options import OPTIONS
from fractal_runner.executors.batch.lsf_submission import line_of, script_of, write_script
from fractal_runner.executors.batch.scheduler import JobPlace
from fractal_runner.worker.processes import host_name
from tests.executors.batch.lsf_recorded import array_request

MODULE = "fractal_runner.executors.batch"
DEADLINE_S = 20.0
TOLD = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR2})

# What LSF makes of the line that bsub has read: its shell outlives signals, and hands on the exit code.
JOB_FILE = """\
#!/bin/sh
$LSB_TRAPSIGS
# LSBATCH: User input
{line}
ExitStat=$?
wait
# LSBATCH: End user input
true
exit `expr $? "|" $ExitStat`
"""

# It does what its environment says: leave with a code, or take signals until it may end.
WORKER = f"""\
#!{sys.executable} -IS
import json, os, signal, sys, time
place = os.path.dirname(__file__)
seen = {{"words": sys.argv[1:], "environment": dict(os.environ)}}
seen |= {{"cwd": os.getcwd(), "stdin": sys.stdin.read()}}
if os.environ.get("WORKER_WAITS"):
    def told(number, frame):
        print("told", number, flush=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, told)
with open(os.path.join(place, "seen.new"), "w") as file:
    json.dump(seen, file)
os.rename(os.path.join(place, "seen.new"), os.path.join(place, "seen.json"))
print("worker's output", flush=True)
print("worker's errors", file=sys.stderr, flush=True)
end = time.monotonic() + {DEADLINE_S}
while os.environ.get("WORKER_WAITS") and not os.path.exists(os.path.join(place, "end")):
    if time.monotonic() > end:
        sys.exit(99)
    time.sleep(0.01)  # nothing else is told by the test that it may end
sys.exit(int(os.environ.get("WORKER_CODE", "0")))
"""


class Site:
    """A host of a cluster, with an array's directory and a worker that takes notes."""

    def __init__(self, top: Path) -> None:
        self.directory = top / "we ird'$x;y"
        self.workplace = top / "work place"
        self.bin = top / "b in"
        for place in (self.directory, self.workplace, self.bin):
            place.mkdir()
        self.python = self.bin / "python"
        self.python.write_text(WORKER)
        self.python.chmod(0o755)
        self.top = top
        self.job_file = top / "1795219731.12.3"

    def submit(self, *, time: float | None = None, **extra: Any) -> None:
        request = array_request(self.directory, time=time)
        write_script(request, script_of(request, OPTIONS.parse(extra), python=str(self.python)))
        self.job_file.write_text(JOB_FILE.format(line=line_of(request)))

    def use(self, shell: str) -> None:
        """Have the host's /bin/sh be this one."""
        self.job_file.write_text(self.job_file.read_text().replace("/bin/sh", shell))

    def environment(self, **variables: str | None) -> dict[str, str]:
        """What LSF sets for element 3 of array 12, and what a test wants besides."""
        lsfs = {"LSB_JOBID": "12", "LSB_JOBINDEX": "3", "LSB_HOSTS": "n1.site n1.site n2.site"}
        lsfs["LSB_TRAPSIGS"] = "trap # 15 10 12 2 1"
        wanted = {"PATH": os.environ["PATH"], "HOME": str(self.top), **lsfs, **variables}
        return {name: value for name, value in wanted.items() if value is not None}

    def run(self, **variables: str | None) -> int:
        """The job's exit code."""
        return subprocess.run(
            ["/bin/sh", self.job_file],
            env=self.environment(**variables),
            cwd="/",
            input=b"what is nobody's to read",
            timeout=DEADLINE_S,
            check=False,
        ).returncode

    @contextmanager
    def running(self, **variables: str | None) -> Iterator[subprocess.Popen[bytes]]:
        """The job as LSF starts one, with a group of processes of its own; its worker runs already."""
        with subprocess.Popen(
            ["/bin/sh", self.job_file],
            env=self.environment(**variables),
            cwd="/",
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        ) as shell:
            try:
                until((self.bin / "seen.json").exists)
                yield shell
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)

    @property
    def seen(self) -> Any:
        return json.loads((self.bin / "seen.json").read_text())

    @property
    def log(self) -> str:
        return (self.directory / "job-2.log").read_text()


def until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)  # other processes are at work, and tell nobody


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path)
    monkeypatch.chdir(site.workplace)
    return site


# What the worker is told.


def test_the_worker_is_told_its_number_its_id_and_its_host(site: Site) -> None:
    site.submit()
    assert site.run() == 0
    assert site.seen["words"] == [
        *("-u", "-P", "-m", MODULE, str(site.directory), "2"),
        *("12[3]", "n1.site", "INT,TERM,USR2", "", ""),
    ]


def test_the_worker_is_told_when_its_time_will_be_over(site: Site) -> None:
    site.submit(time=3600)
    assert site.run() == 0
    assert 0 < float(site.seen["words"][-1]) - time.time() < 3600


@pytest.mark.parametrize("hosts", [None, "", "n1"])
def test_lsf_may_name_one_host_or_none(hosts: str | None, site: Site) -> None:
    site.submit()
    assert site.run(LSB_HOSTS=hosts) == 0
    assert site.seen["words"][7] == (hosts or "")


def test_the_job_runs_where_it_was_submitted_and_reads_nothing(site: Site) -> None:
    site.submit()
    assert site.run() == 0
    assert (site.seen["cwd"], site.seen["stdin"]) == (str(site.workplace), "")


def test_a_host_without_that_directory_says_so_and_runs_the_job(site: Site) -> None:
    site.submit()
    site.workplace.rmdir()
    assert site.run() == 0
    assert f"{site.workplace} is not there on this host: the job runs in {site.directory}" in site.log
    assert site.seen["cwd"] == str(site.directory)


def test_a_directory_that_is_gone_at_the_submission_already_is_not_looked_for(site: Site) -> None:
    site.workplace.rmdir()
    site.submit()
    assert site.run() == 0
    assert site.seen["cwd"] == str(site.directory)
    assert "is not there" not in site.log


ODD_VALUES = {
    "PLAIN": "5",
    "SPACES": "a  b",
    "QUOTES": "a'b\"c",
    "SHELL": "$(id);`id`;$HOME && x | y > z",
    "BACKSLASH": "a\\nb\\",
    "STAR": "*",
    "EMPTY": "",
    "UMLAUT": "ä",
    "DASH": "-x",
}


@pytest.mark.parametrize("option", ["env", "user_local_exports"])
def test_variables_arrive_as_they_are(option: str, site: Site) -> None:
    extra: dict[str, Any] = {option: ODD_VALUES}
    site.submit(**extra)
    assert site.run() == 0
    assert ODD_VALUES.items() <= site.seen["environment"].items()


def test_a_calls_own_exports_count_over_the_variables_of_all(site: Site) -> None:
    site.submit(env={"A": "all", "B": "all"}, user_local_exports={"A": "own"})
    assert site.run() == 0
    assert (site.seen["environment"]["A"], site.seen["environment"]["B"]) == ("own", "all")


def test_setup_comes_after_the_variables_and_before_the_worker(site: Site) -> None:
    site.submit(
        env={"A": "1"},
        setup=["export A=$A$A", "echo set up"],
        pre_submission_commands=["export A=$A-", "echo then this"],
    )
    assert site.run() == 0
    assert site.seen["environment"]["A"] == "11-"
    assert site.log.splitlines()[:3] == ["set up", "then this", "worker's output"]


def test_setup_that_fails_is_in_the_log_and_ends_nothing(site: Site) -> None:
    site.submit(setup=["no-such-command-of-a-site", "false"])
    assert site.run() == 0
    assert "no-such-command-of-a-site" in site.log
    assert "worker's output" in site.log


def test_setup_may_go_elsewhere(site: Site) -> None:
    site.submit(setup=["cd /"])
    assert site.run() == 0
    assert (site.seen["cwd"], site.seen["words"][4]) == ("/", str(site.directory))


# What becomes of it.


def test_all_that_a_job_prints_is_in_its_log(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.submit(setup=["echo set up", "echo trouble >&2"], teardown=["echo torn down"])
    assert site.run() == 0
    assert capfd.readouterr() == ("", "")
    lines = ["set up", "trouble", "worker's output", "worker's errors", "torn down"]
    assert site.log.splitlines() == lines


def test_a_job_that_runs_again_adds_to_its_log(site: Site) -> None:
    site.submit()
    assert (site.run(), site.run()) == (0, 0)
    assert site.log.count("worker's output") == 2


@pytest.mark.parametrize("code", [0, 1, 7, 99, 130, 255])
def test_the_workers_exit_code_is_the_jobs(code: int, site: Site) -> None:
    site.submit()
    assert site.run(WORKER_CODE=str(code)) == code


def test_teardown_follows_and_keeps_the_exit_code(site: Site) -> None:
    site.submit(teardown=["echo torn down", "false"])
    assert site.run(WORKER_CODE="7") == 7
    assert site.log.splitlines()[-1] == "torn down"


def test_a_worker_that_is_not_there_is_an_end_that_the_log_explains(site: Site) -> None:
    site.submit(teardown=["echo torn down"])
    site.python.unlink()
    assert site.run() == 127
    assert str(site.python) in site.log
    assert "torn down" in site.log


@pytest.mark.parametrize("index", [None, "", "0"])
def test_an_array_that_lsf_has_taken_as_a_plain_job_runs_nothing(index: str | None, site: Site) -> None:
    site.submit(teardown=["touch torn-down"])
    assert site.run(LSB_JOBINDEX=index) == 1
    assert (site.directory / "job-0.log").read_text() == "LSF has taken the array as one plain job\n"
    assert not (site.bin / "seen.json").exists()


def test_a_host_without_the_arrays_directory_runs_nothing(site: Site) -> None:
    site.submit()
    site.directory.rename(site.top / "elsewhere")
    assert site.run() != 0
    assert not (site.bin / "seen.json").exists()


def test_a_script_whose_directory_is_not_there_runs_nothing(site: Site) -> None:
    site.submit()
    copy = shutil.move(site.directory / "job.sh", site.top / "copy.sh")
    site.directory.rmdir()
    site.job_file.write_text(JOB_FILE.format(line=f"/bin/sh {shlex.quote(str(copy))}"))
    assert site.run() != 0
    assert not (site.bin / "seen.json").exists()


# What LSF tells a job.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("program", ["/bin/sh", "bash --posix"])
def test_a_signal_to_all_of_a_job_leaves_the_end_to_the_worker(
    program: str, number: signal.Signals, site: Site
) -> None:
    site.submit(teardown=["echo torn down"])
    site.use(program)
    with site.running(WORKER_WAITS="1", WORKER_CODE="7") as shell:
        os.killpg(shell.pid, number)
        until(lambda: f"told {number:d}" in site.log)
        assert shell.poll() is None
        (site.bin / "end").touch()
        assert shell.wait(DEADLINE_S) == 7
    assert site.log.splitlines()[-1] == "torn down"


def test_bkills_signals_one_after_the_other_leave_the_end_to_the_worker(site: Site) -> None:
    site.submit()
    with site.running(WORKER_WAITS="1", WORKER_CODE="3") as shell:
        os.killpg(shell.pid, signal.SIGINT)
        until(lambda: "told 2" in site.log)
        os.killpg(shell.pid, signal.SIGTERM)
        until(lambda: "told 15" in site.log)
        (site.bin / "end").touch()
        assert shell.wait(DEADLINE_S) == 3


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143), ("USR2", 140)])
def test_after_a_signal_during_the_setup_there_is_no_worker(name: str, code: int, site: Site) -> None:
    site.submit(setup=[f"kill -{name} $$", "echo set up"])
    assert site.run(WORKER_CODE="4") == code
    assert site.log.splitlines() == ["set up"]
    assert not (site.bin / "seen.json").exists()


# What the worker's program makes of it.


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], list[Any]]:
    """Runs `python -m` with these words; what `run_job` was called with."""

    def run(words: Sequence[str]) -> list[Any]:
        ran: list[Any] = []
        monkeypatch.setattr("fractal_runner.executors.batch.job.run_job", lambda *said: ran.append(said))
        monkeypatch.setattr(sys, "argv", ["x", *words])
        monkeypatch.setattr(os, "_exit", lambda _: None)  # its last word, which is for a process of its own
        runpy.run_module(MODULE, run_name="__main__")
        return ran

    return run


def test_the_program_understands_the_script(site: Site, start: Callable[[Sequence[str]], list[Any]]) -> None:
    site.submit(time=600)
    assert site.run() == 0
    place = JobPlace(
        "12[3]", "n1.site", ended_by=TOLD, warned_by=frozenset(), warned_at=float(site.seen["words"][-1])
    )
    assert start(site.seen["words"][4:]) == [(str(site.directory), 2, place)]


def test_the_program_knows_its_host_by_itself(start: Callable[[Sequence[str]], list[Any]]) -> None:
    place = JobPlace("9[1]", host_name(), warned_by=frozenset())
    assert start(["/d", "0", "9[1]", "", "TERM", "", ""]) == [("/d", 0, place)]


def test_a_program_may_be_warned_by_signals(start: Callable[[Sequence[str]], list[Any]]) -> None:
    [(_, _, place)] = start(["/d", "0", "9[1]", "", "TERM", "USR2,XCPU", ""])
    assert place.warned_by == {signal.SIGUSR2, signal.SIGXCPU}
