"""Programs with a time limit, waiting for what nothing tells of, and a log without complaints."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection

from tests.harness.daemon import Daemon


def program(*command: str, seconds: float = 30, status: int = 0) -> str:
    """Run it; what it wrote to standard output. AssertionError with all its words on failure.

    After the time limit it is killed with all that it has started.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            words = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            words = process.communicate()
            raise AssertionError(f"{command} was not done in {seconds} s:\n{words}") from None
    assert process.returncode == status, f"{command} ended with {process.returncode}:\n{words}"
    return words[0]


def assert_no_complaints(daemon: Daemon, *, but: Collection[str] = ()) -> None:
    """It runs, and has logged no error, no warning and no traceback, `but` lines with these."""
    assert daemon.running, f"the daemon died:\n{daemon.log}"
    lines = [line for line in daemon.log.splitlines() if not any(word in line for word in but)]
    for word in ("Traceback", "level=error", "level=warning", "level=critical"):
        assert not any(word in line for line in lines), daemon.log


def wait_for(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    """For what nothing tells of: a device that is gone, a line in a log."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
