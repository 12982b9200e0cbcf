"""Telling the kernel that other processes' dirty pages leave through us.

When memory is short, an allocation may have to wait until dirty pages are written. Where those
pages lie on a block device that this very daemon serves, it would wait for itself. A process that
is an IO flusher never waits like that. Source: PR_SET_IO_FLUSHER in prctl(2), Linux 5.6.
"""

import ctypes
import os

PR_SET_IO_FLUSHER = 57

_libc = ctypes.CDLL(None, use_errno=True)


def become() -> str:
    """Why not, if it cannot be had; it takes CAP_SYS_RESOURCE."""
    if _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0:
        return ""
    return os.strerror(ctypes.get_errno())
