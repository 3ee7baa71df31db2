"""The directory where a cluster has all its files: it is its own, as all of it is removed at the end.

The scheduler of the emulated LSF imports what is beside this in an interpreter without any packages, so the
standard library has to do here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def own_directory(wanted: Path | None, *, prefix: str, longest: int) -> Path:
    """A directory for a cluster, empty and closed to others.

    Args:
        wanted: where: must not exist yet, or be empty. None: a new one.
        prefix: of a new one's name.
        longest: how many characters its path may have: there will be unix sockets in it, and the names of
            those have 107 characters with their directories.

    Raises:
        ValueError: if its path is too long, if it is someone else's, or if something is in it.
        OSError: if it cannot be made.
    """
    directory = wanted or Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    if len(str(directory)) > longest:
        raise ValueError(f"{directory}: unix sockets have short names: at most {longest}")
    directory.mkdir(exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise ValueError(f"{directory} is someone else's")
    if any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty, and all that is there would go at the end")
    directory.chmod(0o700)
    return directory
