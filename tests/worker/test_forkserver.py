"""A fork server's life: when it must not be used, what it learns, whom it refuses, when it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fractal_runner.worker import processes
from fractal_runner.worker import server as server_module
from fractal_runner.worker.server import Server
from fractal_runner.worker.targets import Target
from fractal_runner.worker.warm import ColdStart, ask
from tests.worker.pairs import Bench, until

DEADLINE_S = 60.0


def listed(server: Server, name: str) -> list[str]:
    return [word for word in ask(server.socket, "status")[name].split(",") if word]


UNFIT = {
    "a thread": (
        "import threading\nthreading.Thread(target=threading.Event().wait, name='T1', daemon=True).start()",
        r"leave 1 thread\(s\) running: T1",
    ),
    "a raw thread": ("import _thread, time\n_thread.start_new_thread(time.sleep, (99,))", "1 thread"),
    "an error": ("raise ValueError('no', 'way')", r"imports fail \(ValueError: \('no', 'way'\)\)"),
    "an exit": ("import sys\nsys.exit(3)", r"imports fail \(SystemExit: 3\)"),
    "the end": ("import os\nos._exit(3)", r"end the interpreter \(3\)"),
    "missing": ("import no_such_module", "No module named 'no_such_module'"),
    "a process": ("import subprocess\np = subprocess.Popen(['sleep', '1'])", "have started a process"),
    "CUDA": (
        "import sys\nclass C:\n  is_initialized = lambda: True\nsys.modules['torch.cuda'] = C",
        "CUDA",
    ),
    "a temporary directory": ("import tempfile\nd = tempfile.TemporaryDirectory()", "a temporary directory"),
    "an open file": ("kept = open(__file__)", "keep a file open: .*unfit.py"),
    "a connection": ("import socket\npair = socket.socketpair()", "keep a file open: socket"),
    "much text": ("print('x' * 200_000)", "print more than"),
    "itself": ("import sys\nsys.modules['task'] = 1", None),
}


@pytest.mark.parametrize(("text", "why"), UNFIT.values(), ids=UNFIT)
def test_imports_that_must_not_be_forked(bench: Bench, text: str, why: str | None) -> None:
    bench.write("unfit.py", text)
    with bench.server(bench.script("import unfit\n")) as server:
        found = server.wait_ready()

        if why is None:
            assert found is None
        else:
            assert found is not None
            assert re.search(why, found), found
            assert not server.runs()
            assert list(bench.sockets.iterdir()) == [bench.sockets / "server.log"]


@pytest.mark.parametrize("text", ["1 +", "import\0a", "# coding: none\n"])
def test_a_script_that_cannot_be_read_starts_cold(bench: Bench, text: str) -> None:
    (bench.folder / "task.py").write_text(text)
    with bench.server([bench.python, "task.py"]) as server:
        assert "Its imports fail" in (server.wait_ready() or "")


@pytest.mark.parametrize("words", ["no-such.py", "here", "-m no_such", "-m os.path.no"])
def test_a_script_that_is_not_there_starts_cold(bench: Bench, words: str) -> None:
    (bench.folder / "here").mkdir()
    with bench.server([bench.python, *words.split()]) as server:
        assert server.wait_ready()


def test_imports_that_hang_start_cold(bench: Bench) -> None:
    bench.write("hanging.py", "import time\ntime.sleep(99)\n")
    with bench.server(bench.script("import hanging\n"), import_timeout_s=0.5) as server:
        with pytest.raises(TimeoutError):
            server.wait_ready(0.01)

        assert server.wait_ready() == "Its imports take longer than 0.5 s."
        assert not server.runs()


def test_a_server_whose_imports_hang_ends_without_its_owner(bench: Bench) -> None:
    bench.write("hanging.py", "import time\ntime.sleep(99)\n")
    with bench.server(bench.script("import hanging\n"), import_timeout_s=0.5) as server:
        assert server._process.wait(DEADLINE_S) == -signal.SIGALRM
        assert server.wait_ready() == "Its imports take longer than 0.5 s."


def test_an_interpreter_that_is_not_there(bench: Bench) -> None:
    with pytest.raises(FileNotFoundError), bench.server(["/no/python", "task.py"]):
        pass


def test_variables_that_make_an_interpreter_talk(bench: Bench) -> None:
    bench.environment[b"PYTHONVERBOSE"] = b"1"
    with pytest.raises(ColdStart, match="PYTHONVERBOSE is set"), bench.server(bench.script("")):
        pass


def test_a_path_too_long_for_a_socket(bench: Bench) -> None:
    (bench.folder / ("x" * 100)).mkdir()
    with (
        pytest.raises(ColdStart, match="too long"),
        bench.server(bench.script(""), directory=str(bench.folder / ("x" * 100))),
    ):
        pass


def test_what_is_refused_was_not_started(bench: Bench) -> None:
    words = bench.script("open('started', 'w').close()\n")
    with bench.server(words) as server:
        assert server.wait_ready() is None

        def refused(match: str, words: list[str] = words, cwd: str = str(bench.folder)) -> None:
            with pytest.raises(ColdStart, match=match) as caught:
                server.run(words, bench.environment, cwd, "log")
            assert not caught.value.gone

        refused("another command's", [bench.python, "other.py"])
        refused("is started in /,", cwd="/")
        bench.environment[b"OTHER"] = b"1"
        refused("differs .* 1 variable.*OTHER")
        del bench.environment[b"OTHER"], bench.environment[b"PATH"]
        refused("differs .* 1 variable.*PATH")

    assert not (bench.folder / "started").exists()


def test_what_spawn_raises_is_raised(bench: Bench) -> None:
    words = bench.script("")
    with bench.server(words) as server:
        assert server.wait_ready() is None
        with pytest.raises(FileNotFoundError):
            bench.start(server, words, Path("missing") / "log")
        with pytest.raises(OSError, match="NUL character"):
            bench.start(server, [*words, "a\0b"])
        assert bench.warm(server, words).returncode == 0


@pytest.mark.parametrize(
    "data", [b"", b"x\n", b"5\nab", b"-1\n", b"99999999999\n", b"x" * 99, b"3\nabc", b"9\nrun\0a\0b\0c"]
)
def test_a_broken_request_harms_nobody(bench: Bench, data: bytes) -> None:
    words = bench.script("print(1)\n")
    with bench.server(words) as server:
        assert server.wait_ready() is None
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(server.socket)
            assert client.recv(100) == b"hello\n"
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""

        assert bench.warm(server, words).text == "1\n"


def test_a_client_that_leaves_does_not_end_its_unit(bench: Bench) -> None:
    words = bench.script(
        "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\nopen('done', 'w')\n"
    )
    with bench.server(words) as server:
        assert server.wait_ready() is None
        bench.start(server, words).close()
        (bench.folder / "go").touch()

        until((bench.folder / "done").exists)
        until(lambda: ask(server.socket, "status")["running"] == "0")


def test_many_at_a_time_and_nothing_is_left(bench: Bench) -> None:
    words = bench.script("import sys\nprint(sys.argv[1])\nsys.exit(int(sys.argv[1]) % 7)\n")
    with bench.server([*words, "x"]) as server:
        assert server.wait_ready() is None

        def run(number: int) -> bool:
            log = bench.folder / f"log{number}"
            child = bench.start(server, [*words, str(number)], log)
            assert child.wait(DEADLINE_S)
            child.close()
            return child.returncode == number % 7 and log.read_text() == f"{number}\n"

        def held() -> tuple[int, int]:
            memory = processes.sample_memory(server.pid)
            return len(list(Path(f"/proc/{server.pid}/fd").iterdir())), memory

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(run, range(100)))
            until(lambda: ask(server.socket, "status")["running"] == "0")
            before = held()
            assert all(pool.map(run, range(400)))
            until(lambda: held()[0] <= before[0])  # the last connections
            after = held()

        assert after[1] < before[1] + (2 << 20)
        assert processes.descendants(server.pid) == []
        assert list(Path(server.socket).parent.iterdir()) == [Path(server.socket)]


LAZY = {
    "fine.py": "VALUE = 1\n",
    "failing.py": "raise ImportError('not this one')\n",
    "loud.py": "print('loud')\n",
    "threaded.py": "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n",
    "hanging.py": "import sys, time\n'--unit' in sys.argv or time.sleep(99)\n",
    "setting.py": "import os\nos.environ['SET'] = '1'\n",
    "after.py": "VALUE = 2\n",
}


@pytest.fixture
def installed(bench: Bench) -> Path:
    """Modules beside an interpreter of their own, which nobody changes while tasks run."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "env"], check=True, timeout=DEADLINE_S)
    bench.python = str(bench.folder / "env" / "bin" / "python")
    (site,) = (bench.folder / "env" / "lib").glob("python*/site-packages")
    for name, text in LAZY.items():
        (site / name).write_text(text)
    return site


def script_that_imports(bench: Bench, names: str, more: str = "") -> list[str]:
    return bench.script(
        f"""
        import sys, os, time, threading
        {more}
        def main():
            print([name for name in {names.split()} if name in vars(sys)["modules"]])
            for name in {names.split()}:
                try:
                    __import__(name)
                except ImportError:
                    pass
        if __name__ == "__main__":
            main()
        """
    )


def test_what_units_import_later_is_learned(bench: Bench, installed: Path) -> None:
    words = script_that_imports(bench, "fine after decimal")
    with bench.server(words) as server:
        assert server.wait_ready() is None
        assert bench.warm(server, words).text == "[]\n"
        until(lambda: {"fine", "after", "decimal"} <= set(listed(server, "learned")))

        assert bench.warm(server, words).text == "['fine', 'after', 'decimal']\n"


@pytest.mark.parametrize("unfit", ["loud", "threaded", "hanging"])
def test_what_must_not_be_learned_is_left_to_the_units(bench: Bench, installed: Path, unfit: str) -> None:
    words = script_that_imports(bench, f"fine {unfit} failing after")
    with bench.server(words, import_timeout_s=2.0) as server:
        assert server.wait_ready() is None
        first = bench.warm(server, [*words, "--unit"])
        until(lambda: {"fine", "after"} <= set(listed(server, "learned")))
        second = bench.warm(server, [*words, "--unit"])

        assert listed(server, "refused") == [unfit]
        assert first.text.replace("[]", "['fine', 'after']") == second.text
        assert server.runs()


@pytest.mark.parametrize("more", ["print('first')\n        import json", "def f(): os.environ['X'] = '1'"])
def test_nothing_is_learned_for_a_script_that_may_change_what_it_imports(
    bench: Bench, installed: Path, more: str
) -> None:
    words = script_that_imports(bench, "fine", more)
    with bench.server(words) as server:
        assert server.wait_ready() is None
        for _ in range(3):
            bench.warm(server, words)

        status = ask(server.socket, "status")
        assert (status["learnable"], status["trial"], status["learned"]) == ("False", "False", "")


def test_nothing_is_learned_from_a_unit_whose_imports_set_variables(bench: Bench, installed: Path) -> None:
    words = script_that_imports(bench, "fine setting after")
    with bench.server(words) as server:
        assert server.wait_ready() is None
        assert bench.warm(server, words).text == bench.warm(server, words).text == "[]\n"
        assert listed(server, "learned") == []


def test_modules_that_may_change_are_not_learned(bench: Bench) -> None:
    bench.write("beside.py", "")
    words = script_that_imports(bench, "beside")
    with bench.server(words) as server:
        assert server.wait_ready() is None
        assert bench.warm(server, words).text == "[]\n"
        until(lambda: listed(server, "refused") == ["beside"])
        assert bench.warm(server, words).text == "[]\n"


def test_it_ends_when_it_is_idle(bench: Bench) -> None:
    words = bench.script("")
    with bench.server(words, idle_s=0.2) as server:
        assert server.wait_ready() is None

        until(lambda: not server.runs())
        assert not Path(server.socket).parent.exists()
        with pytest.raises(ColdStart) as caught:
            bench.warm(server, words)
        assert caught.value.gone


def test_it_is_not_idle_while_a_unit_runs(bench: Bench) -> None:
    words = bench.script("import time\ntime.sleep(1)\n")
    with bench.server(words, idle_s=0.2) as server:
        assert server.wait_ready() is None

        assert bench.warm(server, words).returncode == 0


def test_it_ends_when_it_is_told(bench: Bench) -> None:
    with bench.server(bench.script("")) as server:
        assert server.wait_ready() is None
        ask(server.socket, "end")

        until(lambda: not server.runs())


@pytest.mark.parametrize("hangs", [False, True])
def test_it_ends_with_its_owner_and_its_units_do_not(bench: Bench, hangs: bool) -> None:
    words = bench.script("import time\nopen('up', 'w').close()\ntime.sleep(60)\n")
    owner = textwrap.dedent(
        f"""
        import os, time
        from fractal_runner.worker.server import Server
        from fractal_runner.worker.targets import recognise
        words = {words!r}
        environment = dict(os.environb)
        server = Server.start(recognise(words), words=words, directory={str(bench.sockets)!r},
                              environment=environment, log="server.log")
        assert server.wait_ready() is None
        child = server.run(words, environment, os.getcwd(), "log")
        print(server.pid, child.pid, flush=True)
        time.sleep(60)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", owner],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
    )
    with process:
        assert process.stdout is not None
        server, unit = map(int, process.stdout.readline().split())
        until((bench.folder / "up").exists)
        if hangs:  # while it cannot see anything: as soon as it can
            os.kill(server, signal.SIGSTOP)
        process.kill()
    if hangs:
        os.kill(server, signal.SIGCONT)
    try:
        until(lambda: not processes.is_running(server))
        assert processes.is_running(unit)
    finally:
        os.killpg(unit, signal.SIGKILL)
    assert list(bench.sockets.iterdir()) == []


def test_its_mark_tells_a_unit_from_its_server(bench: Bench) -> None:
    words = bench.script("import time\nopen('up', 'w').close()\ntime.sleep(60)\n")
    mark = b"FRACTAL_RUNNER_UNIT=" + bench.environment[b"FRACTAL_RUNNER_UNIT"]
    with bench.server(words) as server:
        assert server.wait_ready() is None
        child = bench.start(server, words)
        until((bench.folder / "up").exists)

        assert processes.bearers(mark) == [child.pid]
        processes.end_group(child, mark, 0)  # type: ignore[arg-type]
        assert child.returncode == -signal.SIGKILL
        child.close()


def test_two_threads_wait_for_one_server(bench: Bench) -> None:
    with bench.server(bench.script("")) as server, ThreadPoolExecutor(2) as pool:
        barrier = threading.Barrier(2)

        def wait() -> str | None:
            barrier.wait(DEADLINE_S)
            return server.wait_ready()

        assert [future.result() for future in [pool.submit(wait) for _ in range(2)]] == [None, None]


def test_targets_are_the_key_of_a_server() -> None:
    assert Target("python", (), "script", "a", 2) == Target("python", (), "script", "a", 1)
    assert len({Target("python", (), "script", "a", 2), Target("python", ("-u",), "script", "a", 3)}) == 2


def test_a_server_that_is_slow_to_say_that_it_is_ready_is_not_taken_for_one_that_has_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its child kills it first, and may lose the processor before it tells."""
    here = Path(processes.__file__).parent
    text = (here / "forkserver.py").read_text()
    says = '    os.write(status, b"ready %d'
    assert text.count(says) == 1
    (tmp_path / "forkserver.py").write_text(text.replace(says, f"    time.sleep(1)\n{says}"))
    boot = tmp_path / "forkboot.py"
    boot.write_text((here / "forkboot.py").read_text())
    monkeypatch.setattr(server_module, "_FORKSERVER", str(boot))

    bench.same(bench.script("print('here')\n"))
