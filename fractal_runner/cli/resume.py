"""`fractal-runner resume`: from what a run's history says to the request that goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from fractal_runner.cli.locate import LocatedRun
from fractal_runner.cli.run import RunRequest
from fractal_runner.config import EXECUTOR, PROJECT, Config, layer_files
from fractal_runner.errors import HistoryError
from fractal_runner.executors import sections
from fractal_runner.workflow.identity import unpacked
from fractal_runner.workflow.models import Dataset, Workflow, describe
from fractal_runner.workflow.warmth import WarmMode

_EXECUTOR = TypeAdapter(tuple[str, dict[str, Any]])


@dataclass(frozen=True, slots=True)
class Changes:
    """What a resume does otherwise than the run did before.

    Attributes:
        workflow: another workflow; the recorded one if None.
        workflow_file: where that is from.
        executor: name of another executor; the recorded one if None.
        options: options of the executor, over those that are recorded, if it is the same; as they were typed.
        last: position of the last task; the recorded one if None.
        warm: what is said of warm starts, over what is recorded.
    """

    workflow: Workflow | None
    workflow_file: Path | None
    executor: str | None
    options: Sequence[str]
    last: int | None
    warm: Mapping[str, Any]


class _Settings(BaseModel):
    """What is recorded of how a run goes about what it does: arguments of process_workflow."""

    warm_start: WarmMode
    warm_start_timeout: float
    max_servers: int


def request_of(
    found: LocatedRun,
    changes: Changes,
    *,
    history: str | None,
    output: Path | None,
    rerun_unknown: bool,
) -> RunRequest:
    """What goes on with a run.

    Args:
        found: the run.
        changes: what is to be otherwise.
        history: the URL that was given for its history, if one was.
        output: where to write the final dataset as well.
        rerun_unknown: whether units of which nobody knows how far they got are run again in any case.

    Raises:
        HistoryError: if what is recorded does not do as input.
        InputFileError: if the configuration is wrong.
    """
    run = found.reader.run(found.run_id)
    assert run is not None  # it was there when it was found
    workflow = changes.workflow or _workflow_of(run.workflow, found)
    last = run.last_task if changes.last is None else changes.last
    return RunRequest(
        workflow_file=None,
        workflow=workflow,
        dataset=_dataset_of(run.dataset, found),
        directory=found.directory,
        config=_configuration(run.executor, changes, found),
        first=run.first_task,
        last=min(last, len(workflow.task_list) - 1) if changes.last is None else last,
        type_filters=json.loads(run.type_filters),
        attribute_filters=json.loads(run.attribute_filters),
        output=output,
        repeated=(),
        history=history,
        resume=True,
        rerun_unknown=rerun_unknown,
        job_id=run.job_id,
        user_id=run.user_id,
        warm={**_settings_of(run.settings, found), **changes.warm},
    )


def _dataset_of(data: bytes, found: LocatedRun) -> Dataset:
    try:
        return Dataset.model_validate(unpacked(data))
    except ValidationError as error:
        why = "; ".join(describe(error))
        raise HistoryError(
            f"The dataset of {found.directory} cannot be taken from its history: {why}."
        ) from None


def _workflow_of(text: str, found: LocatedRun) -> Workflow:
    try:
        return Workflow.model_validate_json(text)
    except ValidationError as error:
        raise HistoryError(
            f"The workflow of {found.directory} cannot be taken from its history (a Python function that is "
            f"not its module's has no place to find it by): {'; '.join(describe(error))}. Resume it from "
            "where it was begun (process_workflow with resume=True), or give --workflow."
        ) from None


def _settings_of(text: str | None, found: LocatedRun) -> dict[str, Any]:
    """What process_workflow was told of warm starts; nothing, if that was before it was recorded."""
    if text is None:
        return {}
    try:
        return _Settings.model_validate_json(text).model_dump()
    except ValidationError as error:
        why = "; ".join(describe(error))
        raise HistoryError(
            f"The settings of {found.directory} cannot be taken from its history: {why}. Resume it from "
            "where it was begun (process_workflow with resume=True)."
        ) from None


def _configuration(recorded: str | None, changes: Changes, found: LocatedRun) -> Config:
    """The configuration that the run goes on with: the executor that it was begun with counts over files."""
    name, options = _executor_of(recorded)
    said: dict[str, Any] = {}
    if name is not None and changes.executor in (None, name):
        said = {EXECUTOR: name, name: options}
    return sections.load(
        start=_start_of(found, changes),
        executor=changes.executor,
        options=changes.options,
        recorded=said,
    )


def _start_of(found: LocatedRun, changes: Changes) -> Path:
    """From where the project's configuration is looked for: the run's directory, or else the current one."""
    if changes.workflow_file is not None:
        return changes.workflow_file
    project = next(file for file in layer_files(found.directory) if file.layer == PROJECT)
    return found.directory if project.path.exists() else Path.cwd()


def _executor_of(text: str | None) -> tuple[str | None, dict[str, Any]]:
    """The executor that the run was begun with; None if it was the caller's own."""
    if text is None:
        return None, {}
    try:
        return _EXECUTOR.validate_json(text)
    except ValidationError:
        return None, {}
