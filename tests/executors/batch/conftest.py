"""The clusters that tests of executors for Slurm run on."""

from tests.clusters.slurm.fixtures import slurm_accounting_cluster, slurm_cluster  # noqa: F401
