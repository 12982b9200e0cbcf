"""Running a program that may touch a mount whose daemon hangs: nobody waits longer than they say.

Whoever waits for such a mount cannot always be killed, so a program that is too late gets SIGKILL
and is left alone: it ends when the mount does. Only the command line and the start of the daemon
come here; whoever serves touches no mount of their own.
"""

import contextlib
import os
import subprocess

from pmblk import PmblkError
from pmblkd.errors import WorkFailed

PROGRAM_SECONDS = 30
REAP_SECONDS = 0.5  # for what can be killed

_left_alone: list["subprocess.Popen[str]"] = []  # kept, so that they are reaped one day


class NotEnded(WorkFailed):
    """The program did not end in time."""


def run(program: str, *arguments: str, seconds: float = PROGRAM_SECONDS) -> str:
    """The program's output. Raises WorkFailed with its words, NotEnded when it takes too long."""
    path = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
    try:
        process = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C", "PATH": path},
        )
    except FileNotFoundError:
        raise PmblkError(f"{program} is not installed", hint=f"install {program}") from None
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise NotEnded(
            f"{program} did not end in {seconds:g} s", hint="is the daemon alive?"
        ) from None
    finally:
        _let_go(process)
    if process.returncode != 0:
        words = errors.strip() or f"exit status {process.returncode}"
        raise WorkFailed(words if words.startswith(program) else f"{program}: {words}")
    return output


def _let_go(process: "subprocess.Popen[str]") -> None:
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    if process.poll() is None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REAP_SECONDS)
    _left_alone[:] = [one for one in (*_left_alone, process) if one.poll() is None]
