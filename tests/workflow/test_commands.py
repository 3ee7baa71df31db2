"""How commands are run: words, environment, files, and what happens if there is nothing to run."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import Dataset, Image, Task, TaskExecutionError, WorkflowTask

KEEP = "open(out + '.seen', 'w').write(json.dumps([args, sys.argv[1:], dict(os.environ)]))\n"


def kept(tmp_path: Path) -> Any:
    [path] = tmp_path.rglob("*.seen")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "url",
    [
        "/z/with space",
        "/z/ leading and trailing ",
        "/z/it's",
        '/z/"quoted"',
        "/z/a;b",
        "/z/$(touch never)`x`",
        "/z/$HOME",
        "/z/line\nbreak",
        "/z/back\\slash",
        "/z/*?[x]",
        "/z/--flag",
        "/z/日本語-é-🔬",
        "s3://bucket/a//b c",
    ],
)
async def test_every_url_reaches_the_task_unchanged(
    run: Any, parallel: Any, script: Any, tmp_path: Path, url: str
) -> None:
    dataset = Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url=url)])

    await run(parallel(script(KEEP), args_parallel={"again": url}), dataset=dataset)

    assert kept(tmp_path)[0] == {"zarr_url": url, "again": url}


async def test_words_of_a_command_are_split_as_a_shell_would_and_no_shell_sees_them(
    run: Any, parallel: Any, script: Any, tmp_path: Path
) -> None:
    command = script(KEEP) + """ 'a b' "c;d" $HOME '*' > x"""

    await run(parallel(command))

    words = kept(tmp_path)[1]
    assert words[:6] == ["a b", "c;d", "$HOME", "*", ">", "x"]
    assert words[6] == "--args-json"
    assert words[8] == "--out-json"


async def test_a_directory_with_an_awkward_name_works(
    run: Any, parallel: Any, script: Any, tmp_path: Path
) -> None:
    place = tmp_path / "a b'\"; $(x)\nü"

    await run(parallel(script(KEEP)), workflow_dir_local=place)

    assert kept(tmp_path)[1][1].startswith(f"{place}/0_t/par-000000-0000000")


async def test_a_relative_directory_is_taken_from_where_the_call_was_made(
    run: Any, parallel: Any, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    await run(parallel(script(KEEP)), workflow_dir_local="runs/1")

    assert kept(tmp_path)[1][1].startswith(f"{tmp_path}/runs/1/0_t/")


async def test_the_workers_are_given_their_own_path_of_the_directory(
    run: Any, parallel: Any, script: Any, tmp_path: Path
) -> None:
    (tmp_path / "there").symlink_to(tmp_path / "run")

    await run(parallel(script(KEEP)), workflow_dir_remote=tmp_path / "there")

    assert kept(tmp_path)[1][1].startswith(f"{tmp_path}/there/0_t/")


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_the_cache_directory_is_in_the_environment_of_commands(
    run: Any, parallel: Any, script: Any, tmp_path: Path, executor: str
) -> None:
    await run(parallel(script(KEEP)), user_cache_dir=tmp_path / "cache", executor=executor)

    assert kept(tmp_path)[2]["FRACTAL_CACHE_DIR"] == str(tmp_path / "cache")


async def test_standard_output_and_error_go_to_one_log_in_order(
    run: Any, parallel: Any, script: Any, tmp_path: Path
) -> None:
    body = "for n in range(3): os.write(1, b'out%d ' % n); os.write(2, b'err%d ' % n)"

    await run(parallel(script(body)))

    [log] = tmp_path.rglob("*-log.txt")
    assert log.read_text() == "out0 err0 out1 err1 out2 err2 "


async def test_an_out_file_that_is_there_is_removed_first(
    run: Any, parallel: Any, script: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "0_t"
    folder.mkdir(parents=True)
    (folder / "par-000000-0000000-metadiff.json").write_text("stale")

    await run(parallel(script("sys.exit(os.path.exists(out))")))


async def test_standard_input_is_empty(run: Any, parallel: Any, script: Any) -> None:
    await run(parallel(script("sys.exit(len(sys.stdin.read()))")))


def broken(tmp_path: Path) -> list[tuple[str, str]]:
    plain = tmp_path / "plain file"
    plain.write_text("#!/bin/sh\n")
    return [
        (str(tmp_path / "nowhere"), "there is no such executable file"),
        (str(plain), "there is no such executable file"),
        (str(tmp_path), "there is no such executable file"),
        ("no-such-program", "it is not on the PATH"),
    ]


@pytest.mark.parametrize("number", range(4))
async def test_a_program_that_cannot_be_executed_is_named_before_any_unit_starts(
    run: Any, parallel: Any, script: Any, tmp_path: Path, number: int
) -> None:
    word, why = broken(tmp_path)[number]

    with pytest.raises(TaskExecutionError) as caught:
        await run(parallel(script(KEEP)), parallel(shlex.quote(word) + " -x", name="Second"))

    assert f"the program {word!r} of command_parallel cannot be executed: {why}" in str(caught.value)
    assert (caught.value.workflow_task_id, caught.value.task_name) == (1, "Second")
    assert not list(tmp_path.rglob("*.seen"))


async def test_a_program_of_a_task_with_an_executor_of_its_own_is_missed_with_what_ran_before_it(
    run: Any, parallel: Any
) -> None:
    last = parallel("no-such-program", meta_parallel={"executor": "process"})

    with pytest.raises(TaskExecutionError, match="'no-such-program'") as caught:
        await run(parallel(output_types={"a": True}), last)

    assert caught.value.dataset.images == [Image(zarr_url="/z/0", types={"a": True})]
    assert caught.value.type_filters == {"a": True}


async def test_a_script_without_its_interpreter_says_so(run: Any, parallel: Any, tmp_path: Path) -> None:
    program = tmp_path / "task"
    program.write_text("#!/no/such/python\n")
    program.chmod(0o755)

    with pytest.raises(TaskExecutionError, match="the interpreter that its first line"):
        await run(parallel(shlex.quote(str(program))))


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_functions_are_called_by_name_and_by_object(run: Any, tmp_path: Path, executor: str) -> None:
    def mark(*, zarr_url: str, n: int) -> dict[str, Any]:
        return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"n": n, "pid": os.getpid()}}]}

    by_object = WorkflowTask(task=Task(name="F", function_parallel=mark), args_parallel={"n": 3})
    by_name = Task(name="G", function_parallel="builtins:dict")  # dict(zarr_url=…) is no valid output

    after = await run(by_object, executor=executor)
    assert after.images[0].attributes["n"] == 3
    assert (after.images[0].attributes["pid"] == os.getpid()) == (executor == "thread")
    with pytest.raises(TaskExecutionError, match="unknown field 'zarr_url'"):
        await run(by_name, executor=executor, workflow_dir_local=tmp_path / "2")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:no_such_function", "AttributeError: module 'json' has no attribute 'no_such_function'"),
        ("json:__name__", "TypeError: json:__name__ is not a function but str"),
    ],
)
async def test_a_function_that_is_not_there_is_the_tasks_error(run: Any, place: str, expected: str) -> None:
    with pytest.raises(TaskExecutionError) as caught:
        await run(Task(name="F", function_parallel=place))

    assert expected in str(caught.value)
