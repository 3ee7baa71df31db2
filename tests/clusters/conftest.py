"""The tests' own clusters, for the tests of them."""

from tests.clusters.slurm.fixtures import slurm_accounting_cluster, slurm_cluster  # noqa: F401
