"""The control socket: typed answers, refusals, and what is no question at all."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from pmblk import PmblkError
from pmblkd.control import ControlServer, Handler, ask
from pmblkd.errors import WorkFailed
from pmblkd.questions import NamespaceQuestion, Question
from pmblkd.reports import NamespaceReport, RepresentationReport, SwitchReport
from tests.unit.conftest import LogRecord

T = TypeVar("T")


async def with_control(
    directory: Path, handlers: dict[str, Handler], request: Callable[[Path], T]
) -> T:
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


async def echo(question: NamespaceQuestion) -> SwitchReport:
    one = RepresentationReport(kind=question.name, options={})
    return SwitchReport(
        name=question.name, before=one, after=one, build_seconds=0, pause_seconds=1.5
    )


async def refuse(_question: Question) -> None:
    raise PmblkError("cannot", hint="do otherwise")


async def try_in_vain(_question: Question) -> None:
    raise WorkFailed("no memory")


async def fail(_question: Question) -> None:
    raise ZeroDivisionError


ECHO = Handler(NamespaceQuestion, echo)


async def test_the_control_socket_answers_its_owner(directory: Path) -> None:
    def request(path: Path) -> SwitchReport:
        assert path.stat().st_mode & 0o777 == 0o600
        return ask(path, "echo", SwitchReport, name="x")

    report = await with_control(directory, {"echo": ECHO}, request)
    assert (report.after.kind, report.pause_seconds) == ("x", 1.5)
    assert not (directory / "c").exists()


async def test_a_refusal_reaches_the_asker_as_it_is(directory: Path) -> None:
    handlers = {"refuse": Handler(Question, refuse), "try": Handler(Question, try_in_vain)}

    def request(path: Path) -> None:
        with pytest.raises(PmblkError) as refused:
            ask(path, "refuse", SwitchReport)
        assert str(refused.value) == "cannot; do otherwise"
        assert not isinstance(refused.value, WorkFailed)
        with pytest.raises(WorkFailed, match="no memory"):
            ask(path, "try", SwitchReport)

    await with_control(directory, handlers, request)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "echo: Object missing required field name"),
        ({"name": 5}, "echo: Expected str, got int"),
        ({"name": "x", "size": 5}, "echo: Object contains unknown field size"),
    ],
)
async def test_arguments_that_a_command_does_not_take_are_refused(
    directory: Path, arguments: dict[str, Any], words: str
) -> None:
    def request(path: Path) -> None:
        with pytest.raises(PmblkError, match=words):
            ask(path, "echo", SwitchReport, **arguments)

    await with_control(directory, {"echo": ECHO}, request)


async def test_an_answer_of_another_type_is_no_traceback(directory: Path) -> None:
    def request(path: Path) -> None:
        with pytest.raises(PmblkError, match="of another version"):
            ask(path, "echo", list[NamespaceReport], name="x")

    await with_control(directory, {"echo": ECHO}, request)


async def test_who_asks_waits_as_long_as_it_says(directory: Path) -> None:
    async def hang(_question: Question) -> None:
        await trio.sleep_forever()

    def request(path: Path) -> None:
        with pytest.raises(WorkFailed, match=r"did not answer in 0\.01 s"):
            ask(path, "hang", SwitchReport, seconds=0.01)

    await with_control(directory, {"hang": Handler(Question, hang)}, request)


async def test_a_defect_in_a_question_is_logged_and_the_daemon_lives(
    directory: Path, logged: LogRecord
) -> None:
    def request(path: Path) -> SwitchReport:
        with pytest.raises(PmblkError, match="its log says how"):
            ask(path, "fail", SwitchReport)
        return ask(path, "echo", SwitchReport, name="x")

    assert await with_control(directory, {"fail": Handler(Question, fail), "echo": ECHO}, request)
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

    assert answer in await with_control(directory, {"echo": ECHO}, request)


async def test_an_endless_line_is_cut_off(directory: Path) -> None:
    def request(path: Path) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            try:
                sock.sendall(b"x" * (1 << 20))
                return sock.recv(1)
            except (BrokenPipeError, ConnectionResetError):
                return b""

    assert await with_control(directory, {"echo": ECHO}, request) == b""


def test_no_daemon_is_said_with_a_hint(directory: Path) -> None:
    with pytest.raises(PmblkError, match="start it"):
        ask(directory / "none", "list", list[NamespaceReport])
