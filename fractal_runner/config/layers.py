"""The six layers: where they lie, read and checked each by itself, and put together.

Whatever is wrong anywhere is told all at once, and then nothing of the configuration is taken.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from fractal_runner.config.final import Config
from fractal_runner.config.given import PYTHON, RECORDED, given_layer
from fractal_runner.config.keys import Section, Takes, check_section
from fractal_runner.config.schema import CLASSES, EXECUTOR, RESERVED, Sections
from fractal_runner.config.schema import root as root_of
from fractal_runner.config.values import Findings, Mistake, Origin, Scalar, Table, empty, merge
from fractal_runner.config.words import (
    COMMAND_LINE,
    ENVIRONMENT,
    INSTALLATION_VARIABLE,
    command_line_layer,
    environment_layer,
)
from fractal_runner.config.yaml12 import read_file
from fractal_runner.errors import InputFileError

BUILT_IN = "built-in"
INSTALLATION = "installation"
SITE = "site"
PROJECT = "project"
LAYERS = (BUILT_IN, INSTALLATION, SITE, PROJECT, ENVIRONMENT, COMMAND_LINE)

PROJECT_FILE = Path(".fractal-runner") / "config.yaml"

_APPLICATION = "fractal-runner"
_ALONE = "file"  # the layer of a file that is checked by itself


@dataclass(frozen=True, slots=True)
class LayerFile:
    """A layer that is a file.

    Attributes:
        layer: the layer's name.
        path: where it is, or would be.
        named: whether somebody has named it: then it has to be there.
        by: who has named it, for messages.
    """

    layer: str
    path: Path
    named: bool = False
    by: str = ""


_BUILT_IN = LayerFile(BUILT_IN, Path(__file__).parent / "builtin.yaml", named=True)


def layer_files(
    start: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None
) -> list[LayerFile]:
    """The files that make up a configuration, whether they are there or not, the later over the earlier.

    Args:
        start: the workflow's file, or a directory: where the project's file is looked for, and from there
            upwards; the current directory for None.
        environ: the environment; this process's own for None.
    """
    environ = os.environ if environ is None else environ
    named = environ.get(INSTALLATION_VARIABLE)
    if named:
        installation = LayerFile(INSTALLATION, Path(named), named=True, by=INSTALLATION_VARIABLE)
    else:
        installation = LayerFile(INSTALLATION, Path(sys.prefix) / "etc" / _APPLICATION / "config.yaml")
    return [
        _BUILT_IN,
        installation,
        LayerFile(SITE, _site_directory() / "site.yaml"),
        LayerFile(PROJECT, _project_file(start)),
    ]


def load(
    sections: Sections,
    *,
    start: str | os.PathLike[str] | None = None,
    executor: str | None = None,
    options: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    files: Sequence[LayerFile] | None = None,
    recorded: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration of all six layers.

    Args:
        sections: the executors that there are.
        start: the workflow's file, or a directory, from which on the project's file is looked for upwards;
            the current directory for None.
        executor: what the command line says by `--executor`.
        options: what it says by each `--executor-opt`, as "key=value".
        environ: the environment; this process's own for None.
        files: the layers that are files, in place of those of `layer_files`; the one that is built in is
            first, unless they have one.
        recorded: what a run that goes on has had before, by key: over all layers but the command line's.
        overrides: what is said in Python, by key, over all layers.

    Raises:
        InputFileError: naming every mistake, with its file, line and key. Nothing has been applied.
    """
    findings = Findings()
    config = _gather(
        sections,
        findings,
        start=start,
        environ=environ,
        executor=executor,
        options=options,
        files=files,
        recorded=recorded,
        overrides=overrides,
    )
    if findings.mistakes:
        raise error_of(findings.mistakes)
    return config


def check(
    sections: Sections,
    *paths: str | os.PathLike[str],
    start: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[Mistake]:
    """All mistakes of these files, each by itself; of all layers together, if there are none.

    Args:
        sections: the executors that there are.
        paths: the files.
        start, environ: as `load` takes them, where no file is named.
    """
    findings = Findings()
    if not paths:
        _gather(sections, findings, start=start, environ=environ)
        return findings.mistakes
    root = root_of(sections)
    for path in paths:
        _checked_file(LayerFile(_ALONE, Path(path), named=True), root, findings)
    return findings.mistakes


def error_of(mistakes: Sequence[Mistake]) -> InputFileError:
    """One error for all of these mistakes."""
    problems = [str(mistake) for mistake in mistakes]
    if len(problems) == 1:
        message = f"the configuration is wrong: {problems[0]}"
    else:
        listed = "".join(f"\n  {problem}" for problem in problems)
        message = f"the configuration is wrong in {len(problems)} places:{listed}"
    return InputFileError(message, file=mistakes[0].origin.source, problems=problems)


def _gather(
    sections: Sections,
    findings: Findings,
    *,
    start: str | os.PathLike[str] | None,
    environ: Mapping[str, str] | None,
    executor: str | None = None,
    options: Iterable[str] = (),
    files: Sequence[LayerFile] | None = None,
    recorded: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """What the layers say together; of no use, if `findings` has been told of mistakes."""
    environ = os.environ if environ is None else environ
    root = root_of(sections)
    whole = Takes(section=lambda: root)
    found = layer_files(start, environ) if files is None else list(files)
    if all(file.layer != BUILT_IN for file in found):
        found.insert(0, _BUILT_IN)
    layers = [_checked_file(file, root, findings) for file in found]
    classes = {
        name
        for layer in layers
        if isinstance(table := layer.entries.get(CLASSES), Table)
        for name in table.entries
    }
    layers.append(environment_layer(environ, whole, classes, findings))
    layers.append(_checked_values(RECORDED, recorded or {}, root, findings))
    chosen = _chosen(executor, layers, root)
    layers.append(command_line_layer(executor, chosen, options, whole, findings))
    layers.append(_checked_values(PYTHON, overrides or {}, root, findings))
    merged = reduce(lambda earlier, later: merge(earlier, later, findings), layers)
    return Config(merged, root, tuple(found))


def _chosen(executor: str | None, layers: Sequence[Table], root: Section) -> str | None:
    """The executor that options of the command line are meant for; None if there is no such executor."""
    said = [layer.entries[EXECUTOR] for layer in layers if EXECUTOR in layer.entries]
    names = [node.value for node in said if isinstance(node, Scalar)] + [executor]
    name = next((name for name in reversed(names) if name is not None), None)
    expected = root.keys.get(name) if isinstance(name, str) else None
    return str(name) if expected is not None and name not in RESERVED else None


def _checked_file(file: LayerFile, root: Section, findings: Findings) -> Table:
    """What a file says; nothing, if it is not there or wrong in itself."""
    origin = Origin(file.layer, str(file.path))
    found = Findings()
    table = None
    try:
        if file.layer == PROJECT and (stranger := _stranger(file.path)):
            found.add(origin, "", stranger)
        else:
            table = read_file(file.path, file.layer, found)
    except (FileNotFoundError, NotADirectoryError):
        if file.named:
            by = f", and {file.by} names it" if file.by else ""
            found.add(origin, "", f"there is no such file{by}")
        elif file.path.is_symlink():
            found.add(origin, "", "it is a link that leads nowhere")
    except OSError as error:
        found.add(origin, "", f"it cannot be read: {error.strerror}")
    if table is not None:
        check_section(table, root, "", found)
    findings.add_sorted(found)
    return empty(origin) if table is None else table


def _checked_values(layer: str, said: Mapping[str, Any], root: Section, findings: Findings) -> Table:
    found = given_layer(layer, said, findings)
    check_section(found, root, "", findings)
    return found


def _site_directory() -> Path:
    from platformdirs import user_config_path

    return user_config_path(_APPLICATION, appauthor=False)


def _project_file(start: str | os.PathLike[str] | None) -> Path:
    """The nearest project's file, from here upwards; where it would be here, if there is none."""
    here = Path(os.path.abspath(start or "."))  # noqa: PTH100 - links are kept
    if not here.is_dir():
        here = here.parent
    for directory in (here, *here.parents):
        file = directory / PROJECT_FILE
        # Not `exists`: one that cannot be read, or leads nowhere, is there: reading it says what is wrong.
        try:
            file.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            pass
        return file
    return here / PROJECT_FILE


def _stranger(file: Path) -> str | None:
    """Why a project's file is not to be trusted; None if it is, or is not there.

    It names commands that are run. In a directory where everybody may make files, such as /tmp, anybody can
    leave one for those who work below.
    """
    directory = file.parent
    owner, around = directory.stat().st_uid, directory.parent.stat()
    if around.st_mode & stat.S_IWOTH and owner not in (os.getuid(), 0):
        return (
            f"{directory} belongs to another user (id {owner}), in a directory that everybody may write to: "
            f"it is not taken; a {PROJECT_FILE} of your own, nearer to the workflow, comes before it"
        )
    return None
