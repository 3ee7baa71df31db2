"""An LSF of the tests' own, on this machine, whose scheduler and hosts can be made to fail.

An emulation, not LSF: built from recorded exchanges with a scheduler of the openlava family, and from IBM's
documentation. No IBM LSF has been tried. See README.md.
"""

from tests.clusters.lsf.cluster import LsfCluster, LsfFailed
from tests.clusters.lsf.seen import ClientCall, JobSeen

__all__ = ["ClientCall", "JobSeen", "LsfCluster", "LsfFailed"]
