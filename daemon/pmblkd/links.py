"""The kernel's name of a mountpoint: it knows no symbolic links, and we compare with its lists."""

import os
from pathlib import Path

LINKS_MAX = 40  # as the kernel follows


def without_links(path: Path) -> Path:
    """Where a mount on `path` would be. The last part is only read as a link, never looked at:
    what is mounted there may hang.
    """
    for _ in range(LINKS_MAX):
        path = Path(os.path.realpath(path.parent)) / path.name
        try:
            path = path.parent / os.readlink(path)
        except OSError:
            return path
    return path
