"""The arguments of the executor for LSF reach what they are for, and mistakes in them are told."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fractal_runner.executors import factories
from fractal_runner.executors.batch.base import BatchExecutor, BatchOptions
from fractal_runner.executors.batch.lsf import LsfExecutor
from fractal_runner.executors.batch.lsf_scheduler import LsfScheduler
from fractal_runner.executors.batch.slurm import SlurmExecutor

# What of a batch executor each scheduler has its own words for.
IN_ITS_OWN_WORDS = {"cpus", "memory", "gpus", "time", "queue", "account", "max_array"}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LsfExecutor]]:
    made: list[LsfExecutor] = []

    def one(**arguments: Any) -> LsfExecutor:
        made.append(LsfExecutor(tmp_path / "jobs", **arguments))
        return made[-1]

    yield one
    for executor in made:
        executor.shutdown()


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the scheduler is made with."""
    seen: dict[str, Any] = {}

    def scheduler(**arguments: Any) -> LsfScheduler:
        seen.update(arguments)
        return LsfScheduler(**arguments)

    monkeypatch.setattr("fractal_runner.executors.batch.lsf.LsfScheduler", scheduler)
    return seen


OTHER_VALUES: dict[str, Any] = {
    "resource_requirements": "select[a]",
    "bsub_extra": ["-app", "a"],
    "setup": ["a"],
    "teardown": ["b"],
    "env": {"A": "1"},
    "memory_unit": "GB",
    "memory_per": "task",
    "rerunnable": True,
    "python": "/opt/python",
    "command_prefix": ["ssh", "login1"],
    "bsub_cmd": "/opt/bsub",
    "bjobs_cmd": "/opt/bjobs",
    "bkill_cmd": "/opt/bkill",
    "command_timeout": 7.0,
    "max_array": 5,
}


def test_what_is_the_schedulers_reaches_the_scheduler(
    make: Callable[..., LsfExecutor], handed_on: dict[str, Any]
) -> None:
    executor = make(**OTHER_VALUES)
    assert handed_on == OTHER_VALUES
    assert isinstance(executor.scheduler, LsfScheduler)
    assert executor.scheduler.max_array == 5


def test_every_argument_of_the_scheduler_is_the_executors_with_the_same_default(
    make: Callable[..., LsfExecutor], handed_on: dict[str, Any]
) -> None:
    theirs = inspect.signature(LsfScheduler, eval_str=True).parameters.values()
    ours = inspect.signature(LsfExecutor, eval_str=True).parameters
    for parameter in theirs:
        if parameter.name != "run":  # for tests
            assert ours[parameter.name].default == parameter.default
            assert ours[parameter.name].annotation == parameter.annotation
    assert OTHER_VALUES.keys() == {parameter.name for parameter in theirs} - {"run"}
    make()
    assert all(value == ours[name].default for name, value in handed_on.items())


def test_what_a_call_needs_reaches_its_options(make: Callable[..., LsfExecutor]) -> None:
    executor = make(cores=4, memory="2G", gpus=1, walltime="01:30:00", queue="long", project="p")
    options = executor._options
    assert (options.cpus, options.memory, options.gpus, options.time) == (4, 2 * 10**9, 1, 5400)
    assert (options.queue, options.account) == ("long", "p")


def test_what_is_not_said_is_left_to_the_site(make: Callable[..., LsfExecutor]) -> None:
    options = make()._options
    assert (options.cpus, options.memory, options.gpus, options.time) == (1, None, 0, None)
    assert (options.queue, options.account) == (None, None)


@pytest.mark.parametrize(
    ("walltime", "seconds"), [("90m", 5400), ("1:30:00", 5400), (90, 90), ("90", 90), ("1-00:00", 86400)]
)
def test_ways_to_say_a_time(walltime: Any, seconds: float, make: Callable[..., LsfExecutor]) -> None:
    assert make(walltime=walltime)._options.time == seconds


@pytest.mark.parametrize(
    ("walltime", "hours", "minutes"), [("1:30", "1", "30"), (" 12:05 ", "12", "05"), ("90:00", "90", "00")]
)
def test_a_time_that_lsf_and_others_read_differently_is_an_error(
    walltime: str, hours: str, minutes: str, make: Callable[..., LsfExecutor]
) -> None:
    with pytest.raises(
        ValueError, match="hours and minutes to LSF, and minutes and seconds elsewhere"
    ) as caught:
        make(walltime=walltime)
    assert f"walltime: {walltime!r}" in str(caught.value)
    for reading in (f"{hours}:{minutes}:00", f"00:{hours}:{minutes}"):
        assert f'"{reading}"' in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_unit": "MBs"}, "memory_unit: 'MBs' is none of KB, MB, .*: did you mean 'MB'"),
        ({"memory_per": "tasks"}, "memory_per: 'tasks' is none of job, host, task: did you mean 'task'"),
        ({"max_array": 0}, "max_array: 0 is not a whole number of at least 1"),
        ({"walltime": "soon"}, "'soon'"),
        ({"memory": "much"}, "memory: 'much'"),
        ({"cores": 0}, "0 is not a whole number of at least 1"),
        ({"queue": ""}, "is not a text of at least one character"),
        ({"setup": "module load x"}, "setup: .* is not a list of lines"),
        ({"bsub_extra": ["-J", "x"]}, "bsub_extra: '-J' is the executor's own to say"),
    ],
)
def test_mistakes_in_arguments(arguments: Any, message: str, make: Callable[..., LsfExecutor]) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_calls_own_options_are_checked_by_the_scheduler(make: Callable[..., LsfExecutor]) -> None:
    executor = make()
    with pytest.raises(TypeError, match="no option 'setups': did you mean 'setup'"):
        executor.options(extra={"setups": "x"}).submit(len, ())
    with pytest.raises(TypeError, match="a call says it by `queue`"):
        executor.options(extra={"partition": "x"}).submit(len, ())


def test_what_all_batch_executors_take_reaches_them(make: Callable[..., LsfExecutor]) -> None:
    executor = make(max_workers=3, name="mine")
    assert (executor.max_workers, executor.name) == (3, "mine")


# By name, and in common.


def test_every_argument_is_known_by_name() -> None:
    arguments = inspect.signature(LsfExecutor).parameters.keys() - {"options"}
    known = arguments | get_type_hints(BatchOptions).keys()
    assert {"folder", "queue", "bsub_extra", "poll_interval", "calls_per_job"} <= known
    factories.check("lsf", dict.fromkeys(known - {"context"}))


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("que", "queue"),
        ("wall_time", "walltime"),
        ("resource_requirement", "resource_requirements"),
        ("poll_intervall", "poll_interval"),
        ("pending_time_out", "pending_timeout"),
        ("target_job", "target_jobs"),
        ("path_maps", "path_map"),
    ],
)
def test_the_nearest_argument_is_named(typo: str, meant: str) -> None:
    with pytest.raises(
        ValueError, match=f"unknown option {typo!r} of executor 'lsf': did you mean {meant!r}"
    ):
        factories.check("lsf", {typo: 1})


@pytest.mark.parametrize("name", ["options", "scheduler", "run"])
def test_what_a_configuration_cannot_give_is_unknown_to_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option {name!r} of executor 'lsf'"):
        factories.check("lsf", {name: 1})


def test_an_executor_is_made_by_name(tmp_path: Path) -> None:
    executor = factories.make("lsf", {"folder": str(tmp_path / "jobs"), "queue": "q", "max_jobs": 2})
    try:
        assert isinstance(executor, LsfExecutor)
        assert executor._options.queue == "q"
    finally:
        executor.shutdown()


def test_the_options_of_all_batch_executors_are_their_bases_arguments_with_the_same_types() -> None:
    parameters = inspect.signature(BatchExecutor, eval_str=True).parameters.values()
    arguments = {
        parameter.name: parameter.annotation
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in IN_ITS_OWN_WORDS
    }
    assert get_type_hints(BatchOptions) == arguments
    assert BatchOptions.__required_keys__ == frozenset()


@pytest.mark.parametrize("executor", [LsfExecutor, SlurmExecutor])
def test_no_executor_says_twice_what_all_of_them_take(executor: type[BatchExecutor]) -> None:
    own = inspect.signature(executor, eval_str=True).parameters.keys()
    assert own.isdisjoint(get_type_hints(BatchOptions))
    assert sys.modules[executor.__module__].BatchOptions is BatchOptions
