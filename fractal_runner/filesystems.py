"""What kind of file system a path is on: what is written on a shared one is seen elsewhere only later."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# Those that several hosts mount at a time (sqlite.org/wal.html, "overview", has the consequences).
_SHARED_FILE_SYSTEMS = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs"),
        *("9p", "orangefs", "panfs", "wekafs", "virtiofs", "gfs2", "ocfs2", "acfs", "pvfs2", "quobyte"),
    }
)


def is_shared(path: Path) -> bool:
    """Whether a file there may be on a file system that other hosts write as well."""
    place = str(path.absolute().parent.resolve()) + "/"
    point, kind = "", ""
    for mountpoint, found in _mounts():
        mounted = mountpoint.rstrip("/") + "/"
        if place.startswith(mounted) and len(mounted) >= len(point):
            point, kind = mounted, found
    return kind in _SHARED_FILE_SYSTEMS or (kind.startswith("fuse.") and kind != "fuse.fuseblk")


def _mounts() -> Iterator[tuple[str, str]]:
    """What is mounted where, and of what kind it is, in the order of mounting."""
    try:
        lines = Path("/proc/self/mounts").read_bytes().splitlines()
    except FileNotFoundError:  # this is no Linux
        import psutil  # which takes a while, and each job of a cluster starts with this module

        for partition in psutil.disk_partitions(all=True):
            yield partition.mountpoint, partition.fstype
        return
    for line in lines:
        _, mountpoint, kind, *_ = line.split(b" ")  # proc(5): blanks are \040
        plain = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), mountpoint)
        yield plain.decode(errors="surrogateescape"), kind.decode()
