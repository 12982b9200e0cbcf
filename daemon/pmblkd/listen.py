"""Where to listen: addresses as the config writes them, and sockets bound to them.

A unix socket that a killed daemon left behind is removed; one that somebody serves, or a file that
is no socket, is an error. Nothing is left behind when binding fails.
"""

import errno
import os
import socket
import stat
from pathlib import Path

import msgspec

from pmblk import PmblkError

UNIX_PATH_BYTES_MAX = 107  # sun_path of unix(7), less its final NUL
BACKLOG = 128


class UnixAddress(msgspec.Struct, frozen=True):
    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpAddress(msgspec.Struct, frozen=True):
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """`unix:/run/pmblk/nbd.sock`, `tcp:127.0.0.1:10809` or `tcp:[::1]:10809`; else ValueError."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest.startswith("/") and "\0" not in rest:
        if len(rest.encode()) > UNIX_PATH_BYTES_MAX:
            raise ValueError(f"{text!r}: a socket's path has at most {UNIX_PATH_BYTES_MAX} bytes")
        return UnixAddress(Path(rest))
    host, _, port = rest.rpartition(":")
    number = int(port) if port.isdecimal() else 0
    if scheme == "tcp" and host and "\0" not in host and 0 < number <= 65535:
        return TcpAddress(host.removeprefix("[").removesuffix("]"), number)
    raise ValueError(f'{text!r} is no address: write "unix:/PATH" or "tcp:HOST:PORT"')


def bind(address: Address) -> socket.socket:
    """A non-blocking listening socket. Raises PmblkError."""
    if isinstance(address, UnixAddress):
        remove_stale_socket(address.path)
        family, target = socket.AF_UNIX, str(address.path)
    else:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        target = (address.host, address.port)  # type: ignore[assignment]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        if family != socket.AF_UNIX:
            # Only so that a restart need not wait for connections in TIME_WAIT.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise PmblkError(
            f"cannot listen on {address}: {error.strerror or error}", hint=_hint(error, address)
        ) from error
    return listener


def _hint(error: OSError, address: Address) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another server has it; stop that one or choose another address"
    if error.errno == errno.ENOENT and isinstance(address, UnixAddress):
        return f"make the directory {address.path.parent}"
    return "choose an address of this machine that you may use"


def check_free(address: Address) -> None:
    """Whether `bind` would succeed, as far as it can be told without changing anything."""
    if isinstance(address, UnixAddress):
        _look_at_socket(address.path)
        return
    listener = bind(address)
    listener.close()


def remove_stale_socket(path: Path) -> None:
    """Remove a socket that nobody listens on any more; a live one, or another file, is an error."""
    if _look_at_socket(path):
        path.unlink(missing_ok=True)


def _look_at_socket(path: Path) -> bool:
    """Whether there is a stale socket at `path`. Raises PmblkError if the path is not to be had."""
    if not path.parent.is_dir():
        raise PmblkError(f"no directory {path.parent}", hint="make it, or name another path")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise PmblkError(f"{path} is not a socket", hint="remove it or name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except BlockingIOError:
            pass  # its backlog is full: somebody is there
        except OSError as error:
            raise PmblkError(f"cannot use {path}: {error.strerror}") from error
    raise PmblkError(
        f"{path} is in use by another server", hint="stop that one or name another path"
    )
