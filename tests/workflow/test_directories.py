"""A run's directory that cannot be used, or stops being usable."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import Image, JobExecutionError, RunBusyError, TaskExecutionError


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with these options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mount{len(mounted)}"
        place.mkdir()
        answer = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if answer.returncode != 0:
            pytest.skip(f"needs the right to mount a tmpfs: {answer.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


async def test_a_directory_in_use_by_a_run_is_refused_and_left_alone(
    run: Any, parallel: Any, script: Any, tmp_path: Path, until: Any
) -> None:
    body = f"""
open({str(tmp_path)!r} + "/began", "w").close()
while not os.path.exists({str(tmp_path)!r} + "/end"):
    time.sleep(0.01)
"""
    call = asyncio.ensure_future(run(parallel(script(body), output_types={"t": True})))
    await until((tmp_path / "began").exists)

    with pytest.raises(ValueError, match=f"{tmp_path / 'run'} already holds a run: go on with it"):
        await run(parallel())
    with pytest.raises(RunBusyError, match=f"process {os.getpid()} on .* is at work on its run") as busy:
        await run(parallel(), resume=True)
    assert busy.value.pid == os.getpid()

    (tmp_path / "end").touch()
    assert (await call).images[0].types == {"t": True}


async def test_of_two_runs_that_start_at_once_one_has_the_directory(run: Any, parallel: Any) -> None:
    answers = await asyncio.gather(*(run(parallel()) for _ in range(5)), return_exceptions=True)

    assert sum(not isinstance(answer, Exception) for answer in answers) == 1
    assert sum(isinstance(answer, (ValueError, RunBusyError)) for answer in answers) == 4


@pytest.mark.parametrize("below", [False, True])
async def test_a_file_in_the_way_is_named(run: Any, parallel: Any, tmp_path: Path, below: bool) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "run" if below else tmp_path / "file"

    with pytest.raises(JobExecutionError, match=f"Cannot use {place} as the working directory"):
        await run(parallel(), workflow_dir_local=place)


async def test_a_read_only_file_system_is_named(run: Any, parallel: Any, tmpfs: Any) -> None:
    place = tmpfs("ro")

    with pytest.raises(JobExecutionError, match=f"Cannot use {place}/run .*Read-only file system"):
        await run(parallel(), workflow_dir_local=place / "run")


async def test_a_disk_that_is_full_when_arguments_are_written_is_a_job_error_with_the_file(
    *, run: Any, parallel: Any, script: Any, images: Any, tmpfs: Any, tmp_path: Path
) -> None:
    place = tmpfs("size=256k")
    task = parallel(script(), args_parallel={"text": "x" * 200_000}, output_types={"t": True})

    with pytest.raises(JobExecutionError) as caught:
        await run(
            parallel(script(), output_types={"first": True}),
            task,
            dataset=images(3),
            workflow_dir_local=place / "run",
            history=tmp_path / "elsewhere.sqlite",
            executor=("thread", {"max_workers": 1}),
        )

    error = caught.value
    assert "No space left on device" in str(error)
    assert f"{place}/run/1_t/par-000000-000000" in str(error)
    assert "args.json" in str(error)
    assert error.workflow_task_id == 1
    assert error.dataset.images[2] == Image(zarr_url="/z/2", types={"first": True})


async def test_what_failed_is_told_even_if_the_state_cannot_be_written_any_more(
    run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    body = f"""
import shutil
shutil.rmtree({str(tmp_path / "run")!r}, ignore_errors=True)
print("gone")
sys.exit(6)
"""
    with pytest.raises(TaskExecutionError) as caught:
        await run(parallel(script(body)))

    assert caught.value.returncode == 6
    assert type(caught.value.failures[-1]) is JobExecutionError
    assert "dataset.json" in str(caught.value.failures[-1])


async def test_a_tasks_folder_that_cannot_be_made_leaves_what_ran_before_in_the_error(
    run: Any, parallel: Any, script: Any, tmp_path: Path
) -> None:
    body = f"open({str(tmp_path)!r} + '/run/1_t/x', 'w')"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "1_t").symlink_to(tmp_path / "nowhere" / "below")

    with pytest.raises(JobExecutionError, match=r"the folder .*run/1_t cannot be made") as caught:
        await run(parallel(output_types={"a": True}), parallel(script(body)))

    assert (caught.value.workflow_task_id, caught.value.type_filters) == (1, {"a": True})
    assert caught.value.dataset.images == [Image(zarr_url="/z/0", types={"a": True})]
