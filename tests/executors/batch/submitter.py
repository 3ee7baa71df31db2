"""A process that submits calls to a cluster, and dies: `python submitter.py WHAT FOLDER NOTES …`.

- `submit FOLDER NOTES COUNT [PER_JOB]` submits so many calls over a folder, and waits for them.
- `attach FOLDER NOTES COUNT` attaches to each of them, and prints what becomes of it, as JSON.
- `die-at-each-step FOLDER NOTES` submits a call again and again, each time in a process of its own, which
  is killed one step further on than the last one. It prints what that step would have been, a line each.
- `die-giving-back FOLDER NOTES COUNT` does that to processes that attach to calls whose jobs have ended
  without starting them, so that they are submitted once more.

Each call appends its number to NOTES/ran, and waits for NOTES/may; the first ones do not.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fractal_runner import SlurmExecutor

HASTY = 20  # calls that wait for nothing
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def noting(notes: Path) -> Callable[[int], int]:
    """What the calls do. A closure: it travels by value."""
    place, hasty = str(notes), HASTY

    def work(number: int) -> int:
        import os
        import time

        fd = os.open(f"{place}/ran", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, b"%d\n" % number)
        os.close(fd)
        while number >= hasty and not os.path.exists(f"{place}/may"):  # noqa: PTH110  the worker's way
            time.sleep(0.05)
        return number * 2

    return work


def ran(notes: Path) -> list[int]:
    """The numbers of the calls that have started, in order; those that did so twice are there twice."""
    path = notes / "ran"
    return sorted(map(int, path.read_text().split())) if path.exists() else []


def key_of(number: int) -> str:
    return f"call-{number}"


def executor_over(folder: Path, **options: Any) -> SlurmExecutor:
    return SlurmExecutor(folder, **{"poll_interval": 1, "mem": 100, **options})


def submit(folder: Path, notes: Path, count: int, per_job: int = 25) -> None:
    work = noting(notes)
    with executor_over(folder, calls_per_job=per_job, parallel_calls_per_job=4) as executor:
        futures = [executor.options(key=key_of(number)).submit(work, number) for number in range(count)]
        print([future.result() for future in futures])


def attach(folder: Path, notes: Path, count: int) -> None:
    began = time.monotonic()
    with executor_over(folder) as executor:
        futures = [executor.attach(key_of(number)) for number in range(count)]
        took = time.monotonic() - began
        (notes / "attached").touch()
        results = [None if future is None else future.result() for future in futures]
    print(json.dumps({"took": took, "results": results}))


def die_at_each_step(folder: Path, notes: Path) -> None:
    number = 0
    while _ended(_in_a_fork(_submit_and_die, folder, notes, number)) == -signal.SIGKILL:
        number += 1


def die_giving_back(folder: Path, notes: Path, count: int) -> None:
    for number in range(count):
        _ended(_in_a_fork(_submit_in_vain, folder, notes, number))
    for pid in [_in_a_fork(_attach_and_die, folder, notes, number) for number in range(count)]:
        _ended(pid)


def _submit_and_die(folder: Path, notes: Path, number: int) -> None:
    _die_before(number, folder)
    # A folder each, so that making that is among the steps.
    executor = executor_over(folder / str(number))
    future = executor.options(key=key_of(number)).submit(noting(notes), number)
    _until(lambda: future.running() or future.done())


def _submit_in_vain(folder: Path, notes: Path, number: int) -> None:
    """The job ends before it has started anything."""
    executor = executor_over(folder / str(number), python="/nonexistent/python")
    executor.options(key=key_of(number)).submit(noting(notes), number)
    _until(lambda: list(folder.glob(f"{number}/fr-*/jobs")))


def _attach_and_die(folder: Path, notes: Path, number: int) -> None:
    _die_before(number, folder)
    future = executor_over(folder / str(number)).attach(key_of(number))
    assert future is not None
    _until(lambda: future.running() or future.done())


def _in_a_fork(do: Callable[[Path, Path, int], None], folder: Path, notes: Path, number: int) -> int:
    """Have a child do it, and end; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            do(folder, notes, number)
            code = 0
        except BaseException:  # a fork of ours must not return into what forked it
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def _ended(pid: int) -> int:
    """Its exit code, once it has ended; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.01)


def _die_before(number: int, folder: Path) -> None:
    """Have this process killed before its step `number`: what changes the folder, or starts a command."""
    done = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        step = _step_of(event, args, str(folder))
        if not step:
            return
        if done == number:
            os.write(1, f"{step}\n".encode())  # at once, as there is no later
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # until the signal arrives: the step must not be done meanwhile
        done += 1

    sys.addaudithook(hook)


def _step_of(event: str, args: tuple[Any, ...], folder: str) -> str:
    match event:
        case "subprocess.Popen":
            command = " ".join(map(str, args[1]))
            return "" if "squeue" in command else f"run {command}"  # it is submitted by then
        case "open" if not args[2] & _WRITES:
            return ""
        case "open" | "os.mkdir" | "os.rename" | "os.link" | "os.symlink" | "os.remove":
            path = str(args[1] if event in ("os.rename", "os.link", "os.symlink") else args[0])
            return f"{event} {path}" if path.startswith(folder) else ""
    return ""


def main() -> None:
    what, folder, notes, *more = sys.argv[1:]
    todo: dict[str, Callable[..., None]] = {
        "submit": submit,
        "attach": attach,
        "die-at-each-step": die_at_each_step,
        "die-giving-back": die_giving_back,
    }
    todo[what](Path(folder), Path(notes), *map(int, more))


if __name__ == "__main__":
    main()
