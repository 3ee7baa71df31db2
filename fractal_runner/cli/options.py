"""What people type after options: filters, an executor's options, warm starts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fractal_runner.errors import InputFileError, did_you_mean
from fractal_runner.quantities import parse_time
from fractal_runner.worker.spec import WARM_MODES

if TYPE_CHECKING:
    from fractal_runner.config import Config

_PLAIN = re.compile(r"[A-Za-z_][\w.+-]*")


def read_type_filters(given: Iterable[str]) -> dict[str, bool]:
    """`is_3D=true` as {"is_3D": True}.

    Raises:
        typer.BadParameter: saying what would be right.
    """
    filters: dict[str, bool] = {}
    for item in given:
        name, value = _split(item, "--type-filter", "is_3D=true")
        if value.lower() not in ("true", "false"):
            raise typer.BadParameter(f"{item!r}: a type is true or false, not {value!r}")
        filters[name] = value.lower() == "true"
    return filters


def read_attribute_filters(given: Iterable[str]) -> dict[str, list[Any]]:
    """`well=A01,A02` as {"well": ["A01", "A02"]}; values are JSON scalars where they can be, else text.

    A JSON array after the `=` says exactly what is meant: `well=["1", "a,b"]`.

    Raises:
        typer.BadParameter: saying what would be right.
    """
    filters: dict[str, list[Any]] = {}
    for item in given:
        name, text = _split(item, "--attribute-filter", "well=A01,A02")
        values = _array(text) if text.startswith("[") else [_scalar(value) for value in text.split(",")]
        if values is None:
            raise typer.BadParameter(
                f'{item!r}: after the "=" is no JSON array of text, numbers, true or false'
            )
        filters.setdefault(name, []).extend(values)
    return filters


def executor_words(given: Iterable[str] | None, max_workers: int | None) -> list[str]:
    """What was said of an executor, each as the word of an `--executor-opt`."""
    return [*(given or ()), *([] if max_workers is None else [f"max_workers={max_workers}"])]


def configuration(
    workflow: Path, executor: str | None, options: Iterable[str] | None, max_workers: int | None
) -> Config:
    """The configuration that a run of this workflow has.

    Raises:
        typer.Exit: if it is wrong, which has been told.
    """
    from fractal_runner.executors import sections

    with told_mistakes():
        return sections.load(start=workflow, executor=executor, options=executor_words(options, max_workers))


@contextmanager
def told_mistakes() -> Iterator[None]:
    """Make what is wrong with files or options a message, and the exit code 2."""
    try:
        yield
    except InputFileError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def read_warm_start(mode: str | None, timeout: str | None, max_servers: int | None) -> dict[str, Any]:
    """What was said of warm starts, as arguments of process_workflow.

    Raises:
        typer.BadParameter: saying what would be right.
    """
    if mode is not None and mode not in WARM_MODES:
        raise typer.BadParameter(
            f"{mode!r} is none of {', '.join(WARM_MODES)}: {did_you_mean(mode, WARM_MODES)}",
            param_hint="--warm-start",
        )
    try:
        seconds = None if timeout is None else parse_time(timeout)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--warm-start-timeout") from None
    said = {"warm_start": mode, "warm_start_timeout": seconds, "max_servers": max_servers}
    return {name: value for name, value in said.items() if value is not None}


def filter_arguments(types: Mapping[str, bool], attributes: Mapping[str, Sequence[Any]]) -> list[str]:
    """The words that give these filters on a command line."""
    words = []
    for name, wanted in types.items():
        words += ["--type-filter", f"{name}={str(wanted).lower()}"]
    for name, values in attributes.items():
        plain = values and all(isinstance(value, str) and _is_plain(value) for value in values)
        text = ",".join(values) if plain else json.dumps(list(values))
        words += ["--attribute-filter", f"{name}={text}"]
    return words


def _is_plain(value: str) -> bool:
    return bool(_PLAIN.fullmatch(value)) and _scalar(value) == value


def _split(item: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"{item!r} is not of the form NAME=VALUE: write {option} {example}")
    return name.strip(), value.strip()


def _scalar(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text
    return value if isinstance(value, (str, int, float, bool)) else text


def _array(text: str) -> list[Any] | None:
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return None
    if isinstance(values, list) and all(isinstance(value, (str, int, float, bool)) for value in values):
        return values
    return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")
