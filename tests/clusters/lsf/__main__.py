"""An emulated LSF to try things on by hand: python -m tests.clusters.lsf start|stop|shell"""

from __future__ import annotations

import argparse

from tests.clusters.by_hand import ByHand
from tests.clusters.lsf.cluster import LsfCluster, LsfFailed
from tests.clusters.lsf.dialects import DIALECTS


def _add_options(start: argparse.ArgumentParser) -> None:
    start.add_argument("--dialect", choices=DIALECTS, default="openlava", help="default: %(default)s")
    start.add_argument(
        "--minute", type=float, default=60.0, metavar="SECONDS", help="how long a minute of -W is"
    )


if __name__ == "__main__":
    ByHand(
        module="tests.clusters.lsf",
        what="An emulated LSF cluster on this machine, to try things on.",
        add_options=_add_options,
        make=lambda directory, said: LsfCluster(directory, dialect=said.dialect, minute_s=said.minute),
        env=lambda directory: {"PATH": str(directory / "bin"), "LSF_ENVDIR": str(directory)},
        failures=(LsfFailed,),
    ).main()
