"""Cases that a guest works through in one boot, and their report: a line each, read by the host.

A boot costs more than most cases do. In the guest, `perform` writes what became of each; on the
host, a fixture boots the guest and every case is asserted by a test of its own.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.harness.guests import GuestFailed
from tests.harness.uml import FAST, Guest

REPORT = Path("/run/w/cases")
# What a kernel says when something broke: its own assertions, a file system, or a device.
COMPLAINT = re.compile(r"BUG|WARN|Oops|hung|[Cc]orrupt|[Ee]rror|rejecting I/O|shut ?down|timed out")
# A loop device asks for zeroes in vain where FUSE has no fallocate, and then writes them.
HARMLESS = "operation not supported error, dev loop"


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """`words`: what was found, or the traceback of what failed."""

    name: str
    passed: bool
    seconds: float
    words: str


# ---- in the guest


def perform(name: str, act: Callable[[], str], *, kernel_may_complain: bool = False) -> None:
    """Do it and report it. A case fails with an exception, or when the kernel complained."""
    started = time.monotonic()
    try:
        words, passed = act(), True
        complaints = kernel_complaints()
        assert kernel_may_complain or not complaints, complaints
    except Exception:
        words, passed = traceback.format_exc(), False
    seconds = round(time.monotonic() - started, 1)
    case = Case(name=name, passed=passed, seconds=seconds, words=words)
    with REPORT.open("ab") as report:
        report.write(msgspec.json.encode(case) + b"\n")
        report.flush()
        os.fsync(report.fileno())  # it is on the host now, whatever becomes of the guest
    print(f"{name}: {'passed' if passed else 'FAILED'} in {seconds} s: {words}")
    sys.stdout.flush()


def kernel_complaints() -> str:
    """The lines that the kernel has logged since this was asked last, if they are complaints."""
    command = ["dmesg", "--read-clear", "--notime"]
    log = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    lines = [line for line in log.splitlines() if HARMLESS not in line]
    return "\n".join(line for line in lines if COMPLAINT.search(line))


# ---- on the host

told: list[str] = []  # a line a case, for the end of a test run


class Outcome(msgspec.Struct, frozen=True):
    """What a boot has found. `output` is what the guest said, `failure` why it ended badly."""

    cases: dict[str, Case]
    output: str
    failure: str

    def passed(self, name: str) -> str:
        """The words of the case, which passed."""
        case = self.cases.get(name)
        assert case is not None, f"the guest never came to {name}:\n{self.output}{self.failure}"
        assert case.passed, f"{case.words}\n{self.output}{self.failure}"
        return case.words


def boot(module: str, *arguments: str, memory: str, seconds: float) -> Outcome:
    """Run `python -m MODULE ARGUMENTS` in a fresh guest of User-mode Linux."""
    with (
        tempfile.TemporaryDirectory(prefix="pmblk-uml-", dir=FAST) as folder,
        Guest(program(module, *arguments), Path(folder), memory=memory) as guest,
    ):
        return outcome(guest, seconds=seconds)


def program(module: str, *arguments: str) -> str:
    """The guest's script for it."""
    return f"exec $python -m {module} {' '.join(arguments)}"


def outcome(guest: Guest, *, seconds: float) -> Outcome:
    """What the guest reports until it ends, or its time is over."""
    output = failure = ""
    try:
        output = guest.wait(seconds)
    except GuestFailed as error:
        failure = str(error)
    report = guest.folder / REPORT.name
    lines = report.read_bytes().splitlines() if report.exists() else []
    cases = [msgspec.json.decode(line, type=Case) for line in lines]
    told.extend(map(_line, cases))
    return Outcome({case.name: case for case in cases}, output, failure)


def _line(case: Case) -> str:
    verdict = "ok" if case.passed else "FAILED"
    *_, words = case.words.splitlines()
    return f"{verdict:6} {case.seconds:6.1f} s  {case.name}: {words}"
