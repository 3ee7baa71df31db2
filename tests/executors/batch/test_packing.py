"""How calls are put into jobs: the cases that people think of, and what holds for all others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fractal_runner.executors.batch.packing import MAX_JOBS, Packed, Packing, job_time

GB = 10**9


def numbers(packed: Packed) -> tuple[int, int, int]:
    return packed.calls_per_job, packed.parallel_calls_per_job, packed.jobs


# If nothing is said


@pytest.mark.parametrize(
    ("total", "expected"), [(1, (1, 1, 1)), (100, (1, 1, 100)), (101, (2, 1, 51)), (10_000, (100, 1, 100))]
)
def test_by_default_large_calls_run_one_at_a_time_in_at_most_a_hundred_jobs(
    total: int, expected: Any
) -> None:
    assert numbers(Packing().pack(total, cpus=4, memory=8 * GB)) == expected


@pytest.mark.parametrize(
    ("total", "needs", "expected"),
    [
        (3, {}, (3, 3, 1)),
        (100, {}, (4, 4, 25)),
        (1000, {}, (40, 4, 25)),
        (1000, {"cpus": 2}, (20, 2, 50)),
        (1000, {"memory": 8 * GB}, (20, 2, 50)),
        (1000, {"memory": 64 * GB}, (10, 1, 100)),
        (1000, {"gpus": 1}, (10, 1, 100)),
    ],
)
def test_by_default_jobs_have_four_cpus_and_a_hundred_calls_run_at_a_time(
    total: int, needs: Any, expected: Any
) -> None:
    assert numbers(Packing().pack(total, **needs)) == expected


# Targets and maxima


def test_many_calls_in_one_job_of_one_call_run_one_after_the_other() -> None:
    packing = Packing(target_jobs=10, max_jobs=1, max_cpus_per_job=4, max_memory_per_job=8 * GB)

    assert numbers(packing.pack(10_000, cpus=4, memory=8 * GB)) == (10_000, 1, 1)


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (3, (3, 3, 1)),  # no more at a time than there are
        (80, (4, 4, 20)),  # as many as fill the target
        (81, (5, 5, 17)),  # above the target number of jobs: as many at a time as it takes,
        (320, (16, 16, 20)),
        (500, (16, 16, 32)),  # as far as a job's maximum goes: then there are more jobs,
        (1600, (16, 16, 100)),
        (1601, (17, 16, 95)),  # as far as their maximum goes: then calls wait within their job
    ],
)
def test_jobs_grow_before_there_are_more_of_them_and_calls_wait_last_of_all(
    total: int, expected: Any
) -> None:
    packing = Packing(target_cpus_per_job=8, max_cpus_per_job=32)

    assert numbers(packing.pack(total, cpus=2)) == expected


@pytest.mark.parametrize(
    ("memory", "parallel"),
    [(None, 8), (1 * GB, 8), (4 * GB, 4), (16 * GB, 1), (20 * GB, 1)],
)
def test_memory_counts_for_calls_that_say_what_they_need(memory: int | None, parallel: int) -> None:
    packing = Packing(target_cpus_per_job=8, target_memory_per_job=16 * GB)

    packed = packing.pack(8, memory=memory)

    assert packed.parallel_calls_per_job == parallel
    assert packed.memory == (None if memory is None else memory * parallel)


def test_a_call_that_needs_more_than_the_target_has_a_job_of_its_own() -> None:
    assert Packing(target_cpus_per_job=8).pack(3, cpus=12) == Packed(1, 1, 3, cpus=12)


@pytest.mark.parametrize(
    "maxima", [{"max_cpus_per_job": 64}, {"max_cpus_per_job": 64, "target_memory_per_job": GB}]
)
def test_a_maximum_alone_is_no_target(maxima: Any) -> None:
    assert numbers(Packing(**maxima).pack(20)) == (1, 1, 20)
    assert numbers(Packing(**maxima).pack(21)) == (2, 2, 11)


def test_where_a_target_exceeds_its_maximum_the_maximum_holds() -> None:
    assert Packing(target_cpus_per_job=8, max_cpus_per_job=4).pack(8).cpus == 4


# What is said


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"calls_per_job": 2, "parallel_calls_per_job": 5}, (2, 2, 500)),
        ({"calls_per_job": 10, "parallel_calls_per_job": 5}, (10, 5, 100)),
        ({"calls_per_job": 10}, (10, 1, 100)),
        ({"calls_per_job": 10, "target_cpus_per_job": 4}, (10, 4, 100)),
        ({"calls_per_job": 1}, (1, 1, 1000)),
        ({"calls_per_job": 2000}, (1000, 1, 1)),
        ({"parallel_calls_per_job": 20}, (20, 20, 50)),
        ({"parallel_calls_per_job": 2}, (10, 2, 100)),
        ({"parallel_calls_per_job": 5000}, (1000, 1000, 1)),
        ({"calls_per_job": 1, "parallel_calls_per_job": 4, "max_jobs": 10}, (100, 1, 10)),
    ],
    ids=str,
)
def test_what_is_said_counts_above_what_would_be_chosen(said: Any, expected: Any) -> None:
    assert numbers(Packing(**said).pack(1000)) == expected


def test_a_task_may_say_it_over_what_the_executor_was_given() -> None:
    packing = Packing(calls_per_job=10, parallel_calls_per_job=5)

    assert packing.replaced() == packing
    assert packing.replaced(calls_per_job=20) == Packing(calls_per_job=20, parallel_calls_per_job=5)
    assert packing.replaced(None, 1) == Packing(calls_per_job=10, parallel_calls_per_job=1)


def test_calls_with_a_gpu_run_one_at_a_time_unless_said_otherwise() -> None:
    packing = Packing(target_cpus_per_job=8, max_cpus_per_job=32)

    assert packing.pack(200, gpus=1) == Packed(2, 1, 100, cpus=1, gpus=1)
    assert packing.pack(200, alone=True) == Packed(2, 1, 100, cpus=1)
    assert packing.replaced(4, 2).pack(200, gpus=2) == Packed(4, 2, 50, cpus=2, gpus=4)


def test_a_job_has_what_those_calls_need_that_run_at_a_time() -> None:
    packed = Packing(calls_per_job=6, parallel_calls_per_job=3).pack(12, cpus=2, memory=GB)

    assert packed == Packed(6, 3, 2, cpus=6, memory=3 * GB)


def test_sizes_are_written_as_people_do() -> None:
    packing = Packing.of(target_memory_per_job="64GB", max_memory_per_job=128_000, max_jobs=None)

    assert packing == Packing(target_memory_per_job=64 * GB, max_memory_per_job=128 * GB)


# Mistakes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"calls_per_job": 0}, "calls_per_job: 0 is not a whole number of at least 1"),
        ({"parallel_calls_per_job": True}, "parallel_calls_per_job: True is not a whole number"),
        ({"max_jobs": 1.5}, "max_jobs: 1.5 is not a whole number"),
        ({"target_cpus_per_job": "8"}, "target_cpus_per_job: '8' is not a whole number"),
        ({"max_memory_per_job": "lots"}, "max_memory_per_job: 'lots' is not a size: write '4GB'"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Packing.of(**wrong)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("packing", "needs", "message"),
    [
        (
            {"max_cpus_per_job": 4},
            {"cpus": 8},
            "cpus=8 of a call exceeds max_cpus_per_job=4: ask for less, or raise the maximum",
        ),
        (
            {"max_memory_per_job": 4 * GB},
            {"memory": 8 * GB},
            "memory=8 GB of a call exceeds max_memory_per_job=4 GB: ask for less, or raise the maximum",
        ),
        (
            {"max_cpus_per_job": 4, "parallel_calls_per_job": 3},
            {"cpus": 2},
            "cpus=2 of a call times parallel_calls_per_job=3 exceeds max_cpus_per_job=4: ask for less, "
            "run fewer at a time, or raise the maximum",
        ),
        (
            {"max_memory_per_job": 4 * GB, "parallel_calls_per_job": 9, "calls_per_job": 5},
            {"memory": GB},
            "memory=1 GB of a call times parallel_calls_per_job=5 exceeds max_memory_per_job=4 GB: ask for "
            "less, run fewer at a time, or raise the maximum",
        ),
    ],
)
def test_what_fits_into_no_job_is_an_error_that_names_both_sides(
    packing: Any, needs: Any, message: str
) -> None:
    for ask in (Packing(**packing).check, lambda **needs: Packing(**packing).pack(10, **needs)):
        with pytest.raises(ValueError) as caught:
            ask(**needs)
        assert str(caught.value) == message


@pytest.mark.parametrize("total", [0, -1, True])
def test_there_is_at_least_one_call(total: Any) -> None:
    with pytest.raises(ValueError, match="total: "):
        Packing().pack(total)


# A job's time


@pytest.mark.parametrize(
    ("call", "calls", "parallel", "most", "expected"),
    [
        (None, 10, 2, 100, None),
        (60, 1, 1, None, 60),
        (60, 10, 2, None, 300),
        (60, 11, 2, None, 360),
        (60, 11, 2, 100, 100),
    ],
)
def test_a_jobs_time_is_that_of_a_call_times_the_rounds(
    call: Any, calls: int, parallel: int, most: Any, expected: Any
) -> None:
    assert job_time(call, calls, parallel, most) == expected


# What holds for all of them


counts = st.integers(1, 50)
maybe = st.none() | counts
# Of what does not fit into a job at all there is much among these.
filtering = settings(suppress_health_check=[HealthCheck.filter_too_much])
packings = st.builds(
    Packing,
    calls_per_job=maybe,
    parallel_calls_per_job=maybe,
    target_jobs=counts,
    max_jobs=maybe,
    target_cpus_per_job=maybe,
    max_cpus_per_job=maybe,
    target_memory_per_job=maybe,
    max_memory_per_job=maybe,
)


def packed_or_not(packing: Packing, total: int, **needs: Any) -> Packed:
    try:
        return packing.pack(total, **needs)
    except ValueError:
        assume(False)
        raise


@filtering
@given(packings, st.integers(1, 3000), counts, maybe, st.integers(0, 4))
def test_all_calls_are_placed_and_every_limit_is_kept(
    packing: Packing, total: int, cpus: int, memory: int | None, gpus: int
) -> None:
    packed = packed_or_not(packing, total, cpus=cpus, memory=memory, gpus=gpus)

    calls, parallel, jobs = numbers(packed)
    assert (jobs - 1) * calls < total <= jobs * calls  # none is left out, and no job is empty
    assert 1 <= parallel <= calls <= total
    if packing.max_jobs is not None:
        assert jobs <= packing.max_jobs
    elif packing.calls_per_job is None:
        assert jobs <= MAX_JOBS
    if packing.max_cpus_per_job is not None:
        assert packed.cpus <= packing.max_cpus_per_job
    if packing.max_memory_per_job is not None and packed.memory is not None:
        assert packed.memory <= packing.max_memory_per_job
    assert packed.cpus == cpus * parallel
    assert packed.gpus == gpus * parallel


@filtering
@given(packings, st.integers(1, 3000), counts, maybe)
def test_what_is_said_is_kept_as_far_as_the_number_of_jobs_allows(
    packing: Packing, total: int, cpus: int, memory: int | None
) -> None:
    packed = packed_or_not(packing, total, cpus=cpus, memory=memory)

    if packing.calls_per_job is not None:
        least = math.ceil(total / packing.max_jobs) if packing.max_jobs is not None else 1
        assert packed.calls_per_job == min(max(packing.calls_per_job, least), total)
    if packing.parallel_calls_per_job is not None:
        bound = min(packing.calls_per_job or total, packed.calls_per_job)
        assert packed.parallel_calls_per_job == min(packing.parallel_calls_per_job, bound)


@filtering
@given(packings, st.integers(1, 3000), counts, st.integers(1, 4))
def test_calls_with_a_gpu_are_alone_unless_it_is_said(
    packing: Packing, total: int, cpus: int, gpus: int
) -> None:
    packed = packed_or_not(packing, total, cpus=cpus, gpus=gpus)

    assert packed.parallel_calls_per_job == 1 or packing.parallel_calls_per_job is not None


@filtering
@given(packings, st.integers(1, 3000), counts, counts)
def test_jobs_larger_than_the_target_are_for_the_number_of_jobs(
    packing: Packing, total: int, cpus: int, target: int
) -> None:
    packing = dataclasses.replace(packing, parallel_calls_per_job=None, target_cpus_per_job=target)
    packed = packed_or_not(packing, total, cpus=cpus)

    if packed.parallel_calls_per_job > 1 and packed.cpus > target:
        fewer = packed.parallel_calls_per_job - 1
        assert math.ceil(total / fewer) > min(packing.target_jobs, packing.max_jobs or packing.target_jobs)
