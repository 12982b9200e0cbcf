"""The small parts of the daemon: listening, mounts, attach, systemd."""

import os
import socket
import threading
from pathlib import Path

import pytest

from pmblk import PmblkError
from pmblkd import attach, fuse_connections, leftovers, mounts, programs, systemd
from pmblkd.errors import WorkFailed
from pmblkd.fuse.files import ATTRIBUTE_SECONDS
from pmblkd.listen import TcpAddress, UnixAddress, bind, check_free
from pmblkd.programs import NotEnded
from tests.unit.reports import namespace_report


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(directory: Path) -> None:
    path = directory / "s"
    bind(UnixAddress(path)).close()  # what a killed daemon leaves
    check_free(UnixAddress(path))
    with bind(UnixAddress(path)), pytest.raises(PmblkError, match="in use by another server"):
        bind(UnixAddress(path))


def test_a_file_that_is_no_socket_is_left_alone(directory: Path) -> None:
    (directory / "s").write_text("precious")
    with pytest.raises(PmblkError, match="not a socket"):
        bind(UnixAddress(directory / "s"))
    assert (directory / "s").read_text() == "precious"


def test_a_missing_directory_is_named(directory: Path) -> None:
    with pytest.raises(PmblkError, match="no directory"):
        bind(UnixAddress(directory / "no" / "s"))


def test_a_port_in_use_is_said() -> None:
    taken = bind(TcpAddress("127.0.0.1", 0))
    with taken, pytest.raises(PmblkError, match="another server has it"):
        check_free(TcpAddress("127.0.0.1", taken.getsockname()[1]))


def test_an_address_of_another_machine_is_said() -> None:
    with pytest.raises(PmblkError, match="an address of this machine"):
        bind(TcpAddress("192.0.2.1", 1))


def test_mounts_are_found_by_their_exact_path() -> None:
    found = mounts.find(Path("/proc"))
    assert found is not None
    assert (found.path, found.file_system, found.source) == (Path("/proc"), "proc", "proc")
    assert os.minor(os.stat("/proc").st_dev) == found.minor
    assert mounts.find(Path("/proc/self")) is None


def test_a_mount_is_not_taken_for_alive_by_what_the_kernel_remembers_of_it() -> None:
    assert leftovers.FORGET_SECONDS > ATTRIBUTE_SECONDS


def test_a_program_that_does_not_end_is_killed_and_said() -> None:
    with pytest.raises(NotEnded, match=r"sleep did not end in 0\.1 s"):
        programs.run("sleep", "100", seconds=0.1)


def test_a_program_that_fails_has_its_words_passed_on() -> None:
    assert programs.run("echo", "fine") == "fine\n"
    with pytest.raises(WorkFailed, match=r"stat: cannot stat.*No such file"):
        programs.run("stat", "/no/such/file")
    with pytest.raises(PmblkError, match="no-such-program is not installed"):
        programs.run("no-such-program")


def test_a_connection_that_has_ended_is_aborted_without_complaint() -> None:
    """Nobody has a number that large; without root there is nothing to be done at all."""
    if os.geteuid() == 0:
        fuse_connections.abort(1 << 20)
    else:
        with pytest.raises(PmblkError, match="it takes root"):
            fuse_connections.abort(1 << 20)


@pytest.mark.parametrize(
    ("uris", "arguments"),
    [
        (
            ["nbd://127.0.0.1:10809/ns1", "nbd+unix:///ns1?socket=/run/x.sock"],
            ["-unix", "/run/x.sock", "/dev/nbd0"],
        ),
        (["nbd://[::1]:99/ns1"], ["::1", "99", "/dev/nbd0"]),
    ],
)
def test_nbd_client_is_told_where_and_what(uris: list[str], arguments: list[str]) -> None:
    told = list(attach.nbd_client_arguments(namespace_report(nbd=uris), Path("/dev/nbd0")))
    assert told == [*arguments, "-name", "ns1", "-block-size", "4096", "-nonetlink"]


def test_a_namespace_without_a_file_cannot_be_attached_through_loop() -> None:
    with pytest.raises(PmblkError, match=r"\[fuse\]"):
        attach.attach(namespace_report(), via="loop")


def test_a_namespace_that_drains_is_not_attached_anew() -> None:
    for via in ("loop", "nbd", None):
        with pytest.raises(PmblkError, match="ns1 is draining"):
            attach.attach(namespace_report(draining=True), via=via)


def test_systemd_is_told_and_its_absence_is_fine(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"\0pmblk-test-{os.getpid()}-{threading.get_ident()}"
        sock.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name[1:])
        systemd.notify("READY=1")
        assert sock.recv(100) == b"READY=1"
