"""A job of a cluster, from its script: `python -m fractal_runner.executors.batch DIRECTORY NUMBER …`.

For schedulers whose scripts are our own. What follows the two is what `JobPlace` has.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from fractal_runner.executors.batch.job import run_job
from fractal_runner.executors.batch.scheduler import JobPlace
from fractal_runner.worker.processes import host_name


def main() -> None:
    """Run the job that the command line names."""
    parser = argparse.ArgumentParser("python -m fractal_runner.executors.batch", description=run_job.__doc__)
    parser.add_argument("directory")
    parser.add_argument("number", type=int)
    parser.add_argument("--id", required=True)
    parser.add_argument("--node", help="as the scheduler calls it")
    parser.add_argument("--ended-by", type=_signals, default=frozenset({signal.SIGTERM}), metavar="TERM,INT")
    parser.add_argument("--warned-by", type=_signals, default=frozenset(), metavar="USR2")
    parser.add_argument("--warned-at", type=float, metavar="EPOCH")
    said = parser.parse_args()
    place = JobPlace(
        id=said.id,
        node=said.node or host_name(),
        ended_by=said.ended_by,
        warned_by=said.warned_by,
        warned_at=said.warned_at,
    )
    run_job(said.directory, said.number, place)


def _signals(text: str) -> frozenset[int]:
    try:
        return frozenset(signal.Signals[f"SIG{name}"] for name in text.split(","))
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"there is no signal {error}") from None


main()
# Nothing of anybody's runs in this process, and to take it apart is a third of what a small job costs.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
