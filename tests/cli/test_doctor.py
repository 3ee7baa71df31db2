"""`fractal-runner doctor`: executors of this machine and of others, and what its findings say."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fractal_runner import __version__, register
from fractal_runner.cli.app import app
from fractal_runner.cli.diagnosis import (
    Finding,
    Kind,
    Section,
    Setting,
    of_clock,
    of_cluster,
    of_directory,
    of_worker,
)
from fractal_runner.executors import plugins
from fractal_runner.executors.batch.limits import Bound, MemoryUnits, Queue, SiteLimits
from fractal_runner.executors.probing import Seen

Here = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """Runs doctor in this process, in tmp_path, where nothing is configured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(plugins, "_registered", {})
    yield lambda *words: CliRunner().invoke(app, ["doctor", *map(str, words)])


def said(answer: Result) -> str:
    return " ".join(answer.output.replace("│", " ").split())


# Executors, tried for real.


def test_of_threads_it_says_that_they_are_of_this_process(here: Here, tmp_path: Path) -> None:
    answer = here()

    assert answer.exit_code == 0, answer.output
    assert "Executor thread (" in answer.output
    assert "ok the probe ran in this process, which may use" in said(answer)
    assert f"ok fractal_runner {__version__} on the worker, as here" in said(answer)
    assert "ok its clock is ours" in said(answer)
    assert said(answer).endswith("No problems found.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["serial", "process"])
def test_others_of_this_machine_are_well(here: Here, name: str) -> None:
    answer = here("--executor", name)

    assert answer.exit_code == 0, answer.output
    where = "in this process" if name == "serial" else "on this machine, in process"
    assert f"ok the probe ran {where}" in said(answer)
    assert "ok the worker sees what is written in" in said(answer)


def test_it_is_the_executor_of_the_configuration_in_the_directory_of_runs(here: Here, tmp_path: Path) -> None:
    (tmp_path / ".fractal-runner").mkdir()
    (tmp_path / ".fractal-runner" / "config.yaml").write_text("executor: spawn\n")
    runs = tmp_path / "runs"
    runs.mkdir()

    answer = here("--directory", runs)

    assert answer.exit_code == 0, answer.output
    assert f"Executor spawn ({tmp_path}/.fractal-runner/config.yaml:1), with a run in {runs}" in said(answer)
    assert list(runs.iterdir()) == []


def test_what_others_have_written_is_tried_by_one_call(here: Here) -> None:
    register("pool", lambda: ThreadPoolExecutor(1))

    answer = here("--executor", "pool")

    assert answer.exit_code == 0, answer.output
    assert "ok the probe ran in this process" in said(answer)


class Never(Executor):
    """Takes calls, and does nothing with them."""

    def __init__(self) -> None:
        self.taken: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.taken.append(Future())
        return self.taken[-1]


def test_a_call_that_does_not_start_is_cancelled(here: Here) -> None:
    never = Never()
    register("never", lambda: never)

    answer = here("--executor", "never", "--timeout", "0.3s")

    assert answer.exit_code == 3
    assert "problem the probe has not started within 0.3 s" in said(answer)
    assert said(answer).endswith("1 problem(s).")
    assert [future.cancelled() for future in never.taken] == [True]


def test_an_executor_that_takes_no_calls_is_told(here: Here) -> None:
    class Full(Never):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            raise RuntimeError("the queue is full")

    register("full", Full)

    answer = here("--executor", "full")

    assert answer.exit_code == 3
    assert "problem the probe cannot be submitted: RuntimeError: the queue is full" in said(answer)


def test_a_call_that_fails_is_told_with_its_error(here: Here) -> None:
    class Failing(Never):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            future = super().submit(fn)
            future.set_exception(OSError("no more licences\nask Mona"))
            return future

    register("failing", Failing)

    answer = here("--executor", "failing")

    assert answer.exit_code == 3
    assert "problem OSError: no more licences ask Mona" in said(answer)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--executor", "slrm"), "there is no executor 'slrm': did you mean 'slurm'?"),
        (("--executor", "process", "--executor-opt", "max_worker=2"), "did you mean 'max_workers'?"),
        (("--timeout", "soon"), "'soon' is not a time: write '01:30:00'"),
        (("--executor", "slurm"), "the executor 'slurm' cannot be used here: no sbatch on PATH"),
        (("--directory", "file/runs"), "file/runs: no run could be there: Not a directory"),
    ],
)
def test_what_cannot_be_tried_is_said(
    here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "file").touch()

    answer = here(*words)

    assert answer.exit_code == 2
    assert expected in said(answer)


# What findings say.

SECTION = Section(("slurm",), frozenset({"python", "max_array", "max_jobs", "max_time", "partition"}))
SEEN = Seen(
    python="3.11.2",
    implementation="CPython",
    executable="/usr/bin/python3",
    version=__version__,
    place="/opt/fractal_runner",
    import_problem="",
    host="n1",
    node="",
    pid=7,
    boot_id="another",
    cpus=4,
    directory_problem="",
    is_seen_here=True,
    is_answered=True,
    ahead_s=(-0.2, 0.1),
    start_s=3,
    seconds=4,
)
HERE = ".".join(map(str, sys.version_info[:3]))


def worker(**changes: Any) -> dict[str, Finding]:
    place, python, package = of_worker(replace(SEEN, **{"python": HERE, **changes}), SECTION)
    return {"place": place, "python": python, "package": package}


def test_another_minor_version_of_python_is_a_problem_and_another_patch_is_none() -> None:
    assert worker()["python"].kind is Kind.OK

    minor = ".".join(map(str, sys.version_info[:2]))
    assert worker(python=f"{minor}.99")["python"].kind is Kind.NOTE

    other = worker(python="3.9.1")["python"]
    assert other.kind is Kind.PROBLEM
    assert f"CPython 3.9.1 on the worker (/usr/bin/python3), and CPython {HERE} here" in other.text
    assert f": set slurm.python to the path of a Python {minor} that has fractal_runner" in other.text


def test_another_fractal_runner_is_a_problem_and_none_as_well() -> None:
    assert worker()["package"].kind is Kind.OK

    other = worker(version="0.0.1")["package"]
    assert other.kind is Kind.PROBLEM
    assert f"fractal_runner 0.0.1 on the worker (/opt/fractal_runner), and {__version__} here" in other.text

    none = worker(version="", import_problem="ModuleNotFoundError: No module named 'x'")["package"]
    assert none.kind is Kind.PROBLEM
    assert "cannot be imported on the worker (/usr/bin/python3): ModuleNotFoundError" in none.text


def test_an_executor_without_such_an_option_is_not_told_to_set_it() -> None:
    found = list(of_worker(replace(SEEN, python="3.9.1"), Section(("ray",), frozenset({"address"}))))

    assert not any("set ray.python" in finding.text for finding in found)


def test_it_says_where_the_worker_is() -> None:
    assert "ran on n1, in process 7, which may use 4 CPU(s): it started after 3.0 s" in worker()["place"].text
    assert "ran on n1 (node c-01), in" in worker(node="c-01")["place"].text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"directory_problem": "No such file or directory"}, "does not see the run's directory"),
        ({"is_seen_here": False}, "was not seen here"),
        ({"is_answered": False}, "was not seen by the worker within 10 s"),
    ],
)
def test_a_file_system_that_is_not_shared_is_a_problem(changes: Any, expected: str) -> None:
    assert of_directory(SEEN, Path("/data/runs/one")).kind is Kind.OK

    found = of_directory(replace(SEEN, **changes), Path("/data/runs/one"))

    assert found.kind is Kind.PROBLEM
    assert expected in found.text
    assert "/data/runs" in found.text


@pytest.mark.parametrize(
    ("ahead", "kind", "expected"),
    [
        ((-0.2, 0.1), Kind.OK, "its clock goes with ours, to 0.2 s"),
        ((40.0, 41.0), Kind.PROBLEM, "its clock is 40 s ahead of ours"),
        ((-3661.0, -3660.0), Kind.PROBLEM, "its clock is 1:01:00 h behind ours"),
        ((-100.0, 2.0), Kind.OK, "to 1:40 min"),  # nobody knows: it has waited for so long
    ],
)
def test_clocks_that_surely_differ_are_a_problem(
    ahead: tuple[float, float], kind: Kind, expected: str
) -> None:
    found = of_clock(replace(SEEN, ahead_s=ahead))

    assert found.kind is kind
    assert expected in found.text


SETTING = Setting(scheduler="SLURM", max_array=1000, max_jobs=1000)
MAIN = Queue("main", "UP", is_default=True)


def cluster(*, site: SiteLimits, **changes: Any) -> list[Finding]:
    return list(of_cluster(replace(SETTING, **changes), site, SECTION))


def bad(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.kind is not Kind.OK]


def test_an_array_that_is_larger_than_the_site_allows_is_a_problem() -> None:
    site = SiteLimits(max_array=Bound(101, "MaxArraySize", "scontrol show config"))

    [found] = bad(cluster(site=site))

    assert found.kind is Kind.PROBLEM
    assert "up to 1000 jobs are put into an array, and the site allows 101: MaxArraySize 101" in found.text
    assert found.write == {"max_array": "101"}


def test_an_array_may_be_as_large_as_the_site_allows() -> None:
    for size in (1000, 4000):
        assert bad(cluster(site=SiteLimits(max_array=Bound(size, "MaxArraySize", "scontrol")))) == []

    [noted] = bad(cluster(site=SiteLimits()))
    assert noted.kind is Kind.NOTE
    assert "set slurm.max_array to what the site allows, if that is fewer" in noted.text


def test_more_jobs_than_this_user_may_have_are_a_problem() -> None:
    site = SiteLimits(
        max_array=Bound(1000, "a", "b"),
        max_submitted=Bound(500, "MaxSubmitJobs of account lab", "sacctmgr"),
        max_running=Bound(20, "MaxJobs of account lab", "sacctmgr"),
    )

    [found] = bad(cluster(site=site))

    assert found.kind is Kind.PROBLEM
    assert "max_jobs is 1000, and this user may have 500 in the queue" in found.text
    assert "20 run at a time: MaxJobs of account lab 20 (sacctmgr)" in found.text
    assert found.write == {"max_jobs": "500"}


@pytest.mark.parametrize(
    ("queue", "queues", "expected"),
    [
        ("mian", (MAIN,), "there is no partition 'mian': did you mean 'main'?"),
        (
            "closed",
            (MAIN, Queue("closed", "INACTIVE", is_open=False)),
            "the partition closed takes no jobs, it is INACTIVE",
        ),
        (None, (Queue("main", "UP"),), "there is no default partition, and jobs name none"),
    ],
)
def test_a_partition_that_takes_no_jobs_is_a_problem(
    queue: str | None, queues: tuple[Queue, ...], expected: str
) -> None:
    site = SiteLimits(max_array=Bound(1000, "a", "b"), queues=queues, names_default=True)

    [found] = bad(cluster(site=site, queue=queue))

    assert found.kind is Kind.PROBLEM
    assert expected in found.text


def test_a_partition_with_a_time_limit_is_to_bound_what_jobs_ask_for() -> None:
    site = SiteLimits(
        max_array=Bound(1000, "a", "b"), queues=(replace(MAIN, max_time=86400.0),), names_default=True
    )

    [noted] = bad(cluster(site=site))
    assert (noted.kind, noted.write) == (Kind.NOTE, {"max_time": '"24:00:00"'})
    assert bad(cluster(site=site, max_time=86400.0)) == []

    [found] = bad(cluster(site=site, time=90000.0))
    assert found.kind is Kind.PROBLEM
    assert "a call asks for 25:00:00 h, and would wait for ever or be refused" in found.text


def test_memory_in_another_unit_than_the_site_s_is_a_problem() -> None:
    section = Section(("lsf",), frozenset({"memory_unit"}))
    units = MemoryUnits("KB and MB", "what is usual", False, "GB", "badmin showconf mbd all")
    site = SiteLimits(max_array=Bound(1000, "a", "b"), memory=units)

    [found] = bad(list(of_cluster(replace(SETTING, scheduler="LSF"), site, section)))
    assert found.kind is Kind.PROBLEM
    assert "LSF is told memory in KB and MB, by what is usual, and the site counts in GB" in found.text
    assert found.write == {"memory_unit": "GB"}

    unknown = replace(site, memory=replace(units, site=None))
    [noted] = bad(list(of_cluster(replace(SETTING, scheduler="LSF"), unknown, section)))
    assert noted.kind is Kind.NOTE
    assert "cannot be read here: set lsf.memory_unit to what that is" in noted.text

    known = replace(site, memory=MemoryUnits("GB", "lsf.conf", True, "GB", "lsf.conf"))
    assert bad(list(of_cluster(replace(SETTING, scheduler="LSF"), known, section))) == []


def test_options_of_a_pool_s_workers_stand_below_those_of_the_pool() -> None:
    section = Section(("dask", "pool", "slurm"), frozenset({"max_array"}))

    assert section.lines(section.options(max_array=5)) == [
        *("dask:", "  pool:", "    slurm:", "      max_array: 5")
    ]
    assert section.options(max_arrays=5) == {}


def test_the_probe_s_own_process_is_this_one_only_on_this_boot() -> None:
    elsewhere = worker(pid=os.getpid(), host=os.uname().nodename)["place"]

    assert "in this process" not in elsewhere.text
