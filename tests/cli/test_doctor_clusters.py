"""`fractal-runner doctor` on clusters: SLURM's own commands, and both families of LSF's, emulated."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import fractal_runner
from fractal_runner.cli.app import app
from fractal_runner.testing import wait_until
from tests.clusters.lsf import LsfCluster
from tests.clusters.lsf.fixtures import (  # noqa: F401
    ibm,
    ibm_cluster,
    lsf,
    lsf_cluster,
    openlava,
    openlava_cluster,
)
from tests.clusters.slurm import SlurmCluster
from tests.clusters.slurm.fixtures import slurm_cluster  # noqa: F401

pytestmark = pytest.mark.timeout(300)

Doctor = Callable[..., Result]
PROGRAM = str(Path(sys.executable).parent / "fractal-runner")
SMALL = ("--executor-opt", "mem=100")


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Runs it in this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["doctor", *map(str, words)])


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:  # noqa: F811
    slurm_cluster.reset()
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    yield slurm_cluster
    slurm_cluster.reset()


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program on PATH that prints a text, whatever it is asked."""
    programs = tmp_path / "programs"
    programs.mkdir()

    def put(name: str, text: str) -> None:
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        (programs / f"{name}.txt").write_text(text)
        (programs / name).write_text(f'#!/bin/sh\nexec cat "{programs}/{name}.txt"\n')
        (programs / name).chmod(0o755)

    return put


def said(answer: Result) -> str:
    return " ".join(answer.output.split())


def lines_to_write(answer: Result) -> str:
    """All that the report has said is to be written into the configuration."""
    return answer.output.partition("In the configuration, write:\n\n")[2]


def waiting(cluster: SlurmCluster) -> list[str]:
    return str(cluster.run("squeue", "-h", "-o", "%i").stdout).split()


# SLURM.


def test_what_it_says_is_to_be_written_makes_all_well(
    doctor: Doctor, slurm: SlurmCluster, tmp_path: Path
) -> None:
    wrong = doctor("--executor", "slurm", *SMALL, "--executor-opt", "max_array=5000")

    assert wrong.exit_code == 1, wrong.output
    assert "problem up to 5000 jobs are put into an array, and the site allows 1001" in said(wrong)
    assert lines_to_write(wrong) == "slurm:\n  max_array: 1001\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".fractal-runner").mkdir()
    (tmp_path / ".fractal-runner" / "config.yaml").write_text(lines_to_write(wrong))

    right = doctor("--executor", "slurm", *SMALL)

    assert right.exit_code == 0, right.output
    assert "ok the probe ran on this machine (node n" in said(right)
    assert "the site allows 1001: MaxArraySize 1001 (scontrol show config)" in said(right)
    assert "ok jobs go to the partition main (UP, the default one)" in said(right)
    assert "SLURM says: SLURM_VERSION = " in said(right)
    assert waiting(slurm) == []


def test_a_probe_that_waits_for_ever_is_ended_and_slurm_s_reason_told(
    doctor: Doctor, slurm: SlurmCluster
) -> None:
    answer = doctor("--executor", "slurm", "--executor-opt", "cpus_per_task=99", "--timeout", "2s")

    assert answer.exit_code == 3
    assert "problem the probe has not started within 2.0 s" in said(answer)
    assert "squeue says PENDING, reason PartitionConfig: asks for more than the partition's nodes have" in (
        said(answer)
    )
    assert waiting(slurm) == []


def test_ctrl_c_leaves_nothing_in_the_queue(slurm: SlurmCluster, tmp_path: Path) -> None:
    words = ["doctor", "--executor", "slurm", "--executor-opt", "cpus_per_task=99"]
    trying = subprocess.Popen([PROGRAM, *words], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: waiting(slurm), "its job waits")
        trying.send_signal(signal.SIGINT)
        code = trying.wait(60)
    finally:
        trying.kill()

    assert code == 130
    assert waiting(slurm) == []
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_is_refused_is_told_in_slurm_s_words(doctor: Doctor, slurm: SlurmCluster) -> None:
    answer = doctor("--executor", "slurm", "--executor-opt", "partition=mian", "--timeout", "20s")

    assert answer.exit_code == 3
    assert "invalid partition specified: mian" in said(answer)
    assert "problem there is no partition 'mian': did you mean 'main'?" in said(answer)


def test_another_package_and_python_on_the_nodes_are_found(
    doctor: Doctor, slurm: SlurmCluster, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    package = other / "fractal_runner"
    shutil.copytree(
        Path(fractal_runner.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    text = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text(f'{text}\n__version__ = "0.0.1"\n')
    (other / "sitecustomize.py").write_text("import platform\nplatform.python_version = lambda: '3.8.10'\n")
    python = other / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={other} exec {sys.executable} "$@"\n')
    python.chmod(0o755)

    answer = doctor("--executor", "slurm", *SMALL, "--executor-opt", f"python={python}")

    assert answer.exit_code == 3, answer.output
    assert "problem The call 'probe' was not run: the job runs Python 3.8.10 and fractal_runner 0.0.1" in (
        said(answer)
    )
    assert ": set slurm.python to the path of a Python 3." in said(answer)


def test_a_directory_that_the_nodes_do_not_see_is_found(
    doctor: Doctor, slurm: SlurmCluster, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    opened = os.open(runs, os.O_RDONLY)
    fd = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 900)
    os.close(opened)
    try:
        # Through this name the directory is there for this process alone.
        answer = doctor(
            *("--executor", "slurm", *SMALL, "--executor-opt", f"folder={tmp_path}/jobs"),
            *("--directory", f"/proc/self/fd/{fd}"),
        )
    finally:
        os.close(fd)

    assert answer.exit_code == 1, answer.output
    assert "problem the worker does not see the run's directory" in said(answer)
    assert "No such file or directory" in said(answer)


def test_the_cluster_of_a_pool_s_workers_is_looked_at_as_well(
    doctor: Doctor, slurm: SlurmCluster, tmp_path: Path
) -> None:
    pytest.importorskip("distributed")
    words = [
        *("pool.workers=slurm", "pool.host=127.0.0.1", "pool.memory=300"),
        *("pool.slurm.max_array=5000", "pool.max_workers=1"),
    ]

    answer = doctor("--executor", "dask", *(part for word in words for part in ("--executor-opt", word)))

    assert answer.exit_code == 1, answer.output
    assert "ok the probe ran on this machine (node n" in said(answer)
    assert lines_to_write(answer) == "dask:\n  pool:\n    slurm:\n      max_array: 1001\n"
    assert waiting(slurm) == []
    assert list(tmp_path.iterdir()) == []


# LSF.


@pytest.fixture
def site(lsf: LsfCluster, monkeypatch: pytest.MonkeyPatch) -> LsfCluster:  # noqa: F811
    for name, value in lsf.env.items():
        monkeypatch.setenv(name, value)
    return lsf


def test_an_lsf_cluster_that_says_little_of_itself(doctor: Doctor, site: LsfCluster, tmp_path: Path) -> None:
    answer = doctor("--executor", "lsf")

    assert answer.exit_code == 0, answer.output
    assert "ok the probe ran on this machine (node h" in said(answer)
    assert "note LSF does not say how many jobs an array may have, and up to 1000 are put into one" in said(
        answer
    )
    unit = "KB and MB" if site.dialect == "ibm" else "MB"
    assert f"note LSF is told memory in {unit}, by what is usual" in said(answer)
    assert "note `bparams -a` gave no answer: bparams was not found" in said(answer)
    assert list(tmp_path.iterdir()) == []


def test_lsf_s_bounds_are_compared_with_what_the_executor_is_set_to(
    doctor: Doctor, site: LsfCluster, on_path: Callable[[str, str], None]
) -> None:
    on_path("bparams", "Maximum number of jobs in a job array:\n    MAX_JOB_ARRAY_SIZE = 500\n")
    on_path("busers", BUSERS)
    on_path("bqueues", BQUEUES)

    answer = doctor("--executor", "lsf", "--executor-opt", "queue=normal")

    assert answer.exit_code == 1, answer.output
    assert "the site allows 500: MAX_JOB_ARRAY_SIZE 500 (bparams)" in said(answer)
    assert "max_jobs is 1000, and this user may have 250 in the queue: MPJOBS of mona 250 (busers)" in (
        said(answer)
    )
    assert "ok jobs go to the queue normal (Open:Active)" in said(answer)
    assert lines_to_write(answer) == "lsf:\n  max_array: 500\n  max_jobs: 250\n"


def test_the_unit_that_the_site_counts_memory_in_is_compared_as_well(
    doctor: Doctor,
    openlava: LsfCluster,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in openlava.env.items():
        monkeypatch.setenv(name, value)
    conf = openlava.directory / "lsf.conf"
    conf.write_text("# LSF_UNIT_FOR_LIMITS=MB\nLSF_UNIT_FOR_LIMITS=GB\n")
    try:
        right = doctor("--executor", "lsf")
        wrong = doctor("--executor", "lsf", "--executor-opt", "memory_unit=MB")
    finally:
        conf.unlink()

    assert right.exit_code == 0, right.output
    assert "ok LSF is told memory in GB, by lsf.conf" in said(right)
    assert wrong.exit_code == 1
    assert "problem LSF is told memory in MB, by memory_unit, and the site counts in GB" in said(wrong)


def test_a_probe_that_waits_is_ended_and_lsf_s_reason_told(doctor: Doctor, site: LsfCluster) -> None:
    site.configure(dispatch_s=60.0)

    answer = doctor("--executor", "lsf", "--timeout", "1.5s")

    assert answer.exit_code == 3
    assert "problem the probe has not started within 1.5 s" in said(answer)
    assert "PEND" in said(answer)
    assert "New job is waiting for scheduling" in said(answer)
    assert {job.state for job in site.jobs()} == {"EXIT"}


BUSERS = """\
USER/GROUP          JL/P    MAX  NJOBS   PEND    RUN  SSUSP  USUSP    RSV  MPEND  PJOBS MPJOBS   PRIO
mona                   -     48      0      0      0      0      0      0      -      0    250      0
"""
BQUEUES = """\
QUEUE_NAME      PRIO STATUS          MAX JL/U JL/P JL/H NJOBS  PEND   RUN  SUSP
normal           30  Open:Active       -    -    -    -     0     0     0     0
closed           20  Closed:Inact      -    -    -    -     0     0     0     0
"""
