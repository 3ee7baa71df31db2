"""Which imports of a script are certain to be its first acts, and which commands are scripts."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from fractal_runner.worker import forkserver
from fractal_runner.worker.forkserver import Hoist
from fractal_runner.worker.targets import Target, recognise

AHEAD = {
    "nothing": ("", 0, True, True),
    "plain": (
        "'doc'\nfrom __future__ import annotations\nimport a.b as c\nfrom .d import e\n",
        2,
        True,
        True,
    ),
    "between harmless things": (
        "import a\nlog = logging.getLogger(__name__)\nHERE = Path(__file__).parent.resolve()\nX: int = 1\n"
        "A, B = 1, [2]\ndef f(x=os.environ.get('X')): pass\nclass C(a.B):\n  y: int = Field(default=1)\n"
        "import b\n",
        2,
        True,
        True,
    ),
    "an assigned variable": ("import os\nos.environ['A'] = '1'\nimport b\n", 1, False, False),
    "a default of a variable": ("import os\nos.environ.setdefault('A', '1')\nimport b\n", 1, False, False),
    "a deleted variable": ("import os\ndel os.environ['A']\nimport b\n", 1, False, False),
    "putenv": ("import os\nos.putenv('A', '1')\nimport b\n", 1, False, False),
    "sys.path": ("import sys\nsys.path.insert(0, 'x')\nimport b\n", 1, False, False),
    "another sys.path": ("import sys\nsys.path = []\nimport b\n", 1, False, False),
    "matplotlib.use": (
        "import matplotlib\nmatplotlib.use('Agg')\nimport matplotlib.pyplot\n",
        1,
        False,
        False,
    ),
    "filters": ("import warnings\nwarnings.filterwarnings('ignore')\nimport b\n", 1, False, False),
    "a print": ("import a\nprint(1)\nimport b\n", 1, False, False),
    "a call": ("import a\nx = a.f()\nimport b\n", 1, False, False),
    "a call at the end": ("import a\na.f()\n", 1, True, True),
    "a with statement": ("import a\nwith a.b():\n  import c\nimport d\n", 1, False, False),
    "a loop": ("for x in y: import z\n", 0, False, False),
    "an attribute": ("import a\na.x = 1\nimport b\n", 1, False, False),
    "a decorator": ("import a\n@matplotlib.use('Agg')\ndef f(): pass\nimport b\n", 1, False, False),
    "a class that imports": ("class C:\n  import a\nimport b\n", 0, False, False),
    "a function that imports": ("def f():\n  import a\nimport b\n", 1, True, True),
    "a function that sets a variable": ("import a\ndef f():\n  os.environ['A'] = '1'\n", 1, True, False),
    "a function that reads one": ("import a\ndef f():\n  os.environ['A']; environ.get('A')\n", 1, True, True),
    "type checking": ("if TYPE_CHECKING:\n  import a\nelse:\n  import b\nimport c\n", 2, True, True),
    "type checking, later": ("f()\nif typing.TYPE_CHECKING:\n  import a\n", 0, True, True),
    "main": ("import a\nif __name__ == '__main__':\n  import b\n  b.f()\n", 2, True, True),
    "main at first": ("if __name__ == '__main__':\n  f()\nimport a\n", 0, False, False),
    "not main": ("if __name__ != '__main__':\n  import a\nimport b\n", 0, False, False),
    "a version": ("if sys.version_info >= (3, 2):\n  import a\nelse:\n  import b\nimport c\n", 2, True, True),
    "a platform": ("if sys.platform == 'vms':\n  import a\nimport c\n", 1, True, True),
    "a condition": ("import a\nif a.x:\n  import b\nimport c\n", 1, False, False),
    "a condition that calls": ("if sys.platform == f():\n  import b\n", 0, False, False),
    "optional": ("try:\n  import a\nexcept ImportError:\n  a = None\nimport b\n", 2, True, True),
    "optional, with more": (
        "try:\n  import a\n  a.f()\nexcept ImportError:\n  pass\nimport b\n",
        0,
        False,
        False,
    ),
    "a module by name": ("a = importlib.import_module('a')\nimport b\n", 0, False, False),
    "a star": ("from a import *\n", 1, True, True),
    "its own name": ("__package__ = 'x'\nfrom . import b\n", 0, False, False),
    "a method of a name": ("x = thing.format()\nimport b\n", 0, False, False),
}


@pytest.mark.parametrize(("text", "count", "complete", "learnable"), AHEAD.values(), ids=AHEAD)
def test_what_is_imported_beforehand(text: str, count: int, complete: bool, learnable: bool) -> None:
    hoist = Hoist(ast.parse(text))

    assert len(hoist.statements) == count
    assert (hoist.complete, hoist.learnable) == (complete, learnable)


def test_it_can_be_read_by_python_3_9() -> None:
    ast.parse(Path(forkserver.__file__).read_text(), feature_version=(3, 9))


def target(text: str) -> Target | None:
    return recognise(text.split())


COMMANDS = {
    "python s.py": Target("python", (), "script", "s.py", 2),
    "/e/bin/python3.11 -u s.py --args-json x": Target("/e/bin/python3.11", ("-u",), "script", "s.py", 3),
    "python3 -uB -X dev -Wignore s.py -m x": Target(
        "python3", ("-uB", "-X", "dev", "-Wignore"), "script", "s.py", 6
    ),
    "python -W error -- s.py": Target("python", ("-W", "error"), "script", "s.py", 5),
    "python -m a.b -u": Target("python", (), "module", "a.b", 3),
    "python -ma.b": Target("python", (), "module", "a.b", 2),
    "python -um a.b x": Target("python", ("-u",), "module", "a.b", 3),
    "python -I -Ema.b": Target("python", ("-I", "-E"), "module", "a.b", 3),
    "python -I -m a": Target("python", ("-I",), "module", "a", 4),
}
COLD = """
python
python -
python -c 1
python -i s.py
python -V
python -x s.py
python -X importtime s.py
python -m
python --help
python s.pyc
python s.pyz
sh -c x
/bin/sh s.sh
pythonw s.py
no-such-tool x
/etc/passwd
"""


@pytest.mark.parametrize("text", COMMANDS)
def test_commands_that_are_recognised(text: str) -> None:
    found = target(text)

    assert found is not None
    assert found == COMMANDS[text]
    assert found.words == COMMANDS[text].words


@pytest.mark.parametrize("text", COLD.strip().split("\n"))
def test_commands_that_start_cold(text: str) -> None:
    assert target(text) is None


SHEBANGS = {
    "#!/e/bin/python": ("/e/bin/python", ()),
    "#!/e/bin/python3.12 -E": ("/e/bin/python3.12", ("-E",)),
    "#! /usr/bin/env python3": ("python3", ()),
    "#!/usr/bin/env -S python3 -u -B": ("python3", ("-u", "-B")),
    "#!/usr/bin/env -i python3": None,
    "#!/usr/bin/env python3 -u": None,
    "#!/bin/sh": None,
    "#!/bin/sh\n'''exec' \"/with space/python3\" \"$0\" \"$@\"\n' '''": ("/with space/python3", ()),
    "#!/bin/sh\n'''exec' /long/python -sE \"$0\" \"$@\"": ("/long/python", ("-sE",)),
    "#!/bin/bash": None,
    "#!/e/bin/python -m pack": None,
    "#!/e/bin/ruby": None,
    "import sys": None,
    "": None,
}


@pytest.mark.parametrize("first", SHEBANGS)
def test_console_scripts(first: str, tmp_path: Path) -> None:
    script = tmp_path / "tool"
    script.write_text(textwrap.dedent(f"{first}\nimport sys\n"))
    script.chmod(0o755)
    expected = SHEBANGS[first]

    for words, path in (([str(script), "x"], None), (["tool", "x"], str(tmp_path))):
        found = recognise(words, path)

        if expected is None:
            assert found is None
        else:
            assert found == Target(*expected, "script", str(script), 1)
            assert found.words == 1
