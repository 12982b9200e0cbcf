"""The small parts of the daemon: listening, the control socket, mounts, attach, exit."""

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from pmblk import PmblkError
from pmblkd import attach, systemd
from pmblkd.control import ControlServer, ask
from pmblkd.errors import first_leaf
from pmblkd.fuse import mounts
from pmblkd.listen import TcpAddress, UnixAddress, bind, check_free
from tests.unit.conftest import LogRecord


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


async def with_control(directory: Path, handlers: dict[str, Any], request: Any) -> Any:
    """What `request`, run in a thread with the socket's path, returns."""
    server = ControlServer(directory / "c", handlers)
    server.bind()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            answer = await trio.to_thread.run_sync(request, directory / "c")
            nursery.cancel_scope.cancel()
    finally:
        server.close()
    return answer


async def echo(request: Any) -> Any:
    return dict(request)


async def refuse(request: Any) -> Any:
    raise PmblkError("cannot", hint="do otherwise")


async def fail(request: Any) -> Any:
    raise ZeroDivisionError


async def test_the_control_socket_answers_its_owner(directory: Path) -> None:
    def request(path: Path) -> Any:
        assert path.stat().st_mode & 0o777 == 0o600
        return ask(path, "echo", name="x")

    assert await with_control(directory, {"echo": echo}, request) == {
        "command": "echo",
        "name": "x",
    }
    assert not (directory / "c").exists()


async def test_a_refusal_reaches_the_asker_as_it_is(directory: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        await with_control(directory, {"refuse": refuse}, lambda path: ask(path, "refuse"))
    assert str(first_leaf(caught.value)) == "cannot; do otherwise"


async def test_a_defect_in_a_question_is_logged_and_the_daemon_lives(
    directory: Path, logged: LogRecord
) -> None:
    def request(path: Path) -> Any:
        with pytest.raises(PmblkError, match="its log says how"):
            ask(path, "fail")
        return ask(path, "echo")

    assert await with_control(directory, {"fail": fail, "echo": echo}, request)
    logged.expect("control request failed")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (b"{\n", b"not a JSON object"),
        (b'{"a":"\xff"}\n', b"not a JSON object"),
        (b'{"a":' + b"[" * 60000 + b"\n", b"not a JSON object"),
        (b"[]\n", b"not a JSON object"),
        (b"{}\n", b"known are echo"),
    ],
)
async def test_what_is_no_request_is_answered(directory: Path, line: bytes, answer: bytes) -> None:
    def request(path: Path) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(line)
            return sock.recv(4096)

    assert answer in await with_control(directory, {"echo": echo}, request)


async def test_an_endless_line_is_cut_off(directory: Path) -> None:
    def request(path: Path) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            try:
                sock.sendall(b"x" * (1 << 20))
                return sock.recv(1)
            except (BrokenPipeError, ConnectionResetError):
                return b""

    assert await with_control(directory, {"echo": echo}, request) == b""


def test_no_daemon_is_said_with_a_hint(directory: Path) -> None:
    with pytest.raises(PmblkError, match="start it"):
        ask(directory / "none", "list")


def test_mounts_are_found_by_their_exact_path() -> None:
    assert mounts.find(Path("/proc")) == mounts.Mount(Path("/proc"), "proc", "proc")
    assert mounts.find(Path("/proc/self")) is None


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
    namespace = {"name": "ns1", "lba_size": 4096, "nbd": uris, "read_only": False}
    told = list(attach.nbd_client_arguments(namespace, Path("/dev/nbd0")))
    assert told == [*arguments, "-name", "ns1", "-block-size", "4096", "-nonetlink"]


def test_a_namespace_without_a_file_cannot_be_attached_through_loop() -> None:
    with pytest.raises(PmblkError, match=r"\[fuse\]"):
        attach.attach({"name": "a", "fuse": None, "nbd": []}, via="loop")


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
