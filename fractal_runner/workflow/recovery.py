"""The units of a task that an earlier coordinator began: which are done, which still run, which remain.

Nothing is submitted before all of this is known. Calls that can be attached to are; what else still runs
is fenced off and ended, so that no two executions of a unit ever overlap.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fractal_runner.errors import JobExecutionError
from fractal_runner.worker.aftermath import Trace, end_leftovers, read_traces
from fractal_runner.worker.command import EVIDENCE_DIR
from fractal_runner.worker.evidence import CorruptEvidenceError
from fractal_runner.worker.spec import UnitResult
from fractal_runner.worker.stop import raise_fence
from fractal_runner.workflow.dispatch import Ended
from fractal_runner.workflow.failures import UnitError
from fractal_runner.workflow.journal import NEVER_STARTED, UNKNOWN_OUTCOME, Journal
from fractal_runner.workflow.outcome import Outcome, Validated
from fractal_runner.workflow.past import Attempt, TaskPast
from fractal_runner.workflow.units import Place, Unit, file_prefix, title

_PATIENCE_S = 10.0  # for workers that still live to notice that they are fenced off, beyond the grace time
_NAMED = 10


@dataclass(frozen=True, slots=True)
class Judged:
    """A unit that has ended, and what that means: valid output, or a failure."""

    unit: Unit
    result: UnitResult | None
    output: Validated
    failure: UnitError | None


@dataclass(frozen=True, slots=True)
class Adopted:
    """A unit that an earlier coordinator has submitted, and that goes on under this one."""

    unit: Unit
    future: Future[UnitResult]


class Recovery:
    """What a resume knows of the task that was interrupted.

    Args:
        past: what is recorded of its units.
        same_work: whether the task still does what it did then; else all its units run again.
        rerun_unknown: run units again even if nobody knows how far they got, and they should not be.
        run_id: the run.
        keys: what the keys of the task's units began with then.
        epoch: which of the run's coordinators this is.
        run_dir: the run's directory as it is seen from here.
        grace_s: seconds between TERM and KILL.
        logger: is told what was found.
    """

    def __init__(
        self,
        past: TaskPast,
        *,
        same_work: bool,
        rerun_unknown: bool,
        run_id: str,
        keys: str,
        epoch: int,
        run_dir: str,
        grace_s: float,
        logger: logging.Logger,
    ) -> None:
        self._past = past
        self._same_work = same_work
        self._rerun_unknown = rerun_unknown
        self._run_id = run_id
        self._keys = keys
        self._epoch = epoch
        self._run_dir = run_dir
        self._grace_s = grace_s
        self._logger = logger
        self._is_fenced = False

    def finish(self) -> None:
        """End what is left of earlier coordinators, if there was nothing to be recovered."""
        if self._is_fenced:
            return
        self._fence(())
        if left := self._end_leftovers(()):
            self._logger.warning("%d unit(s) may still be running: %s", len(left), _places(left))

    def _fence(self, spare: Collection[str]) -> None:
        """Keep all workers of earlier coordinators from going on, but for the units of these keys."""
        if not self._is_fenced:
            with _evidence_is_readable():
                raise_fence(self._run_dir, self._epoch, spare)
            self._is_fenced = True

    def recover(
        self,
        units: Iterable[Unit],
        *,
        place: Place,
        outcome: Outcome,
        journal: Journal,
        judge: Callable[[Ended], Judged],
        attach: Callable[[str], Future[UnitResult] | None],
        discard: Callable[[Future[UnitResult]], None],
    ) -> tuple[list[Unit], list[Adopted], list[Judged]]:
        """Take in what is done of a stage.

        Args:
            units: all units of the stage.
            place: where their files are.
            outcome: told of those that are done.
            journal: told of what it does not know yet.
            judge: says what the end of a unit means.
            attach: the call of a key that an earlier process has submitted, if there is one.
            discard: ends such a call that is not wanted any more.

        Returns:
            What is still to be submitted; what was adopted; which successes are news.

        Raises:
            JobExecutionError: if units may still run, or may not be run again, and nobody said to.
        """
        remaining = []
        for unit in units:
            known = self._past.of(place.stage.name, unit.index).recorded(unit.digest)
            if known is None or not self._same_work or not _is_taken(known, unit, outcome):
                remaining.append(unit)
        gone = self._gone(place.stage.name, outcome.count)
        if not remaining and not gone:
            return [], [], []
        self._discard(gone, attach, discard)
        adopted = self._attached(remaining, place, attach, discard)
        self._fence(adopted)
        left = self._end_leftovers(adopted)
        self._refuse_to_guess(place, left, adopted)
        for stage, first in gone.items():
            journal.left_out(stage, first)
        rest: list[Unit] = []
        successes: list[Judged] = []
        for unit in remaining:
            found = self._settle(unit, place, journal, judge, adopted)
            if isinstance(found, Judged):
                outcome.succeed(found.unit, found.output)
                successes.append(found)
            elif found is not None:
                rest.append(found)
        journal.flush()
        self._logger.info(
            "%s: of %d unit(s), %d are done already, %d still run, %d are to be run",
            *(title(place.stage.task), outcome.count, outcome.done, len(adopted), len(rest)),
        )
        return rest, list(adopted.values()), successes

    def _gone(self, stage: str, count: int) -> dict[str, int]:
        """The stages that have fewer units now, or others altogether, and from which number on."""
        if self._same_work:
            return {stage: count} if self._past.beyond(stage, count) else {}
        return {} if self._is_fenced else dict.fromkeys(self._past.stages, 0)  # once for all of them

    def _discard(
        self,
        gone: Mapping[str, int],
        attach: Callable[[str], Future[UnitResult] | None],
        discard: Callable[[Future[UnitResult]], None],
    ) -> None:
        """End the calls of units that are no more, wherever they still wait or run."""
        asked = (
            attach(f"{self._keys}{file_prefix(stage, index, attempt.number)}")
            for stage, first in gone.items()
            for index, past in self._past.beyond(stage, first)
            for attempt in past.open()
        )
        futures = [future for future in asked if future is not None]
        for future in futures:
            future.cancel()  # those that wait first: else they start in the place of those that are ended
        for future in futures:
            discard(future)

    def _attached(
        self,
        units: Iterable[Unit],
        place: Place,
        attach: Callable[[str], Future[UnitResult] | None],
        discard: Callable[[Future[UnitResult]], None],
    ) -> dict[str, Adopted]:
        """The calls of these units that can be taken on, by key."""
        adopted = {}
        for unit in units:
            past = self._past.of(place.stage.name, unit.index)
            numbers = [attempt.number for attempt in past.open()]
            # Even what was never recorded may have been submitted: as the attempt after the last one.
            numbers.append(past.last + 1)
            for number in reversed(numbers):
                attempt = replace(unit, attempt=number)
                key = self._key(place, attempt)
                future = attach(key)
                if future is None:
                    continue
                known = past.attempts.get(number)
                is_wanted = self._same_work and (known is None or known.digest in ("", unit.digest))
                if is_wanted and not self._is_fenced:  # a fence that is up does not spare it
                    adopted[key] = Adopted(attempt, future)
                    break  # those before it had ended when it was made
                discard(future)
        return adopted

    def _key(self, place: Place, unit: Unit) -> str:
        """The key of an attempt that an earlier coordinator has made."""
        return f"{self._keys}{file_prefix(place.stage.name, unit.index, unit.attempt)}"

    def _end_leftovers(self, adopted: Collection[str]) -> list[Trace]:
        """Hear the workers, end what is left of the units that nobody knows the end of, hear them again.

        Returns:
            What may still run.
        """
        evidence = f"{self._run_dir}/{EVIDENCE_DIR}"
        with _evidence_is_readable():
            self._past.hear(read_traces(evidence, self._keys))
        unknown = [
            attempt.trace
            for attempt in self._past.open_attempts()
            if attempt.trace is not None and attempt.trace.result is None and attempt.trace.key not in adopted
        ]
        left = end_leftovers(
            unknown,
            run_id=self._run_id,
            directory=evidence,
            spare=adopted,
            grace_s=self._grace_s,
            patience_s=self._grace_s + _PATIENCE_S,
        )
        if unknown:
            with _evidence_is_readable():
                ended = read_traces(evidence, self._keys)
            # How they end now is our doing, unless they came to a good end all the same.
            self._past.hear(
                {
                    trace.key: ended[trace.key]
                    for trace in unknown
                    if (result := ended[trace.key].result) is not None and result.succeeded
                }
            )
        return left

    def _refuse_to_guess(self, place: Place, left: list[Trace], adopted: Collection[str]) -> None:
        """Stop if units would be run again that should not be.

        Raises:
            JobExecutionError: naming them.
        """
        if self._rerun_unknown:
            return
        how = "resume with rerun_unknown=True (--rerun-unknown) to run them again all the same"
        if left:
            raise JobExecutionError(
                f"{title(place.stage.task)}: {len(left)} unit(s) may still be running where they cannot be "
                f"ended from here: {_places(left)}. End them there, or {how}.",
                reason=UNKNOWN_OUTCOME,
            )
        if place.stage.resources.rerunnable:
            return
        unknown = [
            attempt.trace.key.rpartition("/")[2]
            for attempt in self._past.open_attempts(place.stage.name)
            if attempt.trace is not None and attempt.trace.result is None and attempt.trace.key not in adopted
        ]
        if unknown:
            raise JobExecutionError(
                f"{title(place.stage.task)} is not to be repeated blindly (rerunnable: false), and of "
                f"{len(unknown)} unit(s) that had started nobody knows how far they got: "
                f"{', '.join(unknown[:_NAMED])}. Look at their images and logs; then {how}.",
                reason=UNKNOWN_OUTCOME,
            )

    def _settle(
        self,
        unit: Unit,
        place: Place,
        journal: Journal,
        judge: Callable[[Ended], Judged],
        adopted: Collection[str],
    ) -> Unit | Judged | None:
        """Bring the record of a unit up to date.

        Returns:
            The next attempt at it, its success, or None if it goes on.
        """
        past = self._past.of(place.stage.name, unit.index)
        success: Judged | None = None
        goes_on = False
        for attempt in past.open():
            made = replace(unit, attempt=attempt.number, digest=attempt.digest or unit.digest)
            journal.submitted(place, made, when=attempt.submitted)
            if self._key(place, made) in adopted:
                goes_on = True
                continue
            judged = self._ended(attempt, made, place, journal, judge)
            if not self._same_work or made.digest != unit.digest:
                continue
            if judged is not None and judged.failure is None:
                success = judged
        if success is not None:
            return success
        again = replace(unit, attempt=past.last + 1)
        if not goes_on and self._key(place, again) in adopted:
            journal.submitted(place, again)
            goes_on = True
        return None if goes_on else again

    def _ended(
        self,
        attempt: Attempt,
        made: Unit,
        place: Place,
        journal: Journal,
        judge: Callable[[Ended], Judged],
    ) -> Judged | None:
        """Record how an attempt has ended, as far as anybody knows."""
        if attempt.trace is None:
            journal.given_up(place, made, NEVER_STARTED, "The coordinator died before it started.")
            return None
        if attempt.trace.result is None:
            journal.given_up(place, made, UNKNOWN_OUTCOME, "The coordinator died while it ran.")
            return None
        judged = judge(Ended(made, attempt.trace.result, None))
        if judged.failure is None:
            journal.done(place, made, attempt.trace.result)
        else:
            journal.failed(place, made, judged.failure, judged.result)
        return judged


def _is_taken(known: Attempt, unit: Unit, outcome: Outcome) -> bool:
    """Take in a recorded success; one that is not valid any more, in a later version, is none."""
    try:
        output = outcome.validated(json.loads(known.output) if known.output else None)
    except ValueError:
        return False
    outcome.succeed(unit, output)
    return True


@contextmanager
def _evidence_is_readable() -> Iterator[None]:
    """What goes wrong with the workers' records keeps the run from going on."""
    try:
        yield
    except (OSError, CorruptEvidenceError) as error:
        raise JobExecutionError(f"The run cannot go on: its workers' records: {error}.") from error


def _places(traces: Sequence[Trace]) -> str:
    """Where units run, in words."""
    return ", ".join(
        f"{trace.key.rpartition('/')[2]} on {trace.worker.host} (pid {trace.worker.pid})"
        for trace in traces[:_NAMED]
    )
