"""What all tests share: where the tasks' environment is, and what a skipped test means."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

pytest.register_assert_rewrite("fractal_runner.testing")  # before any module of tests imports it

# Started in the background, as `make test &`, all would ignore a Ctrl-C, and so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The machine is shared: how long an example takes says nothing, nor how long it takes to make one.
hypothesis.settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared machine")

TOP = Path(__file__).parent.parent

# What the user of this machine has configured is nothing to the tests, nor to what they start.
os.environ["XDG_CONFIG_HOME"] = str(TOP / "tests" / "no-configuration")
for _name in [
    name for name in os.environ if name.startswith(("FRACTAL_RUNNER__", "FRACTAL_RUNNER_EXECUTOR"))
]:
    del os.environ[_name]


@pytest.fixture(scope="session")
def top() -> Path:
    """The project's top level."""
    return TOP


@pytest.fixture(scope="session")
def task_python() -> Path:
    """The Python of the demo's task environment, which `make test` sets up."""
    python = TOP / ".venv-tasks" / "bin" / "python"
    if not (TOP / ".venv-tasks" / ".ready").exists():
        pytest.skip("no task environment: `make .venv-tasks/.ready` sets it up")
    return python


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where nothing may be missing, a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("FRACTAL_RUNNER_NO_SKIPS"):
        return
    if skipped := reporter.stats.get("skipped"):
        reporter.write_line(f"{len(skipped)} test(s) skipped, which is a failure here", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
