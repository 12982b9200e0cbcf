"""As a service: what systemd is told, what it is given, and what `make install` puts where."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.command_line import complaint
from tests.harness.daemon import PMBLK, scratch
from tests.harness.file_systems import run

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SECONDS = 20
INSTALL_SECONDS = 120
PREFIX = "/opt/somewhere"
CONFIG = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "1MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[control]
socket = "{dir}/control.sock"
"""


def test_systemd_finds_no_fault_with_the_units() -> None:
    """With a command that is there: it looks for that too."""
    with scratch() as directory:
        for unit in (ROOT / "systemd").iterdir():
            text = unit.read_text().replace("/usr/local/bin/pmblk", PMBLK)
            (directory / unit.name).write_text(text)
        units = [str(path) for path in directory.iterdir()]
        done = subprocess.run(
            ["systemd-analyze", "verify", *units],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- notifications


@contextlib.contextmanager
def supervisor(directory: Path, *, abstract: bool = False) -> Iterator[tuple[socket.socket, str]]:
    """A socket as systemd's, and its name as NOTIFY_SOCKET has it."""
    path = str(directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{path}" if abstract else path)
        sock.settimeout(SECONDS)
        yield sock, f"@{path}" if abstract else path


@contextlib.contextmanager
def serving(directory: Path, notify: str) -> Iterator["subprocess.Popen[str]"]:
    config = directory / "pmblk.toml"
    config.write_text(CONFIG.replace("{dir}", str(directory)))
    with subprocess.Popen(
        [PMBLK, "serve", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NOTIFY_SOCKET": notify},
    ) as process:
        limit = threading.Timer(2 * SECONDS, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_systemd_hears_of_the_start_and_of_the_stop(number: signal.Signals, abstract: bool) -> None:
    with (
        scratch() as directory,
        supervisor(directory, abstract=abstract) as (sock, name),
        serving(directory, name) as process,
    ):
        assert sock.recv(4096) == b"READY=1"
        assert int(run("nbdinfo", "--size", f"nbd+unix:///data?socket={directory}/nbd.sock"))
        process.send_signal(number)
        assert sock.recv(4096) == b"STOPPING=1"
        assert process.wait(SECONDS) == 0
        left = {path.name for path in directory.iterdir()}
        assert left - {"notify"} == {"data.img", "pmblk.toml"}


def test_systemd_hears_of_a_reload_and_of_its_end_even_if_it_fails() -> None:
    with (
        scratch() as directory,
        supervisor(directory) as (sock, name),
        serving(directory, name) as process,
    ):
        assert sock.recv(4096) == b"READY=1"
        for text in (None, "[["):
            if text is not None:
                (directory / "pmblk.toml").write_text(text)
            before = time.monotonic_ns() // 1000
            process.send_signal(signal.SIGHUP)
            state, stamp = sock.recv(4096).split(b"\n")
            assert state == b"RELOADING=1"
            assert before <= int(stamp.removeprefix(b"MONOTONIC_USEC=")) <= before + SECONDS * 10**6
            assert sock.recv(4096) == b"READY=1"
        process.send_signal(signal.SIGTERM)
        assert sock.recv(4096) == b"STOPPING=1"
        assert process.wait(SECONDS) == 0


def test_a_supervisor_that_went_away_does_not_spoil_the_stop() -> None:
    with (
        scratch() as directory,
        supervisor(directory) as (sock, name),
        serving(directory, name) as process,
    ):
        assert sock.recv(4096) == b"READY=1"
        sock.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0, process.stderr and process.stderr.read()


def test_a_start_that_fails_is_never_called_ready() -> None:
    with scratch() as directory, supervisor(directory) as (sock, name):
        (directory / "data.img").touch()
        with serving(directory, name) as process:
            _, errors = process.communicate(timeout=SECONDS)
        done = subprocess.CompletedProcess(process.args, process.returncode, "", errors)
        assert "data.img is empty" in complaint(done)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(4096)


# ---- make install


@pytest.fixture(scope="module")
def staged() -> Iterator[Path]:
    """The root of an installation, which had a config already."""
    with scratch(Path("/var/tmp")) as root:
        config = root / "etc/pmblk/pmblk.toml"
        config.parent.mkdir(parents=True)
        config.write_text("# mine\n")
        install(root)
        yield root


def install(root: Path) -> None:
    subprocess.run(
        [str(ROOT / ".ci/install"), PREFIX],
        env={**os.environ, "DESTDIR": str(root)},
        stdout=subprocess.DEVNULL,
        timeout=INSTALL_SECONDS,
        check=True,
    )


def test_an_installation_has_the_command_the_units_and_nothing_else(staged: Path) -> None:
    link = staged / PREFIX[1:] / "bin/pmblk"
    assert os.readlink(link) == f"{PREFIX}/lib/pmblk/bin/pmblk"
    units = {path.name: path.read_text() for path in (staged / "etc/systemd/system").iterdir()}
    assert set(units) == {path.name for path in (ROOT / "systemd").iterdir()}
    command = f"ExecStart={PREFIX}/bin/pmblk serve /etc/pmblk/pmblk.toml"
    assert command in units["pmblkd.service"].splitlines()
    assert sorted(path.name for path in staged.iterdir()) == ["etc", "opt"]


def test_an_installation_keeps_a_config_and_brings_one_where_there_is_none(staged: Path) -> None:
    config = staged / "etc/pmblk/pmblk.toml"
    assert config.read_text() == "# mine\n"
    config.unlink()
    install(staged)
    assert config.read_text() == (ROOT / "configs/minimal.toml").read_text()


def test_an_installed_command_runs(staged: Path) -> None:
    """By the environment's own interpreter: the script names the one of its later place."""
    binaries = staged / PREFIX[1:] / "lib/pmblk/bin"
    assert run(str(binaries / "python"), str(binaries / "pmblk"), "--version").strip()
    shell = (binaries / "pmblk").read_text().splitlines()[0]
    assert shell == f"#!{PREFIX}/lib/pmblk/bin/python"


def test_an_installation_brings_no_tools_of_developers(staged: Path) -> None:
    packages = {path.name for path in staged.rglob("site-packages/*")}
    assert {"pmblk", "pmblkd", "trio"} <= packages
    assert not {"pytest", "mypy", "hypothesis", "ruff"} & packages
