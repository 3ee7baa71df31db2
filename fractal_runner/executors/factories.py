"""What executors' names stand for: our own classes, and what others offer.

Here is what makes an executor of a name, and what it takes. Which executors a run or a session has, and with
which options, is the registry's.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from fractal_runner.config import RESERVED
from fractal_runner.errors import did_you_mean
from fractal_runner.executors import base, plugins
from fractal_runner.executors.preview import Previewer

_ADAPTERS = "fractal_runner.executors.adapters"
_LOCAL = "fractal_runner.executors.local.executors"
# By place, not by class: a name costs its import only where it is used.
_PLACES = {
    "dask": f"{_ADAPTERS}.dask:DaskExecutor",
    "fork": f"{_LOCAL}:ForkExecutor",
    "lsf": "fractal_runner.executors.batch.lsf:LsfExecutor",
    "process": f"{_LOCAL}:ProcessExecutor",
    "ray": f"{_ADAPTERS}.ray:RayExecutor",
    "serial": f"{_LOCAL}:SerialExecutor",
    "slurm": "fractal_runner.executors.batch.slurm:SlurmExecutor",
    "spawn": f"{_LOCAL}:SpawnExecutor",
    "thread": f"{_LOCAL}:ThreadExecutor",
}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# What a configuration or a command line cannot give, whatever executor it is for; a class may name more.
PYTHON_ONLY = frozenset({"context", "slots"})

_logger = logging.getLogger("fractal_runner")


def names() -> list[str]:
    """The names of the executors that there are: our own, and those that others offer."""
    return sorted({*_PLACES, *(offer.name for offer in plugins.offers() if offer.name not in RESERVED)})


def built_in() -> list[str]:
    """The names of our own executors."""
    return sorted(_PLACES)


def register(name: str, factory: Callable[..., Executor]) -> None:
    """Give an executor of your own a name, for as long as this process lasts.

    A package does the same for all who install it by an entry point of the group
    `fractal_runner.executors`.

    Args:
        name: letters and digits, with single "-" or "_" between them.
        factory: a class, or a function that makes an executor. It is called with what the configuration's
            section of this name says, as keyword arguments. If what it makes has a method `start`, that is
            called once before the first use, with the session that it belongs to.

    Raises:
        TypeError: if the factory cannot be called.
        ValueError: if the name is not valid, or is taken.
    """
    if name in _PLACES or name in RESERVED:
        whose = "one of our own executors'" if name in _PLACES else "a part of the configuration's"
        raise ValueError(f"the name {name!r} cannot be given to an executor: it is {whose}")
    plugins.add(name, factory)


def factory_of(name: str) -> plugins.Factory:
    """What makes executors of this name: a class, or a function.

    Raises:
        ValueError: if the name is unknown, naming the nearest known one; or if what bears it cannot be had.
    """
    if name in _PLACES:
        for offer in plugins.offers(name):
            _warn_of(offer)
        return class_of(name)
    if name in RESERVED:
        raise ValueError(f"no executor can have the name {name!r}: it is a part of the configuration's")
    return plugins.factory_of(name, _PLACES)


def class_of(name: str) -> type[base.Executor]:
    """The class of our own that bears this name.

    Raises:
        ValueError: if none does, naming the nearest name.
    """
    if name not in _PLACES:
        raise ValueError(f"unknown executor {name!r}: {did_you_mean(name, _PLACES)}")
    module, _, attribute = _PLACES[name].partition(":")
    found: type[base.Executor] = getattr(importlib.import_module(module), attribute)
    return found


def check(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Whether `make` would know this name and these options, without making anything.

    Raises:
        ValueError: if the name or an option is unknown, naming the nearest known one; or if an option is one
            that no text can give, as those of a run are written down.
    """
    check_options(name, options or {}, python_only_of(factory_of(name)))


def make(name: str, options: Mapping[str, Any] | None = None) -> Executor:
    """A new executor.

    Args:
        name: its registered name.
        options: what its constructor takes.

    Raises:
        ValueError: if the name, an option or an option's value is not valid.
        TypeError: if an option is missing, or what bears the name makes no executors.
        ImportError: if it needs what is not installed.
    """
    check_options(name, options or {})
    made = factory_of(name)(**(options or {}))
    if not isinstance(made, Executor):
        raise TypeError(f"the factory of the executor {name!r} has made {made!r}, which is no executor")
    return made


def previewer(name: str, options: Mapping[str, Any]) -> Previewer | None:
    """What tells what an executor makes of calls, without doing it; see `base.Executor.previewer`.

    Args:
        name: its registered name.
        options: what its constructor takes.

    Returns:
        It; None if that is known only once there is such an executor.

    Raises:
        ValueError, TypeError, ImportError: as `make`.
    """
    check_options(name, options)
    factory = factory_of(name)
    if isinstance(factory, type) and issubclass(factory, base.Executor):
        return factory.previewer(options)
    return None


def unusable(name: str, options: Mapping[str, Any]) -> str | None:
    """Why the executor of this name cannot be used here; None if nothing is known against it.

    Args:
        name: its registered name.
        options: what the configuration says of it.

    Raises:
        ValueError: if the name is unknown, or what bears it cannot be had.
    """
    factory = factory_of(name)
    ask = getattr(factory, "unusable", None)
    if not callable(ask):
        return None
    try:
        problem = ask(options)
    except Exception as error:  # of anybody's executor: its mistake must not hide what the others say
        return f"it cannot tell whether it is usable: {type(error).__name__}: {error}"
    return None if problem is None else str(problem)


def is_told(name: str) -> bool:
    """Whether executors of this name are told when they start, if they want to be: not our own."""
    return name not in _PLACES


def python_only_of(factory: plugins.Factory) -> frozenset[str]:
    """The names of those of its arguments that only a program can give."""
    return PYTHON_ONLY | frozenset(getattr(factory, "python_only", ()))


def taken_of(
    factory: plugins.Factory, offered: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What of this the factory takes by name.

    Args:
        factory: a class, or a function that makes an executor.
        offered: arguments that it has if it can use them.
        options: what it is given besides: a class may have no use for something beside that.
    """
    parameters, _ = parameters_of(factory)
    declines = getattr(factory, "declines", None)
    declined = declines(options) if callable(declines) else ()
    return {
        option: value for option, value in offered.items() if option in parameters and option not in declined
    }


def missing_of(factory: plugins.Factory, options: Collection[str]) -> list[str]:
    """The names of arguments that the factory cannot do without, and that are not among these."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # of what is not written in Python
        return []
    needed = [one for one in parameters if one.kind in _NAMED and one.default is inspect.Parameter.empty]
    return [one.name for one in needed if one.name not in options]


def check_options(name: str, options: Mapping[str, Any], refused: Collection[str] = ()) -> None:
    """Whether these are options of this executor, but for some that are refused.

    Raises:
        ValueError: if one is not, naming the nearest one.
    """
    factory = factory_of(name)
    parameters, takes_any = parameters_of(factory)
    known = [option for option in parameters if option not in refused]
    others: Mapping[str, str] = getattr(factory, "other_words", {})
    for option in options:
        if option not in known and (option in refused or not takes_any):
            if option in parameters:
                raise ValueError(
                    f"option {option!r} of executor {name!r} cannot be given with its name, as no text can "
                    "say it: make the executor, and give that"
                )
            hint = f"it is {others[option]!r}" if option in others else did_you_mean(option, known)
            raise ValueError(f"unknown option {option!r} of executor {name!r}: {hint}")


def parameters_of(factory: plugins.Factory) -> tuple[Collection[str], bool]:
    """The names of what a factory takes, those that `**options: Unpack[…]` stands for among them.

    Returns:
        The names, and whether it takes any others as well.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of what is not written in Python
        return (), True
    taken = [name for name, parameter in parameters.items() if parameter.kind in _NAMED]
    rest = [one for one in parameters.values() if one.kind is inspect.Parameter.VAR_KEYWORD]
    if not rest:
        return taken, False
    with suppress(Exception):  # whatever an annotation's text can raise: it only means it is not known
        for parameter in inspect.signature(factory, eval_str=True).parameters.values():
            if get_origin(parameter.annotation) is Unpack:
                return taken + list(get_type_hints(get_args(parameter.annotation)[0])), False
    return taken, True


def name_of(chosen: type) -> str:
    """The name that this class of our own has; the class's if it is not ours."""
    return next((name for name in _PLACES if is_known(chosen, name)), chosen.__name__)


def is_known(chosen: type, name: str) -> bool:
    """Whether this is our own class of this name."""
    return _PLACES.get(name) == f"{chosen.__module__}:{chosen.__qualname__}"


@functools.cache
def _warn_of(offer: plugins.Offer) -> None:
    _logger.warning("%s offers an executor %r: ours is taken, which has that name", offer.by, offer.name)
