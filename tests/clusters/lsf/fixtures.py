"""The clusters as fixtures. A `conftest.py` that wants them says

    from tests.clusters.lsf.fixtures import ibm_cluster, lsf_cluster, openlava_cluster  # noqa: F401

However many do, a process of tests has one cluster of each dialect, from its first use to its end. So the
tests of a process share it: those that need it idle and whole say `cluster.reset()` first, or use `lsf`,
`openlava` and `ibm`, which do.

A minute is a second there, and the other times are short as well; `cluster.configure` changes them until the
next reset. Every test in which someone does what nobody may fails at its end: see `LsfCluster.violations`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clusters.lsf.cluster import LsfCluster

_RUNNING = {dialect: pytest.StashKey[LsfCluster]() for dialect in ("openlava", "ibm")}
_SHORT = {
    "minute_s": 1.0,
    "kill_interval_s": 0.5,
    "kill_after_s": 1.0,
    "reply_timeout_s": 2.0,
    "retry_s": 0.1,
}


@pytest.fixture(scope="session", params=["openlava", "ibm"])
def lsf_cluster(request: pytest.FixtureRequest) -> LsfCluster:
    """An LSF cluster: each test has it in both dialects."""
    return _cluster(request.config, request.param)


@pytest.fixture(scope="session")
def openlava_cluster(pytestconfig: pytest.Config) -> LsfCluster:
    """A cluster that speaks as the openlava family does."""
    return _cluster(pytestconfig, "openlava")


@pytest.fixture(scope="session")
def ibm_cluster(pytestconfig: pytest.Config) -> LsfCluster:
    """A cluster that speaks as IBM Spectrum LSF 10.1 does."""
    return _cluster(pytestconfig, "ibm")


@pytest.fixture
def lsf(lsf_cluster: LsfCluster) -> LsfCluster:
    """The cluster, in both dialects, with no jobs and nothing wrong."""
    lsf_cluster.reset()
    return lsf_cluster


@pytest.fixture
def openlava(openlava_cluster: LsfCluster) -> LsfCluster:
    """The cluster that speaks as the openlava family does, with no jobs and nothing wrong."""
    openlava_cluster.reset()
    return openlava_cluster


@pytest.fixture
def ibm(ibm_cluster: LsfCluster) -> LsfCluster:
    """The cluster that speaks as IBM's does, with no jobs and nothing wrong."""
    ibm_cluster.reset()
    return ibm_cluster


class Watch:
    """No test may do what ends others' jobs: a plugin that is there with a cluster's first use."""

    def __init__(self, cluster: LsfCluster) -> None:
        self._cluster = cluster

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        """Look at the end of each test, whatever it used: the cluster is shared."""
        try:
            return (yield)
        finally:
            self.check()

    def check(self) -> None:
        """Fail if there is something."""
        found = self._cluster.violations()
        self._cluster.forget_violations()
        if found:
            pytest.fail("\n".join(found), pytrace=False)


def _cluster(config: pytest.Config, dialect: str) -> LsfCluster:
    key = _RUNNING[dialect]
    if key not in config.stash:
        cluster = LsfCluster(dialect=dialect, **_SHORT)
        cluster.start()
        config.add_cleanup(cluster.stop)
        config.stash[key] = cluster
        config.pluginmanager.register(Watch(cluster))
    return config.stash[key]
