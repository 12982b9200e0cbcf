"""The control socket: one JSON object a line, `{"command": "list"}` and its answer.

Both ends live here: `ControlServer` in the daemon, `ask` for the command line. An answer is
`{"ok": true, "result": ...}` or `{"ok": false, "error": "..."}`. Whoever may connect may ask; the
socket is made for its owner only.
"""

import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from pmblk import PmblkError
from pmblkd.listen import UnixAddress, bind

LINE_BYTES_MAX = 64 << 10
ANSWER_SECONDS = 10
CLIENTS_MAX = 16  # more are closed at once: nobody needs them

_log = structlog.get_logger(__name__)

Handler = Callable[[Mapping[str, Any]], Awaitable[Any]]


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
            request = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            return {"ok": False, "error": f"not a JSON object: {error}"}
        handler = self._handlers.get(str(request.get("command")))
        if handler is None:
            known = ", ".join(self._handlers)
            return {"ok": False, "error": f"no such command; known are {known}"}
        try:
            return {"ok": True, "result": await handler(request)}
        except PmblkError as error:
            return {"ok": False, "error": str(error)}
        except Exception:
            # A defect of ours in a question must not take the devices away.
            _log.exception("control request failed", command=request.get("command"))
            return {"ok": False, "error": "the daemon failed; its log says how"}


def ask(path: Path, command: str, **arguments: Any) -> Any:
    """Ask the daemon behind `path` and wait for the answer. Raises PmblkError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_SECONDS)
        try:
            sock.connect(str(path))
            sock.sendall(msgspec.json.encode({"command": command, **arguments}) + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline()
        except PermissionError as error:
            raise PmblkError(
                f"{path} is not for this user: {error.strerror}",
                hint="be the user that runs the daemon, or root",
            ) from error
        except OSError as error:
            raise PmblkError(
                f"no daemon answers at {path}: {error.strerror or error}",
                hint="start it (pmblk serve CONFIG), or name its socket with --socket",
            ) from error
    if not line:
        raise PmblkError(f"the daemon at {path} hung up", hint="look into its log")
    answer = msgspec.json.decode(line)
    if not answer["ok"]:
        raise PmblkError(answer["error"])
    return answer["result"]
