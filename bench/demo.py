"""`make demo`: the daemon, NBD, FUSE and a file system above it, measured and checked in a minute.

Exit status: 0 when every check passed, 1 when one failed, 2 when this machine lacks something, 128
and the signal's number when it was interrupted. In every case nothing is left behind.

The figures are what a client sees while fio and the daemon share this machine's CPUs. They are no
benchmark: `make bench` repeats, and compares with other servers.
"""

import argparse
import contextlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.demo_step import CheckFailed, Outcome
from bench.demo_steps import Demo
from pmblk import PmblkError
from pmblkd.compare import fio
from pmblkd.compare.interrupts import Interrupted, Interrupts
from tests.harness import file_systems
from tests.harness.daemon import scratch

SECONDS = 6.0
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 600 << 20  # 512 MiB of media, and some room
PROGRAMS = ("fio", "nbdcopy", "losetup", "mkfs.ext4", "e2fsck", "mount", "blockdev")
WIDTH = 80  # of a log; a terminal has its own
TITLE_WIDTH, SUMMARY_WIDTH = 28, 34
LOG_LINES = 15
FAILURES = (CheckFailed, fio.FioError, file_systems.ProgramError, PmblkError, AssertionError)


def main() -> int:
    arguments = _arguments()
    _become_root()
    if lacking := _lacking():
        print(f"demo: {lacking}", file=sys.stderr)
        return 2
    report = Report()
    report.introduce()
    try:
        _run(arguments.seconds, report, StrikingInterrupts())
    except Interrupted as interrupted:
        report.say(f"\n{interrupted}: stopped half way, and tidied up.")
        return 128 + interrupted.number
    except FAILURES:
        report.say("\nStopped there.")
        return 1
    report.say("\nEvery check passed; no process, mount, device or file is left behind.")
    return 0


def _run(seconds: float, report: "Report", interrupts: "StrikingInterrupts") -> None:
    """All steps. Raises Interrupted, or the failure that was reported."""
    directory = Path()
    with interrupts.installed():
        try:
            with scratch() as directory, contextlib.ExitStack() as undo:
                _do_all(Demo(directory, seconds, undo), report, interrupts, directory)
        finally:
            if left := file_systems.leftovers(directory):
                report.say(f"Left behind: {', '.join(left)}")
                raise CheckFailed


def _do_all(
    demo: Demo, report: "Report", interrupts: "StrikingInterrupts", directory: Path
) -> None:
    report.say(f"Everything is in {directory} and goes away with it.\n")
    steps = demo.steps()
    for number, step in enumerate(steps, 1):
        work = step.work if step.is_short else interrupts.allowing(step.work)
        report.do(f"{number:2}/{len(steps)}", step.title, work, log=lambda: demo.log)
    report.print_table()


# ---- before it starts


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each (%(default)s)")
    arguments = parser.parse_args()
    if arguments.seconds < 0.1:
        parser.error("at least 0.1 seconds")
    return arguments


def _become_root() -> None:
    if os.geteuid() == 0:
        return
    if shutil.which("sudo") is None:
        print("demo: loop devices and mounts take root, and there is no sudo", file=sys.stderr)
        sys.exit(2)
    command = ["sudo", sys.executable, "-m", "bench.demo", *sys.argv[1:]]
    print(f"Loop devices and mounts take root: {' '.join(command)}", flush=True)
    os.execvp(command[0], command)


def _lacking() -> str:
    """What this machine does not have, and what to do about it; or nothing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for program in PROGRAMS:
        if shutil.which(program, path=path) is None:
            return f"{program} is not installed; run: make setup"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not Path(device).exists():
            return f"there is no {device}; run: modprobe {device[5:].removesuffix('-control')}"
    room = os.statvfs(MEMORY)
    if room.f_bavail * room.f_frsize < MEMORY_BYTES:
        size = f"{MEMORY_BYTES >> 20} MiB"
        return f"{MEMORY} has less than {size} free; run: mount -o remount,size=1G {MEMORY}"
    if not file_systems.TREE.is_dir():
        return f"there is no {file_systems.TREE} to copy; install linux-libc-dev"
    return ""


# ---- signals


class StrikingInterrupts(Interrupts):
    """They strike, too: in what `allowing` made interruptible, or when the next such work begins.

    A step waits for programs that look for no signal. While things are unmade nobody allows them,
    so that a second ^C does not spoil it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_allowed = False

    def arrived(self, number: int) -> None:
        super().arrived(number)
        if self._is_allowed:
            self._is_allowed = False
            self.check()

    def allowing(self, work: Callable[[], Outcome]) -> Callable[[], Outcome]:
        def interruptible() -> Outcome:
            self._is_allowed = True
            try:
                self.check()
                return work()
            finally:
                self._is_allowed = False

        return interruptible


# ---- what is shown


class Report:
    """A line for each step when it is done, for a terminal or a log, and the table at the end."""

    def __init__(self) -> None:
        width = None if sys.stdout.isatty() else WIDTH
        self._console = Console(highlight=False, markup=False, width=width)
        self._rows: list[tuple[str, Outcome]] = []

    def say(self, text: str | Text) -> None:
        self._console.print(text, soft_wrap=True)

    def introduce(self) -> None:
        cpus = len(os.sched_getaffinity(0))
        title = Text("pmblk demo", "bold")
        self.say(title + ": one namespace of 512 MiB in memory, over NBD and over FUSE.")
        self.say(f"Linux {platform.release()}; fio and the daemon share {cpus} CPUs.")

    def do(
        self, number: str, title: str, work: Callable[[], Outcome], *, log: Callable[[], str]
    ) -> None:
        """One step, shown. Raises what it raises."""
        begun = time.monotonic()
        try:
            with self._console.status(f"{number}  {title}"):
                outcome = work()
        except FAILURES as error:
            self._line(number, title, Text("FAILED", "bold red"), begun)
            end_of_log = "\n".join(log().splitlines()[-LOG_LINES:])
            self.say(f"\n{error}\n\nThe daemon's log:\n{end_of_log}")
            raise
        self._line(number, title, _summary(outcome), begun)
        self._rows.append((title, outcome))

    def _line(self, number: str, title: str, summary: Text, begun: float) -> None:
        seconds = f"{time.monotonic() - begun:5.1f} s"
        summary.pad_right(max(0, SUMMARY_WIDTH - len(summary)))
        self.say(Text(f"{number}  {title:{TITLE_WIDTH}}  ") + summary + Text(seconds, "dim"))

    def print_table(self) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("WHAT", no_wrap=True)
        for heading in ("IOPS", "MEAN", "P99", "BANDWIDTH"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("CHECK", style="green", no_wrap=True)
        for title, outcome in self._rows:
            if outcome.side or outcome.check:
                table.add_row(title, *_figures(outcome.side), outcome.check)
        self.say("")
        self._console.print(table)
        self.say(
            "\nMEAN and P99: latency from submission to completion, as fio sees it. Where"
            "\nblocks are checked, the figures are of the writing, and each block was read back"
            "\nand found to have its CRC32C."
        )


def _summary(outcome: Outcome) -> Text:
    if outcome.side is None:
        return Text(outcome.said) + Text(f"  {outcome.check}", "green")
    iops, mean, *_ = _figures(outcome.side)
    return Text(f"{iops:>7} IOPS, {mean:>6}") + Text(f"  {outcome.check}", "green")


def _figures(side: fio.Side | None) -> tuple[str, str, str, str]:
    if side is None:
        return "", "", "", ""
    return (
        f"{side.iops:,.0f}",
        _duration(side.latency_us_mean),
        _duration(side.latency_us_p99),
        _rate(side.bytes_per_second),
    )


def _duration(us: float) -> str:
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.1f} ms"


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second < 1e9:
        return f"{bytes_per_second / 1e6:.0f} MB/s"
    return f"{bytes_per_second / 1e9:.2f} GB/s"


if __name__ == "__main__":
    sys.exit(main())
