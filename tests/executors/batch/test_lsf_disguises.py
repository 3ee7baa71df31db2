"""Whatever people call their jobs and type into them, whatever is missing: no job ends that has not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fractal_runner.executors.batch import lsf_words as words
from fractal_runner.executors.batch.lsf_long import read_long
from fractal_runner.executors.batch.scheduler import JobState
from tests.executors.batch.test_lsf_long import (
    CODE,
    DISPATCHED,
    REQUEUED,
    SILENT,
    STARTED,
    STARTING,
    at,
    bhist_long,
    bjobs_long,
    wrapped,
)
from tests.executors.batch.test_lsf_words import BJOBS, LONG, LONG_ENDS, RECORDED, short

QUEUED, RUNNING, ENDED = JobState.QUEUED, JobState.RUNNING, JobState.ENDED

DISGUISES = [
    "EXIT",
    "DONE",
    "Exited with exit code 3.",
    "Done successfully.",
    "Job <5> is submitted to",
    at("Exited with exit code 3."),
    "x>, Status <EXIT>, Queue <q>, Command <y",
    "x>, User <ada>, Project <default>, Status <DONE>, Queue <normal>, Command <true",
    "k[3]",
    "[1-5]",
    "^^^^^^^^",
    "Job <7>, Job Name <k>, User <ada>, Project <default>, Status <DONE>, Queue <normal>, Command <true>",
    "2 ada EXIT q h x k Nov 21 00:08",
    "7^1^EXIT^3^-^a^-^k",
]
printable = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" "), min_size=1
)
names = (
    st.sampled_from(DISGUISES) | printable | st.builds("{}{}".format, printable, st.sampled_from(DISGUISES))
)
noise = st.lists(
    st.sampled_from(
        [
            "LSF is processing your request. Please wait...",
            "Job <9> is not found",
            "3 jobs",
            "",
            "*** maintenance on Sat Nov 21 ***",
            "-" * 78,
        ]
    )
    | printable.map(lambda text: f"# {text}")
)
indices = st.none() | st.integers(1, 99_999)
commands = st.lists(names, min_size=1, max_size=4).map("\n".join)  # nobody keeps a command from having lines
alive = st.sampled_from(["PEND", "PSUSP", "RUN", "USUSP", "SSUSP", "UNKWN", "WAIT", "ZOMBI", "PROV"])
living_events = st.sampled_from(
    [
        [],
        [DISPATCHED],
        [DISPATCHED, STARTING, SILENT],
        [DISPATCHED, CODE.format(99), REQUEUED],
    ]
)


def with_noise(text: str, lines: list[str], data: st.DataObject) -> str:
    """Noise anywhere but inside of what is wrapped, and what the job's end needs: nobody writes there."""
    kept = text.split("\n")
    for line in lines:
        kept.insert(data.draw(st.integers(0, len(kept))), line)
    return "\n".join(kept)


def test_a_command_that_looks_like_events_is_not_taken_for_them() -> None:
    lines = [
        at("Exited with exit code 3."),
        "",
        "Sat Nov 21 00:08:18: Submitted from host <x>;",
        at("Exited;"),
        "",
    ]
    for command in ("\n".join(["true", *lines]), "\n".join(["true>", *lines, "false"])):
        [row] = read_long(bhist_long(DISPATCHED, command=command))
        assert row.status.state is RUNNING
        [row] = read_long(bjobs_long(STARTED, command=command, status="RUN"))
        assert row.status.state is RUNNING


def test_a_command_that_looks_like_another_job_ends_none() -> None:
    other = bjobs_long(STARTED, CODE.format(3), job="5")
    for text in (bhist_long(DISPATCHED, command=other), bjobs_long(STARTED, command=other, status="RUN")):
        assert all(row.array != "7" or row.status.state is RUNNING for row in read_long(text))
    head = other.split("\n")[1]
    assert read_long(bhist_long(DISPATCHED, CODE.format(3), command=f"\n\n{head}")) == []


def test_a_name_or_a_command_that_looks_like_a_state_ends_no_job() -> None:
    for disguise in DISGUISES:
        for status in ("RUN", "PEND"):
            texts = [
                bjobs_long(STARTED, status=status, name=disguise),
                bjobs_long(STARTED, status=status, command=disguise),
                bhist_long(DISPATCHED, name=disguise),
                bhist_long(DISPATCHED, command=disguise),
            ]
            for text in texts:
                [row] = read_long(text)
                assert row.status.state is not ENDED, text


@given(name=names, index=indices, word=alive, wide=st.booleans(), lines=noise, data=st.data())
def test_rows_of_bjobs_with_any_name(
    *, name: str, index: int | None, word: str, wide: bool, lines: list[str], data: st.DataObject
) -> None:
    suffix = "" if index is None else f"[{index}]"
    host = "vm" if wide else ""
    row = (
        f"{7:<7} {'ada':<7} {word:<5} {'normal':<10} {'vm':<11} {host:<11} {name + suffix:<10} Nov 21 00:08\n"
    )
    text = with_noise(row, lines, data)
    found = [each for each in words.read_bjobs(text) if each.array == "7"]
    assert [each.status.state for each in found] == [words.STATES[word]]
    if index is not None:
        assert found[0].index == index


@given(names, indices, alive, noise, st.data())
def test_ibm_fields_with_any_name(
    name: str, index: int | None, word: str, lines: list[str], data: st.DataObject
) -> None:
    suffix = "" if index is None else f"[{index}]"
    text = with_noise(f"7^{index or 0}^{word}^-^-^vm^-^{name}{suffix}\n", lines, data)
    [row] = [each for each in words.read_fields(text) if each.array == "7"]
    assert (row.status.state, row.index) == (words.STATES[word], index)


@given(name=names, command=commands, word=alive, events=living_events, lines=noise, data=st.data())
def test_no_job_ends_by_what_people_have_typed(
    *, name: str, command: str, word: str, events: list[str], lines: list[str], data: st.DataObject
) -> None:
    for text in (
        bjobs_long(*events[:1], name=name, command=command, status=word),
        bhist_long(*events, name=name, command=command),
    ):
        for each in (text, with_noise(text, lines, data)):
            rows = read_long(each)
            assert all(row.status.state is not ENDED for row in rows), each
            assert {row.array for row in rows} <= {"7"}


@given(st.sampled_from(LONG_ENDS), st.integers(1, 200))
def test_a_text_wrapped_at_any_width_says_the_same(number: int, width: int) -> None:
    unwrapped = RECORDED[number]["stdout"].replace("\n" + " " * 21, "")
    lines = [wrapped(line, width) if re.match(r"Job|Sat", line) else line for line in unwrapped.split("\n")]
    assert list(map(short, read_long("\n".join(lines)))) == LONG[number]


@given(names, living_events, st.integers(20, 100), st.data())
def test_a_wrapped_text_that_is_cut_off_ends_no_job(
    name: str, events: list[str], width: int, data: st.DataObject
) -> None:
    for text in (bhist_long(*events, name=name), bjobs_long(*events[:1], name=name, status="RUN")):
        whole = "\n".join(wrapped(line, width) for line in text.split("\n"))
        cut = whole[: data.draw(st.integers(0, len(whole)))]
        assert all(row.status.state is not ENDED for row in read_long(cut)), cut


@pytest.mark.parametrize("number", sorted(LONG))
def test_what_is_left_of_a_text_that_is_cut_off_says_nothing_wrong(number: int) -> None:
    text, expected = RECORDED[number]["stdout"], LONG[number]
    for end in range(len(text)):
        for row in read_long(text[:end]):
            assert expected and (row.array, row.index) == (
                (whole := read_long(text)[0]).array,
                whole.index,
            )
            if row.status.state is ENDED:
                assert expected[0][2] is ENDED
                assert row.status.returncode in (None, expected[0][4])
                assert row.status.cause in (None, expected[0][6])


@pytest.mark.parametrize("number", sorted(n for n, rows in BJOBS.items() if rows))
def test_what_is_left_of_rows_that_are_cut_off_is_right(number: int) -> None:
    text = RECORDED[number]["stdout"]
    for end in range(len(text)):
        assert set(map(short, words.read_bjobs(text[:end]))) <= set(BJOBS[number])


@given(st.sampled_from(sorted(LONG)), st.randoms())
def test_lines_that_are_shuffled_end_no_job_that_has_not(number: int, random: Any) -> None:
    lines = RECORDED[number]["stdout"].split("\n")
    random.shuffle(lines)
    for row in read_long("\n".join(lines)):
        assert row.status.state is not ENDED or LONG[number][0][2] is ENDED


READERS: tuple[Callable[[str], object], ...] = (
    *(words.read_dialect, words.read_submission, words.is_refusal, words.read_bjobs, words.read_fields),
    *(
        read_long,
        words.read_unknown,
        words.without_patience,
        words.read_term,
        words.split_name,
        words.node_of,
    ),
    *(words.BUSY.search, words.NOTHING_TO_KILL.search),
)


@given(
    st.text() | st.lists(st.sampled_from([each["stdout"] for each in RECORDED])).map("".join), st.integers()
)
@example("Job <" + "9" * 5000 + "> is submitted to", 0)
@example("٣ ada EXIT q h x k Nov 21 00:08", 0)
def test_no_text_is_too_strange(text: str, seed: int) -> None:
    text = text[seed % (len(text) + 1) :]
    for read in READERS:
        read(text)


@given(st.integers(1, 10**18), noise, noise, printable)
def test_a_submission_is_found_in_any_noise(job: int, before: list[str], after: list[str], text: str) -> None:
    said = "\n".join([*before, f"{text} Job <{job}> is submitted to queue <q>. {text}", *after])
    assert words.read_submission(said) == str(job)
    assert not words.is_refusal(said)


# These would take minutes and hours if they were not linear.
HUGE = [
    *(" " * 1_000_000, "9" * 1_000_000, "[" * 1_000_000, "<" * 1_000_000, "Job <1" * 150_000),
    *("Job Name <" * 100_000, "User <a" * 140_000, "TERM_A" * 160_000, "Job <1>\n" * 120_000),
    *("7 ada EXIT q h x " + "k " * 500_000, "7^1^EXIT" * 120_000, "RUNLIMIT " * 110_000, "a" * 1_000_000),
    ("\n" + " " * 21) * 45_000,
    "Job <1>, \n" * 100_000,
    "master LIM " * 90_000,
    "Job not submitted.\n" * 50_000,
    at("Exited\n") * 30_000,
    bhist_long(*["Exited " + "TERM_ " * 100] * 1_500),
    bhist_long(*["Started " + "a" * 600] * 1_500),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", range(len(HUGE)))
def test_a_huge_text_is_read_in_linear_time(number: int) -> None:
    for read in READERS:
        read(HUGE[number])


def test_thousands_of_rows_are_read() -> None:
    rows = "".join(f"{n} ada RUN q h x k[{n}] Nov 21 00:08\n" for n in range(1, 2201))
    assert len(words.read_bjobs(rows)) == 2200
    long = ("-" * 78 + "\n").join(bjobs_long(STARTED, CODE.format(3), job=f"7[{n}]") for n in range(1, 2201))
    assert {row.index for row in read_long(long)} == set(range(1, 2201))
