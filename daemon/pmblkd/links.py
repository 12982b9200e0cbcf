"""The kernel's name of a mountpoint: it knows no symbolic links, and we compare with its lists."""

import os
from pathlib import Path

from pmblkd import mounts

LINKS_MAX = 40  # as the kernel follows


def without_links(path: Path) -> Path:
    """Where a mount on `path` would be. The last part is only read as a link, never looked at, and
    a path below a FUSE mount not at all: what is mounted there may hang.
    """
    for _ in range(LINKS_MAX):
        if _is_below_fuse(path):
            return path
        path = Path(os.path.realpath(path.parent)) / path.name
        try:
            path = path.parent / os.readlink(path)
        except OSError:
            return path
    return path


def _is_below_fuse(path: Path) -> bool:
    found = (mounts.find(parent) for parent in path.parents)
    return any(mount is not None and mount.file_system.startswith("fuse") for mount in found)
