"""The server that does nothing but answer: pmblk's handshake, then ceiling.c on the connection.

    python -m bench.ceiling SOCKET FILE PROGRAM

It says what the client can take: a server that also stores what is written does more for the same
replies. One connection at a time, a process of PROGRAM for each. Not a server to keep data in.
"""

import socket
import subprocess
import sys
from pathlib import Path

from pmblkd.nbd.handshake import Export, Handshake, State
from pmblkd.nbd.wire import Opt

SOURCE = Path(__file__).with_suffix(".c")
HANDSHAKE_SECONDS = 10
COMPILE_SECONDS = 60
BUFFER_BYTES = 4 << 20  # as pmblk asks for: a batch of replies in one go
RECEIVE_BYTES = 4096


class SimpleHandshake(Handshake):
    """Refuses structured replies, as a server may.

    libnbd receives one in more pieces: 4 KiB reads at depth 32 were 165 to 170 kIOPS with them,
    215 without. `ceiling.c` can do both; the ceiling has to be the faster one.
    """

    def __init__(self, export: Export) -> None:
        super().__init__({export.name: export}, default=export.name)
        handlers = self._handlers.items()
        self._handlers = {key: value for key, value in handlers if key != Opt.STRUCTURED_REPLY}


def compiled(directory: Path) -> Path:
    """The program, built there. Raises OSError without gcc and CalledProcessError."""
    program = directory / "ceiling"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-o", str(program), str(SOURCE)]
    subprocess.run(command, check=True, timeout=COMPILE_SECONDS)
    return program


def main() -> None:
    path, file, program = sys.argv[1:]
    export = Export(
        name="",
        description="",
        size=Path(file).stat().st_size,
        read_only=False,
        preferred_block=4096,
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                _serve(connection, export, [program, str(connection.fileno()), file])


def _serve(connection: socket.socket, export: Export, command: list[str]) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    try:
        handshake = _shake_hands(connection, export)
    except OSError as error:
        print(f"handshake: {error}", file=sys.stderr)
        return
    if handshake.state is not State.READY:
        return
    assert not handshake.leftover, "a client awaits the end of the handshake"
    style = "structured" if handshake.structured else "simple"
    subprocess.run([*command, style], check=False, pass_fds=[connection.fileno()])


def _shake_hands(connection: socket.socket, export: Export) -> Handshake:
    """READY, or CLOSED, or what it was when the client left."""
    handshake = SimpleHandshake(export)
    connection.settimeout(HANDSHAKE_SECONDS)
    connection.sendall(handshake.greeting())
    while handshake.state not in (State.READY, State.CLOSED):
        data = connection.recv(RECEIVE_BYTES)
        if not data:
            break
        connection.sendall(handshake.receive(data))
    connection.settimeout(None)  # the program that inherits it wants a blocking one
    return handshake


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
