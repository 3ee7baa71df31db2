"""The clusters whose jobs are Dask's workers in tests."""

from tests.clusters.lsf.fixtures import (  # noqa: F401
    ibm,
    ibm_cluster,
    lsf,
    lsf_cluster,
    openlava,
    openlava_cluster,
)
from tests.clusters.slurm.fixtures import slurm_accounting_cluster, slurm_cluster  # noqa: F401
