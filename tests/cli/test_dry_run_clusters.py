"""A dry run on clusters: the scripts that it prints are those which a run leaves behind."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fractal_runner.cli.app import app
from fractal_runner.cli.dry_run import SCRIPT_BEGINS, SCRIPT_ENDS
from tests.clusters.lsf import LsfCluster
from tests.clusters.lsf.fixtures import ibm_cluster, lsf, lsf_cluster, openlava_cluster  # noqa: F401
from tests.clusters.slurm import SlurmCluster
from tests.clusters.slurm.fixtures import slurm_cluster  # noqa: F401

pytestmark = pytest.mark.timeout(300)

IMAGES = 5
OPTIONS = {
    "poll_interval": "1",
    "calls_per_job": "3",
    "parallel_calls_per_job": "1",
    "setup": '["umask 022"]',
    "teardown": '["true"]',
    "env": '{"WHO": "it\'s me"}',
}
LISTS_ONE = shlex.join(["sh", "-c", """echo '{"parallelization_list": [{"zarr_url": "/d/1"}]}' >"$3" """])

Here = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Runs the program in this process, in tmp_path, over a parallel task and a compound one."""
    monkeypatch.chdir(tmp_path)
    tasks = [
        {
            "task": {"name": "Look", "command_parallel": "true"},
            "meta_parallel": {"mem": 100, "time": "00:03:00"},
        },
        {
            "task": {
                "name": "List",
                "type": "compound",
                "command_non_parallel": LISTS_ONE,
                "command_parallel": "true",
            },
            "meta_non_parallel": {"mem": 110, "time": "00:04:00"},
            "meta_parallel": {"mem": 120, "cpus_per_task": 1},
        },
    ]
    Path("w.json").write_text(json.dumps({"name": "w", "task_list": tasks}))
    images = [{"zarr_url": f"/d/{number}", "attributes": {}, "types": {}} for number in range(IMAGES)]
    Path("d.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))
    return lambda *words: CliRunner().invoke(app, ["run", "w.json", "--dataset", "d.json", *words])


def words(executor: str) -> list[str]:
    options = [word for name, value in OPTIONS.items() for word in ("--executor-opt", f"{name}={value}")]
    return ["--workflow-dir", "r", "--executor", executor, *options]


def scripts(printed: str) -> list[str]:
    """The scripts between their marks, without the end of their last line, which some have not."""
    return re.findall(
        rf"^{re.escape(SCRIPT_BEGINS)}.*\n((?s:.*?))\n{re.escape(SCRIPT_ENDS)}.*$", printed, re.MULTILINE
    )


def said(printed: str, name: str) -> list[str]:
    return re.findall(rf"^    {re.escape(name)} +(?!\(once\))(.+)$", printed, re.MULTILINE)


def without_name(text: str, array: str) -> str:
    return text.replace(array, "fr-ARRAY")


def slurm_scripts(folder: Path) -> list[str]:
    """The scripts of the arrays that have their directories there, without their names."""
    return [
        without_name(path.read_text().removesuffix("\n"), array.name)
        for array in folder.glob("fr-*")
        for path in (array / "submitit").glob("*_submission.sh")
        if not path.is_symlink()
    ]


def test_the_scripts_are_those_that_sbatch_is_given(
    slurm_cluster: SlurmCluster,  # noqa: F811
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slurm_cluster.reset()
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)

    def jobs() -> set[str]:
        return set(slurm_cluster.run("squeue", "--noheader", "--states=all", "--format=%A").stdout.split())

    before = jobs()  # of other tests, which have ended
    told = here(*words("slurm"), "--dry-run")

    assert told.exit_code == 0, told.output
    assert {path.name for path in tmp_path.iterdir()} == {"d.json", "w.json"}
    assert jobs() <= before

    ran = here(*words("slurm"))

    assert ran.exit_code == 0, ran.output
    left = slurm_scripts(tmp_path / "r" / "jobs" / "slurm")
    assert len(left) == 3
    assert sorted(scripts(told.output)) == sorted(left)
    assert said(told.output, "packing") == [
        "5 units in 1 array of 2 jobs: 3 units per job, 1 at a time",
        "1 unit in 1 array of 1 job: 1 unit per job, 1 at a time",
    ]
    assert said(told.output, "each job")[0] == "1 CPU, 100 MB, 9:00 min"
    assert said(told.output, "for one unit") == [
        "how many there are, its first command lists only when it runs"
    ]


def test_the_script_of_a_pools_workers_is_the_one_that_they_are_started_by(
    slurm_cluster: SlurmCluster,  # noqa: F811
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slurm_cluster.reset()
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    pool = {"workers": "slurm", "max_workers": 1, "memory": "200MB", "host": "127.0.0.1"}
    asked = ["--workflow-dir", "r", "--executor", "dask", "--last", "0"]
    for name, value in {**pool, "slurm.poll_interval": 1, "slurm.setup": '["umask 022"]'}.items():
        asked += ["--executor-opt", f"pool.{name}={value}"]

    told = here(*asked, "--dry-run")

    assert told.exit_code == 0, told.output
    assert {path.name for path in tmp_path.iterdir()} == {"d.json", "w.json"}

    ran = here(*asked)

    assert ran.exit_code == 0, ran.output
    [script] = scripts(told.output)
    left = slurm_scripts(tmp_path / "r" / "jobs" / "dask" / "jobs")
    assert set(left) == {script}


def test_the_scripts_and_words_are_those_that_bsub_is_given(
    lsf: LsfCluster,  # noqa: F811
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in lsf.env.items():
        monkeypatch.setenv(name, value)

    told = here(*words("lsf"), "--dry-run")

    assert told.exit_code == 0, told.output
    assert {path.name for path in tmp_path.iterdir()} == {"d.json", "w.json"}
    assert {call.program for call in lsf.calls()} <= {"lsid", "bjobs"}  # asked which LSF it is
    assert lsf.jobs() == []

    ran = here(*words("lsf"))

    assert ran.exit_code == 0, ran.output
    arrays = [path for path in (tmp_path / "r" / "jobs" / "lsf").iterdir() if path.is_dir()]
    left = [without_name((array / "job.sh").read_text().removesuffix("\n"), array.name) for array in arrays]
    assert len(left) == 3
    assert sorted(scripts(told.output)) == sorted(left)
    submitted = []
    for call in lsf.calls("bsub"):
        name = call.argv[call.argv.index("-J") + 1].partition("[")[0]
        submitted.append([without_name(word, name) for word in call.argv])
    printed = [shlex.split(line) for line in [*said(told.output, "by"), *said(told.output, "by (once)")]]
    assert sorted(line[1:] for line in printed) == sorted(line[line.index("-J") :] for line in submitted)
    assert all(line[0] == "bsub" for line in printed)
