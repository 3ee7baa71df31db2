"""What bsub is told of an array is what was asked for, and nothing in it becomes an option or a command."""

from __future__ import annotations

import re
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fractal_runner.executors.batch.lsf_options import OPTIONS
from fractal_runner.executors.batch.lsf_submission import (
    UNITS,
    MemoryTerms,
    bsub_words,
    line_of,
    script_of,
    write_script,
)
from fractal_runner.executors.batch.lsf_words import Dialect
from fractal_runner.executors.batch.packing import lead_s
from tests.executors.batch.lsf_recorded import array_request

KB, MB, GB = UNITS["KB"], UNITS["MB"], UNITS["GB"]
IN_MB = MemoryTerms(MB, MB, "host")
FIRST = ["-J", "fr-1[1-3]", "-o", "/dev/null", "-n", "1"]
HERE = Path("/x")


def said(
    extra: Mapping[str, Any] | None = None,
    *,
    dialect: Dialect = Dialect.OPENLAVA,
    terms: MemoryTerms = IN_MB,
    rerunnable: bool = False,
    **request: Any,
) -> list[str]:
    options = OPTIONS.parse(extra or {})
    asked = array_request(HERE, **request)
    return bsub_words(asked, options, dialect=dialect, memory=terms, rerunnable=rerunnable)


def value_of(option: str, words: list[str]) -> str:
    assert words.count(option) == 1
    return words[words.index(option) + 1]


# bsub's words.


def test_an_array_that_needs_nothing() -> None:
    assert said() == [*FIRST, "-R", "span[hosts=1]"]


def test_an_array_that_needs_everything() -> None:
    words = said(
        {
            "bsub_extra": ["-app", "chem"],
            "exclude": "n9",
            "nodelist": "n1,n2",
            "resource_requirements": "select[type==any]",
        },
        dialect=Dialect.IBM,
        rerunnable=True,
        count=7,
        cpus=4,
        memory=2 * GB,
        gpus=2,
        time=3600,
        queue="long",
        account="p 1",
    )
    assert words == [
        *("-J", "fr-1[1-7]", "-o", "/dev/null", "-n", "4", "-M", "2048"),
        *("-R", "select[(type==any) && (hname!=n9)] rusage[mem=2048] span[hosts=1]"),
        *("-W", "60", "-q", "long", "-P", "p 1", "-m", "n1 n2", "-r", "-gpu", "num=2", "-app", "chem"),
    ]


def test_both_families_are_told_the_same_but_of_gpus() -> None:
    asked: dict[str, Any] = {"cpus": 4, "memory": GB, "time": 90, "queue": "q", "account": "p"}
    assert said(dialect=Dialect.IBM, **asked) == said(dialect=Dialect.OPENLAVA, **asked)


@pytest.mark.parametrize(
    ("seconds", "minutes"),
    [(0.1, "1"), (59, "1"), (60, "1"), (60.1, "2"), (61, "2"), (3600, "60"), (7 * 86400, "10080")],
)
def test_time_is_in_whole_minutes_and_not_less(seconds: float, minutes: str) -> None:
    assert value_of("-W", said(time=seconds)) == minutes


@pytest.mark.parametrize(
    ("unit", "amount"),
    [("KB", 5 * MB + 1), ("MB", 5 * GB + 1), ("GB", 1), ("TB", GB), ("PB", 1), ("EB", 4 * 10**9)],
)
def test_memory_is_in_the_units_of_the_site_and_rounded_up(unit: str, amount: int) -> None:
    words = said(terms=MemoryTerms(UNITS[unit], UNITS[unit], "host"), memory=amount)
    assert int(value_of("-M", words)) == -(-amount // UNITS[unit]) >= 1
    assert value_of("-R", words) == f"rusage[mem={value_of('-M', words)}] span[hosts=1]"


def test_limits_and_reservations_may_have_different_units() -> None:
    words = said(terms=MemoryTerms(KB, MB, "host"), memory=3 * MB)
    assert value_of("-M", words) == "3072"
    assert value_of("-R", words) == "rusage[mem=3] span[hosts=1]"


@pytest.mark.parametrize(
    ("per", "spread", "amount"),
    [
        ("job", "span[ptile=2]", "8000"),
        ("job", "span[hosts=1]", "8000"),
        ("host", "span[ptile=2]", "2000"),  # of its four hosts
        ("host", "span[hosts=1]", "8000"),
        ("task", "span[ptile=2]", "1000"),
        ("task", "span[hosts=1]", "1000"),
    ],
)
def test_what_is_reserved_is_of_the_job_of_a_host_or_of_a_task_and_the_limit_is_the_jobs(
    per: Any, spread: str, amount: str
) -> None:
    words = said({"resource_requirements": spread}, terms=MemoryTerms(MB, MB, per), cpus=8, memory=8000 * MB)
    assert value_of("-M", words) == "8000"
    assert value_of("-R", words) == f"rusage[mem={amount}] {spread}"


def test_a_users_reservation_of_memory_counts_beside_the_limit() -> None:
    words = said({"resource_requirements": "rusage[mem=5]"}, memory=9 * MB)
    assert (value_of("-M", words), value_of("-R", words)) == ("9", "rusage[mem=5] span[hosts=1]")


@given(
    st.integers(1, 2**50) | st.integers(2**50, 2**70),
    st.integers(1, 200),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from(["job", "host", "task"]),
)
@example(2**53 + 1, 1, "KB", "job")  # the first that a float does not have
@example(2**53 + 1, 2, "KB", "task")
def test_no_job_gets_less_memory_than_it_needs(amount: int, cpus: int, unit: str, per: Any) -> None:
    words = said(terms=MemoryTerms(UNITS[unit], UNITS[unit], per), cpus=cpus, memory=amount)
    shares = cpus if per == "task" else 1
    reserved = int(re.findall(r"mem=(\d+)", value_of("-R", words))[0])
    for number, times in ((int(value_of("-M", words)), 1), (reserved, shares)):
        assert number * UNITS[unit] * times >= amount > (number - 1) * UNITS[unit] * times


@given(st.floats(0.001, 10**8))
def test_no_job_gets_less_time_than_it_needs(seconds: float) -> None:
    minutes = int(value_of("-W", said(time=seconds)))
    assert minutes >= 1
    assert minutes * 60 >= seconds > (minutes - 1) * 60


@pytest.mark.parametrize(
    ("gpus", "extra", "end"),
    [
        (2, {}, ["-gpu", "num=2"]),
        (0, {"needs_gpu": True}, ["-gpu", "num=1"]),
        (3, {"needs_gpu": True}, ["-gpu", "num=3"]),
        (0, {"needs_gpu": False}, []),
        (2, {"bsub_extra": ["-gpu", "num=1:mode=shared"]}, ["-gpu", "num=1:mode=shared"]),
        (2, {"resource_requirements": "rusage[ngpus_physical=2]"}, []),
    ],
)
def test_gpus_where_lsf_has_an_option_for_them(gpus: int, extra: dict[str, Any], end: list[str]) -> None:
    words = said(extra, dialect=Dialect.IBM, gpus=gpus)
    assert words[words.index("-R") + 2 :] == end


def test_gpus_where_lsf_has_none() -> None:
    for asked, extra in ((1, {}), (0, {"needs_gpu": True})):
        with pytest.raises(
            ValueError, match=r"no option for GPUs: .*`resource_requirements`, \"rusage\[ngpus=1"
        ):
            said(extra, gpus=asked)
    words = said({"resource_requirements": "rusage[ngpus=1]", "needs_gpu": True}, gpus=1)
    assert words == [*FIRST, "-R", "rusage[ngpus=1] span[hosts=1]"]


def test_further_words_come_last_and_as_they_are() -> None:
    further = ["-app", "a b;c", "-sla", "$(id)", "-w", "done('x y')"]
    words = said({"bsub_extra": further}, rerunnable=True, time=60, queue="q", account="p")
    assert words[-6:] == further


# What is nobody's to choose.


@pytest.mark.parametrize(
    "name", ["a b", "a,b", "a\nb", "", "a;b", "a/b", "a[1]", "a%b", 'a"b', "a*", "ä", "a^b"]
)
def test_an_array_has_a_name_that_it_can_be_found_by(name: str) -> None:
    with pytest.raises(ValueError, match="is not a name for an array: bjobs would not find it by that"):
        said(name=name)


@pytest.mark.parametrize("option", ["queue", "account"])
@pytest.mark.parametrize("value", ["a\nb", "a\0b", "a\rb", "\x1b[1m", "\udcff", 5])
def test_a_queue_or_a_project_is_a_line_of_text(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match="is not a line of text"):
        said(**{option: value})


@pytest.mark.parametrize("option", ["queue", "account"])
@pytest.mark.parametrize("value", ["a b", "$(id)", "a;id", "'", '"', "-K"])
def test_a_queue_or_a_project_is_one_word_after_its_option(option: str, value: str) -> None:
    asked: dict[str, Any] = {option: value}
    words = said(**asked)
    assert value_of("-q" if option == "queue" else "-P", words) == value
    assert len(words) == len(said()) + 2


@given(st.text(alphabet="n1-. ,", max_size=12), st.text(alphabet="n1-. ,", max_size=12))
def test_hosts_are_never_more_than_one_word_after_their_option(wanted: str, unwanted: str) -> None:
    words = said({"nodelist": wanted, "exclude": unwanted})
    assert words[:7] == [*FIRST, "-R"]
    assert words[8:] == [] or (words[8] == "-m" and len(words) == 10)


# The script, and the line that starts it.


def test_the_line_that_bsub_reads_starts_the_script_and_tells_nothing_else(tmp_path: Path) -> None:
    request = array_request(tmp_path, seen_as="/cluster/x")
    options = OPTIONS.parse({"env": {"TOKEN": "secret"}, "setup": ["login --token secret"]})
    write_script(request, script_of(request, options, python="py"))
    assert line_of(request) == "/bin/sh /cluster/x/job.sh\n"
    assert "secret" in (tmp_path / "job.sh").read_text()
    assert stat.S_IMODE((tmp_path / "job.sh").stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize(
    "seen_as", ["/a b", "/a'b", '/a"b', "/$HOME", "/a;id", "/`id`", "/a*", "/ä", "/", "/x/"]
)
def test_a_path_is_one_word_of_the_line(seen_as: str, tmp_path: Path) -> None:
    line = line_of(array_request(tmp_path, seen_as=seen_as))
    assert line.endswith("\n") and line.count("\n") == 1
    assert shlex.split(line) == ["/bin/sh", f"{seen_as.rstrip('/')}/job.sh"]


@pytest.mark.parametrize("seen_as", ["/a\nid", "/a\rb", "/a\0b", "/a\u2028b", "/\udcff"])
def test_a_path_with_which_a_line_would_end_is_refused(seen_as: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a line of text"):
        script_of(array_request(tmp_path, seen_as=seen_as), {}, python="py")


def test_a_job_is_warned_only_if_it_has_a_time(tmp_path: Path) -> None:
    assert "_fr_begun" not in script_of(array_request(tmp_path), {}, python="py")


@pytest.mark.parametrize(("seconds", "limit"), [(1, 60), (60, 60), (61, 120), (3600, 3600), (86_400, 86_400)])
def test_a_job_is_warned_before_the_limit_that_lsf_has_for_it(
    seconds: float, limit: int, tmp_path: Path
) -> None:
    script = script_of(array_request(tmp_path, time=seconds), {}, python="py")
    [seconds_after] = re.findall(r' "\$\(\(_fr_begun \+ (\d+)\)\)"', script)
    assert int(seconds_after) == int(limit - lead_s(limit)) < limit


def test_a_directory_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        write_script(array_request(tmp_path / "missing"), "#!/bin/sh\n")
