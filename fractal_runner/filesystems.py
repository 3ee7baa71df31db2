"""What kind of file system a path is on: what is written on a shared one is seen elsewhere only later."""

from __future__ import annotations

from pathlib import Path

import psutil

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
    for partition in psutil.disk_partitions(all=True):
        mounted = partition.mountpoint.rstrip("/") + "/"
        if place.startswith(mounted) and len(mounted) >= len(point):
            point, kind = mounted, partition.fstype
    return kind in _SHARED_FILE_SYSTEMS or (kind.startswith("fuse.") and kind != "fuse.fuseblk")
