"""Whose LSF it is, how its commands are run, and what memory is counted in."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.executors.batch.lsf_scheduler import LsfScheduler
from fractal_runner.executors.batch.lsf_words import Dialect
from fractal_runner.executors.batch.scheduler import SchedulerError, SubmissionRefusedError
from tests.executors.batch.lsf_recorded import (
    DOWN,
    IBM,
    NONE_FOUND,
    OPEN,
    SUBMITTED,
    Answer,
    Given,
    Recorded,
    array_request,
    row,
    rows,
)

HUNG = subprocess.TimeoutExpired("x", 60)


@pytest.fixture(autouse=True)
def site(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where LSF's settings are, and not those that there may be where the tests run."""
    place = tmp_path_factory.mktemp("etc")
    monkeypatch.setenv("LSF_ENVDIR", str(place))
    return place


# Which family it is.


@pytest.mark.parametrize(
    ("answers", "dialect", "asked"),
    [
        ({"lsid": OPEN}, Dialect.OPENLAVA, ["lsid"]),
        ({"lsid": IBM}, Dialect.IBM, ["lsid"]),
        ({"lsid": (0, "Platform LSF 8.3.0.0, May 10 2012\n", "")}, Dialect.IBM, ["lsid"]),
        ({"lsid": (1, "", IBM[1])}, Dialect.IBM, ["lsid"]),
        ({"lsid": None, "bjobs_version": IBM}, Dialect.IBM, ["lsid", "bjobs_version"]),
        ({"lsid": DOWN, "bjobs_version": OPEN}, Dialect.OPENLAVA, ["lsid", "bjobs_version"]),
        ({"lsid": HUNG, "bjobs_version": (0, "", IBM[1])}, Dialect.IBM, ["lsid", "bjobs_version"]),
    ],
)
def test_the_family_is_found_once(answers: dict[str, Answer], dialect: Dialect, asked: list[str]) -> None:
    run = Recorded(**answers)
    scheduler = LsfScheduler(run=run)
    assert run.commands == []
    assert [scheduler.dialect for _ in range(3)] == [dialect] * 3
    assert run.kinds == asked


@pytest.mark.parametrize("answer", [None, DOWN, HUNG, PermissionError(13, "no")])
def test_a_family_that_is_not_found_is_looked_for_again(answer: Answer) -> None:
    run = Recorded(lsid=answer, bjobs_version=answer)
    scheduler = LsfScheduler(run=run)
    assert scheduler.dialect is None
    run.answers["lsid"] = IBM
    assert [scheduler.dialect for _ in range(3)] == [Dialect.IBM] * 3
    assert run.kinds == ["lsid", "bjobs_version", "lsid"]


def test_what_is_not_known_of_a_family_is_not_asked_of_it() -> None:
    run = Recorded(lsid=None, bjobs_version=None, bjobs=rows(row(12, "fr-1[1]")))
    assert LsfScheduler(run=run).states({"12[1]": "fr-1"}).keys() == {"12[1]"}
    assert run.of("bjobs") == [["bjobs", "-w", "12"]]


# How commands are run.


@pytest.mark.parametrize(
    ("bjobs_cmd", "beside"),
    [
        ("bjobs", ""),
        ("/opt/lsf/bin/bjobs", "/opt/lsf/bin/"),
        (["/opt/a b/bjobs"], "/opt/a b/"),
        ("'/opt/a b/bjobs'", "/opt/a b/"),
    ],
)
def test_commands_without_a_setting_are_beside_bjobs(bjobs_cmd: Any, beside: str) -> None:
    run = Recorded(bjobs_long=NONE_FOUND, bhist=NONE_FOUND)
    scheduler = LsfScheduler(run=run, bjobs_cmd=bjobs_cmd)
    assert scheduler.dialect is Dialect.OPENLAVA
    assert scheduler.explain({"12[1]": "fr-1"}) == {}
    assert [command[0] for command in run.commands] == [
        f"{beside}{name}" for name in ("lsid", "bjobs", "bhist")
    ]


def test_commands_may_be_paths_or_several_words(tmp_path: Path) -> None:
    run = Recorded(bsub=SUBMITTED, bkill=(0, "", ""))
    scheduler = LsfScheduler(
        run=run, bsub_cmd="/opt/bsub -a 'my esub'", bkill_cmd=["/opt/b/bkill", "-s", "9"]
    )
    ids = scheduler.submit(array_request(tmp_path))
    scheduler.cancel(dict.fromkeys(ids, "fr-1"))
    assert run.of("bsub")[0][:4] == ["/opt/bsub", "-a", "my esub", "-J"]
    assert run.of("bkill") == [["/opt/b/bkill", "-s", "9", "12[1-3]"]]


def test_commands_have_our_settings_and_not_what_changes_their_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = {"BSUB_QUIET", "BSUB_QUIET2", "BSUB_STDERR", "LSB_BJOBS_FORMAT", "LSB_DISPLAY_YEAR"}
    for name in gone:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LSB_NTRIES", "9")
    monkeypatch.setenv("LSB_DEFAULTQUEUE", "theirs")
    run = Recorded(bsub=SUBMITTED)
    LsfScheduler(run=run).submit(array_request(tmp_path))
    assert run.kinds == ["lsid", "bsub"]
    for options in run.options:
        assert gone.isdisjoint(options["env"])
        settings = {name: options["env"][name] for name in ("LSB_NTRIES", "LC_ALL", "LSB_DEFAULTQUEUE")}
        assert settings == {"LSB_NTRIES": "1", "LC_ALL": "C", "LSB_DEFAULTQUEUE": "theirs"}
        assert options["timeout"] == 60
        assert not options.get("shell")


def test_only_bsub_reads_something(tmp_path: Path) -> None:
    run = Recorded(bsub=SUBMITTED)
    LsfScheduler(run=run).submit(array_request(tmp_path))
    lsid, bsub = run.options
    assert lsid["stdin"] is subprocess.DEVNULL
    assert bsub["input"] == f"/bin/sh {tmp_path}/job.sh\n"


@pytest.mark.parametrize("prefix", [["sudo", "-u", "some one"], "sudo -u 'some one'"])
def test_a_prefix_is_in_front_of_every_command_with_the_settings_after_it(prefix: Any) -> None:
    run = Recorded(bjobs=rows(row(12, "fr-1[1]")))
    LsfScheduler(run=run, command_prefix=prefix).states({"12[1]": "fr-1"})
    assert run.kinds == ["lsid", "bjobs"]
    for command in run.commands:
        assert command[:4] == ["sudo", "-u", "some one", "env"]
        settings = command[4 : -len(run.without_prefix(command))]
        assert [settings[n + 1] for n, word in enumerate(settings) if word == "-u"] == [
            *("BSUB_QUIET", "BSUB_QUIET2", "BSUB_STDERR", "LSB_BJOBS_FORMAT", "LSB_DISPLAY_YEAR")
        ]
        assert settings[-2:] == ["LSB_NTRIES=1", "LC_ALL=C"]


def test_ssh_gets_one_word_that_its_shell_takes_apart_again(tmp_path: Path) -> None:
    run = Recorded(bsub=SUBMITTED)
    scheduler = LsfScheduler(run=run, command_prefix=["ssh", "login1"])
    scheduler.submit(array_request(tmp_path, account="a;id $(x) 'y'", queue="q"))
    bsub = run.commands[-1]
    assert bsub[:2] == ["ssh", "login1"]
    assert len(bsub) == 3
    assert shlex.split(bsub[2])[-4:] == ["-q", "q", "-P", "a;id $(x) 'y'"]


@pytest.mark.parametrize(
    ("said", "end"),
    [
        (
            b"batch system daemon not responding ... still trying\n",
            ": batch system daemon not responding ... still",
        ),
        ("LSF is down. Please wait...\n", ": LSF is down. Please wait"),
        (b"\xff\n", ": \ufffd"),
        (None, "$"),
        (b"", "$"),
    ],
)
def test_a_command_that_does_not_end_is_an_error_with_its_words(said: Any, end: str, tmp_path: Path) -> None:
    hung = subprocess.TimeoutExpired("x", 7, stderr=said)
    run = Recorded(bjobs=hung, bsub=hung, bkill=hung, bhist=hung, bjobs_long=NONE_FOUND)
    scheduler = LsfScheduler(run=run, command_timeout=7)
    jobs = {"12[1]": "fr-1"}
    calls: list[tuple[str, Callable[[], object]]] = [
        ("bjobs", lambda: scheduler.states(jobs)),
        ("bjobs", lambda: scheduler.find(array_request(tmp_path))),
        ("bjobs", lambda: scheduler.cancel(jobs)),
        ("bsub", lambda: scheduler.submit(array_request(tmp_path))),
        ("bhist", lambda: scheduler.explain(jobs)),
    ]
    for program, call in calls:
        with pytest.raises(SchedulerError, match=rf"{program} did not answer within 7 s{end}") as caught:
            call()
        assert not isinstance(caught.value, SubmissionRefusedError)
    assert "bkill" not in run.kinds


def test_a_command_that_may_not_be_run_is_an_error(tmp_path: Path) -> None:
    run = Recorded(bsub=PermissionError(13, "Permission denied", "bsub"))
    with pytest.raises(SchedulerError, match=r"bsub could not be run: .*Permission denied"):
        LsfScheduler(run=run).submit(array_request(tmp_path))


# What memory is counted in.


@pytest.mark.parametrize(
    ("lsid", "conf", "arguments", "amounts"),
    [
        (IBM, None, {}, ("2097152", "2048")),
        (OPEN, None, {}, ("2048", "2048")),
        (IBM, "LSF_UNIT_FOR_LIMITS=MB\n", {}, ("2048", "2048")),
        (IBM, 'A=1\n  LSF_UNIT_FOR_LIMITS = "GB"  # of the site\nB=2\n', {}, ("2", "2")),
        (IBM, "LSF_UNIT_FOR_LIMITS='GB'\n", {}, ("2", "2")),
        (IBM, "LSF_UNIT_FOR_LIMITS=g\n", {}, ("2", "2")),
        (IBM, "#LSF_UNIT_FOR_LIMITS=GB\n# LSF_UNIT_FOR_LIMITS=TB\n", {}, ("2097152", "2048")),
        (IBM, "LSF_UNIT_FOR_LIMITS=GB\nLSF_UNIT_FOR_LIMITS=MB\n", {}, ("2048", "2048")),
        (IBM, "LSF_UNIT_FOR_LIMITS=bananas\nOTHER_LSF_UNIT_FOR_LIMITS=GB\n", {}, ("2097152", "2048")),
        (IBM, "", {}, ("2097152", "2048")),
        (IBM, "A=\udcff\nLSF_UNIT_FOR_LIMITS=MB\n", {}, ("2048", "2048")),
        (IBM, "LSF_UNIT_FOR_LIMITS=GB\n", {"memory_unit": "KB"}, ("2097152", "2097152")),
        (OPEN, None, {"memory_unit": "GB"}, ("2", "2")),
        (OPEN, None, {"memory_per": "task"}, ("2048", "1024")),
        (IBM, "LSF_UNIT_FOR_LIMITS=GB\n", {"command_prefix": "env"}, ("2097152", "2048")),
    ],
)
def test_memory_is_counted_as_the_site_counts_it(
    lsid: Given, conf: str | None, arguments: dict[str, Any], amounts: tuple[str, str], site: Path
) -> None:
    if conf is not None:
        (site / "lsf.conf").write_text(conf, errors="surrogateescape")
    run = Recorded(lsid=lsid, bsub=SUBMITTED)
    LsfScheduler(run=run, **arguments).submit(array_request(site, cpus=2, memory=2 * 1024**3))
    bsub = run.without_prefix(run.commands[-1])
    assert bsub[bsub.index("-M") + 1] == amounts[0]
    assert bsub[bsub.index("-R") + 1] == f"rusage[mem={amounts[1]}] span[hosts=1]"


def test_the_site_is_not_asked_where_its_settings_are_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LSF_ENVDIR")
    run = Recorded(lsid=IBM, bsub=SUBMITTED)
    LsfScheduler(run=run).submit(array_request(tmp_path, memory=1024))
    assert run.commands[-1][7:9] == ["-M", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_unit": "MiB"}, "memory_unit: 'MiB' is none of KB, MB, GB, TB, PB, EB: "),
        ({"memory_unit": "MBs"}, "memory_unit: 'MBs' is none of .*: did you mean 'MB'"),
        ({"memory_per": "hosts"}, "memory_per: 'hosts' is none of job, host, task: did you mean 'host'"),
        ({"memory_per": None}, "memory_per: None is none of job, host, task"),
        ({"bsub_extra": ["-q", "x"]}, "bsub_extra: '-q' is the executor's own to say"),
        ({"setup": "module load x"}, "setup: 'module load x' is not a list of lines"),
        ({"env": {"A B": "x"}}, "env: 'A B' is not the name of a variable"),
        ({"resource_requirements": ["select[a"]}, "resource_requirements: .* bracket"),
    ],
)
def test_mistakes_are_found_before_anything_is_run(arguments: dict[str, Any], message: str) -> None:
    run = Recorded()
    with pytest.raises(ValueError, match=message):
        LsfScheduler(run=run, **arguments)
    assert run.commands == []


def test_how_many_jobs_an_array_may_have() -> None:
    run = Recorded()
    assert LsfScheduler(run=run).max_array == 1000
    assert LsfScheduler(run=run, max_array=5).max_array == 5
    assert run.commands == []
