"""`fractal-runner check`: what would run, without running it, and every mistake that can be found."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fractal_runner.cli.wording import row
from fractal_runner.config import RESOURCE_CLASS, Config, UnitLayer
from fractal_runner.errors import InputFileError
from fractal_runner.executors import factories, registry
from fractal_runner.workflow import plan
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.models import Dataset, Image, Workflow, WorkflowTask
from fractal_runner.workflow.units import Stage, stages_of, title

if TYPE_CHECKING:
    from fractal_runner.cli.dry_run import DryRun

_T = TypeVar("_T")


@dataclass
class Findings:
    """What a check has found.

    Attributes:
        lines: what would run, to be printed.
        mistakes: what would keep it from running, a sentence each.
        warnings: what is passed over.
    """

    lines: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def attempt(self, question: Callable[..., _T], *args: Any) -> _T | None:
        """The answer, or None if it is a mistake, which is noted."""
        try:
            return question(*args)
        except InputFileError as error:
            self.mistakes += [f"{error.file}: {problem}" for problem in error.problems]
        except ValueError as error:
            self.mistakes.append(str(error))
        return None


def check_run(
    workflow: Callable[[], Workflow],
    dataset: Callable[[], Dataset],
    *,
    first: int | None,
    last: int | None,
    type_filters: Mapping[str, bool],
    attribute_filters: Mapping[str, Sequence[Any]],
    config: Callable[[], Config],
    has_history: bool = False,
    dry_run: DryRun | None = None,
) -> Findings:
    """Ask all that `process_workflow` would, of files that may be wrong themselves.

    Args:
        workflow, dataset, config: read them.
        first, last, type_filters, attribute_filters: as `process_workflow` has them.
        has_history: whether there is a record of earlier runs.
        dry_run: tells what executors would make of the tasks' units; None if that is not asked for.
    """
    findings = Findings()
    flow = findings.attempt(workflow)
    data = findings.attempt(dataset)
    before = len(findings.mistakes)
    executors = _executors(config, findings, None if dry_run is None else dry_run.directory)
    config_is_right = len(findings.mistakes) == before
    layers = executors.unit_layers if config_is_right else partial(_layers_without_classes, executors)
    if dry_run is not None:
        dry_run.begin(executors, findings)
    check_filters = partial(plan.check_filters, has_history=has_history)
    filters = findings.attempt(check_filters, type_filters, attribute_filters)
    if flow is None:
        return findings
    positions = findings.attempt(plan.task_range, flow, first, last)
    if positions is None:
        return findings
    types, attributes = filters if filters is not None else ({}, {})
    images = None if data is None else ImageList(data.images)
    previous: WorkflowTask | None = None
    for position in positions:
        task = flow.task_list[position]
        in_force = findings.attempt(plan.filters_for, task, types)
        stages = findings.attempt(stages_of, task, layers)
        selected = None
        if images is not None and in_force is not None and (previous is None or task.task.is_converter):
            selected = plan.select(task, images, in_force, attributes)
            if not selected and not task.task.is_converter:
                findings.mistakes.append(f"{title(task)}: {plan.no_images(task, in_force, attributes)}")
        _check_stages(stages or [], findings)
        images_known = _known(selected, previous)
        findings.lines += _describe(task, stages or [], in_force or types, attributes, images_known)
        if dry_run is not None and config_is_right:
            count = None if selected is None else len(selected)
            for stage in stages or []:
                findings.lines += dry_run.told(stage, count, images_known)
        findings.lines.append("")
        types = plan.filters_after(task, in_force if in_force is not None else types)
        previous = task
    return findings


def _executors(
    config: Callable[[], Config], findings: Findings, directory: Path | None
) -> registry.Executors:
    """The executors that a run would have; as if nothing were said, if what is said is wrong."""
    found = None
    try:
        found = config()
    except InputFileError as error:
        findings.mistakes += error.problems  # which name their files
    executors = findings.attempt(partial(registry.Executors, None, config=found, directory=directory))
    return executors if executors is not None else registry.Executors(registry.DEFAULT, config=found)


def _layers_without_classes(executors: registry.Executors, *metas: Mapping[str, Any]) -> Iterable[UnitLayer]:
    """What metas say by themselves: which classes a configuration would have that is wrong, nobody knows."""
    task, workflow_task = ({k: v for k, v in meta.items() if k != RESOURCE_CLASS} for meta in metas)
    return executors.unit_layers(task, workflow_task)


def _check_stages(stages: list[Stage], findings: Findings) -> None:
    for stage in stages:
        if (name := stage.resources.executor) is not None:
            findings.attempt(factories.check, name)
        if (problem := plan.missing_program(stage)) is not None:
            findings.mistakes.append(problem)
        if stage.resources.unknown:
            keys = ", ".join(stage.resources.unknown)
            findings.warnings.append(f"{title(stage.task)}: meta keys unknown here are passed over: {keys}")


def _describe(
    task: WorkflowTask,
    stages: list[Stage],
    types: Mapping[str, bool],
    attributes: Mapping[str, Sequence[Any]],
    images_known: str,
) -> Iterator[str]:
    yield f"{task.order} {task.task.name}"
    yield row("type", task.task.type)
    for stage in stages:
        yield row("command" if stage.parallel else "command (once)", _work(stage))
    if task.task.is_converter:
        yield row("images", "none: a converter makes them")
    else:
        wanted = [f"{name}={str(value).lower()}" for name, value in types.items()]
        wanted += [f"{name} in {list(values)}" for name, values in attributes.items()]
        yield row("filters", ", ".join(wanted) or "none")
        yield row("images", images_known)
    yield row("units", _units(task, images_known))
    for stage in stages:
        yield row("resources" if stage.parallel else "resources (once)", str(stage.resources))


def _work(stage: Stage) -> str:
    if stage.command is not None:
        return shlex.join(stage.command)
    target = stage.function.target if stage.function is not None else "?"
    return f"Python function {target if isinstance(target, str) else getattr(target, '__qualname__', target)}"


def _known(selected: list[Image] | None, previous: WorkflowTask | None) -> str:
    if selected is not None:
        return str(len(selected))
    if previous is None:
        return "not known: the dataset cannot be read"
    return f"not known yet: depends on what task {previous.order} ({previous.task.name}) does"


def _units(task: WorkflowTask, images_known: str) -> str:
    if task.task.is_compound:
        return "1, and then one per element that it lists"
    if task.task.type == "parallel":
        return f"one per image: {images_known}"
    return "1"
