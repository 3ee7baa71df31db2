"""The clusters as fixtures. A `conftest.py` that wants them says

    from tests.clusters.slurm.fixtures import slurm_accounting_cluster, slurm_cluster  # noqa: F401

However many do, a process of tests has one cluster of each kind, from its first use to its end. So the tests
of a process share it: those that need it idle and whole say `cluster.reset()` first.
"""

from __future__ import annotations

import pytest

from tests.clusters.slurm.cluster import MissingPrograms, SlurmCluster

_RUNNING = {accounting: pytest.StashKey[SlurmCluster]() for accounting in (False, True)}


@pytest.fixture(scope="session")
def slurm_cluster(pytestconfig: pytest.Config) -> SlurmCluster:
    """A Slurm cluster where `sacct` says that there is no accounting."""
    return _cluster(pytestconfig, accounting=False)


@pytest.fixture(scope="session")
def slurm_accounting_cluster(pytestconfig: pytest.Config) -> SlurmCluster:
    """A Slurm cluster where `sacct` works."""
    return _cluster(pytestconfig, accounting=True)


def _cluster(config: pytest.Config, *, accounting: bool) -> SlurmCluster:
    key = _RUNNING[accounting]
    if key not in config.stash:
        try:
            cluster = SlurmCluster(accounting=accounting)
        except MissingPrograms as error:
            pytest.skip(str(error))
        cluster.start()
        config.add_cleanup(cluster.stop)
        config.stash[key] = cluster
    return config.stash[key]
