"""What a measurement ran on, in words: the machine and the programs. The benchmarks use it too."""

import os
import platform
import re
import subprocess
from pathlib import Path

ANSWER_SECONDS = 20


def machine() -> str:
    """Processor, CPUs that we may use, memory, kernel."""
    model = first(re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M))
    cpus = len(os.sched_getaffinity(0))
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {cpus} CPUs, {gib:.0f} GiB, Linux {platform.release()}"


def program_version(program: str) -> str:
    """The program and its number; "unknown" where it does not say."""
    return f"{program} {first(re.search(r'([0-9][0-9.]+)', output(program, '--version')))}"


def output(*command: str) -> str:
    """What it says, or nothing. Raises OSError when it is not installed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    return done.stdout.strip()


def first(match: "re.Match[str] | None") -> str:
    return match[1] if match else "unknown"
