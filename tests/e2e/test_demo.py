"""`make demo`: it passes, a person can read it, and it leaves nothing behind however it ends."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.file_systems import leftovers

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SECONDS = 90
SCRATCH = re.compile(r"^Everything is in (\S+) and", re.MULTILINE)
DEVICE = re.compile(r"pmblk attach demo: /dev/(loop\d+)")


@contextlib.contextmanager
def demo(*, seconds: float) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-m", "bench.demo", "--seconds", str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    ) as process:
        # SIGTERM, not SIGKILL: what it made goes away with it.
        limit = threading.Timer(SECONDS, process.terminate)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.terminate()


def check_nothing_is_left(output: str) -> None:
    scratch = SCRATCH.search(output)
    assert scratch is not None, output
    assert leftovers(Path(scratch[1])) == []
    device = DEVICE.search(output)
    assert device is not None, output
    backing = Path("/sys/block", device[1], "loop/backing_file")
    # Somebody else may have the number by now.
    assert not backing.exists() or scratch[1] not in backing.read_text()


def test_the_demo_passes_every_check_and_shows_what_it_measured() -> None:
    with demo(seconds=0.3) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    steps = re.findall(r"^ ?(\d+)/(\d+)  ", output, re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, int(steps[0][1]) + 1))
    table = output[output.index("WHAT") :]
    for row in ("NBD   4K random read, QD1", "ext4  4K random write, QD32"):
        assert re.search(rf"{row} +[0-9,]+ +[0-9.]+ [um]s +[0-9.]+ [um]s +\d\S* [MG]B/s", table)
    assert re.search(r"NBD   write, then verify .* \d+ blocks", table)
    assert re.search(r"ext4  write, then verify .* \d+ blocks", table)
    assert re.search(r"ext4  fsck +clean", table)
    assert re.search(r"ext4  the same checksums +same", table)
    assert "Every check passed" in output
    assert all(len(line) <= 80 for line in output.splitlines()), output
    assert "\x1b" not in output
    check_nothing_is_left(output)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("ext4  make", signal.SIGTERM),  # attached, not mounted
        ("ext4  copy a tree", signal.SIGINT),  # mounted, fio about to run
    ],
)
def test_an_interrupted_demo_leaves_nothing_behind(moment: str, number: signal.Signals) -> None:
    with demo(seconds=0.3) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if moment in line:
                process.send_signal(number)
                process.send_signal(number)  # impatience does not spoil it
        process.wait()
    output = "".join(lines)
    assert process.returncode == 128 + number, output
    assert f"{number.name}: stopped half way, and tidied up." in output
    check_nothing_is_left(output)


def test_the_demo_fails_when_its_daemon_dies() -> None:
    with demo(seconds=0.3) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "ext4  mount  " in line:
                os.kill(_daemon_of("".join(lines)), signal.SIGKILL)
        process.wait()
    output = "".join(lines)
    assert process.returncode == 1, output
    assert "FAILED" in output
    assert "The daemon's log:" in output
    assert "Every check passed" not in output
    check_nothing_is_left(output)


def _daemon_of(output: str) -> int:
    """The process with the demo's scratch directory in its command line, by /proc."""
    scratch = SCRATCH.search(output)
    assert scratch is not None
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "serve" in words and any(scratch[1] in word for word in words):
                return int(path.parent.name)
    raise AssertionError("the demo has no daemon")
