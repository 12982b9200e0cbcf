"""The control socket: one JSON object a line, `{"command": "list"}` and its answer.

Both ends live here: `ControlServer` in the daemon, `ask` for the command line. An answer is
`{"ok": true, "result": ...}` or `{"ok": false, "error": "...", "failed": ...}`, where `failed`
says that the question was good and the work did not succeed. What the arguments and the results
are is `pmblkd.questions` and `pmblkd.reports`. Whoever may connect may ask; the socket is made for
its owner only.
"""

import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import structlog
import trio

from pmblk import PmblkError
from pmblkd.errors import WorkFailed
from pmblkd.listen import UnixAddress, bind
from pmblkd.questions import Question

LINE_BYTES_MAX = 64 << 10
ANSWER_SECONDS = 10
CLIENTS_MAX = 16  # more are closed at once: nobody needs them

_log = structlog.get_logger(__name__)

Answer = TypeVar("Answer")


class Handler(NamedTuple):
    """`answer` gets a `takes`, and returns what JSON can say: a `Report`, or a list of them."""

    takes: type[Question]
    answer: Callable[[Any], Awaitable[object]]


class ControlServer:
    """`handlers` by command; a handler raises PmblkError for what the asker can mend."""

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._listener: trio.SocketListener | None = None
        self._clients = 0

    def bind(self) -> None:
        sock = bind(UnixAddress(self._path))
        self._path.chmod(0o600)
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    async def run(self) -> None:
        """Until cancelled."""
        assert self._listener is not None, "bind first"
        await trio.serve_listeners(self._serve, [self._listener])

    def close(self) -> None:
        if self._listener is not None:
            self._listener.socket.close()
            self._path.unlink(missing_ok=True)
            self._listener = None

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            if self._clients >= CLIENTS_MAX:
                return
            self._clients += 1
            try:
                await self._answer_lines(stream)
            except trio.BrokenResourceError:
                pass  # the asker left
            except Exception:
                _log.exception("control connection failed")
            finally:
                self._clients -= 1

    async def _answer_lines(self, stream: trio.SocketStream) -> None:
        buffer = b""
        async for data in stream:
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                await stream.send_all(msgspec.json.encode(await self._answer(line)) + b"\n")
            if len(buffer) > LINE_BYTES_MAX:
                return

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            arguments = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            return _refusal(f"not a JSON object: {error}")
        command = str(arguments.pop("command", None))
        handler = self._handlers.get(command)
        if handler is None:
            return _refusal(f"no such command; known are {', '.join(self._handlers)}")
        try:
            question = msgspec.convert(arguments, handler.takes)
        except msgspec.ValidationError as error:
            return _refusal(f"{command}: {str(error).replace('`', '')}")
        try:
            return {"ok": True, "result": await handler.answer(question)}
        except PmblkError as error:
            return _refusal(str(error), failed=isinstance(error, WorkFailed))
        except Exception:
            # A defect of ours in a question must not take the namespaces away.
            _log.exception("control request failed", command=command)
            return _refusal("the daemon failed; its log says how", failed=True)


def _refusal(error: str, *, failed: bool = False) -> dict[str, Any]:
    return {"ok": False, "error": error, "failed": failed}


# ---- the asking end


class _Reply(msgspec.Struct):
    ok: bool
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    failed: bool = False


def ask(
    path: Path,
    command: str,
    answer_type: type[Answer],
    *,
    seconds: float = ANSWER_SECONDS,
    **arguments: Any,
) -> Answer:
    """Ask the daemon behind `path` and wait up to `seconds` for its answer.

    Raises PmblkError when it cannot be asked or refuses, WorkFailed when it tried in vain.
    """
    line = _exchange(path, {"command": command, **arguments}, seconds)
    if not line:
        raise PmblkError(f"the daemon at {path} hung up", hint="look into its log")
    try:
        reply = msgspec.json.decode(line, type=_Reply)
        if reply.ok:
            return msgspec.json.decode(reply.result, type=answer_type)
    except msgspec.MsgspecError as error:
        raise PmblkError(
            f"the daemon at {path} answers in other words: {error}",
            hint="is it of another version than this command?",
        ) from error
    raise (WorkFailed if reply.failed else PmblkError)(reply.error)


def _exchange(path: Path, request: dict[str, Any], seconds: float) -> bytes:
    """Send one line, receive one; empty when the other end hangs up."""
    connected = False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        try:
            sock.connect(str(path))
            connected = True
            sock.sendall(msgspec.json.encode(request) + b"\n")
            with sock.makefile("rb") as stream:
                return stream.readline()
        except PermissionError as error:
            raise PmblkError(
                f"{path} is not for this user: {error.strerror}",
                hint="be the user that runs the daemon, or root",
            ) from error
        except TimeoutError as error:
            raise WorkFailed(
                f"the daemon at {path} did not answer in {seconds:g} s",
                hint="it may still do what was asked; see its log",
            ) from error
        except OSError as error:
            if connected:
                return b""
            raise PmblkError(
                f"no daemon answers at {path}: {error.strerror or error}",
                hint="start it (pmblk serve CONFIG), or name its socket with --socket",
            ) from error
