"""`make demo`: it passes, a person can read it, and it leaves nothing behind however it ends."""

import os
import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.harness.command_line import daemon_in, interrupt, output_of, started
from tests.harness.file_systems import leftovers

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SECONDS = 90
SCRATCH = re.compile(r"^Everything is in (\S+) and", re.MULTILINE)
DEVICE = re.compile(r"pmblk attach demo: /dev/(loop\d+)")


def demo(*, seconds: float) -> AbstractContextManager["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "bench.demo", "--seconds", str(seconds)]
    return started(command, seconds=SECONDS, cwd=ROOT)


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
    assert re.search(r"RAID  write, then verify .* \d+ blocks", table)
    assert re.search(r"RAID  rebuilt on the spare +active", table)
    assert re.search(r"RAID  scrub +all fits", table)
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
        lines = output_of(process, moment, lambda _: interrupt(process, number))
    output = "".join(lines)
    assert process.returncode == 128 + number, output
    assert f"{number.name}: stopped half way, and tidied up." in output
    check_nothing_is_left(output)


def test_the_demo_fails_when_its_daemon_dies() -> None:
    with demo(seconds=0.3) as process:
        lines = output_of(
            process, "ext4  mount  ", lambda said: os.kill(_daemon_of(said), signal.SIGKILL)
        )
    output = "".join(lines)
    assert process.returncode == 1, output
    assert "FAILED" in output
    assert "The daemon's log:" in output
    assert "Every check passed" not in output
    check_nothing_is_left(output)


def _daemon_of(output: str) -> int:
    scratch = SCRATCH.search(output)
    assert scratch is not None
    return daemon_in(Path(scratch[1]))
