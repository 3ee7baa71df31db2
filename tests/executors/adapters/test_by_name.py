"""Dask and Ray by name: what a configuration says of them, what a run gives them, and that it can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import InputFileError, session
from fractal_runner.config import Config
from fractal_runner.executors import factories, registry
from fractal_runner.executors.adapters.dask import _own_terms
from fractal_runner.executors.adapters.daskpool.options import SAID_OF_JOBS, PoolOptions, jobs_section
from fractal_runner.executors.adapters.daskpool.terms import PARSERS, PoolTerms
from fractal_runner.executors.sections import ExecutorSections, load
from tests.executors.adapters.resuming import assert_resumed_over_the_same

CLUSTER: dict[str, Any] = {"pool": {"workers": "slurm", "host": "login1", "slurm": {"partition": "main"}}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory without a configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    yield tmp_path


def configure(text: str) -> None:
    Path(".fractal-runner").mkdir(exist_ok=True)
    Path(".fractal-runner/config.yaml").write_text(text)


def problem_of(**said: Any) -> str:
    with pytest.raises(InputFileError) as caught:
        load(**said)
    return str(caught.value)


# What a section says


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dask: {pools: {}}", "config.yaml:1: dask.pools: unknown key: did you mean 'pool'?"),
        ("dask:\n pool:\n  worker: slurm", ":3: dask.pool.worker: unknown key: did you mean 'workers'?"),
        (
            "dask:\n pool: {workers: slrum}",
            ":2: dask.pool.workers: 'slrum' is not what it takes: did you mean",
        ),
        (
            "dask: {pool: {min_workers: two}}",
            "dask.pool.min_workers: 'two' is text, and it takes a whole number",
        ),
        ("dask: {pool: {min_workers: -1}}", "dask.pool.min_workers: -1 is not a whole number of at least 0"),
        (
            "dask: {pool: {idle_timeout: soon}}",
            "dask.pool.idle_timeout: 'soon' is not a time: write '01:30:00'",
        ),
        ("dask: {pool: {memory: 4X}}", "dask.pool.memory: '4X' is not a size: write '4GB'"),
        ("dask: {pool: [local]}", "dask.pool: this is a list, and it takes a mapping"),
        (
            "dask: {pool: {slurm: {partiton: a}}}",
            "dask.pool.slurm.partiton: unknown key: did you mean 'partition'",
        ),
        ("dask: {pool: {slurm: {queue: a}}}", "dask.pool.slurm.queue: unknown key: it is 'partition' here"),
        ("dask: {pool: {lsf: {walltime: ages}}}", "dask.pool.lsf.walltime: 'ages' is not a time"),
        ("dask: {pool: {lsf: {cores: 4}}}", "dask.pool.lsf.cores: it is not to be said of a pool's jobs"),
        ("dask: {retries: -1}", "dask.retries: -1 is not a whole number of at least 0"),
        ("dask: {cluster: x}", "dask.cluster: it can be given in Python only"),
        ("dask: {security: x}", "dask.security: it can be given in Python only"),
        ("ray: {max_memory: much}", "ray.max_memory: 'much' is not a size"),
        ("ray: {object_store_memory: 1Z}", "ray.object_store_memory: '1Z' is not a size"),
        ("ray: {adress: auto}", "ray.adress: unknown key: did you mean 'address'?"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_the_nearest_key(text: str, message: str) -> None:
    configure(text)

    assert message in problem_of()


def test_a_pool_is_told_of_by_options_and_variables_as_well() -> None:
    configure("dask: {pool: {workers: local, slurm: {partition: main}}}")

    config = load(
        executor="dask",
        options=["pool.workers=slurm", "pool.max_workers=8", "pool.slurm.time=2h"],
        environ={
            "FRACTAL_RUNNER__DASK__POOL__HOST": "login1",
            "FRACTAL_RUNNER__DASK__POOL__SLURM__ACCOUNT": "lab",
        },
    )

    assert config.options("dask") == {
        "pool": {
            "workers": "slurm",
            "max_workers": 8,
            "host": "login1",
            "slurm": {"partition": "main", "time": "2h", "account": "lab"},
        }
    }
    assert str(config.origin("dask.pool.slurm.time")) == "--executor-opt pool.slurm.time=2h"
    assert "dask.pool.worker: unknown key" in problem_of(executor="dask", options=["pool.worker=local"])
    assert "FRACTAL_RUNNER__DASK__POOL__WORKER: dask.pool.worker: unknown key" in problem_of(
        environ={"FRACTAL_RUNNER__DASK__POOL__WORKER": "local"}
    )


def test_what_is_said_of_a_pool_is_what_it_is_made_of() -> None:
    assert PoolOptions.__annotations__.keys() == PARSERS.keys()
    for name in ("slurm", "lsf"):
        whole = ExecutorSections().section(name)
        assert jobs_section(name).keys.keys() == whole.keys.keys() - SAID_OF_JOBS


def test_a_file_may_say_something_of_several_clusters() -> None:
    said = {"workers": "local", "slurm": {"partition": "main"}, "lsf": {"queue": "long"}}

    assert PoolTerms.of(said).cluster == {}
    assert PoolTerms.of({**said, "workers": "lsf", "host": "a"}).cluster == {"queue": "long"}


def test_paths_are_mapped_where_the_nodes_see_them_elsewhere() -> None:
    own = {**CLUSTER["pool"], "slurm": {"path_map": {"/a": "/b"}}}

    assert _own_terms(CLUSTER["pool"], None, {"/here": "/there"}).cluster["path_map"] == {"/here": "/there"}
    assert _own_terms(own, None, {"/here": "/there"}).cluster["path_map"] == {"/a": "/b"}
    assert _own_terms({"workers": "local"}, None, {"/here": "/there"}).cluster == {}


def test_what_only_a_program_can_give_is_not_given_by_name() -> None:
    with pytest.raises(ValueError, match="option 'cluster' of executor 'dask' cannot be given with its name"):
        registry.Executors(("dask", {"cluster": object()}))
    with pytest.raises(ValueError, match="unknown option 'clusters' of executor 'dask'"):
        factories.check("dask", {"clusters": 1})


def test_a_pool_of_a_cluster_is_usable_where_the_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    chosen = factories.class_of("dask")

    assert "no sbatch on PATH" in (chosen.unusable(CLUSTER) or "")
    assert chosen.unusable({**CLUSTER, "join": "mine"}) is None
    assert chosen.unusable({}) is None


# What a run gives


@pytest.mark.parametrize(
    ("name", "options", "folder"),
    [
        ("dask", {}, False),
        ("dask", {"pool": {"workers": "local"}}, False),
        ("dask", CLUSTER, True),
        ("dask", {**CLUSTER, "join": "mine"}, False),
        ("dask", {**CLUSTER, "address": "tcp://a:1"}, False),
        ("ray", {}, False),
        ("slurm", {}, True),
    ],
)
def test_a_folder_is_offered_where_workers_are_jobs(
    name: str, options: dict[str, Any], folder: bool, tmp_path: Path
) -> None:
    offered = {"folder": tmp_path, "path_map": {"/here": "/there"}}

    given = registry._arguments(name, Config.empty(), options, offered)

    assert given == {**options, **(offered if folder else {})}
    assert (
        registry._arguments(name, Config.empty(), {**options, "folder": "mine"}, offered)["folder"] == "mine"
    )


@pytest.mark.parametrize(
    ("name", "options"), [("dask", CLUSTER), ("ray", {"max_workers": 2, "max_memory": "1GB"})]
)
def test_what_is_written_down_of_a_run_makes_the_same_executor(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    executors = registry.Executors((name, options), config=load(), directory=tmp_path / "run")

    assert executors.by_name == (name, options)
    written = json.loads(json.dumps(executors.by_name))
    again = load(recorded={"executor": written[0], written[0]: written[1]})
    assert again.options(name) == options
    assert registry.Executors(None, config=again).by_name == executors.by_name


def test_of_a_session_it_is_written_down_with_its_folder(tmp_path: Path) -> None:
    with session(dask=CLUSTER) as s:
        name, options = registry.Executors("dask", config=s.config).by_name or ("", {})

    assert (name, options) == ("dask", {**CLUSTER, "folder": tmp_path / "fractal_jobs" / "dask"})


def test_a_run_is_resumed_over_dask(tmp_path: Path) -> None:
    assert_resumed_over_the_same(tmp_path, "dask", "pool.workers=local", "pool.idle_timeout=5m")

    for number in range(2):
        assert "distributed.cli.dask_worker" in (tmp_path / f"seen{number}").read_text()
