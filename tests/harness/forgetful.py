"""`pmblk`, except that fdatasync does nothing: a server that acknowledges flushes too early.

The negative control of tests that look for loss: they must find it here. ARGUMENTS as for pmblk.
"""

import os

from pmblkd.cli import main


def _forget(fd: object) -> None:
    pass


os.fdatasync = _forget

if __name__ == "__main__":
    main()
