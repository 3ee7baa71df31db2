"""Every mistake has a message with file, line and key, and says what would be right."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import config
from fractal_runner.config.keys import Section
from fractal_runner.errors import InputFileError
from tests.config.conftest import SECTIONS, Layers

P = "project/.fractal-runner/config.yaml"
SIZES = "write '4GB', '1.5G', '512MiB', or a number of MB"
TIMES = "write '01:30:00', '90m', '1h 30m', or a number of seconds"

IN_A_FILE: dict[str, tuple[str, str]] = {
    # Keys
    "unknown section": ("\nsulrm: {}", "2: sulrm: unknown key: did you mean 'slurm'?"),
    "unknown key": (
        "slurm:\n  partitoin: main",
        "2: slurm.partitoin: unknown key: did you mean 'partition'?",
    ),
    "a key that another executor has": (
        "slurm:\n  queue: main",
        "2: slurm.queue: unknown key: it is 'partition' here",
    ),
    "an argument that is no text": (
        "slurm: {context: {}}",
        "1: slurm.context: it can be given in Python only: no text can say it",
    ),
    "unknown default": (
        "defaults: {memroy: 1G}",
        "1: defaults.memroy: unknown key: did you mean 'memory'?",
    ),
    "another's word for a default": (
        "defaults: {mem: 1G}",
        "1: defaults.mem: unknown key: it is 'memory' here",
    ),
    "unknown key of a class": (
        "resource_classes:\n  large:\n    cpu: 3",
        "3: resource_classes.large.cpu: unknown key: did you mean 'cpus'?",
    ),
    "another's word in a class": (
        "resource_classes: {large: {partition: gpu}}",
        "1: resource_classes.large.partition: unknown key: it is 'queue' here",
    ),
    "unknown option of a scheduler": (
        "resource_classes: {large: {extra: {constrain: gpu}}}",
        "1: resource_classes.large.extra.constrain: unknown key: did you mean 'constraint'?",
    ),
    "duplicate key": (
        "slurm:\n  mem: 1G\n  partition: a\n  mem: 2G",
        "4: slurm.mem: it stands here a second time; the first is in line 2",
    ),
    "duplicate section": (
        "slurm: {}\nslurm: {}",
        "2: slurm: it stands here a second time; the first is in line 1",
    ),
    "duplicate class": (
        "resource_classes:\n  a: {cpus: 1}\n  a: {cpus: 2}",
        "3: resource_classes.a: it stands here a second time; the first is in line 2",
    ),
    "a key that is a number": (
        "resource_classes:\n  8: {cpus: 1}",
        "2: resource_classes: 8 is no text, and keys are text: write '8'",
    ),
    "a key that is a list": ("? [a]\n: 1", "1: a list or mapping is no text, and keys are text"),
    "a merge key": (
        "slurm: &s {mem: 1G}\nlsf: {<<: *s}",
        "2: lsf.<<: unknown key: known are 'bjobs_cmd', 'bkill_cmd', 'bsub_cmd'",
    ),
    # Types
    "unknown executor": (
        "executor: slrum",
        "1: executor: there is no executor 'slrum': did you mean 'slurm'?",
    ),
    "no executor": ("executor: null", "1: executor: null is no value here: it takes text"),
    "number for text": (
        "slurm: {partition: 1234}",
        "1: slurm.partition: 1234 is a number, and it takes text: write '1234'",
    ),
    "true for text": ("slurm: {qos: true}", "1: slurm.qos: this is true, and it takes text: write 'true'"),
    "text for a number": (
        "thread: {max_workers: '4'}",
        "1: thread.max_workers: '4' is text, and it takes a whole number: write 4",
    ),
    "a number of another YAML": (
        "slurm: {max_jobs: 1_000}",
        "1: slurm.max_jobs: '1_000' is text, and it takes a whole number: write 1000",
    ),
    "a word for a number": (
        "thread: {max_workers: many}",
        "1: thread.max_workers: 'many' is text, and it takes a whole number",
    ),
    "a fraction for a whole number": (
        "thread: {max_workers: 1.5}",
        "1: thread.max_workers: 1.5 is a number, and it takes a whole number",
    ),
    "true for a number": (
        "thread: {max_workers: true}",
        "1: thread.max_workers: this is true, and it takes a whole number",
    ),
    "a switch of another YAML": (
        "slurm: {requeue: no}",
        "1: slurm.requeue: 'no' is text, and it takes true or false: write false ('no' is text in YAML 1.2)",
    ),
    "a word that is none of those": (
        "lsf: {memory_per: hosts}",
        "1: lsf.memory_per: 'hosts' is not what it takes: did you mean 'host'?",
    ),
    "text for a list": (
        "slurm:\n  setup: module load x",
        "2: slurm.setup: 'module load x' is text, and it takes a list of texts: write [\"module load x\"]",
    ),
    "number in a list": (
        "slurm:\n  setup:\n    - a\n    - 3",
        "4: slurm.setup[1]: 3 is a number, and it takes text: write '3'",
    ),
    "null in a list": (
        "slurm: {setup: [a, null]}",
        "1: slurm.setup[1]: null is no value here: it takes text",
    ),
    "list for text": ("slurm: {partition: [a]}", "1: slurm.partition: this is a list, and it takes text"),
    "mapping for text": (
        "slurm: {partition: {a: b}}",
        "1: slurm.partition: this is a mapping, and it takes text",
    ),
    "mapping for a list": (
        "slurm: {setup: {a: b}}",
        "1: slurm.setup: this is a mapping, and it takes a list of texts",
    ),
    "list for a mapping": ("slurm: {env: [A=1]}", "1: slurm.env: this is a list, and it takes a mapping"),
    "number in a mapping": (
        "slurm: {env: {A: 1}}",
        "1: slurm.env.A: 1 is a number, and it takes text: write '1'",
    ),
    "text for a section": ("slurm: main", "1: slurm: 'main' is text, and it takes a mapping"),
    "list for a class": (
        "resource_classes: {a: [cpus]}",
        "1: resource_classes.a: this is a list, and it takes a mapping",
    ),
    "null for a list": (
        "slurm: {setup: null}",
        "1: slurm.setup: null (or nothing) may take the place of single values only, and it takes a list of "
        "texts: leave the key out",
    ),
    "nothing for a section": (
        "executor: thread\nslurm:\n",
        "2: slurm: null (or nothing) may take the place of single values only, and it takes a mapping: "
        "leave the key out",
    ),
    # Sizes, times, counts
    "bad size": ("slurm:\n  mem: 4X", f"2: slurm.mem: '4X' is not a size: {SIZES}"),
    "bad default size": ("defaults: {memory: -1}", f"1: defaults.memory: -1 is not a size: {SIZES}"),
    "bad size of a class": (
        "resource_classes: {a: {memory: much}}",
        f"1: resource_classes.a.memory: 'much' is not a size: {SIZES}",
    ),
    "infinite size": ("process: {max_memory: .inf}", f"1: process.max_memory: inf is not a size: {SIZES}"),
    "bad time": ("slurm:\n  time: 1:30h", f"2: slurm.time: '1:30h' is not a time: {TIMES}"),
    "bad default time": ("defaults: {time: 0}", f"1: defaults.time: 0 is not a time: {TIMES}"),
    "bad interval": ("lsf: {poll_interval: often}", f"1: lsf.poll_interval: 'often' is not a time: {TIMES}"),
    "bad time of a class": (
        "resource_classes: {a: {time: 1 h 70}}",
        f"1: resource_classes.a.time: '1 h 70' is not a time: {TIMES}",
    ),
    "bad count": ("defaults: {cpus: 0}", "1: defaults.cpus: 0 is not a whole number of at least 1"),
    "bad count of an executor": (
        "slurm: {max_workers: -2}",
        "1: slurm.max_workers: -2 is not a whole number of at least 1",
    ),
    "bad number of GPUs": (
        "resource_classes: {a: {gpus: -1}}",
        "1: resource_classes.a.gpus: -1 is not a whole number of at least 0",
    ),
    "bad queue": (
        "resource_classes: {a: {queue: ''}}",
        "1: resource_classes.a.queue: '' is not the name of a queue",
    ),
    # YAML
    "unclosed": (
        "slurm: {a: [1,\n2",
        "2: not valid YAML: expected ',' or ']', but got '<stream end>', while parsing a flow sequence "
        "(column 2)",
    ),
    "two colons": ("a: b: c", "1: not valid YAML: mapping values are not allowed here (column 5)"),
    "tab": (
        "slurm:\n\tmem: 1G",
        "2: not valid YAML: found character '\\t' that cannot start any token, while scanning for the next "
        "token (column 1): indent with spaces",
    ),
    "unknown alias": ("slurm: *other", "1: not valid YAML: found undefined alias 'other' (column 8)"),
    "control character": (
        "slurm:\n  mem: \x07",
        "2: not valid YAML: special characters are not allowed (character 7)",
    ),
    "two documents": (
        "executor: thread\n---\nexecutor: process",
        "2: not valid YAML: but found another document, expected a single document in the stream (column 1)",
    ),
    "too deep": ("slurm: " + "[" * 3000, "1: not valid YAML: it is nested too deeply"),
    "a list as a whole": ("- a", '1: it holds a list, and a configuration is a mapping: write "key: value"'),
    "a word as a whole": (
        "\nslurm",
        '2: it holds a single value, and a configuration is a mapping: write "key: value"',
    ),
    "unknown tag": (
        "slurm:\n  setup: !repalce [a]",
        "2: slurm.setup: unknown tag '!repalce': there is '!replace', before a list",
    ),
    "an object of Python's": (
        "slurm: {mem: !!python/object/apply:os.system [x]}",
        "1: slurm.mem: unknown tag '!!python/object/apply:os.system': there is '!replace', before a list",
    ),
    "a tag that the value is not": (
        "thread: {max_workers: !!int four}",
        "1: thread.max_workers: 'four' is no int",
    ),
    "a tag of another kind": ("slurm: {mem: !!seq {a: b}}", "1: slurm.mem: this is a mapping, and no !!seq"),
    "!replace before text": (
        "slurm: {mem: !replace 4G}",
        "1: slurm.mem: !replace goes before a list, and this is a single value",
    ),
    "!replace before a mapping": (
        "slurm: {env: !replace {A: b}}",
        "1: slurm.env: !replace goes before a list, and this is a mapping",
    ),
    "!replace within a list": (
        "resource_classes: {a: {extra: {setup: [!replace [a]]}}}",
        "1: resource_classes.a.extra.setup[0]: !replace has no effect on a list within a list: leave it out",
    ),
    "itself": (
        "resource_classes: {a: {extra: &x {setup: [*x]}}}",
        "1: resource_classes.a.extra.setup[0]: it contains itself, by an alias",
    ),
    "too large a number": (
        "slurm: {mem: 1e999}",
        "1: slurm.mem: 1e999 is larger than any number that can be kept",
    ),
    "too long a number": (
        "slurm: {mem: " + "9" * 5000 + "}",
        "1: slurm.mem: a number of 5000 digits is too long to be read",
    ),
}


@pytest.mark.parametrize("name", IN_A_FILE)
def test_a_mistake_in_a_file_is_told_with_its_place(layers: Layers, name: str) -> None:
    text, expected = IN_A_FILE[name]
    layers.write("project", text)

    said = layers.mistakes()

    assert [line for line in said if line.startswith(f"{P}:{expected}")], said
    assert len(said) == 1


def test_aliases_of_aliases_are_not_followed_for_ever(layers: Layers) -> None:
    lists = "".join(f"    l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 12))
    layers.write("project", f"resource_classes:\n  a:\n   extra:\n    l0: &l0 [a]\n{lists}")

    assert any("from here on there are more than 100,000 values" in said for said in layers.mistakes())


@pytest.mark.parametrize(
    ("variable", "word", "expected"),
    [
        ("FRACTAL_RUNNER_EXECUTOR", "slrum", "executor: there is no executor 'slrum': did you mean 'slurm'?"),
        ("FRACTAL_RUNNER__SULRM__MEM", "1G", "sulrm: unknown key: did you mean 'slurm'?"),
        ("FRACTAL_RUNNER__SLURM__QUEUE", "a", "slurm.queue: unknown key: it is 'partition' here"),
        ("FRACTAL_RUNNER__SLURM__MEM", "4X", f"slurm.mem: '4X' is not a size: {SIZES}"),
        ("FRACTAL_RUNNER__SLURM__SETUP", "[a", "slurm.setup: not valid YAML: expected ',' or ']'"),
        ("FRACTAL_RUNNER__SLURM__SETUP", "a", "slurm.setup: 'a' is text, and it takes a list of texts"),
        (
            "FRACTAL_RUNNER__SLURM__SETUP__X",
            "a",
            "slurm.setup.x: unknown key: slurm.setup takes a list of texts",
        ),
        ("FRACTAL_RUNNER__SLURM__", "a", "slurm: a part of the key is empty: two underscores stand"),
        ("FRACTAL_RUNNER__", "a", "a part of the key is empty: two underscores stand"),
        (
            "FRACTAL_RUNNER_SLURM__MEM",
            "1G",
            "keys have two underscores before them: write FRACTAL_RUNNER__SLURM__MEM",
        ),
        ("FRACTAL_RUNNER_SLURM_MEM", "1G", "this says nothing: write FRACTAL_RUNNER__SLURM__MEM"),
        ("FRACTAL_RUNNER_EXECUTER", "slurm", "this says nothing: write FRACTAL_RUNNER_EXECUTOR"),
        ("FRACTAL_RUNNER__SLURM", "x", "slurm: 'x' is text, and it takes a mapping"),
        (
            "FRACTAL_RUNNER__SLURM__MAX_JOBS",
            "9" * 5000,
            "slurm.max_jobs: a number of 5000 digits is too long to be read",
        ),
        (
            "FRACTAL_RUNNER__RESOURCE_CLASSES__BIG__CPUS",
            "1",
            "resource_classes: 'BIG' can be 'Big' and 'big': write it as one of them is written",
        ),
    ],
)
def test_a_mistake_in_a_variable_is_told_with_its_name(
    layers: Layers, variable: str, word: str, expected: str
) -> None:
    layers.write("project", "resource_classes: {Big: {cpus: 1}, big: {cpus: 2}}")
    layers.environ[variable] = word

    [said] = layers.mistakes()

    assert said.startswith(f"{variable}: {expected}")


@pytest.mark.parametrize(
    ("executor", "option", "expected"),
    [
        ("slurm", "mem=4X", f"slurm.mem: '4X' is not a size: {SIZES}"),
        ("slurm", "partitoin=a", "slurm.partitoin: unknown key: did you mean 'partition'?"),
        ("slurm", "queue=a", "slurm.queue: unknown key: it is 'partition' here"),
        ("slurm", "partition", "it is not of the form KEY=VALUE: write --executor-opt max_workers=4"),
        ("slurm", "=main", "it is not of the form KEY=VALUE: write --executor-opt max_workers=4"),
        ("slurm", "mem.x=1", "slurm.mem.x: unknown key: slurm.mem takes a number or text"),
        ("slurm", "max_workers=four", "slurm.max_workers: 'four' is text, and it takes a whole number"),
        ("thread", "folder=x", "thread.folder: unknown key: known are"),
        ("thread", "slurm=x", "thread.slurm: unknown key"),
        ("thread", "slurm.mem=4X", f"slurm.mem: '4X' is not a size: {SIZES}"),
        ("thread", "", "it is not of the form KEY=VALUE: write --executor-opt max_workers=4"),
    ],
)
def test_a_mistake_in_an_option_is_told_with_the_option(
    layers: Layers, executor: str, option: str, expected: str
) -> None:
    [said] = layers.mistakes(executor=executor, options=[option])

    assert said.startswith(f"--executor-opt {option}: {expected}")


def test_the_options_of_an_executor_that_there_is_not_are_not_blamed(layers: Layers) -> None:
    [said] = layers.mistakes(executor="slrum", options=["partition=x"])

    assert said == "--executor slrum: executor: there is no executor 'slrum': did you mean 'slurm'?"


def test_what_is_said_twice_in_one_layer_is_a_mistake(layers: Layers) -> None:
    layers.environ |= {"FRACTAL_RUNNER_EXECUTOR": "slurm", "FRACTAL_RUNNER__EXECUTOR": "slurm"}
    layers.environ |= {"FRACTAL_RUNNER__SLURM": "{mem: 1G}", "FRACTAL_RUNNER__SLURM__MEM": "2G"}

    said = layers.mistakes(options=["partition=a", "partition=a"])

    assert sorted(said) == [
        "--executor-opt partition=a: slurm.partition: slurm.partition is given twice; the first time by "
        "--executor-opt partition=a",
        "FRACTAL_RUNNER__EXECUTOR: executor: executor is given twice; the first time by "
        "FRACTAL_RUNNER_EXECUTOR",
        "FRACTAL_RUNNER__SLURM__MEM: slurm.mem: slurm.mem is given twice; the first time by "
        "FRACTAL_RUNNER__SLURM",
    ]


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        (
            "[n1]",
            "n2",
            "it is text here, and a list at {site}:1: all layers have to write it in one way",
        ),
        ("n1", "[n2]", "it is a list here, and text at {site}:1: all layers have to write it in one way"),
        (
            "n1",
            "!replace [n2]",
            "it is a list here, and text at {site}:1: all layers have to write it in one way",
        ),
        (
            "[n1]",
            "null",
            "null may take the place of single values only, and this is a list at {site}:1: write !replace "
            "[] for an empty list",
        ),
    ],
)
def test_layers_that_do_not_go_together_are_told_with_both_places(
    layers: Layers, earlier: str, later: str, expected: str
) -> None:
    layers.write("site", f"slurm: {{exclude: {earlier}}}")
    layers.write("project", f"\nslurm: {{exclude: {later}}}")

    [said] = layers.mistakes()

    assert said.startswith(f"{P}:2: slurm.exclude: {expected.format(site='home/fractal-runner/site.yaml')}")


def test_null_does_not_take_the_place_of_a_mapping(layers: Layers) -> None:
    layers.write("site", "resource_classes: {a: {extra: {env: {A: b}}}}")
    layers.write("project", "resource_classes: {a: {extra: {env: null}}}")

    [said] = layers.mistakes()

    assert "null may take the place of single values only, and this is a mapping at home" in said
    assert said.endswith("say it key by key")


@pytest.mark.parametrize(
    "variable", ["FRACTAL_RUNNER_DB", "FRACTAL_RUNNER_DASK_WORKER", "FRACTAL_RUNNER_NODE"]
)
def test_variables_that_are_no_keys_are_none_of_its_business(layers: Layers, variable: str) -> None:
    layers.environ[variable] = "x"

    assert layers.load().executor == "thread"


# Files


def test_a_file_that_is_named_and_not_there(layers: Layers) -> None:
    layers.environ["FRACTAL_RUNNER_INSTALL_CONFIG"] = "/nowhere/config.yaml"

    [said] = layers.mistakes()

    assert said == "/nowhere/config.yaml: there is no such file, and FRACTAL_RUNNER_INSTALL_CONFIG names it"


def test_a_file_that_cannot_be_read(layers: Layers) -> None:
    layers.files["site"].mkdir(parents=True)

    assert layers.mistakes() == ["home/fractal-runner/site.yaml: it cannot be read: Is a directory"]


def test_a_file_that_never_ends(layers: Layers) -> None:
    layers.write("site", "").unlink()
    layers.files["site"].symlink_to("/dev/zero")

    [said] = layers.mistakes()

    assert said == "home/fractal-runner/site.yaml: it has more than 4,000,000 bytes: no configuration has"


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(layers: Layers) -> None:
    os.mkfifo(layers.write("project", "").with_name("pipe"))
    (layers.files["project"].parent / "pipe").replace(layers.files["project"])

    assert layers.mistakes() == [f"{P}: it is a pipe that nobody writes to"]


def test_a_link_that_leads_nowhere_is_no_file_that_is_not_there(layers: Layers) -> None:
    for layer in ("site", "project"):
        layers.write(layer, "").unlink()
        layers.files[layer].symlink_to("/nowhere/shared.yaml")

    assert layers.mistakes() == [
        "home/fractal-runner/site.yaml: it is a link that leads nowhere",
        "project/.fractal-runner/config.yaml: it is a link that leads nowhere",
    ]


def test_a_file_that_is_not_utf_8(layers: Layers) -> None:
    layers.write("site", b"# a\nslurm:\n  partition: \xe9\n")

    [said] = layers.mistakes()

    assert said.startswith("home/fractal-runner/site.yaml:3: it is not UTF-8 text: ")


def test_a_section_that_cannot_be_had_is_told_with_the_reason(tmp_path: Path) -> None:
    class Broken:
        def names(self) -> list[str]:
            return ["ours", "thread"]

        def section(self, name: str) -> Section:
            if name == "ours":
                raise ImportError("two packages have it: a and b")
            return SECTIONS.section(name)

        def extra(self) -> None:
            return None

    file = tmp_path / "c.yaml"
    file.write_text("\nours: {a: 1}\nresource_classes: {a: {extra: {anything: [1]}}}")

    said = [str(mistake) for mistake in config.check(Broken(), file)]
    assert said == [f"{file}:2: ours: this section cannot be checked: two packages have it: a and b"]

    with pytest.raises(InputFileError, match="--executor-opt a=1: ours: this section cannot be checked"):
        config.load(Broken(), start=tmp_path, environ={}, executor="ours", options=["a=1"])


# All at once, or not at all


def test_all_mistakes_of_all_layers_are_told_in_one_error(layers: Layers) -> None:
    installation = layers.write("installation", "slurm:\n  partition: 1\n  memory: 4G\n  partition: b\n")
    site = layers.write("site", "slurm: [")
    layers.write("project", "defaults: {cpus: 0}")
    layers.environ["FRACTAL_RUNNER__LSF__MEMORY"] = "4X"

    with pytest.raises(InputFileError) as caught:
        layers.load(executor="slurm", options=["nodes=x"])

    error = pickle.loads(pickle.dumps(caught.value))
    assert len(error.problems) == 7
    assert error.file == str(installation)
    assert str(error).splitlines()[0] == "the configuration is wrong in 7 places:"
    assert [line.strip() for line in str(error).splitlines()[1:]] == list(error.problems)
    places = [problem.split(": ")[0] for problem in error.problems]
    project = layers.files["project"]
    assert places == [
        f"{installation}:2",
        f"{installation}:3",
        f"{installation}:4",
        f"{site}:1",
        f"{project}:1",
        "FRACTAL_RUNNER__LSF__MEMORY",
        "--executor-opt nodes=x",
    ]


def test_checking_files_tells_all_mistakes_of_each(tmp_path: Path, layers: Layers) -> None:
    layers.write("project", "executor: nothing that counts here")
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("slurm: {partition: main}")
    bad.write_text("slurm:\n  partitoin: main\n  mem: 4X\n")

    found = config.check(SECTIONS, good, bad, tmp_path / "none.yaml")

    assert [(mistake.origin.source, mistake.origin.line, mistake.key) for mistake in found] == [
        (str(bad), 2, "slurm.partitoin"),
        (str(bad), 3, "slurm.mem"),
        (str(tmp_path / "none.yaml"), None, ""),
    ]
    assert str(found[2]) == f"{tmp_path}/none.yaml: there is no such file"


def test_checking_no_file_checks_the_layers(layers: Layers) -> None:
    assert config.check(SECTIONS, start=layers.start, environ={}) == []

    layers.write("site", "slurm: {exclude: a}")
    layers.write("project", "slurm: {exclude: [a]}")
    [mistake] = config.check(SECTIONS, start=layers.start, environ={})

    assert (mistake.origin.layer, mistake.key) == ("project", "slurm.exclude")


def test_what_a_configuration_says_cannot_be_changed(layers: Layers) -> None:
    layers.write("site", "slurm: {env: {A: b}}\nresource_classes: {a: {cpus: 1}}")
    found = layers.load()

    found.options("slurm")["env"]["A"] = "c"

    assert found.options("slurm") == {"env": {"A": "b"}}
    frozen: Any = found.resource_classes
    with pytest.raises(TypeError):
        frozen["b"] = {}
