"""Scripts started cold and warm: how they end, what they print, what they do on their way out."""

from __future__ import annotations

import os
import signal

import pytest

from tests.worker.pairs import Bench

STOPPING = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
ENDING = sorted(set(signal.Signals) - STOPPING)  # some of them are ignored


ENDS = {
    "falls off its end": ("pass", 0),
    "exit 0": ("sys.exit(0)", 0),
    "exit 1": ("sys.exit(1)", 1),
    "exit 3": ("sys.exit(3)", 3),
    "exit 255": ("sys.exit(255)", 255),
    "exit 256": ("sys.exit(256)", 0),
    "exit -1": ("sys.exit(-1)", 255),
    "exit None": ("sys.exit(None)", 0),
    "exit True": ("sys.exit(True)", 1),
    "exit text": ("sys.exit('it is ü')", 1),
    "exit object": ("sys.exit(['a', 1])", 1),
    "quit": ("quit(4)", 4),
    "own SystemExit": ("class Own(SystemExit): pass\nraise Own(5)", 5),
    "os._exit": ("print('lost'); os._exit(7)", 7),
    "exception": ("def f():\n  return 1 / 0\nf()", 1),
    "exception and output": ("print('buffered')\n1/0", 1),
    "exit text and output": ("print('buffered')\nsys.exit('text')", 1),
    "cause": ("try:\n  [][0]\nexcept IndexError as e:\n  raise OSError('x') from e", 1),
    "context": ("try:\n  [][0]\nexcept IndexError:\n  {}['k']", 1),
    "in a library": ("import json\njson.loads('{')", 1),
    "syntax": ("eval('1 +')", 1),
    "keyboard interrupt": ("raise KeyboardInterrupt", -signal.SIGINT),
    "caught interrupt": (
        "try:\n  os.kill(os.getpid(), 2); time.sleep(9)\nexcept KeyboardInterrupt:\n  print('caught')",
        0,
    ),
    "generator exit": ("raise GeneratorExit", 1),
    "own hook": ("sys.excepthook = lambda *a: print('hook', a[0], a[2].tb_frame.f_code.co_name)\n1/0", 1),
    "exit in a hook": ("def hook(*a): sys.exit(9)\nsys.excepthook = hook\n1/0", 9),
    "no hook": ("del sys.excepthook\n1/0", 1),
    "unwritable": ("os.close(1)\nprint('x' * 99)", 120),
    "closed stdout": ("print('a'); sys.stdout.close()", 0),
    "no stderr": ("sys.stderr = None\n1/0", 1),
    "last exception": ("import atexit\natexit.register(lambda: print(sys.last_traceback.tb_lineno))\n1/0", 1),
}


@pytest.mark.parametrize(("text", "code"), ENDS.values(), ids=ENDS)
def test_an_end(bench: Bench, text: str, code: int) -> None:
    outcome = bench.same(bench.script(f"import os, sys, time\n{text}\n"))

    assert outcome.returncode == code


@pytest.mark.parametrize("number", ENDING)
def test_a_signal(bench: Bench, number: int) -> None:
    words = bench.script(
        f"""
        import os
        print("before", flush=True)
        os.kill(os.getpid(), {int(number)})
        print("after")
        """
    )

    bench.same(words)


def test_sigterm_from_outside_ends_a_unit_and_not_its_server(bench: Bench) -> None:
    words = bench.script("import os, time\nopen('up', 'w').close()\ntime.sleep(60)\n")
    with bench.server(words) as server:
        assert server.wait_ready() is None
        child = bench.start(server, words)
        while not (bench.folder / "up").exists():
            assert not child.wait(0.01)
        os.killpg(child.pid, signal.SIGTERM)

        assert child.wait(60)
        assert child.returncode == -signal.SIGTERM
        assert server.runs()
        child.close()


PRINTS = {
    "both streams": "print('o1'); print('e1', file=sys.stderr); print('o2'); print('e2', file=sys.stderr)",
    "flushed": "print('o1', flush=True); print('e1', file=sys.stderr); os.write(1, b'raw'); print('o2')",
    "no newline": "sys.stderr.write('a'); sys.stdout.write('b'); sys.stderr.write('c')",
    "much": "[print('x' * 997, i) for i in range(99)]; print('e', file=sys.stderr)",
    "bytes": "sys.stdout.buffer.write(bytes(range(256))); sys.stdout.write('ü')",
    "its streams": "[print(s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through,"
    " s.isatty(), s.fileno()) for s in (sys.stdin, sys.stdout, sys.stderr)]",
    "warnings": "import warnings\nwarnings.warn('w'); warnings.warn('d', DeprecationWarning)",
    "logging": "import logging\nlogging.basicConfig(level='INFO'); logging.info('i'); logging.error('e')",
    "a child": "import subprocess\nprint('first'); subprocess.run(['echo', 'second'])",
    "the C library": "import ctypes\nctypes.CDLL(None).puts(b'c'); print('python')",
}


@pytest.mark.parametrize("how", ["", "-u", "PYTHONUNBUFFERED", "-Werror", "PYTHONIOENCODING"])
@pytest.mark.parametrize("text", PRINTS.values(), ids=PRINTS)
def test_output(bench: Bench, text: str, how: str) -> None:
    options = [how] if how.startswith("-") else []
    if how.startswith("PYTHON"):
        bench.environment[how.encode()] = b"latin-1:replace"

    bench.same(bench.script(f"import os, sys\n{text}\n", *options))


LAST_THINGS = {
    "exit handlers": """
        import atexit
        atexit.register(print, "first in, last out")
        atexit.register(lambda: print("json" in sys.modules, "last in"))
        atexit.register(int, "no number")
        """,
    "a handler and an exception": "import atexit\natexit.register(print, 'handler')\n1/0",
    "a handler that exits": "import atexit\natexit.register(sys.exit, 5)\nsys.exit(3)",
    "a thread": """
        import threading
        def later():
            time.sleep(0.1)
            print("thread", threading.main_thread().is_alive())
        threading.Thread(target=later).start()
        print("main")
        """,
    "a thread and an exception": """
        import threading
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
        raise ValueError("main")
        """,
    "a daemon": """
        import threading
        threading.Thread(target=lambda: (time.sleep(30), print("never")), daemon=True).start()
        """,
    "an exception in a thread": "import threading\nthreading.Thread(target=lambda: 1/0, name='t').start()",
    "a pool": """
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(2)
        pool.submit(lambda: (time.sleep(0.1), print("done")))
        """,
    "an open file": "file = open('left', 'w'); file.write('kept')",
    "an open file in a module": "import json\njson.left = open('left', 'w'); json.left.write('kept')",
    "a finalizer": """
        class Last:
            def __del__(self):
                print("finalized")
        last = Last()
        """,
    "weakref.finalize": """
        import weakref
        class Some: pass
        some = Some()
        weakref.finalize(some, print, "finalize")
        """,
    "a temporary directory": """
        import tempfile
        folder = tempfile.TemporaryDirectory(dir=".", prefix="t")
        open(folder.name + "/in", "w").close()
        """,
    "async": "import asyncio\nasync def f(): print('in'); return 6\nsys.exit(asyncio.run(f()))",
    "a fork": """
        sys.stdout.flush()
        if pid := os.fork():
            print(os.waitpid(pid, 0)[1])
        else:
            print("child"); sys.exit(2)
        """,
}
MANY = "import asyncio, ctypes, email, http.client, json, logging, multiprocessing, sqlite3, unittest, xml\n"


@pytest.mark.parametrize("first", ["", MANY], ids=["small", "with ctypes"])
@pytest.mark.parametrize("text", LAST_THINGS.values(), ids=LAST_THINGS)
def test_last_things(bench: Bench, text: str, first: str) -> None:
    left = bench.folder / "left"
    words = bench.script(f"{first}import os, sys, time\n" + bench.write("t", text).read_text())

    found = []
    cold = bench.cold(words)
    found.append((cold, left.exists() and left.read_text(), sorted(p.name for p in bench.folder.iterdir())))
    with bench.server(words) as server:
        assert server.wait_ready() is None
        for _ in range(2):
            left.unlink(missing_ok=True)
            warm = bench.warm(server, words)
            names = sorted(p.name for p in bench.folder.iterdir())
            found.append((warm, left.exists() and left.read_text(), names))

    assert found[1] == found[0]
    assert found[2] == found[0]
