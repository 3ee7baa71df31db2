"""`fractal-runner executors`: which there are, who offers them, what they can do, and what they lack here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fractal_runner.executors import factories, plugins

if TYPE_CHECKING:
    from rich.table import Table

    from fractal_runner.config import Config

_OURS = "fractal_runner"
_USABLE = "usable"
_UNKNOWN = "known once it is made"
# The attributes by which a class says what it can do, each with a word for it.
_ABILITIES = (
    ("asynchronous", "asynchronous"),
    ("isolates", "isolates"),
    ("kills", "kills"),
    ("is_remote", "remote"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """An executor's name, and what is known of it.

    Attributes:
        name: the name.
        by: who offers it.
        abilities: what it can do, in words.
        problem: why it cannot be used here; "" if nothing is known against it.
    """

    name: str
    by: str
    abilities: str
    problem: str


def entries(config: Config | None) -> Iterator[Entry]:
    """All executors that there are, by name.

    Args:
        config: the configuration, whose sections count in what they lack; None if it is wrong.
    """
    ours = factories.built_in()
    for name in factories.names():
        options = {} if config is None else config.options(name)
        by = [_OURS] if name in ours else [offer.by for offer in plugins.offers(name)]
        yield _entry(name, " and ".join(by), options)
    for offer in plugins.offers():
        if offer.name in ours or offer.name not in factories.names():
            yield Entry(offer.name, offer.by, "", "the name is taken: this one cannot be had by it")


def table_of(found: list[Entry], default: str) -> Table:
    """Them as a table.

    Args:
        found: the entries.
        default: the name of the one that the configuration names.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table("executor", "from", "can do", "here", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for entry in found:
        chosen = entry.name == default and entry.abilities
        here = entry.problem or _USABLE
        row = (entry.name, entry.by, entry.abilities, f"{here}, the default" if chosen else here)
        table.add_row(*map(Text, row))  # as they are: what stands in brackets is no style
    return table


def _entry(name: str, by: str, options: Mapping[str, Any]) -> Entry:
    try:
        factory = factories.factory_of(name)
    except (ImportError, ValueError) as error:
        return Entry(name, by, "", str(error))
    said = [word for attribute, word in _ABILITIES if getattr(factory, attribute, False) is True]
    known = isinstance(factory, type) and hasattr(factory, _ABILITIES[0][0])
    problem = factories.unusable(name, options)
    missing = factories.missing_of(factory, options)
    if problem is None and (missing := [one for one in missing if one not in _OFFERED]):
        problem = f"the configuration has to say {' and '.join(f'{name}.{one}' for one in missing)}"
    return Entry(name, by, (", ".join(said) or "-") if known else _UNKNOWN, problem or "")


_OFFERED = frozenset({"folder"})  # arguments that a run gives of itself
