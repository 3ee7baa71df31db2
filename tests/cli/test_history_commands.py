"""The commands about runs that were recorded: status, logs, list, clean and cancel."""

from __future__ import annotations

import json
import os
import pty
import queue
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from typer.testing import CliRunner, Result

from fractal_runner.cli.app import app
from fractal_runner.cli.cancel import cancel_run
from fractal_runner.cli.locate import open_run
from fractal_runner.cli.status import status_of
from fractal_runner.history.directory import DirectoryLock, RunFile
from fractal_runner.history.schema import State, owners
from fractal_runner.history.store import History
from fractal_runner.history.writing import UnitKey

PROGRAM = str(Path(sys.executable).parent / "fractal-runner")
NAMES = ("Convert", "Segment", "Measure")
FILES = ("-args.json", "-metadiff.json", "-log.txt")
DEADLINE_S = 30

Invoke = Callable[..., Result]


class Book:
    """A run's record and files, kept by this process as a coordinator would keep them."""

    def __init__(self, directory: Path, *, url: str | None = None, run_id: str = "a" * 32) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.run_id = run_id
        self.history = History(url or directory / "history.sqlite")
        self.writer = self.history.writer(run_id)
        self.logs: dict[UnitKey, str] = {}
        self.writer.begin(
            {
                "directory": str(directory),
                "workflow": json.dumps(
                    {"name": "nuclei", "task_list": [{"task": {"name": n}} for n in NAMES]}
                ),
                "dataset": b"",
                "workflow_name": "nuclei",
                "dataset_name": "plate",
                "dataset_key": "key",
                "first_task": 0,
                "last_task": len(NAMES) - 1,
                "type_filters": "{}",
                "attribute_filters": "{}",
                "executor": None,
                "job_id": None,
                "user_id": None,
                "versions": "{}",
            }
        )
        (directory / "run.json").write_text(RunFile(run_id, url).text())

    def begin_task(self, position: int, units: int, kind: str = "parallel") -> None:
        self.writer.begin_task(
            {
                "position": position,
                "task_order": position,
                "name": NAMES[position],
                "type": kind,
                "task_key": f"task {position}",
                "content": "{}",
                "type_filters": "{}",
                "images": units,
                "units": units,
                "selected": None,
            },
            [],
            "key",
        )

    def end_task(self, position: int, state: State = State.DONE) -> None:
        self.writer.end_task(position, state, images={}, keys=("key", f"task {position}"))

    def submit(self, position: int, number: int, attempt: int = 1, *, log: str | None = None) -> UnitKey:
        key = UnitKey(position, "par", number, attempt)
        again = f"-try{attempt}" if attempt > 1 else ""
        name = f"{position}_{NAMES[position].lower()}/par-000000-{number:07d}{again}"
        self.logs[key] = log or f"{name}-log.txt"
        self.writer.submitted(key, zarr_url=f"/plate/{number}", digest="d", log=self.logs[key])
        return key

    def start(self, key: UnitKey, text: str | bytes | None = None) -> UnitKey:
        self.writer.running(key, {"started": time.time(), "host": "node7", "pid": 4711})
        if text is not None:
            self.print(key, text)
        self.writer.flush()
        return key

    def print(self, key: UnitKey, text: str | bytes) -> None:
        path = self.directory / self.logs[key]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(text.encode() if isinstance(text, str) else text)

    def end(self, key: UnitKey, state: State = State.DONE, **columns: Any) -> None:
        now = time.time()
        self.writer.ended(key, state, {"started": now, "ended": now, **columns})

    def unit(
        self,
        position: int,
        number: int,
        state: State = State.DONE,
        *,
        attempt: int = 1,
        text: str | bytes | None = None,
        **columns: Any,
    ) -> UnitKey:
        """A unit from its beginning to its end, with its files if it printed something."""
        key = self.submit(position, number, attempt)
        if text is not None:
            self.print(key, text)
            for ending in FILES[:2]:
                self.path_of(key, ending).write_text("{}")
        self.end(key, state, **columns)
        return key

    def path_of(self, key: UnitKey, ending: str) -> Path:
        return self.directory / (self.logs[key].removesuffix("-log.txt") + ending)

    def owned_by(self, **columns: Any) -> None:
        """Let the record name another owner."""
        self.history._database.write(lambda connection: connection.execute(update(owners).values(**columns)))

    def close(self) -> None:
        self.writer.close()
        self.history.close()


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Callable[..., Book]]:
    """Begins runs, in tmp_path/run if nothing else is said."""
    opened: list[Book] = []

    def begin(directory: Path | None = None, **options: Any) -> Book:
        opened.append(Book(directory or tmp_path / "run", **options))
        return opened[-1]

    yield begin
    for one in opened:
        one.close()


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """Runs a command in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def cli(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as a person would."""
    return subprocess.run(
        [PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


class Watched:
    """A command that goes on; what it prints is read meanwhile."""

    def __init__(self, *words: str | Path, on_terminal: bool = False) -> None:
        if on_terminal:
            ours, theirs = pty.openpty()
        else:
            ours, theirs = os.pipe()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50"}
        self.process = subprocess.Popen(
            [PROGRAM, *map(str, words)], stdout=theirs, stderr=subprocess.PIPE, env=environment
        )
        os.close(theirs)
        assert self.process.stderr is not None
        self._stderr = self.process.stderr
        self.printed = b""
        self._parts: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, fd: int) -> None:
        try:
            while part := os.read(fd, 65536):
                self._parts.put(part)
        except OSError:  # Linux's answer when the other end of a terminal is closed
            pass
        finally:
            os.close(fd)
            self._parts.put(b"")

    def until(self, text: str) -> None:
        """Wait for it to print something."""
        deadline = time.monotonic() + DEADLINE_S
        while text.encode() not in self.printed:
            assert time.monotonic() < deadline, f"{text!r} was not printed, but {self.printed!r}"
            part = self._parts.get(timeout=DEADLINE_S)
            assert part, f"it ended without {text!r}, after {self.printed!r}: {self._stderr.read()!r}"
            self.printed += part

    def rest(self) -> str:
        """Wait for its end; all that it has printed."""
        while part := self._parts.get(timeout=DEADLINE_S):
            self.printed += part
        self.process.wait(timeout=DEADLINE_S)
        self.errors = self._stderr.read().decode()
        return self.printed.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stderr.close()
        self._reader.join()


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    """Starts a command that goes on."""
    started: list[Watched] = []

    def start(*words: str | Path, on_terminal: bool = False) -> Watched:
        started.append(Watched(*words, on_terminal=on_terminal))
        return started[-1]

    yield start
    for one in started:
        one.close()


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def words_of(line: str) -> list[str]:
    return line.split()


def row(text: str, beginning: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(beginning))


# status


def test_status_shows_failures_first_then_tasks_by_state_then_what_runs(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(0, 1)
    run.unit(0, 0)
    run.end_task(0)
    run.begin_task(1, 6)
    run.unit(1, 0)
    run.unit(1, 1, State.FAILED, message="Task 1 ('Segment'): unit 1 (/plate/1) failed: exit code 7.\nmore")
    run.unit(1, 2, State.CANCELLED)
    run.start(run.submit(1, 3))
    run.submit(1, 4)
    run.writer.flush()

    shown = invoke("status", run.directory)

    assert shown.exit_code == 0
    text = shown.stdout
    assert text.startswith("nuclei over plate: running\n")
    assert f"process {os.getpid()} on {os.uname().nodename}" in text
    assert "Task 1 ('Segment'): unit 1 (/plate/1) failed: exit code 7.\n" in text
    assert f"{run.directory}/1_segment/par-000000-0000001-log.txt\n" in text
    assert text.index("Failed units") < text.index("0 Convert") < text.index("Running now")
    assert words_of(row(text, "task"))[2:] == [
        *("units", "done", "failed", "cancelled", "running", "submitted", "waiting", "start")
    ]
    assert words_of(row(text, "0 Convert")) == ["0", "Convert", "done", "1", "1"]
    assert words_of(row(text, "1 Segment")) == ["1", "Segment", "running", "6", *"111111"]
    assert words_of(row(text, "2 Measure")) == ["2", "Measure", "waiting"]
    assert words_of(row(text, "  1 Segment, unit 3"))[4:6] == ["node7", "4711"]


def test_status_names_ten_failures_and_counts_the_rest(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(0, 13)
    for number in range(13):
        run.unit(0, number, State.FAILED, message=f"unit {number} failed: exit code 1.")
    run.end_task(0, State.FAILED)
    run.writer.end_run(State.FAILED, "unit 0 failed: exit code 1.\nits log")

    text = invoke("status", run.directory).stdout

    assert [line for line in text.splitlines() if line.startswith("  unit")] == [
        f"  unit {number} failed: exit code 1." for number in range(10)
    ]
    assert f"and 3 more: fractal-runner logs {run.directory} --failed" in text
    assert "error      unit 0 failed: exit code 1.\n" in text
    assert f"to go on   fractal-runner resume {run.directory}" in text


@pytest.mark.parametrize(
    ("columns", "state"),
    [
        ({"pid": -1}, "interrupted"),
        ({"start_ticks": 1}, "interrupted"),  # another process has its pid now
        ({"boot_id": "before"}, "interrupted"),
        ({"host": "elsewhere", "heartbeat": -61.0}, "interrupted"),
        ({"host": "elsewhere", "heartbeat": -30.0}, "running"),
    ],
)
def test_a_run_whose_coordinator_is_gone_is_interrupted(
    book: Any, invoke: Invoke, columns: dict[str, Any], state: str
) -> None:
    run = book()
    run.begin_task(0, 2)
    run.start(run.submit(0, 0))
    if "heartbeat" in columns:
        columns = {**columns, "heartbeat": time.time() + columns["heartbeat"]}
    run.owned_by(**{**columns, **({"pid": dead_pid()} if columns.get("pid") == -1 else {})})

    text = invoke("status", run.directory).stdout

    assert text.startswith(f"nuclei over plate: {state}\n")
    assert words_of(row(text, "0 Convert"))[2] == state
    assert (f"fractal-runner resume {run.directory}" in text) == (state == "interrupted")


def test_status_as_json_is_one_object_for_programs(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(0, 3)
    run.unit(0, 0, State.FAILED, message="it broke\nlog", returncode=7)
    run.start(run.submit(0, 1))

    found = json.loads(invoke("status", run.directory, "--json").stdout)

    assert list(found) == ["run", "tasks", "failures", "running"]
    assert found["run"]["state"] == "running"
    assert found["run"]["coordinator"] == {"host": os.uname().nodename, "pid": os.getpid()}
    assert [task["state"] for task in found["tasks"]] == ["running", "waiting", "waiting"]
    first = found["tasks"][0]
    assert [first[key] for key in ("units", "failed", "running", "done", "waiting")] == [3, 1, 1, 0, 1]
    assert found["tasks"][1]["units"] is None
    (failure,) = found["failures"]
    assert (failure["task"], failure["unit"], failure["message"]) == (0, 0, "it broke")
    assert (failure["returncode"], failure["log"]) == (7, "0_convert/par-000000-0000000-log.txt")
    (unit,) = found["running"]
    assert (unit["unit"], unit["host"], unit["pid"]) == (1, "node7", 4711)


def test_status_counts_only_the_last_attempt_at_a_unit(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(0, 1)
    run.unit(0, 0, State.FAILED, message="it broke")
    run.writer.flush()
    run.unit(0, 0, attempt=2)
    run.end_task(0)

    found = json.loads(invoke("status", run.directory, "--json").stdout)

    assert (found["tasks"][0]["done"], found["tasks"][0]["failed"]) == (1, 0)
    assert found["failures"] == []


def test_a_task_behind_the_last_one_of_a_shorter_resume_is_still_shown(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(1, 1)
    run.unit(1, 0, State.FAILED, message="it broke")
    run.end_task(1, State.FAILED)
    run.writer.change_run(last_task=0)

    text = invoke("status", run.directory).stdout

    assert words_of(row(text, "1 Segment"))[2] == "failed"
    assert words_of(row(text, "0 Convert"))[2] == "waiting"


def test_status_watches_a_run_until_it_has_ended(book: Any, watch: Any) -> None:
    run = book()
    run.begin_task(0, 1)
    key = run.start(run.submit(0, 0))

    watched = watch("status", run.directory, "--watch", on_terminal=True)
    watched.until("Running now")
    run.end(key)
    run.end_task(0)
    run.writer.end_run(State.DONE)

    assert "over plate" in watched.rest().rpartition("Running now")[2]
    assert watched.process.returncode == 0
    assert "done" in row(watched.printed.decode().rpartition("nuclei")[2], " over plate")


def test_ctrl_c_leaves_a_watched_status_quietly(book: Any, watch: Any) -> None:
    run = book()
    watched = watch("status", run.directory, "--watch", on_terminal=True)
    watched.until("over plate")

    watched.process.send_signal(signal.SIGINT)
    watched.rest()

    assert watched.process.returncode == 0
    assert watched.errors == ""


def test_status_of_a_hundred_thousand_units_takes_less_than_half_a_second(book: Any) -> None:
    run = book()
    count = 100_000
    run.begin_task(0, count)
    for number in range(count):
        key = UnitKey(0, "par", number, 1)
        log = f"0_convert/{number // 1000:06d}/par-{number // 1000:06d}-{number:07d}-log.txt"
        run.writer.submitted(key, zarr_url=f"/plate/{number}", digest="d" * 32, log=log)
        if number < count - 10:
            run.end(key, State.DONE if number % 9999 else State.FAILED, output='{"image_list_updates": []}')
        if run.writer.due_in() <= 0:
            run.writer.flush()
    run.writer.flush()

    def seconds() -> float:
        began = time.process_time()
        with open_run(run.directory) as found:
            assert status_of(found).count(State.SUBMITTED) == 10
        return time.process_time() - began

    assert min(seconds() for _ in range(3)) < 0.5


def test_control_characters_in_names_and_messages_are_made_visible(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(0, 1)
    run.unit(0, 0, State.FAILED, message="\x1b]0;title\x07 \x9b31m")
    run.end_task(0, State.FAILED)

    text = invoke("status", run.directory).stdout

    assert "␛]0;title␇ \N{REPLACEMENT CHARACTER}31m" in text
    assert "\x1b" not in text


# logs


def test_logs_are_those_of_the_last_task_with_a_header_each(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(0, 1)
    run.unit(0, 0, text="converted\n")
    run.end_task(0)
    run.begin_task(1, 2)
    run.unit(1, 0, text="first\n")
    run.unit(1, 1, State.FAILED, text="no line end")
    run.writer.flush()

    shown = invoke("logs", run.directory)

    directory = run.directory
    assert shown.stdout == (
        f"==> 1 Segment, unit 0 (/plate/0), done, attempt 1: {directory}/1_segment/par-000000-0000000-log.txt"
        f" <==\nfirst\n"
        f"==> 1 Segment, unit 1 (/plate/1), failed, attempt 1: {directory}/1_segment/"
        f"par-000000-0000001-log.txt <==\nno line end"
    )
    assert invoke("logs", directory, "--task", "0").stdout == "converted\n"
    assert invoke("logs", directory, "--task", "1", "--unit", "0").stdout == "first\n"
    assert invoke("logs", directory, "--failed").stdout == "no line end"


def test_the_log_of_a_unit_is_that_of_its_last_attempt(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(0, 1)
    run.unit(0, 0, State.FAILED, text="once\n")
    run.writer.flush()
    run.unit(0, 0, attempt=2, text="twice\n")
    run.writer.flush()

    assert invoke("logs", run.directory, "--unit", "0").stdout == "twice\n"


def test_a_log_that_is_not_there_is_told_in_the_header(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(0, 3)
    run.unit(0, 0)
    run.submit(0, 1)
    run.writer.flush()

    text = invoke("logs", run.directory).stdout

    assert "unit 0 (/plate/0), done" in text
    assert "(there is no log: it was removed, or its Python function wrote none)" in text
    assert "(there is no log: it has not started)" in text
    assert invoke("logs", run.directory, "--failed").stderr == "No unit has failed.\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task", "3"], "has no task 3"),
        (["--task", "2"], "task 2 has not begun"),
        (["--task", "2", "--follow"], "task 2 has not begun"),
        (["--unit", "5"], "task 0 has no unit 5"),
        (["--unit", "5", "--follow"], "task 0 has no unit 5"),
        (["--unit", "0", "--failed"], "not both"),
    ],
)
def test_logs_of_what_is_not_there_are_refused(
    book: Any, invoke: Invoke, words: list[str], expected: str
) -> None:
    run = book()
    run.begin_task(0, 1)
    run.unit(0, 0, text="x")
    run.end_task(0)
    run.writer.end_run(State.DONE)

    refused = invoke("logs", run.directory, *words)

    assert refused.exit_code == 2
    assert expected in " ".join(refused.stderr.replace("│", " ").split())


def test_no_path_of_a_log_leads_out_of_the_run(book: Any, invoke: Invoke, tmp_path: Path) -> None:
    run = book()
    (tmp_path / "outside-log.txt").write_text("secret")
    (run.directory / "link").symlink_to(tmp_path)
    os.mkfifo(run.directory / "pipe")
    run.begin_task(0, 4)
    for number, log in enumerate(
        ("../outside-log.txt", str(tmp_path / "outside-log.txt"), "link/outside-log.txt", "pipe")
    ):
        run.end(run.submit(0, number, log=log))
    run.writer.flush()

    text = invoke("logs", run.directory).stdout

    assert "secret" not in text
    assert text.count("leads out of the run's directory") == 3
    assert text.count("it is not a file") == 1


def test_a_terminal_gets_no_control_characters_of_a_log(book: Any, watch: Any) -> None:
    run = book()
    run.begin_task(0, 1)
    run.unit(0, 0, text=b"\x1b[2J10 %\r20 %\r\n\xff \x9b\xc2\x9b\tend\x07")
    run.writer.flush()

    watched = watch("logs", run.directory, on_terminal=True)

    assert watched.rest().replace("\r\n", "\n") == "␛[2J10 %\n20 %\n\ufffd \ufffd\ufffd\tend␇\n"


def test_elsewhere_a_log_is_printed_as_it_is(book: Any, watch: Any) -> None:
    run = book()
    run.begin_task(0, 1)
    run.unit(0, 0, text=b"\x1b[2J10 %\r20 %\r\n\xff")
    run.writer.flush()

    assert watch("logs", run.directory).rest() == "\x1b[2J10 %\r20 %\r\n\ufffd"


def test_logs_follow_what_runs_and_what_starts_until_the_run_has_ended(book: Any, watch: Any) -> None:
    run = book()
    run.begin_task(0, 2)
    first = run.start(run.submit(0, 0), "begins\n")

    watched = watch("logs", run.directory, "--follow")
    watched.until("begins\n")
    run.print(first, "goes on\n")
    watched.until("goes on\n")
    second = run.start(run.submit(0, 1), "begins, too\n")
    watched.until("begins, too\n")
    run.print(first, "ends\n")
    watched.until("ends\n")
    run.end(first)
    run.end(second)
    run.end_task(0)
    run.begin_task(1, 1)
    run.unit(1, 0, text="of the next task, and quick\n")
    run.end_task(1)
    run.writer.end_run(State.DONE)

    text = watched.rest()
    assert watched.process.returncode == 0
    assert [line.split(" (")[0] for line in text.splitlines()] == [
        *("==> 0 Convert, unit 0", "begins", "goes on", "==> 0 Convert, unit 1", "begins, too"),
        *("==> 0 Convert, unit 0", "ends", "==> 1 Segment, unit 0", "of the next task, and quick"),
    ]


@pytest.mark.parametrize("words", [["--task", "0"], ["--unit", "0"]])
def test_following_ends_with_the_task_or_the_unit_that_was_asked_for(
    book: Any, watch: Any, words: list[str]
) -> None:
    run = book()
    run.begin_task(0, 2)
    key = run.start(run.submit(0, 0), "begins\n")

    watched = watch("logs", run.directory, "--follow", *words)
    watched.until("begins\n")
    run.print(key, "ends\n")
    run.end(key)
    if "--task" in words:
        run.end_task(0)
    else:
        run.writer.flush()

    assert watched.rest().endswith("begins\nends\n")
    assert watched.process.returncode == 0


def test_following_failures_shows_them_as_they_come(book: Any, watch: Any) -> None:
    run = book()
    run.begin_task(0, 3)
    run.unit(0, 0, text="fine\n")
    run.unit(0, 1, State.FAILED, text="broken\n")
    run.writer.flush()

    watched = watch("logs", run.directory, "--follow", "--failed")
    watched.until("broken\n")
    run.unit(0, 2, State.FAILED, text="broken, too\n")
    run.writer.flush()
    watched.until("broken, too\n")
    run.end_task(0, State.FAILED)
    run.writer.end_run(State.FAILED)

    assert "fine" not in watched.rest()


def test_ctrl_c_leaves_followed_logs_quietly(book: Any, watch: Any) -> None:
    run = book()
    run.begin_task(0, 1)
    run.start(run.submit(0, 0), "begins\n")
    watched = watch("logs", run.directory, "--follow")
    watched.until("begins\n")

    watched.process.send_signal(signal.SIGINT)
    watched.rest()

    assert watched.process.returncode == 0
    assert watched.errors == ""


# list


def test_list_shows_a_line_for_each_run_the_latest_first(book: Any, invoke: Invoke, tmp_path: Path) -> None:
    parent = tmp_path / "fractal_runs"
    first = book(parent / "first")
    first.begin_task(0, 0)
    first.end_task(0)
    first.writer.end_run(State.FAILED, "it broke\nin detail")
    second = book(parent / "second")
    second.owned_by(pid=dead_pid())
    (parent / "no-run").mkdir()

    shown = invoke("list")

    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert len(lines) == 3
    assert words_of(lines[1])[:5] == ["fractal_runs/second", "interrupted", "nuclei", "plate", "0/3"]
    assert words_of(lines[2])[:5] == ["fractal_runs/first", "failed", "nuclei", "plate", "1/3"]
    assert lines[2].rstrip().endswith("it broke")
    assert len(invoke("list", parent).stdout.splitlines()) == 3
    assert len(invoke("list", parent / "first").stdout.splitlines()) == 2


def test_a_damaged_history_does_not_hide_the_others(book: Any, invoke: Invoke, tmp_path: Path) -> None:
    book(tmp_path / "runs" / "sound").close()
    book(tmp_path / "runs" / "damaged").close()
    (tmp_path / "runs" / "damaged" / "history.sqlite").write_bytes(b"nonsense" * 1000)
    (tmp_path / "runs" / "told wrongly").mkdir()
    (tmp_path / "runs" / "told wrongly" / "run.json").write_text("{")

    shown = invoke("list", "runs")

    assert shown.exit_code == 0
    assert "runs/sound" in shown.stdout.splitlines()[1]
    assert "damaged one (a copy from a backup may replace it)" in row(shown.stdout, "runs/damaged")
    assert "does not say which run this is" in row(shown.stdout, "runs/told wrongly")


def test_list_with_a_database_shows_all_of_its_runs(book: Any, invoke: Invoke, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/all.sqlite"
    for number in range(3):
        book(tmp_path / f"run {number}", url=url, run_id=str(number) * 32).writer.end_run(State.DONE)

    shown = invoke("list", "--db", url)

    assert [line[: len(str(tmp_path)) + 6] for line in shown.stdout.splitlines()[1:]] == [
        f"{tmp_path}/run {number}" for number in (2, 1, 0)
    ]


@pytest.mark.parametrize("words", [[], ["nowhere"], ["."]])
def test_list_of_nothing_exits_with_2(invoke: Invoke, words: list[str]) -> None:
    shown = invoke("list", *words)

    assert shown.exit_code == 2
    assert "there is no run in" in shown.stderr


# clean


def test_clean_drops_the_files_of_successes_and_keeps_those_of_failures(book: Any, invoke: Invoke) -> None:
    run = book()
    run.begin_task(0, 1)
    alone = run.unit(0, 0, text="12345678")
    run.end_task(0)
    run.begin_task(1, 3)
    again = [run.unit(1, 0, State.FAILED, text="x")]
    run.writer.flush()
    again.append(run.unit(1, 0, attempt=2, text="x"))
    failed = run.unit(1, 1, State.FAILED, text="x")
    cancelled = run.unit(1, 2, State.CANCELLED, text="x")
    run.path_of(failed, "-notes.txt").touch()
    run.end_task(1, State.FAILED)
    run.writer.end_run(State.FAILED)

    told = invoke("clean", run.directory, "--dry-run")
    assert told.stdout == "9 file(s) would be removed, 22 B\n"
    assert run.path_of(alone, "-log.txt").exists()
    cleaned = invoke("clean", run.directory)

    assert (cleaned.exit_code, cleaned.stdout) == (0, "9 file(s) removed, 22 B\n")
    assert not (run.directory / "0_convert").exists()
    assert not any(run.path_of(key, ending).exists() for key in (alone, *again) for ending in FILES)
    assert all(run.path_of(key, ending).exists() for key in (failed, cancelled) for ending in FILES)
    assert run.path_of(failed, "-notes.txt").exists()
    assert invoke("clean", run.directory).stdout == "0 file(s) removed, 0 B\n"
    assert json.loads(invoke("status", run.directory, "--json").stdout)["tasks"][1]["done"] == 1


def test_clean_removes_nothing_outside_of_the_run(book: Any, invoke: Invoke, tmp_path: Path) -> None:
    run = book()
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("par-log.txt", "par-args.json", "kept.txt"):
        (outside / name).write_text("x")
    (run.directory / "link").symlink_to(outside)
    (run.directory / "0_convert").mkdir()
    (run.directory / "0_convert" / "par-log.txt").symlink_to(outside / "kept.txt")
    run.begin_task(0, 5)
    logs = ("link/par-log.txt", "../outside/par-log.txt", f"{outside}/par-log.txt", "0_convert/par-log.txt")
    for number, log in enumerate((*logs, "run.json")):
        run.end(run.submit(0, number, log=log))
    run.end_task(0)
    run.writer.end_run(State.DONE)

    assert invoke("clean", run.directory).stdout == "0 file(s) removed, 0 B\n"
    assert sorted(path.name for path in outside.iterdir()) == ["kept.txt", "par-args.json", "par-log.txt"]
    assert (run.directory / "0_convert" / "par-log.txt").is_symlink()
    assert (run.directory / "run.json").exists()


def test_a_run_that_goes_on_is_not_cleaned(book: Any) -> None:
    run = book()
    run.begin_task(0, 1)
    key = run.unit(0, 0, text="x")
    run.end_task(0)
    lock = DirectoryLock(run.directory)

    refused = cli("clean", run.directory)
    lock.release()
    # On another host the lock may not have been seen.
    run.owned_by(host="elsewhere", heartbeat=time.time())
    refused_again = cli("clean", run.directory)

    for answer in (refused, refused_again):
        assert answer.returncode == 3
        assert "is in use: process" in answer.stderr
        assert "Traceback" not in answer.stderr
    assert run.path_of(key, "-log.txt").exists()


# cancel

_COORDINATOR = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_history_commands import Book
from fractal_runner.history.directory import DirectoryLock
from fractal_runner.history.schema import State

directory, end = Path(sys.argv[1]), sys.argv[2]
directory.mkdir()
lock = DirectoryLock(directory)
run = Book(directory)
print("at work", flush=True)
while not (directory / "shutdown").exists():
    time.sleep(0.01)
if end == "gone":
    os._exit(1)
if end == "deaf":
    sys.stdin.read()
run.writer.end_run(State(end) if end != "deaf" else State.DONE, "It was told to stop.\\nAnd did.")
run.close()
lock.release()
"""


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A process at work on a run, which ends it in some way when it is asked to; the run's directory."""
    started: list[subprocess.Popen[str]] = []

    def start(end: str) -> Path:
        script = tmp_path / "coordinator.py"
        script.write_text(textwrap.dedent(_COORDINATOR).format(tests=str(Path(__file__).parent)))
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "run"), end],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        return tmp_path / "run"

    yield start
    for process in started:
        process.communicate(timeout=DEADLINE_S)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("cancelled", "The run was cancelled after"),
        ("failed", "It was told to stop."),
        ("done", "it is done"),
        ("gone", "without recording an end"),
    ],
)
def test_cancel_waits_for_the_end_and_says_how_it_was(
    coordinator: Callable[[str], Path], invoke: Invoke, end: str, expected: str
) -> None:
    directory = coordinator(end)

    cancelled = invoke("cancel", directory, "--timeout", DEADLINE_S)

    assert cancelled.exit_code == 0, cancelled.stderr
    assert "was asked to end the run" in cancelled.stderr
    assert expected in cancelled.stderr
    assert (f"fractal-runner resume {directory}" in cancelled.stderr) == (end != "done")


def test_cancel_does_not_wait_for_ever(coordinator: Callable[[str], Path], invoke: Invoke) -> None:
    directory = coordinator("deaf")

    cancelled = invoke("cancel", directory, "--timeout", "0.5")

    assert cancelled.exit_code == 3
    assert "has not ended within 0.5 s" in cancelled.stderr
    assert (directory / "shutdown").exists()


def test_cancel_reaches_a_coordinator_on_another_host(book: Any, invoke: Invoke) -> None:
    run = book()
    run.owned_by(host="elsewhere", heartbeat=time.time())

    cancelled = invoke("cancel", run.directory, "--timeout", "0")

    assert cancelled.exit_code == 3
    assert (run.directory / "shutdown").exists()


def test_cancel_asks_again_if_its_request_was_taken_away_by_a_resume_that_began(book: Any) -> None:
    run = book()
    request = run.directory / "shutdown"
    seen: list[bool] = []

    def meanwhile(_: float) -> None:
        seen.append(request.exists())
        if len(seen) == 1:
            request.unlink()
        else:
            run.writer.end_run(State.CANCELLED)

    with open_run(run.directory) as found:
        code = cancel_run(found, timeout_s=DEADLINE_S, say=print, pause=meanwhile)

    assert code == 0
    assert seen == [True, True]


def test_cancel_leaves_the_next_coordinator_alone(book: Any) -> None:
    run = book()
    said: list[str] = []

    def meanwhile(_: float) -> None:
        (run.directory / "shutdown").unlink()
        run.owned_by(epoch=2, host="elsewhere", heartbeat=time.time())

    with open_run(run.directory) as found:
        code = cancel_run(found, timeout_s=DEADLINE_S, say=said.append, pause=meanwhile)

    assert code == 0
    assert "on elsewhere has taken the run over" in said[-1]
    assert not (run.directory / "shutdown").exists()


@pytest.mark.parametrize("how", ["ended", "interrupted", "silent"])
def test_where_nobody_is_at_work_only_what_is_left_is_told_to_end(
    book: Any, invoke: Invoke, how: str
) -> None:
    run = book()
    if how == "ended":
        run.writer.end_run(State.DONE)
    elif how == "interrupted":
        run.owned_by(pid=dead_pid())
    else:
        run.owned_by(host="elsewhere", heartbeat=time.time() - 100)

    refused = invoke("cancel", run.directory)

    assert refused.exit_code == 2
    assert "Nobody is at work on the run" in refused.stderr
    # What an interrupted run has left running, on a cluster, sees the file; a resume takes it away.
    assert ("is told to end" in refused.stderr) == (how != "ended")
    assert (run.directory / "shutdown").exists() == (how != "ended")


# what all of them share


def _no_directory(run: Book) -> None:
    shutil.rmtree(run.directory)


def _no_run(run: Book) -> None:
    for path in run.directory.iterdir():
        path.unlink()


def _no_history(run: Book) -> None:
    (run.directory / "history.sqlite").unlink()


def _damaged(run: Book) -> None:
    (run.directory / "history.sqlite").write_bytes(b"nonsense" * 1000)


def _newer(run: Book) -> None:
    with sqlite3.connect(run.directory / "history.sqlite") as connection:
        connection.execute("UPDATE fractal_runner_history SET version = 99")
    connection.close()


def _another_run(run: Book) -> None:
    (run.directory / "run.json").write_text(RunFile("b" * 32, None).text())


def _no_such_driver(run: Book) -> None:
    (run.directory / "run.json").write_text(RunFile("b" * 32, "oracel://x/y").text())


@pytest.mark.parametrize(
    ("spoil", "command", "expected"),
    [
        (_no_directory, "status", "does not exist"),
        (_no_run, "logs", "holds no run: there is no run.json in it"),
        (_no_history, "clean", "There is no history"),
        (_damaged, "status", "a damaged one"),
        (_newer, "cancel", "is a history of version 99"),
        (_another_run, "status", "does not know the run bbbb"),
        (_no_such_driver, "status", "is not the URL of a database"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_one_line(
    book: Any, spoil: Callable[[Book], None], command: str, expected: str
) -> None:
    run = book()
    run.writer.end_run(State.DONE)
    run.close()
    spoil(run)

    answer = cli(command, run.directory)

    assert answer.returncode == 2
    assert answer.stdout == ""
    (line,) = answer.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_another_url_takes_the_place_of_the_recorded_one(
    book: Any, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = book(url=f"sqlite:///{tmp_path}/somewhere.sqlite")
    run.writer.end_run(State.DONE)
    run.close()
    (tmp_path / "somewhere.sqlite").rename(tmp_path / "elsewhere.sqlite")

    given = invoke("status", run.directory, "--db", f"sqlite:///{tmp_path}/elsewhere.sqlite")
    monkeypatch.setenv("FRACTAL_RUNNER_DB", f"sqlite:///{tmp_path}/elsewhere.sqlite")
    from_environment = invoke("status", run.directory)

    assert given.stdout == from_environment.stdout
    assert given.stdout.startswith("nuclei over plate: done\n")


def test_a_run_whose_coordinator_died_at_its_very_beginning_is_found(book: Any, invoke: Invoke) -> None:
    run = book()
    (run.directory / "run.json").unlink()

    assert invoke("status", run.directory).stdout.startswith("nuclei over plate: running\n")
