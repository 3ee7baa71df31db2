"""Sessions: each executor is made once, when it is first asked for; all are shut down, whatever happens."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Dataset,
    Image,
    InputFileError,
    Session,
    Task,
    ThreadExecutor,
    UnitFinished,
    Workflow,
    WorkflowTask,
    current_context,
    process_workflow,
    register,
    session,
)
from fractal_runner.executors import factories, plugins, sessions
from fractal_runner.testing import PATIENCE_S
from tests.executors.batch import standin
from tests.executors.batch.standin import StandIn


class Noted(ThreadPoolExecutor):
    """Keeps note of its life.

    Attributes:
        story: what has happened to any of them.
    """

    story: list[str] = []  # noqa: RUF012 - emptied by the tests

    def __init__(self, *, label: str = "a", needs: str | None = None, fails: str | None = None) -> None:
        super().__init__(2)
        self.label, self._needs, self._fails = label, needs, fails
        if fails == "make":
            raise OSError("no room")
        self.story.append(f"make {label}")

    def start(self, session: Session) -> None:
        if self._needs is not None:
            session[self._needs].submit(abs, -1).result(PATIENCE_S)
        if self._fails == "start":
            raise OSError("no answer")
        self.story.append(f"start {self.label}")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        self.story.append(f"end {self.label}")
        if self._fails == "end":
            raise OSError("will not go")
        if self._fails == "ctrl-c":
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory without a configuration, where "a", "b" and "c" are registered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setattr(Noted, "story", [])
    monkeypatch.setitem(factories._PLACES, "batch", standin.PLACE)
    monkeypatch.setattr(StandIn, "made", [])
    for name in "abc":
        register(name, lambda *, label=name, **more: Noted(label=label, **more))
    yield tmp_path
    assert sessions.current() is None


def configure(text: str) -> None:
    Path(".fractal-runner").mkdir(exist_ok=True)
    Path(".fractal-runner/config.yaml").write_text(text)


def note(*, zarr_url: str) -> dict[str, Any]:
    return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"thread": threading.get_ident()}}]}


async def run(name: str = "r", *, meta: dict[str, Any] | None = None, **more: Any) -> Dataset:
    """One task over two images, in the directory of this name."""
    task = WorkflowTask(task=Task(name="F", function_parallel=note), meta_parallel=meta or {})
    return await process_workflow(
        workflow=Workflow(name="w", task_list=[task]),
        dataset=Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url=f"/z/{one}") for one in range(2)]),
        workflow_dir_local=name,
        **more,
    )


# The life of its executors


def test_executors_are_made_on_first_use_once_and_shut_down_in_reverse_order() -> None:
    with session() as s:
        assert Noted.story == []
        assert s["b"].submit(abs, -2).result(PATIENCE_S) == 2
        assert s["a"] is s["a"]
        assert s["thread"].submit(abs, -3).result(PATIENCE_S) == 3
        assert s.names() == ["b", "a", "thread"]

    assert Noted.story == ["make b", "start b", "make a", "start a", "end a", "end b"]
    with pytest.raises(RuntimeError, match="the session has ended: it gives no executor 'a' any more"):
        s["a"]


def test_many_threads_that_ask_at_once_get_the_same_one() -> None:
    barrier = threading.Barrier(8)

    def ask(s: Session) -> Executor:
        barrier.wait(PATIENCE_S)
        return s["a"]

    with ThreadPoolExecutor(8) as threads, session(a={"needs": "b"}) as s:
        found = {future.result(PATIENCE_S) for future in [threads.submit(ask, s) for _ in range(8)]}

    assert len(found) == 1
    assert Noted.story.count("make a") == Noted.story.count("start a") == 1


def test_what_an_executor_takes_from_the_session_at_its_start_outlives_it() -> None:
    with session(a={"needs": "b"}, b={"needs": "c"}) as s:
        s["a"].submit(abs, 1)

    assert [word for word in Noted.story if word.startswith("end")] == ["end a", "end b", "end c"]


def test_executors_that_need_each_other_are_told_apart() -> None:
    with session(a={"needs": "b"}, b={"needs": "a"}) as s, pytest.raises(RuntimeError) as caught:
        s["a"]

    assert "the executor 'a' cannot be started: its own start asks for it (a → b → a)" in str(caught.value)


@pytest.mark.parametrize("when", ["make", "start"])
def test_what_could_not_be_made_is_tried_again_when_it_is_asked_for_again(when: str) -> None:
    with session(a={"fails": when}) as s:
        for _ in range(2):
            with pytest.raises(OSError, match=r"no (room|answer)"):
                s["a"]
        assert s.names() == []

    assert Noted.story.count("end a") == (2 if when == "start" else 0)


def test_a_failing_shutdown_is_logged_and_hides_neither_the_error_nor_the_other_shutdowns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(LookupError, match="the body's own"), session(b={"fails": "end"}) as s:
        for name in "abc":
            s[name].submit(abs, 1)
        raise LookupError("the body's own")

    assert Noted.story[-3:] == ["end c", "end b", "end a"]
    [record] = caplog.records
    assert (record.name, record.levelno) == ("fractal_runner", logging.ERROR)
    assert record.getMessage() == "the executor 'b' could not be shut down"
    assert "will not go" in str(record.exc_info and record.exc_info[1])


def test_a_failing_shutdown_alone_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with session(a={"fails": "end"}) as s:
        s["a"].submit(abs, 1)

    assert len(caplog.records) == 1


def test_ctrl_c_in_a_shutdown_comes_out_after_the_other_shutdowns() -> None:
    with pytest.raises(KeyboardInterrupt), session(b={"fails": "ctrl-c"}) as s:
        for name in "ab":
            s[name].submit(abs, 1)

    assert Noted.story[-2:] == ["end b", "end a"]


def test_ctrl_c_in_the_body_cancels_what_has_not_started() -> None:
    gate = threading.Event()
    futures: list[Future[Any]] = []

    with pytest.raises(KeyboardInterrupt), session(thread={"max_workers": 1}) as s:
        futures += [s["thread"].submit(gate.wait, PATIENCE_S) for _ in range(3)]
        while not futures[0].running():
            time.sleep(0.001)  # until a thread has taken it
        threading.Timer(0.2, gate.set).start()
        raise KeyboardInterrupt

    assert [future.cancelled() for future in futures] == [False, True, True]


# Its configuration


def test_a_session_is_opened_once() -> None:
    opened = session()
    with opened:
        with pytest.raises(RuntimeError, match="is open already: use it as it is"), opened:
            pass
        assert sessions.current() is opened  # still, and its executors are there
        assert opened["a"].submit(abs, -1).result(PATIENCE_S) == 1
    assert sessions.current() is None
    with pytest.raises(RuntimeError, match="the session has ended: open a new one"), opened:
        pass


def test_an_executor_whose_start_ends_the_session_is_shut_down() -> None:
    class Ender(Noted):
        def start(self, session: Session) -> None:
            session.close()

    register("ender", Ender)
    with (
        session() as opened,
        pytest.raises(RuntimeError, match="the start of the executor 'ender' has ended"),
    ):
        opened["ender"]
    assert Noted.story == ["make a", "end a"]


def test_overrides_count_over_the_configuration() -> None:
    configure("executor: process\nthread: {max_workers: 2}\nbatch: {partition: main}\ndefaults: {cpus: 2}\n")

    with session(executor="thread", batch={"max_workers": 3}, defaults={"memory": "1G"}) as s:
        batch = s["batch"]
        assert s.config.executor == "thread"
        assert dict(s.config.defaults) == {"cpus": 2, "memory": "1G"}
        assert isinstance(batch, StandIn)
        assert (batch.partition, batch.max_workers) == ("main", 3)
        assert batch.folder == str(Path.cwd() / "fractal_jobs" / "batch")
        assert s["thread"].max_workers == 2  # type: ignore[attr-defined]


def test_what_only_python_can_say_may_be_given_to_a_session() -> None:
    with session(thread={"context": {"answer": 42}}) as s:
        assert s["thread"].submit(lambda: current_context()["answer"]).result(PATIENCE_S) == 42


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        ({"thrad": {}}, ValueError, "unknown executor 'thrad': did you mean 'thread'"),
        ({"thread": {"max_worker": 1}}, ValueError, "unknown option 'max_worker' of executor 'thread'"),
        ({"thread": 4}, TypeError, r"session\(thread=4\): a mapping of its constructor's arguments"),
        ({"executor": "thrad"}, InputFileError, "Python: executor: .*did you mean 'thread'"),
        ({"defaults": {"cpu": 1}}, InputFileError, "Python: defaults.cpu: unknown key"),
        ({"defaults": {"memory": object()}}, InputFileError, "is nothing that a configuration can say"),
        ({"resource_classes": {"x": {"memory": "4X"}}}, InputFileError, "'4X' is not a size"),
    ],
)
def test_a_wrong_override_is_told_at_once(overrides: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        session(**overrides)


def test_a_mistake_in_a_file_is_told_before_anything_is_made() -> None:
    configure("thread: {max_worker: 1}\n")

    with pytest.raises(InputFileError, match=r"config.yaml:1: thread.max_worker: unknown key"):
        session()


# Runs in it


async def test_a_run_takes_the_executors_of_the_open_session_and_leaves_them_open() -> None:
    with session(executor="a") as s:
        await run("r")
        await run("s")
        await run("t", executor="b", meta={"executor": "a"})
        assert Noted.story == ["make a", "start a", "make b", "start b"]
        assert s["a"].submit(abs, -1).result(PATIENCE_S) == 1

    assert Noted.story[4:] == ["end b", "end a"]


async def test_a_run_with_options_of_its_own_makes_its_own() -> None:
    with session(executor="a"):
        await run("r", executor=("a", {"label": "own"}))
        await run("s")

    assert Noted.story == [
        *("make own", "start own", "end own"),
        *("make a", "start a", "end a"),
    ]


async def test_without_a_session_each_run_makes_and_ends_its_own() -> None:
    await run("r", executor="a")
    await run("s", executor="a")

    assert Noted.story == ["make a", "start a", "end a"] * 2


async def test_an_instance_counts_in_a_session_too() -> None:
    with ThreadExecutor(1) as executor, session(executor="a"):
        await run("r", executor=executor)

    assert Noted.story == []


async def test_a_session_that_has_ended_is_not_taken() -> None:
    with session(executor="a") as s:
        s.close()
        await run("r")

    assert Noted.story == []


async def test_the_inner_session_counts_until_it_ends() -> None:
    with session(executor="a", a={"label": "outer"}):
        with session(executor="a", a={"label": "inner"}):
            await run("r")
        await run("s")

    assert [word for word in Noted.story if word.startswith("make")] == ["make inner", "make outer"]


async def test_the_history_has_what_a_resume_needs_to_find_the_calls_of_the_session() -> None:
    with session(executor="batch", batch={"max_workers": 3}):
        await run("r")

    with sqlite3.connect("r/history.sqlite", timeout=30) as database:
        [(text,)] = database.execute("select executor from fractal_runner_runs").fetchall()
    database.close()
    folder = str(Path.cwd() / "fractal_jobs" / "batch")
    assert json.loads(text) == ["batch", {"folder": folder, "max_workers": 3}]


async def test_two_runs_at_a_time_share_the_sessions_executor() -> None:
    finished: list[str] = []

    def tell(name: str) -> Any:
        return lambda event: isinstance(event, UnitFinished) and finished.append(name)

    with session(executor="a"):
        await asyncio.gather(*(run(name, on_event=tell(name)) for name in "xyz"))

    assert sorted(finished) == sorted("xyz" * 2)
    assert Noted.story == ["make a", "start a", "end a"]


async def test_a_cancelled_run_leaves_the_session_usable() -> None:
    with session(executor="thread", thread={"max_workers": 1}) as s:
        running = asyncio.ensure_future(run("r"))
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        done, _ = wait([s["thread"].submit(abs, -1)], timeout=PATIENCE_S)
        assert [future.result() for future in done] == [1]
