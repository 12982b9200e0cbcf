"""CPUs that are kept from sleeping. (Whose CPU time it was is `pmblkd.compare.cpu`.)

Scheduling: sched(7), "The autogroup feature"; `cpu.idle` in the kernel's cgroup-v2.rst.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 15
STOP_SECONDS = 15
POLL_SECONDS = 0.01

# It ends by itself when its parent is gone: nobody else would notice that it still turns.
SPINNER = """
import os, sys
cpu, parent = map(int, sys.argv[1:])
os.sched_setaffinity(0, {cpu})
os.nice(19)  # /proc/stat counts it apart
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""

# ---- CPUs that do not sleep


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keep every CPU out of its sleep states, with work that gives way to anything else.

    Waking a sleeping virtual CPU costs more than a 4 KiB I/O, and hides what the servers do.
    """
    with _idle_group() as group, contextlib.ExitStack() as stack:
        for cpu in sorted(os.sched_getaffinity(0)):
            spinner = stack.enter_context(_spinner(cpu))
            if group is not None:
                (group / "cgroup.procs").write_text(str(spinner.pid))
        yield


@contextlib.contextmanager
def _spinner(cpu: int) -> Iterator["subprocess.Popen[bytes]"]:
    spinner = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", SPINNER, str(cpu), str(os.getpid())],
        start_new_session=True,  # ^C is for us to act on
    )
    try:
        _await_idle_class(spinner)
        yield spinner
    finally:
        spinner.kill()
        spinner.wait(STOP_SECONDS)


def _await_idle_class(spinner: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while os.sched_getscheduler(spinner.pid) != os.SCHED_IDLE:
        if spinner.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError("a spinner did not start")
        time.sleep(POLL_SECONDS)


# SCHED_IDLE ranks a process only inside its scheduling group, and every session is a group of its
# own (autogroup). Between sessions a spinner has a full share of its CPU, and a server that wakes
# up waits for the end of the spinner's slice: QD1 figures were bimodal, a factor of 2 apart. A
# control group that is idle as a whole gives way to every other group.


def idle_group_parent() -> Path | None:
    """Where such a group can be made (root, cgroup v1 or v2); None: SCHED_IDLE has to do."""
    version1, version2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    if (version1 / "cgroup.procs").exists():
        found: Path | None = version1
    else:
        enabled = version2 / "cgroup.subtree_control"
        found = version2 if enabled.exists() and "cpu" in enabled.read_text().split() else None
    return found if found is not None and os.access(found, os.W_OK) else None


def spinners_text() -> str:
    if idle_group_parent() is not None:
        return "SCHED_IDLE processes in a control group with cpu.idle set"
    return "SCHED_IDLE processes (without a control group of their own: no root)"


@contextlib.contextmanager
def _idle_group() -> Iterator[Path | None]:
    """A control group of the CPU controller with cpu.idle set, gone after the block."""
    parent = idle_group_parent()
    if parent is None:
        yield None
        return
    group = parent / f"pmblk-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.idle").write_text("1")
        yield group
    finally:
        group.rmdir()
