"""Finding the calls that an earlier process has submitted, whatever moment it died at.

All that is needed is in the arrays' own directories: the keys of their calls, and mostly the ids of their
jobs. Where those are missing, the process died around its submission, and the scheduler is asked for the
array's name. If it has none, the array's work is claimed for nobody, so that no late job does it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.batch.files import PAYLOAD, ArrayFiles, check_ours, open_ours, put
from fractal_runner.executors.batch.jobs import Array, Job
from fractal_runner.executors.batch.payload import Payload, StoredCall
from fractal_runner.executors.batch.scheduler import ArrayRequest, Scheduler, SchedulerError

PREFIX = "fr-"
_PATIENCE_S = 60.0  # for a scheduler that does not answer
_AGAIN_S = 2.0
_logger = logging.getLogger("fractal_runner")

Place = tuple[float, str, int, int]  # when the payload was made, directory, number of the job, place in it


class Adoption:
    """The arrays of earlier processes in a folder. One thread at a time.

    Args:
        folder: where arrays have their directories.
        scheduler: the batch system.
        seen_as: a path, as the nodes see it.
        own: whether an array is of this process's own making.
    """

    def __init__(
        self,
        folder: Path,
        scheduler: Scheduler,
        *,
        seen_as: Callable[[str], str],
        own: Callable[[str], bool],
    ) -> None:
        self._folder = folder
        self._scheduler = scheduler
        self._seen_as = seen_as
        self._own = own
        self._index: dict[str, list[Place]] | None = None
        self._arrays: dict[str, Array | None] = {}
        self._payloads: dict[str, Payload] = {}
        self._slices: dict[tuple[str, int], list[StoredCall]] = {}

    def find(self, key: str) -> tuple[Job, StoredCall] | None:
        """The call of this key, and the job that it was given to.

        Raises:
            JobExecutionError: if the scheduler does not answer, or what was written cannot be read, so that
                nobody knows.
            NotOursError: if a directory belongs to somebody else.
        """
        if self._index is None:
            self._index = self._read_index()
        for _, directory, number, place in reversed(self._index.get(key, ())):
            array = self._adopted(directory)
            if array is None or array.jobs[number].id is None:
                continue  # its work was claimed for nobody
            slice_ = self._slices.get((directory, number))
            if slice_ is None:
                try:
                    slice_ = self._payloads[directory].calls(number)
                except (ExecutorError, OSError) as error:
                    raise self._unknown(directory, error) from error
                self._slices[directory, number] = slice_
            return array.jobs[number], slice_[place]
        return None

    def _read_index(self) -> dict[str, list[Place]]:
        index: dict[str, list[Place]] = {}
        with os.scandir(self._folder) as entries:
            directories = [entry.path for entry in entries if entry.name.startswith(PREFIX)]
        for directory in directories:
            if self._own(os.path.basename(directory)) or not os.path.exists(f"{directory}/{PAYLOAD}"):
                continue  # one without a payload was never submitted
            check_ours(directory)
            try:
                payload = Payload(f"{directory}/{PAYLOAD}")
                rows = [(n, p, key) for n in range(payload.count) for p, key in enumerate(payload.keys(n))]
            except (ExecutorError, OSError, ValueError) as error:
                raise self._unknown(directory, error) from error
            self._payloads[directory] = payload
            for number, place, key in rows:
                if key is not None:
                    index.setdefault(key, []).append((payload.header["made"], directory, number, place))
        for places in index.values():
            places.sort()
        return index

    def _unknown(self, directory: str, error: Exception) -> JobExecutionError:
        """The error where nobody knows which calls there are, and which of them may be running."""
        try:
            ids = f", {', '.join(map(str, self._read_ids(ArrayFiles(directory))))}"
        except (OSError, ValueError, ExecutorError):
            ids = ""
        return JobExecutionError(
            f"What was submitted as {directory} cannot be taken on: {error}. It may be running: once its "
            f"jobs{ids} have ended or were cancelled, move the directory away.",
            reason="UNKNOWN_OUTCOME",
            info=str(error),
        )

    @staticmethod
    def _read_ids(files: ArrayFiles) -> list[str | None]:
        with open_ours(files.jobs) as fd:
            ids: list[str | None] = json.loads(os.read(fd, os.fstat(fd).st_size))
        return ids

    def _adopted(self, directory: str) -> Array | None:
        """An array, its jobs known by their ids; None if it was never submitted, and never will be."""
        if directory not in self._arrays:
            files, payload = ArrayFiles(directory), self._payloads[directory]
            terms = payload.terms
            request = ArrayRequest(
                name=files.name,
                directory=Path(directory),
                seen_as=self._seen_as(directory),
                count=payload.count,
                queue=terms.queue,
                account=terms.account,
                extra=terms.extra or {},
                **(terms.job or {"cpus": terms.cpus * terms.parallel}),
            )
            ids = self._ids(files, request)
            array = None if ids is None else Array(files, request, terms)
            if array is not None and ids is not None:
                for number, id in enumerate(ids):
                    size = payload.size(number)
                    job = Job(array, number, {}, size, terms.parallel, id=id, unwatched=size)
                    array.jobs.append(job)
            self._arrays[directory] = array
        return self._arrays[directory]

    def _ids(self, files: ArrayFiles, request: ArrayRequest) -> list[str | None] | None:
        """The ids of an array's jobs; None in the place of one that does not exist."""
        try:
            return self._read_ids(files)
        except FileNotFoundError:
            pass
        found = self._found(request)
        if found:
            ids, spare = one_of_each(files, found)
            if spare:
                self._scheduler.cancel(dict.fromkeys(spare, request.name))
            put(files.jobs, json.dumps(ids).encode())
            return ids
        numbers = range(request.count)
        void = [files.claim_for(number, None, void=True) for number in numbers]
        if all(void):
            return None
        # The scheduler has forgotten them, but jobs were there, and their claims have their ids.
        return [(files.claimed_by(number) or {}).get("job") for number in numbers]

    def _found(self, request: ArrayRequest) -> list[list[str]]:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return [list(ids) for ids in self._scheduler.find(request)]
            except SchedulerError as error:
                if time.monotonic() > deadline:
                    raise JobExecutionError(
                        f"Whether {request.name} was submitted cannot be known: {error}",
                        reason="UNKNOWN_OUTCOME",
                        info=str(error),
                    ) from error
            time.sleep(_AGAIN_S)  # it is the scheduler that is away


def one_of_each(files: ArrayFiles, found: Sequence[Sequence[str]]) -> tuple[list[str | None], list[str]]:
    """Of arrays that are there for the same work, a job for each share of it, and the jobs to be cancelled.

    A job that has claimed its share keeps it; else it is claimed here for the first one.

    Raises:
        OSError: if the claims cannot be read or written.
    """
    if len(found) == 1:
        return list(found[0]), []
    chosen: list[str | None] = []
    for number, id in enumerate(found[0]):
        is_its_own = files.claim_for(number, id)
        chosen.append(id if is_its_own else (files.claimed_by(number) or {}).get("job"))
    return chosen, [id for ids in found for id in ids if id not in chosen]
