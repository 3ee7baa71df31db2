"""The six layers: which counts over which, for each kind of key, and where each of them is found."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fractal_runner import config
from fractal_runner.config.layers import BUILT_IN, LAYERS
from fractal_runner.config.values import Findings, plain
from fractal_runner.config.yaml12 import read_text
from tests.config.conftest import SECTIONS, Layers

FILES = LAYERS[:4]


def spoken(value: Any) -> str:
    """A value as one line of YAML, which a file, a variable and an option can all have in them."""
    if isinstance(value, tuple):
        return f"!replace {json.dumps(list(value))}"
    return json.dumps(value)


def say(layers: Layers, layer: str, key: tuple[str, str], value: Any) -> str:
    """Let a layer say this of a key; what the origin of the value will be."""
    section, name = key
    if layer in FILES:
        path = layers.files[layer]
        path.parent.mkdir(parents=True, exist_ok=True)
        executor = "executor: thread\n" if layer == BUILT_IN else "# nothing of the executor\n"
        path.write_text(f"{executor}{section}:\n  {name}: {spoken(value)}\n")
        return f"{path}:3"
    if layer == "environment":
        variable = f"FRACTAL_RUNNER__{section.upper()}__{name.upper()}"
        layers.environ[variable] = spoken(value)
        return variable
    whole = name if section == "slurm" else f"{section}.{name}"
    layers.arguments["options"] = [f"{whole}={spoken(value)}"]
    return f"--executor-opt {whole}={spoken(value)}"


# By kind: the key, what an earlier layer says, what a later one says (a tuple is a list with !replace),
# what that makes, and for each final value whether it is the later layer's.
KINDS: dict[str, tuple[tuple[str, str], Any, Any, Any, dict[str, bool]]] = {
    "scalar": (("slurm", "partition"), "short", "long", "long", {"slurm.partition": True}),
    "null": (("slurm", "partition"), "short", None, None, {"slurm.partition": True}),
    "scalar over null": (("slurm", "partition"), None, "long", "long", {"slurm.partition": True}),
    "mapping": (
        ("slurm", "env"),
        {"A": "1", "B": "1"},
        {"B": "2", "C": "2"},
        {"A": "1", "B": "2", "C": "2"},
        {"slurm.env.A": False, "slurm.env.B": True, "slurm.env.C": True},
    ),
    "list": (
        ("slurm", "setup"),
        ["a", "b"],
        ["b", "c"],
        ["a", "b", "b", "c"],
        {"slurm.setup[0]": False, "slurm.setup[1]": False, "slurm.setup[2]": True, "slurm.setup[3]": True},
    ),
    "!replace": (("slurm", "setup"), ["a", "b"], ("c",), ["c"], {"slurm.setup[0]": True}),
    "!replace by nothing": (("slurm", "setup"), ["a", "b"], (), [], {"slurm.setup": True}),
    "list after !replace": (
        ("slurm", "setup"),
        ("a",),
        ["b"],
        ["a", "b"],
        {"slurm.setup[0]": False, "slurm.setup[1]": True},
    ),
    "resource class": (
        ("resource_classes", "large"),
        {"cpus": 4, "memory": "8G", "extra": {"gres": "gpu:1", "setup": ["a"]}},
        {"memory": "64G", "gpus": 1, "extra": {"setup": ["b"]}},
        {"cpus": 4, "memory": "64G", "extra": {"gres": "gpu:1", "setup": ["a", "b"]}, "gpus": 1},
        {
            "resource_classes.large.cpus": False,
            "resource_classes.large.memory": True,
            "resource_classes.large.gpus": True,
            "resource_classes.large.extra.gres": False,
            "resource_classes.large.extra.setup[0]": False,
            "resource_classes.large.extra.setup[1]": True,
        },
    ),
}
PAIRS = list(itertools.combinations(LAYERS, 2))


@pytest.mark.parametrize(("earlier", "later"), PAIRS, ids=lambda layer: layer)
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_layer_counts_over_an_earlier_one(
    layers: Layers, tmp_path: Path, kind: str, earlier: str, later: str
) -> None:
    key, before, after, expected, whose = KINDS[kind]
    layers.files[BUILT_IN] = tmp_path / "builtin.yaml"
    layers.files[BUILT_IN].write_text("executor: thread\n")
    origins = {False: say(layers, earlier, key, before), True: say(layers, later, key, after)}

    found = layers.load(
        executor="slurm",
        files=[config.LayerFile(layer, layers.files[layer], named=layer == BUILT_IN) for layer in FILES],
    )

    said = found.options("slurm") if key[0] == "slurm" else found.resource_classes
    assert said == {key[1]: expected}
    rows = {row.key: row.origin for row in found.rows(".".join(key))}
    assert {name: str(origin) for name, origin in rows.items()} == {
        name: origins[is_later] for name, is_later in whose.items()
    }
    assert {origin.layer for origin in rows.values()} <= {earlier, later}


def executor_from(layers: Layers, layer: str, name: str) -> str:
    if layer == BUILT_IN:
        return "builtin.yaml:2"
    if layer in FILES:
        return f"{layers.write(layer, f'executor: {name}')}:1"
    if layer == "environment":
        layers.environ["FRACTAL_RUNNER_EXECUTOR"] = name
        return "FRACTAL_RUNNER_EXECUTOR"
    layers.arguments["executor"] = name
    return f"--executor {name}"


@pytest.mark.parametrize(("earlier", "later"), PAIRS, ids=lambda layer: layer)
def test_the_executor_is_what_the_later_layer_says(layers: Layers, earlier: str, later: str) -> None:
    executor_from(layers, earlier, "process")
    source = executor_from(layers, later, "slurm")

    found = layers.load()

    assert found.executor == "slurm"
    assert str(found.origin("executor")) == source


@pytest.mark.parametrize("layer", LAYERS)
def test_the_executor_can_be_said_by_each_layer_alone(layers: Layers, layer: str) -> None:
    source = executor_from(layers, layer, "fork")

    found = layers.load()

    assert found.executor == ("thread" if layer == BUILT_IN else "fork")
    assert found.origin("executor").layer == layer
    assert str(found.origin("executor")).endswith(source)


def test_where_nothing_is_said_the_built_in_layer_counts_and_knows_its_line(layers: Layers) -> None:
    found = layers.load()

    assert (found.executor, dict(found.defaults), dict(found.resource_classes)) == ("thread", {}, {})
    [row] = found.rows()
    assert row.origin.line is not None
    lines = Path(row.origin.source).read_text().splitlines()
    assert lines[row.origin.line - 1] == f"executor: {row.value}"


# Where the layers lie


def test_the_files_are_where_people_look_for_them(layers: Layers) -> None:
    found = config.layer_files(layers.start, layers.environ)

    assert [file.layer for file in found] == list(FILES)
    assert {file.layer: file.path for file in found[1:]} == layers.files
    assert not any(file.named for file in found[1:])


def test_the_projects_file_is_the_nearest_one_upwards_from_the_workflow(layers: Layers) -> None:
    deep = layers.start / "a" / "b"
    deep.mkdir(parents=True)
    layers.write("project", "executor: process")
    workflow = deep / "w.json"
    workflow.write_text("{}")

    assert config.load(SECTIONS, start=workflow, environ={}).executor == "process"

    nearer = layers.start / "a" / ".fractal-runner" / "config.yaml"
    nearer.parent.mkdir()
    assert config.load(SECTIONS, start=workflow, environ={}).executor == "process"
    nearer.write_text("executor: fork")
    assert config.load(SECTIONS, start=workflow, environ={}).executor == "fork"
    assert config.load(SECTIONS, start=layers.start, environ={}).executor == "process"


def test_for_calls_from_python_it_is_looked_for_from_the_current_directory(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers.write("project", "executor: process")

    assert config.load(SECTIONS, environ={}).executor == "thread"
    monkeypatch.chdir(layers.start)
    assert config.load(SECTIONS, environ={}).executor == "process"


def test_a_variable_names_another_installations_file(layers: Layers, tmp_path: Path) -> None:
    layers.write("installation", "executor: process")
    other = tmp_path / "other.yaml"
    other.write_text("executor: fork")
    layers.environ["FRACTAL_RUNNER_INSTALL_CONFIG"] = str(other)

    assert layers.load().executor == "fork"
    layers.environ["FRACTAL_RUNNER_INSTALL_CONFIG"] = ""
    assert layers.load().executor == "process"


def test_another_users_file_in_a_directory_of_everybodys_is_not_taken(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers.write("project", "executor: process")
    layers.start.chmod(0o1777)
    owner = os.getuid() or 4711
    if os.getuid() == 0:  # whose files are everybody's to trust
        os.chown(layers.files["project"].parent, owner, -1)
    monkeypatch.setattr("os.getuid", lambda: owner + 1)

    [mistake] = layers.mistakes()

    assert "belongs to another user" in mistake
    assert "a .fractal-runner/config.yaml of your own, nearer to the workflow, comes before it" in mistake
    layers.start.chmod(0o755)
    assert layers.load().executor == "process"


def test_files_with_nothing_but_comments_say_nothing(layers: Layers) -> None:
    layers.write("installation", "")
    layers.write("site", "# nothing yet\n")
    layers.write("project", "\ufeff---\n")

    assert [row.key for row in layers.load().rows()] == ["executor"]


# Variables and options


@pytest.mark.parametrize(
    ("variable", "word", "key", "expected"),
    [
        ("SLURM__PARTITION", "main", "slurm.partition", "main"),
        ("SLURM__PARTITION", "1234", "slurm.partition", "1234"),
        ("SLURM__PARTITION", "null", "slurm.partition", None),
        ("SLURM__PARTITION", "'null'", "slurm.partition", "null"),
        ("SLURM__ACCOUNT", "0123", "slurm.account", "0123"),
        ("SLURM__ACCOUNT", "123", "slurm.account", 123),
        ("SLURM__CONSTRAINT", "[rack1|rack2]", "slurm.constraint", "[rack1|rack2]"),
        ("SLURM__CONSTRAINT", "a # b: c", "slurm.constraint", "a # b: c"),
        ("SLURM__EXCLUDE", "*", "slurm.exclude", "*"),
        ("SLURM__EXCLUDE", "[n1, n2]", "slurm.exclude", ["n1", "n2"]),
        ("SLURM__MAX_WORKERS", " 4 ", "slurm.max_workers", 4),
        ("SLURM__REQUEUE", "false", "slurm.requeue", False),
        ("slurm__Partition", "main", "slurm.partition", "main"),
        ("SLURM__ENV__OMP_NUM_THREADS", "4", "slurm.env.OMP_NUM_THREADS", "4"),
        ("SLURM__ENV__A__B", "x", "slurm.env.A__B", "x"),
        ("SLURM__ENV", '{A: "1"}', "slurm.env.A", "1"),
        ("SLURM", "{partition: main}", "slurm.partition", "main"),
        ("DEFAULTS__MEMORY", "4G", "defaults.memory", "4G"),
        ("RESOURCE_CLASSES__LARGE__MEMORY", "64G", "resource_classes.large.memory", "64G"),
        ("RESOURCE_CLASSES__Large__GPUS", "1", "resource_classes.Large.gpus", 1),
        ("RESOURCE_CLASSES__BIG_GPU__GPUS", "1", "resource_classes.Big-GPU.gpus", 1),
    ],
)
def test_a_variable_is_read_as_what_its_key_takes(
    layers: Layers, variable: str, word: str, key: str, expected: Any
) -> None:
    layers.write("site", "resource_classes: {Big-GPU: {cpus: 2}}")
    layers.environ[f"FRACTAL_RUNNER__{variable}"] = word

    found = layers.load()

    rows = {row.key: row for row in found.rows()}
    if isinstance(expected, list):
        assert found.options("slurm") == {"exclude": expected}
    else:
        assert rows[key].value == expected
        assert type(rows[key].value) is type(expected)
        assert str(rows[key].origin) == f"FRACTAL_RUNNER__{variable}"


def test_variables_without_a_value_and_those_that_are_no_keys_say_nothing(layers: Layers) -> None:
    layers.environ |= {
        "FRACTAL_RUNNER_EXECUTOR": "",
        "FRACTAL_RUNNER__SLURM__PARTITION": " ",
        "FRACTAL_RUNNER_DB": "sqlite:///x",
        "FRACTAL_RUNNERS__SLURM": "x",
    }

    assert [row.key for row in layers.load().rows()] == ["executor"]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("partition=main", {"partition": "main"}),
        ("partition=a=b", {"partition": "a=b"}),
        ("env.OMP_NUM_THREADS=4", {"env": {"OMP_NUM_THREADS": "4"}}),
        ("path_map./data.old=/data", {"path_map": {"/data.old": "/data"}}),
        ('path_map={"/here": "/there"}', {"path_map": {"/here": "/there"}}),
        ('setup=["module load x"]', {"setup": ["module load x"]}),
        ("setup=[module load x]", {"setup": ["module load x"]}),
        ("max_workers=4", {"max_workers": 4}),
        ("command_timeout=1.5", {"command_timeout": 1.5}),
        ("time=01:30:00", {"time": "01:30:00"}),
        ("time=", {"time": None}),
    ],
)
def test_options_have_dotted_keys_within_the_executors_section(
    layers: Layers, option: str, expected: Any
) -> None:
    assert layers.load(executor="slurm", options=[option]).options("slurm") == expected


def test_an_option_may_have_a_whole_key_too(layers: Layers) -> None:
    options = [
        "resource_classes.large.memory=64G",
        "lsf.queue=main",
        "slurm.partition=long",
        "defaults.cpus=2",
    ]

    found = layers.load(executor="slurm", options=options)

    assert [(row.key, row.value) for row in found.rows()] == [
        ("executor", "slurm"),
        ("resource_classes.large.memory", "64G"),
        ("lsf.queue", "main"),
        ("slurm.partition", "long"),
        ("defaults.cpus", 2),
    ]


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_options_are_those_of_the_executor_that_the_layers_choose(layers: Layers, layer: str) -> None:
    executor_from(layers, layer, "slurm")

    found = layers.load(options=["partition=main"])

    assert found.options("slurm") == {"partition": "main"}
    assert found.options("lsf") == {}


# What the whole says


def test_arguments_given_in_python_count_over_all_layers(layers: Layers) -> None:
    layers.write("site", "slurm: {partition: main, setup: [a], mem: 4G}")
    found = layers.load(executor="slurm", options=["partition=long"])

    assert found.options("slurm", {"partition": "gpu", "setup": ["b"]}) == {
        "partition": "gpu",
        "setup": ["b"],
        "mem": "4G",
    }


def test_null_takes_back_what_was_said_or_is_the_value_where_the_constructor_takes_none(
    layers: Layers,
) -> None:
    layers.write("site", "slurm: {poll_interval: 5, partition: main}\nthread: {idle_timeout: 10}")
    layers.write("project", "slurm: {poll_interval: null, partition: ~}\nthread: {idle_timeout: }")

    found = layers.load()

    assert found.options("slurm") == {"partition": None}
    assert found.options("thread") == {"idle_timeout": None}


def test_null_takes_back_a_variable_too(layers: Layers) -> None:
    layers.write("site", "slurm: {env: {A: '1', B: '2'}}")
    layers.write("project", "slurm: {env: {A: null}}")

    assert layers.load().options("slurm") == {"env": {"B": "2"}}


def test_what_is_shown_reads_as_the_same_again(layers: Layers) -> None:
    layers.write(
        "site",
        """
        executor: slurm
        slurm:
          partition: 'no'
          account: '0123'
          mem: 4G
          time: 1:30:00
          constraint: "a #b: c"
          setup: ["module load x", 'echo "a"', "true", "1e3", "0o17", "", "y: 1", "é", "tab\\there"]
          env: {OMP_NUM_THREADS: '4', 'on': 'off'}
          poll_interval: 0.5
          requeue: false
          nodes: null
        resource_classes:
          large: {cpus: 8, extra: {setup: [], bsub_extra: [-app, [chem, {a: [1, 'no']}]]}}
          '2': {gpus: 1}
        """,
    )
    found = layers.load()

    for origins in (False, True):
        text = "\n".join(found.lines(origins=origins))
        again = read_text(text, "again", "again", Findings())
        assert again is not None
        assert plain(again) == plain(found._table)
        # Whoever reads it with a parser of YAML 1.1 gets the same.
        assert yaml.safe_load(text) == plain(again)


def test_each_value_is_shown_with_where_it_comes_from(layers: Layers) -> None:
    site = layers.write("site", "slurm:\n  setup:\n    - module load x\n")
    layers.environ["FRACTAL_RUNNER__SLURM__SETUP"] = "[ulimit -c 0]"

    found = layers.load(executor="slurm", options=["partition=main"])

    assert found.lines("slurm.setup", origins=True) == [
        "slurm:",
        "  setup:",
        f"    - module load x  # site: {site}:3",
        "    - ulimit -c 0    # environment: FRACTAL_RUNNER__SLURM__SETUP",
    ]
    assert found.lines("slurm.partition", origins=True) == [
        "slurm:",
        "  partition: main  # command line: --executor-opt partition=main",
    ]
    assert found.lines("executor") == ["executor: slurm"]
    assert [(row.key, row.value) for row in found.rows("slurm")] == [
        ("slurm.setup[0]", "module load x"),
        ("slurm.setup[1]", "ulimit -c 0"),
        ("slurm.partition", "main"),
    ]


@pytest.mark.parametrize("ask", [config.Config.lines, config.Config.rows, config.Config.origin])
def test_a_key_of_which_nothing_is_said_is_named_with_the_nearest(
    layers: Layers, ask: Callable[..., Any]
) -> None:
    layers.write("site", "slurm: {partition: main}")

    with pytest.raises(
        ValueError, match=r"nothing is said of 'slurm.partitoin': did you mean 'slurm.partition'"
    ):
        ask(layers.load(), "slurm.partitoin")


def test_what_a_constructor_refuses_is_told_with_where_it_was_written(layers: Layers) -> None:
    site = layers.write("site", "lsf:\n  queue: main\n  walltime: '1:30'\n")
    found = layers.load()

    said = str(found.blame("lsf", ValueError("walltime: '1:30' is ambiguous")))
    assert f"lsf: walltime: '1:30' is ambiguous (lsf.walltime is from {site}:3)" in said

    said = str(found.blame("lsf", ValueError("no")))
    assert f"lsf: no (lsf.queue is from {site}:2; lsf.walltime is from {site}:3)" in said
    assert str(found.blame("thread", ValueError("no"))) == "the configuration is wrong: thread: no"
