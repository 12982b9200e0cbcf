"""Arrays for tests with real programs: made, served, watched, and members that break for real."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pmblk.raid.status import ArrayStatus
from pmblkd import control
from pmblkd.raid_reports import RaidReport
from tests.harness.command_line import pmblk
from tests.harness.daemon import Daemon
from tests.harness.programs import program, wait_for

MIB = 1 << 20
NAME = "data"
SWEEP_SECONDS = 60


# ---- made and served


def create(places: Sequence[str], *options: str) -> None:
    """`pmblk raid create`, which succeeds."""
    made = pmblk("raid", "create", NAME, *places, *options)
    assert (made.returncode, made.stderr) == (0, ""), made


def config_of(directory: Path, places: Sequence[str], **raid: object) -> str:
    """Of a daemon that serves it over both front ends. `raid`: more keys of that table."""
    keys = "".join(f", {key} = {json.dumps(value)}" for key, value in raid.items())
    return f"""
[[namespace]]
name = "{NAME}"
raid = {{ members = {json.dumps(list(places))}{keys} }}
[nbd]
listen = ["unix:{directory}/nbd.sock"]
[fuse]
mountpoint = "{directory}/mnt"
"""


@contextlib.contextmanager
def served(directory: Path, places: Sequence[str], **raid: object) -> Iterator[Daemon]:
    """A daemon, stopped at the end if it runs; it is killed where it cannot be stopped."""
    daemon = Daemon(directory, config_of(directory, places, **raid))
    try:
        daemon.start()
        yield daemon
    finally:
        if daemon.running:
            daemon.stop()


def restart(daemon: Daemon, places: Sequence[str], **raid: object) -> None:
    """Stop it cleanly, and start it with these members."""
    assert daemon.stop() == 0, daemon.log
    daemon.config.write_text(config_of(daemon.directory, places, **raid))
    daemon.start()


# ---- watched


def status(daemon: Daemon) -> ArrayStatus:
    (report,) = control.ask(daemon.socket, "raid-status", list[RaidReport], name=NAME)
    return report.status


def ask(daemon: Daemon, command: str, **fields: object) -> ArrayStatus:
    """As `pmblk raid COMMAND` does, but for a second of Python's start-up."""
    report = control.ask(
        daemon.socket, f"raid-{command}", RaidReport, seconds=SWEEP_SECONDS, name=NAME, **fields
    )
    return report.status


def active(daemon: Daemon) -> list[str | None]:
    """The places of members that are whole, by slot."""
    return [
        one.place
        for one in status(daemon).members
        if one.slot is not None and one.state == "active"
    ]


def await_whole(daemon: Daemon, *, without: str | None = None) -> None:
    """Until every slot has a whole member, and nobody is `without` in it."""

    def is_whole() -> bool:
        now = status(daemon)
        places = [one.place for one in now.members if one.state in ("active", "rebuilding")]
        return now.state == "active" and now.sweep is None and without not in places

    wait_for(is_whole, seconds=SWEEP_SECONDS)


def await_idle(daemon: Daemon) -> None:
    """Until nothing is resynced, rebuilt or scrubbed."""
    wait_for(lambda: status(daemon).sweep is None, seconds=SWEEP_SECONDS)


def scrub(daemon: Daemon, *, repair: bool = False) -> tuple[str, ...]:
    """What a scrub finds, from its beginning to its end."""
    ended = daemon.log.count("ended")
    ask(daemon, "scrub", repair=repair)
    wait_for(lambda: daemon.log.count("ended") > ended, seconds=SWEEP_SECONDS)
    found = status(daemon).scrub
    assert found is not None
    return found.findings


# ---- members that break


@dataclass
class Breakable:
    """A member; after `break_it` it is no more what it was."""

    place: str
    break_it: Callable[[], None]


class Server:
    """An NBD server (nbdkit) for a file, which it makes if it is missing."""

    def __init__(self, file: Path, *, size: int) -> None:
        self.socket = file.with_suffix(".sock")
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._file = file
        if not file.exists():
            with file.open("xb") as made:
                made.truncate(size)
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        command = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(self.socket)]
        # With more threads nbdkit 1.32 may fail an assertion of its own when a client hangs up
        # amid its requests (raw_send_socket: sock >= 0).
        command += ["--threads", "1"]
        self._process = subprocess.Popen(
            [*command, "file", str(self._file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self.socket.exists)

    def hang(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Once or more often."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def server(file: Path, *, size: int) -> Iterator[Server]:
    """Killed at the end, whatever became of it."""
    made = Server(file, size=size)
    try:
        yield made
    finally:
        made.kill()


@contextlib.contextmanager
def nbd_export(file: Path, *, size: int) -> Iterator[Breakable]:
    """A member whose server is killed."""
    with server(file, size=size) as made:
        yield Breakable(made.uri, made.kill)


@contextlib.contextmanager
def loop_device(file: Path, *, size: int) -> Iterator[Breakable]:
    """A member that loses nearly all of its blocks, as when its file is truncated."""
    with file.open("xb") as made:
        made.truncate(size)
    device = program("losetup", "--find", "--show", str(file)).strip()

    def shrink() -> None:
        os.truncate(file, MIB)
        program("losetup", "--set-capacity", device)

    try:
        yield Breakable(device, shrink)
    finally:
        program("losetup", "--detach", device)
