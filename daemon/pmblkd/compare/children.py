"""Children that do the measured work: awaited with a deadline, and with an eye on signals."""

import os
import signal
import subprocess
import time
from collections.abc import Callable

CHECK_SECONDS = 0.1


def output_of(
    process: "subprocess.Popen[bytes]", *, seconds: float, check: Callable[[], None]
) -> bytes:
    """All that it writes to standard output. It is gone afterwards, whatever happens.

    `check` is called ten times a second meanwhile, and may raise to stop it all. Raises
    subprocess.TimeoutExpired after `seconds`. The process leads a session of its own.
    """
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                return process.communicate(timeout=CHECK_SECONDS)[0]
            except subprocess.TimeoutExpired:
                check()
                if time.monotonic() > deadline:
                    raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()  # which closes the pipe too
