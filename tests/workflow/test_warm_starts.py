"""Which units of a run start warm, who decides it, and who is told."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import History, JobExecutionError, Task, TaskExecutionError, WorkflowTask
from fractal_runner.worker import processes
from fractal_runner.workflow.warmth import SERVERS_DIR


def starts(directory: Path) -> list[str | None]:
    """How each unit of the run in this directory was started, task by task."""
    with History(directory / "history.sqlite", read_only=True) as history:
        [run] = history.read.runs()
        return [unit.start for unit in history.read.units(run.id)]


def reasons(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if "starts cold" in record.getMessage()
    ]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    """No server, and no directory of this process's."""
    yield
    mine = f"--owner={os.getpid()}".encode()
    everybody = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    assert not [path for path in everybody if mine in processes._read(f"{path}/cmdline")]
    base = Path(os.environ.get("TMPDIR", "/tmp"))
    assert not list(base.glob(f"fractal-runner-{os.getuid()}-*-{os.getpid()}-*"))


@pytest.fixture
def go(run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path) -> Callable[..., Awaitable[Any]]:
    """Runs units of a command, or of a Python script; how each was started."""

    async def go(count: int, *, body: str = "", command: str = "", meta: Any = None, **more: Any) -> Any:
        task = parallel(command or script(body), meta_parallel=meta or {})
        await run(task, dataset=images(count), **more)
        return starts(tmp_path / "run")

    return go


@pytest.mark.parametrize("executor", ["thread", "process", "serial", "fork", "spawn"])
async def test_units_of_a_python_script_start_warm(go: Any, tmp_path: Path, executor: str) -> None:
    body = "print(os.getppid(), flush=True); write({'image_list_updates': []})"

    assert await go(6, body=body, executor=executor) == ["warm"] * 6

    parents = {log.read_text() for log in tmp_path.rglob("*-log.txt")}
    assert len(parents) == 1  # one server for all, whichever worker started it


@pytest.mark.parametrize(
    "wishes",  # of the caller, the task, the workflow's task; units; what comes of it
    [
        ("auto", {}, {}, 2, "warm"),
        ("auto", {}, {}, 1, "cold"),
        ("always", {}, {}, 1, "warm"),
        ("never", {}, {}, 2, "cold"),
        ("auto", {"warm_start": "never"}, {}, 2, "cold"),
        ("always", {"warm_start": "never"}, {}, 2, "cold"),
        ("never", {"warm_start": "always"}, {}, 2, "cold"),
        ("auto", {"warm_start": "always"}, {}, 1, "warm"),
        ("auto", {"warm_start": "never"}, {"warm_start": "auto"}, 2, "warm"),
        ("auto", {"warm_start": "always"}, {"warm_start": "never"}, 2, "cold"),
    ],
)
async def test_who_decides_it(run: Any, script: Any, images: Any, tmp_path: Path, wishes: Any) -> None:
    wish, of_task, of_workflow, count, expected = wishes
    task = Task(name="T", type="parallel", command_parallel=script(), meta_parallel=of_task)

    await run(WorkflowTask(task=task, meta_parallel=of_workflow), dataset=images(count), warm_start=wish)

    assert starts(tmp_path / "run") == [expected] * count


async def test_what_is_no_python_starts_cold_and_nobody_is_told(
    go: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fractal_runner")

    assert await go(3, command="true") == ["cold"] * 3
    assert reasons(caplog) == []


async def test_who_wants_it_always_is_told_what_is_no_python(
    go: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await go(3, command="true", warm_start="always")

    [(level, message)] = reasons(caplog)
    assert level == "WARNING"
    assert message.startswith(
        "Task 0 ('T') starts cold: Its command does not begin with a Python interpreter"
    )


async def test_a_function_is_neither_warm_nor_cold(
    run: Any, images: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(*, zarr_url: str) -> None: ...

    await run(
        WorkflowTask(task=Task(name="F", function_parallel=work)), dataset=images(2), warm_start="always"
    )

    assert starts(tmp_path / "run") == [None, None]
    assert reasons(caplog) == []


UNFIT = {
    "a thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        "thread",
    ),
    "a failure": ("raise OSError('no licence')", r"Its imports fail .OSError: no licence."),
    "no end": ("import time\ntime.sleep(99)", "longer than 0.5 s"),
    "an exit": ("import os\nos._exit(3)", r"end the interpreter \(3\)"),
}


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize("unfit", UNFIT)
async def test_imports_that_must_not_be_shared_are_told_of_once(
    go: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, executor: str, unfit: str
) -> None:
    caplog.set_level(logging.INFO, "fractal_runner")
    module, why = UNFIT[unfit]
    only_beforehand = f"import sys\nif sys.argv[1:2] != ['--args-json']:\n  exec({module!r})\n"
    (tmp_path / "unfit.py").write_text(only_beforehand)
    (tmp_path / "task.py").write_text("import unfit\n")
    timeout = 0.5 if unfit == "no end" else 60

    found = await go(
        5, command=f"{sys.executable} {tmp_path}/task.py", executor=executor, warm_start_timeout=timeout
    )

    assert found == ["cold"] * 5
    [(level, message)] = reasons(caplog)
    assert level == "INFO"
    assert re.search(why, message), message


async def test_an_interpreter_that_is_missing_is_told_as_ever(go: Any) -> None:
    with pytest.raises(TaskExecutionError, match="no/python"):
        await go(3, command="/no/python task.py", warm_start="always")


KILLS_ITS_SERVER = "if number == 1 and '-try' not in out:\n    os.kill(os.getppid(), 9)\n    time.sleep(60)\n"


async def test_a_unit_whose_server_dies_is_tried_again(go: Any, query: Any) -> None:
    assert await go(3, body=KILLS_ITS_SERVER, executor="serial", meta={"retries": 1}) == ["warm"] * 3
    assert query("SELECT number, attempt, reason FROM {units} WHERE state = 'failed'") == [
        (1, 1, "SERVER_LOST")
    ]


async def test_a_unit_whose_server_dies_has_failed_as_with_a_dead_worker(go: Any, tmp_path: Path) -> None:
    with pytest.raises(JobExecutionError, match="fork server") as caught:
        await go(3, body=KILLS_ITS_SERVER, executor="serial")

    assert caught.value.reason == "SERVER_LOST"
    assert len(caught.value.failures) == 1
    assert starts(tmp_path / "run").count("warm") >= 2  # the third may have died before it was known


async def test_what_servers_say_lies_in_the_runs_directory(go: Any, tmp_path: Path) -> None:
    await go(2)

    [log] = (tmp_path / "run" / SERVERS_DIR).iterdir()
    assert log.name.startswith("0_t-par-")
    assert "The server ends: it was told to." in log.read_text()


async def test_runs_at_the_same_time_do_not_end_each_others_servers(
    run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    task = parallel(script("time.sleep(number / 2)"))

    await asyncio.gather(
        *(run(task, dataset=images(count), workflow_dir_local=tmp_path / f"run{count}") for count in (2, 5))
    )

    assert starts(tmp_path / "run2") + starts(tmp_path / "run5") == ["warm"] * 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warm_start": "allways"}, "warm_start='allways' is none of 'auto', 'always', 'never'"),
        ({"warm_start": True}, "warm_start=True is none of"),
        ({"warm_start_timeout": "soon"}, "warm_start_timeout: 'soon' is not a time"),
        ({"warm_start_timeout": 0}, "warm_start_timeout: 0 is not a time"),
        ({"max_servers": 0}, "max_servers: 0 is not a whole number of at least 1"),
    ],
)
async def test_wrong_arguments(run: Any, parallel: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        await run(parallel(), **wrong)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"warm_start": "yes"}, """warm_start: 'yes' is none of "auto", "always", "never\""""),
        ({"warm_start_timeout": "soon"}, "warm_start_timeout: 'soon' is not a time"),
    ],
)
async def test_wrong_meta(run: Any, parallel: Any, meta: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        await run(parallel(meta_parallel=meta))


async def test_a_history_from_before_there_were_warm_starts_is_resumed(
    run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    task = parallel(script(f"sys.exit(number == 1 and not os.path.exists({str(tmp_path / 'mended')!r}))"))
    with pytest.raises(TaskExecutionError):
        await run(task, dataset=images(3))
    with sqlite3.connect(tmp_path / "run" / "history.sqlite") as database:
        database.execute("ALTER TABLE fractal_runner_units DROP COLUMN start")
        database.execute("ALTER TABLE fractal_runner_runs DROP COLUMN settings")
        database.execute("UPDATE fractal_runner_history SET version = 1")
    database.close()
    (tmp_path / "mended").touch()

    await run(task, dataset=images(3), resume=True)

    assert starts(tmp_path / "run") == [None, "warm", None]


def test_the_command_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("import decimal\n")
    (tmp_path / "w.json").write_text(
        '{"name": "w", "task_list": [{"task": {"name": "T", "type": "parallel", '
        f'"command_parallel": "{sys.executable} {tmp_path}/task.py"}}}}]}}'
    )
    (tmp_path / "d.json").write_text(
        '{"name": "d", "zarr_dir": "/z", "images": [{"zarr_url": "/z/1"}, {"zarr_url": "/z/2"}]}'
    )
    program = Path(sys.executable).with_name("fractal-runner")

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )

    common = ["run", "w.json", "--dataset", "d.json"]
    assert cli(*common, "--workflow-dir", "warm", "--warm-start-timeout", "90s").returncode == 0
    assert cli(*common, "--workflow-dir", "cold", "--warm-start", "never").returncode == 0
    wrong = cli(*common, "--warm-start", "alway")

    assert starts(tmp_path / "warm") == ["warm"] * 2
    assert starts(tmp_path / "cold") == ["cold"] * 2
    shown = cli("status", "warm").stdout
    assert shown.splitlines()[-1].split() == ["0", "T", "done", "2", "2", "warm"]
    assert (
        '"starts": {\n        "warm": 0,\n        "cold": 2\n      }'
        in cli("status", "cold", "--json").stdout
    )
    assert "done, started warm, attempt 1: " in cli("logs", "warm").stdout
    assert wrong.returncode == 2
    assert "did you mean 'always'?" in re.sub(r"[\s│]+", " ", wrong.stderr)


@pytest.mark.parametrize(("executor", "is_ahead"), [("thread", True), ("process", True), ("spawn", False)])
async def test_the_next_tasks_server_imports_beside_the_first_ones(
    *, run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path, executor: str, is_ahead: bool
) -> None:
    """Seen by the file that the second script's imports leave: it is there before its own units are."""
    imported = tmp_path / "imported"
    look = (
        "import os, time\n"
        f"until = time.monotonic() + {20 if is_ahead else 0.5}\n"
        f"while not os.path.exists({str(imported)!r}) and time.monotonic() < until: time.sleep(0.01)\n"
        f"print(os.path.exists({str(imported)!r}))\n"
        "write({'image_list_updates': []})\n"
    )
    (tmp_path / "told_by_import.py").write_text(f"open({str(imported)!r}, 'a').write('x')\n")
    second = tmp_path / "second.py"
    second.write_text("import told_by_import\n")
    tasks = [parallel(script(look), name="looks"), parallel(f"{sys.executable} {second}", name="imports")]
    await run(*tasks, dataset=images(3), executor=executor)

    logs = [log.read_text() for log in (tmp_path / "run").rglob("0_*/*-log.txt")]
    assert logs == [f"{is_ahead}\n"] * 3
    assert starts(tmp_path / "run") == ["warm"] * 6
    assert imported.read_text() == "x"
