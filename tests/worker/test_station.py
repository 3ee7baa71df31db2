"""Who gets which fork server: one for each command and environment, not too many, none where it cannot be."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal_runner.worker import processes
from fractal_runner.worker.command import _environment, run_unit
from fractal_runner.worker.spec import CANCELLED, COLD, WARM
from fractal_runner.worker.station import GivenUp, Station, Wanted, station_for
from fractal_runner.worker.stop import ask_to_stop, stoppable
from tests.worker.pairs import Bench, until
from tests.worker.site import DEADLINE_S, Background, Site, Worker, ways, well


@pytest.fixture
def site(bench: Bench, spec: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(bench, spec, monkeypatch) as site:
        yield site


def test_many_threads_that_begin_at_once_share_one_server(site: Site) -> None:
    words = site.quick()
    with Background(24) as background:
        results = background.run_all([site.spec(words) for _ in range(48)])

    assert well(results)
    assert ways(results) == [WARM]
    assert {result.why_cold for result in results} == {""}
    assert site.imports == [site.server.pid]


def test_many_processes_that_begin_at_once_share_one_server(site: Site, tmp_path: Path) -> None:
    words = site.quick()
    site.slow(0.5)
    workers = [Worker(tmp_path, *[site.spec(words) for _ in range(3)]) for _ in range(6)]
    results = [result for worker in workers for result in worker.results()]

    assert well(results)
    assert ways(results) == [WARM]
    assert site.imports == [site.server.pid]


def test_it_outlives_the_worker_that_has_started_it(site: Site, tmp_path: Path) -> None:
    words = site.quick()
    [first] = Worker(tmp_path, site.spec(words)).results()
    second = run_unit(site.spec(words))

    assert (first.start, second.start) == (WARM, WARM)
    assert site.imports == [site.server.pid]


def test_other_scripts_environments_and_directories_have_servers_of_their_own(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_twice(words: list[str], **more: Any) -> None:
        for _ in range(2):
            assert run_unit(site.spec(words, **more)).start == WARM

    words = site.quick()
    run_twice(words)
    run_twice(site.quick("other.py"))
    run_twice(words, env=(("OTHER", "1"),), run_id="1")
    (site.bench.folder / "below").mkdir()
    site.bench.write("below/imports", "")
    monkeypatch.chdir(site.bench.folder / "below")
    run_twice(words)

    assert len(site.links) == 4
    assert len(site.imports) == 3
    assert len((site.bench.folder / "below" / "imports").read_text().split()) == 1


def test_words_that_belong_to_the_command_are_no_other_server_than_to_whoever_has_others(site: Site) -> None:
    words = site.bench.script("import sys\nimport heavy\nprint(sys.argv[1:3])\n")
    for more in (["a", "b"], ["b", "a"], ["a", "b"]):
        unit = site.spec([*words, *more])
        assert well([run_unit(unit)])
        assert Path(unit.log_file).read_text() == f"{more}\n"


def test_an_idle_server_makes_room(site: Site) -> None:
    first, second = site.quick("first.py"), site.quick("second.py")
    one = {"terms": {"most": 1}}
    assert run_unit(site.spec(first, **one)).start == WARM
    before = site.server

    results = []
    deadline = time.monotonic() + DEADLINE_S
    while not results or results[-1].start == COLD:
        assert time.monotonic() < deadline
        results.append(run_unit(site.spec(second, **one)))
        time.sleep(0.1)  # a server is idle once it has had nothing to do for a second

    assert all("max_servers" in result.why_cold for result in results[:-1])
    until(lambda: not before.lives())
    assert len(site.links) == 1
    assert well([run_unit(site.spec(second, **one))])


def test_a_busy_server_makes_no_room(site: Site) -> None:
    one = {"terms": {"most": 1}}
    busy = site.spec(site.waiting(), **one)
    with Background() as background:
        running = background.run(busy)
        pid = site.pid_of(busy)
        time.sleep(1.5)  # longer than one must be idle to make room
        other = run_unit(site.spec(site.quick(), **one))
        before = site.server
        site.go()

        assert (other.returncode, other.start) == (0, COLD)
        assert other.why_cold == "There are 1 fork servers with units to run (max_servers)."
        assert well([running.result(DEADLINE_S)])
        assert running.result().pid == pid
        assert site.server == before


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), most=st.integers(1, 3))
def test_there_are_never_too_many(site: Site, data: st.DataObject, most: int) -> None:
    names = data.draw(st.lists(st.sampled_from(["a.py", "b.py", "c.py", "d.py"]), min_size=4, max_size=12))
    commands = {name: site.quick(name) for name in names}
    seen, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            seen[0] = max(seen[0], len(site.links))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        with Background(4) as background:
            specs = [site.spec(commands[name], terms={"most": most}) for name in names]
            results = background.run_all(specs)
    finally:
        over.set()
        looking.join()
        site.station.end_servers()

    assert well(results)
    assert all(result.start == WARM or "max_servers" in result.why_cold for result in results)
    # One that makes room may still be on its way out.
    assert 1 <= seen[0] <= most + 1


UNFIT = {
    "fails": ("raise ValueError('not here')", "Its imports fail (ValueError: not here)."),
    "hangs": ("import time\ntime.sleep(300)", "Its imports take longer than 1 s."),
    "leaves a thread": (
        "import threading\nthreading.Thread(target=threading.Event().wait, name='T', daemon=True).start()",
        "Its imports leave 1 thread(s) running: T.",
    ),
    "ends": ("import os\nos._exit(4)", "Its imports end the interpreter (4)."),
}


@pytest.mark.parametrize(("text", "why"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_forked_is_found_out_once_for_all_workers(
    site: Site, tmp_path: Path, text: str, why: str
) -> None:
    # A cold unit is not told to import it, and so ends well.
    body = f"import os, sys\nif '--args-json' not in sys.argv:\n{indented('import heavy' + chr(10) + text)}"
    site.bench.write("unfit.py", body)
    words = site.bench.script("import unfit\nprint('ran')\n")
    few = {"terms": {"timeout_s": 1.0}}
    with Background() as background:
        results = background.run_all([site.spec(words, **few) for _ in range(8)])
    for _ in range(2):  # they know nothing of what this process knows
        results += Worker(tmp_path, site.spec(words, **few), site.spec(words, **few)).results()

    assert well(results)
    assert ways(results) == [COLD]
    assert {result.why_cold for result in results} == {why}
    assert len(site.imports) == 1
    assert site.links == []
    until(lambda: site.left() == [])


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.split("\n"))


def test_a_command_of_another_kind_has_nothing_to_say(site: Site) -> None:
    result = run_unit(site.spec(["sh", "-c", "exit 0"]))

    assert (result.returncode, result.start, result.why_cold) == (0, COLD, "")
    assert site.files() == []


@pytest.mark.parametrize("python", ["/no/such/python3", "python3.99"])
def test_an_interpreter_that_is_missing_is_as_in_a_cold_start(site: Site, python: str) -> None:
    words = [python, site.quick()[1]]
    forked, cold = run_unit(site.spec(words)), run_unit(site.spec(words, warm=None))

    assert (forked.returncode, forked.reason, forked.message) == (cold.returncode, cold.reason, cold.message)
    assert forked.returncode == 127


@pytest.mark.parametrize("where", ["program", "script"])
def test_a_command_that_no_system_takes_is_as_in_a_cold_start(site: Site, where: str) -> None:
    words = site.quick()
    words[0 if where == "program" else 1] += "\0"
    forked, cold = run_unit(site.spec(words)), run_unit(site.spec(words, warm=None))

    assert (forked.returncode, forked.reason, forked.message) == (cold.returncode, cold.reason, cold.message)


def test_a_program_is_looked_up_where_a_cold_start_looks(site: Site, tmp_path: Path) -> None:
    """The PATH that counts is the worker's own, not the one that the unit gets."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to("/bin/false")
    (tmp_path / "bin" / "tool").write_text(f"#!{site.bench.python}\nprint('not this one')\n")
    (tmp_path / "bin" / "tool").chmod(0o755)
    env = (("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}"),)
    script = site.quick()[1]
    for words in (["python3", script], ["tool"]):
        forked, cold = run_unit(site.spec(words, env=env)), run_unit(site.spec(words, env=env, warm=None))

        assert (forked.returncode, forked.log_tail) == (cold.returncode, cold.log_tail)


def test_who_waits_for_the_lock_gives_up_when_it_is_told(site: Site) -> None:
    words = site.quick()
    site.slow(600)
    unit, other = (site.spec(words, terms={"timeout_s": 900.0}) for _ in range(2))
    with Background() as background, stoppable(unit.run_id):
        futures = [background.run(unit), background.run(other)]
        until(lambda: site.imports)
        ask_to_stop(unit.run_id, unit.run_dir)
        results = [future.result(DEADLINE_S) for future in futures]

    assert [result.reason for result in results] == [CANCELLED, CANCELLED]
    assert [result.start for result in results] == [None, None]
    until(lambda: site.left() == [])


def test_who_waits_for_a_server_that_does_not_answer_gives_up_when_it_is_told(site: Site) -> None:
    words = site.quick()
    assert run_unit(site.spec(words)).start == WARM
    os.kill(site.server.pid, signal.SIGSTOP)
    unit = site.spec(words)
    with Background() as background, stoppable(unit.run_id):
        running = background.run(unit)
        until(Path(unit.args_file).exists)
        ask_to_stop(unit.run_id, unit.run_dir)
        try:
            result = running.result(DEADLINE_S)
        finally:
            os.kill(site.server.pid, signal.SIGCONT)

    assert (result.reason, result.start) == (CANCELLED, None)


def test_a_server_is_not_left_when_it_is_ready_as_its_unit_gives_up(site: Site) -> None:
    words = site.quick()
    unit = site.spec(words)
    station = site.station

    def give_up() -> bool:
        """Not before it is ready, which its starter has not seen then."""
        until(lambda: list(Path(station.directory).glob("warm-*/socket")))
        until(lambda: [os.getsid(pid) for pid in site.left()] == site.left())
        time.sleep(0.3)  # it has yet to say so, which nobody but its starter can see
        return True

    wanted = wanted_of(site, unit)
    site.slow(0.5)
    with pytest.raises(GivenUp):
        station.start(wanted, give_up)

    until(lambda: site.left() == [])


def wanted_of(site: Site, unit: Any) -> Wanted:
    assert unit.command is not None and unit.warm is not None
    words = [*unit.command, *unit.file_options]
    here = str(site.bench.folder)
    return Wanted(
        words, len(unit.command), here, _environment(unit), unit.key.encode(), unit.log_file, unit.warm
    )


def test_a_process_that_is_forked_meanwhile_does_not_keep_the_lock(site: Site) -> None:
    site.slow(1.0)
    words = site.quick()
    with Background() as background:
        running = background.run(site.spec(words))
        until(lambda: site.imports)
        child = os.fork()
        if child == 0:
            time.sleep(DEADLINE_S)
            os._exit(0)
        try:
            assert well([running.result(DEADLINE_S)])
            site.slow(0)
            other = run_unit(site.spec(site.quick("other.py"), terms={"timeout_s": 0.0}))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    assert "locked" not in other.why_cold


def test_a_unit_on_another_host_has_a_station_of_its_own(site: Site) -> None:
    there = station_for(("elsewhere", os.getpid()), site.terms)
    here = station_for((processes.host_name(), os.getpid()), site.terms)
    later = station_for((processes.host_name(), os.getpid()), replace(site.terms, ticks=1))

    assert here is not None and there is not None and later is not None
    assert here.directory == site.terms.station
    assert there.directory == later.directory == Station.of(os.getpid()).directory
