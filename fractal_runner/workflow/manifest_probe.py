"""List the Fractal task packages that an interpreter can see, as JSON.

Its text is run by interpreters of task environments, which have neither this package nor a recent Python:
standard library only, Python 3.8 syntax. It looks at metadata and never imports a task package.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from typing import Any, Dict, Iterator, List, Optional

MANIFEST = "__FRACTAL_MANIFEST__.json"


def task_packages() -> List[Dict[str, Any]]:
    """[{"name", "version", "root", "manifest", "problem"}] of every distribution that has a manifest."""
    found: Dict[str, Dict[str, Any]] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if not name or name in found:  # the first one on sys.path is the one that would be imported
            continue
        path = _manifest_path(distribution, name)
        if path is None:
            continue
        entry: Dict[str, Any] = {"name": name, "version": distribution.version, "root": os.path.dirname(path)}
        try:
            with open(path, encoding="utf-8") as file:
                entry["manifest"] = json.load(file)
        except (OSError, ValueError) as error:
            entry["problem"] = f"{path}: {error}"
        found[name] = entry
    return list(found.values())


def _manifest_path(distribution: importlib.metadata.Distribution, name: str) -> Optional[str]:
    for file in distribution.files or ():
        if file.name == MANIFEST:
            path = str(distribution.locate_file(file))
            if os.path.exists(path):
                return path
    # An editable install lists no files of the package: ask where its modules would be imported from.
    top_level = (distribution.read_text("top_level.txt") or "").split()
    likely = re.sub(r"[-_.]+", "_", name)
    for module in [*top_level, likely, likely.lower()]:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            continue
        for folder in (spec and spec.submodule_search_locations) or ():
            path = os.path.join(folder, MANIFEST)
            if os.path.exists(path):
                return path
    # Its modules may be called otherwise: look through the folders that it puts on sys.path.
    nearby = list(_manifests_below_pth(distribution))
    return nearby[0] if len(nearby) == 1 else None


def _manifests_below_pth(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    for file in distribution.files or ():
        if file.name.endswith(".pth") and os.path.exists(str(distribution.locate_file(file))):
            for folder in file.read_text().splitlines():
                for module in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                    path = os.path.join(folder, module, MANIFEST)
                    if os.path.exists(path):
                        yield path


if __name__ == "__main__":
    json.dump(task_packages(), sys.stdout)
