"""How fork servers end: crashes and what they cost, their owner's death, the end of a task and of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal_runner.worker import processes, warm
from fractal_runner.worker.command import run_unit
from fractal_runner.worker.spec import COLD, SERVER_LOST, WARM
from tests.worker.pairs import Bench, until
from tests.worker.site import DEADLINE_S, Background, Site, Worker, ways, well


@pytest.fixture
def site(bench: Bench, spec: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(bench, spec, monkeypatch) as site:
        yield site


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not processes.is_running(pid))


def test_a_server_that_is_killed_costs_its_running_units_and_no_others(site: Site, tmp_path: Path) -> None:
    words = site.waiting()
    lost = [site.spec(words) for _ in range(3)]
    elsewhere = site.spec(words)
    with Background() as background:
        futures = [background.run(unit) for unit in lost]
        pids = [site.pid_of(unit) for unit in lost]
        worker = Worker(tmp_path, elsewhere)
        pids.append(site.pid_of(elsewhere))
        before = site.server
        kill(before.pid)
        results = [*(future.result(DEADLINE_S) for future in futures), *worker.results()]

        assert {result.reason for result in results} == {SERVER_LOST}
        assert {(result.returncode, result.start) for result in results} == {(None, WARM)}
        assert not any(map(processes.is_running, pids))
        site.go()
        assert not any(map(site.has_gone_on, [*lost, elsewhere]))
        following = background.run_all([site.spec(words) for _ in range(8)])

    assert well(following)
    assert ways(following) == [WARM]
    assert site.imports == [before.pid, site.server.pid]


def test_what_a_lost_unit_has_started_is_ended_too(site: Site) -> None:
    words = site.bench.script(
        """
        import os, subprocess, sys, time
        if __name__ == "__main__":
            child = subprocess.Popen(["sleep", "300"], start_new_session=True)
            with open("child~", "w") as file:
                file.write(str(child.pid))
            os.rename("child~", "child")
            time.sleep(300)
        """
    )
    with Background() as background:
        running = background.run(site.spec(words))
        until((site.bench.folder / "child").exists)
        child = int((site.bench.folder / "child").read_text())
        kill(site.server.pid)

        assert running.result(DEADLINE_S).reason == SERVER_LOST
    assert not processes.is_running(child)


def test_after_the_third_crash_units_start_cold(site: Site, tmp_path: Path) -> None:
    words = site.quick()
    servers = []
    for _ in range(3):
        assert run_unit(site.spec(words)).start == WARM
        servers.append(site.server.pid)
        kill(servers[-1])
    results = [run_unit(site.spec(words)) for _ in range(2)]
    results += Worker(tmp_path, site.spec(words)).results()

    assert well(results)
    assert {(result.start, result.why_cold) for result in results} == {
        (COLD, "Its fork server has crashed 3 times.")
    }
    assert len(set(servers)) == 3
    assert site.links == []
    assert run_unit(site.spec(site.quick("other.py"))).start == WARM


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ends=st.lists(st.sampled_from(["crash", "retire", "end", "change", "other worker"]), max_size=8))
def test_only_crashes_are_counted(
    site: Site, tmp_path_factory: pytest.TempPathFactory, ends: list[str]
) -> None:
    words = site.quick()
    crashes = changes = 0
    try:
        for number, end in enumerate(ends):
            expected = COLD if crashes > 2 or changes > 3 else WARM
            if end == "other worker":
                [result] = Worker(tmp_path_factory.mktemp("worker"), site.spec(words)).results()
            else:
                result = run_unit(site.spec(words))
            assert (result.returncode, result.start) == (0, expected), (number, result)
            if expected == COLD:
                continue
            server = site.server
            if end == "crash":
                crashes += 1
                kill(server.pid)
            elif end in ("retire", "end"):
                warm.ask(server.socket, end)  # type: ignore[arg-type]
            elif end == "change":
                changes += 1
                site.quick(more=f"# {number}")
    finally:
        site.station.end_servers()


def test_one_that_is_idle_ends_and_that_is_no_crash(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractal_runner.worker.station.IDLE_S", 0.1)
    words = site.quick()
    for _ in range(5):
        assert run_unit(site.spec(words)).start == WARM
        server = site.server
        until(lambda server=server: not server.lives())

    assert len(site.imports) == 5


def test_a_changed_script_has_a_new_server_while_units_of_the_old_one_run(site: Site) -> None:
    words = site.waiting()
    old = site.spec(words)
    with Background() as background:
        running = background.run(old)
        site.pid_of(old)
        before = site.server
        site.bench.write("waiting.py", "import heavy\nprint('changed')\n")
        changed = site.spec(words)
        result = run_unit(changed)

        assert (result.returncode, result.start) == (0, WARM)
        assert Path(changed.log_file).read_text() == "changed\n"
        assert site.server != before
        site.go()
        assert well([running.result(DEADLINE_S)])
    until(lambda: not before.lives())


def test_who_starts_a_server_is_killed_and_others_go_on(site: Site, tmp_path: Path) -> None:
    words = site.quick()
    site.slow(2)
    first = Worker(tmp_path, site.spec(words))
    until(lambda: site.imports)
    with Background() as background:
        running = [background.run(site.spec(words)) for _ in range(4)]
        first.kill()
        results = [future.result(DEADLINE_S) for future in running]

    assert well(results)
    assert ways(results) == [WARM]
    assert len(site.imports) == 2
    until(lambda: site.left() == [site.server.pid])


def test_a_server_that_nobody_waits_for_any_more_does_not_go_on_importing(site: Site, tmp_path: Path) -> None:
    site.slow(600)
    starting = Worker(tmp_path, site.spec(site.quick(), terms={"timeout_s": 900.0}))
    until(lambda: site.imports)
    starting.kill()

    until(lambda: site.left() == [])


def test_servers_end_when_they_are_told_and_nothing_is_left(site: Site) -> None:
    for name in ("a.py", "b.py", "c.py"):
        assert run_unit(site.spec(site.quick(name))).start == WARM
    site.station.end_servers()

    assert site.links == []
    until(lambda: site.left() == [])
    assert site.files() == [site.base.joinpath(site.station.directory).name + end for end in ("", "/lock")]
    site.station.end_servers()
    site.station.remove()
    assert site.files() == []
    site.station.remove()
    site.station.end_servers()
    assert site.files() == []


def test_after_their_end_units_have_new_ones(site: Site, tmp_path: Path) -> None:
    words = site.quick()
    pids = []
    for end in (site.station.end_servers, site.station.remove, site.station.end_servers):
        assert run_unit(site.spec(words)).start == WARM
        pids.append(site.server.pid)
        end()
    assert [result.start for result in Worker(tmp_path, site.spec(words)).results()] == [WARM]
    assert len({*pids, site.server.pid}) == 4


def test_a_worker_that_knows_an_ended_server_finds_the_new_one(site: Site, tmp_path: Path) -> None:
    words = site.quick()
    waiting = site.waiting()
    first, second = site.spec(waiting), site.spec(waiting)
    worker = Worker(tmp_path, site.spec(words), first, site.spec(words), second)
    site.pid_of(first)
    [server] = [link for link in site.links if link.pid == site.imports[0]]
    warm.ask(server.socket, "end")
    until(lambda: not server.lives())
    site.go()

    results = worker.results()
    assert well(results)
    assert ways(results) == [WARM]


@pytest.mark.parametrize("ending", ["end_servers", "remove"])
def test_a_server_that_is_stopped_ends_as_well(site: Site, ending: str) -> None:
    assert run_unit(site.spec(site.quick())).start == WARM
    os.kill(site.server.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(getattr(site.station, ending)).result(DEADLINE_S)

    until(lambda: site.left() == [])
    own = Path(site.station.directory).name
    assert site.files() == ([] if ending == "remove" else [own, f"{own}/lock"])


def test_a_server_that_does_not_answer_is_not_forgotten(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = warm._connected
    monkeypatch.setattr(warm, "_connected", lambda path, _=0, **more: connected(path, 1.0, **more))
    words = site.quick()
    assert run_unit(site.spec(words)).start == WARM
    before = site.server
    os.kill(before.pid, signal.SIGSTOP)
    assert well([run_unit(site.spec(words))])
    site.station.remove()

    until(lambda: site.left() == [])


def test_more_clients_than_a_server_can_have_waiting_are_all_served_by_it(site: Site) -> None:
    words = site.quick()
    assert run_unit(site.spec(words)).start == WARM
    server = site.server
    os.kill(server.pid, signal.SIGSTOP)  # as one that is importing what it has learned
    with Background(160) as background:
        futures = [background.run(site.spec(words)) for _ in range(160)]
        until(
            lambda: (
                len(
                    [
                        1
                        for line in Path("/proc/net/unix").read_text().split("\n")
                        if line.endswith(server.socket)
                    ]
                )
                > 128
            )
        )
        time.sleep(1)
        os.kill(server.pid, signal.SIGCONT)
        results = [future.result(2 * DEADLINE_S) for future in futures]

    assert well(results)
    assert ways(results) == [WARM]
    assert site.imports == [server.pid]


def test_modules_that_are_tried_end_with_their_server(site: Site) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "env"], check=True, timeout=DEADLINE_S)
    site.bench.python = str(site.bench.folder / "env" / "bin" / "python")
    (packages,) = (site.bench.folder / "env" / "lib").glob("python*/site-packages")
    (packages / "lazy.py").write_text("import sys, time\n'--args-json' in sys.argv or time.sleep(300)\n")
    words = site.bench.script("def main():\n    import lazy\nif __name__ == '__main__':\n    main()\n")
    assert run_unit(site.spec(words, terms={"timeout_s": 600.0})).start == WARM
    until(lambda: len(site.left()) == 2)
    site.station.end_servers()

    until(lambda: site.left() == [])
