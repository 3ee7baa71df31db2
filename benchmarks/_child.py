"""Measurements in processes of their own: with a peak memory of their own, and nothing left behind.

`call` runs a function of a benchmark in a fresh interpreter, as
`python -m benchmarks._child MODULE:FUNCTION ARGUMENTS`, and brings back what it returns, as JSON.
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent


class Child:
    """A function running in a fresh interpreter.

    Args:
        function: a module-level function of a module below `benchmarks`, returning a dict for JSON.
        arguments: its keyword arguments; JSON values.
    """

    def __init__(self, function: str, **arguments: Any) -> None:
        self.function = function
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._child", function, json.dumps(arguments)],
            cwd=TOP,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for_line(self) -> str:
        """A line that the function prints before it returns: it is ready."""
        assert self._popen.stdout is not None
        return self._popen.stdout.readline()

    def result(self) -> dict[str, Any]:
        """What the function returned. Its stdin ends now, which may be what it is waiting for.

        Raises:
            RuntimeError: if it failed; its traceback is on stderr.
        """
        out, _ = self._popen.communicate()
        if self._popen.returncode:
            raise RuntimeError(f"{self.function} failed with exit code {self._popen.returncode}")
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._popen.kill()
        self._popen.communicate()


def call(function: str, **arguments: Any) -> dict[str, Any]:
    """Run a function in a fresh interpreter; what it returned. Arguments as for `Child`."""
    child = Child(function, **arguments)
    try:
        return child.result()
    except BaseException:
        child.kill()
        raise


def peak_memory() -> int:
    """This process's own peak memory, in bytes.

    VmHWM of /proc/self/status, which starts anew at exec; ru_maxrss does not: a child's is at least its
    parent's. Where there is no /proc, ru_maxrss is what there is.
    """
    return _memory("VmHWM:")


def memory_now() -> int:
    """This process's memory, in bytes."""
    return _memory("VmRSS:")


def _memory(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _main() -> None:
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _main()
