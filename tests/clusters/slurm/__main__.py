"""A Slurm cluster to try things on by hand: python -m tests.clusters.slurm start|stop|shell"""

from __future__ import annotations

import argparse

from tests.clusters.by_hand import ByHand
from tests.clusters.slurm.cluster import MissingPrograms, SlurmCluster, SlurmFailed


def _add_options(start: argparse.ArgumentParser) -> None:
    start.add_argument("--accounting", action="store_true", help="with slurmdbd, so that sacct works")


if __name__ == "__main__":
    ByHand(
        module="tests.clusters.slurm",
        what="A Slurm cluster on this machine, to try things on.",
        add_options=_add_options,
        make=lambda directory, said: SlurmCluster(directory, accounting=said.accounting),
        env=lambda directory: {"SLURM_CONF": str(directory / "slurm.conf")},
        failures=(MissingPrograms, SlurmFailed),
    ).main()
