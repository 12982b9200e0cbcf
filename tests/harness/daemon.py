"""A real daemon for tests, the demo and the benchmarks: started, awaited, stopped, cleaned up."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pmblkd import control, mounts
from pmblkd.reports import NamespaceReport, PoisonReport, ReloadReport, StatsReport, SwitchReport

PMBLK = str(Path(sys.executable).with_name("pmblk"))
START_SECONDS = 15
STOP_SECONDS = 30


class Daemon:
    """`pmblk serve` on a config file. `log` is what it wrote to standard error so far."""

    def __init__(
        self,
        directory: Path,
        config: str,
        *,
        overrides: Sequence[str] = (),
        program: Sequence[str] = (PMBLK, "serve"),
    ) -> None:
        self.directory = directory
        self._program = program
        self.config = directory / "pmblk.toml"
        self.config.write_text(config)
        self.socket = directory / "control.sock"
        self.ready_seconds = 0.0
        self._overrides = [f"control.socket={self.socket}", *overrides]
        self._log = directory / "daemon.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def command(self, *arguments: str) -> list[str]:
        """`pmblk ARGUMENTS --socket THIS`, for subprocess."""
        return [PMBLK, *arguments, "--socket", str(self.socket)]

    def start(self) -> "Daemon":
        """Start it and wait for READY=1. Raises AssertionError with its log if it ends instead."""
        path = self.directory / "notify.sock"
        path.unlink(missing_ok=True)
        sets = [argument for override in self._overrides for argument in ("--set", override)]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(path))
            path.chmod(0o666)  # the program may run the daemon as somebody else
            notify.settimeout(0.05)
            started = time.monotonic()
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*self._program, str(self.config), *sets],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "NOTIFY_SOCKET": str(path)},
                    start_new_session=True,
                )
            self._await_ready(notify, started)
        self.ready_seconds = time.monotonic() - started
        return self

    def _await_ready(self, notify: socket.socket, started: float) -> None:
        assert self._process is not None
        while time.monotonic() < started + START_SECONDS:
            try:
                if b"READY=1" in notify.recv(4096):
                    return
            except TimeoutError:
                pass
            if self._process.poll() is not None:
                raise AssertionError(f"the daemon ended at its start:\n{self.log}")
        self.kill()
        raise AssertionError(f"the daemon was not ready in {START_SECONDS} s:\n{self.log}")

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the daemon did not stop:\n{self.log}") from None

    def kill(self) -> None:
        """SIGKILL: what a crash leaves behind stays behind."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def list(self) -> list[dict[str, Any]]:
        return [dict(msgspec.to_builtins(report)) for report in self._reports()]

    def report(self, name: str) -> NamespaceReport:
        """What `list` has of that namespace. AssertionError when there is none of that name."""
        found = [report for report in self._reports() if report.name == name]
        assert len(found) == 1, f"{len(found)} namespaces are called {name}"
        return found[0]

    def _reports(self) -> Sequence[NamespaceReport]:
        return control.ask(self.socket, "list", list[NamespaceReport])

    def stats(self, name: str) -> StatsReport:
        return control.ask(self.socket, "stats", StatsReport, name=name)

    def kind(self, name: str) -> str:
        """Which representation serves the namespace."""
        representation = self.stats(name).representation
        assert representation is not None, f"{name} is an array"
        return representation.kind

    def switch(self, name: str, kind: str, **options: Any) -> SwitchReport:
        return control.ask(
            self.socket,
            "switch",
            SwitchReport,
            seconds=STOP_SECONDS,
            name=name,
            kind=kind,
            options=options,
        )

    def poison(self, name: str, offset: int, length: int) -> PoisonReport:
        return control.ask(
            self.socket, "poison", PoisonReport, name=name, offset=offset, length=length
        )

    def reload(self, config: str | None = None) -> ReloadReport:
        """With another config, if there is one; `{dir}` in it stands for the directory."""
        if config is not None:
            self.config.write_text(config.replace("{dir}", str(self.directory)))
        return control.ask(self.socket, "reload", ReloadReport, seconds=STOP_SECONDS)

    def uri(self, name: str = "", *, socket_name: str = "nbd.sock") -> str:
        return f"nbd+unix:///{name}?socket={self.directory / socket_name}"


@contextlib.contextmanager
def scratch(parent: Path = Path("/dev/shm")) -> Iterator[Path]:
    """A directory for one test's media, sockets and mounts; gone afterwards, mounts and all."""
    directory = Path(tempfile.mkdtemp(prefix="pmblk-", dir=parent))
    try:
        yield directory
    finally:
        for mountpoint in (directory / "mnt", directory):
            while mounts.find(mountpoint) is not None:
                mounts.unmount(mountpoint)
        subprocess.run(
            ["rm", "-rf", "--one-file-system", str(directory)], check=True, timeout=STOP_SECONDS
        )


@contextlib.contextmanager
def running(config: str, *, overrides: Sequence[str] = ()) -> Iterator[Daemon]:
    """A daemon in a scratch directory; `{dir}` in the config stands for it."""
    with scratch() as directory:
        daemon = Daemon(directory, config.replace("{dir}", str(directory)), overrides=overrides)
        try:  # around the start too: an interrupt there must not leave a daemon behind
            daemon.start()
            yield daemon
        finally:
            if daemon.running:
                daemon.stop()
