"""What units do, cold and warm, that must come to the same: one script has all of them.

Each unit of the script's task does one case, the one that its image is called after. What a case prints may
not differ between any two processes: no pids, no times, no addresses.
"""

from __future__ import annotations

import re
import signal
import textwrap
from dataclasses import dataclass

from tests.worker.test_warm_and_cold import ENDING, ENDS, LAST_THINGS, PRINTS
from tests.worker.test_warm_surroundings import METHODS, SEEN

# What a batch system sets differs between its jobs and nodes, and so between a run and the next.
_DIFFERING = ("_", "SLURM", "SUBMITIT", "LS", "EMULATED", "HOSTNAME", "FRACTAL_RUNNER_NODE", "OLDPWD", "TMP")
_VARIABLES = f"{{k: v for k, v in sorted(os.environ.items()) if not k.startswith({_DIFFERING})}}"

_OWN = {
    "working directory": "print(BEGAN_IN, os.getcwd())",
    "environment": f"print({_VARIABLES})",
    "environment of children": """
        import subprocess
        print(sorted(subprocess.run(["env"], stdout=subprocess.PIPE, check=True).stdout.split())
              == sorted(b"%s=%s" % pair for pair in os.environb.items()))
        """,
    "children": """
        try:
            print(os.waitpid(-1, os.WNOHANG))
        except ChildProcessError as error:
            print(error)
        """,
    "a command of its own": """
        import asyncio
        async def ask():
            asked = await asyncio.create_subprocess_exec("sh", "-c", "echo one; exit 3")
            return await asked.wait()
        print(asyncio.run(ask()))
        """,
    "output": """
        with open(OUT, "w") as file:
            update = {"zarr_url": ARGS["zarr_url"], "attributes": {"seen": 1}}
            json.dump({"image_list_updates": [update]}, file)
        """,
    "output of a failing unit": """
        with open(OUT, "w") as file:
            file.write("{}")
        sys.exit(4)
        """,
    "output that is no JSON": """
        with open(OUT, "w") as file:
            file.write("{'a': 1}")
        """,
    "output that says something else": """
        with open(OUT, "w") as file:
            file.write('{"unheard_of": 1}')
        """,
    "halves of lines": "sys.stderr.write('a'); sys.stdout.write('b'); sys.stderr.write('c')",
    "halves of lines and a handler": """
        import atexit
        sys.stderr.write("a"); sys.stdout.write("b")
        atexit.register(sys.stdout.write, "c")
        """,
    "halves of lines and a thread": """
        import threading
        def later():
            time.sleep(0.1)
            sys.stdout.write("c"); sys.stdout.flush(); sys.stderr.write("d"); sys.stdout.write("e")
        sys.stderr.write("a"); sys.stdout.write("b")
        threading.Thread(target=later).start()
        """,
    "halves of lines and an exit": """
        import atexit
        sys.stderr.write("a"); sys.stdout.write("b")
        atexit.register(sys.stdout.write, "c")
        sys.exit(3)
        """,
    "half a line and no stderr": "sys.stderr.write('a'); sys.stdout.write('b'); sys.stderr = None",
    "half a line and no stdout": "sys.stderr.write('a'); sys.stdout.write('b'); sys.stdout = None",
    "a log that it removes": "print('gone'); os.remove(os.readlink('/proc/self/fd/1'))",
    "a process left behind": """
        import subprocess
        print("left", flush=True)
        left = subprocess.Popen(["sleep", "60"])
        os._exit(0)
        """,
    "a handler of SIGTERM": """
        import signal
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(6))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        """,
    "an alarm": "import signal\nsignal.alarm(1)\ntime.sleep(60)",
    "a pool of loky": """
        from loky import get_reusable_executor
        def work(number):
            return number + len(sys.argv)
        print(list(get_reusable_executor(max_workers=2).map(work, range(9))))
        """,
}
_SIGNAL = """
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("before", flush=True)
    os.kill(os.getpid(), {})
    print("after")
    """


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that a unit may do.

    Attributes:
        text: of the script, at the level of its module.
        code: how it ends, as subprocess reports it; None where that is not the question.
    """

    text: str
    code: int | None = None


def _slug(*words: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(words)).strip("-")


CASES: dict[str, Case] = {
    **{_slug("ends", name): Case(text, code) for name, (text, code) in ENDS.items()},
    **{_slug("signal", signal.Signals(number).name): Case(_SIGNAL.format(int(number))) for number in ENDING},
    **{_slug("prints", name): Case(text) for name, text in PRINTS.items()},
    **{_slug("last", name): Case(text) for name, text in LAST_THINGS.items()},
    **{_slug("sees", name): Case(text) for name, text in SEEN.items() if name not in _OWN},
    **{_slug("does", name): Case(text) for name, text in _OWN.items()},
    **{
        _slug("multiprocessing", method): Case(METHODS.format(method), 0)
        for method in ("spawn", "fork", "forkserver")
    },
}

_HEAD = '''\
"""Text."""
import json
import os
import sys
import time

BEGAN_IN = os.getcwd()
with open(sys.argv[sys.argv.index("--args-json") + 1]) as file:
    ARGS = json.load(file)
OUT = sys.argv[sys.argv.index("--out-json") + 1]
CASE = ARGS["zarr_url"].rpartition("/")[2]
os.makedirs(ARGS["place"] + "/" + CASE, exist_ok=True)
os.chdir(ARGS["place"] + "/" + CASE)
'''


def script() -> str:
    """The script. It has no main guard; all cases are statements of its module."""
    parts = [_HEAD]
    for name, case in CASES.items():
        parts.append(f"if CASE == {name!r}:\n{textwrap.indent(textwrap.dedent(case.text).strip(), '    ')}\n")
    return "\n".join(parts)
