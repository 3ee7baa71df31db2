"""The command line, run as a person would: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.cli.options import (
    executor_words,
    filter_arguments,
    read_attribute_filters,
    read_type_filters,
)

PROGRAM = str(Path(sys.executable).parent / "fractal-runner")
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes a workflow of commands (one parallel task each) and a dataset of three wells."""

    def write(*commands: str, **more: Any) -> tuple[Path, Path]:
        tasks = [
            {"task": {"name": f"Task {n}", "type": "parallel", "command_parallel": command, **more}}
            for n, command in enumerate(commands)
        ]
        workflow, dataset = tmp_path / "workflow.json", tmp_path / "dataset.json"
        workflow.write_text(json.dumps({"name": "w", "task_list": tasks}))
        images = [
            {"zarr_url": f"/d/{n}", "attributes": {"well": f"A0{n}", "n": n}, "types": {}} for n in (1, 2, 3)
        ]
        dataset.write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))
        return workflow, dataset

    return write


def shell(script: str) -> str:
    return shlex.join(["sh", "-c", script])


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_run_that_succeeds_writes_the_dataset_and_exits_with_0(
    cli: Cli, files: Any, tmp_path: Path
) -> None:
    workflow, dataset = files("true", output_types={"seen": True})

    ran = cli("run", workflow, "--dataset", dataset, "--workflow-dir", "r", "--output", "after.json")

    assert ran.returncode == 0, ran.stderr
    assert "Task 0: begins with 3 image(s)" in ran.stderr
    after = json.loads((tmp_path / "after.json").read_text())
    assert [image["types"] for image in after["images"]] == [{"seen": True}] * 3
    assert after == json.loads((tmp_path / "r" / "dataset.json").read_text())


def test_a_task_error_shows_the_log_and_the_command_that_goes_on_and_exits_with_1(
    cli: Cli, files: Any, tmp_path: Path
) -> None:
    workflow, dataset = files(
        "true", shell("test -e mended || { echo it is broken; exit 7; }"), input_types={}
    )

    failed = cli("run", workflow, "--dataset", dataset, "--workflow-dir", "r", "--executor", "process")

    assert failed.returncode == 1
    assert "Task 1 ('Task 1'): unit 0 (/d/1) failed: exit code 7." in failed.stderr
    assert "it is broken" in failed.stderr
    assert "3 units failed" in failed.stderr
    command = shlex.split(failed.stderr.strip().splitlines()[-1])
    assert command[1] == "run"
    (tmp_path / "mended").touch()
    resumed = cli(*command[1:])
    assert resumed.returncode == 0, resumed.stderr
    assert "Task 0" not in resumed.stderr


def test_the_command_that_goes_on_carries_the_filters_in_force(cli: Cli, files: Any) -> None:
    workflow, dataset = files("true", "false", output_types={"a": True})

    failed = cli(
        *("run", workflow, "--dataset", dataset, "--workflow-dir", "r"),
        *("--attribute-filter", "well=A01,A02", "--attribute-filter", "n=1"),
    )

    command = shlex.split(failed.stderr.strip().splitlines()[-1])
    assert command[command.index("--first") + 1] == "1"
    assert "a=true" in command
    assert "well=A01,A02" in command
    assert "n=[1]" in command


def test_a_job_error_exits_with_3(cli: Cli, files: Any) -> None:
    workflow, dataset = files(shell("kill -9 $$"))

    ran = cli("run", workflow, "--dataset", dataset)

    assert ran.returncode == 3
    assert "was killed by SIGKILL" in ran.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--executor", "thraed"],
            "--executor thraed: executor: there is no executor 'thraed': did you mean 'thread'?",
        ),
        (["--executor-opt", "max_worker=2"], "did you mean 'max_workers'?"),
        (["--executor-opt", "x"], "is not of the form KEY=VALUE"),
        (["--first", "3"], "first_task_index=3 is out of range"),
        (["--type-filter", "is_3D=1"], "a type is true or false"),
        (["--type-filter", "is_3D"], "is not of the form NAME=VALUE"),
        (["--max-workers", "0"], "max-workers"),
        (["--task-env", "/no/python"], "there is no Python interpreter at '/no/python'"),
        (["--output", "/no/such/dir/x.json"], "directory"),
    ],
)
def test_wrong_usage_is_answered_with_what_would_be_right_and_exits_with_2(
    cli: Cli, files: Any, tmp_path: Path, words: list[str], expected: str
) -> None:
    workflow, dataset = files("true")
    named = {"name": "w", "task_list": [{"task": {"pkg_name": "p", "version": "1", "name": "t"}}]}
    if "--task-env" in words:
        workflow.write_text(json.dumps(named))

    ran = cli("run", workflow, "--dataset", dataset, "--workflow-dir", "r", *words)

    assert ran.returncode == 2
    assert expected in " ".join(ran.stderr.replace("│", " ").split())
    assert not (tmp_path / "r").exists()


def test_mistakes_in_files_are_answered_with_file_and_place(cli: Cli, files: Any) -> None:
    workflow, dataset = files("true")
    workflow.write_text('{"name": "w", "task_list": [}')

    ran = cli("run", workflow, "--dataset", dataset)

    assert ran.returncode == 2
    assert f"{workflow}: line 1, column 29: not valid JSON" in ran.stderr


def test_check_says_what_would_run_without_running_it(cli: Cli, files: Any, tmp_path: Path) -> None:
    workflow, dataset = files(
        shell("touch ran"), "true", output_types={"b": True}, meta_parallel={"mem": "4G"}
    )

    checked = cli("check", workflow, "--dataset", dataset, "--attribute-filter", "well=A02")

    assert checked.returncode == 0, checked.stderr
    assert "No mistakes found." in checked.stdout
    assert "images            1\n" in checked.stdout
    assert "4 GB" in checked.stdout
    assert "b=true" in checked.stdout
    assert "depends on what task 0 (Task 0) does" in checked.stdout
    assert not (tmp_path / "ran").exists()


def test_check_finds_every_mistake_at_once(cli: Cli, tmp_path: Path) -> None:
    task = {"name": "t", "type": "parallel", "command_parallel": "no-such-program"}
    tasks = [
        {"task": {**task, "meta_parallel": {"mem": "4 GiBB"}}},
        {"task": {**task, "input_types": {"a": True}}, "type_filters": {"a": False}},
    ]
    (tmp_path / "w.json").write_text(json.dumps({"name": "w", "task_list": tasks}))
    images = [{"zarr_url": "/d/1", "typs": {}}, {"zarr_url": "d/2"}]
    (tmp_path / "d.json").write_text(json.dumps({"name": "d", "zarr_dir": "/d", "images": images}))

    checked = cli("check", "w.json", "--dataset", "d.json", "--executor", "slrum")

    assert checked.returncode == 2
    for mistake in (
        "d.json: images[0].typs: unknown field 'typs': did you mean 'types'?",
        "d.json: images[1].zarr_url: 'd/2' is neither an absolute path",
        "there is no executor 'slrum': did you mean 'slurm'?",
        "Task 0 ('t'): meta_parallel.mem: '4 GiBB' is not a size",
        "Task 1 ('t'): its type_filters ask for a=False",
        "the program 'no-such-program' of command_parallel cannot be executed",
    ):
        assert mistake in checked.stderr, checked.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_signal_ends_what_runs_and_says_how_to_go_on(
    files: Any, tmp_path: Path, number: signal.Signals, executor: str
) -> None:
    workflow, dataset = files("true", shell("echo $$ > pid.$$; sleep 1000 & echo $! > pid.$!; sleep 1000"))
    words = ["run", str(workflow), "--dataset", str(dataset), "--workflow-dir", "r", "--max-workers", "2"]
    run = subprocess.Popen(
        [PROGRAM, *words, "--executor", executor], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len([p for p in tmp_path.glob("pid.*") if p.read_text().strip()]) == 4)

    for _ in range(2 if number == signal.SIGINT else 1):
        run.send_signal(number)
        time.sleep(0.5)  # two signals of one number that come at once are one
    _, stderr = run.communicate(timeout=60)

    assert run.returncode == 128 + number
    assert f"Stopped by {number.name}" in stderr
    assert "--first 1" in stderr
    for path in tmp_path.glob("pid.*"):
        pid = int(path.read_text())
        wait_for(lambda pid=pid: not _runs(pid))


@pytest.mark.parametrize("executor", ["thread", "process", "serial"])
def test_the_first_ctrl_c_lets_what_runs_finish(files: Any, tmp_path: Path, executor: str) -> None:
    task = shell("touch started.$$; until test -e go; do sleep 0.05; done; touch ended.$$")
    workflow, dataset = files("true", task)
    words = ["run", str(workflow), "--dataset", str(dataset), "--workflow-dir", "r"]
    words += [] if executor == "serial" else ["--max-workers", "1"]
    run = subprocess.Popen(
        [PROGRAM, *words, "--executor", executor], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(list(tmp_path.glob("started.*"))) == 1)

    run.send_signal(signal.SIGINT)
    time.sleep(0.5)  # the unit ends only after the signal has been taken
    (tmp_path / "go").touch()
    _, stderr = run.communicate(timeout=60)

    assert run.returncode == 130, stderr
    assert "nothing more is started; what runs may finish" in stderr
    assert "the run was asked to start no more units; 1 of 3 units are done" in stderr
    assert "--first 1" in stderr
    assert len(list(tmp_path.glob("started.*"))) == len(list(tmp_path.glob("ended.*"))) == 1


def test_over_serial_the_second_ctrl_c_ends_what_runs(files: Any, tmp_path: Path) -> None:
    workflow, dataset = files(shell("echo $$ > pid; sleep 1000"))
    words = ["run", str(workflow), "--dataset", str(dataset), "--workflow-dir", "r", "--executor", "serial"]
    run = subprocess.Popen([PROGRAM, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text().strip()))

    run.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two signals of one number that come at once are one
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)

    assert run.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "what ran has been ended" in stderr
    wait_for(lambda: not _runs(int((tmp_path / "pid").read_text())))


def on_a_terminal(folder: Path, *words: str | Path) -> str:
    """Runs the program with a terminal for its standard error; all that it shows there."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    with subprocess.Popen([PROGRAM, *map(str, words)], cwd=folder, stderr=theirs, env=environment) as run:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # Linux's answer when the other end is closed
            os.close(ours)
    assert run.returncode == 0
    return shown.decode()


def test_on_a_terminal_there_are_bars(files: Any, tmp_path: Path) -> None:
    workflow, dataset = files("true")

    assert "3/3" in on_a_terminal(tmp_path, "run", workflow, "--dataset", dataset, "--workflow-dir", "r")


def test_on_a_terminal_running_units_are_listed(files: Any, tmp_path: Path) -> None:
    workflow, dataset = files(shell("sleep 2.5"))

    shown = on_a_terminal(tmp_path, "run", workflow, "--dataset", dataset, "--workflow-dir", "r")

    assert "memory" in shown
    assert "Task 0 1 " in shown
    assert os.uname().nodename in shown


def test_filters_are_read_as_json_scalars_or_text_and_written_back() -> None:
    filters = read_attribute_filters(
        ["acquisition=1", "flag=true", "well=A01,B 2", 'odd=["1", "a,b", "true"]', "x=NaN"]
    )

    assert filters == {
        "acquisition": [1],
        "flag": [True],
        "well": ["A01", "B 2"],
        "odd": ["1", "a,b", "true"],
        "x": ["NaN"],
    }
    words = filter_arguments({"is_3D": False}, filters)
    assert read_type_filters(words[1:2]) == {"is_3D": False}
    assert read_attribute_filters(words[3::2]) == filters


def test_max_workers_is_an_option_of_the_executor() -> None:
    assert executor_words(["a=1"], 3) == ["a=1", "max_workers=3"]
    assert executor_words(None, None) == []


def test_version_and_module_entry_point() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "fractal_runner", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert shown.stdout.startswith("fractal-runner ")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"
