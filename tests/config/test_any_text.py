"""Whatever a file, a variable or an option holds: it is a configuration, or an error that says where."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from fractal_runner import config
from fractal_runner.errors import InputFileError
from tests.config.conftest import SECTIONS

WORDS = """
    executor defaults resource_classes slurm lsf thread partition mem time setup env extra cpus memory exclude
    large 4G 1:30 null ~ true no 0123 1e999 .inf [ ] { } , : - ? & * &a *a ! !replace !!int !!str | > % @ ` #
    ' " --- ... \\ << =
"""
words = st.sampled_from(WORDS.split())
spaces = st.sampled_from(["", " ", "\n", "\n  ", ": ", "- ", "\n  - ", "\t"])
yamlish = st.lists(st.tuples(words, spaces), max_size=12).map(
    lambda pairs: "".join(word + space for word, space in pairs)
)
texts = st.text(max_size=30) | yamlish
keys = st.lists(
    st.sampled_from(["SLURM", "EXECUTOR", "ENV", "SETUP", "MEM", "A", "RESOURCE_CLASSES", "EXTRA"])
    | st.just(""),
    max_size=4,
).map("__".join)


def outcome(
    data: bytes = b"", environ: Mapping[str, str] | None = None, options: Sequence[str] = ()
) -> config.Config | None:
    """The configuration; None if it is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        built_in = config.LayerFile("built-in", Path(folder) / "built-in", named=True)
        built_in.path.write_text("executor: slurm\n")
        site = config.LayerFile("site", Path(folder) / "site.yaml")
        site.path.write_bytes(data)
        try:
            return config.load(SECTIONS, environ=environ or {}, options=options, files=[built_in, site])
        except InputFileError as error:
            assert error.problems
            places = (str(site.path), "FRACTAL_RUNNER_", "--executor-opt")
            assert all(problem.startswith(places) for problem in error.problems)
            return None


def check_usable(found: config.Config | None) -> None:
    """All that can be asked of a configuration has an answer."""
    if found is None:
        return
    assert found.executor
    for name in SECTIONS.names():
        found.options(name)
        found.defaults_of(name)
    assert found.resource_classes is not None
    for row in found.rows():
        assert row.origin.source
    found.lines(origins=True)


@settings(max_examples=300)
@given(texts)
@example("slurm: {? [a] : b}")
@example("? {a: b}\n: c")
@example("slurm:\n  ? |\n    partition\n  : x")
@example("slurm: !<tag:yaml.org,2002:map> {mem: 1G}")
@example("slurm: !!null")
@example("!!str slurm: {}")
@example("slurm: {mem: &a 1G, time: *a}")
@example("!!set {slurm}")
def test_any_text_is_a_configuration_or_an_error(text: str) -> None:
    check_usable(outcome(text.encode(errors="surrogatepass")))


@given(st.binary(max_size=40))
def test_so_are_any_bytes(data: bytes) -> None:
    check_usable(outcome(data))


@given(keys, texts)
def test_so_is_any_variable(key: str, text: str) -> None:
    check_usable(outcome(environ={f"FRACTAL_RUNNER__{key}": text}))


@given(keys.map(lambda key: key.lower().replace("__", ".")), texts)
def test_so_is_any_option(key: str, text: str) -> None:
    check_usable(outcome(options=[f"{key}={text}", text]))
