"""What becomes of units that start warm: limits, requests to stop, what they leave, and dying workers."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import ForkExecutor, JobExecutionError, ProcessExecutor, SpawnExecutor
from fractal_runner.worker import processes, warm
from fractal_runner.worker.command import LOG_TAIL_CHARS, _environment, run_unit
from fractal_runner.worker.evidence import read_ledger
from fractal_runner.worker.spec import CANCELLED, COLD, LAUNCH_FAILED, TIMEOUT, WARM, UnitResult, UnitSpec
from tests.worker.pairs import Bench, until
from tests.worker.site import DEADLINE_S, Background, Site, Worker, name_of, well


@pytest.fixture
def site(bench: Bench, spec: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(bench, spec, monkeypatch) as site:
        yield site


def both(site: Site, words: list[str], **more: Any) -> tuple[UnitResult, UnitResult]:
    """Such a unit, warm and cold, one after the other."""
    found = run_unit(site.spec(words, **more)), run_unit(site.spec(words, warm=None, **more))
    assert (found[0].start, found[1].start) == (WARM, COLD)
    return found


def records(unit: UnitSpec) -> list[dict[str, Any]]:
    """What the workers have written of a unit, in order."""
    return [
        record
        for path in Path(unit.run_dir, "evidence").iterdir()
        for record in read_ledger(path)
        if record.get("key") == unit.key
    ]


ENDS = {
    "well": "",
    "output": "import json\njson.dump({'a': [1, 'é']}, open(sys.argv[-1], 'w'))",
    "broken output": "open(sys.argv[-1], 'w').write('{')",
    "a code": "print('said')\nsys.exit(3)",
    "a text": "sys.exit('a text')",
    "a signal": "print('x', flush=True)\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "a long log": "print('line\\n' * 50_000)\nsys.exit(1)",
    "an error": "1 / 0",
    "no log": "import os\nos.unlink(sys.argv[-1].replace('-metadiff.json', '-log.txt'))\nsys.exit(4)",
}


@pytest.mark.parametrize("body", ENDS.values(), ids=ENDS)
def test_the_result_is_that_of_a_cold_unit(site: Site, body: str) -> None:
    words = site.bench.script(
        "import sys\nif __name__ == '__main__':\n" + textwrap.indent(body or "pass", "    ")
    )
    forked, cold = both(site, words)

    def told(result: UnitResult) -> UnitResult:
        """But for what differs between any two units."""
        return replace(
            result,
            **dict.fromkeys(("key", "pid", "started", "ended", "cpu_s", "peak_bytes", "start")),
            output_error=(result.output_error or "")[-40:],
        )

    assert told(forked) == told(cold)
    assert len(forked.log_tail) <= LOG_TAIL_CHARS
    assert forked.cpu_s is not None
    assert forked.started is not None
    assert forked.ended is not None
    assert forked.started <= forked.ended


@pytest.mark.parametrize("is_warm", [True, False])
def test_start_process_and_end_are_recorded(site: Site, is_warm: bool) -> None:
    words = site.waiting()
    unit = site.spec(words) if is_warm else site.spec(words, warm=None)
    with Background() as background:
        running = background.run(unit)
        pid = site.pid_of(unit)
        until(lambda: len(records(unit)) == 2)
        ticks = processes.start_ticks(pid)
        start, process = records(unit)
        site.go()
        result = running.result(DEADLINE_S)

    assert well([result])
    assert (start["kind"], process["kind"], process["pid"]) == ("start", "process", pid)
    assert process["start_ticks"][0] <= ticks <= process["start_ticks"][1]
    assert records(unit)[2]["result"]["start"] == (WARM if is_warm else COLD)
    assert result.pid == pid


@pytest.mark.parametrize(("grace_s", "code"), [(20.0, 7), (0.2, -signal.SIGKILL), (0.0, -signal.SIGKILL)])
@pytest.mark.parametrize("how", [TIMEOUT, CANCELLED])
def test_a_unit_that_is_ended_has_its_time_of_grace(site: Site, grace_s: float, code: int, how: str) -> None:
    words = site.bench.script(
        f"""
        import os, signal, subprocess, sys, time
        def late(*_):
            time.sleep(0 if {grace_s} > 1 else 60)
            print("cleaned up", flush=True)
            sys.exit(7)
        if __name__ == "__main__":
            signal.signal(signal.SIGTERM, late)
            child = subprocess.Popen(["sleep", "300"], start_new_session=True)
            print(child.pid, flush=True)
            open("up", "w").close()
            while True:
                time.sleep(0.01)
        """
    )
    unit = site.spec(words, grace_s=grace_s, timeout_s=3.0 if how == TIMEOUT else None)
    with Background() as background:
        running = background.run(unit)
        until((site.bench.folder / "up").exists)
        if how == CANCELLED:
            Path(unit.run_dir, "shutdown").touch()
        result = running.result(DEADLINE_S)

    assert (result.reason, result.returncode, result.start) == (how, code, WARM)
    child, *said = Path(unit.log_file).read_text().split("\n")
    assert said == (["cleaned up", ""] if code == 7 else [""])
    assert not processes.is_running(int(child))
    assert site.server.lives()
    Path(unit.run_dir, "shutdown").unlink(missing_ok=True)


def test_what_a_unit_leaves_in_the_background_is_ended(site: Site) -> None:
    words = site.bench.script(
        "import subprocess\nif __name__ == '__main__':\n    print(subprocess.Popen(['sleep', '300']).pid)\n"
    )
    unit = site.spec(words)
    result = run_unit(unit)

    assert well([result])
    assert result.start == WARM
    child, note, _ = Path(unit.log_file).read_text().split("\n")
    assert "ended 1 process(es) that the command left behind" in note
    assert not processes.is_running(int(child))


def test_a_log_that_cannot_be_written_is_no_fault_of_the_task(site: Site) -> None:
    words = site.quick()
    assert run_unit(site.spec(words)).start == WARM
    unit = site.spec(words)
    Path(unit.log_file).mkdir()
    result = run_unit(unit)

    assert (result.reason, result.returncode) == (LAUNCH_FAILED, None)


def test_a_run_that_has_been_stopped_starts_nothing(site: Site) -> None:
    unit = site.spec(site.quick())
    Path(unit.run_dir, "shutdown").touch()

    assert run_unit(unit).reason == CANCELLED
    assert site.files() == []


_STRAY = """
    import subprocess
    with open(f"stray-{name}", "w") as file:
        file.write(str(subprocess.Popen(["sleep", "300"], start_new_session=True).pid))
"""


@pytest.mark.parametrize("make", [ProcessExecutor, ForkExecutor, SpawnExecutor])
@pytest.mark.parametrize("how", ["stop", "kill", "timeout"])
def test_a_worker_that_ends_takes_its_unit_along_and_no_others(site: Site, make: Any, how: str) -> None:
    words = site.waiting(first=_STRAY)
    ended, goes_on = site.spec(words), site.spec(words)
    with make(max_workers=2) as executor:
        other = executor.submit_as("other", goes_on.key, run_unit, goes_on)
        pid = site.pid_of(goes_on)
        limited = executor.options(timeout=5) if how == "timeout" else executor
        future = limited.submit_as("ended", ended.key, run_unit, ended)
        gone = [site.pid_of(ended), int((site.bench.folder / f"stray-{name_of(ended)}").read_text())]
        server = site.server
        if how == "stop":
            executor.stop(future)
        elif how == "kill":
            [worker] = [info.pid for info in executor.tasks() if info.key == ended.key]
            assert worker is not None
            os.kill(worker, signal.SIGKILL)
        with pytest.raises((JobExecutionError, TimeoutError)):
            future.result(DEADLINE_S)

        assert not any(map(processes.is_running, gone))
        assert processes.is_running(pid)
        assert site.server == server
        site.go()
        assert not site.has_gone_on(ended)
        result = other.result(DEADLINE_S)
        assert well([result])
        assert result.start == WARM


@pytest.mark.parametrize("make", [ProcessExecutor, ForkExecutor])
def test_a_call_that_is_stopped_while_it_starts_a_server_leaves_nothing(site: Site, make: Any) -> None:
    site.slow(600)
    unit = site.spec(site.quick(), terms={"timeout_s": 900.0})
    with make(max_workers=1) as executor:
        future = executor.submit_as("starting", unit.key, run_unit, unit)
        until(lambda: site.imports)
        executor.stop(future)
        with pytest.raises(JobExecutionError):
            future.result(DEADLINE_S)

    until(lambda: site.left() == [])


def test_who_asks_for_a_unit_and_is_gone_before_it_knows_of_it_has_none(site: Site) -> None:
    words = site.bench.script("import time\nif __name__ == '__main__':\n    time.sleep(300)\n")
    unit = site.spec(words, timeout_s=0.1)
    assert run_unit(unit).start == WARM
    environment = {**_environment(unit).variables, b"FRACTAL_RUNNER_UNIT": unit.key.encode()}
    parts = [b"run", os.fsencode(site.bench.folder), unit.log_file.encode(), b"%d" % len(words)]
    parts += [*map(os.fsencode, words), *(b"%s=%s" % pair for pair in environment.items())]
    payload = b"\0".join(parts)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(site.server.socket)
        assert client.recv(100) == b"hello\n"
        os.kill(site.server.pid, signal.SIGSTOP)
        client.sendall(b"%d\n%s" % (len(payload), payload))
    os.kill(site.server.pid, signal.SIGCONT)

    # It was asked for it before it is asked this.
    assert warm.ask(site.server.socket, "status")["forked"] == "1"


_INTERRUPTED = """
import os, pickle, signal, sys, threading, time
from fractal_runner.worker.command import run_unit
[spec] = pickle.load(open(sys.argv[1], "rb"))
try:
    run_unit(spec)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(600)
"""


def test_an_interrupt_ends_what_was_started(site: Site, tmp_path: Path) -> None:
    words = site.waiting()
    unit = site.spec(words)
    (tmp_path / "spec").write_bytes(pickle.dumps([unit]))
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "spec")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = site.pid_of(unit)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"interrupted\n"
        is_left = processes.is_running(pid)
        process.kill()

    assert not is_left
    assert site.server.lives()


def test_memory_and_time_are_the_units_own(site: Site) -> None:
    words = site.bench.script(
        """
        import heavy
        if __name__ == "__main__":
            block = b"x" * 150_000_000
            sum(range(3_000_000))
        """
    )
    large = b"y" * 400_000_000  # as a worker that has grown
    forked, cold = both(site, words)

    assert len(large) == 400_000_000
    for result in (forked, cold):
        assert result.cpu_s is not None
        assert 0.01 < result.cpu_s < 20
    assert forked.peak_bytes is not None
    assert 140_000_000 < forked.peak_bytes < 300_000_000


def test_results_travel(site: Site, tmp_path: Path) -> None:
    words = site.bench.script("import sys, json\njson.dump({'a': 1}, open(sys.argv[-1], 'w'))\n")
    [result] = Worker(tmp_path, site.spec(words)).results()

    assert (result.start, result.output, result.why_cold) == (WARM, {"a": 1}, "")
    assert json.dumps(result.output) == '{"a": 1}'


def test_many_units_leave_nothing_in_whoever_runs_them(site: Site) -> None:
    words = site.quick()

    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with Background(4) as background:
        background.run_all([site.spec(words) for _ in range(20)])
        before = held()
        results = background.run_all([site.spec(words) for _ in range(200)])
    assert well(results)
    assert held() <= before
    assert len(site.imports) == 1
    until(lambda: site.left() == [site.server.pid])
