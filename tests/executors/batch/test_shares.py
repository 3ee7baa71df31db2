"""What goes into arrays: every call once, within the bounds, whatever these are."""

from __future__ import annotations

import math
import sys

from hypothesis import given
from hypothesis import strategies as st

from fractal_runner.executors.batch.packing import Packing
from fractal_runner.executors.batch.payload import Terms
from fractal_runner.executors.batch.shares import Limits, next_share

counts = st.integers(1, 300)
perhaps = st.none() | st.integers(1, 20)


@given(
    waiting=counts,
    packing=st.builds(
        Packing, calls_per_job=perhaps, parallel_calls_per_job=perhaps, target_jobs=st.integers(1, 30)
    ),
    max_workers=st.integers(1, 50) | st.just(sys.maxsize),
    max_jobs=st.integers(1, 50),
    max_array=st.integers(1, 50),
    cpus=st.integers(1, 9),
)
def test_calls_are_shared_out_within_the_bounds(
    *, waiting: int, packing: Packing, max_workers: int, max_jobs: int, max_array: int, cpus: int
) -> None:
    limits = Limits(max_workers, max_jobs, None, None, 1.0, None, None, 1.0)
    left, jobs, places = waiting, 0, 0

    while left:
        share = next_share(
            left,
            Terms(cpus=cpus),
            packing=packing,
            limits=limits,
            jobs=jobs,
            places=places,
            max_array=max_array,
        )
        if share is None:
            break
        assert 1 <= share.jobs <= min(share.calls, max_array)
        assert 1 <= share.parallel <= share.calls_per_job
        assert share.calls <= left
        left, jobs, places = left - share.calls, jobs + share.jobs, places + share.jobs * share.parallel
        assert jobs <= max_jobs
        assert places <= max_workers

    if left:
        assert jobs == max_jobs or places == max_workers, "there was room for more"


@given(calls=counts, jobs=counts)
def test_no_job_has_more_than_one_call_more_than_another(calls: int, jobs: int) -> None:
    jobs = min(calls, jobs)
    dealt = [len(range(number, calls, jobs)) for number in range(jobs)]

    assert sum(dealt) == calls
    assert max(dealt) == dealt[0] == math.ceil(calls / jobs)
    assert max(dealt) - min(dealt) <= 1
