"""The executor over Ray: on a cluster that there is, or on an instance of its own on this machine."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from fractal_runner.errors import did_you_mean
from fractal_runner.executors.adapters.extras import RAY
from fractal_runner.executors.adapters.rayengine.calls import Manager
from fractal_runner.executors.adapters.rayengine.instance import Node, Settings, acquire, load_ray, release
from fractal_runner.executors.adapters.rayengine.visits import Item, Needs
from fractal_runner.executors.base import Executor, View, at_least_one, info_of
from fractal_runner.executors.calls import Call, CallOptions, TaskInfo
from fractal_runner.executors.cpus import usable_cpus
from fractal_runner.executors.leaving import close_when_gone, wait_at_exit
from fractal_runner.executors.local import child
from fractal_runner.executors.local.reports import dump_call
from fractal_runner.executors.local.workers import dump_context
from fractal_runner.quantities import format_size, parse_count, parse_size

T = TypeVar("T")

_LEVELS_EVERY_S = 0.05
_CONTEXTS_KEPT = 32


class RayExecutor(Executor):
    """Runs calls as tasks of Ray, which finds a node for each with the `cpus`, `gpus` and `memory` it needs.

    A call runs in a process of its own below Ray's worker, kept for the next call: it prints, logs, dies and
    is ended as in a `ProcessExecutor`. fractal_runner has to be installed where Ray's workers run. A process
    has one connection to Ray, which its executors share; one that the caller has made (`ray.init`) is used.

    Args:
        max_workers: how many calls run at a time; by default as many as there are CPUs, here or in the
            cluster as it is now.
        address: of a cluster ("host:6379"; "auto" for the one that this machine belongs to). None, the
            default, starts an instance on this machine, which ends with the last executor that uses it.
        max_cpus, max_memory: what the calls on such an instance may take together; by default
            `max_workers`, and what Ray finds.
        object_store_memory: how much memory the instance has for arguments and results; by default, Ray
            decides.
        runtime_env: what Ray's workers run in, in Ray's words.
        host: the name or address by which a cluster's workers reach this process; by default, the one that
            Ray knows this machine by.
        context: a mapping that calls read with `current_context()`: a copy, as of the first call that sees
            it, which Ray brings to each node once.
        name: what it is called in logs.

    Raises:
        ImportError: if Ray is not installed.
        ValueError: if an argument is not what it should be, or this process has another connection already.
        ExecutorError: if Ray cannot be reached or started.
        TimeoutError: if that takes minutes.
    """

    isolates = True
    kills = True
    is_remote = True

    @classmethod
    def unusable(cls, options: Mapping[str, Any]) -> str | None:
        return RAY.lacking()

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        address: str | None = None,
        max_cpus: int | None = None,
        max_memory: int | float | str | None = None,
        object_store_memory: int | float | str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        host: str | None = None,
        context: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        if max_workers is not None:
            at_least_one(max_workers)
        settings = _settings(
            max_workers=max_workers,
            address=address,
            max_cpus=max_cpus,
            max_memory=max_memory,
            object_store_memory=object_store_memory,
            runtime_env=runtime_env,
        )
        load_ray()
        instance = acquire(settings)
        try:
            self.is_remote = not instance.is_local
            if max_workers is None:
                max_workers = max(1, sum(node.cpus for node in instance.nodes()))
            super().__init__(max_workers=max_workers, name=name, context=context)
            self._instance = instance
            self._lock = threading.Lock()  # guards the next three
            self._contexts: dict[Hashable, tuple[Any, int, Any]] = {}  # by filter, which stands first
            self._numbers = 0
            self._levels: tuple[float, int, bytes] = (0.0, -1, b"")  # looked at when, root's, all of them
            self._manager = Manager(
                instance, self._calls, max_workers=self.max_workers, host=host, name=self.name
            )
        except BaseException:  # a Ctrl-C, too: nobody else would let go of the instance
            release(instance)
            raise
        wait_at_exit(self._manager)
        close_when_gone(self, self._manager)

    def _start(self, call: Call) -> None:
        options = call.options
        message = bytes(dump_call(call, child.about_call(call)))
        number, reference = self._context_of(call)
        item = Item(
            *(call, call.id, call.name, options.timeout, message, self._levels_in_force()),
            Needs(options.cpus, options.gpus, options.memory, _frozen(options.extra), number),
            reference,
        )
        call.fn, call.args, call.kwargs = _handed, (), {}  # it may wait for long
        # Of the manager, not of this object: a future must not keep its executor.
        call.future.add_done_callback(partial(_tell_cancelled, self._manager))
        self._manager.put(item)

    def _stop(self, calls: Sequence[Call]) -> None:
        self._manager.stop(calls)

    def _close(self, wait: bool) -> None:
        self._manager.close(wait)

    def _infos(self, calls: Sequence[Call]) -> list[TaskInfo]:
        infos = []
        for call in calls:
            host, pid = self._manager.place_of(call.id)
            infos.append(info_of(call, state="running", host=host, pid=pid))
        return infos

    def _check_options(self, options: CallOptions) -> None:
        extra = _parsed_extra(options.extra)
        wanted = _wanted(options, extra)
        nodes = self._instance.nodes()
        for resource, amount in wanted.items():
            most = max((node.resources.get(resource, 0) for node in nodes), default=0)
            if amount > most:
                raise ValueError(
                    f"{_said(resource, amount)} exceeds what any node of {self.name} has: "
                    f"{_amount(resource, most)} at most, of {len(nodes)} node(s)"
                )
        if not any(_holds(node, wanted) for node in nodes):
            raise ValueError(
                f"{', '.join(_said(*one) for one in wanted.items())} together exceed what any node of "
                f"{self.name} has: {'; '.join(_described(node, wanted) for node in nodes[:5])}"
            )

    def fitting(self, **options: Any) -> tuple[Executor, list[str]]:
        """As `options`, but what exceeds the largest node is reduced to it. Others' options are left out."""
        extra = options.get("extra") or {}
        foreign = sorted(extra.keys() - _EXTRA.keys())
        options["extra"] = {name: value for name, value in extra.items() if name in _EXTRA}
        told = [f"{name} means nothing to Ray" for name in foreign]
        wanted = self._options.replaced(**options)
        nodes = self._instance.nodes()
        for option, asked, most in (
            ("cpus", wanted.cpus, max((node.cpus for node in nodes), default=1)),
            ("gpus", wanted.gpus, max((node.gpus for node in nodes), default=0)),
            ("memory", wanted.memory or 0, max((node.memory for node in nodes), default=0)),
        ):
            if asked > most:
                resource = _RESOURCES[option]
                told.append(
                    f"{_said(resource, asked)} is more than the {_amount(resource, most)} of the largest "
                    f"node of {self.name}"
                )
                options[option] = f"{most}B" if option == "memory" else most
        chosen = self._options.replaced(**options)
        self._check_options(chosen)
        return View(self, chosen), told

    def _context_of(self, call: Call) -> tuple[int | None, Any]:
        """What the call sees of the context: its number, and Ray's reference. It is put there once."""
        chosen = call.options.context_filter
        if chosen is None and not self._context:
            return None, None
        key: Hashable = (
            chosen if chosen is None or isinstance(chosen, frozenset) else ("function", id(chosen))
        )
        with self._lock:
            known = self._contexts.get(key)
            if known is None:
                reference = self._instance.ray.put(dump_context(call))
                while len(self._contexts) >= _CONTEXTS_KEPT:
                    del self._contexts[next(iter(self._contexts))]  # calls under way keep their own
                self._numbers += 1
                known = self._contexts[key] = chosen, self._numbers, (reference,)
        return known[1], known[2]

    def _levels_in_force(self) -> bytes:
        """The levels of loggers, pickled. Those other than root's are looked at now and then."""
        at, root, pickled = self._levels
        now = time.monotonic()
        if root != logging.root.level or now > at + _LEVELS_EVERY_S:
            pickled = pickle.dumps(child.levels_in_force())
            self._levels = now, logging.root.level, pickled
        return pickled


_RESOURCES = {"cpus": "CPU", "gpus": "GPU", "memory": "memory"}
_OPTIONS = {resource: option for option, resource in _RESOURCES.items()}


def _settings(
    *,
    max_workers: int | None,
    address: str | None,
    max_cpus: int | None,
    max_memory: int | float | str | None,
    object_store_memory: int | float | str | None,
    runtime_env: Mapping[str, Any] | None,
) -> Settings:
    cpus = _parsed("max_cpus", parse_count, max_cpus)
    memory = _parsed("max_memory", parse_size, max_memory)
    store = _parsed("object_store_memory", parse_size, object_store_memory)
    if address is not None:
        for option, value in (("max_cpus", cpus), ("max_memory", memory), ("object_store_memory", store)):
            if value is not None:
                raise ValueError(
                    f"{option} is for an instance that is started here: the cluster at {address!r} has its "
                    "own"
                )
    return Settings(
        address=address,
        cpus=cpus,
        workers=max_workers or usable_cpus(),
        memory=memory,
        object_store_memory=store,
        runtime_env=runtime_env,
    )


def _parsed(name: str, parse: Callable[[Any], T], value: Any) -> T | None:
    try:
        return None if value is None else parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _text(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{value!r} is not a text of at least one character")


def _amounts(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str) and isinstance(amount, (int, float)) and amount > 0
        for name, amount in value.items()
    ):
        raise ValueError(f"{value!r} is not a mapping of resources' names to positive numbers")
    if taken := _OPTIONS.keys() & value.keys():
        raise ValueError(
            ", ".join(f"{resource!r} is the option {_OPTIONS[resource]!r}" for resource in sorted(taken))
        )
    return dict(value)


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(one, str) for pair in value.items() for one in pair
    ):
        raise ValueError(f"{value!r} is not a mapping of labels to their values")
    return dict(value)


# Further options of a task that may be given as `extra`, by Ray's names for them.
_EXTRA: dict[str, Callable[[Any], Any]] = {
    "accelerator_type": _text,
    "label_selector": _labels,
    "resources": _amounts,
    "scheduling_strategy": _text,
}


def _parsed_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A task's further options.

    Raises:
        ValueError: for one that is unknown or not what it should be.
    """
    parsed = {}
    for name, value in extra.items():
        if name not in _EXTRA:
            raise ValueError(f"extra: Ray's tasks have no option {name!r} here: {did_you_mean(name, _EXTRA)}")
        parsed[name] = _parsed(f"extra: {name}", _EXTRA[name], value)
    return parsed


def _frozen(extra: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A task's further options, as what may be a key."""
    if not extra:
        return ()
    return tuple(
        (name, tuple(sorted(value.items())) if isinstance(value, dict) else value)
        for name, value in sorted(_parsed_extra(extra).items())
    )


def _wanted(options: CallOptions, extra: Mapping[str, Any]) -> dict[str, float]:
    """What a node must have for a call, by Ray's names; what is not asked for is left out."""
    wanted = {resource: getattr(options, option) for option, resource in _RESOURCES.items()}
    return {name: amount for name, amount in (wanted | extra.get("resources", {})).items() if amount}


def _holds(node: Node, wanted: Mapping[str, float]) -> bool:
    return all(node.resources.get(resource, 0) >= amount for resource, amount in wanted.items())


def _said(resource: str, amount: float) -> str:
    """As it was asked for: "cpus=4", "memory=4GB"."""
    return f"{_OPTIONS.get(resource, resource)}={_amount(resource, amount)}"


def _amount(resource: str, amount: float) -> str:
    return format_size(int(amount)) if resource == "memory" else f"{amount:g}"


def _described(node: Node, wanted: Mapping[str, float]) -> str:
    has = ", ".join(_said(resource, node.resources.get(resource, 0)) for resource in wanted)
    return f"{node.name} has {has}"


def _tell_cancelled(manager: Manager, future: Any) -> None:
    if future.cancelled():
        manager.cancelled()


def _handed(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a call that was handed to Ray is run here")
