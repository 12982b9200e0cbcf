"""The stage of a comparison: a scratch file, and a daemon of its own that serves it.

Everything that is made is undone when the stage's block ends: loop device, daemon, mount, files.
The namespace of the config is not touched: the scratch file lies beside its file.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pmblk import PmblkError
from pmblkd import attach, control, fuse_connections, loop, mounts
from pmblkd.compare.contenders import Contender
from pmblkd.compare.flush import flush_seconds
from pmblkd.compare.interrupts import Interrupts
from pmblkd.errors import WorkFailed
from pmblkd.reports import NamespaceReport, StatsReport, SwitchReport

NAME = "compare"
CONTROL_SOCKET, NBD_SOCKET, LOG = "control.sock", "nbd.sock", "daemon.log"
START_SECONDS = 30
STOP_SECONDS = 30
ANSWER_SECONDS = 300  # a large page table takes its time
LAST_WORDS_SECONDS = 0.5
POLL_SECONDS = 0.05
LOG_LINES = 5

Answer = TypeVar("Answer")


@contextlib.contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A directory for this comparison; gone afterwards with all that is in it.

    Raises PmblkError when it cannot be made.
    """
    try:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise PmblkError(
            f"cannot make a scratch directory in {parent}: {error.strerror}",
            hint="make the directory, or mend its rights",
        ) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


class Stage:
    """A daemon that runs. `device` is the loop device, once attached."""

    def __init__(self, process: "subprocess.Popen[bytes]", work: Path) -> None:
        self._process = process
        self._socket = work / CONTROL_SOCKET
        self._log = work / LOG
        self._nbd = work / NBD_SOCKET
        self._serving = ""
        self.device: Path | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def namespace(self) -> NamespaceReport:
        (namespace,) = self._ask("list", list[NamespaceReport])
        return namespace

    def stats(self) -> StatsReport:
        return self._ask("stats", StatsReport, name=NAME)

    def switch(self, contender: Contender) -> SwitchReport:
        """Let the contender serve. Raises PmblkError when it is not to be had here."""
        if contender.takes_reserve and self._serving == contender.name:
            self._ask_switch(Contender("extent", "extent", {}))
        report = self._ask_switch(contender)
        self._serving = contender.name
        return report

    def _ask_switch(self, contender: Contender) -> SwitchReport:
        choice = {"kind": contender.kind, "options": contender.options}
        return self._ask("switch", SwitchReport, name=NAME, **choice)

    def _ask(self, command: str, answer_type: type[Answer], **arguments: Any) -> Answer:
        """Raises PmblkError; WorkFailed with the daemon's last words when it is because it died."""
        try:
            return control.ask(
                self._socket, command, answer_type, seconds=ANSWER_SECONDS, **arguments
            )
        except PmblkError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_WORDS_SECONDS)
            self.check()
            raise

    def flush_seconds(self) -> float:
        """Flush the namespace as a client does; how long that took. Raises WorkFailed."""
        return flush_seconds(self._nbd, NAME)

    def check(self) -> None:
        """Raises WorkFailed when the daemon has ended."""
        if self._process.poll() is not None:
            log = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise WorkFailed(f"the daemon of the comparison ended: {' / '.join(log)}")

    def await_ready(self, interrupts: Interrupts) -> None:
        """Its control socket answers when all is served. Raises WorkFailed, Interrupted."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            interrupts.check()
            self.check()
            try:
                control.ask(self._socket, "list", list[NamespaceReport])
                return
            except PmblkError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Ask it to; kill it if it does not."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def serving(
    media_directory: Path,
    *,
    file_bytes: int,
    lba_bytes: int,
    busy_poll_us: int,
    with_loop: bool,
    interrupts: Interrupts,
) -> Iterator[Stage]:
    """A daemon on a new file in the directory, ready for clients; attached if `with_loop`."""
    with contextlib.ExitStack() as undo:
        work = undo.enter_context(scratch(Path(tempfile.gettempdir()), "pmblk-compare-"))
        undo.callback(_unmount, work / "mnt")
        config = work / "pmblk.toml"
        config.write_text(
            _config(work, media_directory / "media", file_bytes, lba_bytes, busy_poll_us, with_loop)
        )
        stage = _started(work, config)
        undo.callback(stage.stop)
        stage.await_ready(interrupts)
        if with_loop:
            stage.device = attach.attach(stage.namespace, via="loop")
            undo.callback(loop.detach, stage.device)
        yield stage


def _started(work: Path, config: Path) -> Stage:
    environment = {key: text for key, text in os.environ.items() if key != "NOTIFY_SOCKET"}
    with (work / LOG).open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "pmblkd", "serve", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,  # ^C is for us to act on
        )
    return Stage(process, work)


def _config(
    work: Path, media: Path, file_bytes: int, lba_bytes: int, busy_poll_us: int, with_loop: bool
) -> str:
    """TOML; its strings are JSON's. Past the daemon there would be nothing to compare."""
    fuse = f"[fuse]\nmountpoint = {json.dumps(str(work / 'mnt'))}\n" if with_loop else ""
    return (
        f'[[namespace]]\nname = "{NAME}"\npath = {json.dumps(str(media))}\n'
        f'size = {file_bytes}\nlba_size = {lba_bytes}\nreserve = true\ndax = "off"\n'
        f"[nbd]\nlisten = [{json.dumps(f'unix:{work / NBD_SOCKET}')}]\n{fuse}"
        f"[control]\nsocket = {json.dumps(str(work / CONTROL_SOCKET))}\n"
        f'[daemon]\nbusy_poll_us = {busy_poll_us}\nlog_level = "warning"\n'
    )


def _unmount(mountpoint: Path) -> None:
    """What a daemon that was killed leaves."""
    while mounts.find(mountpoint) is not None:
        mounts.unmount(mountpoint)


def loop_refusal() -> str:
    """Why this process cannot attach a loop device to a FUSE file; or nothing."""
    if os.geteuid() != 0:
        return "it takes root"
    for device in (fuse_connections.DEVICE, loop.CONTROL):
        if not device.exists():
            return f"this machine has no {device}"
    return ""
