"""What a configuration may say of an executor is what its constructor takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, Unpack

import pytest

from fractal_runner.config.keys import Keyed, Section, Takes, accepts
from fractal_runner.config.values import Findings
from fractal_runner.config.yaml12 import read_text
from fractal_runner.executors import factories
from fractal_runner.executors.sections import ExecutorSections, section_of
from fractal_runner.quantities import parse_size, parse_time
from tests.executors.batch import standin

TEXT = Takes(scalars=frozenset({str}))


class PoolOptions(TypedDict, total=False):
    workers: Literal["local", "slurm"]
    max_workers: int
    idle: NotRequired[Annotated[float | str, parse_time]]
    slurm: Annotated[Mapping[str, Any], Keyed(lambda: Section({"partition": TEXT}))]


class MoreOptions(TypedDict, total=False):
    name: str | None


def factory(
    address: str | Path | None = None,
    *,
    pool: PoolOptions | None = None,
    memory: Annotated[str | int, parse_size] = "1G",
    hosts: Sequence[str] = (),
    ports: list[int] | int = 0,
    limits: Mapping[str, float] | None = None,
    labels: dict[str, list[str]] | None = None,
    debug: bool = False,
    cluster: threading_only | None = None,  # noqa: F821 - a type that is not there at run time
    free: Any = None,
    untyped=None,
    **more: Unpack[MoreOptions],
) -> None: ...


def made(
    address: str | Path | None = None,
    *,
    pool: PoolOptions | None = None,
    memory: Annotated[str | int, parse_size] = "1G",
    hosts: Sequence[str] = (),
    ports: list[int] | int = 0,
    limits: Mapping[str, float] | None = None,
    labels: dict[str, list[str]] | None = None,
    debug: bool = False,
    free: Any = None,
    untyped=None,
    module: type[Any] | Callable[..., Any] | None = None,
    fixed: tuple[int, str] | None = None,
    **more: Unpack[MoreOptions],
) -> None: ...


def fits(expected: Takes, text: str) -> bool:
    table = read_text(f"key: {text}", "layer", "file", Findings())
    assert table is not None
    return accepts(table.entries["key"], expected)


def keys_of(section: Section, name: str) -> Iterator[tuple[str, Takes]]:
    """All keys of a section, those of the sections in it among them, dotted."""
    for key, expected in section.keys.items():
        yield f"{name}.{key}", expected
        if expected.section is not None:
            yield from keys_of(expected.section(), f"{name}.{key}")


@pytest.mark.parametrize("name", factories.names())
def test_the_keys_of_a_section_are_the_constructors_arguments(name: str) -> None:
    section = ExecutorSections().section(name)

    chosen = factories.class_of(name)
    constructor = set(factories.parameters_of(chosen)[0])
    assert section.keys.keys() == constructor - factories.python_only_of(chosen)
    assert set(section.python_only) == constructor & factories.python_only_of(chosen)
    assert section.others is None


@pytest.mark.parametrize("name", factories.names())
def test_each_number_that_may_be_text_is_a_size_or_a_time(name: str) -> None:
    for key, expected in keys_of(ExecutorSections().section(name), name):
        if str in expected.scalars and float in expected.scalars:
            assert expected.parse in (parse_size, parse_time), key
        elif expected.scalars == {int}:
            assert expected.parse is not None, key


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("address", ["tcp://x", "null"], ["1", "[a]"]),
        ("pool", ["{workers: slurm, max_workers: 2}", "{}"], ["{workers: lsf}", "{work: 1}", "[a]"]),
        ("pool", ["{idle: 10m}", "{idle: 1.5}"], ["{idle: often}", "{idle: [1]}"]),
        ("pool", ["{slurm: {partition: a}}", "{slurm: {}}"], ["{slurm: a}", "{slurm: {partition: 1}}"]),
        ("pool", [], ["{slurm: {partitions: a}}"]),
        ("memory", ["4G", "4000"], ["4X", "1.5", "true"]),
        ("hosts", ["[a, b]", "[]"], ["a", "[1]", "{a: b}", "null"]),
        ("ports", ["1", "[1, 2]"], ["a", "[a]", "1.5"]),
        ("limits", ["{a: 1, b: 1.5}", "{}"], ["{a: x}", "[1]", "null"]),
        ("labels", ["{a: [x]}"], ["{a: x}"]),
        ("debug", ["true"], ["yes", "1"]),
        ("free", ["1", "[a]", "{a: b}", "null"], []),
        ("untyped", ["1", "[a]", "{a: b}", "null"], []),
        ("fixed", ["[1, a]"], ["1", "[true]"]),
        ("name", ["x", "null"], ["1"]),
    ],
)
def test_a_key_takes_what_its_argument_is_typed_as(key: str, right: list[str], wrong: list[str]) -> None:
    expected = section_of(made).keys[key]

    assert [text for text in right if not fits(expected, text)] == []
    assert [text for text in wrong if fits(expected, text)] == []


def test_what_no_text_can_say_is_given_in_python_only() -> None:
    section = section_of(made)

    assert "module" not in section.keys
    assert section.python_only == {"module"}
    assert section.unknown("module") == "it can be given in Python only: no text can say it"


def test_types_that_are_not_there_at_run_time_are_not_checked() -> None:
    section = section_of(factory)

    assert section.keys["cluster"].anything
    assert not fits(section.keys["memory"], "4X")


class Unresolved(TypedDict, total=False):
    """Options of a package, one of whose types is only there for those who check types."""

    place: NotThere  # type: ignore[name-defined]  # noqa: F821
    count: int


class Marker:
    """Says something of a type, and is no check."""


def odd(value: Any) -> None:
    raise KeyError(value)


def test_the_types_of_another_package_harm_nobody() -> None:
    def strange(
        *,
        marked: Annotated[int, Marker] = 1,
        path: Annotated[str, Path] = "/",
        checked: Annotated[int, odd] = 1,
        inner: Unresolved | None = None,
        **more: Unpack[Unresolved],
    ) -> None: ...

    section = section_of(strange)

    assert section.keys["place"].anything
    assert section.keys["count"].anything
    assert fits(section.keys["inner"], "{place: /here, count: 2}")
    assert not fits(section.keys["inner"], "{places: /here}")
    assert fits(section.keys["marked"], "2")
    assert not fits(section.keys["marked"], "two")
    assert fits(section.keys["path"], "/tmp")
    assert not fits(section.keys["checked"], "2")  # its check is wrong in itself, which is told


def test_a_factory_that_takes_whatever_it_is_given_is_not_checked() -> None:
    def takes_all(**options: Any) -> None: ...

    section = section_of(takes_all)

    assert section.others is not None
    assert section.of("anything") is section.others


def test_an_executors_class_is_imported_for_its_own_section_only(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    factory_of = factories.factory_of
    monkeypatch.setattr(factories, "factory_of", lambda name: (imported.append(name), factory_of(name))[1])
    sections = ExecutorSections()

    assert "slurm" in sections.names()
    assert imported == []
    sections.section("thread")
    sections.section("thread")
    assert imported == ["thread"]


def test_a_class_may_say_what_any_of_our_schedulers_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ExecutorSections().extra()

    assert extra is not None
    assert {"qos", "bsub_extra", "tasks_per_job", "constraint"} <= extra.keys.keys()
    assert not {"mem", "partition", "account"} & extra.keys.keys()

    monkeypatch.setitem(factories._PLACES, "batch", standin.PLACE)
    assert ExecutorSections().extra() is None


def test_an_unknown_executor_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown executor 'slrum': did you mean 'slurm'"):
        ExecutorSections().section("slrum")
