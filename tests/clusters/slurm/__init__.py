"""A Slurm cluster of the tests' own, on this machine, whose nodes and controller can be made to fail."""

from tests.clusters.slurm.cluster import MissingPrograms, SlurmCluster, SlurmFailed

__all__ = ["MissingPrograms", "SlurmCluster", "SlurmFailed"]
