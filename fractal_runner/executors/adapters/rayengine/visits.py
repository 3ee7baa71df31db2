"""Calls that wait for places of Ray's, and the places: tasks that serve calls, which are called visits."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import Any

from fractal_runner.executors.adapters.rayengine import worker
from fractal_runner.executors.adapters.rayengine.channel import Channel
from fractal_runner.executors.calls import Call


@dataclass(frozen=True, slots=True)
class Needs:
    """What Ray is asked for: calls with the same share visits.

    Attributes:
        cpus, gpus, memory: see `CallOptions`.
        extra: further options of Ray's, as (name, value).
        context: the number of what they see of the context, if they do.
    """

    cpus: int
    gpus: int
    memory: int | None
    extra: tuple[tuple[str, Any], ...] = ()
    context: int | None = None

    def options(self) -> dict[str, Any]:
        """The same as options of a task of Ray."""
        extra = {name: dict(value) if isinstance(value, tuple) else value for name, value in self.extra}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus or None, "memory": self.memory, **extra}


@dataclass(slots=True, eq=False)
class Item:
    """A call on its way.

    Attributes:
        number, name, timeout: the call's.
        message: its pickle, let go of when it is sent.
        levels: the loggers' levels, pickled.
        needs: what it asks for.
        reference: the context in Ray's object store, if it sees any.
    """

    call: Call
    number: int
    name: str
    timeout: float | None
    message: bytes
    levels: bytes
    needs: Needs
    reference: Any = None


class State(enum.IntEnum):
    ASKED_FOR = 0  # Ray has been asked for the place
    HERE = 1  # it serves a call
    PARKED = 2  # it waits for one
    LEAVING = 3  # it gets no more


class Visit:
    """A task of Ray. The manager's thread owns all of it."""

    __slots__ = (
        *("channel", "error", "force_at", "host", "item", "number", "over_at", "pid", "queue", "ref"),
        *("state", "until"),
    )

    def __init__(self, number: int, queue: Queue) -> None:
        self.number = number
        self.queue = queue
        self.ref: Any = None
        self.state = State.ASKED_FOR
        self.channel: Channel | None = None
        self.item: Item | None = None  # the call that it serves
        self.host: str | None = None
        self.pid: int | None = None
        self.until = 0.0  # when it has stayed long enough; if it is parked, or asked for, when it is dropped
        self.force_at: float | None = None
        self.over_at: float | None = None  # when Ray said that it is over
        self.error: BaseException | None = None

    def leave(self) -> None:
        """Let it be over: it gets no more calls."""
        self.state = State.LEAVING
        self.queue.leaving += 1
        if self.channel is not None:
            self.channel.say(worker.NO, 0)


class Queue:
    """Calls that need the same, and the visits for them. The manager's thread owns all of it."""

    def __init__(self, needs: Needs, reference: Any, task: Any) -> None:
        self.needs = needs
        self.context = None if needs.context is None else (needs.context, reference)
        self.task = task
        self.items: deque[Item] = deque()
        self.asked_for: dict[int, Visit] = {}
        self.visits = 0
        self.leaving = 0  # of them
        self.failed = 0  # visits, one after another, that have not got going
        self.surplus_at: float | None = None  # since when there are more places asked for than calls

    def next(self) -> Item | None:
        """The next call that is still wanted; it has begun."""
        while self.items:
            item = self.items.popleft()
            if item.call.begin():
                return item
        return None

    def drop_ended(self) -> None:
        while self.items and self.items[0].call.future.done():  # cancelled
            self.items.popleft()
