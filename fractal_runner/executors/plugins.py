"""Executors that others have written: registered in this process, or offered by installed packages.

Apart from the registry, which has the names of our own: here is only who offers what. Nothing of a package is
imported before its name is used, so one that is broken harms no other.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from importlib import metadata

from fractal_runner.errors import did_you_mean

GROUP = "fractal_runner.executors"  # of the entry points by which packages offer executors

Factory = Callable[..., Executor]

_logger = logging.getLogger("fractal_runner")

# A name is a key of the configuration, and a folder's.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[_-][A-Za-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class Offer:
    """An executor's name and who offers it.

    Attributes:
        name: the name.
        by: who offers it, for people: "package example 1.0", "register() in this process".
        place: where its factory is, "module:attribute".
        load: gives the factory.
    """

    name: str
    by: str
    place: str
    load: Callable[[], Factory]


# Changed by whole entries only, by `add`: each step is one operation on a dictionary.
_registered: dict[str, Offer] = {}


def add(name: str, factory: Factory) -> None:
    """Register a factory, as long as this process lasts.

    Raises:
        TypeError: if it cannot be called.
        ValueError: if the name is no name, or somebody else has it.
    """
    check_name(name)
    if not callable(factory):
        raise TypeError(f"the factory of the executor {name!r} cannot be called: {factory!r}")
    offer = Offer(name, "register() in this process", _place_of(factory), lambda: factory)
    others = [other for other in offers(name) if (other.by, other.place) != (offer.by, offer.place)]
    if others:
        raise ValueError(
            f"the executor's name {name!r} is taken, by {_who(others)}: take another one for {offer.place}"
        )
    _registered[name] = offer  # also when a notebook's cell has defined the same thing once more


def offers(name: str | None = None) -> list[Offer]:
    """All offers, or those of one name, in the order of names."""
    found = [*_registered.values(), *_of_packages()]
    return sorted((one for one in found if name in (None, one.name)), key=lambda one: (one.name, one.by))


def factory_of(name: str, known: Collection[str]) -> Factory:
    """The factory that is offered by this name.

    Args:
        name: the name.
        known: our own names, for the error.

    Raises:
        ValueError: if nobody offers it, naming the nearest name; if two do, naming both; if what is offered
            is no name, or cannot be imported, or called.
    """
    found = offers(name)
    if not found:
        everything = {*known, *(offer.name for offer in offers())}
        raise ValueError(f"unknown executor {name!r}: {did_you_mean(name, everything)}")
    if len(found) > 1:
        raise ValueError(
            f"the executor {name!r} is offered by {_who(found)}: uninstall one of them, or register the one "
            "that is meant by another name"
        )
    [offer] = found
    try:
        check_name(name)
        factory = offer.load()
    except (Exception, SystemExit) as error:  # importing a package runs its own code, which may even exit
        raise ValueError(
            f"the executor {name!r} of {offer.by} cannot be had: {offer.place}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(factory):
        raise ValueError(f"the executor {name!r} of {offer.by} cannot be made: {offer.place} is {factory!r}")
    return factory


def check_name(name: str) -> None:
    """Whether an executor can have this name.

    Raises:
        ValueError: if not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be an executor's name: letters and digits, with single '-' or '_' between them"
        )


@functools.cache
def _of_packages() -> tuple[Offer, ...]:
    """What installed packages offer; read once, as installing one takes a new process to count."""
    return tuple(
        Offer(point.name, f"package {point.dist.name} {point.dist.version}", point.value, point.load)
        for point in _points()
        if point.dist is not None
    )


def _points() -> Iterable[metadata.EntryPoint]:
    try:
        return metadata.entry_points(group=GROUP)
    except Exception:  # whatever reading a package's broken file raises: it does not say which package's
        return list(_points_of_each())


def _points_of_each() -> Iterator[metadata.EntryPoint]:
    """The entry points of each package by itself, without those of packages whose file is broken."""
    seen: set[str] = set()
    for package in metadata.distributions():
        name = str(package.metadata["Name"])
        if name in seen:  # the first one that Python finds is the one that is imported
            continue
        seen.add(name)
        try:
            yield from package.entry_points.select(group=GROUP)
        except Exception as error:  # as above
            place = package.locate_file("")
            _logger.warning(
                "the entry points of package %s in %s cannot be read: %s: %s",
                *(name, place, type(error).__name__, error),
            )


def _who(found: Collection[Offer]) -> str:
    return " and ".join(f"{offer.by} ({offer.place})" for offer in found)


def _place_of(factory: object) -> str:
    if isinstance(factory, functools.partial):
        return f"partial of {_place_of(factory.func)}"
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{named.__module__}:{getattr(named, '__qualname__', '')}"
