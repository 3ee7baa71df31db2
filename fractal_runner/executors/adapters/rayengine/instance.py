"""This process's one connection to Ray: to a cluster, or to an instance of its own on this machine.

Ray knows one connection per process, so the executors of a process share it: the first one opens it, the
last one closes it. One that the caller has opened (`ray.init`) is used, and left open.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fractal_runner.errors import ExecutorError
from fractal_runner.executors.adapters.extras import RAY
from fractal_runner.executors.adapters.rayengine.guardian import clean, start
from fractal_runner.quantities import format_size

PREFIX = "fr-ray-"
# What Ray adds to its directory: /session_2026-01-31_12-00-00_123456_1234567/sockets/plasma_store; 107 bytes
# are what the path of a socket may have.
_LONGEST_FOLDER = 107 - 72
_OPEN_S = 180.0
_CLOSE_S = 60.0
_LOOK_S = 0.5
_KNOCK_S = 20.0
_NODES_KEPT_S = 5.0
_LOCK = "in-use"
_OWN = "r"  # Ray lets everybody write to its directory: it has one within ours
_logger = logging.getLogger("fractal_runner")


@dataclass(frozen=True, slots=True)
class Settings:
    """How Ray is reached.

    Attributes:
        address: of the cluster; None for an instance of this process's own.
        cpus, memory, object_store_memory: of that instance; None to leave it to Ray, or to take what there
            is.
        workers: how many CPUs a new one has if `cpus` does not say.
        runtime_env: what Ray's workers run in, in Ray's own words.
    """

    address: str | None = None
    cpus: int | None = None
    workers: int = 1
    memory: int | None = None
    object_store_memory: int | None = None
    runtime_env: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """What a node of the cluster has, or could have if Ray started it.

    Attributes:
        name: its host, or the name of its kind.
        resources: by Ray's names; memory in bytes.
    """

    name: str
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def cpus(self) -> int:
        return int(self.resources.get("CPU", 0))

    @property
    def gpus(self) -> int:
        return int(self.resources.get("GPU", 0))

    @property
    def memory(self) -> int:
        return int(self.resources.get("memory", 0))


def load_ray() -> Any:
    """The package `ray`.

    Raises:
        ImportError: with what to do about it, if it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise RAY.error(error) from error
    return ray


class Instance:
    """The connection. `_Shared.lock` guards `users`; all else is set before anybody sees it.

    A thread of its own opens and closes it: Ray's daemons end with the thread that has started them.
    """

    def __init__(self, settings: Settings) -> None:
        self.ray = load_ray()
        self.settings = settings
        self.users = 1
        self.folder: Path | None = None
        self.is_local = settings.address is None
        self.is_borrowed = bool(self.ray.is_initialized())
        self._pid = os.getpid()
        self._lock_fd = -1
        self._guardian: subprocess.Popen[bytes] | None = None
        self._opened = threading.Event()
        self._to_be_closed = threading.Event()
        self._problem: BaseException | None = None
        self._nodes: tuple[float, list[Node]] = (0.0, [])
        if self.is_borrowed:
            self.is_local = False
            self._thread = None
            return
        self._thread = threading.Thread(target=self._live, name="ray instance", daemon=True)
        self._thread.start()
        try:
            _wait(self._opened, _OPEN_S, "start" if self.is_local else f"answer at {settings.address}")
        except BaseException:  # a Ctrl-C, too, must leave nothing behind
            self._to_be_closed.set()
            raise
        if self._problem is not None:
            raise self._problem

    def is_open(self) -> bool:
        """Whether it can be used; a borrowed one is the caller's to close."""
        return not self._to_be_closed.is_set() and bool(self.ray.is_initialized())

    def node_address(self) -> str:
        """By which address the nodes of the cluster know this one."""
        address: str = self.ray.util.get_node_ip_address()
        return address

    def nodes(self) -> list[Node]:
        """The nodes that there are, and those that the cluster's autoscaler could add."""
        at, nodes = self._nodes
        # Once it is closed there is nobody to ask, and Ray would start an instance to do so.
        if not nodes or (self.is_open() and time.monotonic() > at + _NODES_KEPT_S):
            nodes = [
                Node(node["NodeManagerHostname"], node["Resources"])
                for node in self.ray.nodes()
                if node["Alive"]
            ]
            nodes += possible_nodes(self._cluster_config())
            self._nodes = time.monotonic(), nodes
        return nodes

    def _cluster_config(self) -> Any:
        """What the autoscaler has said that it can start; None if there is none."""
        try:
            return self.ray._private.state.state.get_cluster_config()
        except AttributeError:  # not a public interface: another version of Ray need not have it
            return None

    def close(self) -> None:
        """Close it, if it was opened here, and wait for that."""
        if self._thread is None or os.getpid() != self._pid:
            return
        self._to_be_closed.set()
        deadline = time.monotonic() + _CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(_LOOK_S)  # in turns: a Ctrl-C does not wake a thread that just goes to sleep
        if self._thread.is_alive():
            _logger.warning("Ray has not shut down in %.0f s, and is left to itself", _CLOSE_S)

    def _live(self) -> None:
        try:
            self._open()
        except BaseException as error:  # whoever waits for it raises it
            self._problem = _told(self.settings, error)
            self._shut_down()
            self._opened.set()
            return
        self._opened.set()
        self._to_be_closed.wait()
        self._shut_down()

    def _open(self) -> None:
        settings = self.settings
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if settings.runtime_env is not None:
            options["runtime_env"] = dict(settings.runtime_env)
        if settings.address is not None:
            _knock(settings.address)
            with _quiet():
                self.ray.init(address=settings.address, **options)
            return
        folder = self._make_folder()
        options |= {
            "num_cpus": settings.cpus or settings.workers,
            "include_dashboard": False,
            "_temp_dir": str(folder / _OWN),
        }
        options |= {"_memory": settings.memory, "object_store_memory": settings.object_store_memory}
        # A token of our own: Ray would make one in the home directory, which everybody can read.
        own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": _TOKEN}
        with _quiet(), _environment(own, kept="RAY_AUTH_MODE"):
            self.ray.init(address="local", **options)

    def _make_folder(self) -> Path:
        parent = short_folder()
        sweep(parent)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock_fd = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        self._guardian = start(self.folder)
        return self.folder

    def _shut_down(self) -> None:
        with _quiet():
            try:
                self.ray.shutdown(**({"wait_for_processes": True} if self.is_local else {}))
            except (
                Exception
            ):  # Ray's own; nobody waits for it, and what is left of it is removed all the same
                _logger.exception("Ray could not be shut down properly")
        if self._guardian is not None:
            self._guardian.kill()
            self._guardian.wait()
        if self.folder is not None and (left := clean(self.folder)):
            _logger.warning("of a local Ray instance these processes cannot be ended: %s", left)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


class _Shared:
    """The instance of this process."""

    lock = threading.Lock()
    instance: Instance | None = None
    is_fork = False  # of a process that had one

    @classmethod
    def reset(cls) -> None:
        cls.lock = threading.Lock()
        cls.is_fork = cls.is_fork or cls.instance is not None
        cls.instance = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Shared.reset)


def acquire(settings: Settings) -> Instance:
    """The connection that these settings ask for: a new one, or the one that there is, if it has all that.

    Raises:
        ValueError: if there is one, and it is another one, or has less.
        ExecutorError: if there is no Ray at the address, or it does not start.
        ImportError: if it is not installed.
        TimeoutError: if it takes too long.
        RuntimeError: in a fork of a process that is connected.
    """
    if _Shared.is_fork:
        raise RuntimeError(
            "This process is a fork of one that is connected to Ray, and Ray's connections do not survive "
            "that: make it a fresh interpreter (multiprocessing's start method 'spawn')"
        )
    if settings.address is not None and settings.address.startswith("ray://"):
        raise ValueError(
            f"address={settings.address!r} is one for Ray's client, behind which its workers cannot reach "
            "this process: run it on a machine of the cluster's network, and give the address of the cluster "
            "itself ('host:6379', or 'auto')"
        )
    with _Shared.lock:
        present = _Shared.instance
        if present is not None:
            _check_same(present, settings)
            present.users += 1
            return present
        instance = Instance(settings)
        if instance.is_borrowed:
            _check_borrowed(instance, settings)
        _Shared.instance = instance
        return instance


def release(instance: Instance) -> None:
    """Let go of it; whoever is the last one to do so closes it."""
    with _Shared.lock:
        instance.users -= 1
        if instance.users:
            return
        _Shared.instance = None
        instance.close()


def possible_nodes(config: Any) -> list[Node]:
    """What the autoscaler of a cluster can start, by what it has published (its `ClusterConfig`)."""
    return [
        Node(group.name, dict(group.resources))
        for group in (() if config is None else config.node_group_configs)
        if group.max_count
    ]


def short_folder() -> Path:
    """Where the directory of an instance is made: Ray puts sockets below it, whose paths must be short."""
    chosen = tempfile.gettempdir()
    return Path(chosen if len(os.fsencode(chosen)) + len(PREFIX) + 9 <= _LONGEST_FOLDER else "/tmp")


def _check_same(present: Instance, settings: Settings) -> None:
    if settings.address != present.settings.address and not present.is_borrowed:
        here = present.settings.address or "a local instance"
        raise ValueError(
            f"This process is connected to Ray already, to {here}, and it can have one such connection: "
            f"address={settings.address!r} needs that one to be shut down first, or another process"
        )
    if present.is_borrowed:
        _check_borrowed(present, settings)
        return
    if settings.runtime_env is not None and settings.runtime_env != present.settings.runtime_env:
        raise ValueError(
            "This process is connected to Ray already, with another runtime_env, and it can have one such "
            "connection"
        )
    there = present.nodes()[0].resources if present.is_local else {}
    for option, wanted, resource in (
        ("max_cpus", settings.cpus, "CPU"),
        ("max_memory", settings.memory, "memory"),
        ("object_store_memory", settings.object_store_memory, "object_store_memory"),
    ):
        if wanted is not None and wanted > there.get(resource, wanted):
            said = (lambda amount: f"{amount:.0f}") if resource == "CPU" else format_size
            raise ValueError(
                f"{option}={said(wanted)} is more than the {said(int(there[resource]))} of the local Ray "
                "instance that this process has already, and it can have one only: shut that one down first"
            )


def _check_borrowed(instance: Instance, settings: Settings) -> None:
    """Whether a connection that the caller has opened is what is asked for."""
    connected = instance.ray.get_runtime_context().gcs_address
    if settings.address not in (None, "auto", connected):
        raise ValueError(
            f"This process is connected to Ray already, at {connected} (by its own ray.init), and it can "
            f"have one such connection: address={settings.address!r} cannot be had"
        )
    for option in ("memory", "object_store_memory", "runtime_env"):
        if getattr(settings, option) is not None:
            name = "max_memory" if option == "memory" else option
            raise ValueError(
                f"{name} is for an instance that RayExecutor starts, and this process is connected to Ray "
                f"already, at {connected}: give it to ray.init"
            )


def _told(settings: Settings, error: BaseException) -> BaseException:
    """The error, with what was tried."""
    if not isinstance(error, Exception) or (settings.address is not None and type(error) is ValueError):
        return error
    what = "A local Ray instance cannot be started"
    if settings.address is not None:
        what = f"Ray cannot be reached at address={settings.address!r}"
    told = ExecutorError(f"{what}: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told


def _wait(event: threading.Event, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not event.wait(_LOOK_S):  # in turns, for a Ctrl-C
        if time.monotonic() > deadline:
            raise TimeoutError(f"Ray did not {what} in {seconds:.0f} s")


def sweep(parent: Path) -> None:
    """Clean up after instances whose processes were killed, guardians and all: nobody holds their locks."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or just being made or removed
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clean(folder)
            finally:
                os.close(fd)


def _knock(address: str) -> None:
    """See that somebody listens at a cluster's address: where nobody does, Ray ends the whole program.

    Raises:
        OSError: if nobody does.
        ValueError: if it is no address.
    """
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"{address!r} is neither 'host:port' nor 'auto'")
    socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from telling, on standard error, what is as it should be."""
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _environment(own: Mapping[str, str], kept: str) -> Iterator[None]:
    """Variables for the daemons that are started here; what the caller has set stays, and counts."""
    added = {name: value for name, value in own.items() if name not in os.environ}
    was_there = kept in os.environ
    os.environ.update(added)
    try:
        yield
    finally:
        for name in [*added, *(() if was_there else (kept,))]:
            os.environ.pop(name, None)


_TOKEN = secrets.token_hex(32)  # one per process: Ray reads it once
