"""The errors that a run ends with: which one is raised, what it says, and what it carries."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Image,
    JobExecutionError,
    Task,
    TaskExecutionError,
    TaskOutputValidationError,
    UnitFinished,
)


def raise_again(error: Exception) -> None:
    raise error


async def test_the_error_carries_the_workflow_tasks_id_and_where_it_happened(
    run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    task = parallel(script("sys.exit(7 if number == 1 else 0)"), id=99, name="Seg")
    task = task.model_copy(update={"id": 5, "order": 8})

    with pytest.raises(TaskExecutionError) as caught:
        await run(task, dataset=images(2), job_id=1)

    error = caught.value
    assert (error.workflow_task_id, error.workflow_task_order, error.task_name) == (5, 8, "Seg")
    assert (error.returncode, error.unit_index, error.zarr_url) == (7, 1, "/z/1")
    assert error.log_file == str(tmp_path / "run" / "8_seg" / "par-000000-0000001-log.txt")
    assert error.dataset == images(2)
    assert error.type_filters == {}
    assert len(error.failures) == 1


async def test_the_lowest_index_is_raised_whichever_failed_first(
    run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    body = f"""
if number == 2:
    sys.exit(9)
while not os.path.exists({str(flag)!r}):
    time.sleep(0.01)
sys.exit(4)
"""
    ended: list[int] = []

    def on_event(event: object) -> None:
        if isinstance(event, UnitFinished):
            ended.append(event.index)
            flag.touch()  # the others wait for this

    with pytest.raises(TaskExecutionError) as caught:
        await run(
            parallel(script(body)),
            dataset=images(3),
            executor=("thread", {"max_workers": 3}),
            on_event=on_event,
        )

    assert ended[0] == 2
    assert (caught.value.unit_index, caught.value.returncode) == (0, 4)
    assert [failure.unit_index for failure in caught.value.failures] == [0, 1, 2]


async def test_all_units_of_a_failing_task_run_and_later_tasks_do_not(
    run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    body = f"open({str(tmp_path)!r} + f'/ran{{number}}', 'w').close(); sys.exit(number == 0)"

    with pytest.raises(TaskExecutionError) as caught:
        await run(
            parallel(output_types={"a": True}),
            parallel(script(body), output_types={"b": True}),
            parallel(script(f"open({str(tmp_path)!r} + '/later', 'w')")),
            dataset=images(4),
            executor=("thread", {"max_workers": 1}),
            job_type_filters={"c": False},
        )

    assert len(list(tmp_path.glob("ran*"))) == 4
    assert not (tmp_path / "later").exists()
    assert caught.value.type_filters == {"c": False, "a": True}  # those in force before the failed task
    assert [image.types for image in caught.value.dataset.images] == [{"a": True}] + 3 * [
        {"a": True, "b": True}
    ]
    state = json.loads((tmp_path / "run" / "filters.json").read_text())
    assert state["type_filters"] == caught.value.type_filters


async def test_on_failure_stop_leaves_out_what_has_not_started(
    run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    body = f"open({str(tmp_path)!r} + f'/ran{{number}}', 'w').close(); sys.exit(1)"

    with pytest.raises(TaskExecutionError):
        await run(
            parallel(script(body)),
            dataset=images(100),
            executor=("thread", {"max_workers": 1}),
            on_failure="stop",
        )

    assert len(list(tmp_path.glob("ran*"))) < 50


async def test_the_message_tells_task_unit_code_and_the_end_of_the_log(
    run: Any, parallel: Any, script: Any
) -> None:
    body = "print('first'); print('last words', file=sys.stderr); sys.exit(3)"

    with pytest.raises(TaskExecutionError) as caught:
        await run(parallel(script(body), name="Measure"))

    text = str(caught.value)
    assert text.startswith("Task 0 ('Measure'): unit 0 (/z/0) failed: exit code 3.")
    assert f"The end of its log ({caught.value.log_file}):" in text
    assert set(text.splitlines()[-2:]) == {"first", "last words"}


async def test_a_long_log_is_cut_from_the_front_to_20000_characters(
    run: Any, parallel: Any, script: Any
) -> None:
    body = "for n in range(10000): print('line ü', n)\nsys.stdout.flush(); sys.exit(1)"

    with pytest.raises(TaskExecutionError) as caught:
        await run(parallel(script("sys.stdout.reconfigure(encoding='utf-8')\n" + body)))

    text = str(caught.value)
    tail = text.split("):\n", 1)[1]
    assert tail.endswith("line ü 9999")
    assert 19_000 < len(tail) <= 20_000
    assert tail.startswith("line ü ")


async def test_many_long_logs_do_not_fill_the_memory(
    run: Any, parallel: Any, script: Any, images: Any
) -> None:
    with pytest.raises(TaskExecutionError) as caught:
        await run(parallel(script("print('x' * 100_000); sys.exit(1)")), dataset=images(20))

    lengths = [len(str(failure)) for failure in caught.value.failures]
    assert max(lengths) <= 21_000
    assert len(pickle.dumps(caught.value)) < 1_000_000


@pytest.mark.parametrize(("code", "name"), [(137, "SIGKILL"), (143, "SIGTERM"), (139, "SIGSEGV")])
async def test_a_code_above_128_is_the_tasks_with_a_hint_at_the_signal(
    run: Any, parallel: Any, script: Any, code: int, name: str
) -> None:
    with pytest.raises(TaskExecutionError) as caught:
        await run(parallel(script(f"sys.exit({code})")))

    assert caught.value.returncode == code
    assert f"exit code {code} (128+N is how a shell reports signal N: {name}?)" in str(caught.value)


async def test_a_signal_is_a_job_error_with_its_name_and_files(
    run: Any, parallel: Any, script: Any, tmp_path: Path
) -> None:
    with pytest.raises(JobExecutionError) as caught:
        await run(parallel(script("print('about to go', flush=True); os.kill(os.getpid(), 11)")))

    error = caught.value
    assert (error.returncode, error.reason) == (-11, "SIGSEGV")
    assert "was killed by SIGSEGV" in str(error)
    assert error.stdout_file == error.stderr_file == error.log_file
    assembled = error.assemble_error()
    assert str(error) in assembled
    assert "about to go" in assembled
    assert '"zarr_url": "/z/0"' in assembled  # the file it was called with


async def test_a_raised_error_keeps_everything_through_a_process_boundary(
    run: Any, parallel: Any, script: Any, images: Any
) -> None:
    body = "sys.exit(3) if number else os.kill(os.getpid(), 9)"
    with pytest.raises(JobExecutionError) as caught:
        await run(parallel(script(body)), dataset=images(3))
    error = caught.value

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(raise_again, error).exception(60)

    assert type(there) is JobExecutionError
    plain = {key: value for key, value in vars(error).items() if key not in ("failures", "__notes__")}
    assert {key: vars(there)[key] for key in plain} == plain
    assert str(there) == str(error)
    assert [(type(one), str(one), vars(one)["returncode"]) for one in there.failures] == [
        (type(one), str(one), one.returncode) for one in error.failures
    ]


def test_an_error_among_its_own_failures_keeps_all_where_dask_changes_how_errors_are_pickled() -> None:
    script = (
        "import pickle, tblib.pickling_support\n"
        "from fractal_runner import JobExecutionError\n"
        "tblib.pickling_support.install()\n"
        "error = JobExecutionError('It died.', returncode=-9, reason='SIGKILL')\n"
        "error.failures = (error, JobExecutionError('Another.', returncode=-15))\n"
        "there = pickle.loads(pickle.dumps(error))\n"
        "assert there.failures[0] is there\n"
        "print(str(there), there.returncode, there.reason, there.failures[1].returncode)\n"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)

    assert (done.stdout, done.stderr) == ("It died. -9 SIGKILL -15\n", "")


async def test_outputs_that_contradict_each_other_fail_the_task_with_all_attributes(
    run: Any, parallel: Any, script: Any, images: Any
) -> None:
    body = "write({'image_list_updates': [{'zarr_url': '/z/9', 'attributes': {'n': number}}]})"

    with pytest.raises(
        TaskOutputValidationError, match=r"Task 0 \('T'\).*two different ways: '/z/9'"
    ) as caught:
        await run(parallel(script(body), output_types={"t": True}), dataset=images(2))

    error = caught.value
    assert isinstance(error, TaskExecutionError | ValueError)
    assert (error.workflow_task_id, error.workflow_task_order, error.task_name) == (0, 0, "T")
    assert error.dataset == images(2)  # the dataset stays as it was before the task
    assert [(one.workflow_task_id, one.task_name) for one in error.failures] == [(0, "T")]


async def test_a_failed_unit_is_raised_before_a_failed_merge_and_both_are_listed(
    run: Any, parallel: Any, script: Any, images: Any
) -> None:
    body = "sys.exit(5) if number == 1 else write({'image_list_removals': ['/z/nowhere']})"

    with pytest.raises(TaskExecutionError) as caught:
        await run(parallel(script(body)), dataset=images(2))

    assert caught.value.returncode == 5
    assert [type(failure) for failure in caught.value.failures] == [TaskExecutionError, JobExecutionError]
    assert caught.value.dataset == images(2)


async def test_an_init_unit_that_fails_ends_its_compound_task(run: Any, images: Any) -> None:
    task = Task(name="C", command_non_parallel="false", command_parallel="true", output_types={"t": True})

    with pytest.raises(TaskExecutionError, match="its init unit failed: exit code 1") as caught:
        await run(task, dataset=images(2))

    assert caught.value.dataset == images(2)


async def test_an_invalid_output_is_named_with_its_place(run: Any, parallel: Any, script: Any) -> None:
    body = (
        "write({'image_list_updates': [{'zarr_url': '/z/0', 'atributes': {}}], 'image_list_removals': [3]})"
    )

    with pytest.raises(TaskOutputValidationError) as caught:
        await run(parallel(script(body)))

    assert "image_list_updates[0].atributes: unknown field 'atributes': did you mean 'attributes'?" in str(
        caught.value
    )
    assert "image_list_removals[0]" in str(caught.value)


@pytest.mark.parametrize(
    "output",
    [
        '{"image_list_updates": [{"zarr_url": "relative"}]}',
        '{"image_list_updates": [{"zarr_url": "/z/0", "types": {"a": 1}}]}',
        '{"image_list_updates": [{"zarr_url": "/z/0", "types": {"a": null}}]}',
        '{"image_list_updates": [{"zarr_url": "/z/0", "attributes": {"a": []}}]}',
        '{"image_list_updates": {}}',
        '{"filters": {}}',
        "[]",
        "0",
        '""',
        "false",
        "NaN",
        "",
    ],
)
async def test_output_of_a_wrong_type_fails_its_unit(
    run: Any, parallel: Any, script: Any, images: Any, output: str
) -> None:
    body = f"if number == 0: write({output!r})"

    with pytest.raises(TaskOutputValidationError) as caught:
        await run(parallel(script(body), output_types={"t": True}), dataset=images(2))

    assert [image.types for image in caught.value.dataset.images] == [{}, {"t": True}]


async def test_a_run_that_cannot_go_on_without_units_carries_the_task_all_the_same(
    run: Any, parallel: Any
) -> None:
    with pytest.raises(JobExecutionError) as caught:
        await run(
            parallel(output_types={"a": True}),
            parallel(input_types={"b": True}, name="Second"),
        )

    assert (caught.value.workflow_task_id, caught.value.task_name) == (1, "Second")
    assert caught.value.type_filters == {"a": True}
    assert caught.value.dataset.images == [Image(zarr_url="/z/0", types={"a": True})]
