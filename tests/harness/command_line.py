"""The command `pmblk`, asked and awaited; and commands that undo what they made when they end."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.harness.daemon import PMBLK, Daemon

SECONDS = 20


def pmblk(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return _done([PMBLK, *arguments], environment)


def ask(daemon: Daemon, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`pmblk ARGUMENTS` to that daemon."""
    return _done(daemon.command(*arguments), environment)


def answer(daemon: Daemon, *arguments: str, **environment: str) -> str:
    """What it printed; it succeeded, and had nothing to complain about."""
    done = ask(daemon, *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def complaint(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line of a command that was refused."""
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("pmblk: ")
    return line.removeprefix("pmblk: ")


def detach_all(daemon: Daemon, *options: str) -> tuple[int, dict[str, Any]]:
    """`pmblk detach --all`, with nothing asked of the daemon: its exit status, and its report."""
    done = pmblk("detach", "--all", "--config", str(daemon.config), *options, "--json")
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def _done(
    command: Sequence[str], environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env={**os.environ, **environment},
    )


# ---- commands that tidy up


@contextlib.contextmanager
def started(
    command: Sequence[str], *, seconds: float, cwd: Path | None = None, **environment: str
) -> Iterator["subprocess.Popen[str]"]:
    """The command, running; what it says goes to its `stdout`, lines of 80 columns.

    It ends with the block or after `seconds`, by SIGTERM and not SIGKILL: what it made goes away
    with it.
    """
    with subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "80", **environment},
    ) as process:
        limit = threading.Timer(seconds, process.terminate)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.terminate()


def output_of(
    process: "subprocess.Popen[str]", moment: str, act: Callable[[str], None]
) -> list[str]:
    """Its lines until it ends. `act` gets what was said so far at each line with that moment."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if moment in line:
            act("".join(lines))
    process.wait()
    return lines


def interrupt(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """Twice: impatience must not spoil the tidying up."""
    process.send_signal(number)
    process.send_signal(number)


def daemon_in(directory: Path) -> int:
    """The process that serves a config in the directory or below it, by /proc."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "serve" in words and any(str(directory) in word for word in words):
                return int(path.parent.name)
    raise AssertionError(f"no daemon serves anything in {directory}")
