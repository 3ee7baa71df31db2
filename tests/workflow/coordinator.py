"""A run in a process of its own, which a test can kill: `python coordinator.py FILE` runs what FILE says."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle

TOP = Path(__file__).parent.parent.parent


class Coordinator:
    """Such a process.

    Args:
        place: a directory for its files.
        arguments: those of process_workflow.
    """

    def __init__(self, place: Path, **arguments: Any) -> None:
        number = len(list(place.glob("coordinator*.pickle")))
        file = place / f"coordinator{number}.pickle"
        file.write_bytes(cloudpickle.dumps(arguments))
        self._errors = file.with_suffix(".err")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(file)],
                stderr=errors,
                cwd=TOP,
                env={**os.environ, "PYTHONPATH": str(TOP)},
            )
        self.pid = self._process.pid

    def kill(self) -> None:
        """Kill it, as nothing can be prepared for."""
        assert self._process.poll() is None, self._errors.read_text()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)

    def end(self) -> str:
        """Wait for its end; what it had to say."""
        self._process.wait(60)
        return self._errors.read_text()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)


async def main() -> None:
    from fractal_runner import process_workflow

    await process_workflow(**pickle.loads(Path(sys.argv[1]).read_bytes()))


if __name__ == "__main__":
    asyncio.run(main())
