"""Scripts started cold and warm: what they find around them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker.pairs import Bench, until

SEEN = {
    "arguments": "print(sys.argv, sys.orig_argv, sys.flags, sys.executable, sys.prefix)",
    "main": "print({k: v for k, v in sorted(vars(sys.modules['__main__']).items()) if k != '__loader__'})",
    "its loader": "print(type(__loader__), __loader__.name, __loader__.path)",
    "paths": "print(sys.path, os.getcwd(), sys.path_hooks[0], len(sys.meta_path), sys.warnoptions)",
    "modules": "import importlib.util\nprint(sorted(sys.modules))",
    "modules of ours": "import select, _socket, resource, errno, gc, atexit\n"
    "print(sorted(n for n in sys.modules if 'encodings' not in n))",
    "import from itself": "import __main__\nmine = 1\nprint(__main__.mine, __main__.__file__)",
    "environment": "print({k: v for k, v in sorted(os.environ.items()) if k != '_'})",
    "environment of children": "import subprocess\nprint(sorted(subprocess.check_output('env').split()))",
    "the mark in /proc": "print([e for e in open('/proc/self/environ').read().split(chr(0)) if 'UNIT' in e])",
    "standard input": "print(repr(sys.stdin.read()), sys.stdin.buffer.raw.name, os.read(0, 1))",
    "umask": "os.close(os.open('f', os.O_CREAT, 0o777)); print(oct(os.stat('f').st_mode)); os.remove('f')",
    "descriptors": "print([(f, os.readlink(f'/proc/self/fd/{f}')) for f in os.listdir('/proc/self/fd')"
    " if os.path.exists(f'/proc/self/fd/{f}')])",
    "signals": "import signal\nprint([(s, signal.getsignal(s)) for s in signal.valid_signals() if s != 2],"
    " signal.getsignal(2) is signal.default_int_handler, signal.pthread_sigmask(0, ()),"
    " signal.getitimer(signal.ITIMER_REAL))",
    "its group": "print(os.getpgid(0) == os.getpid(), os.getpriority(os.PRIO_PROCESS, 0))",
    "limits": "import resource\nprint([resource.getrlimit(i) for i in range(16)])",
    "threads": "import threading as t\nprint(t.current_thread() is t.main_thread(), t.active_count(),"
    " t.main_thread().ident == t.get_ident(), t.current_thread().native_id == os.getpid())",
    "multiprocessing": "import multiprocessing as m\np = m.current_process()\nprint(p.name, p.daemon,"
    " m.parent_process(), m.active_children(), p._identity, p.pid == os.getpid(), p._config.keys())",
    "garbage": "import gc\nprint(gc.isenabled(), gc.get_threshold(), gc.get_debug())",
    "time": "import time\nprint(time.process_time() < 60, time.tzname)",
    "locale": "import locale\nprint(locale.setlocale(locale.LC_ALL), locale.getpreferredencoding())",
    "no frame of ours in a log": "import logging\nlogging.basicConfig(format='%(pathname)s %(funcName)s')\n"
    "logging.error('x')",
    "annotations": "x: int = 1\nprint(__annotations__)",
    "a docstring": "print(__doc__)",
    "__name__": "print(__name__, __package__, __spec__)\nif __name__ == '__main__':\n  print('main')",
    "pickle": "import pickle\nclass A: pass\nprint(pickle.dumps(A), type(pickle.loads(pickle.dumps(A()))))",
    "inspect": "import inspect\ndef f():\n  'doc'\nprint(inspect.getsource(f), inspect.getfile(f))",
}


@pytest.mark.parametrize("options", [[], ["-X", "dev"], ["-I"]], ids=["plain", "dev", "isolated"])
@pytest.mark.parametrize("text", SEEN.values(), ids=SEEN)
def test_what_a_script_sees(bench: Bench, text: str, options: list[str]) -> None:
    words = bench.script(f"'''Text.'''\nimport os, sys\n{text}\n", *options)

    outcome = bench.same([*words, "--args-json", "a b"])

    assert outcome.returncode == 0, outcome.text


def test_a_relative_script_and_a_link(bench: Bench) -> None:
    script = bench.write("real/task.py", "import sys\nprint(sys.argv, sys.path[0], __file__)\n")
    (bench.folder / "link.py").symlink_to(script)

    for name in ("real/task.py", "./real/task.py", "real/../link.py", "link.py"):
        assert bench.same([bench.python, name, "x"]).returncode == 0


def test_variables_that_differ_between_units(bench: Bench) -> None:
    words = bench.script("import os\nprint([os.environ.get(n) for n in ('CHANGED', 'REMOVED', 'NEW')])\n")
    bench.environment[b"REMOVED"] = b"from before"
    with bench.server(words) as server:
        assert server.wait_ready() is None
        del bench.environment[b"REMOVED"]
        bench.environment[b"CHANGED"] = "ü".encode()

        warm = bench.warm(server, words)

    assert warm == bench.cold(words)
    assert warm.text == "['ü', None, None]\n"


SHADOWS = [
    "json",
    "socket",
    "_socket",
    "select",
    "resource",
    "gc",
    "errno",
    "ast",
    "forkserver",
    "runpy",
    "atexit",
]


@pytest.mark.parametrize("name", SHADOWS)
def test_a_module_beside_the_script_that_is_called_like_one_of_ours(bench: Bench, name: str) -> None:
    bench.write(f"{name}.py", "print('mine', __name__)\nVALUE = 7\n")

    bench.same(
        bench.script(f"import sys\nimport {name}\nprint({name}.__spec__.origin, vars({name}).get('VALUE'))\n")
    )


def test_what_imports_print_stands_in_each_log(bench: Bench) -> None:
    bench.write("loud.py", "import sys\nprint('out')\nprint('err', file=sys.stderr)\n")

    outcome = bench.same(bench.script("import loud\nprint('body')\n"))

    assert sorted(outcome.text.split()) == ["body", "err", "out"]


def test_what_imports_change_is_changed_in_each_unit(bench: Bench) -> None:
    bench.write(
        "changing.py",
        """
        import atexit, os, signal, sys, threading, warnings
        os.environ["SET"] = "by an import"
        os.umask(0o027)
        sys.path.append("/there")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        warnings.filterwarnings("ignore", "one of mine")
        atexit.register(print, "from an import")
        local = threading.local()
        """,
    )
    bench.same(
        bench.script(
            """
            import os, signal, sys
            import changing
            print(os.environ["SET"], sys.path[-1], signal.getsignal(signal.SIGTERM), oct(os.umask(0)))
            print(sys.modules["warnings"].filters[0][0])
            """
        )
    )


PACKAGE = {
    "pack/__init__.py": "import sys\nprint('package', sys.argv[0])\nVALUE = 1\n",
    "pack/other.py": "from . import VALUE\n",
    "pack/deep/__init__.py": "",
    "pack/deep/tool.py": """
        from __future__ import annotations
        import sys
        from .. import VALUE
        from ..other import VALUE as SAME
        from . import beside
        print(VALUE, SAME, beside.NAME, __name__, __package__, __spec__.name, __file__, sys.argv)
        print(sys.path[0], sys.orig_argv, sorted(vars()))
        if len(sys.argv) > 2:
            def f(): 1 / 0
            f()
        """,
    "pack/deep/beside.py": "NAME = __name__\n",
    "pack/__main__.py": "from pack.deep import beside\nprint(__name__, __package__, beside.NAME)\n",
}


@pytest.mark.parametrize(
    "words", ["-m pack.deep.tool", "-m pack.deep.tool fail", "-mpack", "-um pack a", "-m json.tool x"]
)
def test_a_module_of_a_package(bench: Bench, words: str) -> None:
    for name, text in PACKAGE.items():
        bench.write(name, text)

    bench.same([bench.python, *words.split(), "-x"])


def test_a_console_script(bench: Bench) -> None:
    bench.write(
        "tool.py", "import sys\ndef main():\n  print(sys.argv, sys.flags.no_user_site)\n  return 'text'\n"
    )
    script = bench.write(
        "bin/tool",
        f"""
        #!{sys.executable} -s
        import re
        import sys
        from tool import main
        if __name__ == '__main__':
            sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])
            sys.exit(main())
        """,
    )
    script.chmod(0o755)
    bench.write(
        "bin/tool2",
        script.read_text().replace(
            f"#!{sys.executable} -s", f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''"
        ),
    ).chmod(0o755)
    bench.write(
        "bin/tool3", script.read_text().replace(f"{sys.executable} -s", "/usr/bin/env python3")
    ).chmod(0o755)
    (bench.folder / "bin" / "tool.py").write_text((bench.folder / "tool.py").read_text())
    bench.environment[b"PATH"] = os.fsencode(Path(sys.executable).parent) + b":" + bench.environment[b"PATH"]

    for name in ("tool", "tool2", "tool3"):
        outcome = bench.same([str(bench.folder / "bin" / name), "a", "b c"])
        assert outcome.returncode == 1


METHODS = """
    import multiprocessing, os, sys
    from multiprocessing import resource_tracker

    def work(number):
        return number * 2, sys.argv[1:], os.path.basename(__file__), multiprocessing.parent_process() is None

    if __name__ == "__main__":
        context = multiprocessing.get_context("{}")
        with context.Pool(2) as pool:
            print(pool.map(work, range(5)))
        queue = context.Queue()
        process = context.Process(target=queue.put, args=(7,), name="one")
        process.start()
        print(queue.get(), process.name, process.join(), process.exitcode)
        print(context.Manager().list([1, 2]))
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_processes_of_its_own(bench: Bench, method: str) -> None:
    outcome = bench.same([*bench.script(METHODS.format(method)), "x"])

    assert outcome.returncode == 0, outcome.text


def test_a_pool_of_loky(bench: Bench) -> None:
    outcome = bench.same(
        bench.script(
            """
            import sys
            from loky import get_reusable_executor
            def work(number):
                return number + len(sys.argv)
            print(list(get_reusable_executor(max_workers=2).map(work, range(9))))
            """
        )
    )

    assert outcome.returncode == 0, outcome.text


def test_a_changed_script_is_seen(bench: Bench) -> None:
    from fractal_runner.worker.warm import ColdStart

    bench.write("beside.py", "VALUE = 1\n")
    words = bench.script("import beside\nprint(beside.VALUE)\n")
    for name, text in (
        ("task.py", "import beside\nprint(beside.VALUE + 10)\n"),
        ("beside.py", "VALUE = 200\n"),
    ):
        with bench.server(words) as server:
            assert server.wait_ready() is None
            assert bench.warm(server, words) == bench.cold(words)
            bench.write(name, text)

            with pytest.raises(ColdStart, match=f"{name} has changed") as caught:
                bench.warm(server, words)
            assert caught.value.gone
            until(lambda: not server.runs())
        bench.same(words)


def test_random_numbers_differ_between_units(bench: Bench) -> None:
    words = bench.script(
        """
        import multiprocessing, random, tempfile, uuid
        print(random.random(), uuid.uuid4(), uuid.uuid1(), next(tempfile._get_candidate_names()))
        print(bytes(multiprocessing.current_process().authkey).hex())
        """
    )
    with bench.server(words) as server:
        assert server.wait_ready() is None
        drawn = [bench.warm(server, words).text.split() for _ in range(3)]

    assert all(len(set(numbers)) == 3 for numbers in zip(*drawn, strict=True)), drawn


def test_random_numbers_of_numpy_differ_between_units(bench: Bench, task_python: Path) -> None:
    bench.python = str(task_python)
    words = bench.script(
        "import numpy\nprint(*numpy.random.random(3), numpy.random.default_rng().random())\n"
    )
    with bench.server(words) as server:
        assert server.wait_ready() is None
        drawn = [bench.warm(server, words).text.split() for _ in range(3)]

    assert all(len(set(numbers)) == 3 for numbers in zip(*drawn, strict=True)), drawn


def test_generators_that_modules_have_made_begin_anew_unless_they_were_given_a_seed(
    bench: Bench, task_python: Path
) -> None:
    bench.python = str(task_python)
    bench.write(
        "made.py",
        """
        import random
        import numpy
        FREE = [random.Random(), numpy.random.default_rng(), numpy.random.RandomState(),
                numpy.random.Generator(numpy.random.PCG64())]
        SEEDED = [random.Random(42), random.Random("x"), random.Random(), numpy.random.default_rng(7),
                  numpy.random.RandomState(5), numpy.random.default_rng(0x87351080e25cb0fad77a44a3be03b491)]
        SEEDED[2].setstate(SEEDED[0].getstate())
        """,
    )
    words = bench.script(
        """
        import made
        for made in (made.FREE, made.SEEDED):
            print(*(one.random() for one in made))
        """
    )
    with bench.server(words) as server:
        assert server.wait_ready() is None
        outcomes = [bench.warm(server, words) for _ in range(3)] + [bench.cold(words)]

    free = [outcome.text.splitlines()[0].split() for outcome in outcomes]
    assert all(len(set(numbers)) == 4 for numbers in zip(*free, strict=True)), free
    assert len({outcome.text.splitlines()[1] for outcome in outcomes}) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_script_of_numpy(bench: Bench, task_python: Path, fails: bool) -> None:
    bench.python = str(task_python)
    bench.same(
        bench.script(
            f"""
            import os, sys
            import numpy as np
            from skimage.filters import threshold_otsu
            image = np.arange(10000.0).reshape(100, 100)
            print(threshold_otsu(image), (image @ image).sum(), np.random.RandomState(1).random())
            print(sorted(os.listdir("/proc/self/fd")), sorted(sys.modules))
            1 / {int(not fails)}
            """
        )
    )


def test_a_unit_is_charged_for_its_own_work(bench: Bench) -> None:
    bench.write(
        "costly.py",
        """
        import time
        while time.process_time() < 1: pass
        big = bytearray(300 << 20)
        for at in range(0, len(big), 4096): big[at] = 1
        del big
        """,
    )
    words = bench.script(
        """
        import sys, time
        import costly
        if sys.argv[1] == "burn":
            while time.process_time() < 0.5: pass
        elif sys.argv[1] == "fill":
            big = bytearray(150 << 20)
            for at in range(0, len(big), 4096): big[at] = 1
        """
    )
    with bench.server([*words, "x"]) as server:
        assert server.wait_ready() is None
        usage = {}
        for what in ("burn", "fill", "nothing"):
            child = bench.start(server, [*words, what])
            assert child.wait(60)
            usage[what] = child.usage
            child.close()

    assert all(usage.values())
    assert 0.5 <= usage["burn"].ru_utime + usage["burn"].ru_stime < 1
    assert usage["nothing"].ru_utime + usage["nothing"].ru_stime < 0.5
    assert usage["nothing"].ru_maxrss < 100 << 10
    assert 150 << 10 < usage["fill"].ru_maxrss < 250 << 10


def test_no_unit_is_left_when_the_server_is_killed(bench: Bench) -> None:
    words = bench.script("import time\nopen('up', 'w').close()\ntime.sleep(60)\n")
    with bench.server(words) as server:
        assert server.wait_ready() is None
        child = bench.start(server, words)
        while not (bench.folder / "up").exists():
            assert not child.wait(0.01)
        os.kill(server.pid, 9)

        assert child.wait(60)
        assert (child.lost, child.returncode) == (True, None)
        os.killpg(child.pid, 9)
        child.close()
        subprocess.run(["true"], check=True)
