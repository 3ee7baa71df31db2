"""Scripts that are a case by what they are, or by what stands beside them, and the tasks that run them."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tests.warm.cases import CASES, script
from tests.worker.test_warm_surroundings import PACKAGE, SHADOWS

UNITS = 4  # of each of these tasks: the first of a server, and later ones
CHANGES = 5
BALLAST_MB = 150  # that a module keeps
FILL_MB = 200
PASSING_MB = 300  # that a module takes, and gives back
BURN_S = 0.3
IMPORT_CPU_S = 0.5
COSTS = ("nothing", "burn", "fill", "nothing")  # what the units of those tasks do, in order

_SHADOWS = (*SHADOWS, "fractal_runner", "station", "warm", "server")
_NUMBER = """
import json, sys
with open(sys.argv[sys.argv.index("--args-json") + 1]) as file:
    NUMBER = int(json.load(file)["zarr_url"].rpartition("/")[2])
"""
_DRAWS = """
import multiprocessing, random, tempfile, uuid
print(random.random(), uuid.uuid4(), uuid.uuid1(), next(tempfile._get_candidate_names()))
print(bytes(multiprocessing.current_process().authkey).hex(), random.Random().random())
"""
# The script is asked for a module of such a name, and the server has used its own of that name before.
_SHADOWING = "".join(
    f"import {name}\nprint({name}.__spec__.origin, vars({name}).get('VALUE'))\n" for name in _SHADOWS
)
_COSTS = f"""
import sys, time
WHAT = {COSTS!r}[NUMBER]
if WHAT == "burn":
    since = time.process_time()
    while time.process_time() < since + {BURN_S}: pass
elif WHAT == "fill":
    big = b"x" * ({FILL_MB} << 20)
"""
_COSTLY = f"""
import time
while time.process_time() < {IMPORT_CPU_S}: pass
passing = b"x" * ({PASSING_MB} << 20)
del passing
ballast = b"x" * ({BALLAST_MB} << 20)
"""

_FILES = {
    **{name: textwrap.dedent(text) for name, text in PACKAGE.items()},
    "many/__init__.py": "",
    "many/cases.py": script(),
    "cases.py": script(),
    **{f"shadowed/{name}.py": f"print('mine', __name__)\nVALUE = {len(name)}\n" for name in _SHADOWS},
    "shadowed/task.py": "import sys\n" + _SHADOWING,
    "unguarded.py": """
import multiprocessing, os, sys
print("once more", __name__, flush=True)
process = multiprocessing.get_context("spawn").Process(target=print, args=("never",))
process.start()
process.join()
print(process.exitcode)
""",
    "lazy.py": """
import sys
BEFORE = len(sys.argv)
def work():
    import csv, decimal, fractions, xml.dom.minidom
    print(decimal.Decimal(1) / 3, fractions.Fraction(3, 6), csv.list_dialects())
    import plistlib
    import email.message
    print(plistlib.dumps({"a": 1}), xml.dom.minidom.parseString("<a/>").toxml(), email.message.Message())
work()
""",
    "draws.py": _DRAWS,
    "draws_of_numpy.py": """
import numpy
print(*numpy.random.random(3), numpy.random.default_rng().random(), numpy.random.randint(2**40))
""",
    "light.py": _NUMBER + _COSTS,
    "heavy.py": "import costly\n" + _NUMBER + _COSTS,
    "costly.py": _COSTLY,
    # Its units run one by one: each leaves the script, or a module beside it, as the next one is to see it.
    "changing.py": _NUMBER
    + """
import beside
print("script", 0, "module", beside.VALUE)
place = beside.__file__ if NUMBER % 2 else __file__
with open(place) as file:
    text = file.read()
old = "VALUE = " if NUMBER % 2 else '"script", '
at = text.index(old) + len(old)
with open(place, "w") as file:
    file.write(text[:at] + "1" + text[at:])
""",
    "beside.py": "VALUE = 0\n",
}


def write_scripts(folder: Path) -> None:
    """Write all of them, for tasks that start in this folder."""
    for name, text in _FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    console = folder / "console"
    console.write_text(f"#!{sys.executable} -s\nimport pack\nsys = pack.sys\nprint(sys.argv[0], __name__)\n")
    console.chmod(0o755)


@dataclass(frozen=True, slots=True)
class Job:
    """A task, and the images that it has a unit for.

    Attributes:
        command: its command.
        units: what its images are called.
        one_by_one: whether each unit sees what the one before it has left.
    """

    command: str
    units: tuple[str, ...] = tuple(map(str, range(UNITS)))
    one_by_one: bool = False


def tasks(folder: Path, task_python: Path | None) -> dict[str, Job]:
    """The tasks of these scripts.

    Args:
        folder: where the scripts are.
        task_python: an interpreter that has numpy, if there is one.
    """
    python = sys.executable
    found = {
        "script": Job(f"{python} {folder}/cases.py", tuple(CASES)),
        "module": Job(f"{python} -m many.cases", tuple(CASES)),
        "shadowed": Job(f"{python} {folder}/shadowed/task.py"),
        "relative": Job(f"{python} -m pack.deep.tool"),
        "package": Job(f"{python} -um pack"),
        "unguarded": Job(f"{python} {folder}/unguarded.py"),
        "lazy": Job(f"{python} -W error pack/../lazy.py"),
        "console": Job(f"{folder}/console one 'two words'"),
        "changing": Job(f"{python} {folder}/changing.py", tuple(map(str, range(CHANGES))), one_by_one=True),
        "draws": Job(f"{python} {folder}/draws.py"),
        "light": Job(f"{python} {folder}/light.py"),
        "heavy": Job(f"{python} {folder}/heavy.py"),
    }
    if task_python is not None:
        found["draws-of-numpy"] = Job(f"{task_python} {folder}/draws_of_numpy.py")
    return found
