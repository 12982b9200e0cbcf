"""A program for guests: store a pattern through a mapping with MAP_SYNC.

    python map_sync.py FILE BYTES

Ends with status 1 where the kernel refuses such a mapping, as it does without DAX.
"""

import hashlib
import mmap
import os
import sys

MAP_SHARED_VALIDATE = 0x03
MAP_SYNC = 0x80000


def main() -> None:
    path, size = sys.argv[1], int(sys.argv[2])
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(fd, 0, size)
    try:
        mapping = mmap.mmap(fd, size, flags=MAP_SHARED_VALIDATE | MAP_SYNC)
    except OSError as error:
        sys.exit(f"MAP_SYNC is refused: {error.strerror}")
    for offset in range(0, size, 4096):
        page = hashlib.sha512(str(offset).encode()).digest() * 64
        mapping[offset : offset + 4096] = page
    print("MAP_SYNC is taken")


if __name__ == "__main__":
    main()
