"""A job of a cluster, from its script: `python -m fractal_runner.executors.batch DIRECTORY NUMBER ID …`.

For schedulers whose scripts are our own. The words are, in this order: the array's directory, which of its
jobs this is, and what `JobPlace` has: its id, its node ("" for this host's own name), the signals that end it
("INT,TERM"), those that warn it, and when it is to take itself for warned ("" for never). The script is the
only one who says them, and each job would wait for a library that reads options.
"""

from __future__ import annotations

import os
import signal
import sys

from fractal_runner.executors.batch.job import run_job
from fractal_runner.executors.batch.scheduler import JobPlace
from fractal_runner.worker.processes import host_name


def main(words: list[str]) -> None:
    """Run the job that these words name."""
    directory, number, id, node, ended_by, warned_by, warned_at = words
    place = JobPlace(
        id=id,
        node=node or host_name(),
        ended_by=_signals(ended_by),
        warned_by=_signals(warned_by),
        warned_at=float(warned_at) if warned_at else None,
    )
    run_job(directory, int(number), place)


def _signals(text: str) -> frozenset[int]:
    return frozenset(signal.Signals[f"SIG{name}"] for name in text.split(",") if name)


main(sys.argv[1:])
# Nothing of anybody's runs in this process, and to take it apart is a third of what a small job costs.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
