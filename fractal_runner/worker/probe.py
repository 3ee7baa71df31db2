"""What a probe looks at where it runs: versions, host, clock, and whether it sees a directory of ours.

It travels as text: a worker with another Python, or another fractal_runner, may know neither our compiled
functions nor our names. So here is nothing but the standard library, and nothing that is outside `look`.
"""

from __future__ import annotations


def look(directory: str, patience_s: float) -> dict[str, object]:
    """Say what is here, and try the directory in both directions.

    Whoever has sent it has put two empty files there: into "asked" is written from here, and "answer" is
    written from there once that has been seen. They are there beforehand as a file system over the network
    remembers for a minute what it has not found.

    Args:
        directory: where these are, as it is called there.
        patience_s: seconds for which an answer is waited for.

    Returns:
        Plain values, which any Python can unpickle.
    """
    import importlib
    import os
    import platform
    import sys
    import time

    def boot_id() -> str:
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                return file.read().strip()
        except OSError:
            return ""

    def package() -> dict[str, str]:
        try:
            found = importlib.import_module("fractal_runner")
        except Exception as error:  # whatever an import of something broken raises
            return {"version": "", "problem": f"{type(error).__name__}: {error}"}
        return {"version": str(found.__version__), "place": os.path.dirname(str(found.__file__))}

    def sight() -> dict[str, object]:
        try:
            with open(os.path.join(directory, "asked"), "r+b") as file:
                file.write(b"asked\n")
        except OSError as error:
            return {"problem": f"{error.strerror}", "answered": False}
        deadline = time.monotonic() + patience_s
        while True:
            try:
                with open(os.path.join(directory, "answer"), "rb") as file:
                    if file.read():
                        return {"problem": "", "answered": True}
            except OSError as error:
                return {"problem": f"{error.strerror}", "answered": False}
            if time.monotonic() > deadline:
                return {"problem": "", "answered": False}
            time.sleep(0.05)  # another host's writing wakes nobody here

    seen = sight()
    return {
        "clock": time.time(),  # right after the answer was seen: that was given before
        "sight": seen,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "package": package(),
        "host": os.uname().nodename,
        "node": os.environ.get("FRACTAL_RUNNER_NODE", ""),
        "boot_id": boot_id(),
        "pid": os.getpid(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    }
