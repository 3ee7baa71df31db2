"""Whether the kernel has ended processes here because they needed more memory than they may have.

A process that is killed by SIGKILL does not tell who killed it. The control group that it was in, and we
are, counts how often the kernel did (cgroups(7); `oom_kill` in memory.events of version 2, and in
memory.oom_control of version 1).
"""

from __future__ import annotations

import functools


def oom_kills(proc: str = "/proc/self") -> int | None:
    """How many processes of our control group the kernel has ended for want of memory; None if unknown."""
    for path in _counters(proc):
        try:
            with open(path, encoding="ascii") as file:
                for line in file:
                    name, _, value = line.partition(" ")
                    if name == "oom_kill":
                        return int(value)
        except (OSError, ValueError):
            continue  # a system without it
    return None


@functools.cache  # a job asks for each of its calls, and stays in its group
def _counters(proc: str) -> tuple[str, ...]:
    """The files that may have the count."""
    try:
        with open(f"{proc}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
        with open(f"{proc}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return ()
    found = []
    for mount in mounts:
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        root, point = mount[3], mount[4]
        for group in groups:
            if len(group) < 3:
                continue
            _, controllers, path = group
            below = path[len(root) :] if root != "/" and path.startswith(root) else path
            if kind == "cgroup" and "memory" in options and "memory" in controllers.split(","):
                found.append(f"{point}{below}/memory.oom_control")
            elif kind == "cgroup2" and not controllers:
                found.append(f"{point}{below}/memory.events")
    return tuple(found)
