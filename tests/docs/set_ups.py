"""What `config show --origin` prints of the set-ups on the configuration's page.

`python -m tests.docs.set_ups` writes it into the page; a test sees that it stands there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).parent.parent.parent
PAGE = TOP / "docs" / "configuration.md"

_HEADING = "## Three set-ups\n"
_FILE = re.compile(r"^```yaml\n# (\S+)\n.*?^```$", re.MULTILINE | re.DOTALL)
_ANSWER = re.compile(r"(^```console\n\$ (.*?)\n```\n\n```text\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)
# Where the page has these places.
_HOME, _INSTALLED = "/home/mona", "/opt/fractal"
_INSTALLATION = f"{_INSTALLED}/etc/fractal-runner/config.yaml"


def written(page: str) -> str:
    """The page with what its commands print, each below the files of its own set-up."""
    before, heading, rest = page.partition(_HEADING)
    set_ups, after = re.split(r"(?=^## )", rest, maxsplit=1, flags=re.MULTILINE)
    parts = re.split(r"(?=^### )", set_ups, flags=re.MULTILINE)
    return before + heading + "".join(map(_with_answer, parts)) + after


def _with_answer(part: str) -> str:
    files = {found[1]: found[0].split("\n", 1)[1].removesuffix("```") for found in _FILE.finditer(part)}
    return _ANSWER.sub(lambda found: found[1] + _printed(found[2].split(), files) + found[4], part)


def _printed(command: list[str], files: dict[str, str]) -> str:
    """What a command prints where there are these files, in the directory of the project's."""
    with tempfile.TemporaryDirectory() as top:
        here = Path(top, "data", "screen")
        here.mkdir(parents=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("FRACTAL_RUNNER")}
        env |= {"HOME": top + _HOME, "PYTHONPATH": str(TOP)}
        env.pop("XDG_CONFIG_HOME", None)
        for name, text in files.items():
            path = Path(top + name.replace("~", _HOME))
            path.parent.mkdir(parents=True)
            path.write_text(text)
            if name == _INSTALLATION:
                env["FRACTAL_RUNNER_INSTALL_CONFIG"] = str(path)
        answer = subprocess.run(
            [sys.executable, "-m", *("fractal_runner", *command[1:])],
            cwd=here,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        packages = f"{_INSTALLED}/lib/python3.12/site-packages"
        # The environment first: it may lie in the project's directory.
        said = answer.stdout.replace(sys.prefix, _INSTALLED).replace(str(TOP), packages)
        return said.replace(os.path.realpath(top), "").replace(top, "")


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
