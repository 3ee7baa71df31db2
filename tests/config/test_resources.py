"""Who decides what a unit needs: the table of precedence, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from fractal_runner import config
from fractal_runner.config import UnitLayer, unit_layers
from tests.config.conftest import Layers

SITE = """
defaults: {cpus: 1, memory: 1G, time: 10m}
resource_classes:
  small: {cpus: 2, memory: 2G}
  large: {cpus: 16, memory: 64G, gpus: 1, queue: gpu, extra: {constraint: a100, qos: high}}
slurm: {mem: 3G}
lsf: {cores: 4}
"""


def decided(layers: tuple[UnitLayer, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is left when the later ones have counted over the earlier ones."""
    meta: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for layer in layers:
        meta |= {key: value for key, value in layer.meta.items() if value is not None}
        extra |= layer.extra
    return meta, extra


def asked(
    found: config.Config, task: Mapping[str, Any], workflow_task: Mapping[str, Any], **arguments: Any
) -> dict[str, Any]:
    return decided(found.unit_layers(task, workflow_task, **{"executor": "thread", **arguments}))[0]


@pytest.fixture
def found(layers: Layers) -> config.Config:
    layers.write("site", SITE)
    return layers.load()


# Each row says less than the one before it: what is left counts.
EVERYWHERE: list[tuple[str, Any]] = [
    ("the workflow task's meta", "6G"),
    ("the class that it names", "64G"),
    ("the task's meta", "5G"),
    ("the class that this one names", "2G"),
    ("the executor's section", None),
    ("defaults", "1G"),
]


@pytest.mark.parametrize("position", range(len(EVERYWHERE)), ids=[who for who, _ in EVERYWHERE])
def test_the_highest_that_says_something_counts(found: config.Config, position: int) -> None:
    workflow_task: dict[str, Any] = {"mem": "6G", "resource_class": "large"}
    task: dict[str, Any] = {"mem": "5G", "resource_class": "small"}
    silenced = [
        (workflow_task, "mem"),
        (workflow_task, "resource_class"),
        (task, "mem"),
        (task, "resource_class"),
    ]
    for meta, key in silenced[:position]:
        del meta[key]
    # The executor's section is the executor's own to apply: no layer may say anything over it.
    executor = "slurm" if position < 5 else "thread"

    assert asked(found, task, workflow_task, executor=executor).get("mem") == EVERYWHERE[position][1]


def test_what_one_does_not_say_another_may(found: config.Config) -> None:
    task = {"cpus_per_task": 3, "mem": "5G", "resource_class": "small"}

    meta, extra = decided(found.unit_layers(task, {"resource_class": "large", "gpus": 2}, executor="slurm"))

    assert meta == {"cpus_per_task": 16, "mem": "64G", "gpus": 2, "partition": "gpu", "time": "10m"}
    assert extra == {"constraint": "a100", "qos": "high"}


def test_a_class_raises_what_a_package_has_set(found: config.Config) -> None:
    assert asked(found, {"cpus_per_task": 1, "mem": 4000}, {"resource_class": "large"}) == {
        "cpus_per_task": 16,
        "mem": "64G",
        "gpus": 1,
        "partition": "gpu",
        "time": "10m",
    }


def test_a_packages_own_class_does_not_count_over_what_it_says(found: config.Config) -> None:
    meta = asked(found, {"cpus_per_task": 1, "resource_class": "large"}, {})

    assert (meta["cpus_per_task"], meta["mem"]) == (1, "64G")


def test_classes_come_below_the_meta_that_names_them_in_order() -> None:
    classes = {"a": {"cpus": 1, "extra": {"setup": ["x"]}}, "b": {"cpus": 2}}

    found = unit_layers(
        {"resource_class": "a", "mem": "1G", "colour": "red"},
        {"resource_class": "b", "time": "1h"},
        classes=classes,
        defaults={"cpus": 9, "memory": "9G"},
    )

    assert found == (
        UnitLayer({"cpus_per_task": 9, "mem": "9G"}),
        UnitLayer({"cpus_per_task": 1}, {"setup": ["x"]}),
        UnitLayer({"mem": "1G", "colour": "red"}),
        UnitLayer({"cpus_per_task": 2}),
        UnitLayer({"time": "1h"}),
    )


@pytest.mark.parametrize(
    ("executor", "given", "expected"),
    [
        ("thread", None, {"cpus_per_task": 1, "mem": "1G", "time": "10m"}),
        ("slurm", None, {"cpus_per_task": 1, "time": "10m"}),
        ("lsf", None, {"mem": "1G", "time": "10m"}),
        ("lsf", {"walltime": "1h"}, {"mem": "1G"}),
        ("slurm", {"cpus_per_task": 2, "mem": None}, {"mem": "1G", "time": "10m"}),
        # Made by the caller: nobody can tell which of its arguments were given.
        (None, None, {}),
    ],
)
def test_defaults_count_where_the_executors_section_says_nothing_in_its_own_words(
    found: config.Config, executor: str | None, given: Any, expected: dict[str, Any]
) -> None:
    assert asked(found, {}, {}, executor=executor, given=given) == expected


def test_a_unit_on_another_executor_has_the_defaults_of_that_one(found: config.Config) -> None:
    given = {"time": "1h"}

    assert asked(found, {}, {"executor": "lsf"}, executor="slurm", given=given) == {
        "mem": "1G",
        "time": "10m",
        "executor": "lsf",
    }
    assert asked(found, {"executor": "slurm"}, {}, executor="slurm", given=given) == {
        "cpus_per_task": 1,
        "executor": "slurm",
    }
    assert asked(found, {"executor": "lsf"}, {}, executor=None)["mem"] == "1G"


def test_a_class_may_be_named_by_nobody(found: config.Config) -> None:
    assert asked(found, {"resource_class": None}, {}) == asked(found, {}, {})


@pytest.mark.parametrize(
    ("classes", "meta", "message"),
    [
        (
            {"large": {}},
            {"resource_class": "lagre"},
            "there is no resource class 'lagre': did you mean 'large'?",
        ),
        (
            {"a": {}, "b": {}},
            {"resource_class": "xyz"},
            "there is no resource class 'xyz': known are 'a', 'b'",
        ),
        (
            {},
            {"resource_class": "large"},
            "there is no resource class 'large': there are none (a configuration has them under "
            "'resource_classes')",
        ),
        ({"large": {}}, {"resource_class": ["large"]}, "['large'] is not the name of a resource class"),
        ({"large": {}}, {"resource_class": 3}, "3 is not the name of a resource class"),
    ],
)
@pytest.mark.parametrize("whose", ["task", "workflow_task"])
def test_an_unknown_class_is_an_error(
    classes: dict[str, Any], meta: dict[str, Any], message: str, whose: str
) -> None:
    metas = {"task": {}, "workflow_task": {}} | {whose: meta}

    with pytest.raises(ValueError) as caught:
        unit_layers(metas["task"], metas["workflow_task"], classes=classes, defaults={})

    assert str(caught.value) == f"resource_class: {message}"


def test_a_class_that_a_later_layer_defines_again_is_merged(layers: Layers) -> None:
    layers.write("site", SITE)
    layers.write("project", "resource_classes: {large: {memory: 128G, queue: null, extra: {gres: 'gpu:2'}}}")

    assert layers.load().resource_classes["large"] == {
        "cpus": 16,
        "memory": "128G",
        "gpus": 1,
        "extra": {"constraint": "a100", "qos": "high", "gres": "gpu:2"},
    }
